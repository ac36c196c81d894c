//! TCP between the guest and the metadata service.
//!
//! The guest decides what comes, so that everything has a bound: connections, bytes of each, frames that wait for the
//! guest, and the time that a connection may be silent.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as StackTime;
use smoltcp::wire::{HardwareAddress, IpCidr, IpProtocol, Ipv4Packet, TcpPacket};

use super::service::{MAX_REQUEST, Service};

/// The port that is served.
const PORT: u16 = 80;
/// Connections at a time. For one more, the one that has been silent for longest gives way.
const MAX_CONNECTIONS: usize = 16;
/// Bytes of an answer that are on their way, a connection.
const OUTBOX: usize = 16 << 10;
/// Packets that wait for the guest. Beyond that, what the guest sends is dropped, and comes again.
const MAX_WAITING: usize = 256;
/// How long a connection may do nothing.
const SILENCE: Duration = Duration::from_secs(60);
/// How long the guest may take to acknowledge what it was sent.
const UNACKNOWLEDGED: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(20);

/// Packets on their way between the guest and the stack.
#[derive(Debug)]
struct Wire {
    /// The packet that the guest sent.
    incoming: Option<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
    mtu: usize,
}

struct Incoming(Vec<u8>);

struct Outgoing<'a>(&'a mut VecDeque<Vec<u8>>);

impl phy::RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push_back(packet);
        result
    }
}

impl phy::Device for Wire {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: StackTime) -> Option<(Incoming, Outgoing<'_>)> {
        Some((Incoming(self.incoming.take()?), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: StackTime) -> Option<Outgoing<'_>> {
        (self.outgoing.len() < MAX_WAITING).then_some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        // Nothing damages packets on their way, and a guest may leave checksums to the device.
        let mut checksum = ChecksumCapabilities::default();
        (checksum.ipv4, checksum.tcp) = (Checksum::Tx, Checksum::Tx);
        capabilities.checksum = checksum;
        capabilities
    }
}

/// A socket that listens, or has a guest's connection.
#[derive(Debug)]
struct Connection {
    handle: SocketHandle,
    /// What is left to send.
    answer: Vec<u8>,
    sent: usize,
    /// Nothing more is answered.
    last: bool,
    /// When it last did something.
    active: Instant,
}

/// The service's end of the guest's connections.
pub struct Stack {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    /// Where the stack's time begins.
    epoch: Instant,
}

