//! The socket device (virtio 1.3 §5.10): streams between sockets of the guest and unix sockets of the host.
//!
//! A program on the host connects to the device's socket, writes `CONNECT port` and a newline, and reads `OK`, a
//! port and a newline once the guest has accepted; else the connection is closed. A guest that connects to a port
//! of CID 2 gets the unix socket at the device's path with `_` and the port behind it.

mod config;
mod connection;
mod listener;
mod packet;
mod table;

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ciborium::Value;
use rustix::io::Errno;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::buffers::Buffers;
use super::config_space::ConfigSpace;
use super::poller::{Poller, Ready};
use super::queue::{Chain, Queues, VirtQueue};
use super::unix_listener::{UnixListener, new_socket};
use crate::model::{Counters, DeviceKind, HostSource, OpenError, Progress, VirtioDevice};
use crate::snapshot::SnapshotError;
pub use config::Config;
use connection::{Broken, Phase};
use listener::Greeting;
use packet::{HEADER_BYTES, HOST_CID, Header, Op, Ports, STREAM};
use table::Table;

/// Packets for the guest.
const RX: u16 = 0;
/// Packets of the guest.
const TX: u16 = 1;
/// Events for the guest (§5.10.6.7).
const EVENT: u16 = 2;

/// VIRTIO_VSOCK_F_STREAM (§5.10.3).
const F_STREAM: u64 = 1;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, as it is in an event.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// Bytes moved after which other devices get a turn.
const MAX_PER_CALL: usize = 4 << 20;
/// Connections that are taken in one turn.
const ACCEPTS_PER_CALL: usize = 64;
/// Resets that wait for buffers of the guest. With so many, its own packets wait too.
const MAX_RESETS: usize = 256;
/// Ports of the host's side of calls from the host are from here.
const FIRST_PORT: u32 = 1 << 30;
/// How long a host program may take to say whom it wants to talk to, and the guest to answer, together.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// How long a guest's call waits for a host program that has too many of them; a Linux guest waits as long.
const CALL_TIME: Duration = Duration::from_secs(2);
/// When to try such a call again.
const CALL_AGAIN: Duration = Duration::from_millis(10);
/// When to take connections again after there were no file descriptors for them.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// The socket device.
pub struct Vsock {
    cid: u64,
    listener: UnixListener,
    poller: Poller,
    table: Table,
    /// Resets of connections that are gone, or never were.
    resets: VecDeque<Header>,
    /// The guest's packets wait until some of these are sent.
    stalled: bool,
    /// The guest is to be told that all its connections are gone.
    tell_reset: bool,
    /// It has been told, and its driver has not given the event's buffer back: who calls now would be taken for one of those.
    /// How far the driver had offered buffers then, and when it has had time enough.
    told_reset: Option<(u16, Instant)>,
    /// Somebody may want to connect.
    callers: bool,
    /// When to look for them again.
    accept_at: Option<Instant>,
    next_port: u32,
    /// [`ANSWER_TIME`], but in tests.
    answer_time: Duration,
    config: Arc<ConfigSpace>,
    counters: Arc<Counters>,
}

impl Vsock {
    fn new(listener: UnixListener, cid: u64) -> Result<Self, OpenError> {
        let poller = Poller::new(Some(listener.as_fd())).map_err(|errno| {
            Config::refused(format!(
                "no file descriptors to watch its sockets with ({errno}); raise the limit (ulimit -n)"
            ))
        })?;
        Ok(Self {
            cid,
            listener,
            poller,
            table: Table::default(),
            resets: VecDeque::new(),
            stalled: false,
            tell_reset: false,
            told_reset: None,
            callers: false,
            accept_at: None,
            next_port: FIRST_PORT,
            answer_time: ANSWER_TIME,
            config: Arc::new(ConfigSpace::read_only(&cid.to_le_bytes())),
            counters: Arc::default(),
        })
    }

