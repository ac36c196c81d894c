//! The lab host's init and its agent. As process 1 it sets the host up, starts itself again as the agent, and from
//! then on only reaps what is orphaned; the agent serves requests until it has been idle for too long.

use std::process::Command;

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, wait};

mod exec;
mod files;
mod host;
mod serve;

fn main() {
    let result = match std::process::id() {
        1 => init(),
        _ => serve::serve(),
    };
    if let Err(error) = result {
        eprintln!("lab-agent: {error:#}");
    }
    host::power_off();
}

/// Process 1: set up, start the agent, reap until the agent ends.
fn init() -> Result<()> {
    host::set_up()?;
    let agent = Command::new("/init").env("PATH", "/bin:/sbin").spawn().context("start the agent")?;
    let agent = Pid::from_child(&agent);
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, _))) if pid == agent => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for processes"),
        }
    }
}
