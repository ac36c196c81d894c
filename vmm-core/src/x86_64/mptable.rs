//! The MP table (Intel MultiProcessor Specification 1.4), for kernels without ACPI.

use super::layout;

const APIC_VERSION: u8 = 0x14;
const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
/// Interrupt types of the assignment entries.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;
/// Polarity and trigger mode conform to the bus: for ISA, active high and edge.
const CONFORM: u16 = 0;
const ALL_LOCAL_APICS: u8 = 0xff;

/// The bytes at [`layout::MP_TABLE`] for a machine of `cpus` processors: floating pointer and table.
///
/// For the most processors that a machine may have they fit [`layout::MP_TABLE_MAX`].
pub fn build(cpus: u8) -> Vec<u8> {
    let io_apic_id = cpus;
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..cpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_BOOTSTRAP } else { 0 };
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[0, id, APIC_VERSION, flags]);
        // Signature family 6, and the features FPU and APIC; kernels read CPUID instead.
        processor[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        processor[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        entry(&processor);
    }
    entry(b"\x01\x00ISA   ");
    let io_apic = layout::IO_APIC.to_le_bytes();
    entry(&[2, io_apic_id, APIC_VERSION, 1, io_apic[0], io_apic[1], io_apic[2], io_apic[3]]);
    let [low, high] = CONFORM.to_le_bytes();
    for pin in 0..layout::IO_APIC_PINS {
        entry(&[3, INT, low, high, 0, pin, io_apic_id, pin]);
    }
    entry(&[4, EXTINT, low, high, 0, 0, 0, 0]);
    entry(&[4, NMI, low, high, 0, 0, ALL_LOCAL_APICS, 1]);

    const HEADER: usize = 44;
    let mut table = Vec::with_capacity(HEADER + entries.len());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&((HEADER + entries.len()) as u16).to_le_bytes());
    table.extend_from_slice(&[4, 0]);
    table.extend_from_slice(b"VMM     microvm     ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);

    const POINTER: usize = 16;
    let mut all = Vec::with_capacity(POINTER + table.len());
    all.extend_from_slice(b"_MP_");
    all.extend_from_slice(&((layout::MP_TABLE as usize + POINTER) as u32).to_le_bytes());
    all.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    all[10] = checksum(&all);
    all.extend_from_slice(&table);
    all
}

/// The byte that makes the sum of all 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_zero_and_lengths_are_right() {
        for cpus in [1, 2, layout::MAX_CPUS] {
            let bytes = build(cpus);
            assert!(bytes.len() <= layout::MP_TABLE_MAX, "{} bytes", bytes.len());
            let (pointer, table) = bytes.split_at(16);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(table), 0);
            assert_eq!(u16::from_le_bytes([table[4], table[5]]) as usize, table.len());
            let entries = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(entries, u16::from(cpus) + 1 + 1 + 24 + 2);
            assert_eq!(table[44 + 20 * usize::from(cpus)], 1, "the bus entry follows the processors");
        }
    }
}