    /// Takes the guest's packets.
    fn transmit(&mut self, queues: &mut Queues<'_>) -> Progress {
        let mut queue = queues.get(TX);
        let mut moved = 0;
        loop {
            self.stalled = self.resets.len() >= MAX_RESETS;
            if self.stalled {
                return Progress::Done;
            }
            if moved >= MAX_PER_CALL {
                return Progress::More;
            }
            let Some(Chain { head, mut readable, .. }) = queue.pop() else {
                return if queue.exhausted() { Progress::More } else { Progress::Done };
            };
            let bytes = readable.len();
            let mut header = [0; HEADER_BYTES];
            // Copied out once: the guest may change its own copy at any time.
            let whole = readable.read(&mut header) == HEADER_BYTES;
            if !whole || self.take(&Header::from_bytes(&header), readable).is_err() {
                queue.count_mistake();
            }
            moved += bytes;
            queue.charge(bytes);
            Counters::add(&self.counters.requests, 1);
            queue.push(head, 0);
        }
    }

    /// What the guest's packets call for, in the same turn.
    fn answer(&mut self, queues: &mut Queues<'_>) -> Progress {
        let delivered = if self.has_packets() { self.deliver(queues) } else { Progress::Done };
        self.set_timer();
        // There is room again for the resets that packets may call for.
        let goes_on = self.stalled && self.resets.len() < MAX_RESETS;
        if goes_on { Progress::More } else { delivered }
    }

    fn set_timer(&mut self) {
        let told = self.told_reset.map(|(_, until)| until);
        self.poller.call_at(self.table.first_deadline().into_iter().chain(self.accept_at).chain(told).min());
    }

    /// Takes one packet of the guest's; `data` is all that follows the header. An error is a packet that no driver
    /// may send.
    fn take(&mut self, header: &Header, mut data: Buffers<'_>) -> Result<(), Broken> {
        if header.src_cid != self.cid {
            return Err(Broken);
        }
        let op = Op::from_number(header.op);
        let slot = self.table.find(header.ports());
        if header.dst_cid != HOST_CID {
            // Any program in the guest may try that.
            self.refuse(header, op);
            return Ok(());
        }
        let len = header.len as usize;
        let (Some(op), true, true) = (op, header.kind == STREAM, len <= data.len()) else {
            self.end(slot, header, op);
            return Err(Broken);
        };
        data.truncate(len);
        let Some(slot) = slot else {
            match op {
                Op::Request => self.call(header),
                _ => self.refuse(header, Some(op)),
            }
            return Ok(());
        };
        let taken = self.take_for(slot, op, header, data);
        if taken.is_err() {
            self.end(Some(slot), header, Some(op));
        }
        taken
    }

    /// Takes a packet for a connection that exists.
    fn take_for(&mut self, slot: usize, op: Op, header: &Header, data: Buffers<'_>) -> Result<(), Broken> {
        let connection = self.table.get(slot).ok_or(Broken)?;
        connection.take_credit(header);
        match op {
            Op::Request => return Err(Broken),
            Op::Response => {
                connection.answered()?;
                self.table.set_deadline(slot, None);
            }
            Op::Rst => _ = self.table.remove(slot),
            Op::Rw => {
                let bytes = data.len() as u64;
                connection.forward(data)?;
                Counters::add(&self.counters.bytes_from_guest, bytes);
            }
            Op::Shutdown if connection.phase() != Phase::Established => return Err(Broken),
            Op::Shutdown => {
                if connection.guest_ends(header.flags) {
                    // It has all that we have had from it, and waits for this.
                    self.reset(header.reset());
                    self.table.linger(slot);
                    self.drop_if_drained(slot);
                }
            }
            Op::CreditUpdate => {}
            Op::CreditRequest => connection.asked_for_credit(),
        }
        self.settle(slot);
        Ok(())
    }

    /// After anything happened to a connection: it waits for what it needs.
    fn settle(&mut self, slot: usize) {
        self.table.queue(slot);
        if let Some(connection) = self.table.get(slot)
            && let Some(watch) = connection.change_of_watch()
            && self.poller.watch_room(connection.socket(), slot, watch).is_err()
        {
            Counters::add(&self.counters.host_errors, 1);
        }
    }

