//! The receiving half of a queue pair: from the host into the buffers that the driver made available.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};

use virtio_bindings::virtio_net::VIRTIO_NET_HDR_F_DATA_VALID;

use super::header::{HEADER_BYTES, NUM_BUFFERS};
use super::{MAX_FRAME, MAX_PER_CALL};
use crate::model::{Counters, Progress};
use crate::virtio::buffers::{Buffers, Datagram};
use crate::virtio::queue::{Chain, MAX_CHAIN, VirtQueue};

/// Longest datagram from the host.
pub const MAX_DATAGRAM: usize = HEADER_BYTES + MAX_FRAME;

/// Where frames for the guest come from.
pub trait Source {
    /// How long the next datagram (header and frame) is, where that can be known.
    fn next_len(&mut self) -> io::Result<Option<usize>>;

    /// Takes one frame, behind a virtio-net header: into `room`, and into `spill` what does not fit.
    fn receive(
        &mut self,
        header: &[u8; HEADER_BYTES],
        room: &mut Buffers<'_>,
        spill: &mut [u8],
    ) -> io::Result<Datagram>;
}

/// What the receiving half remembers between calls.
#[derive(Debug)]
pub struct Receiver {
    /// A frame may use several chains (VIRTIO_NET_F_MRG_RXBUF).
    mergeable: bool,
    /// Frames may be waiting on the host's side: the last call ended before the tap was empty.
    frames_wait: bool,
    /// How long datagrams were lately. That much room is made for the next: a frame of 64 KiB goes straight into
    /// 40 buffers, and a ping does not pop 40 for nothing.
    expected: usize,
    /// What is before a frame that comes without a virtio-net header.
    header: [u8; HEADER_BYTES],
}

/// Chains that the device has popped for the frames to come.
struct Hand<'q, 'm> {
    queue: &'q mut VirtQueue<'m>,
    chains: VecDeque<Chain<'m>>,
}

impl<'m> Hand<'_, 'm> {
    /// Takes one more chain from the queue. One without room for a header is no buffer and goes back.
    fn draw(&mut self) -> Option<&Chain<'m>> {
        loop {
            let chain = self.queue.pop()?;
            if chain.writable.len() > HEADER_BYTES {
                self.chains.push_back(chain);
                return self.chains.back();
            }
            self.queue.count_mistake();
            self.queue.push(chain.head, 0);
        }
    }

    /// Room for `bytes` in the chains from the front, if there is as much; one chain's room at least.
    fn room(&mut self, bytes: usize, mergeable: bool) -> Option<Buffers<'m>> {
        let mut room = Buffers::default();
        let mut next = 0;
        while next == 0 || (mergeable && room.len() < bytes && room.pieces() < MAX_CHAIN) {
            if next == self.chains.len() && self.draw().is_none() {
                break;
            }
            room.append(&self.chains[next].writable);
            next += 1;
        }
        (next > 0).then_some(room)
    }

    /// Whether this call's budget may end before the longest frame, at the size of the buffers so far.
    fn may_end_within_a_frame(&self, mergeable: bool) -> bool {
        let chains = self.chains.len() + usize::from(self.queue.budget());
        let len = self.chains.front().map_or(0, |chain| chain.writable.len());
        mergeable && chains.saturating_mul(len) < MAX_DATAGRAM
    }
}

impl Receiver {
    /// A receiver of a device that is not active.
    pub fn new() -> Self {
        Self { mergeable: false, frames_wait: false, expected: 0, header: [0; HEADER_BYTES] }
    }

    /// The device starts. Frames may have come before it. `trusted`: the driver need not check the checksums of frames
    /// that come without a header (VIRTIO_NET_F_GUEST_CSUM).
    pub fn activate(&mut self, mergeable: bool, trusted: bool) {
        *self = Self { mergeable, frames_wait: true, ..Self::new() };
        self.header[0] = if trusted { VIRTIO_NET_HDR_F_DATA_VALID as u8 } else { 0 };
    }

    /// Whether frames may be waiting that no event of the host will announce.
    pub fn frames_wait(&self) -> bool {
        self.frames_wait
    }

