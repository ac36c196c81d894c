//! The receiving half of the network device: from the tap into the buffers that the driver made available.

use std::collections::VecDeque;
use std::io::ErrorKind;

use super::header::{HEADER_BYTES, NUM_BUFFERS};
use super::tap::Tap;
use super::{MAX_FRAME, MAX_PER_CALL};
use crate::model::{Counters, Progress};
use crate::virtio::buffers::Buffers;
use crate::virtio::queue::{Chain, MAX_CHAIN, VirtQueue};

/// Longest datagram from a tap.
const MAX_DATAGRAM: usize = HEADER_BYTES + MAX_FRAME;

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
    /// The end of a datagram that turned out longer than that.
    spill: Box<[u8]>,
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
        let spill = vec![0; MAX_DATAGRAM].into();
        Self { mergeable: false, frames_wait: false, expected: 0, spill }
    }

    /// The device starts. Frames may have come before it.
    pub fn activate(&mut self, mergeable: bool) {
        (self.mergeable, self.frames_wait) = (mergeable, true);
    }

    /// The device stops.
    pub fn reset(&mut self) {
        (self.mergeable, self.frames_wait, self.expected) = (false, false, 0);
    }

    /// Whether frames may be waiting that no event of the host will announce.
    pub fn frames_wait(&self) -> bool {
        self.frames_wait
    }

    /// Moves frames until the tap is empty, buffers run out, or other devices are to get a turn.
    pub fn receive(&mut self, tap: &Tap, queue: &mut VirtQueue<'_>, counters: &Counters) -> Progress {
        self.frames_wait = true;
        let mut hand = Hand { queue, chains: VecDeque::new() };
        let mut moved = 0;
        let progress = loop {
            if moved >= MAX_PER_CALL {
                break Progress::More;
            }
            let Some(room) = hand.room(self.expected, self.mergeable) else {
                break if hand.queue.exhausted() { Progress::More } else { Progress::Done };
            };
            if moved > 0 && hand.may_end_within_a_frame(self.mergeable) {
                break Progress::More;
            }
            match self.receive_one(tap, room, &mut hand) {
                Ok(Some(bytes)) => {
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
        tap: &Tap,
        mut room: Buffers<'m>,
        hand: &mut Hand<'_, 'm>,
    ) -> Result<Option<usize>, ErrorKind> {
        let datagram = room.read_datagram(tap.fd(), &mut self.spill).map_err(|error| error.kind())?;
        if datagram.len <= HEADER_BYTES {
            // Not from a tap: the socket that stands in for it is closed, or speaks something else.
            return Err(ErrorKind::UnexpectedEof);
        }
        self.expected = datagram.len.max(self.expected / 2);
        // How much of the chains in hand it takes; more are drawn for what did not fit.
        let mut rest = &self.spill[datagram.left];
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
