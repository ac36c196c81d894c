//! Narrow traits over the hypervisor: what the machine needs of KVM, and no more.
//!
//! [`kvm`] is the real one. `fake` plays a guest from a script, so that builder, buses, devices and the
//! state machine can be tested where there is no KVM. Structures of the KVM API are used as they are.

#[cfg(any(test, feature = "specimen"))]
pub mod fake;
pub mod kvm;
pub mod saved;
mod tsc;

use std::io;
use std::sync::Arc;

use devices::model::{IrqLine, MsiSender};
use kvm_bindings::{CpuId, kvm_fpu, kvm_lapic_state, kvm_regs, kvm_sregs};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use saved::{IrqchipState, VcpuClock, VcpuState};

/// A hypervisor that makes virtual machines.
pub trait Hypervisor: Send + Sync {
    /// An empty machine.
    fn create_vm(&self) -> Result<Arc<dyn HvVm>, HvError>;

    /// The CPUID leaves that it can give a guest (KVM_GET_SUPPORTED_CPUID).
    fn supported_cpuid(&self) -> Result<CpuId, HvError>;
}

/// One machine's kernel side.
pub trait HvVm: Send + Sync {
    /// Gives the guest this memory, one slot a piece. To be called once, and before [`Self::create_irqchip`]:
    /// a memory slot costs fifty times more after it.
    fn map_memory(&self, ram: &GuestRam) -> Result<(), HvError>;

    /// Local APICs, I/O APIC and PICs in the kernel, and with `pit` an i8254 too.
    fn create_irqchip(&self, pit: bool) -> Result<(), HvError>;

    /// A vCPU whose APIC ID is `id`. To be called after [`Self::create_irqchip`].
    fn create_vcpu(&self, id: u8) -> Result<Box<dyn Vcpu>, HvError>;

    /// An edge triggered line to the interrupt controller's input `gsi`.
    fn irq_line(&self, gsi: u32) -> Result<Arc<dyn IrqLine>, HvError>;

    /// The way for message signalled interrupts into the interrupt controller.
    ///
    /// A message is one system call on the sender's thread, which delivers it. An eventfd would be one, too, and
    /// would need a route for each vector besides, to be set whenever the guest writes its table.
    fn msi_sender(self: Arc<Self>) -> Arc<dyn MsiSender>;

    /// A guest write to the physical address `addr` signals `event` and does not exit (ioeventfd): one of `value` in
    /// 32 bits, or without it any write.
    fn signal_on_write(&self, addr: u64, value: Option<u32>, event: &EventFd) -> Result<(), HvError>;

    /// The interrupt controllers, and with `pit` the timer, for a snapshot.
    fn save_irqchip(&self, pit: bool) -> Result<IrqchipState, HvError>;

    /// Takes over saved interrupt controllers.
    fn restore_irqchip(&self, saved: &IrqchipState) -> Result<(), HvError>;

    /// kvm-clock in nanoseconds.
    fn clock(&self) -> Result<u64, HvError>;

    /// Sets kvm-clock, which goes on from there.
    fn set_clock(&self, nanos: u64) -> Result<(), HvError>;

    /// Begins or ends to keep a log of the pages that vCPUs write.
    fn log_dirty_pages(&self, on: bool) -> Result<(), HvError>;

    /// The pages of memory slot `slot`, of `len` bytes, that vCPUs wrote since the last call, a bit each; the log begins
    /// anew.
    fn take_dirty_pages(&self, slot: u32, len: u64) -> Result<Vec<u64>, HvError>;
}

/// Wakes a vCPU that is inside [`Vcpu::run`] from another thread.
pub trait Kick: Send + Sync {
    /// Makes the current or the next `run` return [`Exit::Interrupted`].
    fn kick(&self);
}

/// One virtual processor. Its registers are those of the KVM API.
pub trait Vcpu: Send {
    /// To be called once on the thread that is going to run this vCPU.
    fn attach(&mut self) -> Result<Arc<dyn Kick>, HvError>;

    /// Sets the CPUID leaves that the guest sees.
    fn set_cpuid(&mut self, cpuid: &CpuId) -> Result<(), HvError>;

    /// Sets model specific registers, as pairs of index and value.
    fn set_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<(), HvError>;

    /// General purpose registers.
    fn regs(&self) -> Result<kvm_regs, HvError>;

    /// Sets general purpose registers.
    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), HvError>;

    /// Segment, control and descriptor table registers.
    fn sregs(&self) -> Result<kvm_sregs, HvError>;

    /// Sets segment, control and descriptor table registers.
    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), HvError>;

    /// Sets the x87 and SSE state.
    fn set_fpu(&mut self, fpu: &kvm_fpu) -> Result<(), HvError>;

    /// Registers of the local APIC.
    fn lapic(&self) -> Result<kvm_lapic_state, HvError>;

    /// Sets the registers of the local APIC.
    fn set_lapic(&mut self, lapic: &kvm_lapic_state) -> Result<(), HvError>;

    /// Whether [`Self::save`] would have everything that is under way in the guest. If not, it is to run on for a moment.
    fn is_whole(&self) -> Result<bool, HvError>;

    /// Everything but clocks, for a snapshot. Between two runs that a kick has ended, no access to a device is under way.
    fn save(&self) -> Result<VcpuState, HvError>;

    /// Takes over a saved state. It sets CPUID, too.
    fn restore(&mut self, saved: &VcpuState) -> Result<(), HvError>;

    /// Frequency of its time stamp counter, in kHz.
    fn tsc_khz(&self) -> Result<u32, HvError>;

    /// Its clock now.
    fn clock(&self) -> Result<VcpuClock, HvError>;

    /// Sets its clock, which goes on from there, and tells its guest that it had been stopped.
    fn set_clock(&mut self, clock: VcpuClock) -> Result<(), HvError>;

    /// Runs the guest until it needs something.
    fn run(&mut self) -> Result<Exit<'_>, HvError>;
}

