//! Queues as a device sees them: what it holds, gives back, and cannot do twice.

use super::*;
use crate::virtio::test_driver::{DATA, Desc, NEXT, REGIONS, Rings, WRITE, memory, rings};

const SIZE: u16 = 16;

struct Bench {
    mem: GuestMemory,
    core: QueueCore,
}

fn config() -> QueueConfig {
    let Rings { desc, driver, device } = rings(0);
    QueueConfig { max_size: SIZE, size: SIZE, ready: true, desc, driver, device }
}

fn core(mem: &GuestMemory, event_idx: bool, epoch: u32) -> QueueCore {
    QueueCore::new(0, &config(), event_idx, epoch, mem).expect("a good configuration")
}

impl Bench {
    fn new(event_idx: bool) -> Self {
        let mem = memory();
        let core = core(&mem, event_idx, 1);
        Self { mem, core }
    }

    /// Makes `heads` available, from the start of the ring; each is a buffer of 64 writable bytes.
    fn offer(&self, heads: &[u16]) {
        for (slot, &head) in (0..).zip(heads) {
            let desc = Desc { addr: DATA + 64 * u64::from(head), len: 64, flags: WRITE, next: 0 };
            self.put(rings(0).desc + 16 * u64::from(head), &desc.bytes());
            self.put(rings(0).driver + 4 + 2 * slot, &head.to_le_bytes());
        }
        self.put(rings(0).driver + 2, &(heads.len() as u16).to_le_bytes());
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(address)).expect("memory");
    }

    fn get16(&self, address: u64) -> u16 {
        self.mem.read_obj(GuestAddress(address)).expect("memory")
    }

    fn lend(&mut self) -> VirtQueue<'_> {
        Queues::lend(std::slice::from_mut(&mut self.core), &self.mem).into_queue(0)
    }

    /// Used heads and lengths.
    fn used(&self) -> Vec<(u32, u32)> {
        let ring = rings(0).device;
        let word = |at| self.mem.read_obj(GuestAddress(at)).expect("memory");
        (0..u64::from(self.get16(ring + 2)))
            .map(|i| (word(ring + 4 + 8 * i), word(ring + 8 + 8 * i)))
            .collect()
    }
}

impl<'a> Queues<'a> {
    fn into_queue(self, index: u16) -> VirtQueue<'a> {
        VirtQueue { core: &mut self.cores[usize::from(index)], throttle: None, mem: self.mem }
    }
}

#[test]
fn completions_may_come_in_any_order() {
    let mut bench = Bench::new(false);
    bench.offer(&[3, 1, 2, 0]);
    let mut queue = bench.lend();
    let mut heads: Vec<Head> = std::iter::from_fn(|| queue.pop()).map(|chain| chain.head).collect();
    assert_eq!(queue.core.in_flight(), 4);
    for (length, at) in [(5, 2), (6, 0), (7, 1), (8, 0)] {
        queue.push(heads.remove(at), length);
    }
    assert_eq!(bench.used(), [(2, 5), (3, 6), (0, 7), (1, 8)]);
    assert_eq!(bench.core.in_flight(), 0);
}

#[test]
fn a_head_that_is_in_flight_breaks_the_queue() {
    let mut bench = Bench::new(false);
    bench.offer(&[1, 2, 1]);
    let mut queue = bench.lend();
    let first = queue.pop().expect("first").head;
    let second = queue.pop().expect("second").head;
    assert!(queue.pop().is_none());
    queue.push(first, 1);
    queue.push(second, 1);
    assert_eq!(bench.core.fault(), Some(Fault::HeadInFlight));
    assert_eq!(bench.used(), [], "a broken queue is left alone");
    assert!(!bench.core.take_notification(&bench.mem.clone()));
}

#[test]
fn a_head_may_be_used_again_once_it_is_pushed() {
    let mut bench = Bench::new(false);
    bench.offer(&[1, 1, 1]);
    let mut queue = bench.lend();
    for length in 1..4 {
        let chain = queue.pop().expect("chain");
        queue.push(chain.head, length);
    }
    assert_eq!(bench.used(), [(1, 1), (1, 2), (1, 3)]);
}

