//! Virtio 1.3: queues, the register model that all transports share, transports, and one file per device.

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod config_space;
pub mod console;
pub mod mmio;
pub mod net;
mod patience;
pub mod pci;
pub mod pmem;
mod poller;
pub mod queue;
mod reclaim;
pub mod registers;
pub mod rng;
pub mod transport;
pub mod unit;
pub mod unix_listener;
pub mod vsock;

#[cfg(any(test, feature = "specimen"))]
pub mod test_driver;
#[cfg(any(test, feature = "specimen"))]
pub mod test_wire;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod restore_tests;

/// VIRTIO_F_INDIRECT_DESC, virtio 1.3 §6.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX, virtio 1.3 §6.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1, virtio 1.3 §6.
pub const F_VERSION_1: u64 = 1 << 32;

/// Features of the rings themselves, offered for every device.
pub const RING_FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
