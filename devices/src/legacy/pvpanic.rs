//! pvpanic: the port at which a guest kernel with that driver says that it panicked.

use std::sync::Arc;

use super::{answer, byte};
use crate::model::{BusDevice, MachineEvent, MachineEvents};

/// The I/O port.
pub const PORT: u16 = 0x505;
/// Number of ports.
pub const PORTS: u16 = 1;

/// The guest panicked.
const PANICKED: u8 = 1 << 0;
/// The guest panicked, and its crash kernel takes over: the machine is not lost yet.
const CRASH_LOADED: u8 = 1 << 1;

/// The pvpanic port.
pub struct PvPanic {
    events: Arc<dyn MachineEvents>,
}

impl PvPanic {
    /// A port that tells `events`.
    pub fn new(events: Arc<dyn MachineEvents>) -> Self {
        Self { events }
    }
}

impl BusDevice for PvPanic {
    /// The events that the host wants to hear about.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        answer(data, PANICKED | CRASH_LOADED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if byte(data).is_some_and(|event| event & PANICKED != 0) {
            self.events.raise(MachineEvent::Panicked);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_events::Raised;
    use super::*;

    #[test]
    fn only_a_panic_is_a_panic() {
        let events = Raised::new();
        let port = PvPanic::new(events.clone());
        let mut supported = [0];
        port.read(0, &mut supported);
        assert_eq!(supported, [3]);
        for data in [&[0][..], &[2], &[4], &[1, 0], &[]] {
            port.write(0, data);
            assert_eq!(events.take(), [], "{data:?}");
        }
        port.write(0, &[1]);
        assert_eq!(events.take(), [MachineEvent::Panicked]);
    }
}
