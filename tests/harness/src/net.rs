//! A network namespace of a test's own, with a tap for a guest.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::place::Place;
use crate::process::{Process, Program};

/// Address of the tap's end.
pub const HOST_ADDRESS: &str = "10.77.0.1";
/// Address that a guest on the tap is given.
pub const GUEST_ADDRESS: &str = "10.77.0.2";
/// The tap's name within the namespace.
pub const TAP: &str = "tap0";

/// A network namespace with a tap in it. It needs no root: then it comes with a user namespace. It is gone, with all that is in
/// it, when this is dropped: a process holds it, and nothing else.
pub struct NetNs {
    place: Place,
    enter: Vec<String>,
    _holder: Process,
}

impl NetNs {
    /// Makes a namespace at `place`.
    pub fn new(place: &Place) -> Result<Self> {
        Self::with_queues(place, false)
    }

    /// Makes one whose tap has several queues if it is so.
    pub fn with_queues(place: &Place, several: bool) -> Result<Self> {
        let rootless = matches!(place, Place::LocalHardware | Place::LocalRing3)
            && !rustix::process::geteuid().is_root();
        let unshare = if rootless { "unshare -r -n" } else { "unshare -n" };
        let queues = if several { " multi_queue" } else { "" };
        let set_up = format!(
            "ip link set lo up && ip tuntap add dev {TAP} mode tap{queues} && ip addr add {HOST_ADDRESS}/24 dev {TAP} && \
             ip link set {TAP} up && echo ready $$ && exec sleep 100000"
        );
        let mut holder = place
            .start(&Program::shell(&format!("PATH=$PATH:/sbin:/usr/sbin exec {unshare} sh -c '{set_up}'")))?;
        let deadline = Duration::from_secs(20) * place.slowness();
        holder.expect("ready ", deadline).context("make a network namespace with a tap")?;
        let pid = holder.expect("\n", deadline)?;
        let mut enter = vec!["nsenter".to_owned(), "-t".to_owned(), pid, "-n".to_owned()];
        if rootless {
            enter.extend(["-U".to_owned(), "--preserve-credentials".to_owned()]);
        }
        Ok(Self { place: place.clone(), enter, _holder: holder })
    }

    /// Where it is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The same program, but within the namespace.
    pub fn within(&self, program: &Program) -> Program {
        let argv = self.enter.iter().chain(&program.argv).cloned().collect();
        Program { argv, ..program.clone() }
    }

    /// What stands before a program to run it within the namespace.
    pub(crate) fn enter(&self) -> &[String] {
        &self.enter
    }

    /// Starts a line of shell within the namespace.
    pub fn start(&self, line: &str) -> Result<Process> {
        self.place.start(&self.within(&Program::shell(line)))
    }

    /// Runs a line of shell within the namespace, and returns what it printed; it has to end with status 0.
    pub fn shell(&self, line: &str) -> Result<String> {
        self.start(line)?.wait(Duration::from_secs(60) * self.place.slowness())?.ok()
    }
}
