//! Packed snapshots come back as they were, and nothing comes of what only looks like one.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::super::tests::{BYTES, edit, make};
use super::*;

/// Pages of the memory with what is in them.
const PAGES: [(u64, u8); 4] = [(0, 1), (1, 2), (3, 3), (BYTES / 4096 - 1, 4)];

/// A snapshot with some pages in its memory.
fn snapshot(dir: &Path, id: &str) -> Snapshot {
    make(dir);
    let memory = File::options().write(true).open(dir.join(MEMORY)).unwrap();
    let pages = PAGES.map(|(page, byte)| (page * 4096, [byte; 4096]));
    pages.iter().for_each(|(offset, bytes)| memory.write_all_at(bytes, *offset).unwrap());
    let crc32 = crc32fast::hash(&pages.map(|(_, bytes)| bytes).concat());
    edit(dir, |manifest| {
        manifest["id"] = json!(id);
        manifest["memory"]["crc32"] = json!(crc32);
    });
    Snapshot::open(dir).unwrap()
}

fn pack(snapshot: &Snapshot) -> Vec<u8> {
    let mut packed = Vec::new();
    snapshot.pack(&mut packed, &mut |_, _| ()).unwrap();
    packed
}

fn unpack(packed: &[u8], dir: &Path) -> Result<String, SnapshotFailed> {
    Snapshot::unpack(packed, dir, &mut |_, _| ())
}

/// A place with nothing beside it, where what is unpacked goes.
struct Target {
    top: TempDir,
    dir: PathBuf,
}

impl Target {
    fn new() -> Self {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("to");
        Self { top, dir }
    }

    /// What is said of a packed snapshot, of which nothing may be left.
    fn refuses(&self, packed: &[u8]) -> String {
        let said = unpack(packed, &self.dir).unwrap_err().to_string();
        assert!(said.len() < 600 && !said.contains('\n'), "one sentence: {said}");
        assert_eq!(fs::read_dir(self.top.path()).unwrap().count(), 0, "{said}");
        said
    }
}

#[test]
fn what_is_packed_comes_back_with_its_holes_and_its_id() {
    let top = tempfile::tempdir().unwrap();
    let (from, to) = (top.path().join("from"), top.path().join("to"));
    let mut seen = Vec::new();
    let mut packed = Vec::new();
    let id = snapshot(&from, "07").pack(&mut packed, &mut |done, total| seen.push((done, total))).unwrap();
    assert_eq!((id.as_str(), seen.last()), ("07", Some(&(4 * 4096, 4 * 4096))));
    assert!(packed.len() < 4096, "holes cost nothing: {}", packed.len());
    // What is there is replaced, as by any snapshot.
    for _ in 0..2 {
        assert_eq!(unpack(&packed, &to).unwrap(), "07");
        for name in [STATE, MEMORY] {
            assert!(fs::read(from.join(name)).unwrap() == fs::read(to.join(name)).unwrap(), "{name}");
        }
        assert_eq!(Snapshot::open(&from).unwrap().manifest, Snapshot::open(&to).unwrap().manifest);
        let memory = fs::metadata(to.join(MEMORY)).unwrap();
        assert!(memory.blocks() * 512 < 1 << 20, "{} blocks", memory.blocks());
        assert_eq!((memory.mode() & 0o777, memory.len()), (0o600, BYTES));
    }
    assert_eq!(Snapshot::verify(&to).len(), 0);
}

