//! Directories become ext4 images, without root and without mounts: e2fsprogs does the work.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::packages::{self, Need, PackageError};

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    /// e2fsprogs is not there.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The directory cannot be walked.
    #[error("cannot read {path}")]
    Unreadable {
        /// What could not be read.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The image cannot be written.
    #[error("cannot write the image {path}")]
    Unwritable {
        /// The image.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A tool did not start.
    #[error("cannot run {tool}")]
    NotStarted {
        /// Its name.
        tool: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A tool failed.
    #[error("{tool} failed: {message}")]
    Failed {
        /// Its name.
        tool: &'static str,
        /// What it said.
        message: String,
    },
}

/// How an image is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// Size in bytes (the image is sparse); `None`: what the files need, and half as much again, at least 64 MiB.
    pub size: Option<u64>,
    /// All files belong to root, whoever owns them here; false keeps the owners.
    pub owned_by_root: bool,
    /// A journal keeps the file system whole when a guest is killed; throw-away images boot faster without.
    pub journal: bool,
    /// File system UUID, also the seed of directory hashes: fixed, so that equal directories make equal trees.
    pub uuid: String,
}

impl Default for Options {
    fn default() -> Self {
        Self { size: None, owned_by_root: true, journal: true, uuid: DEFAULT_UUID.to_owned() }
    }
}

/// The UUID of images that did not ask for another.
pub const DEFAULT_UUID: &str = "766d6d00-0000-4000-8000-726f6f746673";
const NEEDS: [Need; 3] = [
    Need { probe: "mke2fs", package: "e2fsprogs" },
    Need { probe: "debugfs", package: "e2fsprogs" },
    Need { probe: "dumpe2fs", package: "e2fsprogs" },
];
/// What ext4 is today; said here so that the host's configuration does not matter.
const FEATURES: &str = "ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,\
                        dir_nlink,extra_isize,metadata_csum";
const BLOCK: u64 = 4096;
const SMALLEST: u64 = 64 << 20;
/// What an inode and its directory entry take, generously.
const PER_FILE: u64 = 512;
/// The first inode that is not the file system's own (0 to 10 are reserved); the root directory's is 2.
const FIRST_INODE: u64 = 11;
const ROOT_INODE: u64 = 2;

/// Makes `image` an ext4 file system with what is in `directory`. An image that was there is replaced; after an
/// error there is none.
///
/// # Errors
/// A tool missing or failing, or files that cannot be read or written.
pub fn build(directory: &Path, image: &Path, options: &Options) -> Result<(), Ext4Error> {
    packages::provide(&NEEDS, &mut ())?;
    let result = build_at(directory, image, options);
    if result.is_err() {
        // It may not be there at all.
        let _ = fs::remove_file(image);
    }
    result
}

fn build_at(directory: &Path, image: &Path, options: &Options) -> Result<(), Ext4Error> {
    let size = match options.size {
        Some(size) => size,
        None => (space_for(directory)? * 3 / 2).max(SMALLEST),
    };
    let unwritable = |source| Ext4Error::Unwritable { path: image.to_owned(), source };
    File::create(image).and_then(|file| file.set_len(size.next_multiple_of(BLOCK))).map_err(unwritable)?;

    // Inode tables are zero already in a sparse file, so the guest needs no thread that clears them later.
    let extended = format!("hash_seed={},lazy_itable_init=0,root_owner=0:0", options.uuid);
    let mut mke2fs = tool("mke2fs");
    let features = format!("none,{FEATURES}{}", if options.journal { ",has_journal" } else { "" });
    mke2fs.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-O", &features]);
    mke2fs.args(["-U", &options.uuid, "-E", &extended]);
    run("mke2fs", mke2fs.arg("-d").arg(directory).arg(image))?;
    if options.owned_by_root { give_to_root(image) } else { Ok(()) }
}

/// mke2fs keeps the owners that files have here; every inode in use gets root instead. By inode number, because
/// debugfs cannot be told every file name.
fn give_to_root(image: &Path) -> Result<(), Ext4Error> {
    let listing = run("dumpe2fs", tool("dumpe2fs").arg(image))?;
    let mut script = String::new();
    for inode in used_inodes(&String::from_utf8_lossy(&listing.stdout)) {
        script += &format!("set_inode_field <{inode}> uid 0\nset_inode_field <{inode}> gid 0\n");
    }
    let mut debugfs = tool("debugfs");
    debugfs
        .args(["-w", "-f", "-"])
        .arg(image)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let not_started = |source| Ext4Error::NotStarted { tool: "debugfs", source };
    let mut child = debugfs.spawn().map_err(not_started)?;
    // Errors show in its exit status and messages.
    let sent = child.stdin.take().map_or(Ok(()), |mut input| input.write_all(script.as_bytes()));
    let output = child.wait_with_output().map_err(not_started)?;
    let said = String::from_utf8_lossy(&output.stderr);
    // It ends with success whatever happens; the first line it says is its version.
    let complaint = said.lines().skip(1).collect::<Vec<_>>().join("; ");
    if sent.is_ok() && output.status.success() && complaint.is_empty() {
        return Ok(());
    }
    Err(Ext4Error::Failed { tool: "debugfs", message: complaint })
}

/// The inodes in use, from dumpe2fs: per group, the whole range and the free ones.
fn used_inodes(listing: &str) -> Vec<u64> {
    let field = |name: &str| {
        listing.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let count = field("Inode count:");
    let free: Vec<(u64, u64)> = listing
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Free inodes:"))
        .flat_map(|ranges| ranges.split(','))
        .filter_map(|range| {
            let (first, last) = range.trim().split_once('-').unwrap_or((range.trim(), range.trim()));
            Some((first.parse().ok()?, last.parse().ok()?))
        })
        .collect();
    let is_free = |inode: u64| free.iter().any(|(first, last)| (*first..=*last).contains(&inode));
    [ROOT_INODE].into_iter().chain((FIRST_INODE..=count).filter(|inode| !is_free(*inode))).collect()
}

/// What the files below `directory` take in a file system, in bytes.
fn space_for(directory: &Path) -> Result<u64, Ext4Error> {
    let unreadable = |source| Ext4Error::Unreadable { path: directory.to_owned(), source };
    let mut total = BLOCK;
    for entry in fs::read_dir(directory).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let metadata = entry.metadata().map_err(unreadable)?;
        total += PER_FILE + if metadata.is_file() { metadata.size().next_multiple_of(BLOCK) } else { 0 };
        if metadata.is_dir() {
            total += space_for(&entry.path())?;
        }
    }
    Ok(total)
}

fn tool(name: &str) -> Command {
    let mut command = Command::new(packages::find(name).unwrap_or_else(|| name.into()));
    // Messages in English, and no configuration file of the host in the way.
    command.env("LC_ALL", "C").env("MKE2FS_CONFIG", "/dev/null").stdin(Stdio::null());
    command
}

fn run(name: &'static str, command: &mut Command) -> Result<Output, Ext4Error> {
    let output = command.output().map_err(|source| Ext4Error::NotStarted { tool: name, source })?;
    if output.status.success() {
        return Ok(output);
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(Ext4Error::Failed { tool: name, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn debugfs(image: &Path, request: &str) -> String {
        String::from_utf8(run("debugfs", tool("debugfs").args(["-R", request]).arg(image)).unwrap().stdout)
            .unwrap()
    }

    fn sample() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        fs::create_dir(path("bin")).unwrap();
        fs::write(path("bin/tool \"odd\" name"), vec![1; 10_000]).unwrap();
        fs::write(path("file"), "content").unwrap();
        std::os::unix::fs::symlink("bin/tool", path("link")).unwrap();
        for name in ["file", "bin", "bin/tool \"odd\" name"] {
            // Somebody else's, where the test may say so; the user's own otherwise, which is not root's either.
            let _ = std::os::unix::fs::lchown(path(name), Some(70_001), Some(70_002));
        }
        directory
    }

    #[test]
    fn an_image_is_sound_and_belongs_to_root() {
        let source = sample();
        let out = tempfile::tempdir().unwrap();
        for journal in [true, false] {
            let image = out.path().join("image");
            build(source.path(), &image, &Options { journal, ..Options::default() }).unwrap();
            run("e2fsck", tool("e2fsck").arg("-fn").arg(&image)).unwrap();
            assert_eq!(image.metadata().unwrap().len(), SMALLEST);
            let listing = debugfs(&image, "ls -l /") + &debugfs(&image, "ls -l /bin");
            for name in ["file", "link", "bin", "tool \"odd\" name"] {
                let line = listing.lines().find(|line| line.ends_with(name)).unwrap();
                let fields: Vec<_> = line.split_whitespace().collect();
                // inode, mode, (type), uid, gid, ...
                assert_eq!(fields[3..5], ["0", "0"], "{line}");
            }
            assert_eq!(debugfs(&image, "cat /file"), "content");
        }
    }

    #[test]
    fn owners_stay_when_asked_for() {
        let source = sample();
        let out = tempfile::tempdir().unwrap();
        let image = out.path().join("image");
        build(source.path(), &image, &Options { owned_by_root: false, ..Options::default() }).unwrap();
        let owner = source.path().join("file").metadata().unwrap().uid();
        assert!(debugfs(&image, "stat /file").contains(&format!("User: {owner:5}")));
    }

    #[test]
    fn what_does_not_fit_leaves_nothing_behind() {
        let source = tempfile::tempdir().unwrap();
        fs::write(source.path().join("large"), vec![1; 4 << 20]).unwrap();
        let out = tempfile::tempdir().unwrap();
        let image = out.path().join("image");
        let error =
            build(source.path(), &image, &Options { size: Some(2 << 20), ..Options::default() }).unwrap_err();
        assert!(matches!(error, Ext4Error::Failed { tool: "mke2fs", .. }), "{error}");
        assert!(!image.exists());
    }

    #[test]
    fn inodes_are_read_from_all_groups() {
        let listing = "Inode count:              48\nGroup 0:\n  Free inodes: 14-20, 22-24\nGroup 1:\n  Free inodes: 26-48\n";
        assert_eq!(used_inodes(listing), [2, 11, 12, 13, 21, 25]);
    }
}
