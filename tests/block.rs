//! Disks: what a guest writes is there, and what it may not write is not.

use anyhow::Result;
use harness::{Disk, Guest};

#[test]
fn what_is_fsynced_survives_and_the_file_system_is_clean() -> Result<()> {
    let disk = Disk::ext4(64 << 20)?;
    let write = "mount /dev/vdb /mnt && dd if=/dev/urandom of=/mnt/data bs=64k count=200 conv=fsync 2>/dev/null; \
                 sha256sum < /mnt/data | tee /mnt/sum; sync; umount /mnt";
    let first = Guest::new().disk(&disk).shell(write).run()?;
    first.ok()?.expect_line("vmm-init: exit status 0")?;
    disk.check_ext4()?;
    let sum = disk.read_file("/sum")?;
    assert_eq!(sum.trim().len(), 64 + 3, "a SHA-256 sum: {sum}");

    let read = "mount /dev/vdb /mnt && sha256sum < /mnt/data; umount /mnt";
    Guest::new().disk(&disk).shell(read).run()?.ok()?.expect_line(sum.trim())?;
    Ok(())
}

#[test]
fn a_root_file_system_is_written_and_read_back_after_a_second_boot() -> Result<()> {
    let root = Disk::copy_of(&harness::demo_image()?)?;
    Guest::new().rootfs(&root).shell("echo kept > /kept; sync").run()?.ok()?;
    root.check_ext4()?;
    assert_eq!(root.read_file("/kept")?, "kept\n");
    Guest::new().rootfs(&root).command("cat /kept").run()?.ok()?.expect_line("kept")?;
    Ok(())
}

#[test]
fn a_read_only_disk_refuses_writes() -> Result<()> {
    let disk = Disk::ext4(16 << 20)?;
    let before = std::fs::read(disk.path())?;
    let line = "cat /sys/block/vdb/ro; mount -o rw /dev/vdb /mnt; dd if=/dev/zero of=/dev/vdb bs=4k count=1; \
                blockdev --setrw /dev/vdb; dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync && echo written";
    let run = Guest::new().disk_with(&disk, ",ro").shell(line).run()?;
    run.ok()?.expect_line("1")?;
    assert_eq!(std::fs::read(disk.path())?, before);
    Ok(())
}

#[test]
fn disks_keep_their_order_and_their_names() -> Result<()> {
    let (small, large) = (Disk::blank(1 << 20)?, Disk::blank(3 << 20)?);
    let line = "cat /sys/block/vdb/size /sys/block/vdc/size; cat /sys/block/vdc/serial; echo";
    let run = Guest::new().disk(&small).disk_with(&large, ",id=large").shell(line).run()?;
    run.ok()?.expect_line("2048")?.expect_line("6144")?.expect_line("large")?;
    Ok(())
}

#[test]
fn one_image_is_not_written_by_two_machines() -> Result<()> {
    let disk = Disk::ext4(16 << 20)?;
    let mut first = Guest::new().disk(&disk).shell("echo up; read x").start()?;
    first.expect("up")?;
    let second = Guest::new().disk(&disk).command("true").run()?;
    second.status(1)?;
    assert_eq!(second.stderr.lines().count(), 1, "one sentence: {}", second.stderr);
    first.send("\n")?;
    first.wait()?.ok()?;
    Ok(())
}

#[test]
fn a_disk_that_shrinks_under_the_guest_is_an_error_to_it_and_no_more() -> Result<()> {
    let disk = Disk::blank(8 << 20)?;
    let line =
        "echo up; read x; dd if=/dev/vdb of=/dev/null bs=64k skip=100 count=1 && echo read; echo alive";
    let mut guest = Guest::new().disk(&disk).shell(line).start()?;
    guest.expect("up")?;
    // In the lab the guest has a copy, which stays as it is.
    let local = std::fs::OpenOptions::new().write(true).open(disk.path())?;
    local.set_len(1 << 20)?;
    guest.send("\n")?;
    let run = guest.wait()?;
    run.ok()?.expect_line("alive")?;
    assert!(run.console.contains("\nread") == matches!(run.place, harness::Place::Lab(_)), "{}", run.console);
    Ok(())
}

#[test]
fn blocks_that_the_guest_trims_return_to_the_host() -> Result<()> {
    for options in ["", ",engine=threads"] {
        let disk = Disk::ext4(64 << 20)?;
        let line = "mount /dev/vdb /mnt; dd if=/dev/urandom of=/mnt/large bs=64k count=640 conv=fsync 2>/dev/null; \
                    echo written; rm /mnt/large; sync; fstrim /mnt; umount /mnt";
        Guest::new().disk_with(&disk, options).shell(line).run()?.ok()?.expect_line("written")?;
        disk.check_ext4()?;
        let left = disk.allocated()?;
        assert!(left < 20 << 20, "{left} bytes, after 40 MiB were written and removed");
    }
    Ok(())
}
