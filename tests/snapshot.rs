//! Snapshots through the real commands and the control API, with real guests: what was saved goes on where it was, and
//! its parent too. On this machine's /dev/kvm.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use harness::pager::Pager;
use harness::{Api, Kernel, Machines, SmallHost, local_kvm};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Prints `n1`, `n2` and so on.
const COUNT: &str = "i=0; while i=$((i+1)); do echo n$i; sleep 0.05; done";

/// Changes pieces of 16 MiB of memory, and looks before each time whether all of it is as it was left.
const CHECK: &str = "sum() { md5sum < /tmp/m | cut -c1-32; }; head -c 16777216 /dev/urandom > /tmp/m; was=$(sum); i=0; \
     while i=$((i+1)); do [ $(sum) = $was ] || { echo wrong $i; exit 1; }; \
     dd if=/dev/urandom of=/tmp/m bs=64k count=4 seek=$((i*7%252)) conv=notrunc 2>/dev/null; \
     was=$(sum); echo right $i; done";

/// The same, with pages of zeroes among the changes, and another program that writes all the time.
const HARD: &str = "(while :; do for from in urandom zero; do dd if=/dev/$from of=/tmp/h bs=1M count=8 conv=notrunc; done; done) \
     2>/dev/null & sum() { md5sum < /tmp/m | cut -c1-32; }; head -c 16777216 /dev/urandom > /tmp/m; was=$(sum); i=0; \
     while i=$((i+1)); do [ $(sum) = $was ] || { echo wrong $i; exit 1; }; \
     from=/dev/urandom; [ $((i%3)) = 0 ] && from=/dev/zero; \
     dd if=$from of=/tmp/m bs=64k count=16 seek=$((i*7%240)) conv=notrunc 2>/dev/null; \
     was=$(sum); echo right $i; done";

fn machines() -> Result<Machines> {
    Machines::new(env!("CARGO_BIN_EXE_vmm"))
}

/// The numbers that a log has after `word`, in the order of its lines; the last line may not be whole.
fn numbers(log: &str, word: &str) -> Vec<u32> {
    let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().filter_map(|line| line.trim().strip_prefix(word)?.parse().ok()).collect()
}

