//! Everything a guest can see and poke: the register model of each device, with no KVM, no thread and no
//! event loop in it.
//!
//! A device is a state machine that is called with things it borrows. That makes every device, both virtio
//! transports and the whole register model testable and fuzzable without `/dev/kvm`, root or a guest.
//!
//! - [`model`]: the traits that a device implements, and those it is handed.
//! - [`virtio`]: queues, transports and one file per virtio device.
//! - [`log_file`]: where the output of a console goes.
//! - [`legacy`]: the few pieces of a PC that a Linux guest still looks for.
//! - [`pci`]: the bus, its configuration spaces, and MSI-X.
//! - [`params`] and [`size`]: configuration as people write it on a command line.
//! - [`snapshot`]: how all of these save their state, and take it back.
//! - [`storage`]: copies of what guests have stored in files of the host.
//! - [`throttle`]: token buckets, for what a guest may use of a device and of the log.
//! - [`registry`]: the one list of virtio device kinds. Command line, configuration, conformance tests and
//!   fuzz targets all come from it.

#![deny(missing_docs)]

pub mod legacy;
pub mod log_file;
pub mod model;
pub mod params;
pub mod pci;
pub mod registry;
#[cfg(any(test, feature = "specimen"))]
pub mod shape;
pub mod size;
pub mod snapshot;
pub mod storage;
pub mod throttle;
pub mod virtio;

/// Guest memory as devices see it: mapped regions, with a dirty bitmap where the VM tracks writes.
pub type GuestMemory = vm_memory::GuestMemoryMmap<Option<vm_memory::bitmap::AtomicBitmap>>;

/// The device guide's example is compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../docs/devices.md")]
struct DeviceGuide;
