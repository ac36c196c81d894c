//! Memory of our own for data that cannot go straight between the disk and the guest.
#![allow(unsafe_code, reason = "aligned memory is allocated by hand")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Most bytes of one copy; more data goes in several steps. All requests in flight may have one at a time.
const MAX: usize = 128 << 10;
/// What direct I/O wants at most, of memory and of offsets.
pub const ALIGN: usize = 4096;

/// A buffer aligned for direct I/O.
#[derive(Debug, Default)]
pub struct Bounce {
    memory: Option<NonNull<u8>>,
    used: usize,
}

// SAFETY: the memory is owned, and reached through this only.
unsafe impl Send for Bounce {}

impl Bounce {
    const LAYOUT: Layout = match Layout::from_size_align(MAX, ALIGN) {
        Ok(layout) => layout,
        Err(_) => panic!("a page is a power of two"),
    };

    /// Makes room for `len` bytes, or for as many as one step moves.
    pub fn take(&mut self, len: usize) {
        self.used = len.min(MAX);
        self.memory.get_or_insert_with(|| {
            // SAFETY: the layout has a size.
            NonNull::new(unsafe { alloc_zeroed(Self::LAYOUT) })
                .unwrap_or_else(|| handle_alloc_error(Self::LAYOUT))
        });
    }

    /// The room taken.
    pub fn bytes(&mut self) -> &mut [u8] {
        match self.memory {
            // SAFETY: `used` is at most the allocation's size, the bytes were zeroed once, and `self` is borrowed.
            Some(memory) => unsafe { std::slice::from_raw_parts_mut(memory.as_ptr(), self.used) },
            None => &mut [],
        }
    }

    /// The same, for a system call that ends before this is used again or dropped.
    pub fn vector(&mut self) -> libc::iovec {
        let bytes = self.bytes();
        libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        if let Some(memory) = self.memory {
            // SAFETY: allocated with the same layout, once.
            unsafe { dealloc(memory.as_ptr(), Self::LAYOUT) };
        }
    }
}

/// Zeros to write where the host cannot zero by itself.
#[repr(align(4096))]
pub struct Zeros([u8; 64 << 10]);

/// The only ones.
pub static ZEROS: Zeros = Zeros([0; 64 << 10]);

impl Zeros {
    /// Names `len` zeros in `vectors`, or as many as one step writes.
    pub fn name(&'static self, len: u64, vectors: &mut Vec<libc::iovec>) {
        let mut left = len.min(16 * self.0.len() as u64) as usize;
        while left > 0 {
            let iov_len = left.min(self.0.len());
            vectors.push(libc::iovec { iov_base: self.0.as_ptr().cast_mut().cast(), iov_len });
            left -= iov_len;
        }
    }
}
