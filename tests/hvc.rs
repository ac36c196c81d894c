//! The virtio console: a guest's shell on it, with somebody else than the command at the other end.

use anyhow::Result;
use harness::{Guest, Process, StreamPeer};

/// A guest whose console is hvc0.
fn guest(peer: &StreamPeer, console: &str) -> Guest<'static> {
    peer.guest().arg("--console").arg(console).append("console=hvc0")
}

/// Somebody at the other end of the socket.
fn person(peer: &StreamPeer) -> Result<Process> {
    peer.start(&["pipe", &format!("unix:{}", peer.path("c"))])
}

#[test]
fn a_shell_on_hvc0_answers_whoever_is_at_the_socket() -> Result<()> {
    let peer = StreamPeer::new()?;
    let shell = guest(&peer, &format!("socket={}", peer.path("c"))).command("sh").start()?;
    // The socket is there before the guest runs, but perhaps not before the command is.
    peer.place().shell(&format!("until test -S {}; do sleep 0.1; done", peer.path("c")))?.ok()?;
    let mut first = person(&peer)?;
    // Linux throws away what is typed before somebody has the console open.
    first.expect("# ", peer.deadline())?;
    first.send("echo first-$((6*7))\n")?;
    first.expect("first-42", peer.deadline())?;
    drop(first);
    let mut second = person(&peer)?;
    second.send("echo second-$((7*7))\n")?;
    second.expect("second-49", peer.deadline())?;
    second.send("cat /proc/consoles; exit\n")?;
    second.expect("hvc0", peer.deadline())?;
    shell.wait()?.ok()?;
    Ok(())
}

#[test]
fn a_file_has_all_that_the_guest_wrote() -> Result<()> {
    let peer = StreamPeer::new()?;
    let file = peer.path("log");
    let script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; echo done";
    let run = guest(&peer, &format!("file={file}")).arg("--timings").shell(script).run()?;
    // The serial port has nothing to say in this guest.
    assert!(run.ok()?.stderr.contains("first byte on the console"), "{run:?}");
    let text = peer.place().shell(&format!("cat {file}"))?.ok()?.replace('\r', "");
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("line ")).collect();
    assert_eq!(lines.len(), 2000, "{text}");
    assert!(lines.iter().enumerate().all(|(i, line)| *line == format!("line {i}")), "{text}");
    Ok(())
}

#[test]
fn a_console_that_nobody_reads_does_not_hold_up_its_guest() -> Result<()> {
    let peer = StreamPeer::new()?;
    let script =
        "i=0; while [ $i -lt 3000 ]; do echo 0123456789012345678901234567890123456789; i=$((i+1)); done";
    guest(&peer, &format!("socket={}", peer.path("c"))).shell(script).run()?.ok()?;
    guest(&peer, "pty").shell(script).run()?.ok()?;
    Ok(())
}
