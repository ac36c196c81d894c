//! The transports as [`super::test_driver`] uses them: one set of registers, wherever each transport keeps them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::mmio::{MmioNotifier, MmioTransport};
use super::pci::{NOTIFY, NOTIFY_STEP, PciNotifier, PciTransport, SIZE};
use crate::model::{BusDevice, DeviceHost, Identity, IrqLine, MsiSender, Notifier};
use crate::pci::root::{Ecam, Root};
use crate::snapshot::{Saved, Snapshot, SnapshotError};

/// A transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// virtio-mmio.
    Mmio,
    /// virtio-pci.
    Pci,
}

/// All transports.
pub const KINDS: [Kind; 2] = [Kind::Mmio, Kind::Pci];

/// Names the transport, `mmio` or `pci`, of tests that do not.
pub const VARIABLE: &str = "VMM_TEST_TRANSPORT";

impl Kind {
    /// What [`VARIABLE`] says, or virtio-mmio.
    pub fn chosen() -> Self {
        match std::env::var(VARIABLE).as_deref() {
            Ok("pci") => Self::Pci,
            Ok("mmio") | Err(_) => Self::Mmio,
            Ok(other) => panic!("{VARIABLE} is '{other}'; use mmio or pci"),
        }
    }
}

/// Counts interrupts, by line or by message.
#[derive(Default)]
pub struct Interrupts(AtomicUsize);

impl Interrupts {
    /// How many there were.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl IrqLine for Interrupts {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl MsiSender for Interrupts {
    fn send(&self, _address: u64, _data: u32) {
        self.trigger();
    }
}

/// The interrupt side of a transport, before there is a device.
pub enum Signals {
    /// virtio-mmio's.
    Mmio(Arc<MmioNotifier>),
    /// virtio-pci's.
    Pci(Arc<PciNotifier>),
}

impl Signals {
    /// Of a device with so many queues.
    pub fn new(kind: Kind, queues: usize, interrupts: Arc<Interrupts>) -> Self {
        match kind {
            Kind::Mmio => Self::Mmio(MmioNotifier::new(interrupts)),
            Kind::Pci => Self::Pci(PciNotifier::over(queues, interrupts)),
        }
    }

    /// For the device's owner.
    pub fn notifier(&self) -> Arc<dyn Notifier> {
        match self {
            Self::Mmio(notifier) => notifier.clone(),
            Self::Pci(notifier) => notifier.clone(),
        }
    }

    /// The transport of the device that the owner `host` has.
    pub fn connect(self, device: Identity, host: Arc<dyn DeviceHost>) -> Wire {
        match self {
            Self::Mmio(notifier) => Wire::Mmio(MmioTransport::of(device, notifier, host)),
            Self::Pci(notifier) => {
                let queues = device.queue_sizes.len() as u16;
                let transport = Arc::new(PciTransport::of(device, BAR, notifier, host));
                let ecam = Ecam::new(Root::new(vec![transport.clone()]));
                Wire::Pci { transport, ecam, queues }
            }
        }
    }
}

/// Where the BAR says that it is.
pub const BAR: u32 = 0xd800_0000;

/// A device's transport, as its guest sees it. As a [`BusDevice`] it is virtio-mmio's registers, or the BAR with the
/// configuration space behind it, at [`CONFIG`].
pub enum Wire {
    /// virtio-mmio.
    Mmio(MmioTransport),
    /// virtio-pci.
    Pci {
        /// The device, by its BAR.
        transport: Arc<PciTransport>,
        /// Its bus.
        ecam: Ecam,
        /// Number of queues.
        queues: u16,
    },
}

/// Where the configuration space of the PCI function is in [`Wire::Pci`]: device 1's place in ECAM.
pub const CONFIG: u64 = SIZE;

