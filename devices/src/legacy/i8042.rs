//! The keyboard controller, as far as it is the reset button of a PC.

use std::sync::Arc;

use super::{answer, byte};
use crate::model::{BusDevice, MachineEvent, MachineEvents};

/// First I/O port.
pub const PORT: u16 = 0x60;
/// Number of ports.
pub const PORTS: u16 = 5;

/// Offset of the status register, when read, and of the command register, when written.
const COMMAND: u64 = 4;

/// Pulse output line 0, which is the CPU's reset line.
const RESET: u8 = 0xfe;

/// Output buffer full. A controller whose buffer never drains is none: Linux' probe gives up after 16 reads,
/// where a silent one costs it a timeout of half a second for each command. "Input buffer full" stays clear,
/// so that a guest which waits to send the reset command does not wait.
const STATUS: u8 = 1;

/// A keyboard controller with no keyboard.
pub struct I8042 {
    events: Arc<dyn MachineEvents>,
}

impl I8042 {
    /// A controller whose reset line tells `events`.
    pub fn new(events: Arc<dyn MachineEvents>) -> Self {
        Self { events }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == COMMAND {
            answer(data, STATUS);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if (offset, byte(data)) == (COMMAND, Some(RESET)) {
            self.events.raise(MachineEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_events::Raised;
    use super::*;

    #[test]
    fn the_reset_command_and_nothing_else_resets() {
        let events = Raised::new();
        let controller = I8042::new(events.clone());
        for (offset, data) in [(0, &[0xfe][..]), (4, &[0xaa]), (4, &[0xfe, 0]), (4, &[])] {
            controller.write(offset, data);
            assert_eq!(events.take(), [], "{offset} {data:?}");
        }
        controller.write(4, &[0xfe]);
        assert_eq!(events.take(), [MachineEvent::Reset]);
    }

    #[test]
    fn probes_end_at_once() {
        let controller = I8042::new(Raised::new());
        let (mut status, mut value) = ([0], [0]);
        controller.read(4, &mut status);
        controller.read(0, &mut value);
        assert_eq!((status, value), ([1], [0]), "output buffer full, input buffer empty");
    }
}
