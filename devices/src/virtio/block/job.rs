//! A request on its way: split into steps, each of which is one system call that an engine makes.
//!
//! A job owns everything that the call names: the open disk, guest memory, and the vectors that point into it.
#![allow(unsafe_code, reason = "system calls on guest memory take raw pointers")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::bounce::{Bounce, ZEROS};
use super::disk::Disk;
use super::request::Ticket;
use crate::virtio::buffers::{Held, retry};

/// What a job is to do, as far as it is not done yet. Offsets are in bytes, and on the disk.
#[derive(Debug)]
pub enum Task {
    /// Fill the buffers from `offset`.
    Read {
        /// Where the next byte is.
        offset: u64,
    },
    /// Store the buffers at `offset`.
    Write {
        /// Where the next byte goes.
        offset: u64,
        /// Not done before it is on stable storage.
        durable: bool,
    },
    /// Make what was written durable.
    Flush,
    /// Clear ranges of the disk, one after the other.
    Clear {
        /// What is left of them.
        ranges: VecDeque<Range>,
        /// Not done before it is on stable storage.
        durable: bool,
    },
    /// Nothing more.
    Done,
}

/// A range that is to be cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// How; what the file system cannot do is done the next way.
    pub how: Clear,
}

/// Ways to clear a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clear {
    /// Give the blocks back to the host, if it can take them.
    Discard,
    /// Give the blocks back so that zeros are read.
    Unmap,
    /// Have the file system make zeros of it, and keep the blocks.
    Zero,
    /// Write zeros.
    Write,
}

/// One system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Read into the vectors.
    Read {
        /// Offset in bytes.
        offset: u64,
    },
    /// Write the vectors.
    Write {
        /// Offset in bytes.
        offset: u64,
        /// With RWF_DSYNC.
        durable: bool,
    },
    /// Fdatasync.
    Sync,
    /// Fallocate.
    Clear {
        /// Offset in bytes.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Punch a hole, or zero.
        mode: FallocateFlags,
    },
}

/// Gives blocks back to the host; zeros are read there.
pub const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// A request that an engine can own.
#[derive(Debug)]
pub struct Job {
    disk: Arc<Disk>,
    task: Task,
    data: Held,
    step: Step,
    /// What the step's call moves: parts of `data`, of `bounce`, or of [`ZEROS`].
    vectors: Vec<libc::iovec>,
    bounce: Option<Bounce>,
    /// What the device completes when all is done.
    pub ticket: Ticket,
}

// SAFETY: the vectors point into memory that the job keeps and any thread may use.
unsafe impl Send for Job {}

impl Job {
    /// A job on `disk`; `data` is filled by a read, stored by a write, and not looked at otherwise.
    pub fn new(disk: Arc<Disk>, task: Task, data: Held, ticket: Ticket) -> Self {
        Self { disk, task, data, step: Step::Sync, vectors: Vec::new(), bounce: None, ticket }
    }

    /// The disk it is about.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The step that was prepared.
    pub fn step(&self) -> Step {
        self.step
    }

    /// The memory of the step's call, valid as long as the job lives and no other step is prepared.
    pub fn vectors(&self) -> &[libc::iovec] {
        &self.vectors
    }

    /// Bytes that the step is to move.
    pub fn bytes(&self) -> usize {
        self.vectors.iter().map(|vector| vector.iov_len).sum()
    }

    /// Prepares the next step. False: all is done.
    pub fn prepare(&mut self) -> bool {
        self.vectors.clear();
        self.step = match &self.task {
            Task::Done => return false,
            Task::Read { .. } | Task::Write { .. } if self.data.is_empty() => return false,
            &Task::Read { offset } => {
                self.name_data(false);
                Step::Read { offset }
            }
            &Task::Write { offset, durable } => {
                self.name_data(true);
                Step::Write { offset, durable }
            }
            Task::Flush => Step::Sync,
            Task::Clear { ranges, durable } => match ranges.front() {
                Some(&Range { offset, len, how: Clear::Write }) => {
                    ZEROS.name(len, &mut self.vectors);
                    Step::Write { offset, durable: *durable }
                }
                Some(&Range { offset, len, how }) => {
                    let mode = if how == Clear::Zero { ZERO } else { PUNCH };
                    Step::Clear { offset, len, mode }
                }
                None if *durable => Step::Sync,
                None => return false,
            },
        };
        true
    }

    /// Makes the vectors name the data that is left, or a copy of its front where the disk needs one.
    fn name_data(&mut self, write: bool) {
        self.data.name(&mut self.vectors);
        if !self.disk.takes(&self.vectors) {
            let bounce = self.bounce.get_or_insert_default();
            bounce.take(self.data.len());
            if write {
                self.data.peek(bounce.bytes());
            }
            self.vectors.clear();
            self.vectors.push(bounce.vector());
        }
    }