impl BusDevice for Wire {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self {
            Self::Mmio(transport) => transport.read(offset, data),
            Self::Pci { transport, .. } if offset < CONFIG => transport.read(offset, data),
            Self::Pci { ecam, .. } => ecam.read(offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match self {
            Self::Mmio(transport) => transport.write(offset, data),
            Self::Pci { transport, .. } if offset < CONFIG => transport.write(offset, data),
            Self::Pci { ecam, .. } => ecam.write(offset, data),
        }
    }
}

impl Snapshot for Wire {
    fn save(&self) -> Result<Saved, SnapshotError> {
        match self {
            Self::Mmio(transport) => transport.save(),
            Self::Pci { transport, .. } => transport.save(),
        }
    }

    fn restore(&self, saved: &Saved) -> Result<(), SnapshotError> {
        match self {
            Self::Mmio(transport) => transport.restore(saved),
            Self::Pci { transport, .. } => transport.restore(saved),
        }
    }
}

impl Wire {
    /// Which it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Mmio(_) => Kind::Mmio,
            Self::Pci { .. } => Kind::Pci,
        }
    }

    /// Where the device's configuration space begins.
    pub fn device_config(&self) -> u64 {
        match self {
            Self::Mmio(_) => 0x100,
            Self::Pci { .. } => 0x2000,
        }
    }

    /// Offset and width of the register that virtio-mmio has at `register`.
    fn place(&self, register: u64) -> Option<(u64, usize)> {
        if self.kind() == Kind::Mmio {
            return Some((register, 4));
        }
        Some(match register {
            0x10 => (0x04, 4),
            0x14 => (0x00, 4),
            0x20 => (0x0c, 4),
            0x24 => (0x08, 4),
            0x30 => (0x16, 2),
            0x34 | 0x38 => (0x18, 2),
            0x44 => (0x1c, 2),
            0x60 => (0x1000, 1),
            0x70 => (0x14, 1),
            0x80 | 0x84 => (0x20 + (register & 4), 4),
            0x90 | 0x94 => (0x28 + (register & 4), 4),
            0xa0 | 0xa4 => (0x30 + (register & 4), 4),
            0xfc => (0x15, 1),
            0x100.. => (self.device_config() + register - 0x100, 4),
            _ => return None,
        })
    }

    /// Reads the register that virtio-mmio has at `register`; 0 where this transport has none.
    pub fn get(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        if let Some((offset, width)) = self.place(register) {
            self.read(offset, &mut data[..width]);
        }
        u32::from_le_bytes(data)
    }

    /// Writes the register that virtio-mmio has at `register`.
    pub fn set(&self, register: u64, value: u32) {
        let bytes = value.to_le_bytes();
        match (self, register) {
            (Self::Pci { queues, .. }, 0x50) if value < u32::from(*queues) => {
                self.write(NOTIFY + NOTIFY_STEP * u64::from(value), &bytes[..2]);
            }
            _ => {
                if let Some((offset, width)) = self.place(register) {
                    self.write(offset, &bytes[..width]);
                }
            }
        }
    }

    /// Makes the device answer, from any state.
    pub fn enable(&self) {
        if self.kind() == Kind::Pci {
            self.write(CONFIG + 4, &6u16.to_le_bytes());
        }
    }

    /// Gives each cause of interrupts a vector of its own, and lets all through.
    pub fn connect_interrupts(&self) {
        let Self::Pci { queues, .. } = self else { return };
        for vector in 0..=u64::from(*queues) {
            self.write(0x4000 + 16 * vector, &0xfee0_0000u64.to_le_bytes());
            self.write(0x4008 + 16 * vector, &(0x30 + vector).to_le_bytes());
        }
        self.write(CONFIG + 0x42, &0x8000u16.to_le_bytes());
        self.write(0x10, &0u16.to_le_bytes());
        for queue in 0..*queues {
            self.write(0x16, &queue.to_le_bytes());
            self.write(0x1a, &(queue + 1).to_le_bytes());
        }
    }
}
