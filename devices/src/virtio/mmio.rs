//! The virtio-mmio transport, version 2 (virtio 1.3 §4.2.2).

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tracing::debug;

use super::config_space::ConfigSpace;
use super::registers::{Registers, Ring, Status, StatusAction};
use crate::model::{BusDevice, DeviceHost, Identity, IrqLine, Notifier};

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

const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// The interrupt side of the transport: shared with whoever runs the device.
pub struct MmioNotifier {
    line: Arc<dyn IrqLine>,
    interrupt_status: AtomicU32,
    needs_reset: AtomicBool,
}

impl MmioNotifier {
    /// A notifier that raises `line`.
    pub fn new(line: Arc<dyn IrqLine>) -> Arc<Self> {
        Arc::new(Self { line, interrupt_status: AtomicU32::new(0), needs_reset: AtomicBool::new(false) })
    }

    fn raise(&self, cause: u32) {
        self.interrupt_status.fetch_or(cause, Ordering::SeqCst);
        self.line.trigger();
    }
}

impl Notifier for MmioNotifier {
    fn queue_used(&self, _queue: u16) {
        self.raise(INTERRUPT_USED);
    }

    fn config_changed(&self) {
        self.raise(INTERRUPT_CONFIG);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG);
    }
}

/// The register file of one device.
pub struct MmioTransport {
    device_id: u32,
    registers: Mutex<Registers>,
    config: Arc<ConfigSpace>,
    notifier: Arc<MmioNotifier>,
    host: Arc<dyn DeviceHost>,
}

impl MmioTransport {
    /// The transport of the device with this identity, which has already moved to its `host`.
    pub fn of(device: Identity, notifier: Arc<MmioNotifier>, host: Arc<dyn DeviceHost>) -> Self {
        Self {
            device_id: device.id,
            registers: Mutex::new(Registers::new(device.features, &device.queue_sizes)),
            config: device.config,
            notifier,
            host,
        }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.device_id,
            0x0c => VENDOR_ID,
            0x10 => self.registers().device_features(),
            0x34 => self.registers().queue().map_or(0, |queue| queue.max_size.into()),
            0x44 => self.registers().queue().map_or(0, |queue| queue.ready.into()),
            0x60 => self.notifier.interrupt_status.load(Ordering::SeqCst),
            0x70 => self.status().bits().into(),
            // SHMLenLow/High and SHMBaseLow/High: no region has length and base -1 (§4.2.2).
            0xb0..=0xbc => u32::MAX,
            0xfc => self.config.generation(),
            _ => 0,
        }
    }

    fn status(&self) -> Status {
        let broken = self.notifier.needs_reset.load(Ordering::SeqCst);
        self.registers().status() | if broken { Status::DEVICE_NEEDS_RESET } else { Status::empty() }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            0x14 => self.registers().device_features_sel = value,
            0x20 => self.registers().write_driver_features(value),
            0x24 => self.registers().driver_features_sel = value,
            0x30 => self.registers().queue_sel = value,
            0x38 => self.registers().write_queue_size(value),
            0x44 => self.registers().write_queue_ready(value),
            QUEUE_NOTIFY => self.kick(value),
            0x64 => _ = self.notifier.interrupt_status.fetch_and(!value, Ordering::SeqCst),
            0x70 => self.write_status(value),
            0x80 | 0x84 => self.registers().write_queue_address(Ring::Desc, offset == 0x84, value),
            0x90 | 0x94 => self.registers().write_queue_address(Ring::Driver, offset == 0x94, value),
            0xa0 | 0xa4 => self.registers().write_queue_address(Ring::Device, offset == 0xa4, value),
            _ => debug!(offset, value, "write to a virtio-mmio register that does not exist"),
        }
    }

    fn kick(&self, queue: u32) {
        let registers = self.registers();
        let active = registers.status().contains(Status::DRIVER_OK);
        let Ok(queue) = u16::try_from(queue) else { return };
        if active && usize::from(queue) < registers.queues().len() {
            drop(registers);
            self.host.kick(queue);
        }
    }

    /// The lock is held through activation and reset: another vCPU sees the state before or after it.
    fn write_status(&self, value: u32) {
        let mut registers = self.registers();
        match registers.write_status(value) {
            StatusAction::None => {}
            StatusAction::Activate => {
                if let Err(error) = self.host.activate(registers.features(), registers.queues()) {
                    debug!(%error, "the driver's configuration is refused");
                    registers.activation_failed();
                    self.notifier.needs_reset();
                }
            }
            StatusAction::Reset => {
                self.host.reset();
                self.notifier.needs_reset.store(false, Ordering::SeqCst);
                self.notifier.interrupt_status.store(0, Ordering::SeqCst);
            }
        }
    }
}

impl BusDevice for MmioTransport {
    /// Registers are 32 bits wide and aligned; anything else reads as 0. The configuration space takes any width.
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            self.config.read(offset - CONFIG, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            if !self.config.driver_write(offset - CONFIG, data) {
                debug!(offset, "write to a read-only part of the configuration space");
            }
        } else if let (Ok(bytes), true) = (data.try_into(), offset.is_multiple_of(4)) {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
    }
}