    /// Takes the result of the step: the bytes it moved. The error is that of the whole request.
    pub fn advance(&mut self, result: io::Result<usize>) -> io::Result<()> {
        let transfer = matches!(self.step, Step::Read { .. } | Step::Write { .. });
        let moved = match result {
            // A file that was cut short, or a device that takes no more.
            Ok(0) if transfer => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => return self.try_another_way(error),
            Ok(moved) => moved,
        };
        match &mut self.task {
            Task::Read { offset } => {
                *offset += moved as u64;
                match &mut self.bounce {
                    Some(bounce) => _ = self.data.write(&bounce.bytes()[..moved]),
                    None => self.data.wrote(moved),
                }
            }
            Task::Write { offset, .. } => {
                *offset += moved as u64;
                self.data.skip(moved);
            }
            Task::Clear { ranges, .. } => match ranges.front_mut() {
                Some(range) if transfer && (moved as u64) < range.len => {
                    range.offset += moved as u64;
                    range.len -= moved as u64;
                }
                Some(_) => _ = ranges.pop_front(),
                None => self.task = Task::Done,
            },
            Task::Flush | Task::Done => self.task = Task::Done,
        }
        Ok(())
    }

    /// What a file system cannot clear one way is cleared another way.
    fn try_another_way(&mut self, error: io::Error) -> io::Result<()> {
        let (Task::Clear { ranges, .. }, Step::Clear { .. }) = (&mut self.task, self.step) else {
            return Err(error);
        };
        let unsupported = matches!(Errno::from_io_error(&error), Some(Errno::OPNOTSUPP | Errno::NOSYS));
        match ranges.front_mut() {
            Some(range) if unsupported => match range.how {
                // It was a hint.
                Clear::Discard => _ = ranges.pop_front(),
                Clear::Unmap => range.how = Clear::Zero,
                Clear::Zero | Clear::Write => range.how = Clear::Write,
            },
            _ => return Err(error),
        }
        Ok(())
    }

    /// Does the step here and now.
    pub fn perform(&mut self) -> io::Result<usize> {
        if let Some(image) = self.disk.image() {
            return match (self.step, &mut self.bounce) {
                (Step::Read { offset }, Some(bounce)) => image.read(bounce.bytes(), offset),
                (Step::Write { offset, durable }, Some(bounce)) => {
                    image.write(bounce.bytes(), offset, durable)
                }
                (Step::Clear { offset, len, mode }, _) => image.clear(offset, len, mode == PUNCH),
                (Step::Sync, _) => image.sync(),
                // What a format cannot zero is not zeroed.
                (Step::Read { .. } | Step::Write { .. }, None) => Err(Errno::OPNOTSUPP.into()),
            };
        }
        match self.step {
            Step::Read { offset } => self.transfer(false, offset, 0),
            Step::Write { offset, durable } => {
                self.transfer(true, offset, if durable { libc::RWF_DSYNC } else { 0 })
            }
            Step::Sync => Ok(rustix::fs::fdatasync(self.disk.fd()).map(|()| 0)?),
            Step::Clear { offset, len, mode } => {
                Ok(rustix::fs::fallocate(self.disk.fd(), mode, offset, len).map(|()| 0)?)
            }
        }
    }

    /// Does the step if it is a read of what the host has in memory. `None`: it is not.
    pub fn perform_cached(&self) -> Option<io::Result<usize>> {
        match self.step {
            Step::Read { offset } if self.disk.image().is_none() => {
                // What it cannot do at once, or at all, is said again by the call that waits.
                self.transfer(false, offset, libc::RWF_NOWAIT).ok().filter(|&moved| moved > 0).map(Ok)
            }
            _ => None,
        }
    }

    fn transfer(&self, write: bool, offset: u64, flags: libc::c_int) -> io::Result<usize> {
        let (fd, vectors) = (self.disk.fd().as_raw_fd(), &self.vectors);
        let (count, offset) = (vectors.len() as libc::c_int, offset as i64);
        // SAFETY: the vectors name memory that lives as long as the job does. The guest may use it meanwhile; the kernel
        // does not care.
        retry(|| unsafe {
            match write {
                true => libc::pwritev2(fd, vectors.as_ptr(), count, offset, flags),
                false => libc::preadv2(fd, vectors.as_ptr(), count, offset, flags),
            }
        })
    }

    /// Ends the job: what is left of a read's data is zeroed. The ticket is to be completed.
    pub fn end(mut self) -> Ticket {
        if matches!(self.task, Task::Read { .. }) {
            self.data.zero();
        }
        self.ticket
    }
}
