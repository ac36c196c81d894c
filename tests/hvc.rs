//! The virtio console: a guest's shell on it, with somebody else than the command at the other end.

use std::time::Duration;

use anyhow::Result;
use harness::{Guest, Needs, Place, Process, Program, binaries};

/// Only there to end a hang.
const DEADLINE: Duration = Duration::from_secs(120);

struct Setup {
    place: Place,
    dir: String,
    peer: String,
    initramfs: tempfile::NamedTempFile,
}

impl Setup {
    fn new(name: &str) -> Result<Self> {
        let place = Place::choose(Needs::AnyKvm)?;
        let peer = place.provide(&binaries::stream_peer()?)?;
        let initramfs = tempfile::NamedTempFile::new()?;
        std::fs::write(initramfs.path(), harness::initramfs()?)?;
        let dir = format!("/tmp/vmm-hvc-{name}-{}", std::process::id());
        place.shell(&format!("mkdir {dir}"))?.ok()?;
        Ok(Self { place, dir, peer, initramfs })
    }

    /// A guest whose console is hvc0.
    fn guest(&self, console: &str) -> Guest<'static> {
        Guest::new()
            .initrd(self.initramfs.path())
            .arg("--console")
            .arg(console)
            .append("console=hvc0")
            .deadline(DEADLINE)
    }

    /// Somebody at the other end of the socket.
    fn person(&self) -> Result<Process> {
        let address = format!("unix:{}/c", self.dir);
        self.place.start(&Program::new([self.peer.as_str(), "pipe", &address]))
    }

    fn deadline(&self) -> Duration {
        DEADLINE * self.place.slowness()
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        _ = self.place.shell(&format!("rm -r {}", self.dir));
    }
}

#[test]
fn a_shell_on_hvc0_answers_whoever_is_at_the_socket() -> Result<()> {
    let setup = Setup::new("socket")?;
    let guest = setup.guest(&format!("socket={}/c", setup.dir)).command("sh").start()?;
    // The socket is there before the guest runs, but perhaps not before the command is.
    setup.place.shell(&format!("until test -S {}/c; do sleep 0.1; done", setup.dir))?.ok()?;
    let mut first = setup.person()?;
    // Linux throws away what is typed before somebody has the console open.
    first.expect("# ", setup.deadline())?;
    first.send("echo first-$((6*7))\n")?;
    first.expect("first-42", setup.deadline())?;
    drop(first);
    let mut second = setup.person()?;
    second.send("echo second-$((7*7))\n")?;
    second.expect("second-49", setup.deadline())?;
    second.send("cat /proc/consoles; exit\n")?;
    second.expect("hvc0", setup.deadline())?;
    guest.wait()?.ok()?;
    Ok(())
}

#[test]
fn a_file_has_all_that_the_guest_wrote() -> Result<()> {
    let setup = Setup::new("file")?;
    let file = format!("{}/log", setup.dir);
    let script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; echo done";
    setup.guest(&format!("file={file}")).shell(script).run()?.ok()?;
    let text = setup.place.shell(&format!("cat {file}"))?.ok()?.replace('\r', "");
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("line ")).collect();
    assert_eq!(lines.len(), 2000, "{text}");
    assert!(lines.iter().enumerate().all(|(i, line)| *line == format!("line {i}")), "{text}");
    Ok(())
}

#[test]
fn a_console_that_nobody_reads_does_not_hold_up_its_guest() -> Result<()> {
    let setup = Setup::new("flood")?;
    let script =
        "i=0; while [ $i -lt 3000 ]; do echo 0123456789012345678901234567890123456789; i=$((i+1)); done";
    setup.guest(&format!("socket={}/c", setup.dir)).shell(script).run()?.ok()?;
    setup.guest("pty").shell(script).run()?.ok()?;
    Ok(())
}
