//! The network device (virtio 1.3 §5.1): on queues of a tap interface of the host, or on a stream socket to passt.
//!
//! A tap speaks the device's own header, so frames go between it and guest memory without a copy, and
//! unfinished ones (no checksum, long TCP segments) stay unfinished as long as both sides agree to that.

mod config;
mod control;
mod header;
mod link;
mod mac;
pub mod mmds;
pub mod passt;
mod publish;
mod rx;
mod stream;
mod tap;

use std::any::Any;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use ciborium::Value;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::buffers::Buffers;
use super::config_space::ConfigSpace;
use super::queue::{MAX_CHAIN, Queues};
use crate::model::{Counters, DeviceKind, HostSource, OpenError, Progress, UpdateError, VirtioDevice};
use crate::snapshot::{SnapshotError, from_value, to_value};
use crate::throttle::LogLimit;
pub use config::{Config, TapChoice};
use header::{HEADER_BYTES, Offloads};
use link::{Link, Sent};
pub use mac::{MacAddr, MacError};
use mmds::{Metadata, Mmds};
use passt::Passt;
pub use publish::{Protocol, Publish, PublishError};
use rx::Receiver;

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;
/// Descriptors of the control queue.
const CONTROL_SIZE: u16 = 64;

/// Longest frame: the longest IPv4 or IPv6 packet that TSO makes, and its Ethernet header with a VLAN tag.
const MAX_FRAME: usize = 65535 + 18;
/// An Ethernet header: destination, source and type. Less is no frame.
const MIN_FRAME: usize = 14;
/// Bytes moved after which other devices get a turn.
const MAX_PER_CALL: usize = 4 << 20;
/// Where the source address is in a frame.
const SOURCE: std::ops::Range<usize> = 6..12;

/// Offloads that need a tap.
const OFFLOAD_FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6;

/// What a guest is told about its end of the link.
#[derive(Clone, Copy, Debug)]
struct Boot {
    address: Ipv4Addr,
    gateway: Ipv4Addr,
    mask: Ipv4Addr,
    dns: Option<Ipv4Addr>,
}

/// What a device is apart from its links.
#[derive(Clone, Copy, Debug)]
struct Setup {
    mac: MacAddr,
    mtu: Option<u16>,
    /// Frames from other addresses than `mac` are dropped.
    mac_check: bool,
    boot: Option<Boot>,
}

/// A receive queue, a transmit queue, and what is at their other end.
struct Pair {
    link: Link,
    receiver: Receiver,
    /// The driver's frames wait until the link has room.
    waits: bool,
}

/// The network device.
struct Net {
    pairs: Vec<Pair>,
    setup: Setup,
    queue_sizes: Vec<u16>,
    /// The driver knows of all pairs (VIRTIO_NET_F_MQ).
    multi_queue: bool,
    /// Metadata that the guest can ask for.
    mmds: Option<Mmds>,
    /// How many pairs, from the first, the driver uses.
    used: usize,
    /// What the driver may send.
    offloads: Offloads,
    /// The end of datagrams for which too little room was made.
    spill: Box<[u8]>,
    config: Arc<ConfigSpace>,
    counters: Arc<Counters>,
    /// The guest was told that its link is down.
    down: bool,
    log: LogLimit,
    /// Ends with the device.
    _passt: Option<Passt>,
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// receiveq of a pair.
    Receive(usize),
    /// transmitq of a pair.
    Transmit(usize),
    /// controlq.
    Control,
}

