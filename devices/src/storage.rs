//! Copies of files that hold what guests have stored: blocks are shared where the file system can, and holes stay holes.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, SeekFrom, copy_file_range, fstat, ioctl_ficlone, open, seek};
use rustix::io::Errno;

/// What a device keeps on the host for its guest, and a snapshot can take along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Storage {
    /// The format in which [`crate::model::VirtioDevice::save_storage`] writes it.
    pub format: &'static str,
    /// It ends with the machine: a snapshot without it would be of no use.
    pub nameless: bool,
}

/// What a device keeps on the host could not be written to a file: a sentence for the operator.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// It is no file.
    #[error(
        "'{path}' is a block device, which is not copied; save it by its own means and leave the disks out of the snapshot",
        path = .0.display()
    )]
    BlockDevice(PathBuf),
    /// It cannot be read, or the file cannot be written.
    #[error("cannot copy '{path}': {source}; make room, or leave the disks out of the snapshot", path = path.display())]
    Io {
        /// What it is on the host.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The device's event loop has ended.
    #[error("the device's event loop is gone")]
    Gone,
}

/// Bytes that are copied at a time where the kernel does not copy by itself.
const CHUNK: usize = 1 << 20;

impl Storage {
    /// What the open file `fd` is to a snapshot. `private`: it ends with the machine.
    pub fn of(fd: BorrowedFd<'_>, format: &'static str, private: bool) -> Self {
        Self { format, nameless: private || fstat(fd).is_ok_and(|stat| stat.st_nlink == 0) }
    }
}

/// Makes the empty file `to` equal to the file `from`, which is at `path`.
pub fn save(path: &Path, from: BorrowedFd<'_>, to: &File) -> Result<(), StorageError> {
    save_with(path, from, || copy(from, to))
}

/// Has `copy` copy the file `fd`, which is at `path`.
pub fn save_with(
    path: &Path,
    fd: BorrowedFd<'_>,
    copy: impl FnOnce() -> io::Result<()>,
) -> Result<(), StorageError> {
    let failed = |source| StorageError::Io { path: path.into(), source };
    let stat = fstat(fd).map_err(|errno| failed(errno.into()))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::BlockDevice => Err(StorageError::BlockDevice(path.into())),
        _ => copy().map_err(failed),
    }
}

/// Makes the empty file `to` equal to `from`, which may be open for direct I/O. Nobody writes `from` meanwhile.
pub fn copy(from: BorrowedFd<'_>, to: &File) -> io::Result<()> {
    if ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    // Another opening of the same file, whose reads need no alignment.
    let again = File::open(format!("/proc/self/fd/{}", from.as_raw_fd()));
    let from = again.or_else(|_| from.try_clone_to_owned().map(File::from))?;
    let bytes = from.metadata()?.len();
    to.set_len(bytes)?;
    copy_data(&from, to, 0, bytes)
}

/// A copy of the file `original`, which is at `path`, without a name: nothing is left of it when its last user is gone,
/// however that ends.
pub fn private_copy(path: &Path, original: BorrowedFd<'_>) -> io::Result<File> {
    let own = nameless(path)?;
    copy(original, &own)?;
    Ok(own)
}

/// An empty file without a name beside `path`, or if that is not possible, where temporary files are.
pub fn nameless(path: &Path) -> io::Result<File> {
    let open = |directory: &Path| {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        open(directory, flags, Mode::RUSR | Mode::WUSR).map(File::from)
    };
    let beside = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(open(beside).or_else(|_| open(&std::env::temp_dir()))?)
}

/// Copies what is no hole from `start` to `end` of `from` to the same place in `to`, where there is nothing yet.
pub fn copy_data(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data.max(at),
            // Only a hole is left.
            Err(Errno::NXIO) => return Ok(()),
            // A file system that cannot tell has no holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return copy_range(from, to, at, end),
            Err(error) => return Err(error.into()),
        };
        if data >= end {
            return Ok(());
        }
        at = seek(from, SeekFrom::Hole(data))?.min(end);
        copy_range(from, to, data, at)?;
    }
    Ok(())
}

/// Copies all from `start` to `end`, by the kernel if it can.
fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut source, mut target) = (start, start);
    while source < end {
        let count = usize::try_from(end - source).unwrap_or(usize::MAX);
        match copy_file_range(from, Some(&mut source), to, Some(&mut target), count) {
            // Somebody has cut the original short.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                return copy_by_hand(from, to, source, end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut from, mut to) = (from, to);
    seek(from, SeekFrom::Start(start))?;
    seek(to, SeekFrom::Start(start))?;
    let copied = io::copy(&mut (&mut from).take(end - start), &mut to)?;
    match copied == end - start {
        true => Ok(()),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Copies from `start` to `end` of what `read` reads to the same place in `to`, where there is nothing yet. Zeroes become
/// holes.
pub fn copy_read(
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    to: &File,
    start: u64,
    end: u64,
) -> io::Result<()> {
    const BLOCK: usize = 4096;
    let mut buffer = vec![0; CHUNK];
    for at in (start..end).step_by(CHUNK) {
        let part = &mut buffer[..(end - at).min(CHUNK as u64) as usize];
        read(part, at)?;
        for (block, at) in part.chunks(BLOCK).zip((at..).step_by(BLOCK)) {
            if block.iter().any(|&byte| byte != 0) {
                to.write_all_at(block, at)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_private_copy_is_equal_sparse_nameless_and_separate() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 5000], 1 << 20).unwrap();
        file.write_all_at(b"end", (64 << 20) - 3).unwrap();
        let copy = private_copy(&path, file.as_fd()).unwrap();
        let read = |path: &str| std::fs::read(path).unwrap();
        assert!(read(path.to_str().unwrap()) == read(&format!("/proc/self/fd/{}", copy.as_raw_fd())));
        assert!(copy.metadata().unwrap().blocks() < 1000);
        assert_eq!(copy.metadata().unwrap().nlink(), 0);
        copy.write_all_at(b"mine", 0).unwrap();
        assert_eq!(read(path.to_str().unwrap())[..4], [0; 4]);
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 1);
    }

    #[test]
    fn a_range_is_copied_and_nothing_beside_it() {
        let [from, to] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        from.set_len(1 << 20).unwrap();
        from.write_all_at(&[1; 0x3000], 0x1000).unwrap();
        from.write_all_at(&[2; 0x1000], 0x10000).unwrap();
        to.set_len(1 << 20).unwrap();
        copy_data(&from, &to, 0x2000, 0x10800).unwrap();
        let mut want = vec![0; 1 << 20];
        want[0x2000..0x4000].fill(1);
        want[0x10000..0x10800].fill(2);
        let mut found = vec![0; 1 << 20];
        to.read_exact_at(&mut found, 0).unwrap();
        assert!(found == want);
        copy_data(&from, &to, 0x20000, 1 << 20).unwrap();
        assert!(copy_range(&from, &to, 0, 2 << 20).is_err(), "it was cut short");
    }

    #[test]
    fn what_is_read_is_written_with_holes() {
        let to = tempfile::tempfile().unwrap();
        let end = 3 << 20;
        to.set_len(end).unwrap();
        let read = |part: &mut [u8], at: u64| {
            part.fill(0);
            if (1 << 20..2 << 20).contains(&at) {
                part[..4096].fill(at as u8 | 1);
            }
            Ok(())
        };
        copy_read(read, &to, 0, end).unwrap();
        assert!(to.metadata().unwrap().blocks() * 512 < 64 << 10);
        let mut found = [0; 2];
        to.read_exact_at(&mut found, (1 << 20) + 4095).unwrap();
        assert_eq!(found, [1, 0]);
    }
}
