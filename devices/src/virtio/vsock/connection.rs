//! One stream between a socket of the host and a socket of the guest: its life, its credit and its bytes.
//!
//! Bytes go straight between the host's socket and the packet's buffers. Only what the host's socket has no room
//! for is kept here, and that is never more than the room that the guest was promised (`buf_alloc`).

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use bitflags::bitflags;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown};

use super::packet::{Header, NEITHER, NO_RECEIVE, NO_SEND, Op, Ports};
use crate::virtio::buffers::Buffers;

/// Where in its life a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A host program has connected and not yet said to which port.
    Greeting,
    /// A host program calls; the guest has not answered.
    Requested,
    /// The guest calls; the host program has no room for a call right now.
    Calling,
    /// Both sides are there.
    Established,
    /// The guest is done with it; the host has not yet taken all that the guest had sent.
    Lingering,
}

bitflags! {
    /// Packets without bytes that the guest is to get.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Due: u8 {
        const REQUEST = 1;
        const RESPONSE = 2;
        const CREDIT_UPDATE = 4;
    }
}

/// A connection, in any phase.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    phase: Phase,
    ports: Ports,
    /// When the call is given up.
    give_up: Option<Instant>,
    due: Due,
    /// The guest knows of this connection.
    known: bool,

    /// From the guest, for the host: what the host's socket had no room for.
    backlog: VecDeque<u8>,
    /// Room that the guest is promised, in bytes.
    buf_alloc: u32,
    /// Bytes that came from the guest, modulo 2³².
    received: u32,
    /// What the guest was last told about how many of them have left.
    told_fwd_cnt: u32,
    /// An event is wanted when the host's socket has room.
    watches_room: bool,

    /// The host's socket may have bytes, or its end.
    readable: bool,
    /// The host's side is gone for good.
    hung_up: bool,
    /// Room that the guest promised.
    peer_buf_alloc: u32,
    /// Bytes sent to the guest that it has not taken yet, as far as we know.
    in_flight: u32,
    /// Bytes sent to the guest, modulo 2³².
    sent: u32,
    /// The guest was asked for credit since there was some.
    asked: bool,

    /// What the host does no more, and what of it the guest was told. Flags as in a SHUTDOWN of ours.
    host_ended: u32,
    told_ended: u32,
    /// What the guest does no more. Flags as in its SHUTDOWN.
    guest_ended: u32,
}

/// The guest broke the rules of this connection, or the host's socket is of no use: it has to be reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

/// A packet for the guest, as far as a connection knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Its operation.
    pub op: Op,
    /// Its flags.
    pub flags: u32,
    /// Bytes that are in the buffers already.
    pub len: usize,
}

impl Connection {
    /// A connection on `socket` that promises the guest `buf_alloc` bytes of room.
    pub fn new(socket: OwnedFd, phase: Phase, ports: Ports, buf_alloc: u32) -> Self {
        Self {
            socket,
            phase,
            ports,
            give_up: None,
            due: Due::empty(),
            known: phase == Phase::Calling,
            backlog: VecDeque::new(),
            buf_alloc,
            received: 0,
            told_fwd_cnt: 0,
            watches_room: false,
            readable: false,
            hung_up: false,
            peer_buf_alloc: 0,
            in_flight: 0,
            sent: 0,
            asked: false,
            host_ended: 0,
            told_ended: 0,
            guest_ended: 0,
        }
    }

    /// The host's socket.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Where in its life it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Its ports. Nothing of use while it is in [`Phase::Greeting`].
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Room that the guest is promised, in bytes.
    pub fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// When a call of the guest's is given up.
    pub fn give_up(&self) -> Option<Instant> {
        self.give_up
    }

    /// Sets [`Self::give_up`].
    pub fn set_give_up(&mut self, at: Instant) {
        self.give_up = Some(at);
    }

    /// Whether the guest has heard of it, and is to hear when it ends.
    pub fn is_known(&self) -> bool {
        self.known
    }

    /// Bytes that wait for room in the host's socket.
    pub fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Whether an event is wanted when the host's socket has room, if that is a change.
    pub fn change_of_watch(&mut self) -> Option<bool> {
        let wanted = !self.backlog.is_empty();
        (std::mem::replace(&mut self.watches_room, wanted) != wanted).then_some(wanted)
    }

