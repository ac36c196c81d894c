//! The few pieces of a PC that a Linux guest still looks for, and the two ports of our own.
//!
//! Each is a [`BusDevice`](crate::model::BusDevice) on I/O ports; what concerns the whole machine goes to
//! [`MachineEvents`](crate::model::MachineEvents). Registers are one byte wide, wider accesses do nothing.

pub mod boot;
pub mod cmos;
pub mod i8042;
pub mod power;
pub mod pvpanic;
pub mod serial;

/// The one byte of an access, or `None` for an access of another width.
fn byte(data: &[u8]) -> Option<u8> {
    match data {
        [byte] => Some(*byte),
        _ => None,
    }
}

/// Answers an access of one byte with `value`; an access of another width keeps its zeros.
fn answer(data: &mut [u8], value: u8) {
    if let [byte] = data {
        *byte = value;
    }
}

/// What the tests of these devices share.
#[cfg(test)]
mod test_events {
    use std::sync::{Arc, Mutex};

    use crate::model::{MachineEvent, MachineEvents};

    /// Keeps what devices raise.
    #[derive(Default)]
    pub struct Raised(Mutex<Vec<MachineEvent>>);

    impl Raised {
        pub fn new() -> Arc<Self> {
            Arc::default()
        }

        /// What was raised since the last call of this.
        pub fn take(&self) -> Vec<MachineEvent> {
            std::mem::take(&mut self.0.lock().expect("no test panics with the lock"))
        }
    }

    impl MachineEvents for Raised {
        fn raise(&self, event: MachineEvent) {
            self.0.lock().expect("no test panics with the lock").push(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::test_events::Raised;
    use crate::model::{BusDevice, IrqLine};

    struct NoLine;

    impl IrqLine for NoLine {
        fn trigger(&self) {}
    }

    fn all() -> Vec<Box<dyn BusDevice>> {
        let events = Raised::new();
        let serial = super::serial::SerialPort::new(
            Arc::new(NoLine),
            events.clone(),
            Box::new(std::io::sink()),
            Box::new(|| ()),
        );
        vec![
            Box::new(serial),
            Box::new(super::boot::BootPort::new(events.clone())),
            Box::new(super::cmos::Cmos::new()),
            Box::new(crate::pci::root::Ports::new(crate::pci::root::Root::new(Vec::new()))),
            Box::new(super::i8042::I8042::new(Arc::new(NoLine), events.clone())),
            Box::new(super::power::PowerRegisters::new(events.clone())),
            Box::new(super::pvpanic::PvPanic::new(events)),
        ]
    }

    proptest! {
        #[test]
        fn accesses_of_any_width_anywhere_do_not_panic(
            accesses in prop::collection::vec((prop_oneof![4 => 0..10u64, 1 => any::<u64>()], any::<bool>(), any::<[u8; 8]>(), 0..9usize), 0..100),
        ) {
            for device in all() {
                for (offset, write, bytes, width) in &accesses {
                    let mut data = bytes[..*width].to_vec();
                    match write {
                        true => device.write(*offset, &data),
                        false => device.read(*offset, &mut data),
                    }
                }
            }
        }
    }
}
