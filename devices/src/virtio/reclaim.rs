//! Guest memory that the guest does not use, given back to the host.
//!
//! What is given back reads as zeroes when the guest touches it again. Only whole pages go, and none of a reserve of
//! huge pages: they were set aside for this guest, and one that is given back may not be there when it is needed.
#![allow(unsafe_code, reason = "memory is given back by address")]

use std::fs;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

use crate::GuestMemory;

/// Bytes of a page, of the guest's as of the host's.
pub const PAGE: u64 = 4096;

/// The region type of [`GuestMemory`].
type Region = GuestRegionMmap<Option<vm_memory::bitmap::AtomicBitmap>>;

/// What came of giving memory back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Bytes that are the host's again.
    pub bytes: u64,
    /// Bytes that are not guest memory.
    pub outside: u64,
}

/// Mappings that this process has for the zeroes of its guests: a guest decides how many there are.
static MAPPINGS: Mappings = Mappings { made: AtomicU64::new(0), refused: AtomicU64::new(0) };

/// Most of them: a process can have 65530 (vm.max_map_count), and needs some for itself.
const MAX_MAPPINGS: u64 = 32 << 10;
/// How many are refused before they are counted again: that takes a while.
const RECOUNT: u64 = 4096;

/// Counts mappings. One that is made splits another in two, but for those that it touches, which the kernel joins.
struct Mappings {
    /// As many as there can be, counting all that were made since the last count.
    made: AtomicU64,
    refused: AtomicU64,
}

impl Mappings {
    /// Whether there may be one more.
    fn has_room(&self) -> bool {
        if self.made.fetch_add(2, Ordering::Relaxed) < MAX_MAPPINGS {
            return true;
        }
        if !self.refused.fetch_add(1, Ordering::Relaxed).is_multiple_of(RECOUNT) {
            return false;
        }
        // Zeroes that lie side by side are one mapping.
        let count = fs::read("/proc/self/maps")
            .map_or(MAX_MAPPINGS, |maps| maps.iter().filter(|&&byte| byte == b'\n').count() as u64);
        self.made.store(count, Ordering::Relaxed);
        count < MAX_MAPPINGS
    }
}

/// Gives `len` bytes from the guest physical address `start` back.
pub fn guest_range(mem: &GuestMemory, start: u64, len: u64) -> io::Result<Reclaimed> {
    let mut done = Reclaimed::default();
    let (mut at, end) = (start, start.saturating_add(len));
    while at < end {
        let Some((region, offset)) = mem.to_region_addr(GuestAddress(at)) else {
            // Up to the next region, if there is one.
            let next = mem.iter().map(|region| region.start_addr().raw_value()).find(|&base| base > at);
            let next = next.unwrap_or(end).min(end);
            done.outside += next - at;
            at = next;
            continue;
        };
        let part = (end - at).min(region.len() - offset.raw_value());
        done.bytes += discard(region, offset, part)?;
        at += part;
    }
    Ok(done)
}

/// Gives the piece of guest memory back that is mapped at these bytes of this process. Returns how many went.
pub fn mapped_range(mem: &GuestMemory, piece: &libc::iovec) -> io::Result<u64> {
    let address = piece.iov_base as u64;
    for region in mem.iter() {
        let base = region.get_mmap().as_ptr() as u64;
        if let Some(offset) = address.checked_sub(base).filter(|&offset| offset < region.len()) {
            let len = (piece.iov_len as u64).min(region.len() - offset);
            return discard(region, MemoryRegionAddress(offset), len);
        }
    }
    Ok(0)
}

