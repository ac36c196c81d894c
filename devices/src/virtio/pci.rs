//! The virtio-pci transport (virtio 1.3 §4.1), for modern drivers: one BAR with all structures, and MSI-X.
//!
//! Not offered: legacy interface, interrupt pin, notification data, reset of a single queue. Bus master is not asked
//! for: a guest that keeps a device from its memory stops its driver.

use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET};

use super::registers::{Registers, Ring};
use super::transport::{Cause, Core, INTERRUPT_CONFIG, INTERRUPT_USED, Interrupts, Signal};
use crate::model::{BusDevice, DeviceHost, Identity, MsiSender};
use crate::pci::Function;
use crate::pci::config::{Bar, Config, ConfigBytes, Id};
use crate::pci::msix::{self, Msix, MsixState};
use crate::snapshot::{Saved, Snapshot, SnapshotError, from_value, to_value};

/// Bytes of the BAR of one device.
pub const SIZE: u64 = 0x8000;
/// Offset in the BAR of the first queue's notification register; each queue has its own, for writes of any width.
pub const NOTIFY: u64 = 0x3000;
/// Distance from one queue's notification register to the next (notify_off_multiplier).
pub const NOTIFY_STEP: u64 = 4;

/// Offsets in the BAR of the other structures, each in pages of its own.
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const TABLE: u64 = 0x4000;
const PBA: u64 = 0x5000;
const END: u64 = 0x6000;
/// Bytes of a structure's room.
const ROOM: u64 = 0x1000;
/// Bytes of the common configuration, without the fields of features that are not offered.
const COMMON_LEN: u32 = 0x38;

/// What fits into the table's room: one vector for the configuration, the others for queues.
const MAX_VECTORS: usize = ROOM as usize / msix::ENTRY;
/// VIRTIO_MSI_NO_VECTOR.
pub const NO_VECTOR: u16 = 0xffff;

/// PCI vendor ID of virtio devices, and what is added to the device ID (§4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;

/// Vendor-specific capability, and the types of virtio's (§4.1.4).
const VENDOR_CAPABILITY: u8 = 0x09;
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;
/// Offsets in a capability: offset and length in the BAR, and what follows them.
const CAP_BAR: usize = 4;
const CAP_OFFSET: usize = 8;
const CAP_LENGTH: usize = 12;
const CAP_DATA: usize = 16;

/// MSI-X vectors as a virtio driver hands them out.
pub struct Vectors {
    msix: Msix,
    /// Of the configuration, then of each queue; [`NO_VECTOR`] if it has none.
    assigned: Box<[AtomicU16]>,
    count: u16,
}

impl Vectors {
    fn vector(&self, cause: Cause) -> Option<&AtomicU16> {
        match cause {
            Cause::Config => self.assigned.first(),
            Cause::Queue(queue) => self.assigned.get(1 + usize::from(queue)),
        }
    }

    fn get(&self, cause: Cause) -> u16 {
        self.vector(cause).map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// The driver assigns a vector. One that does not exist reads back as [`NO_VECTOR`] (§4.1.5.1.2).
    fn assign(&self, cause: Cause, vector: u16) {
        if let Some(assigned) = self.vector(cause) {
            assigned.store(if vector < self.count { vector } else { NO_VECTOR }, Ordering::SeqCst);
        }
    }
}

impl Signal for Vectors {
    fn send(&self, cause: Cause) {
        self.msix.send(self.get(cause));
    }

    fn reset(&self) {
        self.assigned.iter().for_each(|vector| vector.store(NO_VECTOR, Ordering::SeqCst));
    }
}

/// The interrupt side of the transport.
pub type PciNotifier = Interrupts<Vectors>;

impl PciNotifier {
    /// A notifier of a device with so many queues that sends its interrupts by `sender`.
    pub fn over(queues: usize, sender: Arc<dyn MsiSender>) -> Arc<Self> {
        let count = (1 + queues).min(MAX_VECTORS) as u16;
        let assigned = (0..=queues).map(|_| AtomicU16::new(NO_VECTOR)).collect();
        Self::new(Vectors { msix: Msix::new(count, sender), assigned, count })
    }
}

/// What a snapshot keeps of this transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PciState {
    config: ConfigBytes,
    msix: MsixState,
    vectors: Vec<u16>,
}

