//! Data on a disk: what a guest was told is safe is there, whatever becomes of the VMM, and a host that fails is an I/O
//! error to the guest and no more.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use harness::{Disk, Guest, Live, Needs, Place, Signal, SmallHost, tools_image};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde_json::json;

/// fio on the second disk: random blocks of all sizes with a checksum in each, read back and compared.
const VERIFY: &str = "fio --name=v --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw \
                      --bsrange=4k-64k --bs_unaligned=0 --size=32m --verify=crc32c --verify_fatal=1 --do_verify=1 \
                      --verify_backlog=256 --randseed=7 --fsync=64 --minimal > /tmp/out && echo verified";

#[test]
fn what_fio_writes_at_random_it_reads_back() -> Result<()> {
    let disk = Disk::blank(64 << 20)?;
    let guest = Guest::new().rootfs_read_only(tools_image()?).memory("512M").disk(&disk);
    guest.shell(VERIFY).run()?.ok()?.expect_line("verified")?;
    Ok(())
}

#[test]
fn another_machine_reads_what_fio_wrote_at_random() -> Result<()> {
    let disk = Disk::blank(64 << 20)?;
    let job = "fio --name=v --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite --bs=4k \
               --size=16m --verify=crc32c --verify_fatal=1 --randseed=7 --minimal > /tmp/out";
    let guest =
        || -> Result<_> { Ok(Guest::new().rootfs_read_only(tools_image()?).memory("512M").disk(&disk)) };
    guest()?.shell(&format!("{job} --do_verify=0 && echo written")).run()?.ok()?.expect_line("written")?;
    guest()?.shell(&format!("{job} --verify_only && echo verified")).run()?.ok()?.expect_line("verified")?;
    // The judge can say no.
    let file = OpenOptions::new().write(true).open(disk.path())?;
    file.write_all_at(&[0xee; 512], (8 << 20) + 512)?;
    let run = guest()?.shell(&format!("{job} --verify_only && echo verified")).run()?;
    ensure!(run.expect_line("verified").is_err(), "a broken block was not found");
    Ok(())
}

/// Appends numbered records to a file, and says of each that it is durable only after fsync, while fio writes at random
/// to another file of the same disk.
const RECORDS: &str = "mount /dev/vdb /mnt && \
     { fio --name=l --directory=/mnt --size=16m --rw=randwrite --bs=4k --ioengine=libaio --iodepth=16 --direct=1 \
           --fallocate=none --time_based --runtime=600 --minimal > /dev/null & }; \
     while ! test -s /mnt/l.0.0; do sleep 0.1; done; i=0; while i=$((i+1)); do echo record $i | dd of=/mnt/records oflag=append conv=notrunc,fsync 2>/dev/null && echo durable $i; done";

/// Kills the VMM after `records` durable ones, checks the file system, and that no durable record is missing.
fn killed_after(records: u32) -> Result<()> {
    let disk = Disk::ext4(64 << 20)?;
    let mut guest =
        Guest::new().rootfs_read_only(tools_image()?).memory("512M").disk(&disk).shell(RECORDS).start()?;
    guest.expect(&format!("durable {records}\r\n"))?;
    guest.signal(Signal::KILL)?;
    let run = guest.wait()?;
    let last: u32 = run
        .console
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("durable ")?.parse().ok())
        .context("records")?;
    ensure!(last >= records, "{last} records");
    // What the next boot would do: replay the journal. Then there must be nothing left to mend.
    let mount = "mount /dev/vdb /mnt && test -s /mnt/l.0.0 && umount /mnt && echo whole";
    let after = Guest::new().disk(&disk).shell(mount).run()?;
    after.ok()?.expect_line("whole")?;
    disk.check_ext4()?;
    let kept = disk.read_file("/records")?;
    let kept: Vec<&str> = kept.lines().collect();
    for number in 1..=last {
        let want = format!("record {number}");
        let have = kept.get(number as usize - 1).copied();
        ensure!(have == Some(&want), "record {number} of {last} was durable, and there is {have:?}");
    }
    Ok(())
}

#[test]
fn a_killed_vmm_loses_nothing_that_was_fsynced_early() -> Result<()> {
    killed_after(3)
}

#[test]
fn a_killed_vmm_loses_nothing_that_was_fsynced_late() -> Result<()> {
    killed_after(150)
}

/// Whether guests of tests run on this machine, where a test can change the file below them: the lab has a copy.
fn guests_are_here() -> Result<bool> {
    Ok(!matches!(Place::choose(Needs::AnyKvm)?, Place::Lab(_)))
}

