//! The buffers of a descriptor chain, as a cursor over guest memory.
//!
//! The guest can change these bytes at any time: whatever decides something is copied out once, with
//! [`Buffers::read_obj`], and file I/O goes straight between the file and guest memory.
#![allow(unsafe_code, reason = "vectored system calls on guest memory take raw pointers")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::bitmap::{AtomicBitmap, BS, Bitmap};
use vm_memory::{ByteValued, GuestMemoryBackend, VolatileSlice};

use super::queue::MAX_CHAIN;
use crate::GuestMemory;

/// A piece of guest memory.
type Slice<'m> = VolatileSlice<'m, BS<'m, Option<AtomicBitmap>>>;

/// Buffers in guest memory, consumed from the front.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'m> {
    /// What they lie in; `None` only when there are none.
    mem: Option<&'m GuestMemory>,
    slices: Vec<Slice<'m>>,
    /// Index of the first slice that is not used up.
    first: usize,
    /// Bytes left.
    len: usize,
}

/// A datagram that was put into buffers.
#[derive(Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Its length.
    pub len: usize,
    /// The part of the spill buffer that holds the end of it, for which the buffers had no room.
    pub left: Range<usize>,
}

impl<'m> Buffers<'m> {
    /// Walks a chain and sorts its buffers into readable and writable ones. `None` for a chain that breaks
    /// the specification: a loop, an index out of range, a bad indirect table, more than [`MAX_CHAIN`]
    /// buffers, a readable buffer after a writable one, or memory that does not exist.
    pub(super) fn of_chain(
        descriptors: &mut DescriptorChain<&'m GuestMemory>,
        mem: &'m GuestMemory,
    ) -> Option<(Self, Self)> {
        let none = Self { mem: Some(mem), ..Self::default() };
        let (mut readable, mut writable) = (none.clone(), none);
        let mut last: Option<Descriptor> = None;
        for (count, descriptor) in descriptors.by_ref().enumerate() {
            let readable_after_writable =
                last.is_some_and(|last| last.is_write_only()) && !descriptor.is_write_only();
            if readable_after_writable || count == MAX_CHAIN {
                return None;
            }
            last = Some(descriptor);
            if descriptor.len() != 0 {
                let side = if descriptor.is_write_only() { &mut writable } else { &mut readable };
                let slice = mem.get_slice(descriptor.addr(), descriptor.len() as usize).ok()?;
                side.len += slice.len();
                side.slices.push(slice);
            }
        }
        // The walk ends early, without an error, where it cannot go on: then the last descriptor promised more.
        match last {
            Some(last) if !last.has_next() => Some((readable, writable)),
            _ => None,
        }
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many pieces of guest memory they lie in.
    pub fn pieces(&self) -> usize {
        self.slices.len() - self.first
    }

    /// Drops `n` bytes from the front, or all there are.
    pub fn skip(&mut self, n: usize) {
        self.consume(n, |_, _| ());
    }

    /// Copies bytes out to `buf`; returns how many there were.
    pub fn read(&mut self, buf: &mut [u8]) -> usize {
        self.consume(buf.len(), |slice, done| {
            slice.copy_to(&mut buf[done..done + slice.len()]);
        })
    }

    /// Copies bytes out to `buf` and consumes nothing; returns how many there were.
    pub fn peek(&self, buf: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices[self.first..] {
            let take = slice.len().min(buf.len() - done);
            slice.copy_to(&mut buf[done..done + take]);
            done += take;
        }
        done
    }

    /// Copies bytes in from `buf`; returns how many there was room for.
    pub fn write(&mut self, buf: &[u8]) -> usize {
        self.consume(buf.len(), |slice, done| slice.copy_from(&buf[done..done + slice.len()]))
    }

    /// Copies a datagram in that is in `parts`: into the buffers as far as they go, the rest into `spill`.
    pub fn write_parts(&mut self, parts: &[&[u8]], spill: &mut [u8]) -> Datagram {
        let (mut len, mut left) = (0, 0);
        for part in parts {
            let rest = &part[self.write(part)..];
            spill[left..left + rest.len()].copy_from_slice(rest);
            len += part.len();
            left += rest.len();
        }
        Datagram { len, left: 0..left }
    }

    /// Copies a plain value out; `None`, and nothing consumed, when there are too few bytes.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Option<T> {
        let mut value = T::default();
        if self.len < size_of::<T>() {
            return None;
        }
        self.read(value.as_mut_slice());
        Some(value)
    }

