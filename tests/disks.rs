//! Disks in snapshots: each clone has the disk as it was when its parent was saved, and whatever it writes is its own.
//! Real commands and guests on this machine's /dev/kvm.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use harness::{Disk, Machines, SmallHost, tools_image};
use serde_json::Value;

/// Writes numbered files to a mounted disk, and says of each that it is there to stay.
const WRITE: &str = "mount /dev/vdb /mnt && i=0 && while i=$((i+1)); do \
     head -c 20000 /dev/urandom > /mnt/f$i && md5sum /mnt/f$i >> /mnt/sums && sync && echo n$i; sleep 0.02; done";

/// Does nothing for long.
const SLEEP: &str = "echo up; sleep 100000";

fn machines() -> Result<Machines> {
    Machines::new(env!("CARGO_BIN_EXE_vmm"))
}

/// Starts a guest in the background that runs a line of shell, with its root on an image that it only reads.
fn start(state: &Machines, words: &str, line: &str) -> Result<()> {
    state.shell_read_only(&format!("run -q --detach {words}"), line)
}

/// The last number that a guest has said in a whole line.
fn last(state: &Machines, name: &str) -> Result<u32> {
    let log = state.ok(&format!("logs {name}"))?;
    let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
    Ok(whole.lines().rev().find_map(|line| line.trim().strip_prefix('n')?.parse().ok()).unwrap_or(0))
}

