//! userfaultfd(2): page faults of this process that somebody answers.
#![allow(unsafe_code, reason = "pages are put into mappings, by address")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use crate::memory::RamRegion;
use crate::snapshot::memory_file::PAGE;

/// The group of the ioctls, and the version of the interface.
const GROUP: u8 = 0xaa;
/// Asks for a message when memory is given back (UFFD_FEATURE_EVENT_REMOVE).
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// Faults on pages that are not there (UFFDIO_REGISTER_MODE_MISSING).
const MODE_MISSING: u64 = 1;
/// Events of `struct uffd_msg`.
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;
/// Bytes of a `struct uffd_msg`.
const MESSAGE: usize = 32;
/// How many of them are read at once.
const MESSAGES: usize = 64;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    /// How many bytes went, or an error.
    copy: i64,
}

#[repr(C)]
struct Zero {
    range: Range,
    mode: u64,
    /// As [`Copy::copy`].
    zeropage: i64,
}

const API: Opcode = opcode::read_write::<Api>(GROUP, 0x3f);
const REGISTER: Opcode = opcode::read_write::<Register>(GROUP, 0);
const UNREGISTER: Opcode = opcode::read::<Range>(GROUP, 1);
const WAKE: Opcode = opcode::read::<Range>(GROUP, 2);
const COPY: Opcode = opcode::read_write::<Copy>(GROUP, 3);
const ZEROPAGE: Opcode = opcode::read_write::<Zero>(GROUP, 4);
/// Of `/dev/userfaultfd`: makes a descriptor.
const NEW: Opcode = opcode::none(GROUP, 0);

/// Something that happened to registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody waits for the page at this address.
    Fault(u64),
    /// The pages from the first address up to the second are given back: they are zeroes from now on.
    Removed(u64, u64),
}

/// Answers page faults.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Userfault {
    /// Opens one for faults of this process, those inside the kernel too: KVM's.
    pub fn open() -> io::Result<Self> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: nothing is registered with it yet.
        let fd = match unsafe { userfaultfd(flags) } {
            // Who may use the device may do this.
            Err(Errno::PERM) => open_device().map_err(|_| io::Error::from(Errno::PERM))?,
            opened => opened?,
        };
        let mut api = Api { api: GROUP.into(), features: FEATURE_EVENT_REMOVE, ioctls: 0 };
        // SAFETY: the structure is the one that this call reads and fills.
        unsafe { ioctl(&fd, Updater::<API, Api>::new(&mut api)) }?;
        Ok(Self(fd))
    }

    /// Whoever touches a page of `region` that is not there waits from now on.
    pub fn register(&self, region: RamRegion) -> io::Result<()> {
        let range = Range { start: region.host_addr, len: region.len };
        let mut register = Register { range, mode: MODE_MISSING, ioctls: 0 };
        // SAFETY: the structure is the one that this call reads and fills. Memory does not change by it.
        Ok(unsafe { ioctl(&self.0, Updater::<REGISTER, Register>::new(&mut register)) }?)
    }

    /// Pages of `region` that are not there are zeroes from now on, also for those who wait.
    pub fn unregister(&self, region: RamRegion) -> io::Result<()> {
        let mut range = Range { start: region.host_addr, len: region.len };
        // SAFETY: the structure is the one that this call reads.
        Ok(unsafe { ioctl(&self.0, Updater::<UNREGISTER, Range>::new(&mut range)) }?)
    }

    /// What has happened since the last call; it does not wait.
    pub fn events(&self) -> io::Result<Vec<Event>> {
        let mut messages = [0_u8; MESSAGE * MESSAGES];
        let len = match rustix::io::read(&self.0, &mut messages) {
            Err(Errno::AGAIN | Errno::INTR) => 0,
            len => len?,
        };
        let number = |message: &[u8], at: usize| message[at..at + 8].try_into().map_or(0, u64::from_ne_bytes);
        let event = |message: &[u8]| match message[0] {
            EVENT_PAGEFAULT => Some(Event::Fault(number(message, 16) / PAGE * PAGE)),
            EVENT_REMOVE => Some(Event::Removed(number(message, 8), number(message, 16))),
            _ => None,
        };
        Ok(messages[..len].chunks_exact(MESSAGE).filter_map(event).collect())
    }

    /// Puts whole pages to the address `host` and wakes who waits for them. A page that is there stays as it is. Returns how
    /// many bytes are there now: fewer when memory is being given back, which [`Self::events`] will tell.
    pub fn copy(&self, host: u64, pages: &[u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < pages.len() {
            let rest = &pages[done..];
            let mut copy = Copy {
                dst: host + done as u64,
                src: rest.as_ptr() as u64,
                len: rest.len() as u64,
                mode: 0,
                copy: 0,
            };
            // SAFETY: the structure is the one that this call reads and fills, and `rest` is as long as it says. The
            // kernel puts pages only where memory is registered with this descriptor and nothing is.
            match unsafe { ioctl(&self.0, Updater::<COPY, Copy>::new(&mut copy)) } {
                Ok(()) => done = pages.len(),
                Err(Errno::AGAIN) if copy.copy > 0 => done += copy.copy as usize,
                Err(Errno::AGAIN) => break,
                Err(Errno::EXIST) => {
                    self.wake(host + done as u64)?;
                    done += PAGE as usize;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }

    /// As [`Self::copy`], for one page of zeroes. Returns whether it is there now.
    pub fn zero(&self, host: u64) -> io::Result<bool> {
        let mut zero = Zero { range: Range { start: host, len: PAGE }, mode: 0, zeropage: 0 };
        // SAFETY: as in `copy`.
        match unsafe { ioctl(&self.0, Updater::<ZEROPAGE, Zero>::new(&mut zero)) } {
            Ok(()) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(Errno::EXIST) => self.wake(host).map(|()| true),
            Err(error) => Err(error.into()),
        }
    }

    /// Wakes who waits for the page at `host`, which is there.
    fn wake(&self, host: u64) -> io::Result<()> {
        let mut range = Range { start: host, len: PAGE };
        // SAFETY: the structure is the one that this call reads.
        Ok(unsafe { ioctl(&self.0, Updater::<WAKE, Range>::new(&mut range)) }?)
    }
}

/// The other way to a descriptor, which file permissions guard.
fn open_device() -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/userfaultfd")?;
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: this call takes its flags by value, and returns a descriptor that is ours alone.
    match unsafe { libc::ioctl(device.as_raw_fd(), NEW.into(), flags.bits()) } {
        // SAFETY: as above.
        fd @ 0.. => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
