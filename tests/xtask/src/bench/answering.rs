//! A machine with a name whose guest answers on a port of its vsock, snapshots of it, and machines that come of those.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::{Api, Kernel, binaries, command, local_kvm, tools_image};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Advice, fadvise};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Port of the program in the guest.
const PORT: u32 = 5000;
/// Only there to end a hang.
const DEADLINE: Duration = Duration::from_secs(60);
/// Its name.
pub const NAME: &str = "parent";

/// Sizes of guests in MiB, and how much of that they have filled with what cannot be left out of a snapshot.
pub const SIZES: [(u32, u32); 2] = [(128, 32), (1024, 256)];

/// The machine, with a state directory of its own, which goes with it.
pub struct Parent {
    vmm: PathBuf,
    dir: TempDir,
}

impl Parent {
    /// Boots it, and waits until its program answers and its memory is filled.
    pub fn boot(memory: u32, filled: u32, more: &str) -> Result<Self> {
        let (kernel, root) = kernel_and_root()?;
        let parent = Self { vmm: binaries::release()?, dir: tempfile::tempdir()? };
        let vsock = parent.path("v");
        let mut run = parent.command(&format!(
            "run --detach --name {NAME} -q --memory {memory}M --kernel {kernel} --rootfs {root},ro --no-balloon --vsock {} {more} -- sh -c",
            vsock.display()
        ));
        command::run(run.arg(format!("{}; stream-peer serve vsock:{PORT}", fill(filled))))?;
        answered(&vsock)?;
        Ok(parent)
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `vmm` with these words, for the machines of this directory.
    pub fn command(&self, words: &str) -> Command {
        let (subcommand, rest) = words.split_once(' ').unwrap_or((words, ""));
        let mut command = Command::new(&self.vmm);
        command.arg(subcommand).arg("--state-dir").arg(self.path("state")).args(rest.split_whitespace());
        command
    }

    /// Saves the machine to `to`; returns milliseconds for which it stood still, and those that all of it took.
    pub fn save(&self, to: &Path, kind: &str) -> Result<[f64; 2]> {
        let began = Instant::now();
        let body = json!({ "path": to, "kind": kind }).to_string();
        let answer =
            Api::at(&self.path(&format!("state/{NAME}/api.sock"))).send("PUT", "/vmm/v1/snapshot", &body)?;
        ensure!(answer.status == 200, "{answer:?}");
        let paused = answer.json()?["paused_micros"].as_f64().context("paused_micros")?;
        Ok([paused / 1e3, millis(began)])
    }

    /// Process numbers of all machines but this one.
    pub fn clones(&self) -> Result<Vec<u32>> {
        let rows: Vec<Value> =
            serde_json::from_str(&command::output(&mut self.command("ps --format json"))?)?;
        let clones = rows.iter().filter(|row| row["name"] != NAME);
        Ok(clones.filter_map(|row| row["pid"].as_u64()).map(|pid| pid as u32).collect())
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        _ = self.command(&format!("stop --time 0 {NAME}")).output();
    }
}

/// Our kernel for this machine, and the root file system with the tools.
pub fn kernel_and_root() -> Result<(String, String)> {
    let acceleration = local_kvm().context("there is no /dev/kvm here that we may use")?;
    let kernel = Kernel::ours(acceleration).file()?.display().to_string();
    Ok((kernel, tools_image()?.display().to_string()))
}

/// A line of shell that fills so many MiB of a guest.
pub fn fill(mib: u32) -> String {
    format!(
        "mount -t tmpfs -o size=90% none /tmp; dd if=/dev/urandom of=/tmp/filled bs=1M count={mib} 2>/dev/null"
    )
}

/// Waits until the guest's program behind this socket has answered once.
///
/// Who calls while the guest is told that its connections are gone may be cut off, and is not told. So others call after
/// a while, and the first answer counts.
pub fn answered(vsock: &Path) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    let mut patience = Duration::from_millis(4);
    let mut callers = Vec::new();
    loop {
        match Caller::call(vsock) {
            Ok(caller) => callers.push(caller),
            // It is not there yet.
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
        let next = Instant::now() + if callers.is_empty() { Duration::ZERO } else { patience };
        while let Some(left) = next.checked_duration_since(Instant::now()) {
            let mut fds: Vec<_> = callers.iter().map(|it| PollFd::new(&it.stream, PollFlags::IN)).collect();
            poll(&mut fds, Some(&left.try_into()?))?;
            for caller in &mut callers {
                if caller.look()? {
                    return Ok(());
                }
            }
            callers.retain(|caller| !caller.ended);
        }
        if !callers.is_empty() {
            patience *= 2;
        }
        ensure!(Instant::now() < end, "nobody answers at {}", vsock.display());
    }
}

/// Somebody who wants one byte back from the program in the guest.
struct Caller {
    stream: UnixStream,
    heard: Vec<u8>,
    ended: bool,
}

impl Caller {
    fn call(vsock: &Path) -> Result<Self> {
        let mut stream = UnixStream::connect(vsock)?;
        stream.write_all(format!("CONNECT {PORT}\ne!").as_bytes())?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, heard: Vec::new(), ended: false })
    }

    /// Whether it has been answered.
    fn look(&mut self) -> Result<bool> {
        let mut chunk = [0; 64];
        match self.stream.read(&mut chunk) {
            Ok(0) => self.ended = true,
            Ok(n) => self.heard.extend(&chunk[..n]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => self.ended = true,
        }
        Ok(self.heard.starts_with(b"OK ") && self.heard.ends_with(b"\n!"))
    }
}

/// Takes the files of a directory out of the page cache, as far as nobody maps them.
pub fn forget(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_file() {
            let file = File::open(path)?;
            file.sync_all()?;
            fadvise(&file, 0, None, Advice::DontNeed)?;
        }
    }
    Ok(())
}

/// MiB that the files of a directory take on the disk.
pub fn on_disk(dir: &Path) -> Result<f64> {
    let sizes = fs::read_dir(dir)?.map(|entry| Ok(entry?.metadata()?.blocks() * 512));
    Ok(sizes.sum::<Result<u64>>()? as f64 / f64::from(1 << 20))
}

/// Milliseconds since then.
pub fn millis(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1e3
}

/// Minor and major page faults of a process so far (proc(5), stat, fields 10 and 12).
pub fn faults(pid: u32) -> Result<[f64; 2]> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name before may have spaces.
    let (_, rest) = stat.rsplit_once(')').context("stat has a name")?;
    let field = |at: usize| rest.split_whitespace().nth(at).and_then(|text| text.parse().ok());
    Ok([field(7).context("minflt")?, field(9).context("majflt")?])
}
