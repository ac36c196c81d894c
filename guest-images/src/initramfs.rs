//! Initramfs archives in cpio's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst).

/// One member of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path without a leading slash. Directories must come before what is in them.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// What it is.
    pub node: Node,
}

/// What a member of an archive is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Directory,
    /// A file with its content.
    File(Vec<u8>),
    /// A symbolic link and where it points to.
    Symlink(String),
    /// A character device.
    CharacterDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

impl Entry {
    /// A directory that everybody may enter.
    #[must_use]
    pub fn directory(path: &str) -> Self {
        Self { path: path.to_owned(), mode: 0o755, node: Node::Directory }
    }

    /// A file that everybody may read.
    #[must_use]
    pub fn file(path: &str, content: impl Into<Vec<u8>>) -> Self {
        Self { path: path.to_owned(), mode: 0o644, node: Node::File(content.into()) }
    }

    /// A program that everybody may run.
    #[must_use]
    pub fn program(path: &str, content: impl Into<Vec<u8>>) -> Self {
        Self { mode: 0o755, ..Self::file(path, content) }
    }

    /// A symbolic link.
    #[must_use]
    pub fn symlink(path: &str, target: &str) -> Self {
        Self { path: path.to_owned(), mode: 0o777, node: Node::Symlink(target.to_owned()) }
    }

    /// A character device that only root may use.
    #[must_use]
    pub fn character_device(path: &str, major: u32, minor: u32) -> Self {
        Self { path: path.to_owned(), mode: 0o600, node: Node::CharacterDevice { major, minor } }
    }
}

/// An archive cannot hold this.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// The format's size fields have 32 bits.
    #[error("'{0}' is too large for an initramfs: a member has less than 4 GiB")]
    TooLarge(String),
}

// Types in c_mode, as in stat(2).
const PERMISSIONS: u32 = 0o7777;
const S_IFCHR: u32 = 0o020_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFBLK: u32 = 0o060_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// Header, name and content each are padded to this.
const ALIGNMENT: usize = 4;
const TRAILER: &str = "TRAILER!!!";

/// Writes an archive of `entries`, all owned by root, dated 1970.
///
/// # Errors
/// [`InitramfsError::TooLarge`] for a member of 4 GiB or more.
pub fn build<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Result<Vec<u8>, InitramfsError> {
    let mut archive = Vec::new();
    for (index, entry) in (1..).zip(entries) {
        let (kind, content, device) = match &entry.node {
            Node::Directory => (S_IFDIR, &[][..], (0, 0)),
            Node::File(content) => (S_IFREG, content.as_slice(), (0, 0)),
            Node::Symlink(target) => (S_IFLNK, target.as_bytes(), (0, 0)),
            Node::CharacterDevice { major, minor } => (S_IFCHR, &[][..], (*major, *minor)),
            Node::BlockDevice { major, minor } => (S_IFBLK, &[][..], (*major, *minor)),
        };
        let mode = kind | (entry.mode & PERMISSIONS);
        append(&mut archive, &entry.path, Header { index, mode, device }, content)?;
    }
    append(&mut archive, TRAILER, Header { index: 0, mode: 0, device: (0, 0) }, &[])?;
    Ok(archive)
}

struct Header {
    index: u32,
    mode: u32,
    device: (u32, u32),
}

fn append(archive: &mut Vec<u8>, name: &str, header: Header, content: &[u8]) -> Result<(), InitramfsError> {
    let too_large = |_| InitramfsError::TooLarge(name.to_owned());
    let size = u32::try_from(content.len()).map_err(too_large)?;
    let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
    let (major, minor) = header.device;
    // ino, mode, uid, gid, nlink, mtime, filesize, maj, min, rmaj, rmin, namesize, chksum
    let fields = [header.index, header.mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(content);
    pad(archive);
    Ok(())
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(ALIGNMENT), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    fn sample() -> Vec<Entry> {
        vec![
            Entry::directory("dev"),
            Entry::character_device("dev/console", 5, 1),
            Entry::program("init", *b"#!/bin/sh\n"),
            Entry::file("empty", []),
            Entry::symlink("bin", "usr/bin"),
            Entry::file("odd name", vec![7; 4097]),
        ]
    }

    /// The real cpio's opinion: it lists and unpacks what we packed.
    #[test]
    fn cpio_unpacks_what_was_packed() {
        let archive = build(&sample()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        // Device nodes need root: left out here, and listed below.
        let mut cpio = Command::new("cpio")
            .args(["-idm", "--quiet", "--nonmatching", "dev/console"])
            .current_dir(&directory)
            .stdin(Stdio::piped())
            .spawn()
            .expect("the tests need cpio (Debian package cpio)");
        cpio.stdin.take().unwrap().write_all(&archive).unwrap();
        assert!(cpio.wait().unwrap().success());
        let path = |name| directory.path().join(name);
        assert_eq!(std::fs::read(path("odd name")).unwrap(), vec![7; 4097]);
        assert_eq!(std::fs::read(path("empty")).unwrap(), b"");
        assert_eq!(std::fs::read_link(path("bin")).unwrap(), std::path::Path::new("usr/bin"));
        assert!(path("dev").is_dir());
        let mode = std::os::unix::fs::PermissionsExt::mode(&path("init").metadata().unwrap().permissions());
        assert_eq!(mode & 0o7777, 0o755);
    }

    #[test]
    fn cpio_lists_devices_and_owners() {
        let mut cpio = Command::new("cpio")
            .args(["-itvn", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the tests need cpio (Debian package cpio)");
        cpio.stdin.take().unwrap().write_all(&build(&sample()).unwrap()).unwrap();
        let list = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        let console: Vec<_> =
            list.lines().find(|line| line.ends_with("dev/console")).unwrap().split_whitespace().collect();
        assert_eq!(console[..6], ["crw-------", "1", "0", "0", "5,", "1"]);
        assert_eq!(list.lines().count(), sample().len());
    }
}