    /// Ends a connection which the guest broke, if there is one, and says so to the guest.
    fn end(&mut self, slot: Option<usize>, header: &Header, op: Option<Op>) {
        if let Some(slot) = slot {
            self.table.remove(slot);
        }
        self.refuse(header, op);
    }

    /// Answers a packet with a reset, unless it is one.
    fn refuse(&mut self, header: &Header, op: Option<Op>) {
        if op != Some(Op::Rst) {
            self.reset(header.reset());
        }
    }

    /// Queues a reset. There is an end to them: the host's side could make more while the guest takes none.
    fn reset(&mut self, reset: Header) {
        if self.resets.len() < MAX_RESETS + table::MAX_CONNECTIONS {
            self.resets.push_back(reset);
        } else {
            Counters::add(&self.counters.dropped, 1);
        }
    }

    /// Gives a connection up for a reason on the host, and says so to the guest if it knows of it.
    fn give_up(&mut self, slot: usize) {
        if let Some(connection) = self.table.remove(slot)
            && connection.is_known()
        {
            let Ports { host, guest } = connection.ports();
            let from_guest = Header {
                src_cid: self.cid,
                dst_cid: HOST_CID,
                src_port: guest,
                dst_port: host,
                kind: STREAM,
                ..Header::default()
            };
            self.reset(from_guest.reset());
        }
    }

    /// The guest calls a program on the host.
    fn call(&mut self, header: &Header) {
        let socket = new_socket().ok();
        let slot = socket.and_then(|socket| self.table.insert(socket, Phase::Calling, header.ports()));
        let Some(slot) = slot else {
            Counters::add(&self.counters.dropped, 1);
            return self.refuse(header, Some(Op::Request));
        };
        if let Some(connection) = self.table.get(slot) {
            connection.take_credit(header);
            connection.set_give_up(Instant::now() + CALL_TIME);
        }
        self.try_call(slot);
    }

    /// Tries to reach the host program that the guest calls.
    fn try_call(&mut self, slot: usize) {
        let Some(connection) = self.table.get(slot) else { return };
        let now = Instant::now();
        match listener::call(&self.listener, connection.socket(), connection.ports().host) {
            Ok(()) if self.poller.add(connection.socket(), slot).is_ok() => {
                connection.accept();
                self.settle(slot);
            }
            Err(Errno::AGAIN | Errno::INTR) if connection.give_up().is_some_and(|at| now < at) => {
                self.table.set_deadline(slot, Some(now + CALL_AGAIN));
            }
            _ => self.give_up(slot),
        }
    }

    /// The driver has ended the connections that it had before: callers have waited for that.
    fn welcome_callers(&mut self) {
        self.told_reset = None;
        self.poller.wake();
    }

