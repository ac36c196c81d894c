//! Streams under random behaviour of both sides: every byte arrives, once and in order, and no more memory is used
//! than was promised.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::guest_model::{Guest, Packet, ROOM, Stream};
use super::packet::{NEITHER, NO_SEND, Op};

/// Connections at a time.
const CONNECTIONS: usize = 4;

#[derive(Clone, Debug)]
enum Step {
    HostWrites { at: usize, len: usize },
    HostReads { at: usize, len: usize },
    HostEnds { at: usize },
    GuestWrites { at: usize, len: usize, piece: usize },
    GuestTakes { at: usize, percent: u32, tells: bool },
    GuestEnds { at: usize },
    GuestGivesBuffers { count: usize },
    GuestLooks,
}

fn any_step() -> impl Strategy<Value = Step> {
    let (at, len) = (0..CONNECTIONS, prop_oneof![1..100usize, 1..80_000usize]);
    let bytes = (at.clone(), len);
    prop_oneof![
        6 => bytes.clone().prop_map(|(at, len)| Step::HostWrites { at, len }),
        6 => bytes.clone().prop_map(|(at, len)| Step::HostReads { at, len }),
        1 => at.clone().prop_map(|at| Step::HostEnds { at }),
        6 => (bytes, 64..5000usize).prop_map(|((at, len), piece)| Step::GuestWrites { at, len, piece }),
        4 => (at.clone(), 0..=100u32, any::<bool>())
            .prop_map(|(at, percent, tells)| Step::GuestTakes { at, percent, tells }),
        1 => at.prop_map(|at| Step::GuestEnds { at }),
        6 => (1..40usize).prop_map(|count| Step::GuestGivesBuffers { count }),
        6 => Just(Step::GuestLooks),
    ]
}

/// The byte at a position of a stream.
fn byte(position: usize) -> u8 {
    (position * 31 + (position >> 8) * 7) as u8
}

fn bytes(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(byte).collect()
}

/// A connection with what each side knows of it.
struct Pair {
    stream: Stream,
    host: UnixStream,
    host_wrote: usize,
    host_read: usize,
    guest_wrote: usize,
    guest_got: usize,
    host_ended: bool,
    guest_ended: bool,
    guest_saw_end: bool,
    host_saw_end: bool,
}

impl Pair {
    fn host_reads(&mut self, len: usize) {
        let mut data = vec![0; len];
        match self.host.read(&mut data) {
            Ok(0) => self.host_saw_end = true,
            Ok(n) => {
                assert!(data[..n] == bytes(self.host_read, n), "host read other bytes at {}", self.host_read);
                self.host_read += n;
            }
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    }
}

struct World {
    guest: Guest,
    pairs: Vec<Pair>,
}

impl World {
    fn new() -> Self {
        let mut guest = Guest::stingy(|_| ());
        guest.give(8);
        let listener = guest.listen(1);
        let pairs = (0..CONNECTIONS)
            .map(|i| {
                let (stream, host) = match i % 2 {
                    0 => guest.called(100 + i as u32),
                    _ => guest.call(100 + i as u32, 1, &listener),
                };
                Pair {
                    stream,
                    host,
                    host_wrote: 0,
                    host_read: 0,
                    guest_wrote: 0,
                    guest_got: 0,
                    host_ended: false,
                    guest_ended: false,
                    guest_saw_end: false,
                    host_saw_end: false,
                }
            })
            .collect();
        Self { guest, pairs }
    }

    fn look(&mut self) {
        for (header, data) in self.guest.receive() {
            self.got((header, data));
        }
    }

    fn got(&mut self, (header, data): Packet) {
        let pair = &mut self.pairs[header.dst_port as usize - 100];
        pair.stream.learn(&header);
        match Op::from_number(header.op) {
            Some(Op::Rw) => {
                assert!(!pair.guest_saw_end, "bytes after the end");
                assert!(data == bytes(pair.guest_got, data.len()), "guest got other bytes");
                pair.guest_got += data.len();
                assert!(
                    pair.guest_got - pair.stream.taken as usize <= ROOM as usize,
                    "more than there is room"
                );
            }
            Some(Op::Shutdown) => {
                // With both directions ended, a socket is as good as closed.
                assert!(header.flags == NO_SEND || pair.guest_ended && header.flags == NEITHER);
                pair.guest_saw_end = true;
            }
            Some(Op::CreditUpdate | Op::CreditRequest) => {}
            other => panic!("{other:?} comes for nothing"),
        }
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::HostWrites { at, len } if !self.pairs[at].host_ended => {
                let pair = &mut self.pairs[at];
                pair.host_wrote += pair.host.write(&bytes(pair.host_wrote, len)).unwrap_or(0);
            }
            Step::HostReads { at, len } => self.pairs[at].host_reads(len),
            Step::HostEnds { at } => {
                self.pairs[at].host_ended = true;
                self.pairs[at].host.shutdown(Shutdown::Write).expect("it is open");
            }
            Step::GuestWrites { at, len, piece } if !self.pairs[at].guest_ended => {
                let pair = &mut self.pairs[at];
                let len = len.min(pair.stream.credit()).min(60_000);
                let header = super::packet::Header { len: len as u32, ..pair.stream.header(Op::Rw) };
                let packet = [&header.to_bytes()[..], &bytes(pair.guest_wrote, len)].concat();
                pair.stream.sent = pair.stream.sent.wrapping_add(len as u32);
                pair.guest_wrote += len;
                self.guest.send_raw(&packet, piece.max(packet.len() / 200));
                assert_eq!(self.guest.driver.used(super::TX), [(0, 0)]);
            }
            Step::GuestTakes { at, percent, tells } => {
                let pair = &mut self.pairs[at];
                let waiting = pair.guest_got as u32 - pair.stream.taken;
                pair.stream.taken += waiting * percent / 100;
                if tells {
                    let header = pair.stream.header(Op::CreditUpdate);
                    assert!(self.guest.send(header, &[]));
                }
            }
            Step::GuestEnds { at } => {
                self.pairs[at].guest_ended = true;
                let header = self.pairs[at].stream.flags(Op::Shutdown, NO_SEND);
                assert!(self.guest.send(header, &[]));
            }
            Step::GuestGivesBuffers { count } => self.guest.give(count),
            Step::GuestLooks => self.look(),
            Step::HostWrites { .. } | Step::GuestWrites { .. } => {}
        }
    }

    /// Everybody reads to the end.
    fn finish(&mut self) {
        self.guest.generous = true;
        for at in 0..CONNECTIONS {
            self.take(&Step::HostEnds { at });
            self.take(&Step::GuestEnds { at });
        }
        for _ in 0..10_000 {
            self.guest.give(usize::MAX);
            self.look();
            for at in 0..CONNECTIONS {
                self.pairs[at].host_reads(100_000);
                self.take(&Step::GuestTakes { at, percent: 100, tells: true });
            }
            if self.pairs.iter().all(|pair| pair.guest_saw_end && pair.host_saw_end) {
                break;
            }
        }
        for pair in &self.pairs {
            assert_eq!((pair.guest_got, pair.host_read), (pair.host_wrote, pair.guest_wrote));
            assert!(pair.guest_saw_end && pair.host_saw_end, "an end was lost");
        }
        assert_eq!(self.guest.mistakes(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_byte_arrives_once_and_in_order(steps in prop::collection::vec(any_step(), 1..200)) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.take(step));
        world.finish();
    }
}
