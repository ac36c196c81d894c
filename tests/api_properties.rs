//! The control API under requests that nobody thought of: generated from its own description, valid and broken ones. No
//! answer may be missing, fail, or be another than described; and broken requests have to be refused.
//! On this machine's /dev/kvm.

use std::io;
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Result, ensure};
use harness::micro::Micro;
use harness::{Api, local_kvm, schemathesis};
use tempfile::TempDir;

/// An API whose program can write to its own directory only: it is given paths that nobody has chosen.
struct Service {
    dir: TempDir,
    program: Child,
}

impl Service {
    fn start(arguments: &str) -> Result<Self> {
        assert!(local_kvm().is_some(), "this needs a /dev/kvm on this machine");
        let dir = tempfile::tempdir()?;
        // hlt for ever
        Micro::new().raw(&[0xf4, 0xeb, 0xfd]).write(&dir.path().join("kernel"))?;
        std::fs::write(dir.path().join("disk"), [7; 4096])?;
        let confined = "mount --bind . . && mount -o remount,bind,ro / && cd \"$PWD\" && exec \"$0\" \"$@\"";
        let mut command = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            command.arg("-r");
        }
        command.args(["-m", "sh", "-c", confined, env!("CARGO_BIN_EXE_vmm")]);
        command.args(arguments.split_whitespace()).args(["--api-sock", "api.sock"]);
        command.current_dir(dir.path()).stdin(Stdio::null()).stdout(Stdio::null());
        let said = std::fs::File::create(dir.path().join("stderr"))?;
        let program = command.stderr(said).process_group(0).spawn()?;
        Ok(Self { dir, program })
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    /// Throws requests at it, but none at these paths.
    fn bombard(&mut self, but: &[&str]) -> Result<()> {
        let api = Api::when_ready(&self.socket())?;
        let mut client = schemathesis::command()?;
        client.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json"));
        client.arg("--url").arg(over_tcp(self.socket())?);
        client.args(["--max-examples", "20", "--max-time", "20", "--request-timeout", "10"]);
        // Firecracker refuses methods with 400; and what is valid by itself may not fit the machine.
        client.args(["--exclude-checks", "unsupported_method,positive_data_acceptance"]);
        client.args(but.iter().flat_map(|path| ["--exclude-path", path]));
        let report = client.current_dir(self.dir.path()).output()?;
        let shown = String::from_utf8_lossy(&report.stdout);
        println!("{shown}");
        ensure!(report.status.success(), "{shown}\n{}", String::from_utf8_lossy(&report.stderr));
        ensure!(shown.contains("Seed: "), "it names its seed, by which it can be repeated: {shown}");
        ensure!(self.program.try_wait()?.is_none(), "the program has ended");
        ensure!(api.get("/")?.status == 200, "it does not answer any more");
        let said = std::fs::read_to_string(self.dir.path().join("stderr"))?;
        ensure!(!said.contains("panicked"), "{said}");
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        _ = self.program.kill();
        _ = self.program.wait();
    }
}

/// The API behind this socket at a URL: a client of its own on each connection.
fn over_tcp(socket: PathBuf) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", listener.local_addr()?);
    thread::spawn(move || -> io::Result<()> {
        loop {
            let (from, to) = (listener.accept()?.0, UnixStream::connect(&socket)?);
            let (mut back, mut forth) = (to.try_clone()?, from.try_clone()?);
            thread::spawn(move || (io::copy(&mut &from, &mut &to), to.shutdown(Shutdown::Write)));
            thread::spawn(move || (io::copy(&mut back, &mut forth), forth.shutdown(Shutdown::Both)));
        }
    });
    Ok(url)
}

#[test]
fn a_machine_in_the_making_answers_as_described() -> Result<()> {
    // The answer of its events begins before the start, and does not end before the machine.
    Service::start("api --id web")?.bombard(&["/vmm/v1/events"])
}

#[test]
fn a_machine_that_runs_answers_as_described() -> Result<()> {
    let devices = "--disk disk --balloon size=0M --rng --vsock v.sock";
    // It goes on for ever, as the answer of its events does, until it is stopped.
    Service::start(&format!("run -q --no-rootfs --kernel kernel --memory 16M {devices}"))?
        .bombard(&["/vmm/v1/events", "/vmm/v1/stop"])
}
