//! Any distribution's kernel: Debian's own, as it is installed everywhere, and a whole Debian on it.

mod hardware {
    use std::time::Duration;

    use anyhow::Result;
    use harness::{Disk, Guest, Kernel, Needs, Place, PlacedMachines, binaries, debian, report};
    use tempfile::NamedTempFile;

    /// For systemd, before the lab's slowness.
    const DEADLINE: Duration = Duration::from_secs(120);

    #[test]
    fn the_stock_kernel_loads_its_modules_and_runs_our_init() -> Result<()> {
        let guest = Guest::new().kernel(Kernel::DebianCloud).initrd(debian::initrd()?);
        let run = guest.rootfs_read_only(harness::demo_image()?).command("uname -v").run()?;
        run.ok()?.expect_text("Debian")?.expect_line("vmm-init: exit status 0")?;
        Ok(())
    }

    #[test]
    fn a_whole_debian_reaches_its_login_prompt_and_powers_off() -> Result<()> {
        let root = Disk::copy_of(&debian::rootfs()?)?;
        let guest = Guest::new().kernel(Kernel::DebianCloud).initrd(debian::initrd()?).rootfs(&root);
        let mut guest = guest.memory("512M").append("rw").deadline(DEADLINE).start()?;
        guest.expect("debian login: ")?;
        guest.send("root\n")?;
        guest.expect("root@debian:~# ")?;
        guest.send("systemctl is-system-running | tr a-z A-Z; touch /was-here; systemctl poweroff\n")?;
        guest.expect("RUNNING")?;
        guest.wait()?.ok()?;
        root.check_ext4()?;
        assert_eq!(root.read_file("/was-here")?, "");
        Ok(())
    }

    #[test]
    fn vmm_stop_presses_the_power_button_and_a_whole_debian_powers_off() -> Result<()> {
        // A lab ends that waits long for what is built first.
        let (root, initrd) = (debian::rootfs()?, debian::initrd()?);
        binaries::vmm()?;
        let place = Place::choose(Needs::Hardware)?;
        report::boots("Debian's cloud kernel", &place)?;
        let kernel = place.provide(&Kernel::DebianCloud.file()?)?;
        let machines = PlacedMachines::new(&place)?;
        machines.files().shell(&format!("cp {} root", place.provide(&root)?))?;
        machines.ok(&format!(
            "run --name debian --detach --memory 512M --kernel {kernel} --initrd {} --rootfs root --append rw",
            place.provide(&initrd)?
        ))?;
        let send = |line: &str| {
            machines
                .files()
                .shell(&format!("echo \"{line}\" | timeout 5 {} || true", machines.command("attach debian")))
        };
        machines.expect_log("debian", "debian login: ")?;
        send("root")?;
        machines.expect_log("debian", "root@debian:~#")?;
        // Where machines are slow, this comes seconds after the prompt; a button that is pressed before presses nothing.
        send(
            "until journalctl -u systemd-logind | grep 'Watching system buttons'; do sleep 1; done; echo LISTENS | tr A-Z a-z",
        )?;
        machines.expect_log("debian", "\nlistens")?;
        machines.ok("stop --time 250 debian")?;
        let row = machines.ok("ps --format json")?;
        assert!(
            row.contains(r#""state": "ended""#) && row.contains(r#""reason": "the guest powered off""#),
            "{row}"
        );
        let log = machines.ok("logs debian")?;
        assert!(log.contains("reboot: Power down"), "systemd was not done: {log}");
        Ok(())
    }

    #[test]
    fn vmm_stop_reaches_a_guest_without_acpi_by_its_keyboard() -> Result<()> {
        binaries::vmm()?;
        let (kernel, initrd) = (Kernel::DebianCloud.file()?, NamedTempFile::new()?);
        std::fs::write(&initrd, harness::initramfs_with(&[])?)?;
        let place = Place::choose(Needs::Hardware)?;
        report::boots("Debian's cloud kernel", &place)?;
        let machines = PlacedMachines::new(&place)?;
        machines.ok(&format!(
            "run --name old --detach --memory 256M --kernel {} --initrd {} --no-rootfs --append acpi=off \
             -- sh -c 'exec sleep 1000'",
            place.provide(&kernel)?,
            place.provide(initrd.path())?
        ))?;
        machines.expect_log("old", "user space reached")?;
        machines.ok("stop --time 250 old")?;
        let (row, log) = (machines.ok("ps --format json")?, machines.ok("logs old")?);
        // Our init restarts the machine, and its command has not ended.
        assert!(row.contains("the guest ended before it said how the command ended"), "{row} {log}");
        Ok(())
    }
}
