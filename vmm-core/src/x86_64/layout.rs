//! Where everything is in the guest's physical address space and among its ports and interrupts.
//!
//! ```text
//! 0x0000_0000  boot structures, then free RAM
//! 0x0009_fc00  MP table                         (reserved in E820 up to 1 MiB)
//! 0x000e_0000  ACPI tables, the RSDP first
//! 0x000f_f000  VM generation id
//! 0x0010_0000  kernel; the initrd ends where low RAM ends
//! 0xc000_0000  MMIO gap: virtio-mmio, PCI, I/O APIC, local APIC, KVM's own pages
//! 0x1_0000_0000  the rest of RAM, then windows (files of devices), each at a multiple of 1 GiB
//! ```

/// GDT used to enter the kernel.
pub const GDT: u64 = 0x500;
/// Empty IDT used to enter the kernel.
pub const IDT: u64 = 0x540;
/// PVH start info (struct hvm_start_info).
pub const PVH_INFO: u64 = 0x6000;
/// PVH module list.
pub const PVH_MODULES: u64 = 0x6040;
/// PVH memory map.
pub const PVH_MEMMAP: u64 = 0x6080;
/// Zero page (struct boot_params).
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the stack on entry to the kernel.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables used to enter the kernel: PML4, PDPT and one page directory follow each other.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest kernel command line in bytes, with its NUL (COMMAND_LINE_SIZE of x86 Linux).
pub const CMDLINE_MAX: usize = 2048;
/// MP table: the last KiB of base memory, where Linux looks for it.
pub const MP_TABLE: u64 = 0x9_fc00;
/// Bytes of room for the MP table.
pub const MP_TABLE_MAX: usize = 0x400;
/// ACPI tables; the RSDP is here, where Linux looks for it when nobody tells it.
pub const ACPI: u64 = 0xe_0000;
/// Bytes of room for the ACPI tables.
pub const ACPI_MAX: usize = 0x1_f000;
/// The VM generation id, 16 bytes: another one in every machine, and in all that are restored from one.
pub const GENERATION_ID: u64 = 0xf_f000;
/// Where RAM for the kernel starts.
pub const HIGH_RAM: u64 = 0x10_0000;

/// Start of the gap below 4 GiB that holds no RAM.
pub const MMIO_GAP: u64 = 0xc000_0000;
/// End of that gap.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;
/// First virtio-mmio device; the others follow.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// What is left to PCI devices; their BARs are given out here, one after the other.
pub const PCI_WINDOW: u64 = 0xd800_0000;
/// Bytes of it.
pub const PCI_WINDOW_SIZE: u64 = 0x800_0000;
/// Configuration spaces of bus 0 (ECAM), reserved in E820; Linux wants that before it uses them.
pub const PCI_ECAM: u64 = 0xe000_0000;
/// I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages for KVM's own use on Intel hosts without unrestricted guests.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// ACPI sleep control, sleep status and reset register; the ports of the other legacy devices are those of a PC and
/// stand with each device.
pub const POWER_PORT: u16 = 0x600;

/// Interrupt of the ACPI generic event device, which carries the power button.
pub const GED_IRQ: u32 = 9;
/// Another one of the generic event device, for a new VM generation id. A PC has its second serial port there.
pub const GENERATION_IRQ: u32 = 3;
/// Interrupts for virtio-mmio devices: all inputs of the I/O APIC that nothing else uses.
pub const DEVICE_IRQS: &[u32] = &[5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
/// Inputs of the I/O APIC.
pub const IO_APIC_PINS: u8 = 24;

/// Most vCPUs of a machine.
pub const MAX_CPUS: u8 = 32;
/// Least RAM in bytes that a machine can be built with: the boot structures and a kernel must fit.
pub const MIN_RAM: u64 = 4 << 20;
/// Most RAM in bytes.
pub const MAX_RAM: u64 = 1 << 40;

/// The ranges of guest physical addresses, as base and length in bytes, that `size` bytes of RAM take.
pub fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    match size.checked_sub(MMIO_GAP) {
        None | Some(0) => vec![(0, size)],
        Some(above) => vec![(0, MMIO_GAP), (MMIO_GAP_END, above)],
    }
}

/// Where a window goes when everything before it ends at `end`: large pages of the host fit there, whatever it is in.
pub fn next_window(end: u64) -> u64 {
    end.max(MMIO_GAP_END).next_multiple_of(1 << 30)
}

#[cfg(test)]
mod tests {
    use devices::legacy::{i8042, serial};

    use super::*;

    #[test]
    fn ram_leaves_the_gap_free() {
        assert_eq!(ram_ranges(256 << 20), [(0, 256 << 20)]);
        assert_eq!(ram_ranges(MMIO_GAP), [(0, MMIO_GAP)]);
        assert_eq!(ram_ranges(MMIO_GAP + 4096), [(0, MMIO_GAP), (MMIO_GAP_END, 4096)]);
    }

    #[test]
    fn no_two_devices_share_an_interrupt() {
        let fixed = [i8042::IRQ, serial::IRQ, GED_IRQ, GENERATION_IRQ];
        let mut all: Vec<u32> = fixed.into_iter().chain(DEVICE_IRQS.iter().copied()).collect();
        all.sort_unstable();
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]), "{all:?}");
        assert!(all.iter().all(|irq| *irq < IO_APIC_PINS.into()));
    }

    #[test]
    fn windows_are_above_all_that_has_an_address() {
        for (end, want) in [(MIN_RAM, 4 << 30), (4 << 30, 4 << 30), ((4 << 30) + 1, 5 << 30)] {
            assert_eq!(next_window(end), want);
        }
    }
}
