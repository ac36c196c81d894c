//! A queue of any content, and a device that holds chains for a while and gives them back in any order.
#![no_main]

use std::collections::VecDeque;

use arbitrary::{Arbitrary, Unstructured};
use devices::virtio::queue::{Head, QueueConfig, QueueCore, Queues};
use devices::virtio::test_driver::{memory, rings};
use vm_memory::{Bytes, GuestAddress};

/// One thing that driver or device does.
#[derive(Arbitrary, Debug)]
enum Step {
    /// The driver changes its rings.
    Ring { offset: u16, bytes: [u8; 8] },
    /// The driver makes chains available.
    Offer { heads: u8 },
    /// The device takes up to so many chains, and touches their bytes.
    Pop { count: u8 },
    /// The device takes a chain and puts it back.
    PopAndReturn,
    /// The device gives one back.
    Push { which: u8, written: u32 },
    /// The owner arms kicks, and asks whether to interrupt.
    Arm,
    /// The device is reset and started again, with chains still held.
    Restart { event_idx: bool },
}

const SIZE: u16 = 16;

fn start(event_idx: bool, epoch: u32, mem: &devices::GuestMemory) -> QueueCore {
    let rings = rings(0);
    let config = QueueConfig {
        max_size: SIZE,
        size: SIZE,
        ready: true,
        desc: rings.desc,
        driver: rings.driver,
        device: rings.device,
    };
    QueueCore::new(0, &config, event_idx, epoch, mem).expect("a good configuration")
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mem = memory();
    let mut core = start(false, 0, &mem);
    let mut held: VecDeque<Head> = VecDeque::new();
    let (mut avail, mut epoch, mut stale) = (0u16, 0, 0);
    let mut input = Unstructured::new(input);
    while !input.is_empty() {
        let Ok(step) = Step::arbitrary(&mut input) else { break };
        let mut queues = Queues::lend(std::slice::from_mut(&mut core), &mem);
        let mut queue = queues.get(0);
        match step {
            Step::Ring { offset, bytes } => {
                let at = GuestAddress(rings(0).desc + u64::from(offset % 0x5800));
                mem.write_slice(&bytes, at).expect("rings are in memory");
            }
            Step::Offer { heads } => {
                avail = avail.wrapping_add(heads.into());
                mem.write_obj(avail, GuestAddress(rings(0).driver + 2)).expect("rings are in memory");
            }
            Step::Pop { count } => {
                for _ in 0..count {
                    let Some(mut chain) = queue.pop() else { break };
                    let mut bytes = [0; 64];
                    let copied = chain.readable.len().min(64);
                    assert_eq!(chain.readable.read(&mut bytes), copied);
                    let mut tail = chain.writable.split_off(chain.writable.len() / 2);
                    tail.truncate(64);
                    let room = tail.len();
                    assert_eq!(tail.write(&bytes), room);
                    held.push_back(chain.head);
                }
            }
            Step::PopAndReturn => {
                let budget = queue.budget();
                if let Some(chain) = queue.pop() {
                    queue.unpop(chain);
                    assert!(queue.budget() <= budget);
                }
            }
            Step::Push { which, written } => {
                let index = usize::from(which) % held.len().max(1);
                if let Some(head) = held.remove(index) {
                    stale -= usize::from(index < stale);
                    queue.push(head, written);
                }
            }
            Step::Arm => {
                core.disable_kicks(&mem);
                core.enable_kicks(&mem);
                core.take_notification(&mem);
            }
            Step::Restart { event_idx } => {
                epoch += 1;
                core = start(event_idx, epoch, &mem);
                stale = held.len();
            }
        }
        if core.fault().is_none() {
            assert_eq!(core.in_flight() as usize, held.len() - stale, "a chain was lost or made up");
        }
    }
});
