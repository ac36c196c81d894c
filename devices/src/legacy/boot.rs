//! The boot port: how a guest's init says that user space runs, and how its command ended.
//!
//! Our own device, so that "booted" is one exit with a time stamp and not a text to look for on a console.

use std::sync::Arc;

use super::byte;
use crate::model::{BusDevice, MachineEvent, MachineEvents};

/// First I/O port.
pub const PORT: u16 = 0x610;
/// Number of ports.
pub const PORTS: u16 = 2;

/// Offset of the port at which a guest reports its progress.
const PROGRESS: u64 = 0;
/// Offset of the port at which a guest reports an exit status.
const EXIT_STATUS: u64 = 1;

/// Written to the progress port: init runs.
const USER_SPACE: u8 = 1;

/// The boot port.
pub struct BootPort {
    events: Arc<dyn MachineEvents>,
}

impl BootPort {
    /// A boot port that tells `events`.
    pub fn new(events: Arc<dyn MachineEvents>) -> Self {
        Self { events }
    }
}

impl BusDevice for BootPort {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, byte(data)) {
            (PROGRESS, Some(USER_SPACE)) => self.events.raise(MachineEvent::UserSpaceReached),
            (EXIT_STATUS, Some(status)) => self.events.raise(MachineEvent::ExitStatus(status)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_events::Raised;
    use super::*;

    #[test]
    fn init_reports_and_the_rest_is_silent() {
        let events = Raised::new();
        let port = BootPort::new(events.clone());
        for (offset, data) in [(0, &[0][..]), (0, &[2]), (0, &[1, 0]), (1, &[]), (1, &[1, 2]), (2, &[1])] {
            port.write(offset, data);
            assert_eq!(events.take(), [], "{offset} {data:?}");
        }
        port.write(0, &[1]);
        port.write(1, &[0]);
        port.write(1, &[255]);
        assert_eq!(
            events.take(),
            [MachineEvent::UserSpaceReached, MachineEvent::ExitStatus(0), MachineEvent::ExitStatus(255)]
        );
    }
}