#[test]
fn a_completion_after_a_reset_is_ignored() {
    let mut bench = Bench::new(false);
    bench.offer(&[1]);
    let stale = bench.lend().pop().expect("chain").head;
    let mem = bench.mem.clone();
    bench.core = core(&mem, false, 2);
    bench.lend().push(stale, 9);
    assert_eq!(bench.used(), []);
    let fresh = bench.lend().pop().expect("the same chain, of the new life").head;
    bench.lend().push(fresh, 9);
    assert_eq!(bench.used(), [(1, 9)]);
}

#[test]
fn no_length_is_reported_that_the_chain_has_no_room_for() {
    let mut bench = Bench::new(false);
    bench.offer(&[1, 2]);
    let mut queue = bench.lend();
    for length in [65, u32::MAX] {
        let chain = queue.pop().expect("chain");
        queue.push(chain.head, length);
    }
    assert_eq!(bench.used(), [(1, 64), (2, 64)]);
}

#[test]
fn chains_that_are_put_back_come_again_in_order() {
    let mut bench = Bench::new(false);
    bench.offer(&[4, 5, 6]);
    let mut queue = bench.lend();
    let mut chains: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
    while chains.len() > 1 {
        queue.unpop(chains.pop().expect("not empty"));
    }
    assert_eq!(queue.budget(), SIZE - 1);
    let again: Vec<u16> = std::iter::from_fn(|| queue.pop()).map(|chain| chain.head.index).collect();
    assert_eq!(again, [5, 6]);
}

#[test]
fn the_ring_is_not_rewound_over_a_chain_that_was_given_back() {
    let mut bench = Bench::new(false);
    bench.offer(&[4, 5, 6]);
    // Head 5 is malformed: its buffer is not in memory.
    let stray = Desc { addr: u64::MAX - 4096, len: 64, flags: WRITE, next: 0 };
    bench.put(rings(0).desc + 16 * 5, &stray.bytes());
    let mut queue = bench.lend();
    let (first, last) = (queue.pop().expect("head 4"), queue.pop().expect("head 6"));
    queue.unpop(last);
    queue.unpop(first);
    assert_eq!(bench.used(), [(5, 0), (4, 0)], "head 4 cannot wait any more, head 6 can");
    assert_eq!(bench.core.in_flight(), 0);
    let again = bench.lend().pop().expect("head 6 again").head;
    bench.lend().push(again, 7);
    assert!(bench.lend().pop().is_none());
    assert_eq!(bench.used(), [(5, 0), (4, 0), (6, 7)], "each head once");
}

#[test]
fn a_call_takes_no_more_chains_than_the_queue_has_descriptors() {
    let mut bench = Bench::new(false);
    bench.offer(&[0; SIZE as usize]);
    let mut queue = bench.lend();
    for turn in 0..SIZE {
        assert!(!queue.exhausted());
        let chain = queue.pop().expect("chain");
        queue.push(chain.head, 0);
        // A driver that is as quick as the device.
        let ahead = turn + 1 + SIZE;
        queue.mem.write_slice(&ahead.to_le_bytes(), GuestAddress(rings(0).driver + 2)).expect("memory");
    }
    assert!(queue.pop().is_none() && queue.exhausted());
    assert_eq!(bench.core.fault(), None);
    assert!(bench.lend().pop().is_some());
}

#[test]
fn interrupts_follow_the_drivers_flag() {
    let mut bench = Bench::new(false);
    let mem = bench.mem.clone();
    bench.offer(&[1, 2]);
    assert!(!bench.core.take_notification(&mem), "nothing was pushed");
    for (flag, wanted) in [(1u16, false), (0, true)] {
        bench.put(rings(0).driver, &flag.to_le_bytes());
        let mut queue = bench.lend();
        let chain = queue.pop().expect("chain");
        queue.push(chain.head, 0);
        assert_eq!(bench.core.take_notification(&mem), wanted);
        assert!(!bench.core.take_notification(&mem), "once");
    }
}

#[test]
fn interrupts_and_kicks_follow_the_event_indexes() {
    let mut bench = Bench::new(true);
    let mem = bench.mem.clone();
    let used_event = rings(0).driver + 4 + 2 * u64::from(SIZE);
    let avail_event = rings(0).device + 4 + 8 * u64::from(SIZE);
    bench.offer(&[1, 2, 3]);
    bench.put(used_event, &1u16.to_le_bytes());
    for wanted in [false, true, false] {
        let mut queue = bench.lend();
        let chain = queue.pop().expect("chain");
        queue.push(chain.head, 0);
        assert_eq!(bench.core.take_notification(&mem), wanted);
    }
    assert!(!bench.core.enable_kicks(&mem), "the queue is empty");
    assert_eq!(bench.get16(avail_event), 3);
    bench.offer(&[1, 2, 3, 4]);
    assert!(bench.core.enable_kicks(&mem), "a chain came in before");
}

