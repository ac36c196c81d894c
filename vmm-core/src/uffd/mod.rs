//! Guest memory that is brought in when somebody asks for it: by a thread of ours, from a snapshot, or by another process.

mod filler;
mod handler;
mod sys;
#[cfg(test)]
mod tests;
mod touched;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

pub(crate) use filler::Filler;
pub(crate) use handler::Handler;
pub(crate) use touched::{NAME as TOUCHED, TouchedFile};

use crate::memory::{GuestRam, RamRegion};
use crate::snapshot::memory_file::Pages;
use sys::Userfault;

/// How long threads of a machine that ends may wait for memory from another process.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// Page faults cannot be answered.
#[derive(Debug, thiserror::Error)]
pub enum FaultsError {
    /// This process may not do it.
    #[error(
        "this process may not answer page faults of the kernel (userfaultfd); run it as root, give it access to \
         /dev/userfaultfd, or take another way to memory (--memory-mode map, or a File)"
    )]
    Permission,
    /// The kernel does not do it.
    #[error("the kernel does not let us answer page faults (userfaultfd): {0}; take another way to memory")]
    Kernel(io::Error),
    /// The thread could not be started.
    #[error("cannot start the thread that brings memory in: {0}")]
    Thread(io::Error),
    /// The process that was to bring memory in is not there.
    #[error("cannot hand page faults to '{path}': {source}; start the handler first")]
    Handler {
        /// Its socket.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Memory could not be read.
    #[error("the snapshot's memory is lost: {0}")]
    Lost(String),
}

/// Called when memory of a running guest cannot be had, with the reason.
pub(crate) type TellLoss = Box<dyn FnOnce(String) + Send>;

/// Who brings memory in. Dropped once nobody uses the memory any more.
#[derive(Clone, Debug)]
pub(crate) enum Faults {
    /// A thread of ours.
    Filler(Arc<Filler>),
    /// Another process.
    Handler(Arc<Handler>),
}

impl Faults {
    /// Pages of a memory of so many bytes that may not be there yet and be no zeroes.
    pub fn pending(&self, bytes: u64) -> Pages {
        match self {
            Self::Filler(filler) => filler.pending(),
            Self::Handler(_) => {
                let mut all = Pages::none(bytes);
                all.add_range(0, bytes);
                all
            }
        }
    }

    /// Whom to tell when memory cannot be had. Fails if that is so already.
    pub fn watch(&self, tell: TellLoss) -> Result<(), FaultsError> {
        match self {
            Self::Filler(filler) => filler.watch(tell),
            Self::Handler(_) => Ok(()),
        }
    }

    /// The guest runs from now on.
    pub fn guest_runs(&self) {
        match self {
            Self::Filler(filler) => filler.guest_runs(),
            Self::Handler(_) => {}
        }
    }

    /// Memory is known to be lost.
    pub fn is_lost(&self) -> bool {
        self.check().is_err()
    }

    /// Fails if memory is lost, in whose place there may be zeroes.
    pub fn check(&self) -> Result<(), FaultsError> {
        match self {
            Self::Filler(filler) => filler.check(),
            Self::Handler(handler) => handler.check(),
        }
    }

    /// All threads of the machine have ended.
    pub fn finish(&self) {
        match self {
            // What the guest has touched is written down now, and nothing is read for it any more.
            Self::Filler(filler) => filler.finish(),
            Self::Handler(_) => {}
        }
    }

    /// The machine ends: its vCPUs are told to stop. Nobody is left waiting for memory that does not come, until what is
    /// returned is dropped, when all threads have ended.
    pub fn end(&self) -> Option<mpsc::Sender<()>> {
        match self {
            Self::Filler(filler) => {
                filler.give_up_lost();
                None
            }
            Self::Handler(handler) => {
                let (ended, wait) = mpsc::channel();
                let handler = handler.clone();
                let give_up = move || {
                    if let Err(RecvTimeoutError::Timeout) = wait.recv_timeout(LAST_WAIT) {
                        handler.give_up();
                    }
                };
                // Without the thread, threads of the machine wait for the handler.
                _ = std::thread::Builder::new().name("memory-end".into()).spawn(give_up);
                Some(ended)
            }
        }
    }
}

/// A descriptor for faults on all of the memory.
fn register(ram: &GuestRam) -> Result<Userfault, FaultsError> {
    let open = || {
        let fault = Userfault::open()?;
        ram.regions().try_for_each(|region| fault.register(region))?;
        Ok(fault)
    };
    open().map_err(|error: io::Error| match error.kind() {
        io::ErrorKind::PermissionDenied => FaultsError::Permission,
        _ => FaultsError::Kernel(error),
    })
}

/// Pieces of RAM with their place in all of it.
fn places(ram: &GuestRam) -> Vec<(u64, RamRegion)> {
    let mut start = 0;
    let place = |region: RamRegion| {
        let place = (start, region);
        start += region.len;
        place
    };
    ram.regions().map(place).collect()
}
