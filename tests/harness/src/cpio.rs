//! Packs initramfs archives.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::command;

/// Packs what is below `root` into the archive `to`, owned by root. It is not compressed: unpacking is slow in emulation.
pub fn pack(root: &Path, to: &Path) -> Result<()> {
    let line = "find . -print0 | cpio --quiet --null --create --format=newc --owner=+0:+0 > \"$1\"";
    command::run(Command::new("sh").args(["-c", line, "sh"]).arg(to).current_dir(root))
}
