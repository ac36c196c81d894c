//! Packs a directory into an initramfs, and the initramfs that tests of `--initrd` boot.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use guest_images::initramfs::{self, Entry, Node};

use crate::packages;

/// Packs what is below `root` into the archive `to`. It is not compressed: unpacking is slow in emulation.
pub fn pack(root: &Path, to: &Path) -> Result<()> {
    let mut entries = Vec::new();
    collect(root, "", &mut entries)?;
    fs::write(to, initramfs::build(&entries)?).with_context(|| format!("write {}", to.display()))
}

/// An initramfs with our init and busybox: a root file system in memory.
pub fn demo() -> Result<Vec<u8>> {
    with_programs(&[])
}

/// The same with more programs, which have to be static: their names in /bin, and their files here.
pub fn with_programs(programs: &[(&str, &Path)]) -> Result<Vec<u8>> {
    packages::ensure(&["busybox-static"])?;
    let busybox = fs::read(packages::find_program("busybox")?)?;
    let mut entries: Vec<Entry> = ["bin", "dev", "proc", "sys", "tmp"].map(Entry::directory).into();
    entries.push(Entry::character_device("dev/console", 5, 1));
    entries.push(Entry::program("init", guest_images::INIT));
    entries.push(Entry::program("bin/busybox", busybox));
    entries.extend(["sh", "ls", "grep", "cat"].map(|name| Entry::symlink(&format!("bin/{name}"), "busybox")));
    for (name, file) in programs {
        let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
        entries.push(Entry::program(&format!("bin/{name}"), bytes));
    }
    Ok(initramfs::build(&entries)?)
}

/// Adds what is in the directory `prefix` of `root`, directories before what is in them.
fn collect(root: &Path, prefix: &str, entries: &mut Vec<Entry>) -> Result<()> {
    let dir = root.join(prefix);
    for entry in fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))? {
        let entry = entry?;
        let path = Path::new(prefix).join(entry.file_name()).display().to_string();
        let metadata = entry.metadata()?;
        let node = if metadata.is_dir() {
            Node::Directory
        } else if metadata.is_symlink() {
            Node::Symlink(fs::read_link(entry.path())?.display().to_string())
        } else {
            Node::File(fs::read(entry.path())?)
        };
        let is_directory = node == Node::Directory;
        entries.push(Entry { path: path.clone(), mode: metadata.permissions().mode(), node });
        if is_directory {
            collect(root, &path, entries)?;
        }
    }
    Ok(())
}