/// Gives `len` bytes at `offset`, which lie in the region, back.
fn discard(region: &Region, offset: MemoryRegionAddress, len: u64) -> io::Result<u64> {
    let start = offset.raw_value().next_multiple_of(PAGE);
    let end = (offset.raw_value() + len) / PAGE * PAGE;
    let flags = region.get_mmap().flags();
    if start >= end || region.is_hugetlbfs() == Some(true) {
        return Ok(0);
    }
    let len = (end - start) as usize;
    let address = region.get_host_address(MemoryRegionAddress(start)).map_err(io::Error::other)?.cast();
    // SAFETY: the range lies in one mapping of guest memory, which stays mapped. Its content may change at any time
    // for all who hold it, since the guest can write it; turning into zeroes is one such change.
    unsafe {
        match (flags & libc::MAP_SHARED, flags & libc::MAP_ANONYMOUS) {
            // A private view of a file, below which are no zeroes.
            (0, 0) if MAPPINGS.has_room() => {
                let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
                mmap_anonymous(address, len, ProtFlags::READ | ProtFlags::WRITE, flags).map(drop)
            }
            // It turns into zeroes, and stays ours.
            (0, 0) => {
                std::ptr::write_bytes(address.cast::<u8>(), 0, len);
                region.bitmap().mark_dirty(start as usize, len);
                return Ok(0);
            }
            (0, _) => madvise(address, len, Advice::LinuxDontNeed),
            _ => madvise(address, len, Advice::LinuxRemove),
        }
    }?;
    region.bitmap().mark_dirty(start as usize, (end - start) as usize);
    Ok(end - start)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, FileOffset};

    use super::*;

    const SIZE: usize = 16 * PAGE as usize;

    #[test]
    fn a_guest_cannot_use_up_the_mappings_of_its_process() {
        let size = 80_000 * PAGE as usize;
        let file = tempfile::tempfile().unwrap();
        file.set_len(size as u64).unwrap();
        file.write_all_at(&[7; 4 * PAGE as usize], 79_000 * PAGE).unwrap();
        let mapping = MmapRegionBuilder::new_with_bitmap(size, None)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file, 0))
            .build()
            .unwrap();
        let region = Region::new(mapping, GuestAddress(0)).unwrap();
        let mem = GuestMemory::from_regions(vec![region]).unwrap();
        let pieces: u64 =
            (0..80_000).step_by(2).map(|page| guest_range(&mem, page * PAGE, PAGE).unwrap().bytes).sum();
        let maps = fs::read_to_string("/proc/self/maps").unwrap().lines().count() as u64;
        assert!((MAX_MAPPINGS / 2..MAX_MAPPINGS + 1000).contains(&maps), "{maps}");
        assert!(pieces >= MAX_MAPPINGS / 4 * PAGE, "{pieces}");
        for (page, want) in [(0, 0), (79_000, 0), (79_001, 7), (79_002, 0)] {
            let byte: u8 = mem.read_obj(GuestAddress(page * PAGE)).unwrap();
            assert_eq!(byte, want, "page {page}");
        }
    }

    #[test]
    fn a_private_view_of_a_file_gives_memory_back_and_leaves_the_file() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; SIZE], 0).unwrap();
        let page = std::num::NonZeroUsize::new(PAGE as usize).unwrap();
        let mapping = MmapRegionBuilder::new_with_bitmap(SIZE, Some(AtomicBitmap::new(SIZE, page)))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE)
            .with_file_offset(FileOffset::new(file.try_clone().unwrap(), 0))
            .build()
            .unwrap();
        let region = Region::new(mapping, GuestAddress(0)).unwrap();
        let mem = GuestMemory::from_regions(vec![region]).unwrap();
        mem.write_slice(&[9; 100], GuestAddress(PAGE + 50)).unwrap();
        let done = guest_range(&mem, PAGE, 2 * PAGE).unwrap();
        assert_eq!(done, Reclaimed { bytes: 2 * PAGE, outside: 0 });
        let mut bytes = vec![1; SIZE];
        mem.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        let page = PAGE as usize;
        assert!(bytes[page..3 * page].iter().all(|&byte| byte == 0));
        assert!(bytes[..page].iter().chain(&bytes[3 * page..]).all(|&byte| byte == 7));
        mem.write_slice(&[5], GuestAddress(PAGE)).unwrap();
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 7), "the file stays as it is");
    }
}
