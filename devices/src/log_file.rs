//! A file that takes what a guest writes to a console: nobody else's, and no larger than a limit.

use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Most bytes that a guest can make its console's file grow to.
pub const MAX: u64 = 64 << 20;

/// Who may read it: a guest's output is its owner's business.
const MODE: u32 = 0o600;

/// Why a file cannot take a console.
#[derive(Debug, thiserror::Error)]
pub enum LogFileError {
    /// What is written to a FIFO without a reader goes nowhere.
    #[error("it is a FIFO that nobody reads")]
    NoReader,
    /// Every file that a machine keeps open is locked.
    #[error("it is in use as a disk or as another console")]
    InUse,
    /// The kernel refused it.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The file. Writing to it ends silently at its limit: a write then takes no bytes.
#[derive(Debug)]
pub struct LogFile {
    file: File,
    path: PathBuf,
    /// Bytes that may still be written.
    room: u64,
    /// It was not there before, and nothing has been written: a machine that is never started leaves none.
    fresh: bool,
    begun: bool,
}

impl LogFile {
    /// Opens the file at `path`, which need not exist, and locks it. What is in it stays until [`Self::begin`].
    pub fn open(path: &Path, limit: u64) -> Result<Self, LogFileError> {
        // NONBLOCK: a FIFO that nobody reads must not keep us waiting.
        let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let mode = Mode::from_raw_mode(MODE);
        let opened = match rustix::fs::open(path, flags | OFlags::CREATE | OFlags::EXCL, mode) {
            Err(Errno::EXIST) => rustix::fs::open(path, flags, mode).map(|fd| (fd, false)),
            other => other.map(|fd| (fd, true)),
        };
        let is_fifo = || path.metadata().is_ok_and(|meta| meta.file_type().is_fifo());
        let (fd, fresh) = opened.map_err(|errno| match errno {
            Errno::NXIO if is_fifo() => LogFileError::NoReader,
            errno => LogFileError::Io(errno.into()),
        })?;
        let mut file = Self { file: fd.into(), path: path.into(), room: limit, fresh: false, begun: false };
        if file.is_regular()? {
            file.file.try_lock().map_err(|error| match error {
                TryLockError::WouldBlock => LogFileError::InUse,
                TryLockError::Error(error) => LogFileError::Io(error),
            })?;
        }
        // Only now: until it was locked, somebody else could take it.
        file.fresh = fresh;
        Ok(file)
    }

    fn is_regular(&self) -> io::Result<bool> {
        Ok(self.file.metadata()?.is_file())
    }

    /// Output is going to come: what an earlier machine wrote goes, but only once.
    pub fn begin(&mut self) -> io::Result<()> {
        match !std::mem::replace(&mut self.begun, true) && self.is_regular()? {
            true => self.file.set_len(0),
            false => Ok(()),
        }
    }

    /// Bytes that may still be written.
    pub fn room(&self) -> usize {
        usize::try_from(self.room).unwrap_or(usize::MAX)
    }

    /// Has `write` write [`Self::room`] bytes at most, and say how many it wrote.
    pub fn write_with(
        &mut self,
        write: impl FnOnce(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let written = write(self.file.as_fd())?;
        self.room = self.room.saturating_sub(written as u64);
        Ok(written)
    }
}

impl Write for LogFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let data = &data[..data.len().min(self.room())];
        self.write_with(|fd| Ok(rustix::io::write(fd, data)?))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LogFile {
    fn drop(&mut self) {
        if self.fresh && !self.begun {
            _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{DeviceKind, MachineShape};
    use crate::virtio::block;

    #[test]
    fn a_file_is_one_consoles_and_no_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [7; 512]).unwrap();
        let disk = block::Config::new(&path).open(&MachineShape::default()).unwrap();
        assert!(matches!(LogFile::open(&path, MAX), Err(LogFileError::InUse)));
        assert_eq!(std::fs::read(&path).unwrap(), [7; 512]);
        drop(disk);
        let _file = LogFile::open(&path, MAX).unwrap();
        assert!(matches!(LogFile::open(&path, MAX), Err(LogFileError::InUse)));
        assert!(block::Config::new(&path).open(&MachineShape::default()).is_err());
    }

    #[test]
    fn it_begins_once_and_ends_at_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "what was there").unwrap();
        let mut file = LogFile::open(&path, 5).unwrap();
        file.begin().unwrap();
        let written = [&b"abc"[..], b"def", b"g"].map(|part| file.write(part).unwrap());
        file.begin().unwrap();
        assert_eq!((written, file.room()), ([3, 2, 0], 0));
        assert_eq!(std::fs::read(&path).unwrap(), b"abcde");
    }

    #[test]
    fn a_fifo_needs_a_reader() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(matches!(LogFile::open(&path, MAX), Err(LogFileError::NoReader)));
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let _reader = rustix::fs::open(&path, flags, Mode::empty()).unwrap();
        assert!(LogFile::open(&path, MAX).is_ok());
        assert!(path.exists());
    }
}
