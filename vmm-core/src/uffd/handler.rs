//! Page faults that another process answers, as Firecracker's protocol has it: the descriptor and where memory is come to it
//! through its socket, and nothing else ever does.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;

use devices::GuestMemory;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::json;

use super::sys::Userfault;
use super::{FaultsError, places, register};
use crate::memory::{GuestRam, RamRegion};

/// Another process that answers page faults.
#[derive(Debug)]
pub(crate) struct Handler {
    /// Gone once nobody is to wait any more. If the process ends before us, this keeps its pages from becoming zeroes.
    fault: Mutex<Option<Userfault>>,
    regions: Vec<RamRegion>,
    /// Stays open as long as the memory is in use, for a handler that waits for our end.
    _socket: UnixStream,
    /// Stays mapped.
    _memory: GuestMemory,
}

impl Handler {
    /// Hands faults on `ram`, which is made of pages of so many bytes, to who listens at `path`.
    pub fn connect(ram: &GuestRam, page: u64, path: &Path) -> Result<Self, FaultsError> {
        let fault = register(ram)?;
        let send = || {
            let socket = UnixStream::connect(path)?;
            send(&socket, &fault, ram, page)?;
            Ok(socket)
        };
        let failed = |source| FaultsError::Handler { path: path.display().to_string(), source };
        let socket = send().map_err(failed)?;
        Ok(Self {
            fault: Mutex::new(Some(fault)),
            regions: ram.regions().collect(),
            _socket: socket,
            _memory: ram.memory().clone(),
        })
    }

    /// Fails if nobody waits for memory any more.
    pub fn check(&self) -> Result<(), FaultsError> {
        match &*self.fault.lock().unwrap_or_else(|e| e.into_inner()) {
            Some(_) => Ok(()),
            None => Err(FaultsError::Lost("the process that brings it in was given up".into())),
        }
    }

    /// What is not there is zeroes from now on.
    pub fn give_up(&self) {
        let fault = self.fault.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(fault) = fault {
            // An error says that nothing is registered there.
            self.regions.iter().for_each(|&region| _ = fault.unregister(region));
        }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// Sends the descriptor and the places of memory, in one message.
fn send(socket: &UnixStream, fault: &Userfault, ram: &GuestRam, page: u64) -> io::Result<()> {
    let mapping = |(offset, region): (u64, RamRegion)| {
        json!({
            "base_host_virt_addr": region.host_addr,
            "size": region.len,
            "offset": offset,
            "page_size": page,
            // In bytes too, whatever it is called.
            "page_size_kib": page,
        })
    };
    let mappings: Vec<_> = places(ram).into_iter().map(mapping).collect();
    let text = serde_json::to_vec(&mappings)?;
    let fds = [fault.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let sent = sendmsg(socket, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)?;
    match sent == text.len() {
        true => Ok(()),
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}
