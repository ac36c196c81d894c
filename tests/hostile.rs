//! A hostile driver in a real guest: every kind of device, on both transports. The VMM must not mind, and neither must
//! devices that are honestly used.

use std::fmt::Write;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use harness::{Disk, Guest, Needs, NetNs, Place, binaries, initramfs_with, smaps};
use vmm_core::devices::registry::KINDS;

const MIB: u64 = 1 << 20;
const RAM: u64 = 128 * MIB;
/// What the VMM may have besides the guest's RAM, whatever the guest does. It is a static program without optimisation,
/// and has what its devices have in flight.
const OWN_MEMORY: u64 = 32 * MIB;
/// What it may say of a guest's mistakes.
const STDERR: usize = 32 << 10;
/// Only there to end a hang.
const DEADLINE: Duration = Duration::from_secs(300);
/// What the program in the guest does to each device.
const GROUPS: [&str; 9] =
    ["queue-registers", "status", "widths", "config-space", "reset", "rings", "chains", "requests", "random"];

/// What gives a guest a device of this kind, which it does not have anyway.
fn flag(kind: &str, dir: &Path) -> Result<Option<String>> {
    Ok(Some(match kind {
        // The victim and the witness.
        "disk" => return Ok(None),
        "net" => format!("--net=tap={}", harness::net::TAP),
        // On by default.
        "rng" | "balloon" => return Ok(None),
        "pmem" => {
            let image = dir.join("pmem");
            File::create(&image)?.set_len(2 * MIB)?;
            format!("--pmem={}", image.display())
        }
        "console" => "--console=null".into(),
        "vsock" => format!("--vsock={}", dir.join("vsock").display()),
        kind => bail!("say here how a guest gets a device of kind {kind}"),
    }))
}

/// Attacks all devices but a disk with a mounted file system on it; what is on that survives.
fn attack(transport: &str, seed: u64) -> Result<()> {
    let place = Place::choose(Needs::AnyKvm)?;
    let net = NetNs::new(&place)?;
    let initramfs = tempfile::NamedTempFile::new()?;
    std::fs::write(initramfs.path(), initramfs_with(&[("hostile-driver", &binaries::hostile_driver()?)])?)?;
    let [witness, victim, relic] = [Disk::ext4(16 * MIB)?, Disk::ext4(16 * MIB)?, Disk::ext4(16 * MIB)?];
    let relic_is = || place.shell(&format!("sha256sum < {}", place.provide(relic.path())?))?.ok();
    let (relic_was, victim_was) = (relic_is()?, std::fs::read(victim.path())?);
    let mut line = String::from("mount /dev/vda /tmp && echo before > /tmp/before && ");
    write!(line, "hostile-driver {seed} vda && echo after > /tmp/after && umount /tmp && ")?;
    // Linux has its drivers back, and the devices work for them.
    line +=
        "dd if=/dev/vdb of=/dev/null bs=64k && head -c 64 /dev/hwrng > /dev/null && ip link set eth0 up && ";
    line += "echo all attacked; read x";
    let guest = Guest::new()
        .initrd(initramfs.path())
        .memory(&RAM.to_string())
        .disk(&witness)
        .disk(&victim)
        .disk_with(&relic, ",ro")
        .within(&net)
        .arg("--transport")
        .arg(transport)
        // What it says of a guest's mistakes has a bound even if it is to say all.
        .arg("-vv")
        .shell(&line)
        .deadline(DEADLINE);
    let dir = tempfile::tempdir()?;
    let mut flags = KINDS.iter().filter_map(|kind| flag(kind.name, dir.path()).transpose());
    let mut guest = flags.try_fold(guest, |guest, flag| anyhow::Ok(guest.arg(&flag?)))?.start()?;
    guest.expect("all attacked")?;
    let mappings = guest.smaps()?;
    let resident = |mappings: &[smaps::Mapping]| mappings.iter().map(|mapping| mapping.rss).sum::<u64>();
    let own = resident(&mappings) - resident(smaps::ram(&mappings, RAM)?);
    println!("the VMM has {} KiB besides guest RAM", own >> 10);
    guest.send("\n")?;
    let run = guest.wait()?;
    run.ok()?;
    for kind in KINDS {
        for group in GROUPS {
            let end = format!(" {} {transport} {group} ok", kind.name);
            let is = |line: &str| line.starts_with("hostile: virtio") && line.ends_with(&end);
            ensure!(run.console.lines().any(is), "no line ends with '{end}':\n{}", run.console);
        }
    }
    ensure!(own <= OWN_MEMORY, "the VMM has {own} bytes besides guest RAM");
    ensure!(run.stderr.len() <= STDERR, "the VMM says {} bytes:\n{}", run.stderr.len(), run.stderr);
    ensure!(relic_is()? == relic_was, "a read-only disk was written to");
    ensure!(
        std::fs::read(victim.path())? != victim_was,
        "writes were tried, and one that may be written was not"
    );
    witness.check_ext4()?;
    for name in ["before", "after"] {
        ensure!(witness.read_file(name)? == format!("{name}\n"), "{name} is lost");
    }
    Ok(())
}

#[test]
fn devices_withstand_a_hostile_driver_on_mmio() -> Result<()> {
    attack("mmio", 1)
}

#[test]
fn devices_withstand_a_hostile_driver_on_pci() -> Result<()> {
    attack("pci", 2)
}