    /// Copies a plain value in; false, and nothing written, when there is too little room.
    pub fn write_obj<T: ByteValued>(&mut self, value: &T) -> bool {
        self.len >= size_of::<T>() && self.write(value.as_slice()) == size_of::<T>()
    }

    /// Writes zeros to all that is left.
    pub fn zero(&mut self) {
        const ZEROS: [u8; 4096] = [0; 4096];
        while self.write(&ZEROS) == ZEROS.len() {}
    }

    /// Puts the buffers of `other`, which lie in the same memory, after these.
    ///
    /// # Panics
    /// When they do not: that is a device's mistake, and no driver's.
    pub fn append(&mut self, other: &Self) {
        let mem = *self.mem.get_or_insert(match other.mem {
            Some(mem) => mem,
            None => return,
        });
        assert!(other.mem.is_none_or(|other| std::ptr::eq(other, mem)), "buffers of two machines");
        self.slices.extend_from_slice(&other.slices[other.first..]);
        self.len += other.len;
    }

    /// Keeps the memory that they lie in mapped, so that they may outlive the call that lent them.
    pub fn hold(mut self) -> Held {
        let mem = self.mem.take().cloned();
        // SAFETY: only the lifetime changes, and no reference is left in it but those of slices to mappings and
        // to their bitmaps. Both belong to regions that `mem`, a handle of the same regions, keeps in their place
        // as long as `Held` lives. `Held` hands no slice out.
        let buffers = unsafe { std::mem::transmute::<Buffers<'m>, Buffers<'static>>(self) };
        Held { buffers, _mem: mem }
    }

    /// Splits off everything after the first `at` bytes.
    pub fn split_off(&mut self, at: usize) -> Self {
        let mut tail = self.clone();
        tail.skip(at);
        self.truncate(at);
        tail
    }

