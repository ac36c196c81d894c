use proptest::prelude::*;

use super::*;
use crate::registry::KINDS;
use crate::virtio::F_VERSION_1;
use crate::virtio::test_driver::Driver;
use crate::virtio::test_wire::{BAR, CONFIG, Kind};

/// Offset of the window's capability, behind MSI-X and four others.
const WINDOW: u64 = CONFIG + 0x90;

fn driver(name: &str) -> Driver {
    let kind = KINDS.iter().find(|kind| kind.name == name).expect("a device of this kind");
    Driver::on(Kind::Pci, (kind.specimen)())
}

fn get(driver: &Driver, offset: u64, width: usize) -> u32 {
    let mut data = [0; 4];
    driver.transport.read(offset, &mut data[..width]);
    u32::from_le_bytes(data)
}

fn set(driver: &Driver, offset: u64, width: usize, value: u32) {
    driver.transport.write(offset, &value.to_le_bytes()[..width]);
}

/// A request comes back with an interrupt.
fn assert_works(driver: &mut Driver) {
    driver.start(0);
    let (queue, before) = (driver.queue_count() - 1, driver.interrupts());
    assert!(driver.request(queue, &[&[0; 16]], &[64]).used.is_some());
    assert_eq!((driver.interrupts() - before, driver.status()), (1, 15));
}

#[test]
fn a_driver_finds_every_structure_by_its_capability() {
    let driver = driver("net");
    assert_eq!(get(&driver, CONFIG, 4), 0x1041_1af4);
    let (mut at, mut found) = (u64::from(get(&driver, CONFIG + 0x34, 1)), Vec::new());
    while at != 0 {
        let id = get(&driver, CONFIG + at, 1);
        let kind = get(&driver, CONFIG + at + 3, 1);
        let [offset, length] = [8, 12].map(|field| get(&driver, CONFIG + at + field, 4));
        match id {
            0x11 => {
                assert_eq!(get(&driver, CONFIG + at + 2, 2), 5, "the last of six vectors");
                assert_eq!(get(&driver, CONFIG + at + 4, 4), 0x4000);
                assert_eq!(get(&driver, CONFIG + at + 8, 4), 0x5000);
            }
            _ => found.push((id, kind, offset, length)),
        }
        if kind == 2 && id == 9 {
            assert_eq!(get(&driver, CONFIG + at + 16, 4), 4, "notify_off_multiplier");
        }
        at = u64::from(get(&driver, CONFIG + at + 1, 1));
    }
    let want = [(1, 0, 0x38), (2, 0x3000, 20), (3, 0x1000, 1), (4, 0x2000, 0x1000), (5, 0, 0)];
    assert_eq!(found, want.map(|(kind, offset, length)| (9, kind, offset, length)));
    assert_eq!(get(&driver, CONFIG + 0x10, 4), BAR);
    assert_eq!(get(&driver, 0x12, 2), 5, "num_queues");
}

#[test]
fn vectors_that_do_not_exist_read_back_as_none() {
    let mut driver = driver("net");
    driver.start(0);
    for (vector, want) in [(0, 0), (5, 5), (6, 0xffff), (0x7ff, 0xffff), (0xffff, 0xffff), (1, 1)] {
        set(&driver, 0x10, 2, vector);
        assert_eq!(get(&driver, 0x10, 2), want);
        for queue in 0..5 {
            set(&driver, 0x16, 2, queue);
            set(&driver, 0x1a, 2, vector);
            assert_eq!(get(&driver, 0x1a, 2), want);
        }
    }
    for queue in [5, 6, 0xffff] {
        set(&driver, 0x16, 2, queue);
        set(&driver, 0x1a, 2, 0);
        assert_eq!((get(&driver, 0x1a, 2), get(&driver, 0x18, 2), get(&driver, 0x1e, 2)), (0xffff, 0, 0));
    }
    driver.set(0x70, 0);
    assert_eq!(get(&driver, 0x10, 2), 0xffff, "a reset takes them back");
    set(&driver, 0x16, 2, 1);
    assert_eq!(get(&driver, 0x1a, 2), 0xffff);
}

#[test]
fn a_queue_without_a_vector_does_not_interrupt_but_says_so() {
    let mut driver = driver("rng");
    driver.start(0);
    set(&driver, 0x16, 2, 0);
    set(&driver, 0x1a, 2, 0xffff);
    let before = driver.interrupts();
    assert!(driver.request(0, &[], &[64]).used.is_some());
    assert_eq!(driver.interrupts(), before);
    assert_eq!(get(&driver, 0x1000, 1), INTERRUPT_USED);
    assert_eq!(get(&driver, 0x1000, 1), 0, "reading takes it off");
    for (offset, width) in [(0x1000, 2), (0x1000, 4), (0x1001, 1), (0xffe, 4)] {
        assert_eq!(get(&driver, offset, width), 0);
    }
}

#[test]
fn masked_interrupts_come_when_they_are_unmasked() {
    let mut driver = driver("rng");
    driver.start(0);
    set(&driver, 0x401c, 4, 1);
    let before = driver.interrupts();
    assert!(driver.request(0, &[], &[64]).used.is_some());
    assert_eq!((driver.interrupts(), get(&driver, 0x5000, 4)), (before, 2));
    set(&driver, 0x401c, 4, 0);
    assert_eq!((driver.interrupts(), get(&driver, 0x5000, 4)), (before + 1, 0));
    set(&driver, CONFIG + 0x42, 2, 0xc000);
    assert!(driver.request(0, &[], &[64]).used.is_some());
    assert_eq!((driver.interrupts(), get(&driver, 0x5000, 4)), (before + 1, 2));
    set(&driver, CONFIG + 0x42, 2, 0x8000);
    assert_eq!((driver.interrupts(), get(&driver, 0x5000, 4)), (before + 2, 0));
}

