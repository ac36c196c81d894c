//! The console of a detached machine: its output goes to the log and to whoever is attached, their input to the guest.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vmm_core::console::{ConsoleInput, ConsoleReader};
use vmm_core::devices::virtio::unix_listener::UnixListener;

use super::Machine;
use super::log::Log;

/// Who can be attached at a time.
const MAX_CLIENTS: usize = 16;
/// How long to wait when nobody can be taken.
const RETRY: Duration = Duration::from_millis(100);
/// Most bytes of one write.
const CHUNK: usize = 16 << 10;

/// The host's end of the console.
pub struct ConsoleServer {
    socket: UnixListener,
    log: Mutex<Log>,
    clients: Mutex<Vec<Arc<UnixStream>>>,
}

impl ConsoleServer {
    /// Listens at the machine's place for its console, and begins its log.
    pub fn start(machine: &Machine) -> anyhow::Result<Self> {
        let log = Log::create(&machine.log())
            .with_context(|| format!("cannot write '{}'", machine.log().display()))?;
        let socket = UnixListener::bind("console socket", &machine.console(), 0)?;
        Ok(Self { socket, log: Mutex::new(log), clients: Mutex::default() })
    }

    /// Takes who comes, on a thread of its own, until the process ends.
    pub fn accept(self: &Arc<Self>, input: ConsoleInput) -> anyhow::Result<()> {
        let server = self.clone();
        let work = move || {
            loop {
                _ = poll(&mut [PollFd::new(&server.socket.as_fd(), PollFlags::IN)], None);
                match server.socket.accept() {
                    Ok(client) => server.add(client, &input),
                    // Somebody has changed his mind.
                    Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                    // Out of descriptors, most likely: others may give some back.
                    Err(_) => thread::sleep(RETRY),
                }
            }
        };
        thread::Builder::new().name("console".into()).spawn(work)?;
        Ok(())
    }

    fn clients(&self) -> std::sync::MutexGuard<'_, Vec<Arc<UnixStream>>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(self: &Arc<Self>, client: OwnedFd, input: &ConsoleInput) {
        let client = Arc::new(UnixStream::from(client));
        {
            let mut clients = self.clients();
            if clients.len() >= MAX_CLIENTS {
                _ = (&*client).write_all(b"vmm: too many are attached already\r\n");
                return;
            }
            clients.push(client.clone());
        }
        let (server, input) = (self.clone(), input.clone());
        let work = move || {
            let mut reader = &*client;
            let mut buf = [0; 1024];
            loop {
                match reader.read(&mut buf) {
                    Ok(0) => break,
                    // A guest that does not read loses what is typed, as at any terminal.
                    Ok(n) => _ = input.offer(&buf[..n]),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                        _ = poll(&mut [PollFd::new(reader, PollFlags::IN)], None);
                    }
                    Err(_) => break,
                }
            }
            _ = reader.shutdown(Shutdown::Both);
            // Now, and not with the next output: a guest may be quiet for weeks.
            server.clients().retain(|other| !Arc::ptr_eq(other, &client));
        };
        // Without a thread, its input is not read.
        _ = thread::Builder::new().name("attached".into()).spawn(work);
    }

    /// Copies the guest's output until its end.
    pub fn copy_output(&self, mut console: ConsoleReader, settle: Duration) {
        let mut buf = [0; CHUNK];
        // The reader does not fail, it ends.
        while let Ok(n @ 1..) = console.read_burst(&mut buf, settle) {
            let data = &buf[..n];
            self.log.lock().unwrap_or_else(PoisonError::into_inner).append(data);
            // Who does not read in time is cut off: a guest does not wait for somebody who left his terminal.
            self.clients().retain(|client| (&**client).write_all(data).is_ok());
        }
        for client in self.clients().drain(..) {
            _ = client.shutdown(Shutdown::Both);
        }
    }
}
