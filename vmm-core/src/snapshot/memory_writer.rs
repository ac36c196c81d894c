//! A memory file in the making: guest memory is written to it, from where it is mapped, while the guest runs or not.
//!
//! The guest may write a page while it is read here. What then comes into the file is of no use, and does no harm: whoever
//! writes a running guest's memory has its writes logged, and writes that page again.
#![allow(unsafe_code, reason = "RAM is written to a file from where it is mapped")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::memory_file::flat::not_zero;
use super::memory_file::{MAX_WRITE, PAGE, Pages, Run, data_ranges};
use crate::memory::{GuestRam, OF_FILE, PRESENT, SWAPPED, page_table};

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// What is no hole.
    pub runs: Vec<Run>,
}

impl Written {
    /// How many bytes that is.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|(_, bytes)| bytes).sum()
    }

    /// CRC-32 of the pages that are not zero, read from the file.
    pub fn crc32(&self, file: &File) -> io::Result<u32> {
        let mut hasher = crc32fast::Hasher::new();
        let mut buffer = vec![0; MAX_WRITE as usize];
        for &(offset, bytes) in &self.runs {
            for at in (0..bytes).step_by(MAX_WRITE as usize) {
                let part = &mut buffer[..(bytes - at).min(MAX_WRITE) as usize];
                file.read_exact_at(part, offset + at)?;
                not_zero(part).for_each(|(from, to)| hasher.update(&part[from..to]));
            }
        }
        Ok(hasher.finalize())
    }
}

/// Writes guest memory to a file, which begins as one hole. A page may be written any number of times.
pub struct MemoryWriter {
    file: Arc<File>,
    /// What of the file is no hole.
    written: Pages,
    /// Pages of zeroes are written, too.
    zeroes: bool,
    /// Whether the file is still wanted.
    is_wanted: Box<dyn Fn() -> bool + Send>,
}

impl MemoryWriter {
    /// Begins to write `bytes` bytes of memory to an empty file. Pages of zeroes are holes; with `zeroes` only what is never
    /// written is one, so that the file itself says which pages it has.
    pub fn new(file: Arc<File>, bytes: u64, zeroes: bool) -> io::Result<Self> {
        file.set_len(bytes)?;
        Ok(Self { file, written: Pages::none(bytes), zeroes, is_wanted: Box::new(|| true) })
    }

    /// The same, which ends early, with an error, once `is_wanted` says no.
    pub fn while_wanted(self, is_wanted: impl Fn() -> bool + Send + 'static) -> Self {
        Self { is_wanted: Box::new(is_wanted), ..self }
    }

    /// Writes these pages as they are now.
    pub fn write(&mut self, ram: &GuestRam, pages: &Pages) -> io::Result<()> {
        let mut start = 0;
        for region in ram.regions() {
            for (offset, bytes) in pages.runs(start, start + region.len) {
                for at in (0..bytes).step_by(MAX_WRITE as usize) {
                    if !(self.is_wanted)() {
                        return Err(io::ErrorKind::Interrupted.into());
                    }
                    let piece = Piece {
                        host: region.host_addr + (offset + at - start),
                        offset: offset + at,
                        bytes: (bytes - at).min(MAX_WRITE),
                    };
                    self.write_piece(piece)?;
                }
            }
            start += region.len;
        }
        Ok(())
    }

    /// Makes what was written so far last, so that what is written later does not wait for the disk.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// What is in the file.
    pub fn written(&self) -> Written {
        Written { runs: self.written.runs(0, self.written.bytes()).collect() }
    }

