//! Drivers that post a chain at the worst moment.

use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::config_space::ConfigSpace;
use crate::virtio::test_driver::{DATA, Desc, Rings, WRITE, memory, rings};

const SIZE: u16 = 16;

/// What the device does with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taste {
    /// Serves it.
    Served,
    /// Looks at it and leaves it, as a network device without a frame does.
    LeftAlone,
}

/// A device in whose first call, after its last look at the queue, the driver posts a chain on another CPU.
struct Late {
    mem: GuestMemory,
    taste: Taste,
    seen: Arc<Mutex<Seen>>,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    calls: usize,
    served: usize,
    /// The driver was told not to kick.
    kicks_off: bool,
}

struct Silent;

impl Notifier for Silent {
    fn queue_used(&self, _: u16) {}
    fn config_changed(&self) {}
    fn needs_reset(&self) {}
}

impl Late {
    /// The driver: posts one more chain, then looks at the flag in the used ring.
    fn post(&self, seen: &mut Seen) {
        let available = GuestAddress(rings(0).driver + 2);
        let index: u16 = self.mem.read_obj(available).expect("memory");
        self.mem.write_obj(index + 1, available).expect("memory");
        let flags: u16 = self.mem.read_obj(GuestAddress(rings(0).device)).expect("memory");
        seen.kicks_off = flags & 1 != 0;
    }
}

impl VirtioDevice for Late {
    fn device_id(&self) -> u32 {
        63
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[SIZE]
    }

    fn config_space(&self) -> Arc<ConfigSpace> {
        Arc::new(ConfigSpace::read_only(&[]))
    }

    fn counters(&self) -> Arc<Counters> {
        Arc::default()
    }

    fn activate(&mut self, _: u64) {}

    fn process(&mut self, queues: &mut Queues<'_>, queue: u16) -> Progress {
        let mut seen = self.seen.lock().unwrap();
        let mut queue = queues.get(queue);
        while let Some(chain) = queue.pop() {
            if self.taste == Taste::LeftAlone {
                queue.unpop(chain);
                break;
            }
            seen.served += 1;
            queue.push(chain.head, 0);
        }
        seen.calls += 1;
        if seen.calls == 1 {
            self.post(&mut seen);
        }
        Progress::Done
    }

    fn reset(&mut self) {}
}

/// Serves a queue with `posted` chains in it, whose driver has no event index.
fn serve(taste: Taste, posted: u16) -> (Seen, Progress) {
    let mem = memory();
    let Rings { desc, driver, device } = rings(0);
    let config = QueueConfig { max_size: SIZE, size: SIZE, ready: true, desc, driver, device };
    for head in 0..SIZE {
        let buffer = Desc { addr: DATA, len: 64, flags: WRITE, next: 0 };
        mem.write_slice(&buffer.bytes(), GuestAddress(desc + 16 * u64::from(head))).expect("memory");
        mem.write_obj(head, GuestAddress(driver + 4 + 2 * u64::from(head))).expect("memory");
    }
    mem.write_obj(posted, GuestAddress(driver + 2)).expect("memory");
    let seen = Arc::<Mutex<Seen>>::default();
    let late = Late { mem: mem.clone(), taste, seen: seen.clone() };
    let mut unit = Unit::new(Box::new(late), &[], Arc::new(Silent), mem);
    unit.activate(0, &[config]).expect("a good configuration");
    let progress = unit.serve_queue(0);
    let seen = *seen.lock().unwrap();
    (seen, progress)
}

#[test]
fn a_chain_that_comes_after_the_last_look_is_served() {
    for posted in [0, 1, 3] {
        let (seen, progress) = serve(Taste::Served, posted);
        assert!(seen.kicks_off, "the driver was asked for a kick");
        assert_eq!((seen.served, progress), (usize::from(posted) + 1, Progress::Done));
    }
}

#[test]
fn chains_that_wait_for_the_host_are_not_looked_at_again() {
    let (seen, progress) = serve(Taste::LeftAlone, 1);
    assert_eq!((seen.calls, seen.served, progress), (1, 0, Progress::Done));
    let (seen, progress) = serve(Taste::LeftAlone, 0);
    assert_eq!((seen.calls, progress), (2, Progress::Done), "the first was not seen before");
}
