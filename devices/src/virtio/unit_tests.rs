//! Drivers that post a chain at the worst moment.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::config_space::ConfigSpace;
use crate::virtio::queue::Chain;
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

/// Counts interrupts.
#[derive(Default)]
struct Bell(AtomicUsize);

impl Bell {
    fn rung(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Notifier for Bell {
    fn queue_used(&self, _: u16) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
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

/// Queue number `at`, with `posted` chains in it, whose driver has no event index.
fn queue(mem: &GuestMemory, at: u16, posted: u16) -> QueueConfig {
    let Rings { desc, driver, device } = rings(at);
    for head in 0..SIZE {
        let buffer = Desc { addr: DATA, len: 64, flags: WRITE, next: 0 };
        mem.write_slice(&buffer.bytes(), GuestAddress(desc + 16 * u64::from(head))).expect("memory");
        mem.write_obj(head, GuestAddress(driver + 4 + 2 * u64::from(head))).expect("memory");
    }
    mem.write_obj(posted, GuestAddress(driver + 2)).expect("memory");
    QueueConfig { max_size: SIZE, size: SIZE, ready: true, desc, driver, device }
}

/// Serves a queue with `posted` chains in it, whose driver has no event index.
fn serve(taste: Taste, posted: u16) -> (Seen, Progress) {
    let mem = memory();
    let config = queue(&mem, 0, posted);
    let seen = Arc::<Mutex<Seen>>::default();
    let late = Late { mem: mem.clone(), taste, seen: seen.clone() };
    let mut unit = Unit::new(Box::new(late), &[], Arc::<Bell>::default(), mem);
    unit.activate(0, &[config]).expect("a good configuration");
    let progress = unit.serve_queue(0, |_| {});
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

/// A device that sends what is in queue 0, for whose buffers the driver does not wait, and answers each with all
/// of queue 1. While it does so for the first time, the driver posts one more chain for answers.
struct Answering {
    mem: GuestMemory,
    answered: Arc<AtomicUsize>,
}

impl Answering {
    fn answer(&self, queues: &mut Queues<'_>) -> Progress {
        let mut queue = queues.get(1);
        while let Some(chain) = queue.pop() {
            self.answered.fetch_add(1, Ordering::SeqCst);
            queue.push(chain.head, 0);
        }
        Progress::Done
    }
}

impl VirtioDevice for Answering {
    fn device_id(&self) -> u32 {
        63
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[SIZE, SIZE]
    }

    fn config_space(&self) -> Arc<ConfigSpace> {
        Arc::new(ConfigSpace::read_only(&[]))
    }

    fn counters(&self) -> Arc<Counters> {
        Arc::default()
    }

    fn activate(&mut self, _: u64) {}

    fn can_wait(&self, queue: u16) -> bool {
        queue == 0
    }

    fn process(&mut self, queues: &mut Queues<'_>, queue: u16) -> Progress {
        if queue == 1 {
            return self.answer(queues);
        }
        while let Some(Chain { head, .. }) = queues.get(0).pop() {
            self.answer(queues);
            self.mem.write_obj(2_u16, GuestAddress(rings(1).driver + 2)).expect("memory");
            queues.get(0).push(head, 0);
        }
        Progress::Done
    }

    fn reset(&mut self) {}
}

/// A turn after which queue 0 has used one chain, and queue 1, if its driver has `answers` of them, some.
fn send_one(answers: u16) -> (Unit, GuestMemory, Arc<Bell>, usize) {
    let (mem, bell, answered) = (memory(), Arc::<Bell>::default(), Arc::<AtomicUsize>::default());
    let device = Answering { mem: mem.clone(), answered: answered.clone() };
    let mut unit = Unit::new(Box::new(device), &[], bell.clone(), mem.clone());
    unit.activate(0, &[queue(&mem, 0, 1), queue(&mem, 1, answers)]).expect("a good configuration");
    assert_eq!(unit.serve_queue(0, |_| {}), Progress::Done);
    let answered = answered.load(Ordering::SeqCst);
    (unit, mem, bell, answered)
}

/// The driver wants no interrupts by queue 0.
fn look(mem: &GuestMemory) {
    mem.write_obj(1_u16, GuestAddress(rings(0).driver)).expect("memory");
}

fn wait(unit: &mut Unit) {
    let due = unit.due_at().expect("an interrupt waits");
    unit.serve_waiting(|_| panic!("nothing waits for tokens"));
    std::thread::sleep(due.saturating_duration_since(Instant::now()));
    unit.serve_waiting(|_| panic!("nothing waits for tokens"));
    assert_eq!(unit.due_at(), None);
}

#[test]
fn an_interrupt_that_can_wait_comes_when_it_is_due() {
    let (mut unit, _, bell, _) = send_one(2);
    assert_eq!(bell.rung(), 1, "that of the answers, and no other");
    wait(&mut unit);
    assert_eq!(bell.rung(), 2);
    unit.drain();
    assert_eq!(bell.rung(), 2);
}

#[test]
fn a_driver_that_has_looked_by_itself_is_not_interrupted() {
    let (mut unit, mem, bell, _) = send_one(2);
    look(&mem);
    wait(&mut unit);
    assert_eq!(bell.rung(), 1);
}

#[test]
fn nothing_is_held_back_across_a_pause_or_a_reset() {
    let (mut unit, _, bell, _) = send_one(2);
    unit.drain();
    assert_eq!((bell.rung(), unit.due_at()), (2, None));
    let (mut unit, _, bell, _) = send_one(2);
    unit.reset();
    unit.drain();
    assert_eq!((bell.rung(), unit.due_at()), (1, None));
}

#[test]
fn a_queue_that_another_ones_turn_used_up_is_looked_at_again() {
    let (.., answered) = send_one(1);
    assert_eq!(answered, 2, "the second came when no kick was asked for");
}
