//! ACPI tables of a hardware-reduced machine (ACPI 6.5, 4.1): no fixed hardware but a reset and a sleep
//! register, and a generic event device for the power button and the VM generation id.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use devices::legacy::{cmos, power, pvpanic, serial};
use devices::pci::root;

use super::{MmioSlot, Slots, layout};

const OEM_ID: [u8; 6] = *b"VMM   ";
const OEM_TABLE_ID: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;

/// IAPC_BOOT_ARCH: there is no VGA, and no legacy device beyond what the DSDT lists.
const BOOT_ARCH_VGA_NOT_PRESENT: u16 = 1 << 2;

/// The bytes at [`layout::ACPI`]: RSDP, DSDT, FADT, MADT, with PCI devices MCFG, and XSDT, for a machine of `cpus`
/// processors and these virtio devices.
pub fn build(cpus: u8, slots: &Slots) -> Vec<u8> {
    let mut tables = Tables { bytes: vec![0; Rsdp::len()] };
    let dsdt = tables.add(&dsdt(slots));
    let fadt = tables.add(&fadt(dsdt));
    let madt = tables.add(&madt(cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if matches!(slots, Slots::Pci(_)) {
        xsdt.add_entry(tables.add(&mcfg()));
    }
    let xsdt = tables.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    tables.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    tables.bytes
}

/// Tables one after the other, each at a multiple of 16 bytes.
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table; returns its guest physical address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let start = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(start, 0);
        table.to_aml_bytes(&mut self.bytes);
        layout::ACPI + start as u64
    }
}

fn register(offset: u64) -> GAS {
    let port = u64::from(layout::POWER_PORT) + offset;
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCH_VGA_NOT_PRESENT.into();
    fadt.sleep_control_reg = register(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(power::SLEEP_STATUS);
    fadt.reset_reg = register(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.finalize()
}

fn madt(cpus: u8) -> impl Aml {
    let local = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(cpus, layout::IO_APIC, 0));
    madt
}

/// Where the configuration spaces of bus 0 are.
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM, 0, 0, 0);
    mcfg
}

fn dsdt(slots: &Slots) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    com1(&mut dsdt);
    rtc(&mut dsdt);
    pvpanic(&mut dsdt);
    power_button(&mut dsdt);
    generation_id(&mut dsdt);
    event_device(&mut dsdt);
    match slots {
        Slots::Mmio(slots) => {
            slots.iter().enumerate().for_each(|(i, slot)| virtio_mmio(&mut dsdt, i, slot));
        }
        Slots::Pci(_) => host_bridge(&mut dsdt),
    }
    let types = aml::Package::new(vec![&power::S5]);
    aml::Name::new("_S5_".into(), &types).to_aml_bytes(&mut dsdt);
    dsdt.update_checksum();
    dsdt
}

fn edge_interrupt(irq: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, irq)
}

fn io(port: u16, ports: u16) -> aml::IO {
    aml::IO::new(port, port, 1, ports as u8)
}

fn com1(dsdt: &mut Sdt) {
    aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &edge_interrupt(serial::IRQ),
                    &io(serial::PORT, serial::PORTS),
                ]),
            ),
        ],
    )
    .to_aml_bytes(dsdt);
}

fn rtc(dsdt: &mut Sdt) {
    aml::Device::new(
        "_SB_.RTC_".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0B00")),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&io(cmos::PORT, cmos::PORTS)])),
        ],
    )
    .to_aml_bytes(dsdt);
}

fn pvpanic(dsdt: &mut Sdt) {
    const PRESENT: u8 = 0xf;
    aml::Device::new(
        "_SB_.PEVT".into(),
        vec![
            &aml::Name::new("_HID".into(), &"QEMU0001"),
            &aml::Name::new("_STA".into(), &PRESENT),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&io(pvpanic::PORT, pvpanic::PORTS)]),
            ),
        ],
    )
    .to_aml_bytes(dsdt);
}

/// Notification values (ACPI 6.5, 5.6.6): the button was pressed, the generation id is another.
const STATUS_CHANGED: u8 = 0x80;

/// A control method power button.
fn power_button(dsdt: &mut Sdt) {
    aml::Device::new(
        "_SB_.PWRB".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C0C")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
        ],
    )
    .to_aml_bytes(dsdt);
}

/// The device of the "Virtual Machine Generation ID" paper: ADDR says where the id is, in two halves of an address.
fn generation_id(dsdt: &mut Sdt) {
    let halves = [layout::GENERATION_ID as u32, (layout::GENERATION_ID >> 32) as u32];
    aml::Device::new(
        "_SB_.VGEN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"VMMVGEN0"),
            &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new("ADDR".into(), &aml::Package::new(vec![&halves[0], &halves[1]])),
        ],
    )
    .to_aml_bytes(dsdt);
}

