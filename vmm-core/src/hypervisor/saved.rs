//! What the hypervisor keeps of a machine, in the form in which a snapshot has it. Structures of the KVM API are byte
//! strings there, as long as they are.
#![allow(unsafe_code, reason = "the KVM API has the interrupt controllers in a union")]

use devices::snapshot::State;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};

/// A vCPU, but for its clocks.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    /// CPUID leaves that the guest sees.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Running, halted, or waiting for another vCPU to start it.
    pub mp_state: kvm_mp_state,
    /// General purpose registers.
    pub regs: kvm_regs,
    /// Segment, control and descriptor table registers.
    pub sregs: kvm_sregs,
    /// x87, SSE, AVX and what else XSAVE knows.
    pub xsave: kvm_xsave,
    /// Which parts of that the guest switched on.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// The local APIC.
    pub lapic: kvm_lapic_state,
    /// Model specific registers, as index and value, without clocks.
    pub msrs: Vec<(u32, u64)>,
    /// Exceptions, interrupts and NMIs on their way.
    pub events: kvm_vcpu_events,
    /// Frequency of its time stamp counter.
    pub tsc_khz: u32,
}

impl State for VcpuState {
    const VERSION: u16 = 1;
}

/// The mask of an entry of the I/O APIC's redirection table (82093AA §3.2.4).
const MASKED: u64 = 1 << 16;

/// The interrupt controllers that all vCPUs share, and the timer.
#[derive(Clone, Serialize, Deserialize)]
pub struct IrqchipState {
    /// Both PICs and the I/O APIC.
    pub chips: Vec<kvm_irqchip>,
    /// The i8254, if there is one.
    pub pit: Option<kvm_pit_state2>,
}

impl IrqchipState {
    /// Whether the I/O APIC lets interrupts of this pin through.
    pub fn takes(&self, pin: u32) -> bool {
        let chip = self.chips.iter().find(|chip| chip.chip_id == KVM_IRQCHIP_IOAPIC);
        chip.is_some_and(|chip| {
            // SAFETY: the union is as long as it is, and its bytes are numbers whichever chip they are of.
            let table = unsafe { chip.chip.ioapic }.redirtbl;
            // SAFETY: as above.
            table.get(pin as usize).is_some_and(|entry| unsafe { entry.bits } & MASKED == 0)
        })
    }
}

impl State for IrqchipState {
    const VERSION: u16 = 1;
}

/// The clocks of a machine at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// Nanoseconds since 1970 on the host.
    pub realtime: u64,
    /// kvm-clock in nanoseconds.
    pub kvmclock: u64,
    /// One a vCPU.
    pub vcpus: Vec<VcpuClock>,
}

impl State for ClockState {
    const VERSION: u16 = 1;
}

/// The clock of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuClock {
    /// Time stamp counter.
    pub tsc: u64,
    /// When the local APIC's timer fires, on that counter; 0 for never.
    pub deadline: u64,
    /// Of the time stamp counter to the host's, if that is known. Those of all vCPUs together say how far they are apart,
    /// which the counters do not, as they are read one after the other.
    #[serde(default)]
    pub offset: Option<u64>,
}
