//! What tests stand on, on this machine: programs, disks, network namespaces.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use harness::{Disk, Exit, Needs, NetNs, Place, Process, Program, Signal};

/// Only there to end a hang.
const DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn programs_talk_and_end() -> Result<()> {
    let mut process = Process::start_local(&Program::shell("echo a; read x; echo $x >&2; kill -TERM $$"))?;
    process.expect("a\n", DEADLINE)?;
    process.send("b\n")?;
    let output = process.wait(DEADLINE)?;
    assert_eq!((output.exit, &output.stderr[..]), (Exit::Signal(15), &b"b\n"[..]));
    Ok(())
}

#[test]
fn a_wait_in_vain_shows_what_was_printed() -> Result<()> {
    let mut process = Process::start_local(&Program::shell("echo said; sleep 1000"))?;
    process.expect("said", DEADLINE)?;
    let error = process.expect("unsaid", Duration::from_millis(50)).unwrap_err().to_string();
    assert!(error.contains("'unsaid'") && error.contains("said"), "{error}");
    process.signal(Signal::TERM)?;
    assert_eq!(process.wait(DEADLINE)?.exit, Exit::Signal(15));
    Ok(())
}

#[test]
fn a_dropped_program_takes_its_children_with_it() -> Result<()> {
    let mut process = Process::start_local(&Program::shell("sleep 1000 & echo $!; wait"))?;
    let child = process.expect("\n", DEADLINE)?;
    let stat = Path::new("/proc").join(&child).join("stat");
    assert!(stat.exists());
    drop(process);
    // The child goes when init has reaped it; a zombie of it may be seen until then.
    let gone = || std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "));
    while !gone() {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[test]
fn a_disk_is_checked_from_outside() -> Result<()> {
    let disk = Disk::ext4(8 << 20)?;
    disk.check_ext4()?;
    let copy = Disk::copy_of(disk.path())?;
    copy.check_ext4()?;
    // The block bitmap's checksum no longer fits.
    let file = std::fs::OpenOptions::new().write(true).open(copy.path())?;
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x55; 4096], 4 << 10)?;
    assert!(copy.check_ext4().is_err());
    disk.check_ext4()
}

#[test]
fn a_network_namespace_has_a_tap_and_goes_without_a_trace() -> Result<()> {
    let net = NetNs::new(&Place::LocalRing3)?;
    assert!(net.shell("ip addr show tap0")?.contains("10.77.0.1/24"));
    assert!(Process::start_local(&Program::shell("ip link show tap0"))?.wait(DEADLINE)?.ok().is_err());
    Ok(())
}

#[test]
fn a_place_is_found_for_every_need() -> Result<()> {
    let place = Place::choose(Needs::AnyKvm)?;
    assert_eq!(matches!(place, Place::Lab(_)), harness::local_kvm().is_none());
    Ok(())
}
