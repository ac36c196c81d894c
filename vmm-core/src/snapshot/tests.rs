//! Directories that look like snapshots and are none, and what killed snapshots leave.

use std::fs::{self, File};
use std::os::unix::fs::symlink;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

use super::place::{MANIFEST, MEMORY, STATE};
use super::*;

pub(super) const BYTES: u64 = 128 << 20;

/// A snapshot of a machine without devices, with no part in its state.
pub(super) fn make(dir: &Path) {
    let state = Sections::default().to_bytes().unwrap();
    let config: VmConfig =
        serde_json::from_value(json!({ "kernel": "vmlinux", "memory": BYTES, "devices": [] })).unwrap();
    let manifest = Manifest {
        format: manifest::FORMAT,
        id: "00".into(),
        made_by: "a test".into(),
        made_at: 0,
        devices: Vec::new(),
        aliases: Default::default(),
        disks: Vec::new(),
        memory: MemoryMap { bytes: BYTES, ranges: ranges(BYTES), crc32: Some(0), diff: None },
        config,
        state_bytes: state.len() as u64,
        state_crc32: crc32fast::hash(&state),
    };
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join(MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
    fs::write(dir.join(STATE), state).unwrap();
    File::create(dir.join(MEMORY)).unwrap().set_len(BYTES).unwrap();
}

/// Changes the manifest in `dir`.
pub(super) fn edit(dir: &Path, change: impl FnOnce(&mut Value)) {
    let file = dir.join(MANIFEST);
    let mut value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    change(&mut value);
    fs::write(file, serde_json::to_vec(&value).unwrap()).unwrap();
}

/// What is said about the snapshot, which is refused.
fn refused(dir: &Path) -> String {
    let said = Snapshot::open(dir).map(|_| ()).unwrap_err().to_string();
    assert!(said.len() < 600 && !said.contains('\n'), "one sentence: {said}");
    said
}

#[test]
fn pipes_directories_links_and_nothing_in_place_of_files() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("s");
    for name in [MANIFEST, STATE, MEMORY] {
        make(&dir);
        Snapshot::open(&dir).unwrap();
        let file = dir.join(name);
        fs::remove_file(&file).unwrap();
        refused(&dir);
        mknodat(CWD, &file, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert!(refused(&dir).contains("no regular file"), "{name}");
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        refused(&dir);
        fs::remove_dir(&file).unwrap();
        // The last one is a file that would do.
        let other = dir.with_file_name("other");
        make(&other);
        let other = other.join(name);
        for target in [Path::new(name), Path::new("/dev/zero"), Path::new("missing"), &other] {
            symlink(target, &file).unwrap();
            refused(&dir);
            fs::remove_file(&file).unwrap();
        }
    }
}

#[test]
fn a_memory_file_of_another_length_and_a_changed_state_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    make(dir);
    let memory = File::options().write(true).open(dir.join(MEMORY)).unwrap();
    for bytes in [0, 1, BYTES - 1, BYTES + 1, 2 * BYTES] {
        memory.set_len(bytes).unwrap();
        assert!(refused(dir).contains("bytes"), "{bytes}");
    }
    make(dir);
    for state in [&b""[..], b"vmmstate", &[0; 100]] {
        fs::write(dir.join(STATE), state).unwrap();
        refused(dir);
    }
}

#[test]
fn manifests_of_any_content_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    make(dir);
    let good = fs::read(dir.join(MANIFEST)).unwrap();
    for len in (0..good.len()).step_by(7) {
        fs::write(dir.join(MANIFEST), &good[..len]).unwrap();
        refused(dir);
    }
    for bytes in [&[0xff; 100][..], &[b'['; 100_000], b"null", b"{}", b"{\"format\": 1e400}"] {
        fs::write(dir.join(MANIFEST), bytes).unwrap();
        refused(dir);
    }
    let changes: [fn(&mut Value); 12] = [
        |m| m["format"] = json!(2),
        |m| m["format"] = json!(-1),
        |m| m["more"] = json!(1),
        |m| m["config"]["memory"] = json!(u64::MAX),
        |m| m["config"]["memory"] = json!(0),
        |m| m["config"]["cpus"] = json!(0),
        |m| m["config"]["cpus"] = json!(255),
        |m| m["config"]["devices"] = json!(vec![json!({ "kind": "rng" }); 5000]),
        |m| m["memory"]["ranges"] = json!([]),
        |m| m["memory"]["ranges"][0]["bytes"] = json!(u64::MAX),
        |m| m["state_bytes"] = json!(u64::MAX),
        |m| m["devices"] = json!([{ "name": "a", "kind": "rng", "address": 0 }]),
    ];
    for change in changes {
        fs::write(dir.join(MANIFEST), &good).unwrap();
        edit(dir, change);
        refused(dir);
    }
}

