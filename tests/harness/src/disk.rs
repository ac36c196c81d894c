//! Disk images of a test's own, checked from outside with e2fsprogs.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use lab_agent::sparse;
use tempfile::TempDir;

use crate::{command, packages};

/// A raw disk image in a temporary directory; a guest writes to it, and it is gone with this.
pub struct Disk {
    path: PathBuf,
    _dir: Option<TempDir>,
}

impl Disk {
    /// An empty disk of `size` bytes.
    pub fn blank(size: u64) -> Result<Self> {
        let disk = Self::nowhere()?;
        File::create(&disk.path)?.set_len(size)?;
        Ok(disk)
    }

    /// A disk of `size` bytes with an empty ext4 file system, of blocks that are pages, as on a large disk.
    pub fn ext4(size: u64) -> Result<Self> {
        let disk = Self::blank(size)?;
        let mkfs = packages::find_program("mkfs.ext4")?;
        command::run(Command::new(mkfs).args(["-q", "-F", "-b", "4096"]).arg(&disk.path))?;
        Ok(disk)
    }

    /// A copy of an image.
    pub fn copy_of(image: &Path) -> Result<Self> {
        let disk = Self::nowhere()?;
        sparse::copy(image, &disk.path)?;
        Ok(disk)
    }

    /// An image that somebody else makes and keeps.
    pub fn of_others(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), _dir: None }
    }

    /// The image file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks the ext4 file system, changing nothing; an error says what e2fsck found.
    pub fn check_ext4(&self) -> Result<()> {
        command::run(Command::new(packages::find_program("e2fsck")?).args(["-f", "-n"]).arg(&self.path))
    }

    /// Bytes that the host's file system keeps for it.
    pub fn allocated(&self) -> Result<u64> {
        Ok(std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&self.path)?) * 512)
    }

    /// Reads a file from the ext4 file system, without mounting it.
    pub fn read_file(&self, name: &str) -> Result<String> {
        let debugfs = packages::find_program("debugfs")?;
        command::output(Command::new(debugfs).arg("-R").arg(format!("cat {name}")).arg(&self.path))
    }

    fn nowhere() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        Ok(Self { path: dir.path().join("disk.img"), _dir: Some(dir) })
    }
}
