//! What every virtio device of the registry has to withstand, generated from the registry.
//!
//! The tests know nothing about any device. Where they need one that works, they post a chain to its last queue
//! and expect it back.

use proptest::prelude::*;

use super::test_driver::{DATA, Desc, Driver, INDIRECT, NEXT, PAGE, REGIONS, Rings, WRITE, rings};
use super::test_wire::{KINDS as TRANSPORTS, Kind as Transport};
use super::{F_EVENT_IDX, F_VERSION_1};
use crate::model::BusDevice;
use crate::registry::{KINDS, Kind};

const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;
/// Registers about the selected queue: size, ready and three addresses.
const QUEUE_REGISTERS: [u64; 8] = [0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4];

/// Calls `test` for every device on every transport.
pub fn every_kind(test: impl Fn(&Kind, Driver)) {
    TRANSPORTS.into_iter().for_each(|transport| every_kind_on(transport, &test));
}

pub fn every_kind_on(transport: Transport, test: impl Fn(&Kind, Driver)) {
    KINDS.iter().for_each(|kind| test(kind, Driver::on(transport, (kind.specimen)())));
}

/// The device is active and returns what it is given.
pub fn assert_works(kind: &Kind, driver: &mut Driver) {
    let (queue, before) = (driver.queue_count() - 1, driver.interrupts());
    let reply = driver.request(queue, &[&[0; 16]], &[64]);
    assert!(reply.used.is_some(), "{} does not answer", kind.name);
    assert_eq!(driver.status(), 15, "{}", kind.name);
    assert!(driver.interrupts() > before, "{} does not interrupt", kind.name);
}

/// Registers that tell of the past: interrupt status and selectors.
const PAST: [u64; 4] = [0x14, 0x24, 0x30, 0x60];

/// Everything else that a driver can read.
pub fn registers(driver: &Driver) -> Vec<u32> {
    let mut all = Vec::new();
    for queue in 0..driver.queue_count() + 1 {
        driver.set(0x30, queue.into());
        all.extend(
            (0..0x200).step_by(4).filter(|offset| !PAST.contains(offset)).map(|offset| driver.get(offset)),
        );
    }
    all
}

#[test]
fn every_kind_works_with_no_feature_and_with_all() {
    every_kind(|kind, mut driver| {
        for features in [0, driver.offered()] {
            driver.start(features);
            assert_works(kind, &mut driver);
        }
    });
}

#[test]
fn queue_sizes_that_are_no_power_of_two_or_too_large_are_refused() {
    every_kind(|kind, mut driver| {
        for queue in 0..driver.queue_count() {
            let max = driver.queue_max(queue);
            for size in [0, 3, max - 1, max + 1, 2 * max, 0x1_0000, 0x1_0000 + max, u32::MAX] {
                if driver.transport.kind() == Transport::Pci && size > u16::MAX.into() {
                    continue;
                }
                assert!(driver.negotiate(F_VERSION_1));
                for other in 0..driver.queue_count() {
                    let size = if other == queue { size } else { driver.queue_max(other) };
                    driver.set_queue(other, size, rings(other));
                }
                driver.set(0x70, 15);
                assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{} size {size}", kind.name);
                driver.kick(queue);
                driver.host_events();
            }
        }
        driver.start(0);
        assert_works(kind, &mut driver);
    });
}

#[test]
fn rings_that_are_misaligned_or_outside_memory_are_refused() {
    every_kind(|kind, mut driver| {
        let good = rings(0);
        let mut bad = vec![
            Rings { desc: good.desc + 8, ..good },
            Rings { driver: good.driver + 1, ..good },
            Rings { device: good.device + 2, ..good },
            Rings { driver: 0, ..good },
        ];
        let end = REGIONS[0].1 as u64;
        for address in [end - 16, end, REGIONS[1].0 + REGIONS[1].1 as u64 - 16, 1 << 40, !0xf] {
            bad.push(Rings { desc: address, ..good });
            bad.push(Rings { driver: address, ..good });
            bad.push(Rings { device: address, ..good });
        }
        for rings in bad {
            assert!(driver.negotiate(F_VERSION_1));
            driver.set_queue(0, driver.queue_max(0), rings);
            driver.set(0x70, 15);
            assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{} {rings:x?}", kind.name);
            driver.kick(0);
        }
        driver.start(0);
        assert_works(kind, &mut driver);
    });
}

