//! The register state that every virtio transport has, whatever its layout: status, features and queues.
//!
//! A transport translates its own offsets to these calls. The status machine of virtio 1.3 §3.1 is here and
//! nowhere else: what a driver writes out of turn is dropped, so that an active device's queues and features
//! cannot change under it.

use serde::{Deserialize, Serialize};

use super::queue::QueueConfig;
use super::{F_VERSION_1, RING_FEATURES};
use crate::snapshot::SnapshotError;

bitflags::bitflags! {
    /// Device status, virtio 1.3 §2.1.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Status: u8 {
        /// The driver noticed the device.
        const ACKNOWLEDGE = 1;
        /// The driver knows how to drive it.
        const DRIVER = 2;
        /// The driver is ready.
        const DRIVER_OK = 4;
        /// Feature negotiation is complete.
        const FEATURES_OK = 8;
        /// The device cannot go on before a reset.
        const DEVICE_NEEDS_RESET = 64;
        /// The driver gave up.
        const FAILED = 128;
    }
}

/// What the transport has to do after a write to the status register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum StatusAction {
    /// Nothing.
    None,
    /// Start the device; tell [`Registers`] with [`Registers::activation_failed`] if that fails.
    Activate,
    /// Reset the device; the registers are reset already.
    Reset,
}

/// A write to one of the three addresses of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// Descriptor area.
    Desc,
    /// Driver area.
    Driver,
    /// Device area.
    Device,
}

/// Registers common to all transports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registers {
    /// Bits on offer, those of the rings included.
    offered: u64,
    accepted: u64,
    status: Status,
    queues: Vec<QueueConfig>,
    /// Selects a 32 bit half of the offered features.
    pub device_features_sel: u32,
    /// Selects a 32 bit half of the accepted features.
    pub driver_features_sel: u32,
    /// Selects the queue that queue registers act on; may be out of range.
    pub queue_sel: u32,
}

/// The state of [`Registers`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistersState {
    offered: u64,
    accepted: u64,
    status: u8,
    queues: Vec<QueueConfig>,
    /// Halves of the offered and of the accepted features, and the queue.
    selected: [u32; 3],
}

impl Registers {
    /// Fresh registers of a device which offers `features` besides those of the rings.
    pub fn new(features: u64, queue_sizes: &[u16]) -> Self {
        Self {
            offered: features | RING_FEATURES,
            accepted: 0,
            status: Status::empty(),
            queues: queue_sizes.iter().map(|&size| QueueConfig::new(size)).collect(),
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
        }
    }

    /// Device status.
    pub fn status(&self) -> Status {
        self.status
    }

    /// Negotiated features.
    pub fn features(&self) -> u64 {
        self.accepted
    }

    /// All queues.
    pub fn queues(&self) -> &[QueueConfig] {
        &self.queues
    }

    /// The selected half of the offered features; 0 past the second half.
    pub fn device_features(&self) -> u32 {
        half(self.offered, self.device_features_sel)
    }

    /// The selected half of the accepted features; 0 past the second half.
    pub fn driver_features(&self) -> u32 {
        half(self.accepted, self.driver_features_sel)
    }

    /// The driver accepts `bits` in the half that it selected. Ignored unless features are being negotiated.
    pub fn write_driver_features(&mut self, bits: u32) {
        if !self.status.contains(Status::DRIVER) || self.status.contains(Status::FEATURES_OK) {
            return;
        }
        match self.driver_features_sel {
            0 => self.accepted = (self.accepted & !0xffff_ffff) | u64::from(bits),
            1 => self.accepted = (self.accepted & 0xffff_ffff) | u64::from(bits) << 32,
            _ => {}
        }
    }

    /// The selected queue.
    pub fn queue(&self) -> Option<&QueueConfig> {
        self.queues.get(self.queue_sel as usize)
    }

    /// The selected queue, if its registers may be written: after FEATURES_OK, before DRIVER_OK, and not
    /// ready (virtio 1.3 §3.1.1, §4.2.2.2).
    fn open_queue(&mut self) -> Option<&mut QueueConfig> {
        self.configurable_queue().filter(|queue| !queue.ready)
    }

    fn configurable_queue(&mut self) -> Option<&mut QueueConfig> {
        let open = self.status.contains(Status::FEATURES_OK)
            && !self.status.intersects(Status::DRIVER_OK | Status::FAILED | Status::DEVICE_NEEDS_RESET);
        self.queues.get_mut(self.queue_sel as usize).filter(|_| open)
    }