#[test]
fn a_diff_is_merged_on_the_way() {
    let top = tempfile::tempdir().unwrap();
    let [base, diff, to, merged] = ["base", "diff", "to", "merged"].map(|name| top.path().join(name));
    snapshot(&base, "00");
    snapshot(&diff, "01");
    // Of the diff's file, one page counts, and one hole over what is in the base.
    let memory = File::options().write(true).open(diff.join(MEMORY)).unwrap();
    memory.set_len(0).unwrap();
    memory.set_len(BYTES).unwrap();
    memory.write_all_at(&[9; 4096], 4096).unwrap();
    edit(&diff, |m| {
        m["memory"]["diff"] = json!({ "parent": "00", "path": "../base", "pages": [[0, 8192]] });
        m["memory"]["crc32"] = json!(crc32fast::hash(&[9; 4096]));
    });
    let chain = Snapshot::open(&diff).unwrap();
    assert_eq!(Snapshot::verify(&diff).len(), 0);
    assert_eq!(chain.chain().unwrap().iter().map(|link| &link.id[..]).collect::<Vec<_>>(), ["01", "00"]);
    let id = unpack(&pack(&chain), &to).unwrap();
    assert_eq!(id.len(), 32, "one of its own");
    let report = chain.merge_to(&merged).unwrap();
    assert_eq!(report.memory_bytes, 3 * 4096);
    let mut want = vec![0; BYTES as usize];
    for (page, byte) in [(1, 9), PAGES[2], PAGES[3]] {
        want[page as usize * 4096..][..4096].fill(byte);
    }
    for dir in [&to, &merged] {
        let one = Snapshot::open(dir).unwrap();
        assert!(one.manifest.memory.diff.is_none() && one.manifest.made_at == chain.manifest.made_at);
        assert!(fs::read(dir.join(MEMORY)).unwrap() == want);
        assert_eq!(Snapshot::verify(dir).len(), 0);
    }
    for place in [&base, &diff, &top.path().join("to/../base")] {
        assert!(matches!(chain.merge_to(place), Err(SnapshotFailed::OverBase(_))), "{place:?}");
    }
    // What is damaged does not become right.
    File::options().write(true).open(base.join(MEMORY)).unwrap().write_all_at(&[1], 3 * 4096).unwrap();
    assert!(matches!(chain.merge_to(&to), Err(SnapshotFailed::Memory(MemoryFileError::Contents { .. }))));
    assert!(chain.pack(io::sink(), &mut |_, _| ()).is_err());
    let wrong = Snapshot::verify(&diff);
    assert!(wrong.len() == 1 && wrong[0].to_string().contains("base"), "{wrong:?}");
}

/// A snapshot with a disk, most of which is zero.
fn with_disk(dir: &Path) -> Snapshot {
    snapshot(dir, "00");
    let disk = File::create(dir.join("disk0.raw")).unwrap();
    disk.set_len(25_000).unwrap();
    disk.write_all_at(&[5; 4096], 8192).unwrap();
    disk.write_all_at(&[6; 424], 24_576).unwrap();
    edit(dir, |m| {
        m["config"]["devices"] = json!([{ "kind": "disk", "path": "/host/disk.img" }]);
        m["devices"] = json!([{ "name": "disk0", "kind": "disk", "address": 0xd000_0000_u64 }]);
        m["disks"] = json!([{ "device": "disk0", "file": "disk0.raw", "format": "raw", "bytes": 25_000 }]);
    });
    Snapshot::open(dir).unwrap()
}

#[test]
fn disks_come_along() {
    let top = tempfile::tempdir().unwrap();
    let [from, to, merged] = ["from", "to", "merged"].map(|name| top.path().join(name));
    let snapshot = with_disk(&from);
    unpack(&pack(&snapshot), &to).unwrap();
    snapshot.merge_to(&merged).unwrap();
    for dir in [&to, &merged] {
        assert!(fs::read(from.join("disk0.raw")).unwrap() == fs::read(dir.join("disk0.raw")).unwrap());
        assert_eq!(fs::metadata(dir.join("disk0.raw")).unwrap().mode() & 0o777, 0o600);
        assert_eq!(Snapshot::verify(dir).len(), 0);
    }
    assert!(fs::metadata(to.join("disk0.raw")).unwrap().blocks() * 512 < 25_000, "holes stay");
    fs::remove_file(to.join("disk0.raw")).unwrap();
    std::os::unix::fs::symlink(from.join("disk0.raw"), to.join("disk0.raw")).unwrap();
    assert!(Snapshot::open(&to).unwrap_err().to_string().contains("it is a link"));
    fs::remove_file(to.join("disk0.raw")).unwrap();
    assert_eq!(Snapshot::verify(&to).len(), 1);
}

