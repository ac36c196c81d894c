//! The io_uring engine: one system call begins a whole batch.
//!
//! - Guest memory is not registered as fixed buffers: that would pin all of it, and end overcommit, ballooning
//!   and free-page reporting.
//! - The file is not registered either: the kernel lets go of registered files some time after a process ends,
//!   and the lock on the image with it, so that a machine that is started again at once would find its disk in
//!   use.
//! - Completions announce themselves by the ring's own descriptor, which epoll can watch. An eventfd would signal
//!   for those that we collect right after submitting as well; one registered for asynchronous completions is
//!   signalled only by the kernel's workers, and not by direct I/O and reads that wait for a page.
#![allow(unsafe_code, reason = "submission entries name memory by address")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::engine::{Engine, Finished};
use super::job::{Job, Step};

/// Entries of the submission queue. More jobs than this are begun in several calls.
const ENTRIES: u32 = 256;

/// A ring, and the jobs that the kernel has.
pub struct Ring {
    ring: IoUring,
    /// Indexed by the user data of entries.
    jobs: Vec<Option<Box<Job>>>,
    free: Vec<usize>,
    done: Vec<Finished>,
    in_flight: usize,
}

impl Ring {
    /// Makes a ring; an error where the kernel has none, forbids it, or is older than 5.6.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(ENTRIES)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed =
            [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        // Without NODROP, completions that find no room are lost.
        if !needed.iter().all(|&code| probe.is_supported(code)) || !ring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self { ring, jobs: Vec::new(), free: Vec::new(), done: Vec::new(), in_flight: 0 })
    }

    /// Takes the results that the kernel has posted.
    fn reap(&mut self) {
        for entry in self.ring.completion() {
            let slot = entry.user_data() as usize;
            let Some(job) = self.jobs.get_mut(slot).and_then(Option::take) else { continue };
            let result = usize::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(entry.result().wrapping_neg()));
            self.free.push(slot);
            self.done.push(Finished { job, result });
        }
    }

    /// Hands entries to the kernel, and waits for `want` results.
    fn enter(&mut self, want: usize) {
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) => return,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // The kernel is short of memory, or of room for results, which taking them out makes.
                    Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => std::thread::yield_now(),
                    _ => unreachable!("a ring that was made with these parameters takes entries: {error}"),
                },
            }
            self.reap();
        }
    }
}

impl Engine for Ring {
    fn start(&mut self, job: Box<Job>) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        let entry = entry(&job).user_data(slot as u64);
        self.jobs[slot] = Some(job);
        self.in_flight += 1;
        // SAFETY: the entry names the vectors of a job, which lie on the heap, and the memory that they name,
        // which the job keeps. The job stays in `jobs` until the kernel has posted its result: it is dropped
        // neither before (see `Drop`) nor by a panic, since nothing takes it out but `reap`.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.enter(0);
            self.reap();
        }
    }

    fn submit(&mut self) {
        if !self.ring.submission().is_empty() {
            self.enter(0);
        }
    }

    fn finished(&mut self, done: &mut Vec<Finished>) {
        self.reap();
        self.in_flight -= self.done.len();
        done.append(&mut self.done);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn wait(&mut self) {
        self.reap();
        if self.done.is_empty() && self.in_flight > 0 {
            self.enter(1);
        }
    }

    fn event(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.in_flight > 0 {
            self.wait();
            self.finished(&mut done);
        }
    }
}

/// The entry for a job's step.
fn entry(job: &Job) -> squeue::Entry {
    let fd = types::Fd(job.disk().fd().as_raw_fd());
    let (vectors, count) = (job.vectors().as_ptr(), job.vectors().len() as u32);
    match job.step() {
        Step::Read { offset } => opcode::Readv::new(fd, vectors, count).offset(offset).build(),
        Step::Write { offset, durable } => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(fd, vectors, count).offset(offset).rw_flags(flags).build()
        }
        Step::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        Step::Clear { offset, len, mode } => {
            opcode::Fallocate::new(fd, len).offset(offset).mode(mode.bits() as i32).build()
        }
    }
}
