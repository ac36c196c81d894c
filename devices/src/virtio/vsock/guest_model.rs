//! The guest's side for tests: a driver of the device, with buffers of its own that never overlap.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;

use super::listener;
use super::packet::{HEADER_BYTES, HOST_CID, Header, Op, STREAM};
use super::{RX, TX, Vsock};
use crate::throttle::Limits;
use crate::virtio::test_driver::{DATA, Desc, Driver, NEXT, WRITE};

/// CID of the guest.
pub const CID: u64 = 3;
/// Room that the guest says it has for each connection.
pub const ROOM: u32 = 64 << 10;
/// Buffers for packets to the guest, and how long each is.
const BUFFERS: u16 = 128;
const BUFFER: u64 = 2048;
/// Where a packet of the guest's is put.
const SENT: u64 = DATA + BUFFERS as u64 * BUFFER;

/// A packet that came to the guest.
pub type Packet = (Header, Vec<u8>);

/// A guest, its device, and the directory with the device's sockets.
pub struct Guest {
    pub driver: Driver,
    dir: TempDir,
    free: VecDeque<u16>,
    /// Buffers are given back as soon as they are used.
    pub generous: bool,
}

impl Guest {
    /// A guest that has given the device all its buffers.
    pub fn new() -> Self {
        Self::with(|_| ())
    }

    /// The same, with a device that was changed before.
    pub fn with(change: impl FnOnce(&mut Vsock)) -> Self {
        let mut guest = Self::stingy(change);
        guest.generous = true;
        guest.give(BUFFERS.into());
        guest
    }

    /// A guest whose device has limits.
    pub fn limited(limits: Limits) -> Self {
        let mut guest = Self::make(|_| (), &[limits]);
        guest.generous = true;
        guest.give(BUFFERS.into());
        guest
    }

    /// A guest that gives the device no buffers on its own.
    pub fn stingy(change: impl FnOnce(&mut Vsock)) -> Self {
        Self::make(change, &[])
    }

