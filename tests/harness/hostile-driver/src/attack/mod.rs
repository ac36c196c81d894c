//! Attacks, in groups. Each leaves the device in whatever state it is in; the caller resets it and sees that it works.

mod chains;
mod random;
mod registers;
mod rings;

use anyhow::Result;

use crate::driver::Driver;
use crate::kinds;
use crate::memory::PAGE;

/// What attacks need to know.
pub struct Ground {
    /// Virtio device ID.
    pub id: u32,
    /// Seed of what is random.
    pub seed: u64,
    /// First address behind all RAM.
    pub end_of_ram: u64,
}

impl Ground {
    /// Addresses that no buffer has: behind RAM, in the gap of devices, registers, and what overflows.
    fn bad_addresses(&self, driver: &Driver<'_>) -> Vec<u64> {
        let last = u64::MAX - PAGE as u64 + 1;
        vec![
            self.end_of_ram,
            driver.regs.address,
            0xfee0_0000,
            0xfec0_0000,
            0xe000_0000,
            1 << 46,
            1 << 63,
            last,
        ]
    }
}

/// A group: its name, and what it does to a device in any state.
pub type Group = (&'static str, fn(&mut Driver<'_>, &Ground) -> Result<()>);

/// All groups.
pub const GROUPS: [Group; 9] = [
    ("queue-registers", registers::queue_registers),
    ("status", registers::status),
    ("widths", registers::widths),
    ("config-space", registers::config_space),
    ("reset", rings::reset),
    ("rings", rings::rings),
    ("chains", chains::chains),
    ("requests", requests),
    ("random", random::random),
];

/// Requests that only the device itself can refuse. Each is answered.
fn requests(driver: &mut Driver<'_>, ground: &Ground) -> Result<()> {
    for features in [0, !(1 << 29)] {
        driver.start(features)?;
        for (queue, readable, writable) in kinds::garbage(ground.id, driver) {
            kinds::make_room(ground.id, driver);
            driver.request(queue, &readable, writable)?;
        }
    }
    Ok(())
}
