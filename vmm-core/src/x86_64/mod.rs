//! What is x86-64 about the machine: its layout, how processors start, and the tables that describe it to the
//! guest's kernel.

pub mod acpi;
pub mod cpu;
pub mod cpuid;
pub mod kernel;
pub mod layout;
pub mod mptable;

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
