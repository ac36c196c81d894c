//! What every virtio device of the registry has to withstand when it is saved and restored, generated from the registry:
//! a driver notices nothing, and no state, whatever it is, does harm.

use ciborium::Value;
use proptest::prelude::*;

use super::conformance::{assert_works, every_kind, every_kind_on, registers};
use super::test_driver::Driver;
use super::test_wire::{KINDS as TRANSPORTS, Kind as Transport};
use super::{F_EVENT_IDX, F_VERSION_1};
use crate::model::BusDevice;
use crate::registry::{KINDS, Kind};
use crate::shape::Shapes;
use crate::snapshot::{Saved, SnapshotError};
use crate::throttle::{Limits, TokenBucket};

const NEEDS_RESET: u32 = 64;

/// Saves the device and goes on with a fresh one. On the way: the same bytes are saved again, and all registers read the
/// same.
fn reborn(kind: &Kind, driver: &Driver, limits: &[Limits]) -> Driver {
    let saved = driver.save().unwrap();
    let mut again = driver
        .restored_asleep((kind.specimen)(), limits, &saved)
        .unwrap_or_else(|error| panic!("{} is not restored: {error}", kind.name));
    let mut second = again.save().unwrap();
    // A stand of a throttle's bucket is as of the last look.
    let mut first = saved;
    [&mut first, &mut second].into_iter().for_each(|saved| take(&mut saved.value, "throttles"));
    assert_eq!(second, first, "{}", kind.name);
    assert_eq!(registers(&again), registers(driver), "{}", kind.name);
    again.wake();
    again
}

/// Takes what a map in this value has by this name.
fn take(value: &mut Value, name: &str) {
    match value {
        Value::Map(entries) => {
            entries.retain(|(key, _)| key.as_text() != Some(name));
            entries.iter_mut().for_each(|(_, value)| take(value, name));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| take(item, name)),
        _ => {}
    }
}

#[test]
fn a_device_is_restored_in_every_status_before_it_is_started() {
    every_kind(|kind, mut driver| {
        for steps in [&[0][..], &[1], &[1, 3], &[1, 129], &[1, 3, 131]] {
            driver.set(0x70, 0);
            steps.iter().for_each(|&status| driver.set(0x70, status));
            // What is accepted is checked only with FEATURES_OK.
            driver.set(0x24, 0);
            driver.set(0x20, u32::MAX);
            let again = reborn(kind, &driver, &[]);
            assert_eq!(again.status(), *steps.last().unwrap(), "{}", kind.name);
        }
        assert!(driver.negotiate(F_VERSION_1 | F_EVENT_IDX));
        let again = reborn(kind, &driver, &[]);
        again.set_queue(0, 3, super::test_driver::rings(0));
        again.set(0x70, 15);
        assert_eq!(again.status(), 15 | NEEDS_RESET, "{}: a queue of size 3", kind.name);
        let mut again = reborn(kind, &again, &[]);
        assert_eq!(again.status(), 15 | NEEDS_RESET, "{}", kind.name);
        again.kick(0);
        again.start(0);
        let mut again = reborn(kind, &again, &[]);
        assert_works(kind, &mut again);
        again.set(0x70, 15 | 128);
        let mut again = reborn(kind, &again, &[]);
        assert_eq!(again.status(), 15 | 128, "{}", kind.name);
        again.start(0);
        assert_works(kind, &mut again);
    });
}

#[test]
fn a_broken_queue_stays_broken_until_the_reset() {
    every_kind(|kind, mut driver| {
        for queue in 0..driver.queue_count() {
            driver.start(0);
            driver.post(queue, &[&[0; 16]], &[64]);
            driver.kick(queue);
            driver.set_avail(queue, 0x7000);
            driver.kick(queue);
            let mut again = reborn(kind, &driver, &[]);
            assert_eq!(again.status(), 15 | NEEDS_RESET, "{} queue {queue}", kind.name);
            again.used(queue);
            again.post(queue, &[&[0; 16]], &[64]);
            again.kick(queue);
            assert_eq!(again.used(queue), [], "{} queue {queue}", kind.name);
            again.start(0);
            assert_works(kind, &mut again);
        }
    });
}