#[test]
fn the_command_register_switches_the_bar() {
    let mut driver = driver("rng");
    driver.start(0);
    set(&driver, CONFIG + 4, 2, 0);
    assert_eq!(get(&driver, 0x14, 1), 0xff);
    set(&driver, 0x14, 1, 0);
    set(&driver, CONFIG + 4, 2, 2);
    assert_eq!(get(&driver, 0x14, 1), 15, "what was written meanwhile went nowhere");
    set(&driver, CONFIG + 0x10, 4, 0xe000_0000);
    assert_eq!(get(&driver, CONFIG + 0x10, 4), BAR, "it does not move");
    set(&driver, CONFIG + 0x10, 4, u32::MAX);
    assert_eq!(get(&driver, CONFIG + 0x10, 4), 0xffff_8000);
    assert_works(&mut driver);
}

#[test]
fn the_window_reaches_the_bar_and_nothing_beyond() {
    let mut driver = driver("rng");
    let aim = |bar: u32, offset: u32, length: u32| {
        set(&driver, WINDOW + 4, 1, bar);
        set(&driver, WINDOW + 8, 4, offset);
        set(&driver, WINDOW + 12, 4, length);
    };
    assert_eq!(get(&driver, WINDOW, 4), 0x0514_0009, "the last capability");
    // Also while the BAR is off: that is what it is for.
    set(&driver, CONFIG + 4, 2, 0);
    aim(0, 0x14, 1);
    set(&driver, WINDOW + 16, 1, 1);
    assert_eq!(get(&driver, WINDOW + 16, 1), 1, "device status");
    aim(0, 0x12, 2);
    assert_eq!(get(&driver, WINDOW + 16, 2), 1, "num_queues");
    for (bar, offset, length) in [
        (1, 0x14, 1),
        (0, 0x14, 0),
        (0, 0x14, 3),
        (0, 0x12, 4),
        (0, 0x14, 8),
        (0, 0x14, u32::MAX),
        (0, 0x8000, 1),
        (0, u32::MAX, 1),
        (0, u32::MAX - 3, 4),
        (6, 0, 4),
    ] {
        aim(bar, offset, length);
        set(&driver, WINDOW + 16, 4, 0x5a5a_5a5a);
        assert_eq!(get(&driver, WINDOW + 16, 4), 0x5a5a_5a5a, "{bar} {offset:#x} {length:#x} is just memory");
    }
    aim(0, 0x14, 1);
    assert_eq!(get(&driver, WINDOW + 16, 1), 1);
    assert_works(&mut driver);
}

#[test]
fn fields_are_read_and_written_in_their_own_width() {
    let mut driver = driver("net");
    assert!(driver.negotiate(F_VERSION_1));
    let fields = [
        (0x00, 4),
        (0x04, 4),
        (0x08, 4),
        (0x0c, 4),
        (0x10, 2),
        (0x12, 2),
        (0x14, 1),
        (0x15, 1),
        (0x16, 2),
        (0x18, 2),
        (0x1a, 2),
        (0x1c, 2),
        (0x1e, 2),
        (0x20, 4),
        (0x24, 4),
        (0x28, 4),
        (0x2c, 4),
        (0x30, 4),
        (0x34, 4),
    ];
    let all = |driver: &Driver| fields.map(|(offset, width)| get(driver, offset, width));
    let before = all(&driver);
    for offset in 0..0x1000u64 {
        for width in [0usize, 1, 2, 3, 4, 5, 8, 16] {
            if fields.contains(&(offset, width)) {
                continue;
            }
            let mut data = vec![0x77; width];
            driver.transport.read(offset, &mut data);
            assert!(data.iter().all(|&byte| byte == 0), "{offset:#x} width {width}");
            driver.transport.write(offset, &vec![0xff; width]);
            driver.transport.write(offset, &vec![0; width]);
        }
    }
    // num_queues, generation and the offset of the notification register.
    for (offset, width) in [(0x04, 4), (0x12, 2), (0x15, 1), (0x1e, 2)] {
        set(&driver, offset, width, 0x5555_5555);
    }
    set(&driver, 0x1c, 2, 2);
    assert_eq!(all(&driver), before);
    assert_works(&mut driver);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn accesses_of_any_width_anywhere_leave_a_device_that_works(
        accesses in prop::collection::vec(
            (prop_oneof![4 => 0..0x40u64, 2 => 0..0x6100u64, 3 => CONFIG..CONFIG + 0x110, 1 => any::<u64>()],
             any::<bool>(), any::<[u8; 8]>(), 0..9usize), 0..200),
        name in prop::sample::select(KINDS.iter().map(|kind| kind.name).collect::<Vec<_>>()),
    ) {
        let mut driver = driver(name);
        driver.start(0);
        for (offset, write, bytes, width) in accesses {
            match write {
                true => driver.transport.write(offset, &bytes[..width]),
                false => driver.transport.read(offset, &mut vec![0; width]),
            }
        }
        driver.transport.enable();
        assert_works(&mut driver);
    }
}