#[test]
fn queues_that_the_driver_leaves_out_stay_empty() {
    every_kind(|kind, mut driver| {
        assert!(driver.negotiate(F_VERSION_1 | F_EVENT_IDX));
        driver.set(0x70, 15);
        for queue in 0..driver.queue_count() + 1 {
            driver.kick(queue);
        }
        driver.host_events();
        assert_eq!((driver.status(), driver.interrupts()), (15, 0), "{}", kind.name);
    });
}

#[test]
fn states_cannot_be_skipped_or_left_but_by_reset() {
    every_kind(|kind, mut driver| {
        for status in [2, 4, 6, 8, 12, 15, 64, 0x100, 0x10f, u32::MAX >> 1] {
            driver.set(0x70, 0);
            driver.set(0x70, status);
            assert_eq!(driver.status() & !(1 | 2 | FAILED), 0, "{} {status:#x}", kind.name);
            driver.kick(0);
        }
        assert!(!driver.negotiate(F_VERSION_1 | 1 << 23), "{}: a feature that is not on offer", kind.name);
        assert!(!driver.negotiate(0), "{}: a driver from before virtio 1.0", kind.name);
        driver.set(0x70, 15);
        assert_eq!(driver.status() & 4, 0, "{}: DRIVER_OK without FEATURES_OK", kind.name);
        driver.start(0);
        driver.set(0x70, 1);
        assert_eq!(driver.status(), 15, "{}: bits are not taken back", kind.name);
        driver.set(0x70, 15 | FAILED);
        driver.set(0x70, 15);
        assert_eq!(driver.status(), 15 | FAILED, "{}", kind.name);
        driver.start(0);
        assert_works(kind, &mut driver);
    });
}

#[test]
fn reset_returns_to_fresh_with_work_left_in_every_queue() {
    every_kind(|kind, mut driver| {
        driver.set(0x70, 0);
        let fresh = registers(&driver);
        for features in [0, driver.offered()] {
            driver.start(features);
            assert_works(kind, &mut driver);
            for queue in 0..driver.queue_count() {
                driver.post(queue, &[&[0; 16]], &[512, 1]);
                driver.post(queue, &[], &[100]);
            }
            driver.kick(0);
            driver.post(0, &[&[0; 16]], &[512, 1]);
            let before = driver.interrupts();
            driver.set(0x70, 0);
            assert_eq!(driver.status(), 0);
            assert_eq!(driver.get(0x60), 0, "{}: an interrupt is left", kind.name);
            assert_eq!(registers(&driver), fresh, "{}", kind.name);
            for queue in 0..driver.queue_count() {
                driver.used(queue);
                driver.kick(queue);
                assert_eq!(driver.used(queue), [], "{} goes on after a reset", kind.name);
            }
            driver.host_events();
            assert_eq!(driver.interrupts(), before, "{}", kind.name);
        }
        driver.start(0);
        assert_works(kind, &mut driver);
    });
}

#[test]
fn registers_of_virtio_mmio_are_32_bits_wide_and_nothing_else() {
    every_kind_on(Transport::Mmio, |kind, mut driver| {
        driver.start(0);
        let before = registers(&driver);
        for offset in 0..0x100u64 {
            for width in [0usize, 1, 2, 3, 4, 5, 8, 16] {
                if width == 4 && offset % 4 == 0 {
                    continue;
                }
                let mut data = vec![0; width];
                driver.transport.read(offset, &mut data);
                assert!(data.iter().all(|&byte| byte == 0), "{} {offset:#x} width {width}", kind.name);
                driver.transport.write(offset, &vec![0xff; width]);
                driver.transport.write(offset, &vec![0; width]);
            }
        }
        assert_eq!(registers(&driver), before, "{}", kind.name);
        assert_works(kind, &mut driver);
    });
}

#[test]
fn the_configuration_space_ends_where_it_ends() {
    every_kind(|kind, driver| {
        let writable = (kind.specimen)().config_space().writable();
        let mut bytes = vec![0; 0x100];
        driver.read_config(0, &mut bytes);
        for width in [0usize, 1, 2, 3, 4, 7, 8, 64] {
            for offset in 0..0x100 - width {
                let mut data = vec![0; width];
                driver.read_config(offset as u64, &mut data);
                assert_eq!(data, bytes[offset..offset + width], "{} {offset:#x} width {width}", kind.name);
                driver.write_config(offset as u64, &vec![0x77; width]);
                if writable.start <= offset && offset + width <= writable.end {
                    bytes[offset..offset + width].fill(0x77);
                }
            }
        }
        let mut after = vec![0; 0x100];
        driver.read_config(0, &mut after);
        assert_eq!(after, bytes, "{}: nothing else in it is the driver's to write", kind.name);
        for offset in [0xeff, 0xf00, 0xff9] {
            let mut data = [0; 8];
            driver.read_config(offset, &mut data);
            assert_eq!(data, [0; 8], "{} {offset:#x}", kind.name);
        }
    });
}