    fn write_piece(&mut self, piece: Piece) -> io::Result<()> {
        let mut at = 0;
        while at < piece.bytes {
            let is_hole = !self.zeroes && piece.is_zero(at);
            let same = |&at: &u64| (!self.zeroes && piece.is_zero(at)) == is_hole;
            let pages = (at..piece.bytes).step_by(PAGE as usize);
            let end = pages.skip(1).find(|at| !same(at)).unwrap_or(piece.bytes);
            match is_hole {
                true => self.make_hole(piece.offset + at, end - at)?,
                false => {
                    piece.write(at..end, &self.file)?;
                    self.written.add_range(piece.offset + at, end - at);
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Makes zeroes of a range, of which something may have been written before.
    fn make_hole(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        let runs: Vec<Run> = self.written.runs(offset, offset + bytes).collect();
        for (offset, bytes) in runs {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(&*self.file, flags, offset, bytes) {
                Ok(()) => self.written.remove_range(offset, bytes),
                // A file system without holes keeps them as pages.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    self.file.write_all_at(&vec![0; bytes as usize], offset)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Whole pages of guest memory, at most [`MAX_WRITE`] bytes, which the guest may write meanwhile.
#[derive(Clone, Copy)]
struct Piece {
    /// Where it is mapped.
    host: u64,
    /// Where it is in the file.
    offset: u64,
    bytes: u64,
}

impl Piece {
    /// Whether the page at `at` is zero.
    fn is_zero(&self, at: u64) -> bool {
        let words = (self.host + at) as *const u64;
        // Most pages that are not zero say so in their first bytes.
        (0..PAGE as usize / 8).step_by(16).all(|first| {
            // SAFETY: the piece lies in a mapping of guest memory, to which there is no reference. The guest may write it
            // at any time, and any value will do.
            (first..first + 16).fold(0, |all, word| all | unsafe { words.add(word).read_volatile() }) == 0
        })
    }

    /// Writes a part of it to its place in `file`.
    fn write(&self, part: std::ops::Range<u64>, file: &File) -> io::Result<()> {
        let mut at = part.start;
        while at < part.end {
            let (from, len) = ((self.host + at) as *const libc::c_void, (part.end - at) as usize);
            // SAFETY: the part lies in a mapping of guest memory, which the kernel only reads. What it reads while the
            // guest writes there is the kernel's to decide.
            let done =
                unsafe { libc::pwrite(file.as_raw_fd(), from, len, (self.offset + at) as libc::off_t) };
            match done {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                1.. => at += done as u64,
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }
}

/// Pages of the memory that may be other than zero: those that were touched, and those of the file below.
pub fn touched(ram: &GuestRam) -> io::Result<Pages> {
    let mut pages = match ram.image() {
        Some(image) => image.data(),
        None => Pages::none(ram.size()),
    };
    // Before the page table is looked at, into which they go.
    if let Some(pending) = ram.faults().map(|faults| faults.pending(ram.size())) {
        pages.add_all(&pending);
    }
    // Others may have touched them, of which our page table does not know.
    if let Some(file) = ram.shared_file() {
        for (start, end) in data_ranges(file, ram.size())? {
            pages.add_range(start, end - start);
        }
        return Ok(pages);
    }
    let mut start = 0;
    for region in ram.regions() {
        let maps_file = ram.image().is_some();
        page_table(region, |offset, entry| {
            if entry & (PRESENT | SWAPPED) != 0 && (entry & OF_FILE == 0 || !maps_file) {
                pages.add(start + offset);
            }
        })?;
        start += region.len;
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::Backing;

    const SIZE: u64 = 8 << 20;

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn memory(ram: &GuestRam) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    fn writer(zeroes: bool) -> (Arc<File>, MemoryWriter) {
        let file = Arc::new(tempfile::tempfile().unwrap());
        (file.clone(), MemoryWriter::new(file, SIZE, zeroes).unwrap())
    }

    fn set(ram: &GuestRam, page: u64, pages: usize, byte: u8) {
        let bytes = vec![byte; pages * PAGE as usize];
        ram.memory().write_slice(&bytes, GuestAddress(page * PAGE)).unwrap();
    }

    fn dirty(ram: &GuestRam) -> Pages {
        let mut pages = Pages::none(SIZE);
        ram.take_dirty_pages(&mut pages);
        pages
    }

    #[test]
    fn what_is_written_again_is_as_if_it_were_written_once() {
        let ram = GuestRam::new(SIZE, Backing::default(), None).unwrap();
        set(&ram, 0, 10, 7);
        set(&ram, 300, 600, 8);
        let (file, mut again) = writer(false);
        again.write(&ram, &touched(&ram).unwrap()).unwrap();
        let full = file.metadata().unwrap().blocks();
        dirty(&ram);
        // Something becomes zero, in the middle and at an end, something comes, and something changes.
        set(&ram, 2, 3, 0);
        set(&ram, 300, 500, 0);
        set(&ram, 1000, 2, 9);
        set(&ram, 899, 1, 6);
        again.write(&ram, &dirty(&ram)).unwrap();
        let (other, mut once) = writer(false);
        once.write(&ram, &touched(&ram).unwrap()).unwrap();
        assert!(content(&file) == memory(&ram) && content(&other) == memory(&ram));
        assert_eq!(again.written(), once.written());
        assert_eq!(
            again.written().runs,
            [(0, 2 * PAGE), (5 * PAGE, 5 * PAGE), (800 * PAGE, 100 * PAGE), (1000 * PAGE, 2 * PAGE)]
        );
        assert_eq!(again.written().crc32(&file).unwrap(), once.written().crc32(&other).unwrap());
        assert!(file.metadata().unwrap().blocks() < full, "zeroes are holes again");
    }

    #[test]
    fn a_file_that_says_which_pages_it_has_keeps_those_that_became_zero() {
        let ram = GuestRam::new(SIZE, Backing::default(), None).unwrap();
        set(&ram, 4, 2, 7);
        let (file, mut writer) = writer(true);
        writer.write(&ram, &dirty(&ram)).unwrap();
        set(&ram, 5, 1, 0);
        set(&ram, 9, 1, 0);
        writer.write(&ram, &dirty(&ram)).unwrap();
        assert_eq!(data_ranges(&file, SIZE).unwrap(), [(4 * PAGE, 6 * PAGE), (9 * PAGE, 10 * PAGE)]);
        assert_eq!(writer.written().runs, [(4 * PAGE, 2 * PAGE), (9 * PAGE, PAGE)]);
        assert!(content(&file) == memory(&ram));
    }

    #[test]
    fn memory_that_is_written_meanwhile_is_right_once_its_writer_rests() {
        let ram = GuestRam::new(SIZE, Backing::default(), None).unwrap();
        set(&ram, 0, (SIZE / PAGE) as usize, 1);
        let (file, mut writer) = writer(false);
        let rest = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for turn in 0_u64.. {
                    if rest.load(Ordering::Acquire) {
                        break;
                    }
                    set(&ram, turn * 37 % 2000, 3, (turn % 5) as u8);
                }
            });
            dirty(&ram);
            writer.write(&ram, &touched(&ram).unwrap()).unwrap();
            for _ in 0..3 {
                writer.write(&ram, &dirty(&ram)).unwrap();
            }
            rest.store(true, Ordering::Release);
        });
        writer.write(&ram, &dirty(&ram)).unwrap();
        assert!(content(&file) == memory(&ram));
    }

    #[test]
    fn it_ends_early_when_it_is_told_to() {
        let ram = GuestRam::new(SIZE, Backing::default(), None).unwrap();
        set(&ram, 0, (SIZE / PAGE) as usize, 1);
        let pieces = AtomicU32::new(0);
        let mut writer = writer(false).1.while_wanted(move || pieces.fetch_add(1, Ordering::AcqRel) < 2);
        let error = writer.write(&ram, &dirty(&ram)).unwrap_err();
        assert_eq!((error.kind(), writer.written().bytes()), (io::ErrorKind::Interrupted, 2 * MAX_WRITE));
    }

    #[test]
    fn shared_memory_that_only_another_process_has_touched_is_written() {
        let ram = GuestRam::new(SIZE, Backing { shared: true, ..Backing::default() }, None).unwrap();
        // As another process does, which has the file mapped: our page table knows nothing of it.
        ram.shared_file().unwrap().write_all_at(&[5; 100], 7 * PAGE).unwrap();
        let (file, mut writer) = writer(false);
        writer.write(&ram, &touched(&ram).unwrap()).unwrap();
        assert_eq!(writer.written().runs, [(7 * PAGE, PAGE)]);
        assert!(content(&file) == memory(&ram));
    }
}