/// Writes 16 MiB with checks, and says what became of them; the guest goes on.
const WRITE: &str = "dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null; \
     dd if=/tmp/data of=/dev/vdb bs=64k oflag=direct 2>/dev/null && echo all written || echo failed to write; \
     dd if=/dev/vdb of=/tmp/back bs=64k count=1 iflag=direct 2>/dev/null && echo still read; \
     cmp -s -n 65536 /tmp/data /tmp/back && echo the same";

#[test]
fn a_full_host_is_an_error_to_the_guest_and_no_more() -> Result<()> {
    let here = guests_are_here()?;
    let host = SmallHost::new("size=8m")?;
    let image = host.path("disk.img");
    File::create(&image)?.set_len(64 << 20)?;
    let disk = Disk::of_others(&image);
    let run = Guest::new().disk(&disk).shell(WRITE).run()?;
    run.ok()?.expect_line(if here { "failed to write" } else { "all written" })?;
    // What had room is there.
    run.expect_line("still read")?.expect_line("the same")?;
    Ok(())
}

#[test]
fn a_host_that_refuses_writes_is_an_error_to_the_guest_and_no_more() -> Result<()> {
    let here = guests_are_here()?;
    let file = File::from(memfd_create("disk", MemfdFlags::ALLOW_SEALING)?);
    file.set_len(64 << 20)?;
    let disk = Disk::of_others(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
    let line = format!("echo up; read x; {WRITE}");
    let mut guest = Guest::new().disk(&disk).shell(&line).start()?;
    guest.expect("up\r\n")?;
    // From now on every write to it fails, whoever has it open.
    fcntl_add_seals(&file, SealFlags::WRITE)?;
    guest.send("\n")?;
    let run = guest.wait()?;
    run.ok()?.expect_line(if here { "failed to write" } else { "all written" })?.expect_line("still read")?;
    Ok(())
}

/// A guest with a block device of the host's as its second disk, on the file `image` of a file system of 16 MiB.
fn on_block_device(options: serde_json::Value) -> Result<Live<'static>> {
    let mut live = Live::at(&Place::with_root()?)?;
    live.at_the_end("losetup -d $(cat device); umount small");
    // The module is there or built in; another test may be faster and take the free device.
    let attach = "for i in 1 2 3 4 5; do d=$(losetup -f) && losetup $d small/image && echo $d > device && break; done; cat device";
    let make = "mkdir small && mount -t tmpfs -o size=16m none small && truncate -s 64M small/image";
    let device = live.on_host(&format!("{make} && {{ modprobe loop 2>/dev/null; {attach}; }}"))?;
    let mut device = json!({"kind": "disk", "path": device.trim()});
    device.as_object_mut().context("an object")?.extend(options.as_object().context("an object")?.clone());
    Ok(live.device(device))
}

#[test]
fn a_disk_that_fails_to_read_is_an_error_to_the_guest_and_no_more() -> Result<()> {
    for engine in ["io_uring", "threads"] {
        let line = "echo up; read x; dd if=/dev/vdb bs=64k skip=500 count=1 of=/dev/null 2>/dev/null && echo read || echo failed; \
                    dd if=/dev/vdb bs=64k count=1 of=/dev/null 2>/dev/null && echo still read; read x";
        let mut guest = on_block_device(json!({"cache": "none", "engine": engine}))?.start(line)?;
        guest.expect("up\r\n")?;
        // The device is as large as before, and answers EIO behind its file's end.
        guest.on_host("truncate -s 1M small/image")?;
        guest.send("")?;
        guest.expect("failed\r\n")?;
        guest.expect("still read\r\n")?;
        ensure!(guest.counter("disk1", "host_errors")? > 0, "nobody counted it");
        guest.send("")?;
        guest.wait()?.ok()?;
    }
    Ok(())
}

#[test]
fn a_disk_that_fails_when_it_is_flushed_is_an_error_to_the_guest_and_no_more() -> Result<()> {
    for engine in ["io_uring", "threads"] {
        // All writes go to the host's memory, and it finds out later that there is no room below the device.
        let line = "dd if=/dev/urandom of=/tmp/x bs=1M count=32 2>/dev/null; \
                    dd if=/tmp/x of=/dev/vdb bs=64k oflag=direct 2>/dev/null && echo all written; \
                    dd if=/tmp/x of=/dev/vdb bs=64k count=1 conv=fsync 2>/dev/null && echo durable || echo not durable; \
                    echo alive; read x";
        let mut guest = on_block_device(json!({"engine": engine}))?.start(line)?;
        guest.expect("all written\r\n")?;
        guest.expect("not durable\r\n")?;
        guest.expect("alive\r\n")?;
        ensure!(guest.counter("disk1", "host_errors")? > 0, "nobody counted it");
        guest.send("")?;
        guest.wait()?.ok()?;
    }
    Ok(())
}