#[test]
fn an_interrupt_that_waits_for_its_mask_is_sent_after_the_restore() {
    every_kind_on(Transport::Pci, |kind, mut driver| {
        driver.start(0);
        let queue = driver.queue_count() - 1;
        let mask = |driver: &Driver, masked: u32| {
            let control = 0x4000 + 16 * u64::from(queue + 1) + 12;
            driver.transport.write(control, &masked.to_le_bytes());
        };
        mask(&driver, 1);
        let before = driver.interrupts();
        assert!(driver.request(queue, &[&[0; 16]], &[64]).used.is_some(), "{}", kind.name);
        assert_eq!(driver.interrupts(), before, "{}: it is masked", kind.name);
        let again = reborn(kind, &driver, &[]);
        let before = again.interrupts();
        mask(&again, 0);
        assert_eq!(again.interrupts(), before + 1, "{}", kind.name);
    });
}

#[test]
fn a_driver_that_waits_for_an_answer_is_interrupted_again() {
    every_kind(|kind, mut driver| {
        driver.start(0);
        assert_works(kind, &mut driver);
        let again = reborn(kind, &driver, &[]);
        assert!(again.interrupts() > 0, "{}: it may have been on its way", kind.name);
    });
}

#[test]
fn chains_that_wait_for_tokens_go_on() {
    let ops = TokenBucket { size: 1, refill_time: 20, one_time_burst: 0 };
    let limits = vec![Limits { bandwidth: None, ops: Some(ops) }; 4];
    for transport in TRANSPORTS {
        for kind in KINDS {
            let mut driver = Driver::build(transport, (kind.specimen)(), &limits);
            driver.start(0);
            let queue = driver.queue_count() - 1;
            let heads: Vec<u32> = (0..4).map(|_| driver.post(queue, &[&[0; 16]], &[64]).0.into()).collect();
            driver.kick(queue);
            let mut answered: Vec<u32> = driver.used(queue).into_iter().map(|(head, _)| head).collect();
            let mut again = reborn(kind, &driver, &limits);
            while again.wait_for_tokens() {}
            answered.extend(again.used(queue).into_iter().map(|(head, _)| head));
            assert_eq!(answered, heads, "{}", kind.name);
        }
    }
}

#[test]
fn a_state_of_another_device_or_transport_or_version_is_refused() {
    every_kind(|kind, driver| {
        let saved = driver.save().unwrap();
        for other in KINDS.iter().filter(|other| other.name != kind.name) {
            let refused = driver.restored((other.specimen)(), &[], &saved).err();
            assert!(matches!(refused, Some(SnapshotError::Differs { .. })), "{}: {refused:?}", other.name);
        }
        for transport in TRANSPORTS.into_iter().filter(|&other| other != driver.transport.kind()) {
            let other = Driver::on(transport, (kind.specimen)());
            assert!(other.restored((kind.specimen)(), &[], &saved).is_err(), "{}", kind.name);
        }
        let newer = Saved { version: u16::MAX, ..saved };
        let refused = driver.restored((kind.specimen)(), &[], &newer).err();
        assert!(matches!(refused, Some(SnapshotError::Newer { .. })), "{}", kind.name);
    });
}

/// One thing that a driver does before its machine is saved.
#[derive(Clone, Debug)]
enum Step {
    Post { queue: u16, readable: Vec<u8>, writable: usize },
    Kick { queue: u16 },
    Host,
    Acknowledge,
    Restart { all_features: bool },
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..8u16, prop::collection::vec(any::<u8>(), 0..64), prop::sample::select(vec![1, 16, 64, 513, 4096]))
            .prop_map(|(queue, readable, writable)| Step::Post { queue, readable, writable }),
        4 => (0..8u16).prop_map(|queue| Step::Kick { queue }),
        1 => Just(Step::Host),
        1 => Just(Step::Acknowledge),
        1 => any::<bool>().prop_map(|all_features| Step::Restart { all_features }),
    ]
}

