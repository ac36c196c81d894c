//! Processes that are forked from this one, each to run a clone.
#![allow(unsafe_code, reason = "a process is forked, and goes on in this program")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, setsid, waitpid};
use rustix::stdio::{dup2_stdin, dup2_stdout, stdout};

use super::super::{detach, sentence};
use crate::exit::ExitStatus;
use crate::machines::{Machine, Registered, StateDir};
use crate::signals::{Cut, Ends};

/// How long a clone that was begun may take to be gone.
const GRACE: Duration = Duration::from_secs(5);

/// Clones that were begun. What does not run when this is dropped, nor has failed by itself, is ended and removed.
pub struct Children {
    state: StateDir,
    begun: Vec<Child>,
    /// The process that began them. They have this value too, and nothing to do with it.
    parent: u32,
}

struct Child {
    machine: Machine,
    pid: Pid,
    /// What it says once it runs, or when it does not; then its end.
    answer: File,
}

/// What became of the clones that were begun.
#[derive(Default)]
pub struct Answers {
    /// Names of those that run.
    pub running: Vec<String>,
    /// Names of the others, with the reason.
    pub failed: Vec<(String, String)>,
}

impl Children {
    /// None yet.
    pub fn of(state: StateDir) -> Self {
        Self { state, begun: Vec::new(), parent: std::process::id() }
    }

    /// Starts a process for the machine, which does `work`, and ends with what comes of it.
    pub fn start(
        &mut self,
        registered: Registered,
        work: impl FnOnce(Registered, Instant) -> anyhow::Result<ExitStatus>,
    ) -> anyhow::Result<()> {
        let (answer, own_end) = pipe_with(PipeFlags::CLOEXEC)?;
        // SAFETY: this process has one thread, so that the new one finds every lock free and all memory whole.
        let pid = match unsafe { libc::fork() } {
            -1 => return Err(io::Error::last_os_error()).context("cannot start a process for a clone"),
            0 => {
                drop((answer, std::mem::take(&mut self.begun)));
                be_child(registered, own_end, work)
            }
            pid => pid,
        };
        let machine = registered.machine().clone();
        registered.leave_to_child();
        let pid = Pid::from_raw(pid).context("a process without a number")?;
        self.begun.push(Child { machine, pid, answer: answer.into() });
        Ok(())
    }

    /// Waits until each of them runs or has failed.
    pub fn wait(mut self, signals: &Ends) -> Result<Answers, Cut> {
        let Answers { mut running, mut failed } = Answers::default();
        let mut next = 0;
        while let Some(child) = self.begun.get_mut(next) {
            signals.wait_for(&child.answer)?;
            let mut said = Vec::new();
            // Its end without a word is an answer too.
            _ = child.answer.read_to_end(&mut said);
            let name = child.machine.name.clone();
            if said == detach::READY {
                running.push(name);
                next += 1;
                continue;
            }
            let status = waitpid(Some(child.pid), WaitOptions::empty());
            let why = match (said.is_empty(), status) {
                (true, Ok(Some((_, status)))) => format!("its process ended without a word ({status:?})"),
                _ => String::from_utf8_lossy(&said).into_owned(),
            };
            failed.push((name, why));
            // Its number may be another process's by now.
            let child = self.begun.remove(next);
            // It has done so itself, unless it was killed.
            _ = self.state.remove(&child.machine);
        }
        self.begun.clear();
        Ok(Answers { running, failed })
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        if std::process::id() != self.parent {
            return;
        }
        for child in &self.begun {
            // In the middle of building a machine, a signal would leave its sockets.
            _ = poll(&mut [PollFd::new(&child.answer, PollFlags::IN)], GRACE.try_into().ok().as_ref());
            // It fails only for one that has ended.
            _ = kill_process(child.pid, Signal::TERM);
        }
        for child in &self.begun {
            if child.machine.watch().is_ok_and(|watch| !watch.wait(Some(GRACE))) {
                _ = kill_process(child.pid, Signal::KILL);
            }
            _ = waitpid(Some(child.pid), WaitOptions::empty());
            _ = self.state.remove(&child.machine);
        }
    }
}

/// What the new process does: it is a machine in the background to everybody.
#[expect(clippy::exit, reason = "it must not return into what its parent does")]
fn be_child(
    registered: Registered,
    answer: OwnedFd,
    work: impl FnOnce(Registered, Instant) -> anyhow::Result<ExitStatus>,
) -> ! {
    let start = Instant::now();
    let run = || {
        // What is typed on the terminal is for its parent.
        _ = setsid();
        dup2_stdin(open("/dev/null", OFlags::RDWR, Mode::empty())?)?;
        dup2_stdout(&answer)?;
        drop(answer);
        registered.become_ours()?;
        work(registered, start)
    };
    let status = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => {
            // Once it runs, nobody reads that.
            _ = rustix::io::write(stdout(), sentence(&error).as_bytes());
            ExitStatus::Failure
        }
        // It has been told.
        Err(_) => ExitStatus::Failure,
    };
    std::process::exit(status.code().into())
}
