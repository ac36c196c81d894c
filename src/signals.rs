//! Signals as something to wait for, on a thread of its own: no handler runs anywhere.
#![allow(unsafe_code, reason = "signal masks are only reachable through libc")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};

/// Signals that end the command, and those that stop it and let it go on.
const AWAITED: [libc::c_int; 6] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGTSTP, libc::SIGCONT];
/// Those that end it.
const ENDS: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];
/// A background process that reads or configures the terminal gets these and stops. With them blocked, reading
/// fails instead and configuring succeeds: a guest goes on in the background.
const TERMINAL: [libc::c_int; 2] = [libc::SIGTTIN, libc::SIGTTOU];
/// Whoever writes more to a file than `ulimit -f` allows gets this and dies. With it blocked, the write fails like
/// one to a full disk.
const FILE_LIMIT: libc::c_int = libc::SIGXFSZ;

/// The signals that are blocked and waited for.
pub struct Signals {
    awaited: libc::sigset_t,
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// To end, because of the signal with this number.
    End(u8),
    /// To give the terminal back and stop, until [`Request::Continue`].
    Stop,
    /// To take the terminal again.
    Continue,
}

impl Signals {
    /// Blocks the signals in this thread and all that it starts from now on. Those that the parent has set to be
    /// ignored (nohup does that) stay ignored.
    pub fn block() -> Self {
        let awaited = set(AWAITED.into_iter().filter(|signal| !ignored(*signal)));
        change_mask(libc::SIG_BLOCK, &awaited);
        change_mask(libc::SIG_BLOCK, &set(TERMINAL.into_iter().chain([FILE_LIMIT])));
        Self { awaited }
    }

    /// Waits for the next request.
    pub fn wait(&self) -> io::Result<Request> {
        let mut signal = 0;
        // SAFETY: both pointers are to live values.
        match unsafe { libc::sigwait(&self.awaited, &mut signal) } {
            0 => Ok(match signal {
                libc::SIGTSTP => Request::Stop,
                libc::SIGCONT => Request::Continue,
                signal => Request::End(signal as u8),
            }),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Stops this process as SIGTSTP does when nobody waits for it; returns when it goes on.
    pub fn stop_process(&self) {
        act_as_default(libc::SIGTSTP);
    }

    /// Ends this process as the signal with this number does when nobody waits for it.
    pub fn die(&self, number: u8) {
        act_as_default(number.into());
    }
}

fn act_as_default(signal: libc::c_int) {
    let one = set([signal].into_iter());
    // SAFETY: a plain call. The signal is blocked, so it is pending until the next line.
    unsafe { libc::raise(signal) };
    change_mask(libc::SIG_UNBLOCK, &one);
    change_mask(libc::SIG_BLOCK, &one);
}

/// Signals that end a command which has something to clean up, for a process without a thread to wait for them.
#[derive(Debug)]
pub struct Ends(OwnedFd);

/// The signal with this number has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cut short by signal {0}")]
pub struct Cut(u8);

impl Cut {
    /// Ends this process as the signal does when nobody waits for it.
    pub fn die(self) {
        act_as_default(self.0.into());
    }
}

impl Ends {
    /// Blocks them in this thread and all that it starts from now on, but for those that are ignored.
    fn block() -> io::Result<Self> {
        let ends = set(ENDS.into_iter().filter(|signal| !ignored(*signal)));
        change_mask(libc::SIG_BLOCK, &ends);
        // SAFETY: the set is valid, and a new descriptor is asked for.
        match unsafe { libc::signalfd(-1, &ends, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) } {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: it was just made, and is nobody else's.
            fd => Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) })),
        }
    }

    /// Does `work`, which looks at them. If it is [`Cut`] short by one, this process ends as by that, once what it had begun
    /// has ended.
    pub fn until_cut<T>(work: impl FnOnce(&Self) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let signals = Self::block()?;
        let result = work(&signals);
        if let Some(&cut) = result.as_ref().err().and_then(|error| error.downcast_ref::<Cut>()) {
            cut.die();
        }
        result
    }

    /// Fails if one has come.
    pub fn look(&self) -> Result<(), Cut> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.0, &mut info) {
            // The number is a word in front, and small.
            Ok(_) => Err(Cut(info[0])),
            Err(_) => Ok(()),
        }
    }

    /// Waits until `fd` has something to read, or has ended; fails if a signal comes before.
    pub fn wait_for(&self, fd: impl AsFd) -> Result<(), Cut> {
        loop {
            let mut fds = [PollFd::new(&fd, PollFlags::IN), PollFd::new(&self.0, PollFlags::IN)];
            _ = poll(&mut fds, None);
            let ready = !fds[0].revents().is_empty();
            self.look()?;
            if ready {
                return Ok(());
            }
        }
    }
}

fn set(signals: impl Iterator<Item = libc::c_int>) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset makes a valid set of it, and sigaddset fails on numbers that are no signals.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

fn change_mask(how: libc::c_int, set: &libc::sigset_t) {
    // SAFETY: `set` is valid, and the old mask is not asked for. It fails only when `how` is none.
    unsafe { libc::pthread_sigmask(how, set, std::ptr::null_mut()) };
}

fn ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: only asks; zeroes are a valid `sigaction`, which is what remains if the call fails.
    let action = unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}