impl Stack {
    /// A stack at `address`, whose packets have at most `mtu` bytes and whose sequence numbers depend on `seed`.
    pub fn new(address: Ipv4Addr, mtu: usize, seed: u64) -> Self {
        let mut wire = Wire { incoming: None, outgoing: VecDeque::new(), mtu };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut wire, StackTime::ZERO);
        interface.update_ip_addrs(|addresses| {
            // There is room for one at least.
            _ = addresses.push(IpCidr::new(address.into(), 32));
        });
        let sockets = SocketSet::new(Vec::new());
        Self { wire, interface, sockets, connections: Vec::new(), epoch: Instant::now() }
    }

    /// The packet that the guest is to get next.
    pub fn next_packet(&self) -> Option<&[u8]> {
        self.wire.outgoing.front().map(Vec::as_slice)
    }

    /// The guest has [`Self::next_packet`].
    pub fn packet_taken(&mut self) {
        self.wire.outgoing.pop_front();
    }

    /// Takes a packet of the guest's; returns whether it did.
    pub fn take(&mut self, packet: Vec<u8>, service: &mut Service) -> bool {
        if self.wire.outgoing.len() >= MAX_WAITING {
            return false;
        }
        if begins_connection(&packet) {
            self.listen();
        }
        self.wire.incoming = Some(packet);
        self.go_on(service);
        true
    }

    /// Does what there is to do, also because time has passed.
    pub fn go_on(&mut self, service: &mut Service) {
        self.poll();
        let now = Instant::now();
        for connection in &mut self.connections {
            let socket = self.sockets.get_mut::<Socket<'_>>(connection.handle);
            connection.converse(socket, service, now);
        }
        self.poll();
        self.connections.retain(|connection| {
            let socket = self.sockets.get::<Socket<'_>>(connection.handle);
            let over = matches!(socket.state(), State::Closed | State::TimeWait);
            if over {
                self.sockets.remove(connection.handle);
            }
            !over
        });
    }

    /// How long until [`Self::go_on`] has something to do, whatever the guest does.
    pub fn due_in(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let stack = self.interface.poll_delay(self.time(), &self.sockets).map(Duration::from);
        let silent = |connection: &Connection| (connection.active + SILENCE).saturating_duration_since(now);
        let listens =
            |connection: &Connection| self.sockets.get::<Socket<'_>>(connection.handle).is_listening();
        self.connections.iter().filter(|connection| !listens(connection)).map(silent).chain(stack).min()
    }

    fn time(&self) -> StackTime {
        StackTime::from_micros(self.epoch.elapsed().as_micros() as i64)
    }

    fn poll(&mut self) {
        let time = self.time();
        self.interface.poll(time, &mut self.wire, &mut self.sockets);
    }

    /// Sees to it that there is a socket for a new connection.
    fn listen(&mut self) {
        let listens =
            |connection: &Connection| self.sockets.get::<Socket<'_>>(connection.handle).is_listening();
        if self.connections.iter().any(listens) {
            return;
        }
        if self.connections.len() == MAX_CONNECTIONS {
            let oldest = self.connections.iter().enumerate().min_by_key(|(_, connection)| connection.active);
            let Some((at, _)) = oldest else { return };
            let handle = self.connections.swap_remove(at).handle;
            self.sockets.get_mut::<Socket<'_>>(handle).abort();
            // Says so to the guest.
            self.poll();
            self.sockets.remove(handle);
        }
        let buffer = |bytes| SocketBuffer::new(vec![0; bytes]);
        let mut socket = Socket::new(buffer(MAX_REQUEST), buffer(OUTBOX));
        socket.set_timeout(Some(UNACKNOWLEDGED));
        // The end of an answer does not wait for the guest to acknowledge the rest.
        socket.set_nagle_enabled(false);
        // It fails for port 0 only.
        _ = socket.listen(PORT);
        let handle = self.sockets.add(socket);
        let active = Instant::now();
        self.connections.push(Connection { handle, answer: Vec::new(), sent: 0, last: false, active });
    }
}

/// Whether a packet asks for a new connection.
fn begins_connection(packet: &[u8]) -> bool {
    let Ok(packet) = Ipv4Packet::new_checked(packet) else { return false };
    let segment = (packet.next_header() == IpProtocol::Tcp).then(|| TcpPacket::new_checked(packet.payload()));
    segment.is_some_and(|segment| {
        segment.is_ok_and(|segment| segment.syn() && !segment.ack() && segment.dst_port() == PORT)
    })
}

impl Connection {
    /// Reads requests and sends answers, one after the other.
    fn converse(&mut self, socket: &mut Socket<'_>, service: &mut Service, now: Instant) {
        if !socket.is_active() {
            self.active = now;
            return;
        }
        if now.saturating_duration_since(self.active) >= SILENCE {
            return socket.abort();
        }
        let mut input = [0; MAX_REQUEST];
        loop {
            if self.sent < self.answer.len() {
                let sent = socket.send_slice(&self.answer[self.sent..]).unwrap_or(0);
                self.sent += sent;
                if sent > 0 {
                    self.active = now;
                }
                if self.sent < self.answer.len() {
                    return;
                }
                (self.answer, self.sent) = (Vec::new(), 0);
            }
            let len = if self.last { 0 } else { socket.peek_slice(&mut input).unwrap_or(0) };
            let Some((used, reply)) = service.answer(&input[..len]).filter(|_| len > 0) else { break };
            _ = socket.recv_slice(&mut input[..used]);
            (self.answer, self.last, self.active) = (reply.bytes, reply.close, now);
        }
        // Everything is answered, and nothing more will come.
        if self.last || socket.state() == State::CloseWait {
            socket.close();
        }
    }
}

#[cfg(test)]
#[path = "stack_tests.rs"]
mod tests;