#[test]
fn chains_that_loop_break_or_have_absurd_pages_are_refused() {
    let top = tempfile::tempdir().unwrap();
    let [base, diff] = ["base", "diff"].map(|name| top.path().join(name));
    make(&base);
    make(&diff);
    let set = |diff: &Path, parent: &str, path: &str, pages: Value| {
        edit(diff, |m| m["memory"]["diff"] = json!({ "parent": parent, "path": path, "pages": pages }));
    };
    set(&diff, "00", "../base", json!([[0, 4096]]));
    Snapshot::open(&diff).unwrap();
    set(&diff, "01", "../base", json!([]));
    assert!(refused(&diff).contains("is not the snapshot"));
    for path in ["", ".", "../diff", "../diff/../diff"] {
        set(&diff, "00", path, json!([]));
        assert!(refused(&diff).contains("over itself"), "{path}");
    }
    for path in ["../none", "/", "/etc/passwd", "base\0"] {
        set(&diff, "00", path, json!([]));
        refused(&diff);
    }
    for pages in [
        json!([[1, 4096]]),
        json!([[0, 0]]),
        json!([[0, 4095]]),
        json!([[BYTES, 4096]]),
        json!([[u64::MAX - 4095, 4096]]),
        json!([[4096, 4096], [0, 4096]]),
        json!([[0, 8192], [4096, 4096]]),
        json!(vec![[0, 4096]; 100_000]),
    ] {
        set(&diff, "00", "../base", pages);
        assert!(refused(&diff).contains("pages"));
    }
}

#[test]
fn what_a_killed_snapshot_left_goes_with_the_next_one_and_nothing_else_does() {
    let top = tempfile::tempdir().unwrap();
    let place = top.path().join("s");
    let names = |top: &Path| {
        let names = fs::read_dir(top).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    };
    let draft = top.path().join(".s.vmm-draft.0123abcd");
    fs::create_dir(&draft).unwrap();
    fs::write(draft.join(MEMORY), [1]).unwrap();
    let others = [
        ".s.20261128",
        ".s.vmm-draft.0123abc",
        ".s.vmm-draft.0123abcdx",
        ".s.vmm-draft.wwwwwwww",
        ".t.vmm-draft.0123abcd",
        "s.vmm-draft.0123abcd",
    ];
    others.iter().for_each(|other| fs::create_dir(top.path().join(other)).unwrap());
    let first = Draft::begin(&Place::Dir(place.clone()), SnapshotKind::Full).unwrap();
    let second = Draft::begin(&Place::Dir(place.clone()), SnapshotKind::Full).unwrap();
    assert!(first.draft.path().is_dir() && second.draft.path().is_dir(), "one at work stays");
    assert_eq!(names(top.path()).len(), others.len() + 2);
    drop((first, second));
    let mut left = others.map(String::from);
    left.sort();
    assert_eq!(names(top.path()), left);
}

#[test]
fn only_a_snapshot_is_replaced_and_no_link_of_a_chain() {
    let top = tempfile::tempdir().unwrap();
    let at = |name: &str| top.path().join(name);
    let begin = |name: &str| Draft::begin(&Place::Dir(at(name)), SnapshotKind::Full).map(drop);
    make(&at("base"));
    begin("base").unwrap();
    for text in ["{}", "{\"name\": \"a web app\"}", "{\"format\": 1}", "[]", ""] {
        fs::create_dir_all(at("app")).unwrap();
        fs::write(at("app").join(MANIFEST), text).unwrap();
        assert!(matches!(begin("app"), Err(SnapshotFailed::Taken(_))), "{text}");
    }

    let dir = |name: &str| Place::Dir(at(name));
    let links = ["base", "one", "two", "three"];
    for pair in links.windows(2) {
        make(&at(pair[1]));
        edit(&at(pair[1]), |m| {
            m["memory"]["diff"] = json!({ "parent": "00", "path": format!("../{}", pair[0]), "pages": [] });
        });
    }
    let base = || Base { id: "00".into(), place: dir("three") };
    for link in links {
        assert!(matches!(dir(link).diff(base(), Vec::new()), Err(SnapshotFailed::OverBase(_))), "{link}");
        let other = format!("link-to-{link}");
        symlink(at(link), at(&other)).unwrap();
        assert!(dir(&other).diff(base(), Vec::new()).is_err(), "{other}");
    }
    assert!(dir("four").diff(base(), Vec::new()).is_ok());
    make(&at("other"));
    assert!(dir("other").diff(base(), Vec::new()).is_ok(), "what is no link may go");
}

#[test]
fn what_is_opened_is_one_snapshot_while_others_take_its_place() {
    use std::os::unix::fs::FileExt;
    let top = tempfile::tempdir().unwrap();
    let [place, draft] = ["s", "t"].map(|name| top.path().join(name));
    // The memory says whose it is.
    let make_one = |dir: &Path, id: u64| {
        make(dir);
        edit(dir, |m| m["id"] = json!(id.to_string()));
        let memory = File::options().write(true).open(dir.join(MEMORY)).unwrap();
        memory.write_all_at(&id.to_le_bytes(), 0).unwrap();
    };
    make_one(&place, 0);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for id in (1..).take_while(|_| !done.load(std::sync::atomic::Ordering::Relaxed)) {
                make_one(&draft, id);
                rustix::fs::renameat_with(CWD, &draft, CWD, &place, rustix::fs::RenameFlags::EXCHANGE)
                    .unwrap();
                fs::remove_dir_all(&draft).unwrap();
            }
        });
        for _ in 0..300 {
            match Snapshot::open(&place) {
                Ok(snapshot) => {
                    let mut id = [0; 8];
                    snapshot.image.as_ref().unwrap().base().read_exact_at(&mut id, 0).unwrap();
                    assert_eq!(snapshot.manifest.id, u64::from_le_bytes(id).to_string());
                }
                Err(error) => assert!(matches!(error, SnapshotFailed::Replaced(_)), "{error}"),
            }
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
