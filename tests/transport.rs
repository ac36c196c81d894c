//! virtio-pci in real guests, beside virtio-mmio, which is the default everywhere else.

use anyhow::Result;
use harness::{Disk, Guest};

#[test]
fn both_transports_boot_and_devices_are_where_they_should_be() -> Result<()> {
    let line = "ls /sys/bus/pci/drivers/virtio-pci /sys/bus/platform/drivers/virtio-mmio; grep -c PCI-MSIX /proc/interrupts; echo done";
    let mmio = Guest::new().transport("mmio").shell(line).run()?;
    mmio.ok()?.expect_line("0")?.expect_line("done")?;
    assert!(!mmio.console.contains("0000:00:01.0"), "{}", mmio.console);
    // Root disk and rng: a vector each for the configuration and for one queue.
    let pci = Guest::new().transport("pci").arg("--no-balloon").shell(line).run()?;
    pci.ok()?.expect_text("0000:00:01.0")?.expect_line("4")?.expect_line("done")?;
    Ok(())
}

#[test]
fn the_kernel_warns_of_nothing_about_pci() -> Result<()> {
    // Messages with their levels: 4 is a warning, lower ones are errors. The brackets keep this line itself, which the
    // kernel logs, from matching.
    let line = "dmesg -r | grep -c 'PCI[ ]host bridge to bus'; dmesg -r | grep -iE '^<[0-4]>.*(pci|ecam|virtio)'; echo end";
    let run = Guest::new().transport("pci").shell(line).run()?;
    run.ok()?.expect_line("1")?.expect_line("end")?;
    let warnings: Vec<&str> = run.console.lines().filter(|line| line.starts_with('<')).collect();
    assert_eq!(warnings, [""; 0]);
    Ok(())
}

#[test]
fn without_acpi_pci_is_found_by_its_ports() -> Result<()> {
    for parameters in ["acpi=off", "pci=nommconf"] {
        let run = Guest::new()
            .transport("pci")
            .append(parameters)
            .shell("cat /sys/bus/pci/devices/*/vendor")
            .run()?;
        run.ok()?.expect_line("0x1b36")?.expect_line("0x1af4")?;
    }
    Ok(())
}

#[test]
fn a_disk_on_pci_keeps_what_is_written() -> Result<()> {
    let disk = Disk::ext4(32 << 20)?;
    let line = "mount /dev/vdb /mnt && dd if=/dev/urandom of=/mnt/data bs=64k count=100 conv=fsync 2>/dev/null; \
                sha256sum < /mnt/data | tee /mnt/sum; umount /mnt";
    Guest::new().transport("pci").disk(&disk).shell(line).run()?.ok()?;
    disk.check_ext4()?;
    let sum = disk.read_file("/sum")?;
    let read = "mount /dev/vdb /mnt && sha256sum < /mnt/data; umount /mnt";
    Guest::new().transport("mmio").disk(&disk).shell(read).run()?.ok()?.expect_line(sum.trim())?;
    Ok(())
}

#[test]
fn thirty_one_devices_fit_on_pci_and_one_more_is_refused() -> Result<()> {
    let disk = Disk::blank(1 << 20)?;
    let disks = |count: usize| {
        (0..count)
            .fold(Guest::new().transport("pci").arg("--no-balloon"), |guest, _| guest.disk_with(&disk, ",ro"))
    };
    // With the root disk and the rng.
    let run = disks(29).shell("ls -d /sys/bus/virtio/devices/* | wc -l; ls /sys/block | grep -c vd").run()?;
    run.ok()?.expect_line("31")?.expect_line("30")?;
    let run = disks(30).command("true").run()?;
    run.status(2)?;
    assert!(run.stderr.contains("32 devices are too many; 31 is the limit"), "{}", run.stderr);
    Ok(())
}

mod hardware {
    use harness::{Kernel, debian};

    use super::*;

    #[test]
    fn our_standard_kernel_and_debians_find_pci_with_several_cpus() -> Result<()> {
        let line = "grep -c PCI-MSIX /proc/interrupts; cat /sys/bus/pci/devices/0000:00:01.0/vendor";
        let ours = Guest::new().kernel(Kernel::Standard).cpus(2).transport("pci").shell(line).run()?;
        ours.ok()?.expect_line("0x1af4")?;
        let debian =
            Guest::new().kernel(Kernel::DebianCloud).initrd(debian::initrd()?).cpus(2).transport("pci");
        let run = debian.rootfs_read_only(harness::demo_image()?).shell(line).run()?;
        run.ok()?.expect_line("0x1af4")?;
        Ok(())
    }
}