    /// The driver sets the size of the selected queue. Checked when the device starts.
    pub fn write_queue_size(&mut self, size: u32) {
        if let Some(queue) = self.open_queue() {
            // 0 is never a valid size, so it stands for all that do not fit.
            queue.size = u16::try_from(size).unwrap_or(0);
        }
    }

    /// The driver sets one half (`high` or low 32 bits) of an address of the selected queue.
    pub fn write_queue_address(&mut self, ring: Ring, high: bool, value: u32) {
        let Some(queue) = self.open_queue() else { return };
        let address = match ring {
            Ring::Desc => &mut queue.desc,
            Ring::Driver => &mut queue.driver,
            Ring::Device => &mut queue.device,
        };
        *address = match high {
            true => (*address & 0xffff_ffff) | u64::from(value) << 32,
            false => (*address & !0xffff_ffff) | u64::from(value),
        };
    }

    /// The driver makes the selected queue ready, or takes that back.
    pub fn write_queue_ready(&mut self, ready: u32) {
        if let Some(queue) = self.configurable_queue() {
            queue.ready = ready == 1;
        }
    }

    /// The driver writes the status register.
    pub fn write_status(&mut self, value: u32) -> StatusAction {
        if value == 0 {
            self.reset();
            return StatusAction::Reset;
        }
        let Ok(value) = u8::try_from(value) else { return StatusAction::None };
        // The driver only adds bits, and DEVICE_NEEDS_RESET is not its to write.
        let new = Status::from_bits_truncate(value) - Status::DEVICE_NEEDS_RESET;
        let mut added = new - self.status;
        if self.status.intersects(Status::FAILED | Status::DEVICE_NEEDS_RESET) {
            return StatusAction::None;
        }
        if !(self.status | added).contains(Status::ACKNOWLEDGE) {
            added -= Status::DRIVER;
        }
        let features_possible = (self.status | added).contains(Status::ACKNOWLEDGE | Status::DRIVER)
            && self.accepted & !self.offered == 0
            && self.accepted & F_VERSION_1 != 0;
        if !features_possible {
            added -= Status::FEATURES_OK;
        }
        if !self.status.contains(Status::FEATURES_OK) {
            added -= Status::DRIVER_OK;
        }
        self.status |= added;
        match added.contains(Status::DRIVER_OK) {
            true => StatusAction::Activate,
            false => StatusAction::None,
        }
    }

    /// The device could not be started, or cannot go on.
    pub fn activation_failed(&mut self) {
        self.status |= Status::DEVICE_NEEDS_RESET;
    }

    /// The state for a snapshot.
    pub fn save(&self) -> RegistersState {
        RegistersState {
            offered: self.offered,
            accepted: self.accepted,
            status: self.status.bits(),
            queues: self.queues.clone(),
            selected: [self.device_features_sel, self.driver_features_sel, self.queue_sel],
        }
    }

    /// Takes over a saved state. The device may offer more than it did then, which its driver does not hear of; what the
    /// driver uses must still be there.
    pub fn restore(&mut self, saved: RegistersState) -> Result<(), SnapshotError> {
        let sizes = |queues: &[QueueConfig]| {
            queues.iter().map(|queue| queue.max_size.to_string()).collect::<Vec<_>>().join(", ")
        };
        SnapshotError::unless_same("queues", saved.queues.len(), self.queues.len())?;
        SnapshotError::unless_same("queues of the sizes", sizes(&saved.queues), sizes(&self.queues))?;
        let status = Status::from_bits(saved.status).filter(|status| is_possible(*status));
        let status = status.ok_or_else(|| SnapshotError::impossible("device status"))?;
        if status.contains(Status::FEATURES_OK) {
            if saved.accepted & !saved.offered != 0 || saved.accepted & F_VERSION_1 == 0 {
                return Err(SnapshotError::impossible("set of features"));
            }
            // What a driver says before that is not checked yet, and the device will refuse it.
            if saved.accepted & !self.offered != 0 {
                let [saved, found] = [saved.accepted, self.offered].map(|bits| format!("{bits:#x}"));
                return Err(SnapshotError::Differs { what: "the feature bits", saved, found });
            }
        }
        self.offered &= saved.offered;
        (self.accepted, self.status, self.queues) = (saved.accepted, status, saved.queues);
        [self.device_features_sel, self.driver_features_sel, self.queue_sel] = saved.selected;
        Ok(())
    }

