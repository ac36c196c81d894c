//! Any distribution's kernel: Debian's own, as it is installed everywhere, and a whole Debian on it.

mod hardware {
    use std::time::Duration;

    use anyhow::Result;
    use harness::{Disk, Guest, Kernel, debian};

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
}