/// Does it, and notes what came of each queue's chains.
fn act(driver: &mut Driver, step: &Step, answers: &mut Vec<(u16, u32, u32)>) {
    let of = |queue: u16| queue % driver.queue_count();
    match step {
        Step::Post { queue, readable, writable } => {
            _ = driver.post(of(*queue), &[readable], &[*writable]);
        }
        Step::Kick { queue } => driver.kick(of(*queue)),
        Step::Host => driver.host_events(),
        Step::Acknowledge => driver.set(0x64, 3),
        Step::Restart { all_features } => {
            answers.clear();
            driver.start(if *all_features { driver.offered() } else { 0 });
        }
    }
    look(driver, answers);
}

fn look(driver: &mut Driver, answers: &mut Vec<(u16, u32, u32)>) {
    for queue in 0..driver.queue_count() {
        answers.extend(driver.used(queue).into_iter().map(|(head, len)| (queue, head, len)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_driver_does_not_notice_that_its_device_is_another_one(
        before in prop::collection::vec(any_step(), 0..24),
        after in prop::collection::vec(any_step(), 0..8),
    ) {
        for transport in TRANSPORTS {
            for kind in KINDS {
                let [mut twin, mut driver] = [(); 2].map(|()| Driver::on(transport, (kind.specimen)()));
                let (mut expected, mut answers) = (Vec::new(), Vec::new());
                for (driver, answers) in [(&mut twin, &mut expected), (&mut driver, &mut answers)] {
                    driver.start(0);
                    before.iter().for_each(|step| act(driver, step, answers));
                }
                let mut driver = reborn(kind, &driver, &[]);
                look(&mut driver, &mut answers);
                for (driver, answers) in [(&mut twin, &mut expected), (&mut driver, &mut answers)] {
                    after.iter().for_each(|step| act(driver, step, answers));
                    (0..driver.queue_count()).for_each(|queue| driver.kick(queue));
                    driver.host_events();
                    look(driver, answers);
                }
                prop_assert_eq!(twin.status(), driver.status(), "{}", kind.name);
                // A guest's connections end with a restore, which it is told.
                if kind.name != "vsock" {
                    expected.sort_unstable();
                    answers.sort_unstable();
                    prop_assert_eq!(expected, answers, "{}", kind.name);
                }
                driver.start(0);
                assert_works(kind, &mut driver);
            }
        }
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<i64>().prop_map(Value::from),
        prop::sample::select(vec![0, 1, 255, 256, 0xffff, 0x1_0000, u32::MAX.into(), u64::MAX])
            .prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z_]{0,12}".prop_map(Value::from),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Value::Bytes),
        Just(Value::Null),
    ];
    leaf.prop_recursive(3, 32, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::Array),
            prop::collection::vec(("[a-z_]{0,12}".prop_map(Value::from), inner), 0..6).prop_map(Value::Map),
        ]
    })
}

/// A change somewhere in a state.
#[derive(Clone, Debug)]
enum Change {
    Replace(Value),
    Remove,
    Twice,
    Add(i64),
}

fn any_change() -> impl Strategy<Value = (usize, Change)> {
    let change = prop_oneof![
        3 => any_value().prop_map(Change::Replace),
        1 => Just(Change::Remove),
        1 => Just(Change::Twice),
        3 => prop::sample::select(vec![-1, 1, 2, 0x100, 0x1000, 0x1_0000, 1 << 40]).prop_map(Change::Add),
    ];
    (any::<usize>(), change)
}

/// How many values there are in a value, itself included.
fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(size).sum(),
        Value::Map(entries) => entries.iter().map(|(_, value)| size(value)).sum(),
        _ => 0,
    }
}

