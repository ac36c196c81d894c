//! A file system of a test's own: with little room, or whose files share blocks.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use crate::process::{Process, Program};
use crate::{command, packages};

/// A file system of its own, which nobody else sees; gone with this.
pub struct SmallHost {
    _holder: Process,
    root: PathBuf,
    _image: Option<NamedTempFile>,
}

impl SmallHost {
    /// In memory. `options`: of mount, such as `size=8m` or `nr_inodes=10`.
    pub fn new(options: &str) -> Result<Self> {
        let alone = if rustix::process::geteuid().is_root() { "unshare -m" } else { "unshare -r -m" };
        Self::mounted(alone, &format!("-t tmpfs -o {options} none"))
    }

    /// A file system (XFS) of 400 MiB whose files can share blocks. `None` where there can be none: for others than root, and
    /// without loop devices or xfsprogs, which is said.
    pub fn sharing_blocks() -> Result<Option<Self>> {
        let image = NamedTempFile::new()?;
        image.as_file().set_len(400 << 20)?;
        let made = packages::find_program("mkfs.xfs").and_then(|mkfs| {
            command::run(Command::new(mkfs).args(["-q", "-m", "reflink=1"]).arg(image.path()))?;
            Self::mounted("unshare -m", &format!("-o loop {}", image.path().display()))
        });
        match made {
            Ok(host) => Ok(Some(Self { _image: Some(image), ..host })),
            Err(error) => {
                eprintln!("left out what needs a file system that shares blocks: {error:#}");
                Ok(None)
            }
        }
    }

    fn mounted(alone: &str, what: &str) -> Result<Self> {
        let set_up = format!("mount {what} /mnt && echo ready $$ && exec sleep 100000");
        let line = format!("exec {alone} sh -c '{set_up}'");
        let mut holder = Process::start_local(&Program::shell(&line))?;
        let deadline = Duration::from_secs(20);
        holder.expect("ready ", deadline).context("mount a file system in a namespace of its own")?;
        let root = format!("/proc/{}/root/mnt", holder.expect("\n", deadline)?).into();
        Ok(Self { _holder: holder, root, _image: None })
    }

    /// The path of a file on it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}
