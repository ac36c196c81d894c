//! What does requests while the device goes on: the one interface of the engines, and the choice between them.
//!
//! An engine owns a job from [`Engine::start`] until it returns it from [`Engine::finished`]; that is what makes
//! it sound to let the kernel, or another thread, read and write guest memory meanwhile. Dropping an engine
//! waits for what it owns.

use std::io;
use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

use super::job::Job;
use super::ring::Ring;
use super::threads::Threads;

/// How a disk's requests are done, where they are not done on the spot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// io_uring where the host has it and the format allows it, else threads.
    #[default]
    Auto,
    /// The kernel's io_uring.
    IoUring,
    /// A few threads of our own, which work everywhere.
    Threads,
}

/// A job that an engine is done with.
#[derive(Debug)]
pub struct Finished {
    /// The job.
    pub job: Box<Job>,
    /// Bytes moved by its step (0 for steps that move none).
    pub result: io::Result<usize>,
}

/// Something that does the current step of jobs, many at a time and in any order.
pub trait Engine: Send {
    /// Takes a job whose step is prepared. It may begin at once, or wait for [`Self::submit`].
    fn start(&mut self, job: Box<Job>);

    /// Begins everything that was taken, in one go.
    fn submit(&mut self);

    /// Moves what is done to `done`.
    fn finished(&mut self, done: &mut Vec<Finished>);

    /// How many jobs it owns.
    fn in_flight(&self) -> usize;

    /// Begins everything, and returns when something is done or nothing is left to do.
    fn wait(&mut self);

    /// Becomes readable when something was done since the last [`Self::finished`].
    fn event(&self) -> RawFd;
}

/// Makes an engine. The error is that of io_uring, where nothing else will do.
pub fn open(kind: Kind) -> io::Result<Box<dyn Engine>> {
    match kind {
        Kind::IoUring => Ok(Box::new(Ring::new()?)),
        Kind::Threads => Ok(Box::new(Threads::new()?)),
        Kind::Auto => match Ring::new() {
            Ok(ring) => Ok(Box::new(ring)),
            Err(error) => {
                tracing::debug!(%error, "no io_uring here, so disks use threads");
                open(Kind::Threads)
            }
        },
    }
}