    fn make(change: impl FnOnce(&mut Vsock), limits: &[Limits]) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = listener::listen(&dir.path().join("v")).expect("a listener");
        let mut device = Vsock::new(listener, CID).expect("a device");
        change(&mut device);
        let mut driver = Driver::limited(Box::new(device), limits);
        driver.start(0);
        Self { driver, dir, free: (0..BUFFERS).collect(), generous: false }
    }

    /// The same guest after it has started the device anew, with all buffers given.
    pub fn into_fresh(mut self) -> Self {
        self.free = (0..BUFFERS).collect();
        self.give(usize::MAX);
        self
    }

    /// The device's socket.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    /// A host program that waits for the guest's calls to `port`.
    pub fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).expect("a free path")
    }

    /// A host program that has said this.
    pub fn connect(&self, line: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.path()).expect("the device listens");
        stream.write_all(line.as_bytes()).expect("there is room");
        stream
    }

    /// Gives the device up to `count` buffers more.
    pub fn give(&mut self, count: usize) {
        for index in self.free.drain(..count.min(self.free.len())).collect::<Vec<_>>() {
            let addr = DATA + u64::from(index) * BUFFER;
            self.driver.set_desc(RX, index, Desc { addr, len: BUFFER as u32, flags: WRITE, next: 0 });
            self.driver.offer(RX, index);
        }
        self.driver.kick(RX);
    }

    /// Packets that came since the last call of this.
    pub fn receive(&mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        loop {
            self.driver.host_events();
            let used = self.driver.used(RX);
            if used.is_empty() {
                return packets;
            }
            for (index, len) in used {
                let bytes = self.driver.read(DATA + u64::from(index) * BUFFER, len as usize);
                let (header, data) = bytes.split_first_chunk::<HEADER_BYTES>().expect("a header");
                let header = Header::from_bytes(header);
                assert_eq!(header.len as usize, data.len());
                assert_eq!(header.dst_cid, CID);
                packets.push((header, data.to_vec()));
                self.free.push_back(index as u16);
            }
            if self.generous {
                self.give(usize::MAX);
            }
        }
    }

    /// Waits for a packet that is not there at once.
    pub fn wait(&mut self) -> Packet {
        for _ in 0..1000 {
            if let Some(packet) = self.receive().into_iter().next() {
                return packet;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("no packet came");
    }

    /// The one packet that came.
    pub fn one(&mut self) -> Packet {
        let mut packets = self.receive();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    /// The numbers of the operations of all packets that came, with their flags.
    pub fn ops(&mut self) -> Vec<(u16, u32)> {
        self.receive().iter().map(|(header, _)| (header.op, header.flags)).collect()
    }

    /// Sends whatever this is, in buffers of at most `piece` bytes.
    pub fn send_raw(&mut self, bytes: &[u8], piece: usize) {
        self.driver.write(SENT, bytes);
        let pieces = bytes.len().div_ceil(piece).max(1);
        for i in 0..pieces {
            let (start, end) = (i * piece, bytes.len().min((i + 1) * piece));
            let flags = if i + 1 < pieces { NEXT } else { 0 };
            let desc =
                Desc { addr: SENT + start as u64, len: (end - start) as u32, flags, next: i as u16 + 1 };
            self.driver.set_desc(TX, i as u16, desc);
        }
        self.driver.offer(TX, 0);
        self.driver.kick(TX);
    }

    /// Sends a packet. Returns whether the device took it at once.
    pub fn send(&mut self, header: Header, data: &[u8]) -> bool {
        let bytes = [&header.to_bytes()[..], data].concat();
        self.send_raw(&bytes, usize::MAX);
        self.driver.used(TX) == [(0, 0)]
    }

    /// Mistakes of the guest that were counted.
    pub fn mistakes(&self) -> u64 {
        self.driver.counters.guest_mistakes.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// The guest calls `port` of the host, where somebody waits.
    pub fn call(&mut self, from: u32, port: u32, listener: &UnixListener) -> (Stream, UnixStream) {
        let stream = Stream::new(from, port);
        assert!(self.send(stream.header(Op::Request), &[]));
        let (answer, _) = self.one();
        assert_eq!(answer.op, Op::Response as u16);
        let (host, _) = listener.accept().expect("a call");
        host.set_nonblocking(true).expect("a socket");
        (stream.with(&answer), host)
    }

    /// A host program calls `port` of the guest, which answers.
    pub fn called(&mut self, port: u32) -> (Stream, UnixStream) {
        let mut host = self.connect(&format!("CONNECT {port}\n"));
        let (request, _) = self.one();
        assert_eq!((request.op, request.dst_port), (Op::Request as u16, port));
        let stream = Stream::new(port, request.src_port).with(&request);
        assert!(self.send(stream.header(Op::Response), &[]));
        let line = format!("OK {}\n", request.src_port);
        let mut answer = vec![0; line.len()];
        host.read_exact(&mut answer).expect("an answer");
        assert_eq!(answer, line.as_bytes());
        host.set_nonblocking(true).expect("a socket");
        (stream, host)
    }
}

/// The guest's end of a connection.
#[derive(Clone, Debug)]
pub struct Stream {
    /// The guest's port.
    pub guest: u32,
    /// The host's port.
    pub host: u32,
    /// Room that the device promised.
    pub buf_alloc: u32,
    /// Bytes that the device has forwarded.
    pub forwarded: u32,
    /// Bytes sent.
    pub sent: u32,
    /// Bytes received and taken.
    pub taken: u32,
}

impl Stream {
    pub fn new(guest: u32, host: u32) -> Self {
        Self { guest, host, buf_alloc: 0, forwarded: 0, sent: 0, taken: 0 }
    }

    /// With what a packet of the device's says about its room.
    pub fn with(mut self, packet: &Header) -> Self {
        self.learn(packet);
        self
    }

    /// Takes what a packet of the device's says about its room.
    pub fn learn(&mut self, packet: &Header) {
        (self.buf_alloc, self.forwarded) = (packet.buf_alloc, packet.fwd_cnt);
    }

    /// Bytes that may be sent now.
    pub fn credit(&self) -> usize {
        (self.buf_alloc - self.sent.wrapping_sub(self.forwarded)) as usize
    }

    /// A header of this connection.
    pub fn header(&self, op: Op) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: self.guest,
            dst_port: self.host,
            len: 0,
            kind: STREAM,
            op: op as u16,
            flags: 0,
            buf_alloc: ROOM,
            fwd_cnt: self.taken,
        }
    }

    /// A header with flags.
    pub fn flags(&self, op: Op, flags: u32) -> Header {
        Header { flags, ..self.header(op) }
    }

    /// Sends bytes, whether or not there is credit.
    pub fn write(&mut self, guest: &mut Guest, data: &[u8]) {
        let header = Header { len: data.len() as u32, ..self.header(Op::Rw) };
        self.sent = self.sent.wrapping_add(data.len() as u32);
        assert!(guest.send(header, data));
    }
}

/// What a host program can read now; `None` at the end.
pub fn read_now(host: &mut UnixStream) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 65536];
    loop {
        match host.read(&mut chunk) {
            Ok(0) => return (!bytes.is_empty()).then_some(bytes),
            Ok(n) => bytes.extend(&chunk[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Some(bytes),
            Err(_) => return None,
        }
    }
}
