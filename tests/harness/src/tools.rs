//! A root file system with the tools that load a machine: the demo's files, Debian's fio with the libraries it is linked
//! to, and our own `netload`, `registers`, `losses` and `stream-peer`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use guest_images::progress::Console;
use guest_images::rootfs::{self, Ext4Options};

use crate::{binaries, cache, command, packages};

/// Raised when the code below makes another image of the same parts.
const LAYOUT: &str = "1";

/// The image's path in the cache, built first when it is not there. Shared: mount it read-only.
pub fn image() -> Result<PathBuf> {
    packages::ensure(&["fio", "e2fsprogs"])?;
    let fio = packages::find_program("fio")?;
    let ours = [
        ("netload", netload()?),
        ("registers", registers()?),
        ("losses", losses()?),
        ("stream-peer", binaries::stream_peer()?),
    ];
    let hashes =
        ours.iter().map(|(_, program)| crate::lab::content_hash(program)).collect::<Result<Vec<_>>>()?;
    // The demo's own name changes with its parts.
    let demo = crate::demo_image()?;
    let recipe = format!(
        "{LAYOUT} {} {} {}",
        demo.display(),
        command::output(&mut command::words("dpkg-query -W fio libc6"))?,
        hashes.join(" ")
    );
    let dir = cache::build_once("tools-rootfs", &recipe, |dir| {
        let tree = dir.join("tree");
        rootfs::demo_tree(&tree, &mut Console::new())?;
        copy_program(&tree, &fio)?;
        for (name, program) in &ours {
            copy(&tree, program, &Path::new("usr/bin").join(name))?;
        }
        rootfs::build_ext4(
            &tree,
            &dir.join("rootfs.ext4"),
            &Ext4Options { journal: false, ..Ext4Options::default() },
        )?;
        Ok(fs::remove_dir_all(&tree)?)
    })?;
    Ok(dir.join("rootfs.ext4"))
}

/// Our network load, which runs at both ends: in the guest from the image, on the host from here.
pub fn netload() -> Result<PathBuf> {
    binaries::build(&["--release", "--package", "netload", "--bin", "netload"])
}

/// Two processes that look whether the kernel keeps their vector registers.
fn registers() -> Result<PathBuf> {
    binaries::build(&["--release", "--package", "netload", "--bin", "registers"])
}

/// The load that notices whatever its machine loses; in the guest from the image, beside it from here.
pub fn losses() -> Result<PathBuf> {
    binaries::build(&["--release", "--package", "netload", "--bin", "losses"])
}

/// Copies a dynamically linked program of this machine, and what its loader would open, to where they are here.
fn copy_program(tree: &Path, program: &Path) -> Result<()> {
    let libraries = command::output(Command::new("ldd").arg(program))?;
    // `libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x...)`, or the loader's path alone.
    let paths = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    for path in paths.map(Path::new).chain([program]) {
        copy(tree, path, path.strip_prefix("/").context("an absolute path")?)?;
    }
    Ok(())
}

fn copy(tree: &Path, from: &Path, to: &Path) -> Result<()> {
    let to = tree.join(to);
    fs::create_dir_all(to.parent().context("a path below the tree")?)?;
    fs::copy(from, &to).with_context(|| format!("copy {}", from.display()))?;
    Ok(fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?)
}
