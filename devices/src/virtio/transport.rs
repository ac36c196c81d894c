//! What every virtio transport does beyond keeping [`Registers`]: calling the device's owner at the right moments, and
//! what a driver can read about interrupts. A transport adds its offsets, and its way to interrupt: a [`Signal`].

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use ciborium::Value;
use serde::{Deserialize, Serialize};
use tracing::debug;

use super::config_space::ConfigSpace;
use super::registers::{Registers, RegistersState, Status, StatusAction};
use super::unit::UnitState;
use crate::model::{DeviceHost, Identity, Notifier};
use crate::snapshot::{Saved, SnapshotError, State};
use crate::throttle::LogLimit;

/// Interrupt status: buffers were used (virtio 1.3 §4.1.4.5, §4.2.2).
pub const INTERRUPT_USED: u32 = 1;
/// Interrupt status: the configuration space or the device status changed.
pub const INTERRUPT_CONFIG: u32 = 2;

/// What the driver is interrupted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Buffers of this queue were used.
    Queue(u16),
    /// The configuration space or the device status changed.
    Config,
}

/// A transport's way to interrupt.
pub trait Signal: Send + Sync {
    /// Interrupts the driver, if that is possible and wanted.
    fn send(&self, cause: Cause);

    /// The driver reset the device.
    fn reset(&self) {}
}

/// The interrupt side of a transport: shared with whoever runs the device.
pub struct Interrupts<S> {
    status: AtomicU32,
    needs_reset: AtomicBool,
    signal: S,
}

impl<S: Signal> Interrupts<S> {
    /// Nothing to tell yet; `signal` is how it will be told.
    pub fn new(signal: S) -> Arc<Self> {
        Arc::new(Self { status: AtomicU32::new(0), needs_reset: AtomicBool::new(false), signal })
    }

    /// How the driver is interrupted.
    pub fn signal(&self) -> &S {
        &self.signal
    }

    /// Interrupt status: [`INTERRUPT_USED`], [`INTERRUPT_CONFIG`].
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// Takes `bits` off the interrupt status; returns what it was.
    pub fn acknowledge(&self, bits: u32) -> u32 {
        self.status.fetch_and(!bits, Ordering::SeqCst)
    }

    fn raise(&self, bit: u32, cause: Cause) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.signal.send(cause);
    }

    fn reset(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
        self.signal.reset();
    }
}

impl<S: Signal> Notifier for Interrupts<S> {
    fn queue_used(&self, queue: u16) {
        self.raise(INTERRUPT_USED, Cause::Queue(queue));
    }

    fn config_changed(&self) {
        self.raise(INTERRUPT_CONFIG, Cause::Config);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG, Cause::Config);
    }
}

/// The state of a device with its transport, for a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceState {
    device_id: u32,
    registers: RegistersState,
    interrupt_status: u32,
    needs_reset: bool,
    /// What only this transport has.
    transport: Value,
    unit: UnitState,
}

impl State for DeviceState {
    const VERSION: u16 = 1;
}

impl DeviceState {
    /// The bytes of the device's configuration space.
    pub fn config(&self) -> &[u8] {
        self.unit.config()
    }
}

/// A device as every transport shows it.
pub struct Core<S> {
    device_id: u32,
    registers: Mutex<Registers>,
    config: Arc<ConfigSpace>,
    interrupts: Arc<Interrupts<S>>,
    host: Arc<dyn DeviceHost>,
    log: LogLimit,
}

impl<S: Signal> Core<S> {
    /// The device with this identity, which has already moved to its `host`.
    pub fn new(device: Identity, interrupts: Arc<Interrupts<S>>, host: Arc<dyn DeviceHost>) -> Self {
        Self {
            device_id: device.id,
            registers: Mutex::new(Registers::new(device.features, &device.queue_sizes)),
            config: device.config,
            interrupts,
            host,
            log: LogLimit::default(),
        }
    }

    /// The device's ID.
    pub fn device_id(&self) -> u32 {
        self.device_id
    }

    /// The state for a snapshot; `transport` is what only this transport has.
    pub fn save(&self, transport: Value) -> Result<Saved, SnapshotError> {
        Saved::of(&DeviceState {
            device_id: self.device_id,
            registers: self.registers().save(),
            interrupt_status: self.interrupts.status(),
            needs_reset: self.interrupts.needs_reset.load(Ordering::SeqCst),
            transport,
            unit: self.host.save()?,
        })
    }

    /// Takes over a saved state; `transport` is called with what only this transport has.
    pub fn restore(
        &self,
        saved: &Saved,
        transport: impl FnOnce(Value) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let saved: DeviceState = saved.get()?;
        SnapshotError::unless_same("a device of the type", saved.device_id, self.device_id)?;
        let unknown = saved.interrupt_status & !(INTERRUPT_USED | INTERRUPT_CONFIG) != 0;
        if unknown || (saved.unit.is_broken() && !saved.needs_reset) {
            return Err(SnapshotError::impossible("interrupt status"));
        }
        transport(saved.transport)?;
        self.interrupts.status.store(saved.interrupt_status, Ordering::SeqCst);
        self.interrupts.needs_reset.store(saved.needs_reset, Ordering::SeqCst);
        let mut registers = self.registers();
        registers.restore(saved.registers)?;
        if registers.is_active() != saved.unit.is_active() {
            return Err(SnapshotError::impossible("device status"));
        }
        self.host.restore(&saved.unit, registers.features(), registers.queues())
    }

    /// The registers, for anything but the status.
    pub fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The device's configuration space.
    pub fn config(&self) -> &ConfigSpace {
        &self.config
    }

    /// The interrupt side.
    pub fn interrupts(&self) -> &Interrupts<S> {
        &self.interrupts
    }

    /// The driver writes to the configuration space.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        match self.config.driver_write(offset, data) {
            true => self.host.config_written(),
            false => self.odd_write(offset, "the configuration space, which is read-only there"),
        }
    }

    /// The driver writes to a place which does nothing. It may do so as often as it likes.
    pub fn odd_write(&self, offset: u64, to: &str) {
        if self.log.permits() {
            debug!(device = self.host.name(), offset, "a write to {to}");
        }
    }

    /// Device status, as the driver reads it.
    pub fn status(&self) -> Status {
        let broken = self.interrupts.needs_reset.load(Ordering::SeqCst);
        self.registers().status() | if broken { Status::DEVICE_NEEDS_RESET } else { Status::empty() }
    }

    /// The driver writes the device status.
    ///
    /// The registers stay locked through activation and reset: another vCPU sees the state before or after it.
    pub fn write_status(&self, value: u32) {
        let mut registers = self.registers();
        match registers.write_status(value) {
            StatusAction::None => {}
            StatusAction::Activate => {
                if let Err(error) = self.host.activate(registers.features(), registers.queues()) {
                    if self.log.permits() {
                        debug!(device = self.host.name(), %error, "the driver's configuration is refused");
                    }
                    registers.activation_failed();
                    self.interrupts.needs_reset();
                }
            }
            StatusAction::Reset => {
                self.host.reset();
                self.interrupts.reset();
            }
        }
    }

    /// The driver notified `queue` by a write that no ioeventfd caught.
    pub fn kick(&self, queue: u32) {
        let registers = self.registers();
        let active = registers.status().contains(Status::DRIVER_OK);
        let Ok(queue) = u16::try_from(queue) else { return };
        if active && usize::from(queue) < registers.queues().len() {
            drop(registers);
            self.host.kick(queue);
        }
    }
}