/// Turns interrupts into notifications.
fn event_device(dsdt: &mut Sdt) {
    let (button, generation) = (aml::Path::new("\\_SB_.PWRB"), aml::Path::new("\\_SB_.VGEN"));
    let interrupts = [layout::GED_IRQ, layout::GENERATION_IRQ];
    aml::Device::new(
        "_SB_.GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &edge_interrupt(interrupts[0]),
                    &edge_interrupt(interrupts[1]),
                ]),
            ),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &aml::If::new(
                        &aml::Equal::new(&aml::Arg(0), &interrupts[0]),
                        vec![&aml::Notify::new(&button, &STATUS_CHANGED)],
                    ),
                    &aml::If::new(
                        &aml::Equal::new(&aml::Arg(0), &interrupts[1]),
                        vec![&aml::Notify::new(&generation, &STATUS_CHANGED)],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(dsdt);
}

fn virtio_mmio(dsdt: &mut Sdt, index: usize, slot: &MmioSlot) {
    aml::Device::new(
        format!("_SB_.V{index:03}").as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &(index as u32)),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, slot.addr as u32, slot.len as u32),
                    &edge_interrupt(slot.irq),
                ]),
            ),
        ],
    )
    .to_aml_bytes(dsdt);
}

/// The PCI host bridge. Its devices have no interrupt pins, so there is no _PRT to route them; MCFG tells where their
/// configuration spaces are, so there is no _CBA.
fn host_bridge(dsdt: &mut Sdt) {
    let window = (layout::PCI_WINDOW as u32, (layout::PCI_WINDOW + layout::PCI_WINDOW_SIZE - 1) as u32);
    let memory = aml::AddressSpace::new_memory(
        aml::AddressSpaceCacheable::NotCacheable,
        true,
        window.0,
        window.1,
        None,
    );
    aml::Device::new(
        "_SB_.PCI0".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A08")),
            &aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_BBN".into(), &aml::ZERO),
            &aml::Name::new("_SEG".into(), &aml::ZERO),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::AddressSpace::new_bus_number(0u16, 0u16),
                    &io(root::PORT, root::PORTS),
                    &memory,
                ]),
            ),
        ],
    )
    .to_aml_bytes(dsdt);
    // What E820 reserves is to be somebody's, says the PCI firmware specification.
    aml::Device::new(
        "_SB_.ECAM".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02")),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Memory32Fixed::new(
                    true,
                    layout::PCI_ECAM as u32,
                    root::ECAM_SIZE as u32,
                )]),
            ),
        ],
    )
    .to_aml_bytes(dsdt);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Transport;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn table(bytes: &[u8], address: u64) -> &[u8] {
        let start = (address - layout::ACPI) as usize;
        let len = u32::from_le_bytes(bytes[start + 4..start + 8].try_into().unwrap()) as usize;
        &bytes[start..start + len]
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let transports = [Transport::Mmio, Transport::Pci];
        let slots = transports.map(|transport| Slots::new(transport, Slots::max(transport)));
        for (cpus, slots) in [1, layout::MAX_CPUS].into_iter().zip(&slots) {
            let bytes = build(cpus, slots);
            assert!(bytes.len() < layout::ACPI_MAX);
            assert_eq!(&bytes[..8], b"RSD PTR ");
            assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
            let xsdt = table(&bytes, u64::from_le_bytes(bytes[24..32].try_into().unwrap()));
            assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
            let entries: Vec<u64> =
                xsdt[36..].chunks(8).map(|e| u64::from_le_bytes(e.try_into().unwrap())).collect();
            let (fadt, madt) = (table(&bytes, entries[0]), table(&bytes, entries[1]));
            assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
            assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));
            assert_eq!(madt.len(), 44 + 8 * usize::from(cpus) + 12);
            let dsdt = table(&bytes, u64::from_le_bytes(fadt[140..148].try_into().unwrap()));
            assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
            let ids = dsdt.windows(8).filter(|w| w == b"LNRO0005").count();
            match slots {
                Slots::Mmio(slots) => assert_eq!((ids, entries.len()), (slots.len(), 2)),
                Slots::Pci(_) => {
                    let mcfg = table(&bytes, entries[2]);
                    assert_eq!((&mcfg[..4], sum(mcfg), ids), (&b"MCFG"[..], 0, 0));
                    assert_eq!(mcfg[44..52], layout::PCI_ECAM.to_le_bytes());
                }
            }
        }
    }
}
