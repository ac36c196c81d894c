//! The memory file: a guest's RAM as the host maps it, page for page, with holes for what is zero.
#![allow(unsafe_code, reason = "a file is mapped over RAM, or read into it")]

pub mod flat;

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Advice, FsWord, SeekFrom, fadvise, fstatfs, seek};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use serde::{Deserialize, Serialize};

use crate::memory::RamRegion;

/// Bytes of a page, the unit of everything here.
pub const PAGE: u64 = 4096;
/// What is written with one call at most.
pub(super) const MAX_WRITE: u64 = 1 << 20;
/// How many pieces of diffs are mapped; more are copied, since a process can have about 65000 mappings.
const MAX_MAPPED: usize = 4096;
/// How many holes of a region are mapped as zeroes, at two mappings each; smaller ones are then left to the file. A process can
/// have about 65000 mappings, half of which are for what its guest gives back.
const MAX_HOLES: usize = 2048;
/// Bytes of a hole for which a mapping is worth its time, where the file system gives room in the page cache.
const MIN_HOLE: u64 = 64 << 10;
/// Of statfs(2).
const TMPFS_MAGIC: FsWord = 0x0102_1994;

/// How a restored guest gets its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryMode {
    /// The file is mapped, and pages are copied when the guest writes them. All guests of a snapshot share the rest.
    #[default]
    Map,
    /// All of it is read before the guest runs.
    Copy,
    /// A thread of ours reads what the guest asks for, and then the rest. What the guest touches first is kept beside the
    /// snapshot, and comes first for the next one. Shared memory and reserved huge pages are copied.
    Uffd,
}

/// Offset and length of a run of bytes.
pub type Run = (u64, u64);

/// A set of pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    bits: Vec<u64>,
}

impl Pages {
    /// No page of a memory of so many bytes.
    pub fn none(bytes: u64) -> Self {
        Self { bits: vec![0; (bytes / PAGE).div_ceil(64) as usize] }
    }

    /// Adds the page that the byte at `offset` is in.
    pub fn add(&mut self, offset: u64) {
        let page = offset / PAGE;
        if let Some(word) = self.bits.get_mut((page / 64) as usize) {
            *word |= 1 << (page % 64);
        }
    }

    /// Adds all pages of a range.
    pub fn add_range(&mut self, offset: u64, bytes: u64) {
        (offset..offset.saturating_add(bytes)).step_by(PAGE as usize).for_each(|page| self.add(page));
    }

    /// Takes all pages of a range out.
    pub fn remove_range(&mut self, offset: u64, bytes: u64) {
        for page in (offset..offset.saturating_add(bytes)).step_by(PAGE as usize).map(|offset| offset / PAGE)
        {
            if let Some(word) = self.bits.get_mut((page / 64) as usize) {
                *word &= !(1 << (page % 64));
            }
        }
    }

    /// Whether the page at `offset` is in it.
    pub fn contains(&self, offset: u64) -> bool {
        let page = offset / PAGE;
        self.bits.get((page / 64) as usize).is_some_and(|word| word & 1 << (page % 64) != 0)
    }

    /// Adds all pages of another set.
    pub fn add_all(&mut self, other: &Self) {
        self.bits.iter_mut().zip(&other.bits).for_each(|(word, more)| *word |= more);
    }

    /// Adds the pages that have a bit in `words`, of which the first stands for the page at `start`.
    pub fn add_bits(&mut self, start: u64, words: impl IntoIterator<Item = u64>) {
        for (i, word) in words.into_iter().enumerate().filter(|(_, word)| *word != 0) {
            for bit in (0..64).filter(|bit| word & 1 << bit != 0) {
                self.add(start + (i as u64 * 64 + bit) * PAGE);
            }
        }
    }

    /// Bytes of the memory that it is about, or some more.
    pub fn bytes(&self) -> u64 {
        self.bits.len() as u64 * 64 * PAGE
    }