/// The function and the register file of one device. As a [`BusDevice`] it answers on its BAR.
pub struct PciTransport {
    core: Core<Vectors>,
    config: Mutex<Config>,
    /// The guest lets the device answer on its BAR. Notifications that an ioeventfd takes reach it anyway.
    decodes: AtomicBool,
    /// Where the window (§4.1.4.9) and MSI-X are in the configuration space.
    window: usize,
    msix: usize,
}

impl PciTransport {
    /// The transport, with its BAR at `bar`, of the device with this identity, which has already moved to its `host`.
    pub fn of(device: Identity, bar: u32, notifier: Arc<PciNotifier>, host: Arc<dyn DeviceHost>) -> Self {
        let id = Id {
            vendor: VENDOR,
            device: DEVICE_BASE.wrapping_add(device.id as u16),
            class: class(device.id),
            revision: 1,
        };
        let mut config = Config::new(id, Some(Bar { addr: bar, size: SIZE as u32 }));
        let table = notifier.signal().msix.capability(TABLE as u32, PBA as u32);
        let msix = config.add_capability(msix::CAPABILITY, &table, &msix::CONTROL_WRITABLE.to_le_bytes());
        let notify_len = device.queue_sizes.len() as u32 * NOTIFY_STEP as u32;
        let mut add = |kind, offset: u64, length: u32, more: &[u8], writable: &[u8]| {
            config.add_capability(VENDOR_CAPABILITY, &capability(kind, offset, length, more), writable)
        };
        add(COMMON_CFG, COMMON, COMMON_LEN, &[], &[]);
        add(NOTIFY_CFG, NOTIFY, notify_len, &(NOTIFY_STEP as u32).to_le_bytes(), &[]);
        add(ISR_CFG, ISR, 1, &[], &[]);
        add(DEVICE_CFG, DEVICE, ROOM as u32, &[], &[]);
        // Of the window the driver writes BAR, offset, length and data (§4.1.4.9.1).
        let mut writable = [0xff; CAP_DATA + 4 - 2];
        writable[..CAP_BAR - 2].fill(0);
        writable[CAP_BAR + 1 - 2..CAP_OFFSET - 2].fill(0);
        let window = add(PCI_CFG, 0, 0, &[0; 4], &writable);
        let core = Core::new(device, notifier, host);
        Self { core, config: Mutex::new(config), decodes: AtomicBool::new(false), window, msix }
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn vectors(&self) -> &Vectors {
        self.core.interrupts().signal()
    }

    /// A read of the BAR, whether or not the device answers there.
    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => {
                let value = self.read_common(offset, data.len()).to_le_bytes();
                data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
            }
            // Reading takes the interrupts off (§4.1.4.5).
            ISR if data.len() == 1 => {
                data[0] = self.core.interrupts().acknowledge(INTERRUPT_USED | INTERRUPT_CONFIG) as u8;
            }
            DEVICE..NOTIFY => self.core.config().read(offset - DEVICE, data),
            TABLE..PBA => self.vectors().msix.read_table(offset - TABLE, data),
            PBA..END => self.vectors().msix.read_pba(offset - PBA, data),
            _ => {}
        }
    }

    /// A write to the BAR, whether or not the device answers there.
    fn write_bar(&self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => {
                let mut bytes = [0; 4];
                if let Some(to) = bytes.get_mut(..data.len()) {
                    to.copy_from_slice(data);
                    self.write_common(offset, data.len(), u32::from_le_bytes(bytes));
                }
            }
            DEVICE..NOTIFY => self.core.write_config(offset - DEVICE, data),
            NOTIFY..TABLE if offset.is_multiple_of(NOTIFY_STEP) => {
                self.core.kick(((offset - NOTIFY) / NOTIFY_STEP) as u32);
            }
            TABLE..PBA => self.vectors().msix.write_table(offset - TABLE, data),
            _ => self.core.odd_write(offset, "a part of a virtio-pci BAR that cannot be written"),
        }
    }

    /// A field of the common configuration (§4.1.4.3), which is read in its own width, 64 bits in halves; anything
    /// else reads as 0.
    fn read_common(&self, offset: u64, width: usize) -> u32 {
        let core = &self.core;
        let queue_vector = |queue: u32| u16::try_from(queue).map(|q| self.vectors().get(Cause::Queue(q)));
        match (offset, width) {
            (0x00, 4) => core.registers().device_features_sel,
            (0x04, 4) => core.registers().device_features(),
            (0x08, 4) => core.registers().driver_features_sel,
            (0x0c, 4) => core.registers().driver_features(),
            (0x10, 2) => self.vectors().get(Cause::Config).into(),
            (0x12, 2) => core.registers().queues().len() as u32,
            (0x14, 1) => core.status().bits().into(),
            (0x15, 1) => core.config().generation() & 0xff,
            (0x16, 2) => core.registers().queue_sel,
            (0x18, 2) => core.registers().queue().map_or(0, |queue| queue.size.into()),
            (0x1a, 2) => queue_vector(core.registers().queue_sel).unwrap_or(NO_VECTOR).into(),
            (0x1c, 2) => core.registers().queue().map_or(0, |queue| queue.ready.into()),
            (0x1e, 2) => notify_offset(&core.registers()),
            (0x20..0x38, 4) if offset.is_multiple_of(4) => {
                let address = core.registers().queue().map_or(0, |queue| match offset & !7 {
                    0x20 => queue.desc,
                    0x28 => queue.driver,
                    _ => queue.device,
                });
                (address >> (offset % 8 * 8)) as u32
            }
            _ => 0,
        }
    }

    /// The driver writes a field of the common configuration; the widths are those of [`Self::read_common`].
    fn write_common(&self, offset: u64, width: usize, value: u32) {
        let core = &self.core;
        let high = !offset.is_multiple_of(8);
        match (offset, width) {
            (0x00, 4) => core.registers().device_features_sel = value,
            (0x08, 4) => core.registers().driver_features_sel = value,
            (0x0c, 4) => core.registers().write_driver_features(value),
            (0x10, 2) => self.vectors().assign(Cause::Config, value as u16),
            (0x14, 1) => core.write_status(value),
            (0x16, 2) => core.registers().queue_sel = value,
            (0x18, 2) => core.registers().write_queue_size(value),
            (0x1a, 2) => {
                let queue = core.registers().queue_sel as u16;
                self.vectors().assign(Cause::Queue(queue), value as u16);
            }
            // The driver may not take it back (§4.1.4.3.2).
            (0x1c, 2) if value == 1 => core.registers().write_queue_ready(value),
            (0x20 | 0x24, 4) => core.registers().write_queue_address(Ring::Desc, high, value),
            (0x28 | 0x2c, 4) => core.registers().write_queue_address(Ring::Driver, high, value),
            (0x30 | 0x34, 4) => core.registers().write_queue_address(Ring::Device, high, value),
            _ => core.odd_write(offset, "a virtio-pci register that does not exist"),
        }
    }

    /// Where in the BAR the window points to, and how many bytes it shows.
    fn window_target(&self, config: &Config) -> Option<(u64, usize)> {
        let [bar] = config.get(self.window + CAP_BAR);
        let offset = u32::from_le_bytes(config.get(self.window + CAP_OFFSET));
        let length = u32::from_le_bytes(config.get(self.window + CAP_LENGTH));
        let fits = bar == 0
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length)
            && u64::from(offset) < SIZE;
        fits.then_some((offset.into(), length as usize))
    }

    /// Whether an access of `width` bytes at `register` is to the window's data.
    fn shows_window(&self, register: usize, width: usize) -> bool {
        let data = self.window + CAP_DATA;
        register < data + 4 && register + width > data
    }
}

