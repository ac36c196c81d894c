//! The console device (virtio 1.3 §5.3): one port, hvc0 to a Linux guest, beside the serial port.
//!
//! What the guest writes never waits: a driver may spin until the device has taken it. So when nobody reads, the last
//! [`KEPT`] bytes are kept for whoever reads next, and older ones are dropped and counted. Input does wait, on the
//! host's side, until the guest has buffers for it.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::SendFlags;
use rustix::pty::OpenptFlags;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::buffers::Buffers;
use super::config_space::ConfigSpace;
use super::poller::{Poller, Ready};
use super::queue::Queues;
use super::unix_listener::UnixListener;
use crate::log_file::{self, LogFile, LogFileError};
use crate::model::{Counters, DeviceKind, HostSource, MachineShape, OpenError, Progress, VirtioDevice};
use crate::params::is_default;

/// receiveq of port 0: input for the guest.
const RX: u16 = 0;
/// transmitq of port 0: output of the guest.
const TX: u16 = 1;

/// Bytes of output that are kept for a reader.
pub const KEPT: usize = 64 << 10;
/// Most bytes that one request writes; a Linux guest's have a page.
const MAX_REQUEST: usize = 1 << 20;
/// Bytes after which other devices get a turn.
const MAX_PER_CALL: usize = 1 << 20;
/// Slot of the one connection in the poller.
const CLIENT: usize = 0;

/// Configuration of a console: one of these.
///
/// ```
/// use devices::{params, virtio::console::Config};
///
/// let config: Config = params::from_str("file=guest.log", None)?;
/// assert!(config.file.is_some() && !config.pty);
/// # Ok::<(), params::ParamError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Output goes to this file; there is no input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// A unix socket at this path, for one program at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// A pseudo-terminal, whose name is in the log.
    #[serde(skip_serializing_if = "is_default")]
    pub pty: bool,
    /// Output is lost; there is no input.
    #[serde(skip_serializing_if = "is_default")]
    pub null: bool,
}

impl DeviceKind for Config {
    const NAME: &'static str = "console";
    const SYNTAX: &'static str = "file=PATH|socket=PATH|pty|null";
    const HELP: &'static str = "A second console, hvc0 (give the guest console=hvc0)";
    const HOST: &'static [&'static str] = &["file", "socket", "pty", "null"];

    fn open(&self, _: &MachineShape) -> Result<Box<dyn VirtioDevice>, OpenError> {
        let side = match (&self.file, &self.socket, self.pty, self.null) {
            (Some(path), None, false, false) => Side::File(open_file(path)?),
            (None, Some(path), false, false) => {
                let listener = UnixListener::bind("console socket", path, 0)?;
                Side::Stream(Stream::new(Some(listener), None)?)
            }
            (None, None, true, false) => Side::Stream(Stream::new(None, Some(open_pty()?))?),
            (None, None, false, true) => Side::Null,
            _ => {
                return Err(Self::refused(format!("it is one of {}; give exactly one", Self::SYNTAX)));
            }
        };
        Ok(Box::new(Console::new(side)))
    }

    fn is_console(&self) -> bool {
        true
    }

    /// A console at whose other end somebody has typed, and reads nothing.
    #[cfg(any(test, feature = "specimen"))]
    fn specimen() -> Box<dyn VirtioDevice> {
        let (own, other) = std::os::unix::net::UnixStream::pair().expect("sockets");
        io::Write::write_all(&mut &other, &[b'x'; 10_000]).expect("room");
        own.set_nonblocking(true).expect("a socket");
        let client = Client { fd: own.into(), is_socket: true, other: Some(other.into()) };
        Box::new(Console::new(Side::Stream(Stream::new(None, Some(client)).expect("a poller"))))
    }
}

/// The console device.
struct Console {
    side: Side,
    config: Arc<ConfigSpace>,
    counters: Arc<Counters>,
}

/// The host's side.
enum Side {
    Null,
    File(LogFile),
    Stream(Stream),
}

impl Console {
    fn new(side: Side) -> Self {
        Self { side, config: Arc::new(ConfigSpace::read_only(&[])), counters: Arc::default() }
    }

    /// Takes the guest's output.
    fn transmit(&mut self, queues: &mut Queues<'_>) -> Progress {
        let mut queue = queues.get(TX);
        let mut moved = 0;
        while moved < MAX_PER_CALL {
            let Some(mut chain) = queue.pop() else {
                return if queue.exhausted() { Progress::More } else { Progress::Done };
            };
            if !chain.writable.is_empty() || chain.readable.len() > MAX_REQUEST {
                queue.count_mistake();
            }
            chain.readable.truncate(MAX_REQUEST);
            let bytes = chain.readable.len();
            let lost = match &mut self.side {
                Side::Null => false,
                Side::File(file) => !append(file, chain.readable),
                Side::Stream(stream) => !stream.write(chain.readable),
            };
            Counters::add(&self.counters.dropped, lost.into());
            Counters::add(&self.counters.requests, 1);
            Counters::add(&self.counters.bytes_from_guest, bytes as u64);
            moved += bytes;
            queue.push(chain.head, 0);
        }
        Progress::More
    }