#[test]
fn disks_that_are_none_are_refused() {
    let top = tempfile::tempdir().unwrap();
    let good = entries(&with_disk(&top.path().join("from")));
    let names: Vec<_> = good.iter().map(|entry| &entry.name[..]).collect();
    assert_eq!(names, [MANIFEST, STATE, "memory.map", MEMORY, "disk0.raw.map", "disk0.raw"]);
    let target = Target::new();
    let manifest: Value = serde_json::from_slice(&good[0].bytes).unwrap();
    for (key, value) in [
        ("file", json!("../disk0.raw")),
        ("file", json!("/tmp/disk0.raw")),
        ("file", json!("memory")),
        ("file", json!("manifest.json")),
        ("file", json!("")),
        ("file", json!("..")),
        ("device", json!("disk1")),
        ("format", json!("vhd")),
        ("bytes", json!(24_999)),
        ("bytes", json!(u64::MAX)),
    ] {
        let (mut changed, mut entries) = (manifest.clone(), good.clone());
        changed["disks"][0][key] = value;
        if key == "file" {
            let name = changed["disks"][0][key].as_str().unwrap().to_owned();
            entries[4].name = format!("{name}.map");
            entries[5].name = name;
        }
        entries[0] = Entry::new(MANIFEST, serde_json::to_vec(&changed).unwrap());
        target.refuses(&archive(&entries));
    }
    let mut twice = manifest.clone();
    twice["disks"] = json!([manifest["disks"][0], manifest["disks"][0]]);
    let mut entries = good.clone();
    entries[0] = Entry::new(MANIFEST, serde_json::to_vec(&twice).unwrap());
    entries.extend_from_slice(&good[4..]);
    target.refuses(&archive(&entries));
    target.refuses(&archive(&good[..4]));
    for map in [json!([[8192, 4096], [24_576, 425]]), json!([[0, u64::MAX]]), json!([])] {
        let mut entries = good.clone();
        entries[4] = Entry::new("disk0.raw.map", serde_json::to_vec(&map).unwrap());
        target.refuses(&archive(&entries));
    }
}

#[test]
fn every_cut_and_every_flipped_byte_leaves_nothing() {
    let top = tempfile::tempdir().unwrap();
    let packed = pack(&snapshot(&top.path().join("from"), "00"));
    let target = Target::new();
    for len in 0..packed.len() {
        target.refuses(&packed[..len]);
    }
    target.refuses(&[&packed[..], &[0]].concat());
    target.refuses(&[&packed[..], &packed[..]].concat());
    for at in 0..packed.len() {
        let mut changed = packed.clone();
        changed[at] ^= 0x10;
        // Some bits say how zstd is to work, not what is in it.
        if unpack(&changed, &target.dir).is_ok() {
            assert_eq!(Snapshot::verify(&target.dir).len(), 0, "byte {at}");
            fs::remove_dir_all(&target.dir).unwrap();
        }
        assert_eq!(fs::read_dir(target.top.path()).unwrap().count(), 0, "byte {at}");
    }
}

/// An entry of an archive that somebody has made up.
#[derive(Clone)]
struct Entry {
    name: String,
    kind: EntryType,
    bytes: Vec<u8>,
    /// What its header says.
    size: u64,
}

impl Entry {
    fn new(name: &str, bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        Self { name: name.into(), kind: EntryType::Regular, size: bytes.len() as u64, bytes }
    }
}

/// The entries of a snapshot that is in order.
fn entries(snapshot: &Snapshot) -> Vec<Entry> {
    let packed = pack(snapshot);
    let mut archive = tar::Archive::new(zstd::Decoder::new(&packed[..]).unwrap());
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        Entry::new(entry.path().unwrap().to_str().unwrap(), bytes)
    });
    entries.collect()
}

fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        let mut header = Header::new_gnu();
        let name = entry.name.as_bytes();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.set_entry_type(entry.kind);
        header.set_size(entry.size);
        header.set_mode(0o600);
        header.set_cksum();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&entry.bytes);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes.resize(bytes.len() + 1024, 0);
    zstd::encode_all(&bytes[..], 1).unwrap()
}