    /// Takes all pages out.
    pub fn clear(&mut self) {
        self.bits.fill(0);
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.bits.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Runs of pages within a range.
    pub fn runs(&self, start: u64, end: u64) -> impl Iterator<Item = Run> + '_ {
        let mut at = start;
        std::iter::from_fn(move || {
            while at < end && !self.contains(at) {
                // A word without pages is passed at once.
                let word = self.bits.get((at / PAGE / 64) as usize).copied().unwrap_or(0);
                at = if word == 0 { (at / PAGE / 64 + 1) * 64 * PAGE } else { at + PAGE };
            }
            let first = at;
            while at < end && self.contains(at) {
                at += PAGE;
            }
            (first < at).then_some((first, at - first))
        })
    }
}

/// The memory of a snapshot: a file with all of it, and files of diffs over that, each with its pages.
#[derive(Clone, Debug)]
pub struct MemoryImage {
    bytes: u64,
    base: Arc<File>,
    /// Where the base is no hole. Found once, since clones share it.
    data: Arc<[(u64, u64)]>,
    over: Vec<(Arc<File>, Vec<Run>)>,
}

/// A memory file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum MemoryFileError {
    /// It cannot be read.
    #[error("cannot read the memory file '{path}': {source}")]
    Io {
        /// The file.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Its size is not the memory's.
    #[error("the memory file '{path}' has {found} bytes, and its snapshot says {said}; it is damaged")]
    Size {
        /// The file.
        path: String,
        /// Its size.
        found: u64,
        /// What the manifest says.
        said: u64,
    },
    /// Pages that are no pages of the memory.
    #[error("the snapshot's list of pages is damaged")]
    Pages,
    /// What is in it is not what was written.
    #[error("the memory file '{path}' has other contents than its snapshot says; it is damaged")]
    Contents {
        /// The file.
        path: String,
    },
}

/// Opens a memory file, which must have so many bytes.
fn open(path: &Path, bytes: u64) -> Result<Arc<File>, MemoryFileError> {
    let error = |source| MemoryFileError::Io { path: path.display().to_string(), source };
    let file = super::place::open_file(path).map_err(error)?;
    let found = file.metadata().map_err(error)?.len();
    if found != bytes {
        let path = path.display().to_string();
        return Err(MemoryFileError::Size { path, found, said: bytes });
    }
    Ok(Arc::new(file))
}

/// Fails unless these are runs of pages of a memory of so many bytes, from the lowest up.
pub fn check_pages(pages: &[Run], memory: u64) -> Result<(), MemoryFileError> {
    let mut end = 0;
    for &(offset, bytes) in pages {
        let aligned = offset.is_multiple_of(PAGE) && bytes.is_multiple_of(PAGE) && bytes > 0;
        let next = offset.checked_add(bytes).filter(|&next| next <= memory);
        match next {
            Some(next) if aligned && offset >= end => end = next,
            _ => return Err(MemoryFileError::Pages),
        }
    }
    Ok(())
}