    /// Gives the guest input, as far as there is any.
    fn receive(&mut self, queues: &mut Queues<'_>) -> Progress {
        let mut queue = queues.get(RX);
        let mut moved = 0;
        while moved < MAX_PER_CALL {
            let Some(mut chain) = queue.pop() else {
                return if queue.exhausted() { Progress::More } else { Progress::Done };
            };
            if !chain.readable.is_empty() || chain.writable.is_empty() {
                queue.count_mistake();
                queue.push(chain.head, 0);
                continue;
            }
            chain.writable.truncate(MAX_REQUEST);
            let read = match &mut self.side {
                Side::Stream(stream) => stream.read(&mut chain.writable),
                Side::Null | Side::File(_) => None,
            };
            let Some(bytes) = read else {
                queue.unpop(chain);
                return Progress::Done;
            };
            Counters::add(&self.counters.requests, 1);
            Counters::add(&self.counters.bytes_to_guest, bytes as u64);
            moved += bytes;
            queue.push(chain.head, bytes as u32);
        }
        Progress::More
    }
}

impl VirtioDevice for Console {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn config_space(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn activate(&mut self, _features: u64) {
        match &mut self.side {
            Side::Null => {}
            // What cannot be emptied is written over.
            Side::File(file) => _ = file.begin(),
            Side::Stream(stream) => (stream.callers, stream.readable) = (true, true),
        }
    }

    fn process(&mut self, queues: &mut Queues<'_>, queue: u16) -> Progress {
        if queue == TX { self.transmit(queues) } else { self.receive(queues) }
    }

    fn host_sources(&self) -> Vec<HostSource> {
        match &self.side {
            Side::Stream(stream) => vec![HostSource { fd: stream.poller.fd(), token: 0, writable: false }],
            Side::Null | Side::File(_) => Vec::new(),
        }
    }

    fn host_event(&mut self, queues: &mut Queues<'_>, _token: u32) -> Progress {
        if let Side::Stream(stream) = &mut self.side {
            stream.look();
        }
        self.receive(queues)
    }

    fn reset(&mut self) {}
}

/// Opens the file that takes output.
fn open_file(path: &Path) -> Result<LogFile, OpenError> {
    let error = OpenError::file("console file", path);
    LogFile::open(path, log_file::MAX).map_err(|cause| match &cause {
        LogFileError::NoReader => error(&cause.to_string(), "start the reader first"),
        LogFileError::Io(cause) if cause.kind() == ErrorKind::NotFound => {
            error("no such directory", "make the directory first")
        }
        LogFileError::InUse | LogFileError::Io(_) => {
            error(&cause.to_string(), "choose a file that you may write")
        }
    })
}

/// Writes at the end of the file. False: not all of it.
fn append(file: &mut LogFile, mut data: Buffers<'_>) -> bool {
    let room = file.room();
    let fits = data.len() <= room;
    data.truncate(room);
    while !data.is_empty() {
        if !matches!(file.write_with(|fd| data.write_to(fd)), Ok(1..)) {
            return false;
        }
    }
    fits
}

/// Whoever is at the other end.
struct Client {
    fd: OwnedFd,
    is_socket: bool,
    /// The other end, where it is to stay open.
    #[expect(dead_code, reason = "held so that the terminal stays as it is while nobody else has it open")]
    other: Option<OwnedFd>,
}

/// A console with somebody at the other end, or nobody right now.
struct Stream {
    poller: Poller,
    listener: Option<UnixListener>,
    client: Option<Client>,
    /// Somebody may want to be the next.
    callers: bool,
    readable: bool,
    /// The client is gone for good, but for what it had typed.
    hung_up: bool,
    watches_room: bool,
    kept: VecDeque<u8>,
}

impl Stream {
    fn new(listener: Option<UnixListener>, client: Option<Client>) -> Result<Self, OpenError> {
        let watch = || -> rustix::io::Result<Poller> {
            let poller = Poller::new(listener.as_ref().map(AsFd::as_fd))?;
            if let Some(client) = &client {
                poller.add(client.fd.as_fd(), CLIENT)?;
            }
            Ok(poller)
        };
        let poller = watch().map_err(|errno| {
            Config::refused(format!(
                "cannot watch its other end ({errno}); raise the limit of files (ulimit -n)"
            ))
        })?;
        let kept = VecDeque::new();
        Ok(Self {
            poller,
            listener,
            client,
            callers: true,
            readable: true,
            hung_up: false,
            watches_room: false,
            kept,
        })
    }

