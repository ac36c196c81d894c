//! A file system with little room.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::{Process, Program};

/// A file system of its own in memory, which nobody else sees; gone with this.
pub struct SmallHost {
    _holder: Process,
    root: PathBuf,
}

impl SmallHost {
    /// `options`: of mount, such as `size=8m` or `nr_inodes=10`.
    pub fn new(options: &str) -> Result<Self> {
        let alone = if rustix::process::geteuid().is_root() { "unshare -m" } else { "unshare -r -m" };
        let set_up = format!("mount -t tmpfs -o {options} none /mnt && echo ready $$ && exec sleep 100000");
        let line = format!("exec {alone} sh -c '{set_up}'");
        let mut holder = Process::start_local(&Program::shell(&line))?;
        let deadline = Duration::from_secs(20);
        holder.expect("ready ", deadline).context("mount a small tmpfs in a namespace of its own")?;
        let root = format!("/proc/{}/root/mnt", holder.expect("\n", deadline)?).into();
        Ok(Self { _holder: holder, root })
    }

    /// The path of a file on it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}
