//! Registers of a virtio device, by meaning, on either transport.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::memory::{Mapping, PAGE};
use crate::sysfs::Device;

/// Offsets of the structures of a PCI device in its BAR (virtio 1.3 §4.1.4).
#[derive(Clone, Copy, Debug, Default)]
struct Pci {
    common: usize,
    notify: usize,
    notify_step: usize,
    device: usize,
}

/// A field that both transports have; the values are its offset and width in virtio-mmio (§4.2.2) and in the common
/// configuration of virtio-pci (§4.1.4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    DeviceFeaturesSel,
    DeviceFeatures,
    DriverFeaturesSel,
    DriverFeatures,
    QueueSel,
    QueueSize,
    QueueReady,
    Desc,
    DescHigh,
    Avail,
    AvailHigh,
    Used,
    UsedHigh,
    Status,
}

/// Fields of the selected queue.
pub const QUEUE_FIELDS: [Field; 8] = [
    Field::QueueSize,
    Field::QueueReady,
    Field::Desc,
    Field::DescHigh,
    Field::Avail,
    Field::AvailHigh,
    Field::Used,
    Field::UsedHigh,
];

impl Field {
    fn mmio(self) -> usize {
        match self {
            Self::DeviceFeatures => 0x10,
            Self::DeviceFeaturesSel => 0x14,
            Self::DriverFeatures => 0x20,
            Self::DriverFeaturesSel => 0x24,
            Self::QueueSel => 0x30,
            Self::QueueSize => 0x38,
            Self::QueueReady => 0x44,
            Self::Status => 0x70,
            Self::Desc => 0x80,
            Self::DescHigh => 0x84,
            Self::Avail => 0x90,
            Self::AvailHigh => 0x94,
            Self::Used => 0xa0,
            Self::UsedHigh => 0xa4,
        }
    }

    fn pci(self) -> (usize, usize) {
        match self {
            Self::DeviceFeaturesSel => (0x00, 4),
            Self::DeviceFeatures => (0x04, 4),
            Self::DriverFeaturesSel => (0x08, 4),
            Self::DriverFeatures => (0x0c, 4),
            Self::Status => (0x14, 1),
            Self::QueueSel => (0x16, 2),
            Self::QueueSize => (0x18, 2),
            Self::QueueReady => (0x1c, 2),
            Self::Desc => (0x20, 4),
            Self::DescHigh => (0x24, 4),
            Self::Avail => (0x28, 4),
            Self::AvailHigh => (0x2c, 4),
            Self::Used => (0x30, 4),
            Self::UsedHigh => (0x34, 4),
        }
    }
}

/// The registers of one device.
pub struct Registers {
    /// All of them, for those who do not care what they mean.
    pub map: Mapping,
    /// On PCI, the configuration space of the function.
    pub function: Option<Mapping>,
    /// Their guest physical address.
    pub address: u64,
    pci: Option<Pci>,
}

impl Registers {
    /// Maps the registers of `device`.
    pub fn of(device: &Device) -> Result<Self> {
        let memory = Path::new("/dev/mem");
        let address = device.address()?;
        if !device.is_pci() {
            // Two pages: an access may straddle the end.
            let map = Mapping::of(memory, address, 2 * PAGE)?;
            ensure!(map.read(0, 4) == 0x7472_6976, "no virtio-mmio device at {address:#x}");
            return Ok(Self { map, function: None, address, pci: None });
        }
        let config = fs::read(device.parent.join("config")).context("PCI configuration space")?;
        let pci = capabilities(&config)?;
        let bar = device.parent.join("resource0");
        let len = fs::metadata(&bar).context("BAR 0")?.len() as usize;
        let function = Mapping::of(memory, device.configuration_address()?, PAGE)?;
        ensure!(
            function.read(0, 2) == 0x1af4,
            "no virtio function at {:#x}",
            device.configuration_address()?
        );
        Ok(Self { map: Mapping::of(&bar, 0, len)?, function: Some(function), address, pci: Some(pci) })
    }

    /// The transport's name.
    pub fn transport(&self) -> &'static str {
        if self.pci.is_some() { "pci" } else { "mmio" }
    }

    fn place(&self, field: Field) -> (usize, usize) {
        match &self.pci {
            Some(pci) => (pci.common + field.pci().0, field.pci().1),
            None => (field.mmio(), 4),
        }
    }

    /// Reads a field.
    pub fn get(&self, field: Field) -> u32 {
        let (offset, width) = self.place(field);
        self.map.read(offset, width) as u32
    }

    /// Writes a field.
    pub fn set(&self, field: Field, value: u32) {
        let (offset, width) = self.place(field);
        self.map.write(offset, width, value.into());
    }

    /// Features on offer.
    pub fn offered(&self) -> u64 {
        let half = |sel| {
            self.set(Field::DeviceFeaturesSel, sel);
            u64::from(self.get(Field::DeviceFeatures))
        };
        half(0) | half(1) << 32
    }

    /// Accepts these features.
    pub fn accept(&self, features: u64) {
        for sel in [0, 1] {
            self.set(Field::DriverFeaturesSel, sel);
            self.set(Field::DriverFeatures, (features >> (32 * sel)) as u32);
        }
    }

    /// Largest size of `queue`, which is selected by this; 0 if there is none. True of a fresh device only.
    pub fn queue_max(&self, queue: u16) -> u16 {
        self.set(Field::QueueSel, queue.into());
        match self.pci {
            Some(_) => self.get(Field::QueueSize) as u16,
            None => self.map.read(0x34, 4) as u16,
        }
    }

    /// Notifies `queue`, which need not exist.
    pub fn notify(&self, queue: u16) {
        match &self.pci {
            Some(pci) => {
                let at = pci.notify + usize::from(queue) * pci.notify_step;
                if at + 2 <= self.map.len() {
                    self.map.write(at, 2, queue.into());
                }
            }
            None => self.map.write(0x50, 4, queue.into()),
        }
    }

    /// Where the device's own configuration space begins, in [`Self::map`].
    pub fn config_offset(&self) -> usize {
        self.pci.map_or(0x100, |pci| pci.device)
    }
}

/// Where virtio's structures are, all of which must be in BAR 0.
fn capabilities(config: &[u8]) -> Result<Pci> {
    let u32_at = |at: usize| {
        config.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])) as usize
    };
    let mut pci = Pci::default();
    let mut at = usize::from(*config.get(0x34).context("a capability list")?);
    let mut found = 0;
    while at != 0 && at + 16 <= config.len() && found < 48 {
        if config[at] == 9 {
            let offset = u32_at(at + 8);
            match config[at + 3] {
                1 => pci.common = offset,
                2 => (pci.notify, pci.notify_step) = (offset, u32_at(at + 16)),
                4 => pci.device = offset,
                _ => {}
            }
            ensure!(config[at + 4] == 0, "virtio's structures are in BAR 0");
        }
        found += 1;
        at = config[at + 1].into();
    }
    ensure!(pci.notify_step != 0, "no virtio capabilities");
    Ok(pci)
}