/// What a chain is, its descriptors by index, and the table that its indirect descriptors point to.
type Chain = (&'static str, Vec<(u16, Desc)>, Vec<Desc>);

/// Chains that break the specification.
fn malformed() -> Vec<Chain> {
    let good = Desc { addr: DATA, len: 64, flags: WRITE, next: 0 };
    let table = Desc { addr: DATA + 0x1000, len: 32, flags: INDIRECT, next: 0 };
    let end = REGIONS[0].1 as u64;
    let one = |name, desc| (name, vec![(0, desc)], vec![]);
    let indirect = |name, entries| (name, vec![(0, table)], entries);
    vec![
        one("a loop of one", Desc { flags: WRITE | NEXT, ..good }),
        (
            "a loop of two",
            vec![
                (0, Desc { flags: WRITE | NEXT, next: 1, ..good }),
                (1, Desc { flags: WRITE | NEXT, ..good }),
            ],
            vec![],
        ),
        one("next out of range", Desc { flags: WRITE | NEXT, next: 256, ..good }),
        one("next far out of range", Desc { flags: WRITE | NEXT, next: u16::MAX, ..good }),
        one("in the hole", Desc { addr: end, ..good }),
        one("across the end of a region", Desc { addr: end - 63, ..good }),
        one("address and length overflow", Desc { addr: u64::MAX - 62, ..good }),
        one("longer than memory", Desc { len: u32::MAX, ..good }),
        (
            "readable after writable",
            vec![(0, Desc { flags: WRITE | NEXT, next: 1, ..good }), (1, Desc { flags: 0, ..good })],
            vec![],
        ),
        (
            "readable after writable of no length",
            vec![(0, Desc { len: 0, flags: WRITE | NEXT, next: 1, ..good }), (1, Desc { flags: 0, ..good })],
            vec![],
        ),
        (
            "more than 4 GiB in all",
            (0..256)
                .map(|i| {
                    (i, Desc { len: 0xf_0000, addr: 0, flags: if i < 255 { NEXT } else { 0 }, next: i + 1 })
                })
                .chain([(255, Desc { len: u32::MAX, addr: 0, flags: 0, next: 0 })])
                .collect(),
            vec![],
        ),
        one("a table of length 0", Desc { len: 0, ..table }),
        one("a table of one and a half entries", Desc { len: 24, ..table }),
        one("a table that is not there", Desc { addr: end, ..table }),
        one("a table longer than any queue", Desc { len: 16 << 16, ..table }),
        indirect("a table within a table", vec![Desc { len: 16, addr: DATA, ..table }]),
        indirect("next out of the table", vec![Desc { flags: WRITE | NEXT, next: 2, ..good }]),
        indirect("a loop in a table", vec![Desc { flags: WRITE | NEXT, next: 0, ..good }]),
    ]
}

#[test]
fn malformed_chains_come_back_empty_and_are_counted() {
    every_kind(|kind, mut driver| {
        for (what, descs, table) in malformed() {
            for queue in 0..driver.queue_count() {
                driver.start(driver.offered() & !F_EVENT_IDX);
                driver.write(DATA, &vec![0x5a; 0x10000]);
                let bytes: Vec<u8> = table.iter().flat_map(|desc| desc.bytes()).collect();
                driver.write(DATA + 0x1000, &bytes);
                descs.iter().for_each(|&(index, desc)| driver.set_desc(queue, index, desc));
                let data = driver.read(DATA, 0x10000);
                let mistakes = driver.counters.guest_mistakes.load(std::sync::atomic::Ordering::Relaxed);
                driver.offer(queue, 0);
                driver.kick(queue);
                assert_eq!(driver.used(queue), [(0, 0)], "{}: {what}", kind.name);
                assert!(driver.read(DATA, 0x10000) == data, "{}: {what}: memory changed", kind.name);
                let after = driver.counters.guest_mistakes.load(std::sync::atomic::Ordering::Relaxed);
                assert_eq!(after, mistakes + 1, "{}: {what}", kind.name);
                assert_eq!(driver.status(), 15, "{}: {what}", kind.name);
                assert_works(kind, &mut driver);
            }
        }
    });
}

#[test]
fn chains_of_nothing_come_back() {
    every_kind(|kind, mut driver| {
        let queue = driver.queue_count() - 1;
        driver.start(0);
        for (readable, writable) in
            [(&[&[][..]][..], &[][..]), (&[], &[0]), (&[&[], &[]], &[0, 0]), (&[&[]], &[0]), (&[&[1]], &[])]
        {
            let used = driver.request(queue, readable, writable).used;
            assert_eq!(used, Some(0), "{} {readable:?} {writable:?}", kind.name);
        }
        assert_works(kind, &mut driver);
    });
}

#[test]
fn a_ring_beyond_repair_stops_the_device_until_it_is_reset() {
    every_kind(|kind, mut driver| {
        for queue in 0..driver.queue_count() {
            let max = driver.queue_max(queue) as u16;
            type Break = (&'static str, fn(&mut Driver, queue: u16, size: u16));
            let breaks: [Break; 4] = [
                ("head out of range", |driver, queue, size| driver.offer(queue, size)),
                ("head far out of range", |driver, queue, _| driver.offer(queue, u16::MAX)),
                ("index ahead by more than the size", |driver, queue, size| {
                    driver.set_avail(queue, size + 1)
                }),
                ("index behind", |driver, queue, _| driver.set_avail(queue, u16::MAX)),
            ];
            for (what, break_ring) in breaks {
                driver.start(0);
                break_ring(&mut driver, queue, max);
                driver.kick(queue);
                assert_eq!(driver.status(), 15 | NEEDS_RESET, "{} queue {queue}: {what}", kind.name);
                assert_eq!(driver.get(0x60) & 2, 2, "{}: {what}: no configuration interrupt", kind.name);
                let before = driver.interrupts();
                driver.kick(queue);
                driver.kick(queue);
                driver.host_events();
                assert_eq!(driver.interrupts(), before, "{}: {what}: said more than once", kind.name);
                assert_eq!(driver.used(queue), [], "{}: {what}", kind.name);
            }
        }
        driver.start(0);
        assert_works(kind, &mut driver);
    });
}

#[test]
fn the_same_head_again_and_again_is_survived() {
    every_kind(|kind, mut driver| {
        for queue in 0..driver.queue_count() {
            for features in [0, driver.offered()] {
                driver.start(features);
                let (head, _) = driver.post(queue, &[&[0; 16]], &[512, 1]);
                for _ in 0..3 {
                    driver.offer(queue, head);
                }
                driver.kick(queue);
                driver.offer(queue, head);
                driver.kick(queue);
                driver.host_events();
                // Each time it was served before it came again, or the device asks for a reset.
                let answers = driver.used(queue);
                assert!(answers.len() <= 5, "{} queue {queue}: {answers:?}", kind.name);
                assert!(answers.iter().all(|&(id, _)| id == u32::from(head)), "{} queue {queue}", kind.name);
                assert!([15, 15 | NEEDS_RESET].contains(&driver.status()), "{} queue {queue}", kind.name);
            }
        }
        driver.start(0);
        assert_works(kind, &mut driver);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn queue_registers_are_closed_once_the_device_is_active(
        order in Just(QUEUE_REGISTERS.to_vec()).prop_shuffle(),
        values in proptest::collection::vec(any::<u32>(), 8),
    ) {
        every_kind(|kind, mut driver| {
            driver.start(0);
            let before = registers(&driver);
            for queue in (0..u32::from(driver.queue_count()) + 2).chain([u32::MAX]) {
                driver.set(0x30, queue);
                for (&register, &value) in order.iter().zip(&values) {
                    for value in [value, 0, 1, 3] {
                        driver.set(register, value);
                    }
                }
            }
            assert_eq!(registers(&driver), before, "{}", kind.name);
            assert_works(kind, &mut driver);
        });
    }
}

/// Where the random descriptors' buffers may be written.
const ZONE: u64 = 0x8_0000;
/// Where there is a table of descriptors for indirect ones.
const TABLE: u64 = DATA;

fn any_desc() -> impl Strategy<Value = Desc> {
    let end = REGIONS[0].1 as u64;
    let address = prop_oneof![
        6 => (0..0x40_000u64).prop_map(|offset| ZONE + offset),
        2 => (0..64u64).prop_map(move |offset| end - offset),
        1 => (0..64u64).prop_map(|offset| REGIONS[1].0 - offset),
        1 => (0..64u64).prop_map(|offset| u64::MAX - offset),
    ];
    let len = prop_oneof![
        3 => 0..40u32,
        3 => prop::sample::select(vec![1, 12, 16, 511, 512, 513, 1024, 4096, 0x1_0000]),
        1 => prop::sample::select(vec![0x4_0000, 0x7fff_ffff, u32::MAX - 15, u32::MAX]),
    ];
    let table =
        (0..8u32).prop_map(|entries| Desc { addr: TABLE, len: entries * 16, flags: INDIRECT, next: 0 });
    let buffer = (address, len, 0..4u16, prop_oneof![9 => 0..24u16, 1 => Just(300)])
        .prop_map(|(addr, len, flags, next)| Desc { addr, len, flags, next });
    prop_oneof![7 => buffer, 1 => table]
}

#[derive(Debug, Clone)]
struct RandomQueue {
    descs: Vec<Desc>,
    table: Vec<Desc>,
    heads: Vec<u16>,
    ahead: u16,
}

fn any_queue() -> impl Strategy<Value = RandomQueue> {
    let descs = prop::collection::vec(any_desc(), 1..24);
    let table = prop::collection::vec(any_desc(), 0..8);
    let heads = prop::collection::vec(prop_oneof![20 => 0..24u16, 1 => Just(256)], 0..24);
    (descs, table, heads, prop_oneof![9 => Just(0u16), 1 => any::<u16>()])
        .prop_map(|(descs, table, heads, ahead)| RandomQueue { descs, table, heads, ahead })
}

/// All of guest memory.
fn snapshot(driver: &Driver) -> Vec<(u64, Vec<u8>)> {
    REGIONS.iter().map(|&(base, len)| (base, driver.read(base, len))).collect()
}

/// Which bytes of the region at `base` the device may write: writable buffers and device areas.
fn allowed(base: u64, len: usize, queues: &[RandomQueue]) -> Vec<bool> {
    let mut allowed = vec![false; len];
    let mut allow = |addr: u64, len: usize| {
        let start = addr.saturating_sub(base).min(allowed.len() as u64) as usize;
        let end = start.saturating_add(len).min(allowed.len());
        if addr >= base {
            allowed[start..end].fill(true);
        }
    };
    for (i, queue) in (0..).zip(queues) {
        allow(rings(i).device, 4 + 8 * 256 + 2);
        queue
            .descs
            .iter()
            .chain(&queue.table)
            .for_each(|desc| allow(desc.addr, desc.len as usize * usize::from(desc.flags & WRITE != 0)));
    }
    allowed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn random_rings_never_write_outside_their_buffers(
        queues in prop::collection::vec(any_queue(), 6),
        all_features: bool,
    ) {
        every_kind(|kind, mut driver| {
            let queues = &queues[..queues.len().min(driver.queue_count().into())];
            driver.start(if all_features { driver.offered() } else { 0 });
            driver.write(DATA, &vec![0x5a; REGIONS[0].1 - DATA as usize]);
            driver.write(REGIONS[1].0, &vec![0x5a; REGIONS[1].1]);
            for (i, queue) in (0..).zip(queues) {
                let table: Vec<u8> = queue.table.iter().flat_map(|desc| desc.bytes()).collect();
                driver.write(TABLE, &table);
                (0..).zip(&queue.descs).for_each(|(index, &desc)| driver.set_desc(i, index, desc));
                queue.heads.iter().for_each(|&head| driver.offer(i, head));
                if queue.ahead != 0 {
                    driver.set_avail(i, queue.ahead);
                }
            }
            let before = snapshot(&driver);
            driver.clear_dirty();
            for i in (0..driver.queue_count()).rev() {
                driver.kick(i);
                driver.host_events();
            }
            for ((base, before), (_, after)) in before.into_iter().zip(snapshot(&driver)) {
                let allowed = allowed(base, before.len(), queues);
                // What a balloon is given to read may be the numbers of pages: those are gone as a whole.
                let taken = |at: usize| {
                    let page = at / PAGE * PAGE;
                    kind.name == "balloon" && after[page..page + PAGE].iter().all(|&byte| byte == 0)
                };
                for at in (0..before.len()).filter(|&at| before[at] != after[at]) {
                    let address = base + at as u64;
                    assert!(allowed[at] || taken(at), "{} wrote to {address:#x}", kind.name);
                    assert!(driver.is_dirty(address), "{} wrote unseen to {address:#x}", kind.name);
                }
            }
            driver.start(0);
            assert_works(kind, &mut driver);
        });
    }
}
