//! A machine in the background: this command starts itself again, and returns when the guest runs.

use std::ffi::OsString;
use std::io::Read;
use std::process::{Command, Stdio};

use anyhow::Context;
use rustix::fs::{Mode, OFlags, open};
use rustix::stdio::{dup2_stderr, dup2_stdout};

use crate::exit::ExitStatus;

/// What the process in the background writes to its standard output when the guest runs.
pub const READY: &[u8] = b"ready";

/// Starts the machine of this command line in the background and prints its name. What goes wrong until the guest runs
/// is told by that process, on the standard error that both have.
pub fn start(name: Option<String>) -> anyhow::Result<ExitStatus> {
    let (name, given) = match name {
        Some(name) => (name, true),
        None => (format!("vm-{}", std::process::id()), false),
    };
    let mut arguments = std::env::args_os().skip(1);
    let mut first: Vec<OsString> = arguments.by_ref().take(1).collect();
    first.push("--in-background".into());
    if !given {
        first.extend(["--name".into(), OsString::from(&name)]);
    }
    first.extend(arguments);
    let mut command = Command::new("/proc/self/exe");
    command.args(first).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot start the process in the background")?;
    let mut said = Vec::new();
    if let Some(stdout) = &mut child.stdout {
        // Its end without a word is an answer too.
        _ = stdout.read_to_end(&mut said);
    }
    if said == READY {
        return super::print(format!("{name}\n").as_bytes());
    }
    let status = child.wait()?.code().and_then(|code| u8::try_from(code).ok());
    Ok(status.map_or(ExitStatus::Failure, ExitStatus::Command))
}

/// Leaves the terminal, and tells the process in the foreground that the guest runs.
pub fn ready() -> anyhow::Result<()> {
    // It leads a process group already if it was started so; then it has no terminal to lose.
    _ = rustix::process::setsid();
    _ = rustix::io::write(rustix::stdio::stdout(), READY);
    let null = open("/dev/null", OFlags::RDWR, Mode::empty())?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    Ok(())
}
