//! How the command ends: the statuses that scripts can rely on.

use std::process::ExitCode;

/// The paragraph of `--help` and of the man pages.
pub const HELP: &str = "\
Exit status:
  0      the guest rebooted, powered off or triple faulted, or was stopped with Ctrl-A x
  1      the machine could not be started, or could not go on, or was killed, or ended before COMMAND did
  2      wrong flags, or a configuration that is not possible
  3      the guest's kernel panicked
  128+N  ended by signal N; 141 (128 + SIGPIPE) when nobody reads standard output any more
  With `-- COMMAND`, a guest that ends by itself has the exit status of COMMAND.";

/// The same for the other commands.
pub const COMMANDS_HELP: &str = "\
Exit status, but for run, which has its own:
  0      done
  1      it could not be done, for one machine at least: there is none of this name, it has ended, it does not answer
  2      wrong flags
  141    nobody reads standard output any more (128 + SIGPIPE)
  wait ends with the status that run would have had, or with 1 for a machine that was killed.";

/// How the command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// All went well.
    Success,
    /// Something could not be done.
    Failure,
    /// It was not asked for something that can be done.
    Usage,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The command that `vmm run -- COMMAND` was given has ended with this status.
    Command(u8),
    /// A signal with this number ended it.
    Signal(u8),
}

impl ExitStatus {
    /// Nobody reads standard output any more.
    pub const SIGPIPE: Self = Self::Signal(13);

    /// The number that the parent process gets.
    pub fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::Usage => 2,
            Self::GuestPanic => 3,
            Self::Command(status) => status,
            Self::Signal(number) => 128 | number,
        }
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status.code())
    }
}

/// A mistake of whoever typed the command: a sentence that says what to do instead.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);
