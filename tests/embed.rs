//! The library's example: two guests in one process, one stopped, the other waited for.

use std::time::Duration;

use anyhow::Result;
use harness::{Kernel, Needs, Place, Program, binaries};

#[test]
fn two_guests_in_one_process() -> Result<()> {
    let place = Place::choose(Needs::AnyKvm)?;
    harness::report::boots("the embedding example", &place)?;
    let dir = tempfile::tempdir()?;
    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, harness::initramfs()?)?;
    let example = binaries::build(&["--package", "vmm-core", "--example", "embed"])?;
    let program = Program::new([
        place.provide(&example)?,
        place.provide(&Kernel::Default.at(&place).file()?)?,
        place.provide(&initrd)?,
        "-- echo hello".into(),
    ]);
    let output = place.start(&program)?.wait(Duration::from_secs(60) * place.slowness())?;
    let text = output.ok()?;
    assert!(text.contains("guest 0: stopped on request"), "{text}");
    assert!(text.contains("guest 1: the guest powered off"), "{text}");
    assert!(!text.contains("guest 1 wrote 0 lines"), "{text}");
    Ok(())
}
