//! The power registers of hardware-reduced ACPI (ACPI 6.5 §4.8.3.7 and §4.8.3.6): sleep control, sleep
//! status and reset.

use std::sync::Arc;

use super::byte;
use crate::model::{BusDevice, MachineEvent, MachineEvents};

/// Number of one byte registers.
pub const SIZE: u64 = 3;
/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register. Its WAK_STS stays clear, as this machine never wakes from a sleep.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;
/// What resets the machine when written to the reset register: RESET_VALUE of the FADT.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of the S5 state, for the DSDT's `_S5` object.
pub const S5: u8 = 5;

/// SLP_EN of the sleep control register.
const SLP_EN: u8 = 1 << 5;

/// The power registers.
pub struct PowerRegisters {
    events: Arc<dyn MachineEvents>,
}

impl PowerRegisters {
    /// Registers that tell `events`.
    pub fn new(events: Arc<dyn MachineEvents>) -> Self {
        Self { events }
    }
}

impl BusDevice for PowerRegisters {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, byte(data)) {
            (SLEEP_CONTROL, Some(value)) if value & SLP_EN != 0 && (value >> 2) & 7 == S5 => {
                self.events.raise(MachineEvent::PowerOff);
            }
            (RESET, Some(RESET_VALUE)) => self.events.raise(MachineEvent::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_events::Raised;
    use super::*;

    #[test]
    fn only_s5_switches_off_and_only_the_reset_value_resets() {
        let events = Raised::new();
        let registers = PowerRegisters::new(events.clone());
        let silent: [(u64, &[u8]); 8] = [
            (0, &[0x14]),
            (0, &[0x20]),
            (0, &[0x30]),
            (0, &[0x34, 0]),
            (1, &[0x34]),
            (2, &[0]),
            (2, &[2]),
            (3, &[1]),
        ];
        for (offset, data) in silent {
            registers.write(offset, data);
            assert_eq!(events.take(), [], "{offset} {data:?}");
        }
        registers.write(0, &[0x34]);
        registers.write(2, &[1]);
        assert_eq!(events.take(), [MachineEvent::PowerOff, MachineEvent::Reset]);
    }

    #[test]
    fn all_registers_read_as_zero() {
        let registers = PowerRegisters::new(Raised::new());
        for offset in 0..SIZE {
            let mut data = [0];
            registers.read(offset, &mut data);
            assert_eq!(data, [0], "{offset}");
        }
    }
}
