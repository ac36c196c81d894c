//! The state in which a vCPU enters the kernel: Linux's 64-bit boot protocol or PVH.

use kvm_bindings::{CpuId, kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::kernel::{Entry, Protocol};
use super::layout;
use crate::hypervisor::{HvError, Vcpu};
use devices::GuestMemory;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set (SDM vol. 1, 3.4.3).
const RFLAGS: u64 = 2;

/// IA32_MISC_ENABLE, with fast strings on as firmware leaves it (SDM vol. 4).
const MSR_IA32_MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// IA32_MTRR_DEF_TYPE: MTRRs on, write-back where none says otherwise (SDM vol. 3, 12.11.2.1).
const MSR_MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);

/// x87 control word and MXCSR after FNINIT and reset (SDM vol. 1, 8.1.5 and 10.2.3).
const FPU_CONTROL: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

/// Local vector table entries LINT0 and LINT1 of the local APIC page (SDM vol. 3, 11.5.1).
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 7 << 8;
const DELIVERY_NMI: u32 = 4 << 8;

/// Prepares a vCPU. The boot processor gets `entry`; the others wait for INIT and SIPI, which KVM handles.
pub fn setup(vcpu: &mut dyn Vcpu, cpuid: &CpuId, entry: Option<&Entry>) -> Result<(), HvError> {
    vcpu.set_cpuid(cpuid)?;
    vcpu.set_msrs(&[MSR_IA32_MISC_ENABLE, MSR_MTRR_DEF_TYPE])?;
    vcpu.set_fpu(&kvm_fpu { fcw: FPU_CONTROL, mxcsr: MXCSR, ..Default::default() })?;
    let mut lapic = vcpu.lapic()?;
    // The legacy PIC comes in through LINT0, NMIs through LINT1, as the MP table says.
    set_lvt(&mut lapic, APIC_LVT_LINT0, DELIVERY_EXTINT);
    set_lvt(&mut lapic, APIC_LVT_LINT1, DELIVERY_NMI);
    vcpu.set_lapic(&lapic)?;
    if let Some(entry) = entry {
        let mut sregs = vcpu.sregs()?;
        enter(&mut sregs, entry.protocol);
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&entry_regs(entry))?;
    }
    Ok(())
}

/// Replaces the delivery mode of one local vector table entry.
fn set_lvt(lapic: &mut kvm_lapic_state, register: usize, delivery: u32) {
    const DELIVERY_MASK: u32 = 7 << 8;
    let bytes: [u8; 4] = std::array::from_fn(|i| lapic.regs[register + i] as u8);
    let value = (u32::from_le_bytes(bytes) & !DELIVERY_MASK) | delivery;
    for (register, byte) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
        *register = byte as _;
    }
}

fn entry_regs(entry: &Entry) -> kvm_regs {
    let regs = kvm_regs { rflags: RFLAGS, rip: entry.address, ..Default::default() };
    match entry.protocol {
        // Documentation/arch/x86/boot.rst, "64-bit boot protocol".
        Protocol::Linux => {
            kvm_regs { rsi: layout::ZERO_PAGE, rsp: layout::BOOT_STACK, rbp: layout::BOOT_STACK, ..regs }
        }
        // Documentation of the PVH entry: Xen's docs/misc/pvh.
        Protocol::Pvh => kvm_regs { rbx: layout::PVH_INFO, ..regs },
    }
}

fn enter(sregs: &mut kvm_sregs, protocol: Protocol) {
    let [_, code, data, task] = segments(protocol);
    sregs.cs = code;
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    sregs.tr = task;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = layout::IDT;
    sregs.idt.limit = 7;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    if protocol == Protocol::Linux {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
}

/// The segments of the GDT: null, code at 0x8 or 0x10, data, task state.
fn segments(protocol: Protocol) -> [kvm_segment; 4] {
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
    let long = u8::from(protocol == Protocol::Linux);
    [
        kvm_segment::default(),
        kvm_segment { selector: 0x8, type_: 0xb, l: long, db: 1 - long, ..flat },
        kvm_segment { selector: 0x10, type_: 0x3, db: 1, ..flat },
        kvm_segment { selector: 0x18, type_: 0xb, present: 1, limit: 0x67, ..Default::default() },
    ]
}

/// A segment as the processor stores it in a descriptor table (SDM vol. 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    if segment.present == 0 {
        return 0;
    }
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let attributes = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | attributes << 40
        | (limit & 0xf_0000) << 32
        | (segment.base & 0xff00_0000) << 32
}

/// Writes the GDT, the empty IDT and page tables that map the first GiB to itself.
pub fn write_boot_structures(mem: &GuestMemory, protocol: Protocol) -> Result<(), GuestMemoryError> {
    for (i, segment) in segments(protocol).iter().enumerate() {
        mem.write_obj(descriptor(segment), GuestAddress(layout::GDT + 8 * i as u64))?;
    }
    mem.write_obj(0u64, GuestAddress(layout::IDT))?;
    if protocol == Protocol::Linux {
        const PRESENT_WRITABLE: u64 = 3;
        const LARGE: u64 = 1 << 7;
        let (pml4, pdpt, pd) =
            (layout::PAGE_TABLES, layout::PAGE_TABLES + 0x1000, layout::PAGE_TABLES + 0x2000);
        mem.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
        mem.write_obj(pd | PRESENT_WRITABLE, GuestAddress(pdpt))?;
        let mut directory = [0u8; 0x1000];
        for (i, entry) in directory.chunks_exact_mut(8).enumerate() {
            entry.copy_from_slice(&((i as u64) << 21 | PRESENT_WRITABLE | LARGE).to_le_bytes());
        }
        mem.write_slice(&directory, GuestAddress(pd))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_classic_ones() {
        let linux = segments(Protocol::Linux).map(|s| descriptor(&s));
        assert_eq!(linux, [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]);
        let pvh = segments(Protocol::Pvh).map(|s| descriptor(&s));
        assert_eq!(pvh[1], 0x00cf_9b00_0000_ffff);
    }
}
