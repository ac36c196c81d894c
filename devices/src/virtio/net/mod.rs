//! The network device (virtio 1.3 §5.1) on a tap interface of the host.
//!
//! The tap speaks the device's own header, so frames go between it and guest memory without a copy, and
//! unfinished ones (no checksum, long TCP segments) stay unfinished as long as both sides agree to that.

mod header;
mod mac;
mod rx;
mod tap;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::buffers::Buffers;
use super::config_space::ConfigSpace;
use super::queue::{MAX_CHAIN, Queues};
use crate::model::{Counters, DeviceKind, HostSource, MachineShape, OpenError, Progress, VirtioDevice};
use header::{HEADER_BYTES, Offloads};
pub use mac::{MacAddr, MacError};
use rx::Receiver;
use tap::Tap;

/// receiveq1.
const RX: u16 = 0;
/// transmitq1.
const TX: u16 = 1;

/// Longest frame: the longest IPv4 or IPv6 packet that TSO makes, and its Ethernet header with a VLAN tag.
const MAX_FRAME: usize = 65535 + 18;
/// An Ethernet header: destination, source and type. Less is no frame.
const MIN_FRAME: usize = 14;
/// Bytes moved after which other devices get a turn.
const MAX_PER_CALL: usize = 4 << 20;

/// Offloads that need a tap.
const OFFLOAD_FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6;

/// Configuration of a network interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// A tap interface of the host, which exists.
    pub tap: String,
    /// The guest's Ethernet address; left out: one that belongs to the names of tap and id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// A name of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

impl DeviceKind for Config {
    const NAME: &'static str = "net";
    const SYNTAX: &'static str = "tap=NAME[,mac=ADDRESS][,id=NAME]";
    const HELP: &'static str = "A network interface, on a tap interface of the host";

    fn open(&self, _: &MachineShape) -> Result<Box<dyn VirtioDevice>, OpenError> {
        let name = match &self.id {
            Some(id) => format!("{}/{id}", self.tap),
            None => self.tap.clone(),
        };
        let mac = self.mac.unwrap_or_else(|| MacAddr::from_name(&name));
        Ok(Box::new(Net::new(Tap::open(&self.tap)?, mac)))
    }

    /// An interface whose frames come back to it: a socket that is connected to itself.
    #[cfg(any(test, feature = "specimen"))]
    fn specimen() -> Box<dyn VirtioDevice> {
        use rustix::net::{AddressFamily, SocketAddrAny, SocketFlags, SocketType};
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None).expect("socket");
        // An address without a name lets the kernel choose one.
        rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new_unnamed()).expect("bind");
        let own: SocketAddrAny = rustix::net::getsockname(&socket).expect("own address");
        rustix::net::connect(&socket, &own).expect("connect");
        Box::new(Net::from_socket(socket, MacAddr::from_name("specimen")))
    }
}

/// The network device.
pub struct Net {
    tap: Tap,
    receiver: Receiver,
    /// What the driver may send.
    offloads: Offloads,
    config: Arc<ConfigSpace>,
    counters: Arc<Counters>,
}

impl Net {
    fn new(tap: Tap, mac: MacAddr) -> Self {
        let config = Arc::new(ConfigSpace::read_only(&config_bytes(mac)));
        Self {
            tap,
            receiver: Receiver::new(),
            offloads: Offloads::default(),
            config,
            counters: Arc::default(),
        }
    }

    /// An interface whose frames, behind a header of 12 bytes each, are the datagrams of a socket that does not
    /// wait. It offers no offloads.
    pub fn from_socket(socket: OwnedFd, mac: MacAddr) -> Self {
        Self::new(Tap::from_socket(socket), mac)
    }