#[test]
fn a_chain_behind_those_that_are_left_alone_is_announced() {
    let mut bench = Bench::new(true);
    let mem = bench.mem.clone();
    let avail_event = rings(0).device + 4 + 8 * u64::from(SIZE);
    bench.offer(&[1, 2, 3]);
    bench.core.begin_turn();
    let mut queue = bench.lend();
    let (first, second) = (queue.pop().expect("chain"), queue.pop().expect("chain"));
    queue.push(first.head, 0);
    let offered = queue.offered();
    queue.leave(second, offered);
    assert!(!bench.core.enable_kicks(&mem), "all of them were seen");
    assert_eq!(bench.get16(avail_event), 3);
    bench.offer(&[1, 2, 3, 4]);
    assert!(bench.core.enable_kicks(&mem), "one more came in before");
    bench.core.begin_turn();
    assert!(bench.core.enable_kicks(&mem), "as ever");
    assert_eq!(bench.get16(avail_event), 1);
    assert_eq!(bench.lend().pop().map(|chain| chain.position), Some(1), "the one that was left alone");
}

#[test]
fn kicks_follow_the_devices_flag() {
    let mut bench = Bench::new(false);
    let mem = bench.mem.clone();
    bench.core.disable_kicks(&mem);
    assert_eq!(bench.get16(rings(0).device), 1);
    assert!(!bench.core.enable_kicks(&mem));
    assert_eq!(bench.get16(rings(0).device), 0);
}

#[test]
fn a_chain_of_all_descriptors_is_no_loop() {
    let mut bench = Bench::new(false);
    bench.offer(&[0]);
    for i in 0..SIZE {
        let next = if i + 1 < SIZE { NEXT } else { 0 };
        let desc = Desc { addr: DATA, len: 8, flags: WRITE | next, next: i + 1 };
        bench.put(rings(0).desc + 16 * u64::from(i), &desc.bytes());
    }
    let mut queue = bench.lend();
    let chain = queue.pop().expect("a long chain, but a good one");
    assert_eq!(chain.writable.len(), 8 * usize::from(SIZE));
    queue.push(chain.head, 0);
}

#[test]
fn a_configuration_is_checked_before_it_is_used() {
    let mem = memory();
    let end = REGIONS[0].1 as u64;
    let size = |size| ActivateError::QueueSize { queue: 0, size, max: SIZE };
    let address = || ActivateError::QueueAddress { queue: 0 };
    for (config, want) in [
        (QueueConfig { size: 0, ..config() }, size(0)),
        (QueueConfig { size: 12, ..config() }, size(12)),
        (QueueConfig { size: 32, ..config() }, size(32)),
        (QueueConfig { desc: 0x1008, ..config() }, address()),
        (QueueConfig { driver: 0x1001, ..config() }, address()),
        (QueueConfig { device: 0x1002, ..config() }, address()),
        (QueueConfig { device: end - 16, ..config() }, address()),
        (QueueConfig { desc: end - 16 * 16 + 16, ..config() }, address()),
        (QueueConfig { driver: end - 38 + 2, ..config() }, address()),
        (QueueConfig { device: end - 136 + 4, ..config() }, address()),
        (QueueConfig { desc: !15, ..config() }, address()),
        (QueueConfig { driver: !1, ..config() }, address()),
        (QueueConfig { device: !3, ..config() }, address()),
        (QueueConfig { driver: 0, ..config() }, address()),
    ] {
        assert_eq!(QueueCore::new(0, &config, false, 1, &mem).err(), Some(want), "{config:x?}");
    }
    for config in [
        QueueConfig { desc: end - 16 * 16, ..config() },
        QueueConfig { driver: end - 38, ..config() },
        QueueConfig { device: end - 136, ..config() },
    ] {
        assert_eq!(QueueCore::new(0, &config, true, 1, &mem).err(), None, "{config:x?}");
    }
}