/// Whether the memory file at `path` has anything but zeroes outside of these pages: then it is no diff's file.
pub fn has_more_than(path: &Path, bytes: u64, pages: &[Run]) -> Result<bool, MemoryFileError> {
    check_pages(pages, bytes)?;
    let file = open(path, bytes)?;
    let mut outside = Pages::none(bytes);
    let mut look = || -> io::Result<bool> {
        for (start, end) in data_ranges(&file, bytes)? {
            outside.add_range(start, end - start);
        }
        pages.iter().for_each(|&(offset, len)| outside.remove_range(offset, len));
        let mut buffer = vec![0; MAX_WRITE as usize];
        for (offset, len) in outside.runs(0, bytes) {
            for at in (0..len).step_by(MAX_WRITE as usize) {
                let part = &mut buffer[..(len - at).min(MAX_WRITE) as usize];
                file.read_exact_at(part, offset + at)?;
                if !part.chunks_exact(PAGE as usize).all(is_zero) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    };
    look().map_err(|source| MemoryFileError::Io { path: path.display().to_string(), source })
}

impl MemoryImage {
    /// The file at `path` with all `bytes` of a memory.
    pub fn open(path: &Path, bytes: u64) -> Result<Self, MemoryFileError> {
        let base = open(path, bytes)?;
        let error = |source| MemoryFileError::Io { path: path.display().to_string(), source };
        let data = data_ranges(&base, bytes).map_err(error)?.into();
        Ok(Self { bytes, base, data, over: Vec::new() })
    }

    /// Puts the pages of a diff's file over what is there.
    pub fn add_diff(&mut self, path: &Path, pages: &[Run]) -> Result<(), MemoryFileError> {
        check_pages(pages, self.bytes)?;
        self.over.push((open(path, self.bytes)?, pages.to_vec()));
        Ok(())
    }

    /// Bytes of the memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether its files still have all that they had.
    pub(crate) fn is_whole(&self) -> bool {
        let whole = |file: &Arc<File>| file.metadata().is_ok_and(|meta| meta.len() >= self.bytes);
        whole(&self.base) && self.over.iter().all(|(file, _)| whole(file))
    }

    /// The file with all of the memory, to be mapped privately.
    pub fn base(&self) -> &Arc<File> {
        &self.base
    }

    /// Pages that may be other than zero.
    pub(crate) fn data(&self) -> Pages {
        let mut pages = Pages::none(self.bytes);
        for &(start, end) in &*self.data {
            pages.add_range(start, end - start);
        }
        for &(offset, bytes) in self.over.iter().flat_map(|(_, runs)| runs) {
            pages.add_range(offset, bytes);
        }
        pages
    }

    /// Puts zeroes over the holes of a region that maps the base from `offset` on, and then the diffs.
    pub fn lay_over(&self, region: RamRegion, offset: u64) -> io::Result<()> {
        self.lay_zeroes(region, offset)?;
        let mapped = self.over.iter().map(|(_, runs)| runs.len()).sum::<usize>() <= MAX_MAPPED;
        self.pieces(region, offset, |file, at, host, bytes| match mapped {
            true => {
                // SAFETY: the range lies in a mapping of the guest's memory, which nobody uses yet; it is replaced by
                // another private mapping with the same rights.
                unsafe { mmap(host as *mut _, bytes as usize, RIGHTS, OVER, file, at) }?;
                Ok(())
            }
            false => read_into(file, at, host, bytes),
        })
    }

    /// A page of a hole is made in the page cache before it is copied into the guest's memory: that takes twice the time and
    /// memory, and on a tmpfs without room it fails, which no guest survives.
    fn lay_zeroes(&self, region: RamRegion, offset: u64) -> io::Result<()> {
        let end = offset + region.len;
        let starts = std::iter::once(offset).chain(self.data.iter().map(|range| range.1));
        let ends = self.data.iter().map(|range| range.0).chain([end]);
        let holes = starts.zip(ends).map(|(start, next)| (start.max(offset), next.min(end)));
        let in_memory = fstatfs(&self.base).is_ok_and(|stat| stat.f_type == TMPFS_MAGIC);
        let least = if in_memory { PAGE } else { MIN_HOLE };
        let mut holes: Vec<(u64, u64)> = holes.filter(|(start, next)| start + least <= *next).collect();
        if holes.len() > MAX_HOLES {
            holes.sort_unstable_by_key(|(start, next)| std::cmp::Reverse(next - start));
            holes.truncate(MAX_HOLES);
        }
        for (start, next) in holes {
            let host = region.host_addr + (start - offset);
            // SAFETY: as for the diffs.
            unsafe { mmap_anonymous(host as *mut _, (next - start) as usize, RIGHTS, OVER) }?;
        }
        Ok(())
    }

    /// Lets the host read what is at `offset` ahead, as far as it wants to.
    pub fn will_be_read(&self, offset: u64, bytes: u64) {
        for file in std::iter::once(&self.base).chain(self.over.iter().map(|(file, _)| file)) {
            // It is advice.
            _ = fadvise(file, offset, NonZeroU64::new(bytes), Advice::WillNeed);
        }
    }

    /// Reads what is at `offset`.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.base.read_exact_at(to, offset)?;
        let end = offset + to.len() as u64;
        for (file, runs) in &self.over {
            let first = runs.partition_point(|&(start, bytes)| start + bytes <= offset);
            for &(start, bytes) in runs[first..].iter().take_while(|(start, _)| *start < end) {
                let (from, till) = (start.max(offset), (start + bytes).min(end));
                file.read_exact_at(&mut to[(from - offset) as usize..(till - offset) as usize], from)?;
            }
        }
        Ok(())
    }

    /// Reads everything into a region of zeroes that begins at `offset`.
    pub fn read_into(&self, region: RamRegion, offset: u64) -> io::Result<()> {
        for &(start, end) in &*self.data {
            let (start, end) = (start.max(offset), end.min(offset + region.len));
            if start < end {
                read_into(&self.base, start, region.host_addr + (start - offset), end - start)?;
            }
        }
        self.pieces(region, offset, read_into)
    }

    /// Calls `piece` for each run of a diff in a region: with its file, where it is in that, where it goes, and how many
    /// bytes it has.
    fn pieces(
        &self,
        region: RamRegion,
        offset: u64,
        mut piece: impl FnMut(&File, u64, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        for (file, runs) in &self.over {
            for &(start, bytes) in runs {
                let (start, end) = (start.max(offset), (start + bytes).min(offset + region.len));
                if start < end {
                    piece(file, start, region.host_addr + (start - offset), end - start)?;
                }
            }
        }
        Ok(())
    }
}

/// How guest memory is mapped over what is mapped already.
const RIGHTS: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);
const OVER: MapFlags = MapFlags::PRIVATE.union(MapFlags::FIXED).union(MapFlags::NORESERVE);

/// Reads `bytes` bytes of `file` to this address of guest memory. Holes are read, too.
fn read_into(file: &File, at: u64, host: u64, bytes: u64) -> io::Result<()> {
    // SAFETY: the callers give a range of the guest's memory, which nobody uses yet.
    let to = unsafe { std::slice::from_raw_parts_mut(host as *mut u8, bytes as usize) };
    file.read_exact_at(to, at)
}

/// The ranges of a file that are no holes, in whole pages, as start and end.
pub fn data_ranges(file: &File, bytes: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while at < bytes {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // A file system that cannot tell has no holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(vec![(0, bytes)]),
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(bytes);
        let start = start / PAGE * PAGE;
        at = end.next_multiple_of(PAGE);
        match ranges.last_mut() {
            Some(last) if last.1 >= start => last.1 = at.max(last.1),
            _ => ranges.push((start, at)),
        }
    }
    Ok(ranges)
}

/// Whether a page has zeroes only.
fn is_zero(page: &[u8]) -> bool {
    page.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::memory_writer::{MemoryWriter, touched};
    use super::*;
    use crate::memory::{Backing, GuestRam};

    const SIZE: u64 = 8 << 20;

    fn read(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// Writes all that is not zero.
    fn write_all(ram: &GuestRam, file: File) -> MemoryWriter {
        write(ram, &touched(ram).unwrap(), file, false)
    }

    fn write(ram: &GuestRam, pages: &Pages, file: File, zeroes: bool) -> MemoryWriter {
        let mut writer = MemoryWriter::new(file.into(), SIZE, zeroes).unwrap();
        writer.write(ram, pages).unwrap();
        writer
    }

    #[test]
    fn memory_is_written_with_holes_and_comes_back() {
        let ram = GuestRam::new(SIZE, Backing::default(), None).unwrap();
        ram.memory().write_slice(&[7; 5000], GuestAddress(0x3000)).unwrap();
        ram.memory().write_slice(&[0; 5000], GuestAddress(0x10000)).unwrap();
        ram.memory().write_slice(&[9], GuestAddress(SIZE - 1)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let file = File::create_new(&path).unwrap();
        let writer = write_all(&ram, file);
        assert_eq!(writer.written().runs, [(0x3000, 2 * PAGE), (SIZE - PAGE, PAGE)], "zeroes are holes");
        let image = Arc::new(MemoryImage::open(&path, SIZE).unwrap());
        for mode in [MemoryMode::Map, MemoryMode::Copy] {
            let again = GuestRam::new(SIZE, Backing::default(), Some((image.clone(), mode))).unwrap();
            again.memory().write_slice(&[1], GuestAddress(0x40_0000)).unwrap();
            let second = tempfile::tempfile().unwrap();
            write_all(&again, second.try_clone().unwrap());
            let mut want = read(&File::open(&path).unwrap());
            want[0x40_0000] = 1;
            assert!(read(&second) == want, "{mode:?}");
        }
        assert_eq!(read(&File::open(&path).unwrap())[0x40_0000], 0, "the snapshot stays as it is");
    }

    #[test]
    fn a_diff_lies_over_its_base_with_its_zeroes_too() {
        let dir = tempfile::tempdir().unwrap();
        let (base, diff) = (dir.path().join("base"), dir.path().join("diff"));
        let ram = GuestRam::new(SIZE, Backing::default(), None).unwrap();
        ram.memory().write_slice(&[7; 0x4000], GuestAddress(0)).unwrap();
        write_all(&ram, File::create_new(&base).unwrap());
        ram.memory().write_slice(&[0; 0x1000], GuestAddress(0x1000)).unwrap();
        ram.memory().write_slice(&[8; 0x1000], GuestAddress(0x20_0000)).unwrap();
        let mut pages = Pages::none(SIZE);
        pages.add(0x1000);
        pages.add_range(0x20_0000, 0x1000);
        write(&ram, &pages, File::create_new(&diff).unwrap(), false);
        let mut image = MemoryImage::open(&base, SIZE).unwrap();
        let runs: Vec<_> = pages.runs(0, SIZE).collect();
        let alone = tempfile::tempfile().unwrap();
        write(&ram, &pages, alone.try_clone().unwrap(), true);
        assert_eq!(data_ranges(&alone, SIZE).unwrap(), [(0x1000, 0x2000), (0x20_0000, 0x20_1000)]);
        image.add_diff(&diff, &runs).unwrap();
        for mode in [MemoryMode::Map, MemoryMode::Copy] {
            let again = GuestRam::new(SIZE, Backing::default(), Some((image.clone().into(), mode))).unwrap();
            let files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
            write_all(&again, files[0].try_clone().unwrap());
            write_all(&ram, files[1].try_clone().unwrap());
            assert!(read(&files[0]) == read(&files[1]), "{mode:?}");
        }
        for wrong in [[(1, PAGE)], [(0, 1)], [(0, 0)], [(SIZE, PAGE)], [(u64::MAX - 4095, PAGE)]] {
            assert!(matches!(image.add_diff(&diff, &wrong), Err(MemoryFileError::Pages)), "{wrong:?}");
        }
        assert!(image.add_diff(&diff, &[(PAGE, PAGE), (0, PAGE)]).is_err(), "not in order");
        assert!(!has_more_than(&diff, SIZE, &runs).unwrap(), "a diff has its pages only");
        assert!(has_more_than(&base, SIZE, &runs).unwrap());
        assert!(has_more_than(&base, SIZE, &[(0, u64::MAX / PAGE * PAGE)]).is_err(), "not of this memory");
    }

    #[test]
    fn runs_are_found_across_words() {
        let mut pages = Pages::none(1 << 30);
        pages.add_range(63 * PAGE, 3 * PAGE);
        pages.add((1 << 30) - 1);
        pages.add(1 << 30);
        assert_eq!(
            pages.runs(0, 1 << 30).collect::<Vec<_>>(),
            [(63 * PAGE, 3 * PAGE), ((1 << 30) - PAGE, PAGE)]
        );
        assert_eq!(pages.runs(64 * PAGE, 65 * PAGE).collect::<Vec<_>>(), [(64 * PAGE, PAGE)]);
        assert_eq!(pages.count(), 4);
    }

    #[test]
    fn another_size_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE - PAGE).unwrap();
        let error = MemoryImage::open(file.path(), SIZE).unwrap_err().to_string();
        assert!(error.contains("has 8384512 bytes"), "{error}");
        assert!(MemoryImage::open(Path::new("/"), SIZE).is_err());
    }
}
