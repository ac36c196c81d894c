//! A function's configuration space: 256 bytes, of which a mask says what the guest may change (PCI Local Bus 3.0,
//! 6.1 to 6.7).

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::snapshot::SnapshotError;

/// Bytes of a configuration space.
pub const SIZE: usize = 256;

/// Command and status register.
const COMMAND: usize = 0x04;
/// Command: answers accesses to its memory.
pub const COMMAND_MEMORY: u8 = 1 << 1;
/// Command: memory, bus master, INTx disable.
const COMMAND_WRITABLE: [u8; 2] = [COMMAND_MEMORY | 1 << 2, 1 << 2];
/// Status: there are capabilities.
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// First base address register.
const BAR: Range<usize> = 0x10..0x14;
const CAPABILITIES: usize = 0x34;
/// Interrupt line: for the guest's own notes.
const INTERRUPT_LINE: usize = 0x3c;
/// First byte behind the header.
const HEADER_END: usize = 0x40;

/// Who a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id {
    /// Vendor, and the subsystem's vendor.
    pub vendor: u16,
    /// Device, and the subsystem.
    pub device: u16,
    /// Class, subclass and programming interface: 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// A region of memory space that a function answers on. Where it is was decided before the guest started, so the
/// register tells the size when asked and else keeps its address, whatever is written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Guest physical address, a multiple of the size and below 4 GiB.
    pub addr: u32,
    /// Bytes, a power of two.
    pub size: u32,
}

impl Bar {
    /// What the register says when it is asked for the size.
    fn mask(self) -> u32 {
        !(self.size - 1)
    }
}

/// The bytes of a configuration space, for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigBytes(Vec<u8>);

/// The configuration space of a function.
#[derive(Clone, Debug)]
pub struct Config {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bar: Option<Bar>,
    /// Where the next capability goes, and the byte that is to point there.
    next: usize,
    link: usize,
}

