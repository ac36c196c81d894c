//! Windows: files of devices in the guest's address space, which are no RAM.
#![allow(unsafe_code, reason = "a file is mapped over a part of another mapping, by address")]

use std::ffi::c_void;
use std::io;
use std::ptr::null_mut;

use devices::model::Window;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::memory::RamRegion;

/// A file could not be put into the guest's address space.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// The end of a file that the guest may write would not be kept.
    #[error(
        "{bytes} bytes cannot be memory that the guest writes; extend the file to a multiple of 2 MiB with truncate(1), \
         or add ',ro'"
    )]
    Size {
        /// Bytes of the file.
        bytes: u64,
    },
    /// The kernel refused the mapping.
    #[error(
        "cannot map {mib} MiB: {source}; check that the file is a disk image, and the limit of address space (ulimit -v)"
    )]
    Map {
        /// Size in MiB.
        mib: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A mapped [`Window`], unmapped when this is dropped.
#[derive(Debug)]
pub struct MappedWindow {
    region: RamRegion,
}

impl MappedWindow {
    /// Maps `window` for the guest physical address `guest_addr`.
    pub fn new(guest_addr: u64, window: Window<'_>) -> Result<Self, WindowError> {
        let Window { file, bytes, read_only } = window;
        let error = |source| WindowError::Map { mib: bytes >> 20, source };
        let len = bytes.checked_next_multiple_of(Window::ALIGN).filter(|&len| len > 0);
        let len = len.ok_or_else(|| error(io::ErrorKind::InvalidInput.into()))?;
        if !read_only && len != bytes {
            return Err(WindowError::Size { bytes });
        }
        let write = if read_only { ProtFlags::empty() } else { ProtFlags::WRITE };
        let prot = ProtFlags::READ | write;
        let size = |bytes| usize::try_from(bytes).map_err(|_| error(io::ErrorKind::InvalidInput.into()));
        let (len, file_len) = (size(len)?, size(bytes)?);
        // Zeroes for the tail: past its last page, a file is not memory.
        // SAFETY: the kernel chooses a range that nothing else is in.
        let start = unsafe { mmap_anonymous(null_mut(), len, prot, MapFlags::PRIVATE | MapFlags::NORESERVE) };
        let host_addr = start.map_err(|errno| error(errno.into()))? as u64;
        let window = Self { region: RamRegion { guest_addr, len: len as u64, host_addr, read_only } };
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the range lies in the mapping above, which is ours and to which there is no reference.
        unsafe { mmap(host_addr as *mut c_void, file_len, prot, flags, file, 0) }
            .map_err(|errno| error(errno.into()))?;
        Ok(window)
    }

    /// Where it is.
    pub fn region(&self) -> RamRegion {
        self.region
    }
}

impl Drop for MappedWindow {
    fn drop(&mut self) {
        // SAFETY: the range is this window's alone, and a VM that has it in a slot keeps the window.
        _ = unsafe { munmap(self.region.host_addr as *mut c_void, self.region.len as usize) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn file(bytes: u64) -> File {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(b"first").expect("room");
        file.set_len(bytes).expect("room");
        file
    }

    fn byte(window: &MappedWindow, offset: u64) -> *mut u8 {
        assert!(offset < window.region.len);
        (window.region.host_addr + offset) as *mut u8
    }

    #[test]
    fn the_file_is_there_and_zeroes_follow_it() {
        let file = file(3 * MIB + 5);
        file.write_at(b"last", 3 * MIB + 1).expect("room");
        let window = Window { file: file.as_fd(), bytes: 3 * MIB + 5, read_only: true };
        let window = MappedWindow::new(4 << 30, window).expect("mapped");
        let region = window.region();
        assert_eq!((region.guest_addr, region.len, region.read_only), (4 << 30, 4 * MIB, true));
        // SAFETY: all are in the mapping, which nobody writes.
        let bytes = [0, 3 * MIB + 4, 3 * MIB + 5, 3 * MIB + 8192, 4 * MIB - 1]
            .map(|offset| unsafe { byte(&window, offset).read_volatile() });
        assert_eq!(bytes, [b'f', b't', 0, 0, 0]);
    }

    #[test]
    fn what_is_written_is_in_the_file() {
        let file = file(2 * MIB);
        let window = Window { file: file.as_fd(), bytes: 2 * MIB, read_only: false };
        let window = MappedWindow::new(4 << 30, window).expect("mapped");
        // SAFETY: it is in the mapping, and no reference to it is alive.
        unsafe { byte(&window, 2 * MIB - 1).write_volatile(7) };
        let mut last = [0];
        file.read_exact_at(&mut last, 2 * MIB - 1).expect("it is there");
        assert_eq!(last, [7]);
    }

    #[test]
    fn files_that_would_lose_what_is_written_are_refused() {
        let file = file(3 * MIB);
        for (bytes, read_only, want) in [
            (3 * MIB, false, "3145728 bytes cannot be memory that the guest writes"),
            (0, true, "cannot map 0 MiB"),
            (u64::MAX, true, "cannot map"),
            (1 << 62, true, "cannot map"),
        ] {
            let window = Window { file: file.as_fd(), bytes, read_only };
            let error = MappedWindow::new(4 << 30, window).expect_err("no window").to_string();
            assert!(error.contains(want), "{error}");
        }
    }
}
