//! The host's side of a disk: a raw image or a block device, opened, locked, read and written.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::SECTOR;
use crate::model::OpenError;
use crate::virtio::buffers::Buffers;

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    fd: OwnedFd,
    sectors: u64,
    read_only: bool,
    path: PathBuf,
}

impl Disk {
    /// Opens and locks a disk. Without write access, if it is read-only: then no mistake of ours can write it.
    ///
    /// The lock (flock) is shared by those who read and exclusive for who writes, so that two VMs cannot
    /// destroy a file system that both of them have mounted.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, OpenError> {
        let error = |reason: String, remedy: &str| OpenError::File {
            what: "disk",
            path: path.display().to_string(),
            reason,
            remedy: remedy.into(),
        };
        let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
        // NONBLOCK: a FIFO must not keep us waiting before it is refused. Disks do not care.
        let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| match errno {
            Errno::NOENT => error("no such file".into(), "check the path, or make an image with truncate(1)"),
            Errno::ACCESS | Errno::PERM if read_only => {
                error("permission denied".into(), "make it readable for you")
            }
            Errno::ACCESS | Errno::PERM | Errno::ROFS => {
                error("no permission to write".into(), "make it writable for you, or add ',ro'")
            }
            Errno::ISDIR => error("it is a directory".into(), NO_DISK),
            errno => error(errno.to_string(), "check the path"),
        })?;
        let stat = rustix::fs::fstat(&fd).map_err(|errno| error(errno.to_string(), "check the path"))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile | FileType::BlockDevice => {}
            FileType::Directory => return Err(error("it is a directory".into(), NO_DISK)),
            _ => return Err(error("it is neither a file nor a block device".into(), NO_DISK)),
        }
        let lock = match read_only {
            true => FlockOperation::NonBlockingLockShared,
            false => FlockOperation::NonBlockingLockExclusive,
        };
        rustix::fs::flock(&fd, lock).map_err(|errno| match (errno, read_only) {
            (Errno::WOULDBLOCK, true) => {
                error("another VM is writing to it".into(), "stop that VM, or make a copy of the disk")
            }
            (Errno::WOULDBLOCK, false) => {
                error("another VM is using it".into(), "stop that VM, or add ',ro' to both")
            }
            (errno, _) => {
                error(format!("it cannot be locked ({errno})"), "put it on a file system with locks")
            }
        })?;
        // A block device has no size in its inode, but an end.
        let size = rustix::fs::seek(&fd, SeekFrom::End(0))
            .map_err(|errno| error(errno.to_string(), "check that it is a disk"))?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            let reason = format!("its size of {size} bytes is not a multiple of {SECTOR}");
            return Err(match size {
                0 => error("it is empty".into(), "give it a size with truncate(1)"),
                _ => error(reason, "extend it with truncate(1), and check that it is a raw image"),
            });
        }
        Ok(Self { fd, sectors: size / SECTOR, read_only, path: path.into() })
    }

    /// A disk of 64 KiB in memory, whose sectors hold the low bits of their own number in every byte. Even a
    /// read-only one could be written by the host: only the device's own check is in the way.
    #[cfg(any(test, feature = "specimen"))]
    pub fn specimen(read_only: bool) -> Self {
        const SECTORS: u64 = 128;
        let fd = rustix::fs::memfd_create("specimen", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
        let bytes: Vec<u8> = (0..SECTORS).flat_map(|sector| [sector as u8; SECTOR as usize]).collect();
        assert_eq!(rustix::io::pwrite(&fd, &bytes, 0), Ok(bytes.len()));
        Self::on(fd, Path::new("specimen"), SECTORS, read_only)
    }

    /// A disk on whatever is open; `path` is its name.
    #[cfg(any(test, feature = "specimen"))]
    pub fn on(fd: OwnedFd, path: &Path, sectors: u64, read_only: bool) -> Self {
        Self { fd, sectors, read_only, path: path.into() }
    }

    /// The open file, for tests to look at behind the device's back.
    #[cfg(test)]
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// What the operator calls it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Capacity in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Fills all of `room` from `offset` in bytes. A file that was cut short is an error.
    pub fn read(&self, room: &mut Buffers<'_>, offset: u64) -> io::Result<()> {
        transfer(room, offset, |room, at| room.read_from(self.fd.as_fd(), Some(at)))
    }

    /// Writes all of `data` at `offset` in bytes.
    pub fn write(&self, data: &mut Buffers<'_>, offset: u64) -> io::Result<()> {
        transfer(data, offset, |data, at| data.write_to(self.fd.as_fd(), Some(at)))
    }

    /// Makes what was written durable.
    pub fn flush(&self) -> io::Result<()> {
        match self.read_only {
            // There is nothing to flush, and some file systems refuse it.
            true => Ok(()),
            false => Ok(rustix::fs::fdatasync(&self.fd)?),
        }
    }
}

const NO_DISK: &str = "give a raw disk image or a block device";

/// Repeats a system call, which may do less than it was asked to, until all is done.
fn transfer<'m>(
    buffers: &mut Buffers<'m>,
    mut offset: u64,
    mut call: impl FnMut(&mut Buffers<'m>, u64) -> io::Result<usize>,
) -> io::Result<()> {
    while !buffers.is_empty() {
        match call(buffers, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => offset += n as u64,
        }
    }
    Ok(())
}
