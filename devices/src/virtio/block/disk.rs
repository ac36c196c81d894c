//! The host's side of a disk: an image or a block device, opened and locked.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use super::SECTOR;
use super::bounce::ALIGN;
use super::config::{Cache, Config, Format};
use super::qcow2::Image;
use crate::model::OpenError;
use crate::storage::{self, Storage, StorageError};

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    fd: OwnedFd,
    /// What is in the file, where it is more than the disk itself.
    image: Option<Image>,
    path: PathBuf,
    read_only: bool,
    /// It ends with the machine.
    private: bool,
    /// Bytes to which offsets and lengths are aligned.
    block: u32,
    /// Bytes to which memory is aligned; 1 if any will do.
    memory: u32,
}

impl Disk {
    /// Opens and locks the disk of a configuration. Without write access, if it is read-only: then no mistake of
    /// ours can write it.
    pub fn open(config: &Config) -> Result<Self, OpenError> {
        let path = &config.path;
        if config.private && !config.ro {
            return Self::private(config);
        }
        let direct = config.cache == Cache::None;
        let fd = open_locked("disk", path, config.ro, direct)?;
        let (block, memory) = if direct { direct_alignment(&fd) } else { (SECTOR as u32, 1) };
        let image = match config.format {
            Format::Raw => None,
            Format::Qcow2 => Some(Image::open(&fd, path, config.ro, direct, config.backing)?),
        };
        // An image takes care of its file's alignment by itself.
        let (block, memory) = if image.is_some() { (SECTOR as u32, 1) } else { (block, memory) };
        Ok(Self { fd, image, path: path.clone(), read_only: config.ro, private: false, block, memory })
    }

    /// Makes a disk that begins as the configuration's file, which is only read. It shares the file's blocks where the file
    /// system can, and else is an image over it.
    fn private(config: &Config) -> Result<Self, OpenError> {
        let path = &config.path;
        let original = open_locked("disk", path, true, false)?;
        let own: OwnedFd = storage::nameless(path)
            .map_err(|e| {
                let reason = format!("a copy of it cannot be made ({e})");
                OpenError::file("disk", path)(&reason, "make its directory writable for you")
            })?
            .into();
        let image = match (rustix::fs::ioctl_ficlone(&own, &original), config.format) {
            (Ok(()), Format::Raw) => None,
            (Ok(()), Format::Qcow2) => Some(Image::open(&own, path, false, false, config.backing)?),
            (Err(_), format) => Some(Image::over(&own, original, path, format, config.backing)?),
        };
        let path = path.clone();
        Ok(Self { fd: own, image, path, read_only: false, private: true, block: SECTOR as u32, memory: 1 })
    }

