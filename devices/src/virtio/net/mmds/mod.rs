//! The metadata service: a web server for the guest within the network device, at an address that no frame leaves the
//! device for. Firecracker calls it MMDS.
//!
//! The guest's frames to the service's address end here, whatever Ethernet address they are for, so that a guest
//! reaches it by way of its gateway as well. The answers wait until the driver has buffers for them.

mod config;
#[cfg(test)]
mod guest_model;
mod service;
mod stack;

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
};

use super::header::HEADER_BYTES;
use super::link::Sent;
use super::rx::Source;
use super::{MIN_FRAME, MacAddr};
use crate::virtio::buffers::{Buffers, Datagram};
pub use config::{ADDRESS, Metadata, Version};
use service::{MAX_REQUEST, Service};
use stack::Stack;

/// Largest packet to the guest, unless its interface takes less.
const MTU: u16 = 1500;
/// Longest packet that a guest can mean well with: all that it may send at once, and the longest headers.
const MAX_PACKET: usize = MAX_REQUEST + 120;
/// Bytes behind the Ethernet header that say whether a frame is for the service: up to the end of an ARP request.
const LOOK: usize = 28;
/// Where IPv4 has the destination.
const IPV4_DESTINATION: std::ops::Range<usize> = 16..20;
/// Where ARP has the address that is asked for.
const ARP_TARGET: std::ops::Range<usize> = 24..28;

/// The service of one interface.
pub struct Mmds {
    service: Service,
    stack: Stack,
    timer: OwnedFd,
    mtu: u16,
    /// What sequence numbers depend on.
    seed: u64,
    /// The service's Ethernet address.
    own: EthernetAddress,
    /// The guest's, as it was in its last frame.
    guest: EthernetAddress,
    /// An answer to who asked for the service's Ethernet address; the last one counts.
    arp: Option<Vec<u8>>,
}

impl Mmds {
    /// A service with this metadata, for an interface with this MTU.
    pub fn new(metadata: Metadata, mtu: Option<u16>) -> io::Result<Self> {
        let mut seed = [0; 8];
        // Without chance, sequence numbers are less of a surprise, to nobody but the guest itself.
        _ = getrandom(&mut seed[..], GetRandomFlags::empty());
        Self::seeded(metadata, mtu, u64::from_le_bytes(seed))
    }

    /// The same, but all that depends on chance depends on `seed`: so that a fuzzer can find its way into a connection.
    pub fn seeded(metadata: Metadata, mtu: Option<u16>, seed: u64) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let mtu = mtu.map_or(MTU, |mtu| mtu.min(MTU));
        Ok(Self {
            stack: Stack::new(metadata.address, mtu.into(), seed),
            service: Service::new(metadata),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            mtu,
            seed,
            own: EthernetAddress(MacAddr::from_name("metadata").bytes()),
            guest: EthernetAddress::BROADCAST,
            arp: None,
        })
    }

    /// Other metadata. Connections and tokens stay if the address does.
    pub fn update(&mut self, metadata: Metadata) {
        let moved = metadata.address != self.service.metadata.address;
        self.service.metadata = metadata;
        if moved {
            self.reset();
        }
    }

    /// Ends all connections.
    pub fn reset(&mut self) {
        self.seed = self.seed.wrapping_add(1);
        self.stack = Stack::new(self.service.metadata.address, self.mtu.into(), self.seed);
        self.arp = None;
        self.set_timer();
    }

    /// Becomes ready when [`Self::go_on`] is to be called.
    pub fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Time has passed.
    pub fn go_on(&mut self) {
        self.stack.go_on(&mut self.service);
        self.set_timer();
    }

    /// Whether there are frames for the guest.
    pub fn has_frames(&self) -> bool {
        self.arp.is_some() || self.stack.next_packet().is_some()
    }

    /// Whether a frame of the guest's is for the service; `rest` is what follows its Ethernet header.
    pub fn is_addressed(&self, ethernet: &[u8; MIN_FRAME], rest: &Buffers<'_>) -> bool {
        let address = match kind(ethernet) {
            EthernetProtocol::Ipv4 => IPV4_DESTINATION,
            EthernetProtocol::Arp => ARP_TARGET,
            _ => return false,
        };
        let mut look = [0; LOOK];
        let seen = rest.peek(&mut look);
        seen >= address.end && look[address] == self.service.metadata.address.octets()
    }

    /// Takes a frame for the service.
    pub fn take(&mut self, ethernet: &[u8; MIN_FRAME], rest: &mut Buffers<'_>) -> Sent {
        if rest.len() > MAX_PACKET {
            return Sent::Dropped;
        }
        let mut packet = vec![0; rest.len()];
        rest.read(&mut packet);
        self.guest = EthernetFrame::new_unchecked(ethernet).src_addr();
        let len = ethernet.len() + packet.len();
        if kind(ethernet) == EthernetProtocol::Arp {
            self.arp = self.arp_answer(&packet);
        } else if !self.stack.take(packet, &mut self.service) {
            return Sent::Dropped;
        }
        self.set_timer();
        Sent::Frame(len)
    }

    /// The answer to a question for the service's Ethernet address, if this is one.
    fn arp_answer(&self, packet: &[u8]) -> Option<Vec<u8>> {
        let asked = ArpRepr::parse(&ArpPacket::new_checked(packet).ok()?).ok()?;
        let ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        } = asked
        else {
            return None;
        };
        let answer = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: self.own,
            source_protocol_addr: target_protocol_addr,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        let mut bytes = vec![0; answer.buffer_len()];
        answer.emit(&mut ArpPacket::new_unchecked(&mut bytes));
        Some(bytes)
    }

    /// The Ethernet header of the next frame, and what follows it.
    fn next(&self) -> Option<([u8; MIN_FRAME], &[u8])> {
        let (ethertype, packet) = match (&self.arp, self.stack.next_packet()) {
            (Some(arp), _) => (EthernetProtocol::Arp, &arp[..]),
            (None, Some(packet)) => (EthernetProtocol::Ipv4, packet),
            (None, None) => return None,
        };
        let repr = EthernetRepr { src_addr: self.own, dst_addr: self.guest, ethertype };
        let mut header = [0; MIN_FRAME];
        repr.emit(&mut EthernetFrame::new_unchecked(&mut header));
        Some((header, packet))
    }

    fn set_timer(&mut self) {
        let due = self.stack.due_in();
        // Zero would switch it off. Less than a millisecond is not worth an event.
        let left = due.map_or(Duration::ZERO, |left| left.max(Duration::from_millis(1)));
        let setting = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) },
        };
        // It cannot fail: the descriptor is a timer, and the time is one.
        _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting);
    }
}

/// The frames for the guest.
impl Source for Mmds {
    fn next_len(&mut self) -> io::Result<Option<usize>> {
        let (header, packet) = self.next().ok_or(ErrorKind::WouldBlock)?;
        Ok(Some(HEADER_BYTES + header.len() + packet.len()))
    }

    fn receive(
        &mut self,
        header: &[u8; HEADER_BYTES],
        room: &mut Buffers<'_>,
        spill: &mut [u8],
    ) -> io::Result<Datagram> {
        let (ethernet, packet) = self.next().ok_or(ErrorKind::WouldBlock)?;
        let datagram = room.write_parts(&[header, &ethernet, packet], spill);
        if self.arp.take().is_none() {
            self.stack.packet_taken();
        }
        Ok(datagram)
    }
}

fn kind(ethernet: &[u8; MIN_FRAME]) -> EthernetProtocol {
    EthernetFrame::new_unchecked(ethernet).ethertype()
}

#[cfg(test)]
mod tests;