/// Changes the value number `at` of those in `value`. Returns by how much `at` was too large, if it was.
fn change(value: &mut Value, at: usize, what: &Change) -> Option<usize> {
    let Some(mut at) = at.checked_sub(1) else {
        match (what, value) {
            (Change::Replace(new), value) => *value = new.clone(),
            (Change::Remove, value) => *value = Value::Null,
            (Change::Twice, Value::Array(items)) => items.extend(items.clone()),
            (Change::Twice, Value::Map(entries)) => entries.extend(entries.clone()),
            (Change::Twice, Value::Bytes(bytes)) => bytes.extend(bytes.clone()),
            (Change::Twice, value) => *value = Value::Array(vec![value.clone(), value.clone()]),
            (Change::Add(more), value) => {
                if let Some(number) = value.as_integer() {
                    let sum = i128::from(number) + i128::from(*more);
                    *value = u64::try_from(sum).map_or(Value::Null, Value::from);
                }
            }
        }
        return None;
    };
    let inner: Vec<&mut Value> = match value {
        Value::Array(items) => items.iter_mut().collect(),
        Value::Map(entries) => entries.iter_mut().map(|(_, value)| value).collect(),
        _ => Vec::new(),
    };
    for value in inner {
        at = change(value, at, what)?;
    }
    Some(at)
}

/// A device in the middle of its life.
fn lived(transport: Transport, kind: &Kind) -> Driver {
    let mut driver = Driver::on(transport, (kind.specimen)());
    driver.start(driver.offered() & !F_EVENT_IDX);
    for queue in 0..driver.queue_count() {
        driver.post(queue, &[&[0; 16]], &[64]);
        driver.kick(queue);
        driver.post(queue, &[&[0; 16]], &[64]);
    }
    driver
}

/// A device takes over `saved` or refuses it. If it takes it, it works on, and as new after a reset.
fn survives(kind: &Kind, driver: &Driver, saved: &Saved) {
    let Ok(mut again) = driver.restored((kind.specimen)(), &[], saved) else { return };
    for queue in 0..again.queue_count() {
        again.post(queue, &[&[0; 16]], &[64]);
        again.kick(queue);
    }
    again.host_events();
    again.drain();
    let state = again.save().unwrap();
    let refused = again.restored((kind.specimen)(), &[], &state).err();
    assert_eq!(refused, None, "{}: what was taken is not taken again", kind.name);
    let mut again = again;
    again.start(0);
    assert_works(kind, &mut again);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn no_state_is_too_odd(changes in prop::collection::vec(any_change(), 1..4), any in any_value()) {
        for transport in TRANSPORTS {
            for kind in KINDS {
                let driver = lived(transport, kind);
                let saved = driver.save().unwrap();
                let mut changed = saved.clone();
                for (at, what) in &changes {
                    let count = size(&changed.value);
                    change(&mut changed.value, at % count, what);
                }
                survives(kind, &driver, &changed);
                survives(kind, &driver, &Saved { version: saved.version, value: any.clone() });
            }
        }
    }
}

#[test]
fn every_value_of_a_state_is_checked_on_its_own() {
    let changes = [
        Change::Remove,
        Change::Twice,
        Change::Add(1),
        Change::Add(0x1000),
        Change::Replace(Value::from(u64::MAX)),
        Change::Replace(Value::from(u16::MAX)),
    ];
    for transport in TRANSPORTS {
        for kind in KINDS {
            let driver = lived(transport, kind);
            let saved = driver.save().unwrap();
            // An interrupt vector's table entries are many and alike.
            for at in 0..size(&saved.value) {
                for what in &changes {
                    let mut changed = saved.clone();
                    change(&mut changed.value, at, what);
                    survives(kind, &driver, &changed);
                }
            }
        }
    }
}

/// A changed type needs a new version (see [`crate::snapshot::State`]), and then a new text here: the old one says what the
/// reader of the new version has to take, too.
#[test]
fn saved_types_change_only_with_their_versions() {
    let limit = Some(TokenBucket { size: 1 << 20, refill_time: 100, one_time_burst: 0 });
    let limits = vec![Limits { bandwidth: limit, ops: limit }; 2];
    let mut shapes = Shapes::default();
    for transport in TRANSPORTS {
        for kind in KINDS {
            let mut driver = Driver::build(transport, (kind.specimen)(), &limits);
            driver.start(0);
            // What a balloon keeps is a head.
            if kind.name == "balloon" {
                driver.post(2, &[&[0; 10]], &[]);
                driver.kick(2);
            }
            shapes.add(&format!("{} on {transport:?}", kind.name), &driver.save().unwrap());
        }
    }
    shapes.assert_kept(concat!(env!("CARGO_MANIFEST_DIR"), "/src/virtio/saved_shape.txt").as_ref());
}
