//! The virtio-mmio transport, version 2 (virtio 1.3 §4.2.2).

use std::sync::Arc;

use ciborium::Value;

use super::registers::Ring;
use super::transport::{Cause, Core, Interrupts, Signal};
use crate::model::{BusDevice, DeviceHost, Identity, IrqLine};
use crate::snapshot::{Saved, Snapshot, SnapshotError};

/// Bytes of address space of one device.
pub const SIZE: u64 = 0x1000;

/// Offset of the register that the driver writes a queue's index to, to notify it.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Chosen by us; Linux does not look at it.
const VENDOR_ID: u32 = 0x4d4d_5600;
const CONFIG: u64 = 0x100;

/// One line for everything; the driver reads the interrupt status to learn the cause.
impl Signal for Arc<dyn IrqLine> {
    fn send(&self, _cause: Cause) {
        self.trigger();
    }
}

/// The interrupt side of the transport.
pub type MmioNotifier = Interrupts<Arc<dyn IrqLine>>;

/// The register file of one device.
pub struct MmioTransport {
    core: Core<Arc<dyn IrqLine>>,
}

impl MmioTransport {
    /// The transport of the device with this identity, which has already moved to its `host`.
    pub fn of(device: Identity, notifier: Arc<MmioNotifier>, host: Arc<dyn DeviceHost>) -> Self {
        Self { core: Core::new(device, notifier, host) }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let core = &self.core;
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => core.device_id(),
            0x0c => VENDOR_ID,
            0x10 => core.registers().device_features(),
            0x34 => core.registers().queue().map_or(0, |queue| queue.max_size.into()),
            0x44 => core.registers().queue().map_or(0, |queue| queue.ready.into()),
            0x60 => core.interrupts().status(),
            0x70 => core.status().bits().into(),
            // SHMLenLow/High and SHMBaseLow/High: no region has length and base -1 (§4.2.2).
            0xb0..=0xbc => u32::MAX,
            0xfc => core.config().generation(),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let core = &self.core;
        match offset {
            0x14 => core.registers().device_features_sel = value,
            0x20 => core.registers().write_driver_features(value),
            0x24 => core.registers().driver_features_sel = value,
            0x30 => core.registers().queue_sel = value,
            0x38 => core.registers().write_queue_size(value),
            0x44 => core.registers().write_queue_ready(value),
            QUEUE_NOTIFY => core.kick(value),
            0x64 => _ = core.interrupts().acknowledge(value),
            0x70 => core.write_status(value),
            0x80 | 0x84 => core.registers().write_queue_address(Ring::Desc, offset == 0x84, value),
            0x90 | 0x94 => core.registers().write_queue_address(Ring::Driver, offset == 0x94, value),
            0xa0 | 0xa4 => core.registers().write_queue_address(Ring::Device, offset == 0xa4, value),
            _ => core.odd_write(offset, "a virtio-mmio register that does not exist"),
        }
    }
}

impl Snapshot for MmioTransport {
    fn save(&self) -> Result<Saved, SnapshotError> {
        self.core.save(Value::Null)
    }

    fn restore(&self, saved: &Saved) -> Result<(), SnapshotError> {
        self.core.restore(saved, |transport| match transport {
            Value::Null => Ok(()),
            _ => Err(SnapshotError::impossible("state of virtio-mmio; it is of another transport")),
        })
    }
}

impl BusDevice for MmioTransport {
    /// Registers are 32 bits wide and aligned; anything else reads as 0. The configuration space takes any width.
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            self.core.config().read(offset - CONFIG, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            self.core.write_config(offset - CONFIG, data);
        } else if let (Ok(bytes), true) = (data.try_into(), offset.is_multiple_of(4)) {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
    }
}
