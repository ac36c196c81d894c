//! Address spaces: which device answers at which address.

use std::sync::Arc;

use devices::model::BusDevice;

/// An address space of ports or of MMIO. It is filled while the machine is built and only read afterwards, so
/// an exit takes no lock here.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base, without overlaps.
    ranges: Vec<BusRange>,
}

struct BusRange {
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// Two devices claim the same address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("addresses {base:#x} to {last:#x} overlap another device's")]
pub struct Overlap {
    /// First address asked for.
    pub base: u64,
    /// Last address asked for.
    pub last: u64,
}

impl Bus {
    /// Lets `device` answer on `len` addresses from `base`.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Overlap> {
        let last = base.saturating_add(len.saturating_sub(1));
        let at = self.ranges.partition_point(|range| range.base <= base);
        let before = at.checked_sub(1).map(|i| &self.ranges[i]);
        let clash = len == 0
            || before.is_some_and(|range| base - range.base < range.len)
            || self.ranges.get(at).is_some_and(|range| range.base <= last);
        if clash {
            return Err(Overlap { base, last });
        }
        self.ranges.insert(at, BusRange { base, len, device });
        Ok(())
    }

    fn find(&self, addr: u64) -> Option<(&dyn BusDevice, u64)> {
        let at = self.ranges.partition_point(|range| range.base <= addr).checked_sub(1)?;
        let range = &self.ranges[at];
        let offset = addr - range.base;
        (offset < range.len).then_some((&*range.device, offset))
    }

    /// A read of the guest's. Returns whether a device answered; `data` is all ones if none did, as on a bus
    /// that nobody drives.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.find(addr) {
            Some((device, offset)) => {
                data.fill(0);
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// A write of the guest's. Returns whether a device took it.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        match self.find(addr) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write(&self, _offset: u64, _data: &[u8]) {}
    }

    #[test]
    fn accesses_find_their_device() {
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, Arc::new(Echo(10))).unwrap();
        bus.insert(0x10, 0x10, Arc::new(Echo(50))).unwrap();
        for (addr, want, answered) in
            [(0x0f, 0xff, false), (0x10, 50, true), (0x1f, 65, true), (0x20, 0xff, false), (0x10f, 25, true)]
        {
            let mut data = [0];
            assert_eq!((bus.read(addr, &mut data), data[0]), (answered, want), "{addr:#x}");
            assert_eq!(bus.write(addr, &data), answered, "{addr:#x}");
        }
    }

    #[test]
    fn overlaps_are_refused() {
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, Arc::new(Echo(0))).unwrap();
        for (base, len) in [(0x100, 1), (0x10f, 1), (0xff, 2), (0, 0x1000), (0x108, 0x100), (0x50, 0)] {
            assert!(bus.insert(base, len, Arc::new(Echo(0))).is_err(), "{base:#x}+{len:#x}");
        }
        bus.insert(0x110, 1, Arc::new(Echo(0))).unwrap();
        bus.insert(0xff, 1, Arc::new(Echo(0))).unwrap();
    }
}