    /// Whether the driver has started the device, and it could be started.
    pub fn is_active(&self) -> bool {
        self.status.contains(Status::DRIVER_OK) && !self.status.contains(Status::DEVICE_NEEDS_RESET)
    }

    fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.offered, &sizes);
    }
}

/// Whether [`Registers::write_status`] and [`Registers::activation_failed`] can lead to this status: each step needs the one
/// before it.
fn is_possible(status: Status) -> bool {
    let steps = [
        (Status::DRIVER, Status::ACKNOWLEDGE),
        (Status::FEATURES_OK, Status::DRIVER),
        (Status::DRIVER_OK, Status::FEATURES_OK),
        (Status::DEVICE_NEEDS_RESET, Status::DRIVER_OK),
    ];
    steps.into_iter().all(|(step, before)| !status.contains(step) || status.contains(before))
}

fn half(bits: u64, sel: u32) -> u32 {
    match sel {
        0 => bits as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACK_DRIVER: u32 = 3;

    fn negotiated() -> Registers {
        let mut regs = Registers::new(1, &[64, 16]);
        assert_eq!(regs.write_status(1), StatusAction::None);
        assert_eq!(regs.write_status(ACK_DRIVER), StatusAction::None);
        regs.driver_features_sel = 1;
        regs.write_driver_features(1);
        assert_eq!(regs.write_status(ACK_DRIVER | 8), StatusAction::None);
        assert!(regs.status().contains(Status::FEATURES_OK));
        regs
    }

    #[test]
    fn states_cannot_be_skipped() {
        for value in [2, 4, 8, 12, 14, 15, 0x100, u32::MAX] {
            let mut regs = Registers::new(0, &[8]);
            assert_eq!(regs.write_status(value), StatusAction::None, "{value:#x}");
            assert!(!regs.status().intersects(Status::FEATURES_OK | Status::DRIVER_OK), "{value:#x}");
        }
    }

    #[test]
    fn features_not_offered_or_without_version_1_are_refused() {
        for (sel, bits) in [(0, 0), (0, 2), (1, 0x8000_0001)] {
            let mut regs = Registers::new(1, &[8]);
            _ = regs.write_status(ACK_DRIVER);
            (regs.driver_features_sel, _) = (sel, ());
            regs.write_driver_features(bits);
            _ = regs.write_status(ACK_DRIVER | 8);
            assert!(!regs.status().contains(Status::FEATURES_OK), "sel {sel} bits {bits:#x}");
        }
    }

    #[test]
    fn nothing_changes_after_activation() {
        let mut regs = negotiated();
        regs.write_queue_size(32);
        regs.write_queue_ready(1);
        assert_eq!(regs.write_status(15), StatusAction::Activate);
        let before = regs.clone();
        regs.write_queue_size(4);
        regs.write_queue_ready(0);
        for ring in [Ring::Desc, Ring::Driver, Ring::Device] {
            regs.write_queue_address(ring, false, 0x1000);
            regs.write_queue_address(ring, true, 0x1000);
        }
        regs.write_driver_features(0xff);
        assert_eq!(regs.write_status(15), StatusAction::None);
        assert_eq!(regs.write_status(1), StatusAction::None, "bits are not taken back");
        assert_eq!(regs, before);
    }

    #[test]
    fn a_ready_queue_is_closed_and_a_queue_out_of_range_is_nothing() {
        let mut regs = negotiated();
        regs.write_queue_ready(1);
        regs.write_queue_size(8);
        assert_eq!(regs.queue().map(|q| q.size), Some(64));
        regs.queue_sel = 2;
        regs.write_queue_size(8);
        regs.write_queue_ready(1);
        assert_eq!(regs.queue(), None);
        regs.queue_sel = u32::MAX;
        assert_eq!(regs.queue(), None);
    }

    #[test]
    fn reset_returns_to_fresh_from_every_state() {
        let fresh = Registers::new(1, &[64, 16]);
        let mut regs = negotiated();
        regs.queue_sel = 1;
        regs.write_queue_size(8);
        _ = regs.write_status(15);
        regs.activation_failed();
        assert_eq!(regs.write_status(0), StatusAction::Reset);
        assert_eq!(regs, fresh);
        _ = regs.write_status(0x81);
        assert_eq!(regs.write_status(3), StatusAction::None, "FAILED is final");
        assert_eq!(regs.write_status(0), StatusAction::Reset);
        assert_eq!(regs, fresh);
    }
}