/// Why a vCPU stopped running.
#[derive(Debug)]
pub enum Exit<'a> {
    /// Port input: fill `data`, which holds one or more items of `width` bytes (string instructions).
    IoIn {
        /// I/O port.
        port: u16,
        /// Bytes of one item: 1, 2 or 4.
        width: usize,
        /// To be filled.
        data: &'a mut [u8],
    },
    /// Port output, as for [`Exit::IoIn`].
    IoOut {
        /// I/O port.
        port: u16,
        /// Bytes of one item: 1, 2 or 4.
        width: usize,
        /// What the guest wrote.
        data: &'a [u8],
    },
    /// A read of an address that is not memory: fill `data`.
    MmioRead {
        /// Guest physical address.
        addr: u64,
        /// To be filled.
        data: &'a mut [u8],
    },
    /// A write to an address that is not memory.
    MmioWrite {
        /// Guest physical address.
        addr: u64,
        /// What the guest wrote.
        data: &'a [u8],
    },
    /// Triple fault.
    Shutdown,
    /// A kick or a signal.
    Interrupted,
    /// The guest cannot go on.
    Failed(VcpuFailure),
}

/// What made it impossible to go on with a vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuFailure {
    /// KVM_EXIT_INTERNAL_ERROR with KVM_INTERNAL_ERROR_EMULATION: KVM had to emulate an instruction and could not.
    Emulation {
        /// Guest virtual address of the instruction.
        rip: u64,
        /// Its bytes, as many as are known; the instruction may be shorter.
        bytes: Vec<u8>,
        /// Current privilege level, 0 to 3.
        cpl: u8,
        /// The code segment is a 64 bit one.
        long_mode: bool,
    },
    /// KVM_EXIT_INTERNAL_ERROR of another kind.
    Internal {
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
        /// Guest virtual address of the instruction.
        rip: u64,
    },
    /// KVM_EXIT_FAIL_ENTRY: the processor refused to enter the guest.
    Entry {
        /// The processor's reason.
        reason: u64,
    },
    /// An exit that nothing here asks for.
    Unexpected {
        /// Its number or name.
        exit: String,
    },
}

/// A failed call of the hypervisor.
#[derive(Debug, thiserror::Error)]
pub enum HvError {
    /// There is no `/dev/kvm`.
    #[error(
        "cannot open /dev/kvm: no such device; load the module kvm_intel or kvm_amd, or enable virtualisation \
         in the firmware (or nested virtualisation, when this host is itself a virtual machine)"
    )]
    NoKvm,
    /// `/dev/kvm` may not be opened.
    #[error(
        "cannot open /dev/kvm: permission denied; add your user to the group kvm (usermod -aG kvm USER) and log in again"
    )]
    Permission,
    /// `/dev/kvm` speaks another version.
    #[error(
        "/dev/kvm speaks API version {found}, and version 12 is needed; use a Linux kernel of this century"
    )]
    ApiVersion {
        /// Version that KVM_GET_API_VERSION returned.
        found: i32,
    },
    /// KVM lacks something.
    #[error("this host's KVM lacks {capability}, which every guest needs; use Linux 4.14 or newer")]
    Capability {
        /// Name of the KVM_CAP_*.
        capability: &'static str,
    },
    /// KVM_RUN ran out of memory on its first call: a known bug of host kernels before 6.12.
    #[error("{call} failed: out of memory; free memory on the host, or give the guest less")]
    OutOfMemory {
        /// The call that failed.
        call: &'static str,
    },
    /// A model specific register of a snapshot cannot be set.
    #[error(
        "this host's KVM does not take the snapshot's value {data:#x} of MSR {index:#x}; restore it on a host with the same \
         processor and kernel"
    )]
    Msr {
        /// Its index.
        index: u32,
        /// Its value.
        data: u64,
    },
    /// The time stamp counter cannot run as fast as it did.
    #[error(
        "the snapshot's time stamp counter runs with {saved} kHz, this host's with {found}, and this processor cannot scale \
         it; restore it on a host with the same processor"
    )]
    Frequency {
        /// In the snapshot, in kHz.
        saved: u32,
        /// On this host, in kHz.
        found: u32,
    },
    /// Another call failed.
    #[error("{call} failed: {source}")]
    Call {
        /// Name of the call in the KVM API.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl HvError {
    /// Wraps the error of the KVM call named `call`.
    pub(crate) fn call(call: &'static str, errno: i32) -> Self {
        match errno {
            libc::ENOMEM => Self::OutOfMemory { call },
            errno => Self::Call { call, source: io::Error::from_raw_os_error(errno) },
        }
    }
}
