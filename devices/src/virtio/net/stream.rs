//! Frames over a stream socket, as passt and QEMU speak it: each behind its length, 4 bytes in network byte order.
//!
//! What the peer sends is read in large pieces and copied to the guest from there. Short frames of the guest are
//! collected and sent together; long ones go out straight from guest memory. Both buffers have a fixed size: when the
//! peer does not keep up, the guest's frames wait in its queue.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags};

use super::header::HEADER_BYTES;
use super::link::Sent;
use super::{MAX_FRAME, MIN_FRAME};
use crate::virtio::buffers::{Buffers, Datagram};

/// Bytes of a frame's length.
const LENGTH_BYTES: usize = 4;
/// Bytes read at once. The longest frame fits several times.
const INBOX: usize = 256 << 10;
/// Bytes that may wait before no more frames are taken.
const OUTBOX: usize = 64 << 10;
/// From this length on, a frame is sent from where it is.
const LONG: usize = 8 << 10;

/// One end of a stream of frames.
#[derive(Debug)]
pub struct Stream {
    socket: OwnedFd,
    inbox: Box<[u8]>,
    /// The part of the inbox that holds what was read and not taken.
    start: usize,
    end: usize,
    /// What the socket had no room for, at most [`OUTBOX`] and one frame.
    outbox: Vec<u8>,
    down: bool,
}

impl Stream {
    /// Frames over `socket`, which does not wait.
    pub fn new(socket: OwnedFd) -> Self {
        let inbox = vec![0; INBOX].into();
        Self { socket, inbox, start: 0, end: 0, outbox: Vec::new(), down: false }
    }

    /// The socket.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The peer is gone, or no longer makes sense.
    pub fn is_down(&self) -> bool {
        self.down
    }

    /// Frames wait for the socket.
    pub fn is_behind(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Length of the next frame with a virtio-net header. Frames too short to be any are left out; one that is
    /// longer than any ends the connection, because nothing after it can be told apart.
    pub fn next_len(&mut self) -> io::Result<usize> {
        loop {
            let inbox = &self.inbox[self.start..self.end];
            let mut wanted = LENGTH_BYTES;
            if let Some((length, rest)) = inbox.split_first_chunk() {
                let len = u32::from_be_bytes(*length) as usize;
                if len > MAX_FRAME {
                    self.down = true;
                }
                if self.down {
                    return Err(ErrorKind::InvalidData.into());
                }
                wanted += len;
                if rest.len() >= len {
                    if len >= MIN_FRAME {
                        return Ok(HEADER_BYTES + len);
                    }
                    self.start += wanted;
                    continue;
                }
            }
            self.read_more(wanted)?;
        }
    }

    /// Moves the next frame behind `header`: into `room` as far as it goes, the rest into `spill`.
    pub fn receive(
        &mut self,
        header: &[u8; HEADER_BYTES],
        room: &mut Buffers<'_>,
        spill: &mut [u8],
    ) -> io::Result<Datagram> {
        let len = self.next_len()?;
        let from = self.start + LENGTH_BYTES;
        self.start = from + len - HEADER_BYTES;
        Ok(room.write_parts(&[header, &self.inbox[from..self.start]], spill))
    }

    /// Reads once, with room for a frame of `wanted` bytes.
    fn read_more(&mut self, wanted: usize) -> io::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start + wanted > self.inbox.len() {
            self.inbox.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.down {
            return Err(ErrorKind::NotConnected.into());
        }
        let room = &mut self.inbox[self.end..];
        let read = retry_on_intr(|| rustix::net::recv(&self.socket, &mut *room, RecvFlags::DONTWAIT));
        match read {
            Ok((0, _)) => {
                self.down = true;
                Err(ErrorKind::UnexpectedEof.into())
            }
            Ok((n, _)) => {
                self.end += n;
                Ok(())
            }
            Err(errno) => Err(self.failed(errno.into())),
        }
    }

    /// Takes a frame, of which `start` is the first part, to send it. [`Sent::Busy`]: there is no room for it now, and it
    /// is untouched.
    pub fn send(&mut self, start: &[u8], frame: &mut Buffers<'_>) -> io::Result<Sent> {
        if self.down {
            return Ok(Sent::Dropped);
        }
        let len = start.len() + frame.len();
        if self.outbox.len() + LENGTH_BYTES + len > OUTBOX && self.is_behind() {
            self.flush()?;
            if self.outbox.len() > OUTBOX / 2 {
                return Ok(Sent::Busy);
            }
        }
        let before = self.outbox.len();
        self.outbox.extend_from_slice(&(len as u32).to_be_bytes());
        self.outbox.extend_from_slice(start);
        if len >= LONG {
            match frame.write_datagram(&self.outbox, self.socket.as_fd()) {
                Ok(sent) => _ = self.outbox.drain(..sent.min(self.outbox.len())),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => {
                    self.outbox.truncate(before);
                    return Err(self.failed(error));
                }
            }
        }
        let at = self.outbox.len();
        self.outbox.resize(at + frame.len(), 0);
        frame.read(&mut self.outbox[at..]);
        Ok(Sent::Frame(len))
    }

    /// Sends what waits, as far as the socket takes it.
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.outbox.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match retry_on_intr(|| rustix::net::send(&self.socket, &self.outbox, flags)) {
                Ok(sent) => _ = self.outbox.drain(..sent),
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(self.failed(errno.into())),
            }
        }
        Ok(())
    }

    fn failed(&mut self, error: io::Error) -> io::Error {
        if error.kind() != ErrorKind::WouldBlock {
            self.down = true;
            self.outbox.clear();
        }
        error
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
