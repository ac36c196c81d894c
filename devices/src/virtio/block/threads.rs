//! The portable engine: a few threads that make blocking system calls.
//!
//! It serves where io_uring is missing or forbidden (containers often do), and formats that are more than a file.
//! These are the only threads of this crate. They
//! see jobs (an open file, and buffers of guest memory that a job keeps), and never a device, a queue or a
//! register.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use rustix::event::EventfdFlags;

use super::engine::{Engine, Finished};
use super::job::Job;

/// Threads of one disk: what a disk of the host can use, and no more than a machine with many disks can bear.
const THREADS: usize = 4;

/// The pool, seen from the device.
pub struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Taken, and not begun.
    #[expect(clippy::vec_box, reason = "they come and go as boxes")]
    batch: Vec<Box<Job>>,
    in_flight: usize,
}

/// What the device and the threads share.
struct Shared {
    state: Mutex<State>,
    /// There is something to do, or it is over.
    work: Condvar,
    /// Something is done.
    finished: Condvar,
    event: OwnedFd,
}

#[derive(Default)]
struct State {
    todo: VecDeque<Box<Job>>,
    done: Vec<Finished>,
    over: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The life of a thread.
    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some(mut job) = state.todo.pop_front() {
                drop(state);
                // What a format's code does with an image that nobody checked is no reason to lose the job.
                let result = catch_unwind(AssertUnwindSafe(|| job.perform()));
                let result = result.unwrap_or_else(|_| Err(io::Error::other("the image is not understood")));
                state = self.state();
                state.done.push(Finished { job, result });
                if state.done.len() == 1 {
                    // It can only fail when the counter is full, and then the event is pending anyway.
                    _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
                    self.finished.notify_all();
                }
            } else if state.over {
                return;
            } else {
                state = self.work.wait(state).unwrap_or_else(|e| e.into_inner());
            }
        }
    }
}

impl Threads {
    /// Starts the threads.
    pub fn new() -> io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            finished: Condvar::new(),
            event,
        });
        let mut this = Self { shared, threads: Vec::new(), batch: Vec::new(), in_flight: 0 };
        for _ in 0..THREADS {
            let shared = this.shared.clone();
            this.threads.push(std::thread::Builder::new().name("disk".into()).spawn(move || shared.work())?);
        }
        Ok(this)
    }
}

impl Engine for Threads {
    fn start(&mut self, job: Box<Job>) {
        self.in_flight += 1;
        self.batch.push(job);
    }

    fn submit(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let count = self.batch.len();
        self.shared.state().todo.extend(self.batch.drain(..));
        for _ in 0..count.min(THREADS) {
            self.shared.work.notify_one();
        }
    }

    fn finished(&mut self, done: &mut Vec<Finished>) {
        let before = done.len();
        // First the event, so that what is done after it signals anew.
        _ = rustix::io::read(&self.shared.event, &mut [0; 8]);
        done.append(&mut self.shared.state().done);
        self.in_flight -= done.len() - before;
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn wait(&mut self) {
        self.submit();
        if self.in_flight == 0 {
            return;
        }
        let mut state = self.shared.state();
        while state.done.is_empty() {
            state = self.shared.finished.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    fn event(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.submit();
        self.shared.state().over = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            _ = thread.join();
        }
    }
}