    /// A host program wants to talk to this port of the guest.
    pub fn request(&mut self, ports: Ports) {
        (self.phase, self.ports) = (Phase::Requested, ports);
        self.due |= Due::REQUEST;
    }

    /// The host program took the guest's call.
    pub fn accept(&mut self) {
        self.phase = Phase::Established;
        self.due |= Due::RESPONSE;
    }

    /// The guest took the host's call: the host program is told.
    pub fn answered(&mut self) -> Result<(), Broken> {
        if self.phase != Phase::Requested || self.due.contains(Due::REQUEST) {
            return Err(Broken);
        }
        self.phase = Phase::Established;
        let line = format!("OK {}\n", self.ports.host);
        match send(&self.socket, line.as_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(sent) if sent == line.len() => Ok(()),
            _ => Err(Broken),
        }
    }

    /// The host's socket may have bytes; and if the other side `hung_up`, these are the last.
    pub fn now_readable(&mut self, hung_up: bool) {
        self.readable = true;
        self.hung_up |= hung_up;
        // Who does not read to the end, for one reason or another, does not meet the end.
        if self.hung_up && (self.guest_ended & NO_RECEIVE != 0 || self.host_ended & NO_SEND != 0) {
            self.host_ended = NEITHER;
        }
    }

    /// What every packet of the guest's says about its room. What cannot be is not believed.
    ///
    /// Two packets may overtake each other within the guest, so an old count is no mistake.
    pub fn take_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        let in_flight = self.sent.wrapping_sub(header.fwd_cnt);
        self.in_flight = self.in_flight.min(in_flight);
        self.asked &= self.credit() == 0;
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.in_flight)
    }

    /// The guest asks how much room it has.
    pub fn asked_for_credit(&mut self) {
        self.due |= Due::CREDIT_UPDATE;
    }

    /// Bytes of the guest's that have left the room it is promised, modulo 2³².
    fn fwd_cnt(&self) -> u32 {
        // The backlog has at most `buf_alloc` bytes.
        self.received.wrapping_sub(self.backlog.len() as u32)
    }

    /// Moves the guest's bytes to the host's socket, as far as there is room, and keeps the rest.
    pub fn forward(&mut self, mut data: Buffers<'_>) -> Result<(), Broken> {
        let room = self.buf_alloc as usize - self.backlog.len();
        if self.phase != Phase::Established || self.guest_ended & NO_SEND != 0 || data.len() > room {
            return Err(Broken);
        }
        self.received = self.received.wrapping_add(data.len() as u32);
        while self.backlog.is_empty() && !data.is_empty() && self.host_ended & NO_RECEIVE == 0 {
            match data.send_to(self.socket.as_fd()) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.host_receives_no_more(),
            }
        }
        if self.host_ended & NO_RECEIVE == 0 && !data.is_empty() {
            self.backlog.reserve(data.len());
            let mut chunk = [0; 4096];
            while !data.is_empty() {
                let n = data.read(&mut chunk);
                self.backlog.extend(&chunk[..n]);
            }
        }
        self.announce_room();
        Ok(())
    }

    /// Moves what is kept to the host's socket, as far as there is room.
    pub fn flush(&mut self) {
        let kept_some = !self.backlog.is_empty();
        while !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            match send(&self.socket, front, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => _ = self.backlog.drain(..sent),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => self.host_receives_no_more(),
            }
        }
        if kept_some && self.backlog.is_empty() {
            // A connection that is slow once does not keep memory for all its life.
            self.backlog = VecDeque::new();
            // Once: each shutdown is an event of the socket, and would bring us here again.
            if self.guest_ended & NO_SEND != 0 && self.phase == Phase::Established {
                _ = shutdown(&self.socket, Shutdown::Write);
            }
        }
        self.announce_room();
    }

    /// The host's side reads no more: what the guest sends goes nowhere, and it is told.
    fn host_receives_no_more(&mut self) {
        self.host_ended |= NO_RECEIVE;
        self.backlog = VecDeque::new();
    }

    /// The guest is told about room when half of what it knows of is used up: it cannot run dry before that, and
    /// is not told for every few bytes.
    fn announce_room(&mut self) {
        if self.fwd_cnt().wrapping_sub(self.told_fwd_cnt) >= self.buf_alloc / 2 {
            self.due |= Due::CREDIT_UPDATE;
        }
    }

    /// The guest ends a direction, or both. True: it is done with the connection.
    pub fn guest_ends(&mut self, flags: u32) -> bool {
        let new = flags & NEITHER & !self.guest_ended;
        self.guest_ended |= new;
        if new & NO_RECEIVE != 0 {
            _ = shutdown(&self.socket, Shutdown::Read);
            self.readable = false;
            if self.hung_up {
                self.host_ended = NEITHER;
            }
        }
        if new & NO_SEND != 0 && self.backlog.is_empty() {
            _ = shutdown(&self.socket, Shutdown::Write);
        }
        self.guest_ended == NEITHER
    }

    /// The guest has forgotten it; what it had sent still goes to the host.
    pub fn linger(&mut self) {
        self.phase = Phase::Lingering;
    }

    /// Whether there is a packet for the guest, or may be one.
    pub fn has_packet(&self) -> bool {
        match self.phase {
            Phase::Requested => self.due.contains(Due::REQUEST),
            Phase::Established => {
                !self.due.is_empty() || self.host_ended & !self.told_ended != 0 || self.may_read()
            }
            Phase::Greeting | Phase::Calling | Phase::Lingering => false,
        }
    }

    /// Whether reading from the host's socket makes sense, or asking the guest for room to do so.
    fn may_read(&self) -> bool {
        let open = self.guest_ended & NO_RECEIVE == 0 && self.host_ended & NO_SEND == 0;
        self.readable && open && (self.credit() > 0 || !self.asked)
    }

    /// The next packet for the guest, with its bytes in `room`.
    pub fn next_packet(&mut self, room: &Buffers<'_>) -> Option<Packet> {
        if !self.has_packet() {
            return None;
        }
        let packet = |op| Some(Packet { op, flags: 0, len: 0 });
        if self.due.contains(Due::REQUEST) {
            self.due.remove(Due::REQUEST);
            self.known = true;
            return packet(Op::Request);
        }
        if self.due.contains(Due::RESPONSE) {
            self.due.remove(Due::RESPONSE);
            return packet(Op::Response);
        }
        if self.may_read() && self.credit() > 0 {
            let len = self.read(room.clone());
            if len > 0 {
                return Some(Packet { op: Op::Rw, flags: 0, len });
            }
        }
        if self.due.contains(Due::CREDIT_UPDATE) {
            return packet(Op::CreditUpdate);
        }
        if self.host_ended & !self.told_ended != 0 {
            self.told_ended |= self.host_ended;
            return Some(Packet { op: Op::Shutdown, flags: self.told_ended, len: 0 });
        }
        if self.may_read() && !self.asked {
            self.asked = true;
            return packet(Op::CreditRequest);
        }
        None
    }

    /// Reads from the host's socket what it has, as much as fits. 0: nothing now, or nothing ever again.
    fn read(&mut self, mut room: Buffers<'_>) -> usize {
        room.truncate(self.credit() as usize);
        match room.read_from(self.socket.as_fd()) {
            Ok(len @ 1..) => {
                self.sent = self.sent.wrapping_add(len as u32);
                // At most the credit.
                self.in_flight += len as u32;
                return len;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Ok(_) => {
                self.host_ended |= NO_SEND;
                if self.hung_up {
                    self.host_ended |= NO_RECEIVE;
                }
            }
            Err(_) => self.host_ended = NEITHER,
        }
        self.readable = false;
        0
    }

    /// The header of `packet` for a guest of this CID. It tells the guest of its room.
    pub fn header(&mut self, packet: Packet, guest_cid: u64) -> Header {
        self.due.remove(Due::CREDIT_UPDATE);
        self.told_fwd_cnt = self.fwd_cnt();
        Header {
            src_cid: super::packet::HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len: packet.len as u32,
            kind: super::packet::STREAM,
            op: packet.op as u16,
            flags: packet.flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.told_fwd_cnt,
        }
    }
}
