//! Guest memory that the guest does not use, given back to the host.
//!
//! What is given back reads as zeroes when the guest touches it again. Only whole pages go, and none of a reserve of
//! huge pages: they were set aside for this guest, and one that is given back may not be there when it is needed.
#![allow(unsafe_code, reason = "memory is given back by address")]

use std::io;

use rustix::mm::{Advice, madvise};
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
    let advice = match (flags & libc::MAP_SHARED, flags & libc::MAP_ANONYMOUS) {
        _ if start >= end || region.is_hugetlbfs() == Some(true) => return Ok(0),
        (0, 0) => return Ok(0), // A private view of a file: what is below it is not zeroes.
        (0, _) => Advice::LinuxDontNeed,
        _ => Advice::LinuxRemove,
    };
    let address = region.get_host_address(MemoryRegionAddress(start)).map_err(io::Error::other)?;
    // SAFETY: the range lies in one mapping of guest memory, which stays mapped. Its content may change at any time
    // for all who hold it, since the guest can write it; turning into zeroes is one such change.
    unsafe { madvise(address.cast(), (end - start) as usize, advice) }?;
    region.bitmap().mark_dirty(start as usize, (end - start) as usize);
    Ok(end - start)
}
