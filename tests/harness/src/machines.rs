//! Machines with a name, as their commands know them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::{NetNs, local_kvm, micro::Micro};

/// In the environment of all processes of a test: its directory.
const MARK: &str = "VMM_TEST_MACHINES";

/// A state directory and kernels, which go with all machines that still run.
pub struct Machines {
    vmm: PathBuf,
    dir: TempDir,
    state: PathBuf,
    /// What stands before each command.
    enter: Vec<String>,
}

impl Machines {
    /// None yet; `vmm` is the program. Where no guest can run, this panics: a run of all tests leaves the tests that use it
    /// out then, and says so.
    pub fn new(vmm: &str) -> Result<Self> {
        assert!(local_kvm().is_some(), "this needs a /dev/kvm on this machine");
        let dir = tempfile::tempdir()?;
        // hlt for ever
        Micro::new().print("up\n").raw(&[0xf4, 0xeb, 0xfd]).write(&dir.path().join("idle"))?;
        Micro::new().print("up\n").reset().write(&dir.path().join("short"))?;
        std::fs::create_dir(dir.path().join("tmp"))?;
        let state = dir.path().join("state");
        Ok(Self { vmm: vmm.into(), dir, state, enter: Vec::new() })
    }

    /// With their processes within this namespace, which is on this machine.
    pub fn within(mut self, net: &NetNs) -> Self {
        self.enter = net.enter().to_vec();
        self
    }

    /// With their state at this place.
    pub fn state_at(mut self, state: PathBuf) -> Self {
        self.state = state;
        self
    }

    /// Where their state is.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The working directory of commands.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// `vmm` with these words, in which `IDLE` and `SHORT` stand for machines.
    pub fn command(&self, words: &str) -> Command {
        let words = words.replace("IDLE", "-q --no-rootfs --memory 16M --kernel idle");
        let words = words.replace("SHORT", "-q --no-rootfs --memory 16M --kernel short");
        let (subcommand, rest) = words.split_once(' ').unwrap_or((&words, ""));
        let mut command = match self.enter.split_first() {
            Some((enter, rest)) => {
                let mut command = Command::new(enter);
                command.args(rest).arg(&self.vmm);
                command
            }
            None => Command::new(&self.vmm),
        };
        command.arg(subcommand).arg("--state-dir").arg(&self.state).args(rest.split_whitespace());
        command.env("TMPDIR", self.dir().join("tmp")).env(MARK, self.dir()).current_dir(self.dir());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts a command.
    pub fn start(&self, words: &str) -> Result<Child> {
        Ok(self.command(words).spawn()?)
    }

    /// Runs a command to its end.
    pub fn output(&self, words: &str) -> Result<Output> {
        Ok(self.command(words).output()?)
    }

    /// What a command prints that has to succeed.
    pub fn ok(&self, words: &str) -> Result<String> {
        let output = self.output(words)?;
        ensure!(output.status.success(), "vmm {words}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    }

    /// As [`Self::ok`], with a guest that runs a line of shell.
    pub fn shell(&self, words: &str, line: &str) -> Result<()> {
        let output = self.command(words).args(["--", "sh", "-c", line]).output()?;
        ensure!(output.status.success(), "vmm {words}: {output:?}");
        Ok(())
    }

    /// As [`Self::shell`], on our root file system, which all of them can only read.
    pub fn shell_read_only(&self, words: &str, line: &str) -> Result<()> {
        self.shell(&format!("{words} --rootfs {},ro", crate::demo_image()?.display()), line)
    }

    /// Removes all machines, and those that are still on their way.
    pub fn rm_all(&self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(60);
        while !(self.ps()?.is_empty() && self.processes()?.is_empty()) {
            ensure!(Instant::now() < end, "{:?} {:?}", self.ps()?, self.processes()?);
            self.try_rm_all();
        }
        Ok(())
    }

    /// Removes those that there are now, as far as they can be.
    fn try_rm_all(&self) {
        for row in self.ps().unwrap_or_default() {
            _ = self.output(&format!("rm --force {}", row["name"].as_str().unwrap_or_default()));
        }
    }

    /// What a command says that has to fail with this status.
    pub fn refused(&self, words: &str, status: i32) -> Result<String> {
        let output = self.output(words)?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(status), "vmm {words}: {:?}, {said}", output.status);
        ensure!(said.lines().count() == 1, "vmm {words}: {said}");
        Ok(said)
    }

    /// The lines of `vmm ps`.
    pub fn ps(&self) -> Result<Vec<Value>> {
        Ok(serde_json::from_str(&self.ok("ps --format json")?)?)
    }

    /// The process of a machine that lives.
    pub fn pid(&self, name: &str) -> Result<Pid> {
        let all = self.ps()?;
        let row = all.iter().find(|row| row["name"] == name).context("it is listed")?;
        let pid = row["pid"].as_i64().and_then(|pid| Pid::from_raw(pid as i32));
        pid.with_context(|| format!("it lives: {row}"))
    }

    /// Waits until the log has `text`.
    pub fn expect_log(&self, name: &str, text: &str) -> Result<()> {
        while !self.ok(&format!("logs {name}"))?.contains(text) {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// All processes that commands have started and that have not ended.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let mark = format!("{MARK}={}\0", self.dir().display());
        let numbers = std::fs::read_dir("/proc")?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
        let ours = |number: &i32| {
            let environment = std::fs::read(format!("/proc/{number}/environ")).unwrap_or_default();
            environment.windows(mark.len()).any(|window| window == mark.as_bytes())
        };
        Ok(numbers.filter(ours).collect())
    }

    /// All processes have ended, or do so now: a machine has ended some moments before its process.
    pub fn expect_no_process(&self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            match self.processes()? {
                none if none.is_empty() => return Ok(()),
                left => ensure!(Instant::now() < end, "processes are left: {left:?}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Nothing is there any more: no process, no machine, no file.
    pub fn expect_nothing_left(&self) -> Result<()> {
        let names = |path: &Path| -> Result<Vec<_>> {
            let all = std::fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.file_name()));
            let mut names = all.collect::<Result<Vec<_>, _>>()?;
            names.sort();
            Ok(names)
        };
        self.expect_no_process()?;
        ensure!(names(self.state())? == [".lock"], "{:?}", names(self.state())?);
        let tmp = names(&self.dir().join("tmp"))?;
        ensure!(tmp.is_empty(), "{tmp:?}");
        let here: Vec<_> = names(self.dir())?.into_iter().filter(|name| name != "state").collect();
        ensure!(here == ["idle", "short", "tmp"], "{here:?}");
        Ok(())
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        self.try_rm_all();
    }
}