/// The queue's notification register, by its number. There is none for a queue out of range.
fn notify_offset(registers: &Registers) -> u32 {
    registers.queue().map_or(0, |_| registers.queue_sel)
}

/// What follows the link of a vendor capability (struct virtio_pci_cap): all structures are in BAR 0.
fn capability(kind: u8, offset: u64, length: u32, more: &[u8]) -> Vec<u8> {
    let mut body = vec![(CAP_DATA + more.len()) as u8, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(more);
    body
}

/// The PCI class of a device, for those who list devices; drivers look at the device ID.
fn class(device_id: u32) -> u32 {
    match device_id {
        VIRTIO_ID_NET => 0x02_0000,
        VIRTIO_ID_BLOCK => 0x01_8000,
        VIRTIO_ID_CONSOLE => 0x07_8000,
        _ => 0xff_0000,
    }
}

impl Snapshot for PciTransport {
    fn save(&self) -> Result<Saved, SnapshotError> {
        let vectors = self.vectors();
        self.core.save(to_value(&PciState {
            config: self.config().save(),
            msix: vectors.msix.save(),
            vectors: vectors.assigned.iter().map(|vector| vector.load(Ordering::SeqCst)).collect(),
        })?)
    }

    fn restore(&self, saved: &Saved) -> Result<(), SnapshotError> {
        self.core.restore(saved, |transport| {
            let saved: PciState = from_value(transport)?;
            let vectors = self.vectors();
            SnapshotError::unless_same("queues", saved.vectors.len(), vectors.assigned.len())?;
            vectors.msix.restore(&saved.msix)?;
            for (assigned, &vector) in vectors.assigned.iter().zip(&saved.vectors) {
                assigned.store(vector, Ordering::SeqCst);
            }
            if saved.vectors.iter().any(|&vector| vector >= vectors.count && vector != NO_VECTOR) {
                return Err(SnapshotError::impossible("MSI-X vector"));
            }
            let mut config = self.config();
            config.restore(&saved.config)?;
            let control = u16::from_le_bytes(config.get(self.msix + 2)) & msix::CONTROL_WRITABLE;
            if control != vectors.msix.control() {
                return Err(SnapshotError::impossible("MSI-X message control"));
            }
            self.decodes.store(config.decodes_memory(), Ordering::SeqCst);
            Ok(())
        })
    }
}

impl Function for PciTransport {
    fn read_config(&self, register: usize, data: &mut [u8]) {
        if self.shows_window(register, data.len()) {
            let target = self.window_target(&self.config());
            if let Some((offset, length)) = target {
                let mut bytes = [0; 4];
                self.read_bar(offset, &mut bytes[..length]);
                self.config().set(self.window + CAP_DATA, &bytes[..length]);
            }
        }
        self.config().read(register, data);
    }

    fn write_config(&self, register: usize, data: &[u8]) {
        let mut config = self.config();
        config.write(register, data);
        self.decodes.store(config.decodes_memory(), Ordering::SeqCst);
        let control = u16::from_le_bytes(config.get(self.msix + 2));
        self.vectors().msix.set_control(control);
        if self.shows_window(register, data.len())
            && let Some((offset, length)) = self.window_target(&config)
        {
            let bytes: [u8; 4] = config.get(self.window + CAP_DATA);
            // A register write may wait for the device's owner.
            drop(config);
            self.write_bar(offset, &bytes[..length]);
        }
    }
}

impl BusDevice for PciTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.decodes.load(Ordering::SeqCst) {
            true => self.read_bar(offset, data),
            false => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if self.decodes.load(Ordering::SeqCst) {
            self.write_bar(offset, data);
        }
    }
}

#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