    fn transmit(&mut self, queues: &mut Queues<'_>) -> Progress {
        let mut queue = queues.get(TX);
        let mut moved = 0;
        while moved < MAX_PER_CALL {
            let Some(chain) = queue.pop() else {
                return if queue.exhausted() { Progress::More } else { Progress::Done };
            };
            match self.send(chain.readable) {
                Sent::Frame(bytes) => {
                    moved += bytes;
                    Counters::add(&self.counters.requests, 1);
                    Counters::add(&self.counters.bytes_from_guest, bytes as u64);
                }
                Sent::Dropped => Counters::add(&self.counters.dropped, 1),
                Sent::Mistake => queue.count_mistake(),
            }
            queue.push(chain.head, 0);
        }
        Progress::More
    }

    /// Sends one frame. It is the host's now, or gone: nothing waits, as on any Ethernet.
    fn send(&self, mut frame: Buffers<'_>) -> Sent {
        let mut header = [0; HEADER_BYTES];
        let complete = frame.read(&mut header) == HEADER_BYTES;
        let len = frame.len();
        // As many pieces as a system call takes, less one for the header.
        if !complete || !(MIN_FRAME..=MAX_FRAME).contains(&len) || frame.pieces() >= MAX_CHAIN {
            return Sent::Mistake;
        }
        // Copied and checked: the guest can change its own copy at any time.
        let Some(header) = header::check(header, len, self.offloads) else {
            return Sent::Mistake;
        };
        match frame.write_datagram(&header, self.tap.fd()) {
            Ok(_) if frame.is_empty() => Sent::Frame(len),
            Ok(_) => Sent::Dropped,
            Err(error) => {
                if error.kind() != std::io::ErrorKind::WouldBlock {
                    Counters::add(&self.counters.host_errors, 1);
                }
                Sent::Dropped
            }
        }
    }

    fn receive(&mut self, queues: &mut Queues<'_>) -> Progress {
        self.receiver.receive(&self.tap, &mut queues.get(RX), &self.counters)
    }
}

/// What became of a frame that the guest sent.
enum Sent {
    /// The host has it: so many bytes without the header.
    Frame(usize),
    /// The host could not take it.
    Dropped,
    /// It was no frame.
    Mistake,
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let offloads = if self.tap.has_offloads() { OFFLOAD_FEATURES } else { 0 };
        1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_MRG_RXBUF | offloads
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256]
    }

    fn config_space(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn activate(&mut self, features: u64) {
        let has = |bit: u32| features & 1 << bit != 0;
        let csum = has(VIRTIO_NET_F_CSUM);
        self.offloads = Offloads {
            csum,
            tso4: csum && has(VIRTIO_NET_F_HOST_TSO4),
            tso6: csum && has(VIRTIO_NET_F_HOST_TSO6),
        };
        self.receiver.activate(has(VIRTIO_NET_F_MRG_RXBUF));
        let guest_csum = has(VIRTIO_NET_F_GUEST_CSUM);
        let (tso4, tso6) = (has(VIRTIO_NET_F_GUEST_TSO4), has(VIRTIO_NET_F_GUEST_TSO6));
        if let Err(error) = self.tap.set_offload(guest_csum, tso4, tso6) {
            // Frames still arrive: the tap finishes them all.
            tracing::debug!(%error, "the tap does not take the negotiated offloads");
            Counters::add(&self.counters.host_errors, 1);
        }
    }

    fn process(&mut self, queues: &mut Queues<'_>, queue: u16) -> Progress {
        match queue {
            TX => self.transmit(queues),
            // New buffers matter only when a frame may be waiting for one.
            RX if self.receiver.frames_wait() => self.receive(queues),
            _ => Progress::Done,
        }
    }

    fn host_sources(&self) -> Vec<HostSource> {
        vec![HostSource { fd: self.tap.fd().as_raw_fd(), token: 0, writable: false }]
    }

    fn host_event(&mut self, queues: &mut Queues<'_>, _token: u32) -> Progress {
        self.receive(queues)
    }

    fn reset(&mut self) {
        self.offloads = Offloads::default();
        self.receiver.reset();
    }
}

/// struct virtio_net_config (virtio 1.3 §5.1.4) up to the field that we use last, status.
fn config_bytes(mac: MacAddr) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..6].copy_from_slice(&mac.bytes());
    bytes[6..].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests;