#[test]
fn archives_of_anything_else_are_refused() {
    let top = tempfile::tempdir().unwrap();
    let good = entries(&snapshot(&top.path().join("from"), "00"));
    assert_eq!(
        good.iter().map(|entry| &entry.name[..]).collect::<Vec<_>>(),
        [MANIFEST, STATE, "memory.map", MEMORY]
    );
    let target = Target::new();
    unpack(&archive(&good), &target.dir).unwrap();
    fs::remove_dir_all(&target.dir).unwrap();
    type Change = fn(&mut Vec<Entry>);
    let changes: [Change; 21] = [
        Vec::clear,
        |all| _ = all.pop(),
        |all| all.push(all[0].clone()),
        |all| all.push(Entry::new("more", "")),
        |all| all.insert(0, Entry::new("more", "")),
        |all| all.insert(3, Entry::new("../escaped", "x")),
        |all| all.swap(0, 1),
        |all| all.swap(2, 3),
        |all| all[0].name = format!("/tmp/{MANIFEST}"),
        |all| all[1].name = format!("../{STATE}"),
        |all| all[1].name = format!("./{STATE}"),
        |all| all[3].name = "/etc/passwd".into(),
        |all| all[3].kind = EntryType::Symlink,
        |all| all[3].kind = EntryType::Link,
        |all| all[3].kind = EntryType::Fifo,
        |all| all[3].kind = EntryType::GNUSparse,
        |all| {
            all.insert(0, Entry { kind: EntryType::GNULongName, ..Entry::new("././@LongLink", [b'a'; 5000]) })
        },
        |all| all.insert(0, Entry { kind: EntryType::XHeader, ..Entry::new("pax", "13 size=99999\n") }),
        |all| all[3].size += 4096,
        |all| all[0].size = u64::MAX >> 1,
        |all| all[1].size = 1 << 40,
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let mut entries = good.clone();
        change(&mut entries);
        let said = target.refuses(&archive(&entries));
        assert!(said.starts_with("the packed snapshot is of no use"), "{i}: {said}");
    }
    // What a few bytes become that many zeroes are packed into.
    let mut huge = good.clone();
    huge[0] = Entry::new(MANIFEST, vec![b' '; MAX_MANIFEST as usize + 1]);
    assert!(target.refuses(&archive(&huge)).contains("too large"));
    let zeroes = zstd::encode_all(io::repeat(0).take(1 << 30), 1).unwrap();
    target.refuses(&zeroes);
}

#[test]
fn files_that_do_not_fit_together_are_refused() {
    let top = tempfile::tempdir().unwrap();
    let good = entries(&snapshot(&top.path().join("from"), "00"));
    let target = Target::new();
    let refuses = |at: usize, bytes: Vec<u8>| {
        let mut entries = good.clone();
        entries[at] = Entry::new(&good[at].name, bytes);
        target.refuses(&archive(&entries))
    };
    let manifest: Value = serde_json::from_slice(&good[0].bytes).unwrap();
    let changes: [fn(&mut Value); 8] = [
        |m| m["format"] = json!(2),
        |m| m["more"] = json!(1),
        |m| m["config"]["memory"] = json!(u64::MAX),
        |m| m["memory"]["bytes"] = json!(4096),
        |m| m["memory"]["crc32"] = json!(1),
        |m| m["state_bytes"] = json!(u64::MAX),
        |m| m["state_crc32"] = json!(1),
        |m| m["memory"]["diff"] = json!({ "parent": "00", "path": "/etc", "pages": [] }),
    ];
    for change in changes {
        let mut changed = manifest.clone();
        change(&mut changed);
        refuses(0, serde_json::to_vec(&changed).unwrap());
    }
    for state in [&b""[..], b"vmmstate", &[0; 100]] {
        refuses(1, state.to_vec());
    }
    for map in [
        json!(null),
        json!([]),
        json!([[0, 8192]]),
        json!([[0, 8192], [4096, 8192]]),
        json!([[1, 16384]]),
        json!([[BYTES, 16384]]),
        json!([[0, u64::MAX / 4096 * 4096]]),
    ] {
        refuses(2, serde_json::to_vec(&map).unwrap());
    }
    let mut memory = good[3].bytes.clone();
    memory[5000] ^= 1;
    assert!(refuses(3, memory).contains("other contents"));
    refuses(3, Vec::new());
}