/// Waits until there are so many of them.
fn wait_numbers(state: &Machines, name: &str, word: &str, count: usize) -> Result<Vec<u32>> {
    loop {
        let log = state.ok(&format!("logs {name}"))?;
        ensure!(!log.contains("wrong"), "{name}: {log}");
        let found = numbers(&log, word);
        if found.len() >= count {
            return Ok(found);
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn what_was_saved_goes_on_where_it_was_and_so_does_its_parent() -> Result<()> {
    let state = machines()?;
    state.shell_read_only("run -q --detach --name web", COUNT)?;
    let before = wait_numbers(&state, "web", "n", 5)?.len();
    state.ok("snapshot web --to saved")?;
    let after = wait_numbers(&state, "web", "n", before)?.len();
    wait_numbers(&state, "web", "n", after + 5)?;
    state.ok("kill web")?;
    state.ok("rm web")?;
    for name in ["again", "more"] {
        state.ok(&format!("restore saved --detach --name {name}"))?;
        let goes_on = wait_numbers(&state, name, "n", 5)?;
        let first = goes_on[0] as usize;
        // The line that was being printed when the machine stood still may be cut in two.
        ensure!((before..=after + 2).contains(&first), "{before} {after} {goes_on:?}");
        ensure!(goes_on.windows(2).all(|two| two[1] == two[0] + 1), "{goes_on:?}");
    }
    Ok(())
}

#[test]
fn what_is_saved_to_be_stopped_does_not_run_again() -> Result<()> {
    let state = machines()?;
    state.shell_read_only("run -q --detach --name web", "i=0; while i=$((i+1)); do echo n$i; done")?;
    wait_numbers(&state, "web", "n", 100)?;
    state.ok("snapshot web --to saved --stop")?;
    assert_eq!(state.ps()?[0]["state"], "ended");
    assert_eq!(state.output("wait web")?.status.code(), Some(1), "it was killed");
    let last = numbers(&state.ok("logs web")?, "n").pop().context("a number")?;
    state.ok("restore saved --detach --name again")?;
    let first = wait_numbers(&state, "again", "n", 1)?[0];
    // The line that was being printed may be cut in two.
    ensure!((last + 1..=last + 2).contains(&first), "{last}, and then {first}");
    Ok(())
}

#[test]
fn who_is_cut_short_leaves_no_snapshot_and_a_machine_that_goes_on() -> Result<()> {
    let state = machines()?;
    state.shell_read_only("run -q --detach --name web", COUNT)?;
    for round in 1.. {
        let before = wait_numbers(&state, "web", "n", 1)?.len();
        // The one that nobody cancels, which may be before it or behind it.
        let mut other = state.start("snapshot web --to other")?;
        let mut child = state.start("snapshot web --to saved")?;
        while state.ps()?[0]["state"] == "running" && child.try_wait()?.is_none() {}
        kill_process(Pid::from_child(&child), Signal::INT)?;
        let ended = child.wait()?;
        ensure!(other.wait()?.success(), "the other one was cancelled");
        wait_numbers(&state, "web", "n", before + 1)?;
        let there = state.dir().join("saved").exists();
        if ended.signal() == Some(Signal::INT.as_raw()) && !there {
            break;
        }
        // It was too quick.
        ensure!(there && round < 200, "{ended:?}, {there}");
        fs::remove_dir_all(state.dir().join("saved"))?;
    }
    let names = fs::read_dir(state.dir())?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
    ensure!(names.iter().all(|name| !name.to_string_lossy().contains("saved")), "{names:?}");
    Ok(())
}

#[test]
fn a_machine_whose_memory_file_is_cut_off_says_so() -> Result<()> {
    let state = machines()?;
    state.shell_read_only("run -q --detach --name web", COUNT)?;
    wait_numbers(&state, "web", "n", 5)?;
    state.ok("snapshot web --to saved --stop")?;
    state.ok("restore saved --detach --name again")?;
    File::options().write(true).open(state.dir().join("saved/memory"))?.set_len(0)?;
    assert_eq!(state.output("wait again")?.status.code(), Some(1));
    let ps = state.ps()?;
    let row = ps.iter().find(|row| row["name"] == "again").context("it is listed")?;
    ensure!(row["reason"].as_str().is_some_and(|why| why.contains("was cut off")), "{row}");
    Ok(())
}

#[test]
fn a_mapped_snapshot_needs_no_room_where_it_is() -> Result<()> {
    let state = machines()?;
    let host = SmallHost::new("size=96m")?;
    let saved = host.path("saved").display().to_string();
    let line = "i=0; while i=$((i+1)); do [ $i -gt 80 ] || head -c 1000000 /dev/urandom > /tmp/$i; echo n$i; sleep 0.02; done";
    state.shell_read_only("run -q --detach --name web --memory 192M", line)?;
    wait_numbers(&state, "web", "n", 3)?;
    state.ok(&format!("snapshot web --to {saved} --stop"))?;
    let filled = std::io::copy(&mut std::io::repeat(1), &mut File::create(host.path("filler"))?);
    ensure!(filled.is_err(), "it is full");
    state.ok(&format!("restore {saved} --detach --name again"))?;
    // What was free when it was saved is used now.
    for _ in 0..3000 {
        if wait_numbers(&state, "again", "n", 1)?.last() >= Some(&90) {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    bail!("it does not go on: {}", state.ok("logs again")?)
}

#[test]
fn every_link_of_a_chain_of_diffs_is_right() -> Result<()> {
    let state = machines()?;
    state.shell_read_only("run -q --detach --name web --track-dirty", CHECK)?;
    for (to, more) in [("a", ""), ("b", "--diff"), ("c", "--diff"), ("d", "--diff")] {
        let now = numbers(&state.ok("logs web")?, "right ").len();
        wait_numbers(&state, "web", "right ", now + 2)?;
        state.ok(&format!("snapshot web --to {to} {more}"))?;
        // Its snapshot is gone at once, so that nothing may be a difference to it.
        state.ok("fork web")?;
        state.ok("kill web-1")?;
        state.ok("rm web-1")?;
    }
    state.ok("kill web")?;
    for (from, how) in [("a", ""), ("b", ""), ("c", "--memory-mode copy"), ("d", "--track-dirty")] {
        state.ok(&format!("restore {from} --detach --name {from} {how}"))?;
        wait_numbers(&state, from, "right ", 3)?;
    }
    // A diff to what was restored.
    state.ok("snapshot d --to e --diff")?;
    state.ok("restore e --detach --name e")?;
    wait_numbers(&state, "e", "right ", 3)?;
    Ok(())
}

/// Restores a machine, and ends it when it has gone on for a while.
fn goes_on(state: &Machines, from: &str, how: &str) -> Result<()> {
    state.ok(&format!("restore {from} --detach --name again {how}"))?;
    wait_numbers(state, "again", "right ", 3).context(how.to_owned())?;
    state.ok("kill again")?;
    state.ok("rm again").map(drop)
}

#[test]
fn memory_that_is_written_hard_while_it_is_saved_is_right() -> Result<()> {
    let state = machines()?;
    state.shell_read_only("run -q --detach --name plain", HARD)?;
    state.shell_read_only("run -q --detach --name tracked --track-dirty --mem-shared", HARD)?;
    for (name, to, how) in
        [("plain", "a", ""), ("tracked", "b", ""), ("tracked", "c", "--diff"), ("tracked", "d", "--diff")]
    {
        let now = numbers(&state.ok(&format!("logs {name}"))?, "right ").len();
        wait_numbers(&state, name, "right ", now + 2)?;
        state.ok(&format!("snapshot {name} --to {to} {how}"))?;
    }
    for name in ["plain", "tracked"] {
        let now = numbers(&state.ok(&format!("logs {name}"))?, "right ").len();
        wait_numbers(&state, name, "right ", now + 1)?;
        state.ok(&format!("kill {name}"))?;
    }
    for from in ["a", "b", "c", "d"] {
        goes_on(&state, from, "")?;
    }
    // Shared memory is copied.
    goes_on(&state, "d", "--memory-mode uffd")?;
    assert!(!state.dir().join("d/memory.touched").exists());
    for shared in ["a", "c"] {
        let manifest = state.dir().join(shared).join("manifest.json");
        let text = fs::read_to_string(&manifest)?;
        fs::write(&manifest, text.replace("\"mem_shared\": true", "\"mem_shared\": false"))?;
        // What the first one touches, the second has before.
        goes_on(&state, shared, "--memory-mode uffd")?;
        assert!(state.dir().join(shared).join("memory.touched").is_file(), "{shared}");
        goes_on(&state, shared, "--memory-mode uffd")?;
    }
    Ok(())
}

#[test]
fn ten_clones_all_answer() -> Result<()> {
    let state = machines()?;
    state.shell_read_only("run -q --detach --name web --memory 64M", COUNT)?;
    wait_numbers(&state, "web", "n", 3)?;
    let names = state.ok("fork web -n 10")?;
    let names: Vec<&str> = names.lines().collect();
    assert_eq!(names.len(), 10, "{names:?}");
    for name in names.iter().chain(&["web"]) {
        let now = numbers(&state.ok(&format!("logs {name}"))?, "n").len();
        wait_numbers(&state, name, "n", now + 3)?;
    }
    assert!(state.ps()?.iter().all(|row| row["state"] == "running"));
    assert_eq!(state.ps()?.len(), 11);
    Ok(())
}

#[test]
fn mistakes_are_one_sentence_and_leave_nothing() -> Result<()> {
    let state = machines()?;
    state.ok("run --detach --name web IDLE --vsock v.sock")?;
    state.ok("run --detach --name tracked IDLE --track-dirty")?;
    state.ok("run --name ended SHORT")?;
    fs::create_dir(state.dir().join("taken"))?;
    // What is named like this may be anybody's.
    fs::create_dir(state.dir().join(".saved.20261128"))?;
    fs::write(state.dir().join("taken/file"), "mine")?;
    // A web application's, say.
    fs::create_dir(state.dir().join("app"))?;
    fs::write(state.dir().join("app/manifest.json"), "{\"name\": \"mine\"}")?;
    state.ok("snapshot tracked --to base")?;
    for (words, status, want) in [
        ("snapshot nobody --to x", 1, "nobody"),
        ("snapshot ended --to x", 1, "ended"),
        ("snapshot web --to taken", 1, "is no snapshot"),
        ("snapshot web --to app", 1, "is no snapshot"),
        ("snapshot web --to missing/x", 1, "missing"),
        ("snapshot web --to x --diff", 1, "--track-dirty"),
        ("snapshot tracked --to base --diff", 1, "choose another place"),
        ("restore x --name y", 1, "there is nothing of this name"),
        ("restore taken --name y", 1, "no manifest.json in it"),
        ("restore taken/file --name y", 1, "is to be unpacked first"),
        ("fork ended", 1, "ended"),
        ("restore base --name y --set disk9.path=z", 2, "no device 'disk9'"),
        ("restore base --name y --set disk9", 2, "DEVICE.KEY=VALUE"),
    ] {
        let said = state.refused(words, status)?;
        assert!(said.contains(want), "{words}: {said}");
    }
    state.ok("snapshot web --to saved")?;
    fs::write(state.dir().join("saved/mine"), "mine")?;
    assert!(state.refused("snapshot web --to saved", 1)?.contains("besides a snapshot"));
    // What a clone was made of is gone, and what a base was replaced by is another one.
    state.ok("fork tracked")?;
    assert!(state.refused("snapshot tracked-1 --to x --diff", 1)?.contains("make a full snapshot first"));
    state.ok("snapshot web --to base")?;
    assert!(state.refused("snapshot tracked --to x --diff", 1)?.contains("make a full snapshot first"));
    state.refused("restore saved --name y --set vsock0.nonsense=1", 1)?;
    assert_eq!(fs::read(state.dir().join("taken/file"))?, b"mine");
    let mut there: Vec<_> =
        fs::read_dir(state.dir())?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    there.sort();
    assert!(state.dir().join("app/manifest.json").exists());
    let names = ["app", "base", "idle", "saved", "short", "state", "taken", "tmp", "v.sock"];
    assert_eq!(there, [&[".saved.20261128"], &names[..]].concat());
    assert!(state.ps()?.iter().all(|row| row["name"] != "y"), "{:?}", state.ps()?);
    Ok(())
}

#[test]
fn what_is_damaged_is_refused() -> Result<()> {
    let state = machines()?;
    state.ok("run --detach --name web IDLE")?;
    let path = |name: &str| state.dir().join("saved").join(name);
    type Damage = fn(&Path) -> std::io::Result<()>;
    let shorten: Damage = |path| {
        let file = File::options().write(true).open(path)?;
        file.set_len(file.metadata()?.len() - 4096.min(file.metadata()?.len() / 2))
    };
    let flip: Damage = |path| {
        let mut bytes = fs::read(path)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x40;
        fs::write(path, bytes)
    };
    let remove: Damage = |path| fs::remove_file(path);
    let pipe: Damage = |path| {
        fs::remove_file(path)?;
        Ok(mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?)
    };
    let directory: Damage = |path| fs::remove_file(path).and_then(|()| fs::create_dir(path));
    let endless: Damage = |path| fs::remove_file(path).and_then(|()| symlink("/dev/zero", path));
    let newer: Damage =
        |path| fs::write(path, fs::read_to_string(path)?.replacen("\"format\": 1", "\"format\": 2", 1));
    for (file, damage, want) in [
        ("manifest.json", shorten, "manifest"),
        ("manifest.json", remove, "manifest"),
        ("manifest.json", newer, "form 2"),
        ("state", shorten, "damaged"),
        ("state", flip, "damaged"),
        ("state", remove, "state"),
        ("memory", shorten, "damaged"),
        ("memory", remove, "memory"),
        ("manifest.json", pipe, "no regular file"),
        ("state", pipe, "no regular file"),
        ("memory", pipe, "no regular file"),
        ("state", directory, "no regular file"),
        ("manifest.json", endless, "it is a link"),
        ("memory", endless, "it is a link"),
    ] {
        state.ok("snapshot web --to saved")?;
        damage(&path(file))?;
        let said = state.refused("restore saved --name y", 1)?;
        assert!(said.contains(want), "{file}: {said}");
        // Away with it: without its manifest it would be no snapshot, which is not replaced.
        fs::remove_dir_all(state.dir().join("saved"))?;
    }
    assert!(state.ps()?.iter().all(|row| row["name"] != "y"));
    Ok(())
}

/// `vmm api` in a directory.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

fn api(dir: &Path, name: &str) -> Result<(Program, Api)> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.args(["api", "--api-sock", name]).current_dir(dir);
    let program = Program(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?);
    Ok((program, Api::when_ready(&dir.join(name))?))
}

/// Waits until the console's file has so many numbers.
fn wait_console(path: &Path, count: usize) -> Result<Vec<u32>> {
    loop {
        let found = numbers(&fs::read_to_string(path)?, "n");
        if found.len() >= count {
            return Ok(found);
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// What clients of Firecracker do with a diff: what is no hole of it goes over a copy of its base.
fn merge(base: &Path, diff: &Path, to: &Path) -> Result<()> {
    use rustix::fs::{SeekFrom, seek};
    fs::copy(base, to)?;
    let (diff, to) = (File::open(diff)?, File::options().write(true).open(to)?);
    let mut at = 0;
    while let Ok(start) = seek(&diff, SeekFrom::Data(at)) {
        at = seek(&diff, SeekFrom::Hole(start))?;
        let mut bytes = vec![0; (at - start) as usize];
        diff.read_exact_at(&mut bytes, start)?;
        to.write_all_at(&bytes, start)?;
    }
    Ok(())
}

/// Loads the snapshot in `s2`, whose memory is in `merged`, with a handler of page faults.
fn memory_comes_from_another_process(dir: &Path) -> Result<()> {
    let path = |name: &str| -> PathBuf { dir.join(name) };
    let backend = json!({"backend_type": "Uffd", "backend_path": "pager"});
    let body = json!({"snapshot_path": "s2", "mem_backend": backend, "resume_vm": true});
    let (program, child) = api(dir, "child.sock")?;
    let fault = child.send("PUT", "/snapshot/load", &body.to_string())?.fault()?;
    ensure!(fault.contains("start the handler first"), "{fault}");
    let pager = Pager::listen(&path("pager"), &path("merged"), usize::MAX)?;
    child.put("/snapshot/load", body.clone())?;
    wait_console(&path("console"), 5)?;
    child.patch("/vm", json!({"state": "Paused"}))?;
    // All of its memory, most of which never came.
    child.put("/snapshot/create", json!({"snapshot_path": "s3", "mem_file_path": "m3"}))?;
    drop(program);
    let served = pager.wait()?;
    ensure!(served > 100, "{served} pages");
    let (program, child) = api(dir, "child.sock")?;
    child.put("/snapshot/load", json!({"snapshot_path": "s3", "mem_file_path": "m3", "resume_vm": true}))?;
    wait_console(&path("console"), 5)?;
    drop(program);

    // A handler that ends too early: the guest hangs, and its program does not.
    let pager = Pager::listen(&path("pager"), &path("merged"), 300)?;
    let (mut program, child) = api(dir, "child.sock")?;
    child.put("/snapshot/load", body)?;
    ensure!(pager.wait()? == 300, "it ends by itself");
    kill_process(Pid::from_child(&program.0), Signal::TERM)?;
    program.0.wait()?;
    Ok(())
}

#[test]
fn firecrackers_calls_save_and_load_a_machine() -> Result<()> {
    let kvm = local_kvm().context("this needs a /dev/kvm on this machine")?;
    let dir = tempfile::tempdir()?;
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    let (parent_program, parent) = api(dir.path(), "parent.sock")?;
    let create = |kind: &str, state: &str, memory: &str| json!({"snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory});
    let full = create("Full", "s", "m").to_string();
    assert!(parent.send("PUT", "/snapshot/create", &full)?.fault()?.contains("before starting"));
    let kernel = Kernel::ours(kvm).file()?;
    let boot_args = format!("console=ttyS0 reboot=k panic=1 -- sh -c \"{COUNT}\"");
    parent.put("/boot-source", json!({"kernel_image_path": kernel, "boot_args": boot_args}))?;
    let root = json!({"drive_id": "rootfs", "path_on_host": harness::demo_image()?, "is_root_device": true, "is_read_only": true});
    parent.put("/drives/rootfs", root)?;
    parent
        .put("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 128, "track_dirty_pages": true}))?;
    parent.put("/vsock", json!({"guest_cid": 3, "uds_path": "v.sock"}))?;
    parent.put("/serial", json!({"serial_out_path": "console"}))?;
    parent.put("/actions", json!({"action_type": "InstanceStart"}))?;
    wait_console(&path("console"), 3)?;
    assert!(parent.send("PUT", "/snapshot/create", &full)?.fault()?.contains("running cannot be saved"));
    parent.patch("/vm", json!({"state": "Paused"}))?;
    let diff = create("Diff", "s2", "m2").to_string();
    assert!(parent.send("PUT", "/snapshot/create", &diff)?.fault()?.contains("full snapshot first"));
    parent.put("/snapshot/create", create("Full", "s", "m"))?;
    parent.patch("/vm", json!({"state": "Resumed"}))?;
    let saved = wait_console(&path("console"), 0)?.len();
    let later = wait_console(&path("console"), saved + 5)?.len();
    parent.patch("/vm", json!({"state": "Paused"}))?;
    parent.put("/snapshot/create", create("Diff", "s2", "m2"))?;
    let load = json!({"snapshot_path": "s2", "mem_file_path": "m2"}).to_string();
    assert!(parent.send("PUT", "/snapshot/load", &load)?.fault()?.contains("after starting"));
    drop(parent_program);
    merge(&path("m"), &path("m2"), &path("merged"))?;

    for memory in ["m2", "merged"] {
        let (_program, child) = api(dir.path(), "child.sock")?;
        let refused = |body: Value, want: &str| -> Result<()> {
            let fault = child.send("PUT", "/snapshot/load", &body.to_string())?.fault()?;
            ensure!(fault.contains(want), "{body}: {fault}");
            Ok(())
        };
        let backend = json!({"backend_type": "File", "backend_path": memory});
        refused(json!({"snapshot_path": "s2"}), "missing")?;
        refused(json!({"snapshot_path": "s2", "mem_backend": backend, "mem_file_path": memory}), "not both")?;
        refused(json!({"snapshot_path": "nowhere", "mem_backend": backend}), "'nowhere' cannot be opened")?;
        refused(json!({"snapshot_path": "console", "mem_backend": backend}), "is of no use")?;
        let tap = json!([{"iface_id": "eth0", "host_dev_name": "tap0"}]);
        refused(json!({"snapshot_path": "s2", "mem_backend": backend, "network_overrides": tap}), "'eth0'")?;
        let body = json!({"snapshot_path": "s2", "mem_backend": backend, "vsock_override": {"uds_path": "w.sock"}, "track_dirty_pages": true});
        child.put("/snapshot/load", body.clone())?;
        assert!(path("w.sock").exists());
        assert_eq!(child.get_json("/")?["state"], "Paused");
        let config = child.get_json("/vm/config")?;
        assert_eq!(
            (&config["drives"][0]["drive_id"], &config["machine-config"]["track_dirty_pages"]),
            (&json!("rootfs"), &json!(true))
        );
        assert_eq!(fs::read_to_string(path("console"))?, "", "it waits");
        refused(body, "after starting")?;
        child.patch("/vm", json!({"state": "Resumed"}))?;
        let goes_on = wait_console(&path("console"), 5)?;
        ensure!(
            goes_on[0] as usize >= later && goes_on.windows(2).all(|two| two[1] == two[0] + 1),
            "{goes_on:?}"
        );
    }
    memory_comes_from_another_process(dir.path())?;
    let (_program, other) = api(dir.path(), "other.sock")?;
    other.put("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 16}))?;
    let body = json!({"snapshot_path": "s", "mem_file_path": "m", "resume_vm": true, "clock_realtime": true});
    assert!(
        other.send("PUT", "/snapshot/load", &body.to_string())?.fault()?.contains("before anything else")
    );
    let (_program, third) = api(dir.path(), "third.sock")?;
    third.put("/snapshot/load", body)?;
    let goes_on = wait_console(&path("console"), 5)?;
    ensure!((goes_on[0] as usize) < later, "the first one, not the second: {goes_on:?}");
    Ok(())
}