impl Net {
    fn new(links: Vec<Link>, setup: Setup, passt: Option<Passt>) -> Self {
        let pair = |link| Pair { link, receiver: Receiver::new(), waits: false };
        let pairs: Vec<_> = links.into_iter().map(pair).collect();
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs.len()];
        if pairs.len() > 1 {
            queue_sizes.push(CONTROL_SIZE);
        }
        let config = Arc::new(ConfigSpace::read_only(&config_bytes(&setup, pairs.len() as u16)));
        Self {
            pairs,
            setup,
            queue_sizes,
            multi_queue: false,
            mmds: None,
            offloads: Offloads::default(),
            spill: vec![0; rx::MAX_DATAGRAM].into(),
            config,
            counters: Arc::default(),
            used: 1,
            down: false,
            log: LogLimit::default(),
            _passt: passt,
        }
    }

    /// The same with this metadata, or with none.
    fn with_metadata(mut self, metadata: Option<&Metadata>) -> Result<Self, OpenError> {
        self.set_metadata(metadata)?;
        Ok(self)
    }

    fn set_metadata(&mut self, metadata: Option<&Metadata>) -> Result<(), OpenError> {
        match (&mut self.mmds, metadata) {
            (Some(mmds), Some(metadata)) => mmds.update(metadata.clone()),
            (_, None) => self.mmds = None,
            (None, Some(metadata)) => {
                let mmds = Mmds::new(metadata.clone(), self.setup.mtu);
                self.mmds = Some(mmds.map_err(|error| Config::refused(format!("metadata: {error}")))?);
            }
        }
        Ok(())
    }

    /// Virtio 1.3 §5.1.2: a driver without VIRTIO_NET_F_MQ knows of one pair, and the control queue is behind it.
    fn role(&self, queue: u16) -> Role {
        let pairs = if self.multi_queue { self.pairs.len() } else { 1 };
        let pair = usize::from(queue / 2);
        match queue % 2 {
            _ if pair >= pairs => Role::Control,
            0 => Role::Receive(pair),
            _ => Role::Transmit(pair),
        }
    }

    fn transmit(&mut self, queues: &mut Queues<'_>, pair: usize) -> Progress {
        let mut queue = queues.get(2 * pair as u16 + 1);
        let mut moved = 0;
        let progress = loop {
            if moved >= MAX_PER_CALL {
                break Progress::More;
            }
            let Some(mut chain) = queue.pop() else {
                break if queue.exhausted() { Progress::More } else { Progress::Done };
            };
            match self.send(pair, std::mem::take(&mut chain.readable)) {
                Sent::Frame(bytes) => {
                    queue.charge(bytes);
                    moved += bytes;
                    Counters::add(&self.counters.requests, 1);
                    Counters::add(&self.counters.bytes_from_guest, bytes as u64);
                }
                Sent::Dropped => {
                    queue.charge(0);
                    Counters::add(&self.counters.dropped, 1);
                }
                Sent::Mistake => queue.count_mistake(),
                Sent::Busy => {
                    self.pairs[pair].waits = true;
                    queue.unpop(chain);
                    break Progress::Done;
                }
            }
            queue.push(chain.head, 0);
        };
        if self.pairs[pair].link.flush().is_err() {
            Counters::add(&self.counters.host_errors, 1);
        }
        let answered = self.answer(queues);
        if progress == Progress::More { progress } else { answered }
    }

    /// Sends one frame. It is the host's now, or gone: nothing waits, as on any Ethernet, unless the host says so.
    fn send(&mut self, pair: usize, mut frame: Buffers<'_>) -> Sent {
        // Copied and checked: the guest can change its own copy at any time.
        let mut head = [0; HEADER_BYTES + MIN_FRAME];
        let complete = frame.read(&mut head) == head.len();
        let len = MIN_FRAME + frame.len();
        // As many pieces as a system call takes, less one for the head.
        if !complete || len > MAX_FRAME || frame.pieces() >= MAX_CHAIN {
            return Sent::Mistake;
        }
        let Some((header, start)) = head.split_first_chunk_mut() else { return Sent::Mistake };
        let Some(checked) = header::check(*header, len, self.offloads) else {
            return Sent::Mistake;
        };
        *header = checked;
        if self.setup.mac_check && start[SOURCE] != self.setup.mac.bytes() {
            return Sent::Dropped;
        }
        if let (Some(mmds), Some(ethernet)) = (&mut self.mmds, start.first_chunk())
            && mmds.is_addressed(ethernet, &frame)
        {
            return mmds.take(ethernet, &mut frame);
        }
        self.pairs[pair].link.send(&head, &mut frame).unwrap_or_else(|_| {
            Counters::add(&self.counters.host_errors, 1);
            Sent::Dropped
        })
    }

    /// Gives the guest what the metadata service has for it.
    fn answer(&mut self, queues: &mut Queues<'_>) -> Progress {
        let waits = self.mmds.as_ref().is_some_and(Mmds::has_frames);
        // The first pair is always in use.
        if waits { self.receive(queues, 0) } else { Progress::Done }
    }

    fn receive(&mut self, queues: &mut Queues<'_>, pair: usize) -> Progress {
        let Pair { link, receiver, .. } = &mut self.pairs[pair];
        let mut queue = queues.get(2 * pair as u16);
        if let Some(mmds) = self.mmds.as_mut().filter(|mmds| pair == 0 && mmds.has_frames()) {
            let progress = receiver.receive(mmds, &mut queue, &mut self.spill, &self.counters);
            if mmds.has_frames() {
                return progress;
            }
        }
        let progress = receiver.receive(link, &mut queue, &mut self.spill, &self.counters);
        if link.is_down() && !std::mem::replace(&mut self.down, true) {
            tracing::warn!("passt has ended, or no longer makes sense; the guest's network is down");
            let status = STATUS_AT..STATUS_AT + 2;
            self.config.update(|bytes| bytes[status].fill(0));
        }
        progress
    }

    /// The link of `pair` may have room again.
    fn go_on(&mut self, queues: &mut Queues<'_>, pair: usize) -> Progress {
        let Pair { link, waits, .. } = &mut self.pairs[pair];
        if link.is_behind() && link.flush().is_err() {
            Counters::add(&self.counters.host_errors, 1);
        }
        if !std::mem::take(waits) {
            return Progress::Done;
        }
        self.transmit(queues, pair)
    }

    fn control(&mut self, queues: &mut Queues<'_>, queue: u16) -> Progress {
        let Self { pairs, counters, multi_queue, used, .. } = self;
        let known = if *multi_queue { pairs.len() } else { 0 };
        control::serve(&mut queues.get(queue), counters, |count| {
            let count = usize::from(count);
            let taken = count <= known && use_pairs(pairs, count);
            *used = if taken { count } else { *used };
            taken
        })
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let bit = |on: bool, bit: u32| u64::from(on) << bit;
        let many = self.pairs.len() > 1;
        let by_link = match &self.pairs[0].link {
            Link::Tap(tap) if tap.has_offloads() => OFFLOAD_FEATURES,
            Link::Tap(_) => 0,
            // What came through a socket of this host's was not damaged on its way.
            Link::Stream(_) => 1 << VIRTIO_NET_F_GUEST_CSUM,
        };
        1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | bit(self.setup.mtu.is_some(), VIRTIO_NET_F_MTU)
            | bit(many, VIRTIO_NET_F_MQ)
            | bit(many, VIRTIO_NET_F_CTRL_VQ)
            | by_link
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config_space(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn kernel_parameters(&self, nth: usize) -> Option<String> {
        let Boot { address, gateway, mask, dns } = self.setup.boot?;
        let dns = dns.map(|dns| format!(":{dns}")).unwrap_or_default();
        Some(format!("ip={address}::{gateway}:{mask}::eth{nth}:off{dns}"))
    }

    /// One for receiving, one for sending, one for commands. Asked before anything is negotiated.
    fn lane(&self, queue: u16) -> usize {
        let commands = usize::from(queue) == 2 * self.pairs.len();
        if commands { 2 } else { usize::from(queue % 2) }
    }

    fn can_wait(&self, queue: u16) -> bool {
        self.lane(queue) == 1
    }

    fn activate(&mut self, features: u64) {
        let has = |bit: u32| features & 1 << bit != 0;
        let csum = has(VIRTIO_NET_F_CSUM);
        self.offloads = Offloads {
            csum,
            tso4: csum && has(VIRTIO_NET_F_HOST_TSO4),
            tso6: csum && has(VIRTIO_NET_F_HOST_TSO6),
        };
        self.multi_queue = has(VIRTIO_NET_F_MQ) && has(VIRTIO_NET_F_CTRL_VQ);
        // Until the driver says otherwise (virtio 1.3 §5.1.6.5.6).
        self.used = 1;
        if !use_pairs(&mut self.pairs, 1) {
            Counters::add(&self.counters.host_errors, 1);
        }
        let guest_csum = has(VIRTIO_NET_F_GUEST_CSUM);
        let (tso4, tso6) = (has(VIRTIO_NET_F_GUEST_TSO4), has(VIRTIO_NET_F_GUEST_TSO6));
        for pair in &mut self.pairs {
            pair.receiver.activate(has(VIRTIO_NET_F_MRG_RXBUF), guest_csum);
        }
        // All queues of an interface have the same offloads.
        if let Link::Tap(tap) = &self.pairs[0].link
            && let Err(error) = tap.set_offload(guest_csum, tso4, tso6)
        {
            // Frames still arrive: the tap finishes them all.
            if self.log.permits() {
                tracing::debug!(%error, "the tap does not take the negotiated offloads");
            }
            Counters::add(&self.counters.host_errors, 1);
        }
    }

    fn process(&mut self, queues: &mut Queues<'_>, queue: u16) -> Progress {
        match self.role(queue) {
            Role::Transmit(pair) => self.transmit(queues, pair),
            // New buffers matter only when a frame may be waiting for one.
            Role::Receive(pair) if self.pairs[pair].receiver.frames_wait() => self.receive(queues, pair),
            Role::Receive(_) => Progress::Done,
            Role::Control => self.control(queues, queue),
        }
    }

    fn host_sources(&self) -> Vec<HostSource> {
        let source = |(i, pair): (usize, &Pair)| HostSource {
            fd: pair.link.fd().as_raw_fd(),
            token: i as u32,
            writable: matches!(pair.link, Link::Stream(_)),
        };
        // Behind those of the pairs.
        let token = self.pairs.len() as u32;
        let timer = |mmds: &Mmds| HostSource { fd: mmds.timer(), token, writable: false };
        self.pairs.iter().enumerate().map(source).chain(self.mmds.iter().map(timer)).collect()
    }

    fn host_event(&mut self, queues: &mut Queues<'_>, token: u32) -> Progress {
        let pair = token as usize;
        if pair == self.pairs.len() {
            self.mmds.iter_mut().for_each(Mmds::go_on);
            return self.answer(queues);
        }
        if !self.multi_queue && pair > 0 {
            return Progress::Done;
        }
        let sent = self.go_on(queues, pair);
        let received = self.receive(queues, pair);
        if sent == Progress::More { sent } else { received }
    }

    fn update(&mut self, config: &dyn Any) -> Result<(), UpdateError> {
        let Some(config) = config.downcast_ref::<Config>() else { return Ok(()) };
        Ok(self.set_metadata(config.metadata.as_ref())?)
    }

    fn save(&self) -> Result<Value, SnapshotError> {
        to_value(&State { used_pairs: self.used })
    }

    fn restore(&mut self, _queues: &mut Queues<'_>, saved: Value) -> Result<(), SnapshotError> {
        let State { used_pairs } = from_value(saved)?;
        if used_pairs != self.used && (used_pairs == 0 || !self.multi_queue || used_pairs > self.pairs.len())
        {
            return Err(SnapshotError::impossible("number of queue pairs"));
        }
        self.used = used_pairs;
        if !use_pairs(&mut self.pairs, used_pairs) {
            Counters::add(&self.counters.host_errors, 1);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.mmds.iter_mut().for_each(Mmds::reset);
        self.offloads = Offloads::default();
        self.multi_queue = false;
        self.pairs.iter_mut().for_each(|pair| pair.waits = false);
    }
}

/// What a snapshot keeps of the device.
#[derive(Serialize, Deserialize)]
struct State {
    used_pairs: usize,
}

/// The driver uses the first `count` pairs: the host is to give frames to no others. Returns whether it took that.
fn use_pairs(pairs: &mut [Pair], count: usize) -> bool {
    pairs.iter_mut().enumerate().all(|(i, pair)| match &mut pair.link {
        Link::Tap(tap) => tap.set_enabled(i < count).is_ok(),
        Link::Stream(_) => true,
    })
}

/// Offset of `status` in struct virtio_net_config.
const STATUS_AT: usize = 6;

/// struct virtio_net_config (virtio 1.3 §5.1.4): mac, status, max_virtqueue_pairs, mtu.
fn config_bytes(setup: &Setup, pairs: u16) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..6].copy_from_slice(&setup.mac.bytes());
    bytes[STATUS_AT..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
    bytes[8..10].copy_from_slice(&pairs.to_le_bytes());
    bytes[10..].copy_from_slice(&setup.mtu.unwrap_or(0).to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests;
