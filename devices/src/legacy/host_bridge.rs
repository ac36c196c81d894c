//! A PCI host bridge and nothing behind it, by configuration mechanism #1 (PCI Local Bus 3.0, 3.2.2.3.2).
//!
//! Linux's ACPI needs a kernel with PCI, and such a kernel complains, after some 250 accesses, when there is no
//! PCI at all. One bridge makes it content after a dozen.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::model::BusDevice;

/// First port: the address register, with the data register behind it.
pub const PORT: u16 = 0xcf8;
/// Number of ports.
pub const PORTS: u16 = 8;

const ADDRESS: u64 = 0;
const DATA: u64 = 4;
const END: u64 = PORTS as u64;
/// The address register's bit that makes the data register a window on configuration space.
const ENABLE: u32 = 1 << 31;
/// The bits of an address that are kept: enable, bus, device, function and register.
const ADDRESS_BITS: u32 = ENABLE | 0x00ff_fffc;

/// Vendor 1b36 (Red Hat, Inc.) and device 0008, a generic host bridge; no command, no status; class 0600.
const HEADER: [u32; 3] = [0x0008_1b36, 0, 0x0600_0000];

/// The bridge at bus 0, device 0, function 0. Nothing of it can be written.
#[derive(Debug, Default)]
pub struct HostBridge {
    address: AtomicU32,
}

impl HostBridge {
    /// A bridge as after a reset.
    pub fn new() -> Self {
        Self::default()
    }

    /// The 32 bits that the address register points to.
    fn window(&self) -> u32 {
        let address = self.address.load(Ordering::Relaxed);
        let register = (address & 0xff) as usize / 4;
        match (address & ENABLE != 0, address & !(ENABLE | 0xff)) {
            (true, 0) => HEADER.get(register).copied().unwrap_or(0),
            _ => u32::MAX,
        }
    }
}

impl BusDevice for HostBridge {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            ADDRESS if data.len() == 4 => self.address.load(Ordering::Relaxed),
            DATA..END => self.window() >> (8 * (offset - DATA)),
            _ => u32::MAX,
        };
        let bytes = value.to_le_bytes();
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (ADDRESS, Ok(bytes)) = (offset, data.try_into()) {
            self.address.store(u32::from_le_bytes(bytes) & ADDRESS_BITS, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(bridge: &HostBridge, address: u32, offset: u64, width: usize) -> u32 {
        bridge.write(ADDRESS, &address.to_le_bytes());
        let mut data = vec![0; width];
        bridge.read(DATA + offset, &mut data);
        data.resize(4, 0);
        u32::from_le_bytes(data.try_into().unwrap())
    }

    #[test]
    fn one_bridge_answers_and_nothing_else() {
        let bridge = HostBridge::new();
        assert_eq!(config(&bridge, ENABLE, 0, 4), 0x0008_1b36);
        assert_eq!(config(&bridge, ENABLE, 2, 2), 0x0008);
        assert_eq!(config(&bridge, ENABLE | 8, 2, 2), 0x0600, "a host bridge by its class");
        assert_eq!(config(&bridge, ENABLE | 0xfc, 0, 4), 0);
        for absent in [0, ENABLE | 1 << 8, ENABLE | 1 << 11, ENABLE | 1 << 16] {
            assert_eq!(config(&bridge, absent, 0, 4), u32::MAX, "{absent:#x}");
        }
    }

    #[test]
    fn the_address_register_keeps_what_it_has_and_odd_accesses_do_nothing() {
        let bridge = HostBridge::new();
        bridge.write(ADDRESS, &u32::MAX.to_le_bytes());
        let mut data = [0; 4];
        bridge.read(ADDRESS, &mut data);
        assert_eq!(u32::from_le_bytes(data), ADDRESS_BITS);
        for (offset, width) in
            [(0, 1), (1, 4), (2, 2), (4, 4), (7, 8), (0, 0), (8, 1), (1 << 60, 4), (u64::MAX, 8)]
        {
            bridge.write(offset, &vec![0; width]);
            bridge.read(offset, &mut vec![0; width]);
        }
        bridge.read(ADDRESS, &mut data);
        assert_eq!(u32::from_le_bytes(data), ADDRESS_BITS);
    }
}
