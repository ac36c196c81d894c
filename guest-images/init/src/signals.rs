//! Everything that process 1 waits for arrives as a blocked signal: one place to wait, no handlers.

use core::time::Duration;

use rustix_core::io::Errno;
use rustix_core::process::{Pid, WaitOptions, WaitStatus, wait};

use crate::machine::PowerAction;
use crate::sys;

const SIGINT: usize = 2;
const SIGKILL: usize = 9;
const SIGUSR1: usize = 10;
const SIGUSR2: usize = 12;
const SIGTERM: usize = 15;
const SIGCHLD: usize = 17;
/// SIGRTMIN+4: how the kernel's power-button driver and systemd's tools say "power off".
const POWER_BUTTON: usize = 38;

/// How `reboot`, `halt` and `poweroff` (BusyBox's signals) and Ctrl-Alt-Del reach process 1.
const SHUTDOWNS: [(usize, PowerAction); 4] = [
    (SIGTERM, PowerAction::Restart),
    (SIGINT, PowerAction::Restart),
    (SIGUSR1, PowerAction::Off),
    (SIGUSR2, PowerAction::Off),
];

/// How long processes may take to end after SIGTERM before SIGKILL.
const GRACE: Duration = Duration::from_secs(3);

/// What made process 1 wake up.
pub enum Event {
    /// At least one child ended.
    ChildrenChanged,
    /// Somebody wants the machine stopped.
    Shutdown(PowerAction),
    /// The power button, or the VMM that has a note for a clone.
    PowerButton,
    /// Nothing, for as long as was waited.
    Nothing,
}

/// The set of signals that process 1 takes, blocked.
#[derive(Clone, Copy)]
pub struct Signals {
    set: u64,
}

impl Signals {
    /// Blocks the set in the calling process.
    pub fn block() -> Self {
        let others = bit(SIGCHLD) | bit(POWER_BUTTON);
        let set = SHUTDOWNS.iter().fold(others, |set, (signal, _)| set | bit(*signal));
        sys::block_signals(set);
        Self { set }
    }

    /// Unblocks the set, for a child that is about to become another program.
    pub fn unblock(self) {
        sys::unblock_signals(self.set);
    }

    /// Waits for the next event, at most for `timeout`.
    pub fn next(self, timeout: Option<Duration>) -> Event {
        loop {
            let signal = match sys::wait_for_signal(self.set, timeout) {
                Ok(SIGCHLD) => return Event::ChildrenChanged,
                Ok(POWER_BUTTON) => return Event::PowerButton,
                Ok(signal) => signal,
                Err(Errno::AGAIN) => return Event::Nothing,
                Err(_) => continue,
            };
            if let Some((_, action)) = SHUTDOWNS.iter().find(|(number, _)| *number == signal) {
                return Event::Shutdown(*action);
            }
        }
    }

    /// Ends every other process: politely, and after a grace period for good. Returns at once when there is none.
    pub fn stop_processes(self) {
        if !sys::signal_everyone(SIGTERM) {
            return;
        }
        while children_remain() {
            // Every end of a child starts the grace period anew, which the number of children bounds.
            if sys::wait_for_signal(bit(SIGCHLD), Some(GRACE)).is_err() {
                sys::signal_everyone(SIGKILL);
                while wait(WaitOptions::empty()).is_ok() {}
            }
        }
    }
}

const fn bit(signal: usize) -> u64 {
    1 << (signal - 1)
}

/// Collects children that ended; true while others still run.
fn children_remain() -> bool {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

/// Collects one child that has ended, with its exit status as a shell counts it (128 + signal when killed).
pub fn reap() -> Option<(Pid, u8)> {
    wait(WaitOptions::NOHANG).ok().flatten().map(|(pid, status)| (pid, shell_status(status)))
}

fn shell_status(status: WaitStatus) -> u8 {
    let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}
