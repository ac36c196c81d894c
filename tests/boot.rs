//! Kernels boot, and guests end, in every way that users know.

use anyhow::Result;
use harness::{Guest, Kernel, tools_image};

const INIT_DONE: &str = "vmm-init: exit status 0";

#[test]
fn a_guest_reaches_its_init_and_runs_a_command() -> Result<()> {
    let run = Guest::new().shell("uname -sm; id -u").run()?;
    run.ok()?.expect_line("vmm-init: user space reached")?.expect_line("Linux x86_64")?.expect_line("0")?;
    run.expect_line(INIT_DONE)?;
    Ok(())
}

#[test]
fn programs_keep_their_vector_registers() -> Result<()> {
    let run = Guest::new().rootfs_read_only(tools_image()?).command("registers").run()?;
    run.ok()?.expect_line("registers kept")?;
    Ok(())
}

#[test]
fn linux_and_pvh_entry_both_work() -> Result<()> {
    for protocol in ["linux", "pvh"] {
        let run = Guest::new().arg("--boot-protocol").arg(protocol).command("true").run()?;
        run.ok()?.expect_line(INIT_DONE)?;
    }
    Ok(())
}

#[test]
fn a_kernel_without_acpi_finds_its_devices_on_the_command_line() -> Result<()> {
    let run = Guest::new()
        .append("acpi=off pci=off")
        .shell("ls -1 /sys/bus/virtio/devices; ls -d /sys/firmware/acpi")
        .run()?;
    run.ok()?.expect_line("virtio0")?;
    assert!(!run.console.contains("\n/sys/firmware/acpi\n"), "{}", run.console);
    Ok(())
}

#[test]
fn an_initrd_is_a_root_file_system() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, harness::initramfs()?)?;
    let run = Guest::new().initrd(&initrd).shell("ls -1 /; grep -c vda /proc/partitions").run()?;
    run.ok()?.expect_line("init")?.expect_line("0")?;
    Ok(())
}

#[test]
fn reboot_power_off_and_triple_fault_end_with_status_0() -> Result<()> {
    for command in ["reboot -f", "poweroff -f", "reboot", "poweroff"] {
        Guest::new().command(command).run()?.ok()?;
    }
    for way in ["reboot=t", "reboot=k", "reboot=acpi"] {
        Guest::new().append(way).command("reboot -f").run()?.ok()?;
    }
    Ok(())
}

#[test]
fn a_panic_ends_with_status_3() -> Result<()> {
    let run = Guest::new().append("init=/nowhere").run()?;
    run.status(3)?.expect_text("Kernel panic - not syncing")?;
    let run = Guest::new().append("sysrq_always_enabled").shell("echo c > /proc/sysrq-trigger").run()?;
    run.status(3)?.expect_text("Kernel panic - not syncing")?;
    Ok(())
}

#[test]
fn a_guest_that_panics_and_does_not_reboot_does_not_hang() -> Result<()> {
    Guest::new().append("panic=0 init=/nowhere").run()?.status(3)?;
    Ok(())
}

#[test]
fn the_guest_sees_its_memory() -> Result<()> {
    for (size, least, most) in [("128M", 100_000, 131_072), ("4G", 4_000_000, 4_194_304)] {
        let run = Guest::new().memory(size).command("grep MemTotal: /proc/meminfo").run()?;
        let kib: u64 = run.ok()?.value_of("MemTotal:")?.trim_end_matches(" kB").parse()?;
        assert!((least..=most).contains(&kib), "{size}: {kib} KiB");
    }
    Ok(())
}

#[test]
fn memory_above_the_gap_can_be_used() -> Result<()> {
    // 3.2 GiB of zeroes in a file in memory reach beyond the 3 GiB below the gap.
    let line = "mount -t tmpfs -o size=100% none /tmp; dd if=/dev/zero of=/tmp/x bs=1M count=3300 2>/dev/null; \
                stat -c %s /tmp/x; grep '^ *10000000.*System RAM' /proc/iomem | wc -l";
    let run = Guest::new().memory("4G").shell(line).run()?;
    run.ok()?.expect_line("3460300800")?.expect_line("1")?;
    Ok(())
}

#[test]
fn two_guests_run_side_by_side() -> Result<()> {
    let mut guests = Vec::new();
    for name in ["one", "two"] {
        guests.push(Guest::new().shell(&format!("echo ready {name}; read word; echo $word {name}")).start()?);
    }
    guests[0].expect("ready one")?;
    guests[1].expect("ready two")?;
    for guest in &mut guests {
        guest.send("hello\n")?;
    }
    for (guest, name) in guests.into_iter().zip(["one", "two"]) {
        guest.wait()?.ok()?.expect_line(&format!("hello {name}"))?;
    }
    Ok(())
}

#[test]
fn user_space_is_reported_to_the_vmm() -> Result<()> {
    let run = Guest::new().arg("--timings").command("true").run()?;
    run.ok()?;
    assert!(run.stderr.contains("user space reached"), "{}", run.stderr);
    Ok(())
}

#[test]
fn the_clock_is_right() -> Result<()> {
    let before = std::time::SystemTime::UNIX_EPOCH.elapsed()?.as_secs();
    let run = Guest::new().command("date +time=%s").run()?;
    let seconds: u64 = run.ok()?.value_of("time=")?.parse()?;
    let after = std::time::SystemTime::UNIX_EPOCH.elapsed()?.as_secs();
    // The lab's own clock may be a little off this machine's.
    assert!((before.saturating_sub(2)..=after + 2).contains(&seconds), "{before} {seconds} {after}");
    Ok(())
}

mod hardware {
    use super::*;

    #[test]
    fn elf_and_bzimage_boot() -> Result<()> {
        for kernel in [Kernel::Standard, Kernel::BzImage] {
            let run = Guest::new().kernel(kernel).command("uname -r").run()?;
            run.ok()?.expect_line("vmm-init: user space reached")?;
        }
        Ok(())
    }

    #[test]
    fn every_cpu_is_seen_and_runs() -> Result<()> {
        for cpus in [1, 2, 4] {
            // A task bound to each CPU runs to its end, so each of them takes part.
            let line = "nproc; i=0; while [ $i -lt $(nproc) ]; do taskset -c $i true && echo ran $i; i=$((i+1)); done";
            let run = Guest::new().kernel(Kernel::Standard).cpus(cpus).shell(line).run()?;
            run.ok()?.expect_line(&cpus.to_string())?.expect_line(&format!("ran {}", cpus - 1))?;
        }
        Ok(())
    }

    #[test]
    fn without_acpi_the_mp_table_brings_up_every_cpu() -> Result<()> {
        let device = "acpi=off pci=off virtio_mmio.device=4K@0xd0000000:5";
        let run = Guest::new().kernel(Kernel::Standard).cpus(2).append(device).command("nproc").run()?;
        run.ok()?.expect_line("2")?;
        Ok(())
    }

    #[test]
    fn topology_is_one_package_of_cores_and_no_host_id_shows() -> Result<()> {
        let line = "cd /sys/devices/system/cpu; cat cpu*/topology/physical_package_id | sort -u; \
                    cat cpu3/topology/core_siblings_list cpu3/topology/thread_siblings_list; \
                    grep apicid /proc/cpuinfo | tr -d '\\t '";
        let run = Guest::new().kernel(Kernel::Standard).cpus(4).shell(line).run()?;
        run.ok()?.expect_line("0-3")?.expect_line("3")?.expect_line("0")?;
        for id in 0..4 {
            run.expect_line(&format!("apicid:{id}"))?;
        }
        Ok(())
    }
}
