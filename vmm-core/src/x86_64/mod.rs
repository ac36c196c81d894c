//! What is x86-64 about the machine: its layout, how processors start, and the tables that describe it to the
//! guest's kernel.

pub(crate) mod acpi;
pub(crate) mod cpu;
pub(crate) mod cpuid;
pub(crate) mod features;
pub mod kernel;
pub mod layout;
pub(crate) mod mptable;
pub(crate) mod profile;

use devices::pci::root;
use devices::virtio::{mmio, pci};

use crate::config::Transport;

/// A virtio-mmio device's place in the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioSlot {
    /// Guest physical address of its registers.
    pub addr: u64,
    /// Bytes of registers.
    pub len: u64,
    /// Its interrupt, an input of the I/O APIC.
    pub irq: u32,
}

/// The places of a machine's virtio devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Slots {
    /// On virtio-mmio.
    Mmio(Vec<MmioSlot>),
    /// On PCI, by the addresses of their BARs.
    Pci(Vec<u32>),
}

impl Slots {
    /// The places of `count` devices.
    pub fn new(transport: Transport, count: usize) -> Self {
        match transport {
            Transport::Mmio => {
                let addresses = (layout::VIRTIO_MMIO..).step_by(mmio::SIZE as usize);
                let slot = |(addr, &irq)| MmioSlot { addr, len: mmio::SIZE, irq };
                Self::Mmio(addresses.zip(layout::DEVICE_IRQS).map(slot).take(count).collect())
            }
            Transport::Pci => {
                let addresses = (layout::PCI_WINDOW as u32..).step_by(pci::SIZE as usize);
                Self::Pci(addresses.take(count.min(root::MAX_FUNCTIONS)).collect())
            }
        }
    }

    /// Most devices that there are places for.
    pub fn max(transport: Transport) -> usize {
        match transport {
            Transport::Mmio => layout::DEVICE_IRQS.len(),
            Transport::Pci => root::MAX_FUNCTIONS,
        }
    }
}