    /// Looks at what happened on the host's side.
    fn look(&mut self) {
        // There are fewer descriptors than events in one look.
        for event in self.poller.look().0 {
            match event {
                Ready::Listener => self.callers = true,
                Ready::Again => {}
                Ready::Socket { readable, hung_up, .. } => {
                    self.readable |= readable;
                    self.hung_up |= hung_up;
                }
            }
        }
        self.flush();
        self.next_client();
    }

    /// Takes the next program that waits, if there is none. One that has hung up stays for what it had typed, but not
    /// in the way of another: a guest may never read that.
    fn next_client(&mut self) {
        while (self.client.is_none() || self.hung_up) && self.callers {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok(fd) if self.poller.add(fd.as_fd(), CLIENT).is_ok() => {
                    self.client = Some(Client { fd, is_socket: true, other: None });
                    (self.readable, self.hung_up, self.watches_room) = (true, false, false);
                    self.flush();
                }
                Ok(_) | Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(_) => self.callers = false,
            }
        }
    }

    /// Sends output, or keeps it. False: older output was dropped for it.
    fn write(&mut self, mut data: Buffers<'_>) -> bool {
        while self.kept.is_empty() && !data.is_empty() {
            let Some(client) = &self.client else { break };
            let sent = match client.is_socket {
                true => data.send_to(client.fd.as_fd()),
                false => data.write_to(client.fd.as_fd()),
            };
            if sent.is_err() {
                break;
            }
        }
        let len = data.len();
        data.skip(len.saturating_sub(KEPT));
        let excess = (self.kept.len() + data.len()).saturating_sub(KEPT);
        self.kept.drain(..excess);
        let mut chunk = [0; 4096];
        while !data.is_empty() {
            let n = data.read(&mut chunk);
            self.kept.extend(&chunk[..n]);
        }
        self.watch_room();
        excess == 0 && len <= KEPT
    }

    /// Sends what is kept, as far as it goes.
    fn flush(&mut self) {
        while let (Some(client), (front @ [_, ..], _)) = (&self.client, self.kept.as_slices()) {
            let sent = match client.is_socket {
                true => rustix::net::send(&client.fd, front, SendFlags::NOSIGNAL | SendFlags::DONTWAIT),
                false => rustix::io::write(&client.fd, front),
            };
            match sent {
                Ok(n @ 1..) => _ = self.kept.drain(..n),
                Err(Errno::INTR) => {}
                Ok(0) | Err(_) => break,
            }
        }
        self.watch_room();
    }

    /// Room is of interest while something is kept for it.
    fn watch_room(&mut self) {
        let wanted = !self.kept.is_empty();
        if let Some(client) = &self.client
            && self.watches_room != wanted
            && self.poller.watch_room(client.fd.as_fd(), CLIENT, wanted).is_ok()
        {
            self.watches_room = wanted;
        }
    }

    /// Reads input into `room`. `None`: there is none now.
    fn read(&mut self, room: &mut Buffers<'_>) -> Option<usize> {
        if !self.readable {
            return None;
        }
        let read = self.client.as_ref().map(|client| room.read_from(client.fd.as_fd()));
        match read {
            Some(Ok(n @ 1..)) => Some(n),
            // The end of input is not the end of who reads the output: it may be `echo command | nc`.
            _ => {
                self.readable = false;
                if self.hung_up && self.client.take().is_some() {
                    self.hung_up = false;
                    self.next_client();
                }
                None
            }
        }
    }
}

/// Makes a pseudo-terminal that passes all bytes as they are, and says its name.
fn open_pty() -> Result<Client, OpenError> {
    let made = || -> io::Result<(OwnedFd, OwnedFd, String)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let own = rustix::pty::openpt(flags)?;
        rustix::pty::grantpt(&own)?;
        rustix::pty::unlockpt(&own)?;
        let name = rustix::pty::ptsname(&own, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let other = rustix::fs::open(name.as_c_str(), flags, Mode::empty())?;
        // Else it would echo the guest's output back as its input.
        let mut modes = rustix::termios::tcgetattr(&other)?;
        modes.make_raw();
        rustix::termios::tcsetattr(&other, rustix::termios::OptionalActions::Now, &modes)?;
        rustix::io::ioctl_fionbio(&own, true)?;
        Ok((own, other, name.to_string_lossy().into_owned()))
    };
    let (fd, other, name) = made().map_err(|error| {
        Config::refused(format!(
            "cannot make a pseudo-terminal ({error}); use socket=PATH, or check /dev/pts"
        ))
    })?;
    tracing::info!(pty = name, "the console hvc0 is a pseudo-terminal");
    Ok(Client { fd, is_socket: false, other: Some(other) })
}

#[cfg(test)]
#[path = "console_tests.rs"]
mod tests;
