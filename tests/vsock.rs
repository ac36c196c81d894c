//! Streams between guest and host, both ways, through real guests: the same program is at both ends.

use anyhow::{Result, ensure};
use harness::{Exit, Process, Running, StreamPeer};

/// The peer with a socket device's path.
struct Setup {
    peer: StreamPeer,
}

impl Setup {
    fn new() -> Result<Self> {
        Ok(Self { peer: StreamPeer::new()? })
    }

    /// The device's socket.
    fn socket(&self) -> String {
        self.peer.path("v")
    }

    /// A guest with the device, whose console is as wide as any line.
    fn guest(&self, shell: &str) -> Result<Running<'static>> {
        self.peer.guest().memory("192M").arg("--vsock").arg(&self.socket()).shell(shell).start()
    }

    /// A guest that serves port 5000 until somebody presses return.
    fn serving(&self) -> Result<Running<'static>> {
        let mut guest = self.guest("peer serve vsock:5000 & read x")?;
        guest.expect("serving")?;
        Ok(guest)
    }

    /// Runs the peer beside the guest to its end. `$G` is port 5000 of the guest.
    fn run(&self, arguments: &str) -> Result<String> {
        let guest = format!("guest:{}:5000", self.socket());
        let arguments: Vec<String> = arguments.split(' ').map(|word| word.replace("$G", &guest)).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.peer.start(&arguments)?.wait(self.peer.deadline())?.ok()
    }

    /// A peer beside the guest that serves the guest's calls to this port.
    fn host_serves(&self, port: u32) -> Result<Process> {
        let mut serving = self.peer.start(&["serve", &format!("unix:{}_{port}", self.socket())])?;
        serving.expect("serving", self.peer.deadline())?;
        Ok(serving)
    }

    /// Whether there is anything left at the device's path.
    fn socket_exists(&self) -> Result<bool> {
        Ok(self.peer.place().shell(&format!("test -e {}", self.socket()))?.exit == Exit::Status(0))
    }
}

fn end(mut guest: Running<'_>) -> Result<()> {
    guest.send("\n")?;
    guest.wait()?.ok()?;
    Ok(())
}

#[test]
fn bytes_go_both_ways_whoever_calls() -> Result<()> {
    let setup = Setup::new()?;
    let guest = setup.serving()?;
    let bytes = 64 << 20;
    setup.run(&format!("send $G {bytes}"))?;
    setup.run(&format!("receive $G {bytes}"))?;
    end(guest)?;

    let _host = setup.host_serves(7)?;
    let script =
        format!("peer send vsock:2:7 {bytes} && peer receive vsock:2:7 {bytes} && peer echo vsock:2:7 3");
    let run = setup.guest(&script)?.wait()?;
    run.ok()?.expect_text("echo: 3 connections")?;
    Ok(())
}

#[test]
fn a_thousand_connections_at_once_whoever_calls() -> Result<()> {
    let setup = Setup::new()?;
    let guest = setup.serving()?;
    let said = setup.run("echo $G 1000")?;
    ensure!(said.contains("echo: 1000 connections"), "{said}");
    // They have left nothing behind.
    setup.run("echo $G 1000")?;
    end(guest)?;

    let _host = setup.host_serves(7)?;
    let run = setup.guest("peer echo vsock:2:7 1000")?.wait()?;
    run.ok()?.expect_text("echo: 1000 connections")?;
    Ok(())
}

#[test]
fn who_never_reads_holds_up_nobody_else() -> Result<()> {
    let setup = Setup::new()?;
    let guest = setup.serving()?;
    let said = setup.run("flood $G")?;
    ensure!(said.contains("stuck after"), "{said}");
    end(guest)?;

    let _host = setup.host_serves(7)?;
    let run = setup.guest("peer flood vsock:2:7 && peer echo vsock:2:7 10")?.wait()?;
    run.ok()?.expect_text("stuck after")?;
    Ok(())
}

#[test]
fn calls_that_nobody_takes_are_refused() -> Result<()> {
    let setup = Setup::new()?;
    let guest = setup.serving()?;
    let said = setup.run(&format!("refused guest:{}:5001", setup.socket()))?;
    ensure!(said.contains("refused"), "{said}");
    end(guest)?;
    let run = setup.guest("peer refused vsock:2:9 && peer refused vsock:7:9")?.wait()?;
    run.ok()?.expect_text("Connection reset by peer")?;
    Ok(())
}

#[test]
fn the_end_of_a_machine_ends_its_connections_and_removes_its_socket() -> Result<()> {
    let setup = Setup::new()?;
    let guest = setup.serving()?;
    let mut held = setup.peer.start(&["wait-for-end", &format!("guest:{}:5000", setup.socket())])?;
    held.expect("connected", setup.peer.deadline())?;
    ensure!(setup.socket_exists()?, "it is there while the machine runs");
    let second = setup.guest("true")?.wait()?;
    ensure!(second.exit == Exit::Status(1) && second.stderr.contains("in use"), "{}", second.stderr);
    guest.signal(harness::Signal::TERM)?;
    guest.wait()?;
    held.expect("ended", setup.peer.deadline())?;
    ensure!(!setup.socket_exists()?, "it is gone afterwards");
    Ok(())
}

#[test]
fn a_machine_that_was_killed_leaves_a_socket_that_the_next_one_replaces() -> Result<()> {
    let setup = Setup::new()?;
    let guest = setup.serving()?;
    guest.signal(harness::Signal::KILL)?;
    guest.wait()?;
    ensure!(setup.socket_exists()?, "nobody could remove it");
    let guest = setup.serving()?;
    setup.run("echo $G 1")?;
    end(guest)?;
    ensure!(!setup.socket_exists()?, "it is gone afterwards");
    Ok(())
}