/// Waits until a guest has said a number larger than `number`.
fn wait_beyond(state: &Machines, name: &str, number: u32) -> Result<u32> {
    loop {
        let now = last(state, name)?;
        if now > number {
            return Ok(now);
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// A file's content, by `cksum`.
fn checksum(path: &Path) -> Result<Vec<u8>> {
    let output = Command::new("cksum").arg(path).output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(output.stdout)
}

/// An ext4 disk in the state's directory.
fn ext4(state: &Machines, name: &str) -> Result<Disk> {
    let path = state.dir().join(name);
    fs::copy(Disk::ext4(64 << 20)?.path(), &path)?;
    Ok(Disk::of_others(path))
}

/// An empty qcow2 image (QEMU's docs/interop/qcow2.rst) of up to 512 MiB on a raw backing file, by its name.
fn qcow2(path: &Path, bytes: u64, backing: &str) -> Result<()> {
    const CLUSTER: u64 = 64 << 10;
    const HEADER: u32 = 104;
    let mut image = vec![0; 4 * CLUSTER as usize];
    let mut put =
        |at: u64, field: &[u8]| image[at as usize..at as usize + field.len()].copy_from_slice(field);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(8, &128u64.to_be_bytes());
    put(16, &(backing.len() as u32).to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &bytes.to_be_bytes());
    // One entry in the first table, which is in the last cluster; the counts of references are in the others.
    put(36, &1u32.to_be_bytes());
    put(40, &(3 * CLUSTER).to_be_bytes());
    put(48, &CLUSTER.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &HEADER.to_be_bytes());
    // The extension that names the backing file's format.
    put(104, b"\xe2\x79\x2a\xca\0\0\0\x03raw");
    put(128, backing.as_bytes());
    put(CLUSTER, &(2 * CLUSTER).to_be_bytes());
    put(2 * CLUSTER, &[0, 1, 0, 1, 0, 1, 0, 1]);
    Ok(fs::write(path, image)?)
}

fn manifest(dir: &Path) -> Result<Value> {
    Ok(serde_json::from_slice(&fs::read(dir.join("manifest.json"))?)?)
}

/// A file that `name` has open, whether or not it has a name of its own.
fn open_files(state: &Machines, name: &str) -> Result<Vec<PathBuf>> {
    let pid = state.pid(name)?.as_raw_nonzero();
    let links =
        fs::read_dir(format!("/proc/{pid}/fd"))?.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    Ok(links.collect())
}

/// Saves the disk of a machine, which is then looked at from outside.
fn disk_of(state: &Machines, name: &str, device: &str) -> Result<Disk> {
    let to = format!("look-{name}");
    state.ok(&format!("snapshot {name} --to {to}"))?;
    let dir = state.dir().join(&to);
    let manifest = manifest(&dir)?;
    let disks = manifest["disks"].as_array().context("disks")?;
    let disk = disks.iter().find(|disk| disk["device"] == device).context("the disk was taken")?;
    ensure!(disk["format"] == "raw", "{disk}");
    Ok(Disk::of_others(dir.join(disk["file"].as_str().context("a name")?)))
}

/// After its journal is replayed in a copy, the file system is whole, and each file that was announced is as it was written.
fn check(disk: &Disk, least: u32) -> Result<()> {
    let copy = Disk::copy_of(disk.path())?;
    // What the next mount would do. 1: something was mended, which replaying is.
    let status = Command::new("e2fsck").args(["-E", "journal_only", "-p"]).arg(copy.path()).status()?;
    ensure!(status.code().is_some_and(|code| code <= 1), "{status}");
    copy.check_ext4()?;
    let sums = copy.read_file("/sums")?;
    ensure!(sums.lines().count() as u32 >= least, "{least} files were announced: {sums}");
    Ok(())
}

/// The guest itself looks at all that it has written.
const LOOK: &str = "md5sum -c -s /mnt/sums || echo wrong";

#[test]
fn clones_have_the_disk_of_the_snapshot_and_write_their_own() -> Result<()> {
    let state = machines()?;
    let disk = ext4(&state, "data.img")?;
    let line = WRITE.replace("echo n$i;", &format!("echo n$i; [ $((i % 10)) = 0 ] && {{ {LOOK}; }};"));
    start(&state, "--name web --disk data.img", &line)?;
    let before = wait_beyond(&state, "web", 15)?;
    state.ok("snapshot web --to saved")?;
    let saved = state.dir().join("saved/disk1.raw");
    let sum = checksum(&saved)?;
    for name in ["one", "two"] {
        state.ok(&format!("restore saved --detach --name {name}"))?;
    }
    // All of them write the same blocks of what began as the same disk, each with random bytes of its own.
    for name in ["web", "one", "two"] {
        let now = last(&state, name)?.max(before);
        wait_beyond(&state, name, now + 20)?;
        let log = state.ok(&format!("logs {name}"))?;
        ensure!(!log.contains("wrong") && !log.contains("rror"), "{name}: {log}");
    }
    ensure!(checksum(&saved)? == sum, "the snapshot's disk was written");
    check(&Disk::of_others(&saved), before)?;
    let least = ["web", "one", "two"].map(|name| last(&state, name));
    for (name, least) in ["web", "one", "two"].into_iter().zip(least) {
        check(&disk_of(&state, name, "disk1")?, least?)?;
    }
    state.ok("kill web")?;
    check(&disk, before)?;
    // The snapshot of a restored machine needs nothing but itself.
    fs::remove_dir_all(state.dir().join("saved"))?;
    state.ok("kill one")?;
    state.ok("restore look-one --detach --name again")?;
    let now = wait_beyond(&state, "again", 0)?;
    wait_beyond(&state, "again", now + 25)?;
    ensure!(!state.ok("logs again")?.contains("wrong"), "{}", state.ok("logs again")?);
    Ok(())
}

#[test]
fn persistent_memory_is_taken_along() -> Result<()> {
    let state = machines()?;
    let disk = ext4(&state, "data.img")?;
    let line = WRITE.replace("mount /dev/vdb", "mount -o dax /dev/pmem0");
    start(&state, "--name web --pmem data.img", &line)?;
    let before = wait_beyond(&state, "web", 10)?;
    state.ok("snapshot web --to saved")?;
    let saved = state.dir().join("saved/pmem0.raw");
    let sum = checksum(&saved)?;
    for name in ["one", "two"] {
        state.ok(&format!("restore saved --detach --name {name}"))?;
        wait_beyond(&state, name, before + 10)?;
        check(&disk_of(&state, name, "pmem0")?, before + 10)?;
    }
    ensure!(checksum(&saved)? == sum, "the snapshot's memory was written");
    check(&Disk::of_others(&saved), before)?;
    state.ok("kill web")?;
    check(&disk, before)
}

/// A block device over a file, which goes with it.
struct LoopDevice(String);

impl LoopDevice {
    fn over(file: &Path) -> Result<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(Self(String::from_utf8(output.stdout)?.trim().into()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_refused_and_may_be_left_out() -> Result<()> {
    let state = machines()?;
    let disk = ext4(&state, "data.img")?;
    let device = LoopDevice::over(disk.path())?;
    start(&state, &format!("--name web --disk {}", device.0), WRITE)?;
    let before = wait_beyond(&state, "web", 3)?;
    let said = state.refused("snapshot web --to saved", 1)?;
    ensure!(said.contains(&device.0) && said.contains("block device"), "{said}");
    ensure!(!state.dir().join("saved").exists());
    wait_beyond(&state, "web", before + 3)?;
    state.ok("snapshot web --to saved --no-disks --stop")?;
    state.ok("restore saved --detach --name again")?;
    wait_beyond(&state, "again", before + 6)?;
    Ok(())
}

#[test]
fn a_plain_run_is_forked_three_times() -> Result<()> {
    let state = machines()?;
    let line = "i=0; echo begun > /root/mine; while i=$((i+1)); do sync; cat /root/mine | sed s/^/file:/; \
                echo $i-$RANDOM-$(cat /proc/sys/kernel/random/uuid) >> /root/all; \
                [ $(wc -l < /root/all) = $i ] && echo n$i || echo wrong; sleep 0.05; done";
    state.shell("run -q --detach --name web --memory 128M", line)?;
    wait_beyond(&state, "web", 3)?;
    let names = state.ok("fork web -n 3")?;
    let names: Vec<&str> = names.lines().collect();
    ensure!(names == ["web-1", "web-2", "web-3"], "{names:?}");
    ensure!(
        !state
            .dir()
            .join("state/web")
            .read_dir()?
            .any(|entry| { entry.is_ok_and(|entry| entry.file_name().to_string_lossy().contains("fork")) })
    );
    for name in ["web", "web-1", "web-2", "web-3"] {
        let now = last(&state, name)?;
        wait_beyond(&state, name, now + 5)?;
        ensure!(!state.ok(&format!("logs {name}"))?.contains("wrong"), "{name}");
    }
    // A fork of a fork, whose parent's snapshot is gone.
    ensure!(state.ok("fork web-2")?.trim() == "web-2-1");
    let now = last(&state, "web-2-1")?;
    wait_beyond(&state, "web-2-1", now + 5)?;
    ensure!(!state.ok("logs web-2-1")?.contains("wrong"));
    let refused = state.refused("snapshot web --to x --no-disks", 1)?;
    ensure!(refused.contains("rootfs ends with its machine"), "{refused}");
    ensure!(!state.dir().join("x").exists());
    Ok(())
}

#[test]
fn a_qcow2_disk_and_its_backing_file_are_found_from_anywhere() -> Result<()> {
    let state = machines()?;
    ext4(&state, "base.img")?;
    qcow2(&state.dir().join("top.qcow2"), 64 << 20, "base.img")?;
    start(&state, "--name web --disk top.qcow2,format=qcow2,backing=on", WRITE)?;
    let before = wait_beyond(&state, "web", 20)?;
    state.ok("snapshot web --to saved")?;
    let saved = state.dir().join("saved/disk1.qcow2");
    let sum = checksum(&saved)?;
    for name in ["one", "two"] {
        state.ok(&format!("restore saved --detach --name {name}"))?;
        wait_beyond(&state, name, before + 20)?;
    }
    ensure!(checksum(&saved)? == sum, "the snapshot's disk was written");
    check(&disk_of(&state, "one", "disk1")?, before)?;
    Ok(())
}

#[test]
fn disks_are_left_out_or_replaced_on_request() -> Result<()> {
    let state = machines()?;
    for name in ["data.img", "copy.img"] {
        ext4(&state, name)?;
    }
    start(&state, "--name web --disk data.img", SLEEP)?;
    state.expect_log("web", "up")?;
    state.ok("snapshot web --to without --no-disks")?;
    ensure!(manifest(&state.dir().join("without"))?.get("disks").is_none());
    let refused = state.refused("restore without --name y", 1)?;
    ensure!(refused.contains("data.img") && refused.contains("another VM"), "{refused}");
    state.ok("snapshot web --to with")?;
    let files = manifest(&state.dir().join("with"))?;
    // The read-only root is not taken.
    ensure!(files["disks"].as_array().map(Vec::len) == Some(1), "{}", files["disks"]);
    ensure!(files["config"]["devices"][1]["path"] == "data.img", "{}", files["config"]);
    // A machine that is given a file uses it as it is.
    state.ok("restore with --detach --name given --set disk1.path=copy.img")?;
    state.refused("restore with --name y --set disk1.path=copy.img", 1)?;
    let open = open_files(&state, "given")?;
    ensure!(open.contains(&fs::canonicalize(state.dir().join("copy.img"))?), "{open:?}");
    ensure!(open.iter().all(|path| !path.ends_with("disk1.raw")), "{open:?}");
    state.ok("restore with --detach --name own")?;
    let open = open_files(&state, "own")?;
    ensure!(!open.contains(&fs::canonicalize(state.dir().join("data.img"))?), "{open:?}");
    ensure!(open.iter().any(|path| path.to_string_lossy().ends_with("(deleted)")), "nameless: {open:?}");
    let inspected: Value = serde_json::from_str(&state.ok("inspect own")?)?;
    ensure!(inspected["config"]["devices"][1]["private"] == true, "{inspected}");
    Ok(())
}

#[test]
fn a_disk_that_is_damaged_or_elsewhere_is_refused() -> Result<()> {
    let state = machines()?;
    ext4(&state, "data.img")?;
    start(&state, "--name web --disk data.img", SLEEP)?;
    state.expect_log("web", "up")?;
    state.ok("snapshot web --to saved")?;
    let dir = state.dir().join("saved");
    let good = fs::read_to_string(dir.join("manifest.json"))?;
    for (from, to, want) in [
        ("\"disk1.raw\"", "\"../data.img\"", "no file in its directory"),
        ("\"disk1.raw\"", "\"/etc/passwd\"", "no file in its directory"),
        ("\"disk1.raw\"", "\"..\"", "no file in its directory"),
        ("\"disk1.raw\"", "\"state\"", "two files"),
        ("\"disk1.raw\"", "\"missing\"", "missing"),
        ("\"raw\"", "\"vmdk\"", "not known"),
        ("\"device\": \"disk1\"", "\"device\": \"disk7\"", "disk7"),
        ("\"bytes\": 67108864\n", "\"bytes\": 67108865\n", "bytes"),
    ] {
        ensure!(good.contains(from), "{from}: {good}");
        fs::write(dir.join("manifest.json"), good.replacen(from, to, 1))?;
        let said = state.refused("restore saved --name y", 1)?;
        ensure!(said.contains(want), "{from} {to}: {said}");
    }
    fs::write(dir.join("manifest.json"), good)?;
    File::options().write(true).open(dir.join("disk1.raw"))?.set_len(1 << 20)?;
    ensure!(state.refused("restore saved --name y", 1)?.contains("has 1048576 bytes"));
    ensure!(state.ps()?.len() == 1);
    Ok(())
}

#[test]
fn a_host_without_room_is_one_sentence_and_the_parent_goes_on() -> Result<()> {
    let state = machines()?;
    ext4(&state, "data.img")?;
    // Room for the memory, and not for the disk too.
    let host = SmallHost::new("size=96m")?;
    let line =
        format!("mount /dev/vdb /mnt && head -c 50000000 /dev/urandom > /mnt/large && sync && {WRITE}")
            .replacen("mount /dev/vdb /mnt && i=0", "i=0", 1);
    start(&state, "--name web --memory 64M --disk data.img", &line)?;
    let before = wait_beyond(&state, "web", 5)?;
    let to = host.path("saved");
    let said = state.refused(&format!("snapshot web --to {}", to.display()), 1)?;
    ensure!(said.contains("o space left") && said.contains("make room"), "{said}");
    ensure!(host.path("").read_dir()?.next().is_none(), "something is left");
    wait_beyond(&state, "web", before + 5)?;
    // A clone finds none for what is its own, and then some.
    let host = SmallHost::new("size=200m")?;
    let to = host.path("saved");
    state.ok(&format!("snapshot web --to {}", to.display()))?;
    let filler = host.path("filler");
    ensure!(std::io::copy(&mut std::io::repeat(1), &mut File::create(&filler)?).is_err(), "it is full");
    let restore = format!("restore {} --detach --name clone", to.display());
    let said = state.refused(&restore, 1)?;
    ensure!(said.contains("o space left") && said.contains("make room"), "{said}");
    ensure!(state.ps()?.len() == 1);
    fs::remove_file(filler)?;
    state.ok(&restore)?;
    wait_beyond(&state, "clone", before + 5)?;
    Ok(())
}

#[test]
fn blocks_are_shared_where_the_file_system_can() -> Result<()> {
    let Some(host) = SmallHost::sharing_blocks()? else { return Ok(()) };
    let state = machines()?;
    fs::copy(Disk::ext4(64 << 20)?.path(), host.path("data.img"))?;
    let line =
        format!("mount /dev/vdb /mnt && head -c 40000000 /dev/urandom > /mnt/large && sync && {WRITE}")
            .replace("sync && mount /dev/vdb /mnt &&", "sync &&");
    start(&state, &format!("--name web --memory 64M --disk {}", host.path("data.img").display()), &line)?;
    let before = wait_beyond(&state, "web", 10)?;
    let (saved, again) = (host.path("saved"), host.path("again"));
    let used = || -> Result<u64> {
        let stat = rustix::fs::statvfs(host.path(""))?;
        Ok((stat.f_blocks - stat.f_bfree) * stat.f_frsize)
    };
    let memory = |dir: &Path| -> Result<u64> { Ok(fs::metadata(dir.join("memory"))?.blocks() * 512) };
    let was = used()?;
    state.ok(&format!("snapshot web --to {}", saved.display()))?;
    let took = (used()? - was).saturating_sub(memory(&saved)?);
    ensure!(took < 16 << 20, "the disk has 40 MB, and {took} bytes were taken");
    let sum = checksum(&saved.join("disk1.raw"))?;
    let was = used()?;
    for name in ["one", "two", "three"] {
        state.ok(&format!("restore {} --detach --name {name}", saved.display()))?;
        wait_beyond(&state, name, before + 10)?;
    }
    let took = used()? - was;
    ensure!(took < 48 << 20, "three clones of a disk with 40 MB took {took} bytes");
    ensure!(checksum(&saved.join("disk1.raw"))? == sum, "the snapshot's disk was written");
    state.ok(&format!("snapshot two --to {}", again.display()))?;
    check(&Disk::of_others(again.join("disk1.raw")), before)?;
    check(&Disk::of_others(saved.join("disk1.raw")), before)?;
    Ok(())
}

/// fio writes random blocks with a checksum in each, reads them back and compares, and does it again.
const VERIFY: &str = "cd /tmp; i=0; while i=$((i+1)); do fio --name=v --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=16 \
     --rw=randwrite --bsrange=4k-64k --bs_unaligned=0 --size=24m --verify=crc32c --verify_fatal=1 --do_verify=1 \
     --randseed=$i --minimal > /tmp/out && echo n$i || { cat /tmp/out; echo wrong; exit 1; }; done";

#[test]
fn fio_verifies_to_the_end_in_parent_and_clones() -> Result<()> {
    let state = machines()?;
    File::create(state.dir().join("data.img"))?.set_len(32 << 20)?;
    let root = format!("{},ro", tools_image()?.display());
    state.shell(
        &format!("run -q --detach --rootfs {root} --name web --memory 256M --disk data.img"),
        VERIFY,
    )?;
    wait_beyond(&state, "web", 0)?;
    // At any moment of its work.
    for (name, from) in [("one", "web"), ("two", "one"), ("three", "two")] {
        state.ok(&format!("snapshot {from} --to saved"))?;
        let now = last(&state, from)?;
        state.ok(&format!("restore saved --detach --name {name}"))?;
        // The one that it was in the middle of, and a whole one.
        wait_beyond(&state, name, now + 1)?;
        wait_beyond(&state, from, now + 1)?;
    }
    for name in ["web", "one", "two", "three"] {
        let log = state.ok(&format!("logs {name}"))?;
        ensure!(!log.contains("wrong"), "{name}: {log}");
    }
    Ok(())
}