    /// Moves frames until no more come, buffers run out, or other devices are to get a turn. `spill` has room for
    /// [`MAX_DATAGRAM`] bytes, for the end of datagrams that turn out longer than expected.
    pub fn receive(
        &mut self,
        link: &mut impl Source,
        queue: &mut VirtQueue<'_>,
        spill: &mut [u8],
        counters: &Counters,
    ) -> Progress {
        self.frames_wait = true;
        let mut hand = Hand { queue, chains: VecDeque::new() };
        let mut moved = 0;
        let progress = loop {
            if moved >= MAX_PER_CALL {
                break Progress::More;
            }
            match link.next_len() {
                Ok(Some(len)) => self.expected = len,
                Ok(None) => {}
                Err(error) => {
                    self.frames_wait = false;
                    if error.kind() != ErrorKind::WouldBlock {
                        Counters::add(&counters.host_errors, 1);
                    }
                    break Progress::Done;
                }
            }
            let Some(room) = hand.room(self.expected, self.mergeable) else {
                break if hand.queue.exhausted() { Progress::More } else { Progress::Done };
            };
            if moved > 0 && hand.may_end_within_a_frame(self.mergeable) {
                break Progress::More;
            }
            match self.receive_one(link, room, &mut hand, spill) {
                Ok(Some(bytes)) => {
                    hand.queue.charge(bytes);
                    moved += bytes;
                    Counters::add(&counters.requests, 1);
                    Counters::add(&counters.bytes_to_guest, bytes as u64);
                }
                Ok(None) => {
                    // Dropped frames count as moved: they cost as much, and the tap may have many of them.
                    moved += MAX_DATAGRAM;
                    Counters::add(&counters.dropped, 1);
                }
                Err(kind) => {
                    self.frames_wait = false;
                    if kind != ErrorKind::WouldBlock {
                        Counters::add(&counters.host_errors, 1);
                    }
                    break Progress::Done;
                }
            }
        };
        while let Some(chain) = hand.chains.pop_back() {
            hand.queue.unpop(chain);
        }
        progress
    }

    /// Moves one frame. Returns its length without the header, or `None` if it had to be dropped.
    fn receive_one<'m>(
        &mut self,
        link: &mut impl Source,
        mut room: Buffers<'m>,
        hand: &mut Hand<'_, 'm>,
        spill: &mut [u8],
    ) -> Result<Option<usize>, ErrorKind> {
        let datagram = link.receive(&self.header, &mut room, spill).map_err(|error| error.kind())?;
        if datagram.len <= HEADER_BYTES {
            // Not from a tap: the socket that stands in for it is closed, or speaks something else.
            return Err(ErrorKind::UnexpectedEof);
        }
        self.expected = datagram.len.max(self.expected / 2);
        // How much of the chains in hand it takes; more are drawn for what did not fit.
        let mut rest = &spill[datagram.left];
        let mut covered: usize = datagram.len - rest.len();
        let mut used = 0;
        while covered > 0 || !rest.is_empty() {
            let chain = match hand.chains.get(used) {
                Some(chain) => chain,
                None if self.mergeable => match hand.draw() {
                    Some(chain) => chain,
                    None => return Ok(None),
                },
                None => return Ok(None),
            };
            if covered == 0 {
                let copied = chain.writable.clone().write(rest);
                rest = &rest[copied..];
            }
            covered = covered.saturating_sub(chain.writable.len());
            used += 1;
        }
        let Ok(buffers) = u16::try_from(used) else { return Ok(None) };
        if let Some(first) = hand.chains.front() {
            // The tap does not know this field (§5.1.6.4.1).
            let mut field = first.writable.clone();
            field.skip(NUM_BUFFERS);
            field.write(&buffers.to_le_bytes());
        }
        let mut left = datagram.len;
        for chain in hand.chains.drain(..used) {
            let written = left.min(chain.writable.len());
            left -= written;
            hand.queue.push(chain.head, written as u32);
        }
        Ok(Some(datagram.len - HEADER_BYTES))
    }
}
