//! The host's side of one queue pair.

use std::io;
use std::os::fd::BorrowedFd;

use super::header::HEADER_BYTES;
use super::rx::Source;
use super::stream::Stream;
use super::tap::Tap;
use crate::virtio::buffers::{Buffers, Datagram};

/// Where the frames of one queue pair go to and come from.
#[derive(Debug)]
pub enum Link {
    /// A queue of a tap interface.
    Tap(Tap),
    /// A stream socket, and a program at its other end.
    Stream(Stream),
}

/// What became of a frame that the guest sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The host has it: so many bytes without the header.
    Frame(usize),
    /// The host could not take it.
    Dropped,
    /// The host cannot take it now, and says when it can.
    Busy,
    /// It was no frame.
    Mistake,
}

impl Link {
    /// The descriptor to watch.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tap(tap) => tap.fd(),
            Self::Stream(stream) => stream.fd(),
        }
    }

    /// Sends a frame. `head` is what was checked of it: its virtio-net header and its first bytes; `rest` follows.
    pub fn send(&mut self, head: &[u8], rest: &mut Buffers<'_>) -> io::Result<Sent> {
        let len = head.len() - HEADER_BYTES + rest.len();
        match self {
            Self::Tap(tap) => match rest.write_datagram(head, tap.fd()) {
                Ok(_) if rest.is_empty() => Ok(Sent::Frame(len)),
                Ok(_) => Ok(Sent::Dropped),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Sent::Dropped),
                Err(error) => Err(error),
            },
            Self::Stream(stream) => stream.send(&head[HEADER_BYTES..], rest),
        }
    }

    /// Sends what was collected.
    pub fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Tap(_) => Ok(()),
            Self::Stream(stream) => stream.flush(),
        }
    }

    /// Frames that were taken wait for the host.
    pub fn is_behind(&self) -> bool {
        matches!(self, Self::Stream(stream) if stream.is_behind())
    }

    /// Nothing more comes from the host.
    pub fn is_down(&self) -> bool {
        matches!(self, Self::Stream(stream) if stream.is_down())
    }
}

impl Source for Link {
    fn next_len(&mut self) -> io::Result<Option<usize>> {
        match self {
            Self::Tap(_) => Ok(None),
            Self::Stream(stream) => stream.next_len().map(Some),
        }
    }

    fn receive(
        &mut self,
        header: &[u8; HEADER_BYTES],
        room: &mut Buffers<'_>,
        spill: &mut [u8],
    ) -> io::Result<Datagram> {
        match self {
            Self::Tap(tap) => room.read_datagram(tap.fd(), spill),
            Self::Stream(stream) => stream.receive(header, room, spill),
        }
    }
}