impl Config {
    /// The header of a function without interrupt pin, which has at most one BAR.
    pub fn new(id: Id, bar: Option<Bar>) -> Self {
        let mut config =
            Self { bytes: [0; SIZE], writable: [0; SIZE], bar, next: HEADER_END, link: CAPABILITIES };
        let [vendor, device] = [id.vendor, id.device].map(u16::to_le_bytes);
        for base in [0, 0x2c] {
            config.set(base, &vendor);
            config.set(base + 2, &device);
        }
        config.set(0x08, &(id.class << 8 | u32::from(id.revision)).to_le_bytes());
        if let Some(bar) = bar {
            config.set(BAR.start, &bar.addr.to_le_bytes());
            config.writable[BAR].fill(0xff);
            config.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE);
            config.writable[INTERRUPT_LINE] = 0xff;
        }
        config
    }

    /// Adds a capability: its ID, what follows the link (from its third byte), and which bits of that the guest may
    /// write. Returns where it is.
    ///
    /// # Panics
    /// When the space is full: the caller's constants decide that.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next;
        self.bytes[self.link] = at as u8;
        self.bytes[COMMAND + 2] |= STATUS_CAPABILITIES;
        self.bytes[at] = id;
        self.bytes[at + 2..][..body.len()].copy_from_slice(body);
        self.writable[at + 2..][..writable.len()].copy_from_slice(writable);
        (self.link, self.next) = (at + 1, (at + 2 + body.len()).next_multiple_of(4));
        at
    }

    /// The state for a snapshot.
    pub fn save(&self) -> ConfigBytes {
        ConfigBytes(self.bytes.into())
    }

    /// Takes over what the guest wrote; the rest must be what it was.
    pub fn restore(&mut self, saved: &ConfigBytes) -> Result<(), SnapshotError> {
        let saved: &[u8; SIZE] =
            saved.0[..].try_into().map_err(|_| SnapshotError::impossible("PCI configuration space"))?;
        let fixed = |bytes: &[u8; SIZE]| -> Vec<u8> {
            bytes.iter().zip(&self.writable).map(|(byte, mask)| byte & !mask).collect()
        };
        if fixed(saved) != fixed(&self.bytes) {
            return Err(SnapshotError::impossible("PCI function"));
        }
        let bar = u32::from_le_bytes(std::array::from_fn(|i| saved[BAR.start + i]));
        if self.bar.is_some_and(|own| bar != own.addr && bar != own.mask()) {
            return Err(SnapshotError::impossible("place of a PCI function"));
        }
        self.bytes = *saved;
        Ok(())
    }

    /// Sets bytes, whether or not the guest may.
    pub fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The `N` bytes at `at`.
    pub fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|i| self.bytes[at + i])
    }

    /// Whether the guest lets the function answer on its BAR.
    pub fn decodes_memory(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_MEMORY != 0
    }

    /// The guest reads.
    pub fn read(&self, register: usize, data: &mut [u8]) {
        let bytes = self.bytes.get(register..).unwrap_or_default();
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    }

    /// The guest writes. What it may not change stays.
    pub fn write(&mut self, register: usize, data: &[u8]) {
        for (at, &new) in (register..SIZE).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | new & mask;
        }
        if let Some(bar) = self.bar {
            let mask = bar.mask();
            let asks = u32::from_le_bytes(self.get(BAR.start)) & mask == mask;
            self.set(BAR.start, &if asks { mask } else { bar.addr }.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: Id = Id { vendor: 0x1af4, device: 0x1042, class: 0x01_8000, revision: 1 };

    fn config() -> Config {
        Config::new(ID, Some(Bar { addr: 0xd000_8000, size: 0x8000 }))
    }

    fn read(config: &Config, register: usize) -> u32 {
        let mut data = [0; 4];
        config.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_header_tells_who_it_is() {
        let config = config();
        assert_eq!(read(&config, 0), 0x1042_1af4);
        assert_eq!(read(&config, 8), 0x0180_0001);
        assert_eq!(read(&config, 0x2c), 0x1042_1af4);
        assert_eq!(read(&config, 0x3c), 0, "no interrupt pin");
    }

    #[test]
    fn the_bar_tells_its_size_and_does_not_move() {
        let mut config = config();
        for (write, want) in [
            (u32::MAX, 0xffff_8000),
            (0xd000_8000, 0xd000_8000),
            (0xffff_fff0, 0xffff_8000),
            (0xe000_0000, 0xd000_8000),
            (0, 0xd000_8000),
        ] {
            config.write(0x10, &write.to_le_bytes());
            assert_eq!(read(&config, 0x10), want, "{write:#x}");
        }
        for at in 0x10..0x14 {
            config.write(at, &[0xff]);
        }
        config.write(0x10, &[0]);
        for at in (0x14..0x28).step_by(4) {
            config.write(at, &[0xff; 4]);
            assert_eq!(read(&config, at), 0, "there is one BAR");
        }
    }

    #[test]
    fn capabilities_are_a_list_and_their_masks_hold() {
        let mut config = config();
        assert_eq!(read(&config, 0x34), 0);
        let first = config.add_capability(9, &[1, 2, 3, 4, 5], &[]);
        let second = config.add_capability(0x11, &[0, 0], &[0, 0xc0]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(read(&config, 0x34) as u8, 0x40);
        assert_eq!(config.get(0x40), [9, 0x48, 1, 2, 3, 4, 5]);
        assert_eq!(read(&config, 4) >> 16, 0x10);
        for at in 0..SIZE {
            config.write(at, &[0xff]);
        }
        assert_eq!(read(&config, 0), 0x1042_1af4);
        assert_eq!(read(&config, 4), 0x10_0406);
        assert_eq!(config.get(0x40), [9, 0x48, 1, 2, 3, 4, 5]);
        assert_eq!(config.get(0x48), [0x11, 0, 0, 0xc0]);
        assert!(config.decodes_memory());
    }
}