    /// Takes connections of host programs. True: there may be more.
    fn take_callers(&mut self) -> bool {
        for _ in 0..ACCEPTS_PER_CALL {
            match self.listener.accept() {
                Ok(socket) => {
                    let ports = Ports { host: 0, guest: 0 };
                    // With too many connections, this one is closed.
                    let Some(slot) = self.table.insert(socket, Phase::Greeting, ports) else {
                        Counters::add(&self.counters.dropped, 1);
                        continue;
                    };
                    let added = self.table.get(slot).map(|c| self.poller.add(c.socket(), slot));
                    if matches!(added, Some(Ok(()))) {
                        self.table.set_deadline(slot, Some(Instant::now() + self.answer_time));
                        self.greet(slot);
                    } else {
                        self.table.remove(slot);
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return false,
                Err(_) => {
                    Counters::add(&self.counters.host_errors, 1);
                    self.accept_at = Some(Instant::now() + ACCEPT_AGAIN);
                    return false;
                }
            }
        }
        true
    }

    /// Reads what a host program says first.
    fn greet(&mut self, slot: usize) {
        let Some(connection) = self.table.get(slot) else { return };
        match listener::greeting(connection.socket()) {
            Greeting::Connect(guest) => {
                // Bytes may be behind the line, and no event will tell of them.
                connection.now_readable(false);
                let host = self.free_port(guest);
                self.table.request(slot, Ports { host, guest });
                self.table.queue(slot);
            }
            Greeting::Incomplete => {}
            Greeting::Invalid => _ = self.table.remove(slot),
        }
    }

    /// A port of the host's side for a call to this port of the guest.
    fn free_port(&mut self, guest: u32) -> u32 {
        // There are more ports than connections.
        loop {
            let host = self.next_port;
            self.next_port = FIRST_PORT | (host + 1) & (FIRST_PORT - 1);
            if self.table.find(Ports { host, guest }).is_none() {
                return host;
            }
        }
    }

    /// Something happened to the socket of a connection.
    fn socket_event(&mut self, slot: usize, readable: bool, writable: bool, hung_up: bool) {
        let Some(connection) = self.table.get(slot) else { return };
        match connection.phase() {
            Phase::Greeting => return self.greet(slot),
            // Nobody is there any more to hear of the answer.
            Phase::Requested if hung_up => return self.give_up(slot),
            Phase::Lingering => {
                connection.flush();
                return self.drop_if_drained(slot);
            }
            _ => {}
        }
        if readable {
            connection.now_readable(hung_up);
        }
        if writable {
            connection.flush();
        }
        self.settle(slot);
    }

    /// Closes a connection that lingers, once there is nothing to wait for.
    fn drop_if_drained(&mut self, slot: usize) {
        if self.table.get(slot).is_some_and(|connection| connection.backlog() == 0) {
            self.table.remove(slot);
        }
    }

    /// Looks at connections whose time has come.
    fn deadlines(&mut self) {
        let now = Instant::now();
        if self.accept_at.is_some_and(|at| at <= now) {
            (self.accept_at, self.callers) = (None, true);
        }
        if self.told_reset.is_some_and(|(_, until)| until <= now) {
            self.told_reset = None;
        }
        while let Some(slot) = self.table.next_due(now) {
            match self.table.get(slot).map(|connection| connection.phase()) {
                Some(Phase::Calling) => self.try_call(slot),
                Some(Phase::Greeting | Phase::Requested) => self.give_up(slot),
                Some(Phase::Established | Phase::Lingering) | None => {}
            }
        }
    }

    /// Whether there may be packets for the guest.
    fn has_packets(&self) -> bool {
        !self.resets.is_empty() || self.table.is_ready()
    }

    /// Gives the guest what there is for it, from each connection in turn.
    fn deliver(&mut self, queues: &mut Queues<'_>) -> Progress {
        let mut queue = queues.get(RX);
        let mut moved = 0;
        while moved < MAX_PER_CALL {
            let Some(mut chain) = draw(&mut queue) else {
                return if queue.exhausted() { Progress::More } else { Progress::Done };
            };
            let mut data = chain.writable.clone();
            data.skip(HEADER_BYTES);
            let Some(header) = self.next_packet(&data) else {
                queue.unpop(chain);
                return Progress::Done;
            };
            chain.writable.write(&header.to_bytes());
            let len = HEADER_BYTES + header.len as usize;
            queue.charge(len);
            queue.push(chain.head, len as u32);
            moved += len;
            Counters::add(&self.counters.requests, 1);
            Counters::add(&self.counters.bytes_to_guest, header.len.into());
        }
        Progress::More
    }

    /// The next packet for the guest, with its bytes in `data` already.
    fn next_packet(&mut self, data: &Buffers<'_>) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(slot) = self.table.next_ready() {
            let Some(connection) = self.table.get(slot) else { continue };
            if let Some(packet) = connection.next_packet(data) {
                let header = connection.header(packet, self.cid);
                self.table.queue(slot);
                return Some(header);
            }
        }
        None
    }

    /// Looks after the buffers for events: they wait until there is one.
    fn events(&mut self, queues: &mut Queues<'_>) -> Progress {
        let mut queue = queues.get(EVENT);
        if self.told_reset.is_some_and(|(offered, _)| offered != queue.offered()) {
            self.welcome_callers();
        }
        while let Some(mut chain) = queue.pop() {
            if !chain.readable.is_empty() || chain.writable.len() < TRANSPORT_RESET.len() {
                queue.count_mistake();
                queue.push(chain.head, 0);
            } else if std::mem::take(&mut self.tell_reset) {
                let written = chain.writable.write(&TRANSPORT_RESET);
                self.told_reset = Some((queue.offered(), Instant::now() + self.answer_time));
                queue.push(chain.head, written as u32);
            } else {
                // The next one says that the guest has seen the event.
                let offered = self.told_reset.map_or_else(|| queue.offered(), |(offered, _)| offered);
                queue.leave(chain, offered);
                return Progress::Done;
            }
        }
        if queue.exhausted() { Progress::More } else { Progress::Done }
    }
}

/// Takes a chain with room for a packet; others are of no use and go back.
fn draw<'m>(queue: &mut VirtQueue<'m>) -> Option<Chain<'m>> {
    loop {
        let chain = queue.pop()?;
        if chain.readable.is_empty() && chain.writable.len() > HEADER_BYTES {
            return Some(chain);
        }
        queue.count_mistake();
        queue.push(chain.head, 0);
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256, 64]
    }

    fn config_space(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn activate(&mut self, _features: u64) {
        self.callers = true;
    }

    fn process(&mut self, queues: &mut Queues<'_>, queue: u16) -> Progress {
        match queue {
            // Answers go in the same turn.
            TX => match (self.transmit(queues), self.answer(queues)) {
                (Progress::Done, Progress::Done) => Progress::Done,
                _ => Progress::More,
            },
            RX => {
                let progress = self.deliver(queues);
                if self.stalled && self.resets.len() < MAX_RESETS {
                    self.poller.wake();
                }
                progress
            }
            _ => self.events(queues),
        }
    }

    fn host_sources(&self) -> Vec<HostSource> {
        vec![HostSource { fd: self.poller.fd(), token: 0, writable: false }]
    }

    fn host_event(&mut self, queues: &mut Queues<'_>, _token: u32) -> Progress {
        let (events, mut more) = self.poller.look();
        for event in events {
            match event {
                Ready::Listener => self.callers = true,
                Ready::Again => {}
                Ready::Socket { slot, readable, writable, hung_up } => {
                    self.socket_event(slot, readable, writable, hung_up);
                }
            }
        }
        self.deadlines();
        if self.tell_reset {
            more |= self.events(queues) == Progress::More;
        }
        if self.callers && self.told_reset.is_none() {
            self.callers = self.take_callers();
            more |= self.callers;
        }
        if self.has_packets() {
            more |= self.deliver(queues) == Progress::More;
        }
        if self.stalled {
            more |= self.transmit(queues) == Progress::More;
            more |= self.answer(queues) == Progress::More;
        }
        self.set_timer();
        if more { Progress::More } else { Progress::Done }
    }

    /// Events are outside all limits.
    fn lane(&self, queue: u16) -> usize {
        usize::from(queue == EVENT)
    }

    fn can_wait(&self, queue: u16) -> bool {
        queue == TX
    }

    /// The guest's connections were another machine's: it is told that they have ended, by an event
    /// (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, §5.10.6.7). What listens in it goes on listening.
    fn restore(&mut self, _queues: &mut Queues<'_>, _saved: Value) -> Result<(), SnapshotError> {
        self.tell_reset = true;
        self.poller.wake();
        Ok(())
    }

    fn reset(&mut self) {
        self.table.clear();
        self.resets.clear();
        (self.stalled, self.callers) = (false, false);
        (self.told_reset, self.accept_at) = (None, None);
    }
}

#[cfg(test)]
mod guest_model;
#[cfg(test)]
mod random_tests;
#[cfg(test)]
mod tests;