    /// Keeps the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        let mut room = len.min(self.len);
        self.len = room;
        for (i, slice) in self.slices.iter_mut().enumerate().skip(self.first) {
            if slice.len() >= room {
                // `room` is at most the slice's length, so this cannot fail.
                if let Ok(front) = slice.subslice(0, room) {
                    *slice = front;
                }
                self.slices.truncate(i + 1);
                return;
            }
            room -= slice.len();
        }
    }

    /// Hands the next `n` bytes to `each` in pieces, with the count of bytes before the piece; returns how
    /// many there were.
    fn consume(&mut self, n: usize, mut each: impl FnMut(&Slice<'m>, usize)) -> usize {
        let total = n.min(self.len);
        let mut done = 0;
        while done < total {
            let slice = self.slices[self.first];
            let take = slice.len().min(total - done);
            // `take` is at most the slice's length, so neither of these can fail.
            if let (Ok(front), Ok(rest)) = (slice.subslice(0, take), slice.offset(take)) {
                each(&front, done);
                self.slices[self.first] = rest;
            }
            if take == slice.len() {
                self.first += 1;
            }
            done += take;
        }
        self.len -= total;
        total
    }

    /// The buffers as the argument of a vectored system call, at most [`MAX_CHAIN`] of them.
    ///
    /// The pointers are good as long as `'m`.
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        self.named().collect()
    }

    fn named(&self) -> impl Iterator<Item = libc::iovec> + '_ {
        let left = self.slices[self.first..].iter().filter(|slice| !slice.is_empty());
        left.take(MAX_CHAIN).map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
    }

    /// Marks the first `n` bytes as written, after a system call wrote them behind vm-memory's back, and
    /// drops them.
    fn wrote(&mut self, n: usize) {
        self.consume(n, |slice, _| slice.bitmap().mark_dirty(0, slice.len()));
    }

    /// One `readv` from `file` into the buffers. Returns the count of bytes, which are consumed.
    pub fn read_from(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let iov = self.iovecs();
        // SAFETY: `iov` names live ranges of guest memory, which stay mapped for `'m`. The guest may write to them
        // meanwhile; the kernel does not care.
        let n = retry(|| unsafe { libc::readv(file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int) })?;
        self.wrote(n);
        Ok(n)
    }

    /// One `readv` of a datagram from `file`: straight into the buffers as far as they go, the rest into
    /// `spill`. What is in `spill` then goes to buffers which the system call had no room to name.
    ///
    /// A stream would work too, but who reads one wants [`Self::read_from`].
    pub fn read_datagram(&mut self, file: BorrowedFd<'_>, spill: &mut [u8]) -> io::Result<Datagram> {
        let mut iov = self.iovecs();
        iov.truncate(MAX_CHAIN - 1);
        let direct: usize = iov.iter().map(|part| part.iov_len).sum();
        iov.push(libc::iovec { iov_base: spill.as_mut_ptr().cast(), iov_len: spill.len() });
        // SAFETY: as in `read_from`; the last range is `spill`, which is borrowed for the call.
        let len = retry(|| unsafe { libc::readv(file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int) })?;
        self.wrote(len.min(direct));
        let spilled = len.saturating_sub(direct);
        let copied = self.write(&spill[..spilled]);
        Ok(Datagram { len, left: copied..spilled })
    }

    /// One `writev` of `header` and then the buffers to `file`, as one datagram; more than `MAX_CHAIN - 1`
    /// pieces are an error. Returns the count of bytes, which are consumed.
    pub fn write_datagram(&mut self, header: &[u8], file: BorrowedFd<'_>) -> io::Result<usize> {
        let mut iov =
            vec![libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() }];
        iov.extend(self.iovecs());
        // SAFETY: as in `write_to`; the first range is `header`, which the kernel only reads.
        let len =
            retry(|| unsafe { libc::writev(file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int) })?;
        self.skip(len.saturating_sub(header.len()));
        Ok(len)
    }

    /// One `writev` of the buffers to `file`. Returns the count of bytes, which are consumed.
    pub fn write_to(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let iov = self.iovecs();
        // SAFETY: as in `read_from`; the kernel only reads the ranges.
        let n = retry(|| unsafe { libc::writev(file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int) })?;
        self.skip(n);
        Ok(n)
    }

    /// One `sendmsg` of the buffers to a stream socket, which neither waits nor raises SIGPIPE. Returns the count of
    /// bytes, which are consumed.
    pub fn send_to(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut iov = self.iovecs();
        // SAFETY: a message header of zeros is one with neither address, buffers nor control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        (message.msg_iov, message.msg_iovlen) = (iov.as_mut_ptr(), iov.len() as _);
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: as in `write_to`; the message names `iov`, which lives until after the call.
        let n = retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) })?;
        self.skip(n);
        Ok(n)
    }
}

/// Buffers with a handle of the memory that they lie in: for requests that are served when the call that brought
/// them has ended, by the kernel or by another thread.
#[derive(Debug)]
pub struct Held {
    buffers: Buffers<'static>,
    _mem: Option<GuestMemory>,
}

// SAFETY: the pointers are into mappings that any thread may use, and that the handle keeps.
unsafe impl Send for Held {}

impl Held {
    /// Bytes left.
    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    /// Names as many bytes as [`MAX_CHAIN`] pieces hold in `vectors`, which are good as long as this lives. Nothing is
    /// consumed.
    pub fn name(&self, vectors: &mut Vec<libc::iovec>) {
        vectors.clear();
        vectors.extend(self.buffers.named());
    }

    /// Marks the first `n` bytes as written, after a system call wrote them behind vm-memory's back, and
    /// consumes them.
    pub fn wrote(&mut self, n: usize) {
        self.buffers.wrote(n);
    }

    /// See [`Buffers::skip`].
    pub fn skip(&mut self, n: usize) {
        self.buffers.skip(n);
    }

    /// See [`Buffers::write`].
    pub fn write(&mut self, buf: &[u8]) -> usize {
        self.buffers.write(buf)
    }

    /// Copies bytes out to `buf` and consumes nothing; returns how many there were.
    pub fn peek(&self, buf: &mut [u8]) -> usize {
        self.buffers.peek(buf)
    }

    /// See [`Buffers::zero`].
    pub fn zero(&mut self) {
        self.buffers.zero();
    }
}

/// Runs a system call again while a signal interrupts it.
pub(super) fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
}
