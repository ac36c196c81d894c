//! The library's small examples: one guest, and two guests in one process, one stopped, the other waited for.

use std::time::Duration;

use anyhow::Result;
use harness::{Kernel, Needs, Place, Program, binaries};

/// What the example prints when it is given a kernel, our init and these arguments.
fn run(example: &str, arguments: &[&str]) -> Result<String> {
    let place = Place::choose(Needs::AnyKvm)?;
    harness::report::boots(&format!("the example {example}"), &place)?;
    let dir = tempfile::tempdir()?;
    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, harness::initramfs()?)?;
    let example = binaries::build(&["--package", "vmm-core", "--example", example])?;
    let files = [
        place.provide(&example)?,
        place.provide(&Kernel::Default.at(&place).file()?)?,
        place.provide(&initrd)?,
    ];
    let program = Program::new(files.into_iter().chain(arguments.iter().map(|&argument| argument.into())));
    place.start(&program)?.wait(Duration::from_secs(60) * place.slowness())?.ok()
}

#[test]
fn hello() -> Result<()> {
    let text = run("hello", &[])?;
    assert!(text.contains("Linux version"), "{text}");
    assert!(text.ends_with("the guest powered off\n"), "{text}");
    Ok(())
}

#[test]
fn two_guests_in_one_process() -> Result<()> {
    let text = run("embed", &["-- cat /proc/version"])?;
    assert!(text.contains("guest 0: stopped on request"), "{text}");
    assert!(text.contains("guest 1: the guest powered off"), "{text}");
    assert!(!text.contains("guest 1 wrote 0 lines"), "{text}");
    Ok(())
}