    /// A disk of 64 KiB in memory, whose sectors hold the low bits of their own number in every byte. Even a
    /// read-only one could be written by the host: only the device's own check is in the way.
    #[cfg(any(test, feature = "specimen"))]
    pub fn specimen(read_only: bool) -> Self {
        const SECTORS: u64 = 128;
        let fd = rustix::fs::memfd_create("specimen", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
        let bytes: Vec<u8> = (0..SECTORS).flat_map(|sector| [sector as u8; SECTOR as usize]).collect();
        assert_eq!(rustix::io::pwrite(&fd, &bytes, 0), Ok(bytes.len()));
        Self::on(fd, Path::new("specimen"), read_only)
    }

    /// A disk on whatever is open; `path` is its name.
    #[cfg(any(test, feature = "specimen"))]
    pub fn on(fd: OwnedFd, path: &Path, read_only: bool) -> Self {
        Self {
            fd,
            image: None,
            path: path.into(),
            read_only,
            private: false,
            block: SECTOR as u32,
            memory: 1,
        }
    }

    /// The open file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// What is in the file, where it is more than the disk itself.
    pub fn image(&self) -> Option<&Image> {
        self.image.as_ref()
    }

    /// What the operator calls it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// What a snapshot takes along of it.
    pub fn storage(&self) -> Option<Storage> {
        let format = match &self.image {
            Some(image) if !image.is_over() => Format::Qcow2,
            _ => Format::Raw,
        };
        (!self.read_only).then(|| Storage::of(self.fd(), format.name(), self.private))
    }

    /// Writes all of it to the empty file `to`. Nobody writes it meanwhile.
    pub fn save(&self, to: &File) -> Result<(), StorageError> {
        match &self.image {
            None => storage::save(&self.path, self.fd(), to),
            Some(image) => storage::save_with(&self.path, self.fd(), || image.save(&self.path, to)),
        }
    }

    /// Bytes of its blocks, which requests are made of: more than a sector only where direct I/O needs it.
    pub fn block(&self) -> u32 {
        self.block
    }

    /// Whether memory is such that the disk can be read and written with it.
    pub fn takes(&self, vectors: &[libc::iovec]) -> bool {
        let mask = self.memory as usize - 1;
        // A format's code is given memory that nobody else changes.
        self.image.is_none()
            && vectors.iter().all(|vector| (vector.iov_base as usize | vector.iov_len) & mask == 0)
    }

    /// What it holds now, in bytes.
    pub fn bytes(&self) -> Result<u64, OpenError> {
        match &self.image {
            Some(image) => Ok(image.bytes()),
            // A block device has no size in its inode, but an end.
            None => rustix::fs::seek(&self.fd, SeekFrom::End(0)).map_err(|errno| {
                OpenError::file("disk", &self.path)(&errno.to_string(), "check that it is a disk")
            }),
        }
    }

    /// The capacity in sectors, if it is to be `size` bytes: a file that is shorter is extended, of one that is
    /// longer the front is used. Without `size` it is what the file holds.
    pub fn capacity(&self, size: Option<u64>) -> Result<u64, OpenError> {
        let error = OpenError::file("disk", &self.path);
        let held = self.bytes()?;
        if let Some(size) = size
            && size > held
        {
            self.extend(size)?;
        }
        let size = size.unwrap_or(held);
        let block = u64::from(self.block);
        if size == 0 {
            return Err(error("it is empty", "give it a size with truncate(1), or say size=SIZE"));
        }
        if !size.is_multiple_of(block) {
            let remedy = match self.block {
                512 => "extend it with truncate(1), and check that it is a raw image",
                _ => "extend it with truncate(1), or leave cache=none out",
            };
            return Err(error(&format!("its size of {size} bytes is not a multiple of {block}"), remedy));
        }
        Ok(size / SECTOR)
    }

    fn extend(&self, size: u64) -> Result<(), OpenError> {
        let error = OpenError::file("disk", &self.path);
        let grown = match &self.image {
            _ if self.read_only => {
                return Err(error(
                    "it is read-only and smaller than 'size'",
                    "lower 'size', or leave it out",
                ));
            }
            Some(image) => image.extend(size),
            None => rustix::fs::ftruncate(&self.fd, size).map_err(Into::into),
        };
        grown.map_err(|e| error(&format!("it cannot be extended ({e})"), "lower 'size', or leave it out"))
    }
}

/// How often, and how far apart, a lock is tried for that somebody has.
const LOCK_TRIES: u32 = 20;
const LOCK_INTERVAL: Duration = Duration::from_millis(10);
const NO_DISK: &str = "give a disk image or a block device";

/// Opens and locks a file or a block device.
///
/// The lock (flock) is shared by those who read and exclusive for who writes, so that two VMs cannot destroy a
/// file system that both of them have mounted.
pub fn open_locked(
    what: &'static str,
    path: &Path,
    read_only: bool,
    direct: bool,
) -> Result<OwnedFd, OpenError> {
    let error = OpenError::file(what, path);
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let direct = if direct { OFlags::DIRECT } else { OFlags::empty() };
    // NONBLOCK: a FIFO must not keep us waiting before it is refused. Disks do not care.
    let flags = access | direct | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::NOENT => error("no such file", "check the path, or make an image with truncate(1)"),
        Errno::ACCESS | Errno::PERM if read_only => error("permission denied", "make it readable for you"),
        Errno::ACCESS | Errno::PERM | Errno::ROFS => {
            error("no permission to write", "make it writable for you, or add ',ro'")
        }
        Errno::ISDIR => error("it is a directory", NO_DISK),
        Errno::INVAL if !direct.is_empty() => {
            error("its file system has no direct I/O", "leave cache=none out")
        }
        errno => error(&errno.to_string(), "check the path"),
    })?;
    let stat = rustix::fs::fstat(&fd).map_err(|errno| error(&errno.to_string(), "check the path"))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::BlockDevice => {}
        FileType::Directory => return Err(error("it is a directory", NO_DISK)),
        _ => return Err(error("it is neither a file nor a block device", NO_DISK)),
    }
    let lock = match read_only {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    wait_for_lock(&fd, lock).map_err(|errno| match (errno, read_only) {
        (Errno::WOULDBLOCK, true) => {
            error("another VM is writing to it", "stop that VM, or make a copy of the disk")
        }
        (Errno::WOULDBLOCK, false) => error("another VM is using it", "stop that VM, or add ',ro' to both"),
        (errno, _) => error(&format!("it cannot be locked ({errno})"), "put it on a file system with locks"),
    })?;
    Ok(fd)
}

/// Tries for a lock, and a little longer while somebody has it. A VM that was killed may have requests in flight in an
/// io_uring: the host's kernel closes their file, and frees its lock, some milliseconds after the process is gone.
fn wait_for_lock(fd: &OwnedFd, lock: FlockOperation) -> rustix::io::Result<()> {
    for _ in 0..LOCK_TRIES {
        match rustix::fs::flock(fd, lock) {
            Err(Errno::WOULDBLOCK) => std::thread::sleep(LOCK_INTERVAL),
            result => return result,
        }
    }
    rustix::fs::flock(fd, lock)
}

/// What direct I/O on a file needs: alignment of offsets and lengths, and that of memory, in bytes.
fn direct_alignment(fd: &OwnedFd) -> (u32, u32) {
    // STATX_DIOALIGN, which kernels before 6.1 do not fill in.
    let flags = StatxFlags::from_bits_retain(0x2000);
    let told = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, flags).ok();
    let told = told.filter(|stat| stat.stx_dio_offset_align != 0 && stat.stx_dio_mem_align != 0);
    match told.map(|stat| (stat.stx_dio_offset_align, stat.stx_dio_mem_align)) {
        Some((offset, memory)) if offset.is_power_of_two() && offset as usize <= ALIGN => {
            (offset.max(SECTOR as u32), memory.next_power_of_two().min(ALIGN as u32))
        }
        _ => (ALIGN as u32, ALIGN as u32),
    }
}
