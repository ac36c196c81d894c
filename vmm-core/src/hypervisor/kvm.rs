//! KVM behind the traits of [`crate::hypervisor`].
#![allow(
    unsafe_code,
    reason = "KVM's memory slots and run structure take raw pointers, and so do signal masks"
)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};

use devices::model::{IrqLine, MsiSender};
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_INTERNAL_ERROR_EMULATION, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_fpu, kvm_irqchip, kvm_lapic_state, kvm_msi,
    kvm_msr_entry, kvm_pit_config, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use rustix::io_uring::{IoringRegisterOp, io_uring_params, io_uring_register, io_uring_setup};
use tracing::debug;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::saved::{IrqchipState, VcpuClock, VcpuState};
use super::tsc;
use super::{Exit, HvError, HvVm, Hypervisor, Kick, Vcpu, VcpuFailure};
use crate::memory::GuestRam;
use crate::x86_64::layout;

/// Every KVM capability that a machine uses, with the name that the KVM API gives it.
pub const CAPABILITIES: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_NO_LENGTH"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
];

/// What `/dev/kvm` says of itself, whether or not a machine can be built on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// KVM_GET_API_VERSION; [`API_VERSION`] is the one that a machine needs.
    pub api_version: i32,
    /// The names of [`CAPABILITIES`], and whether they are there.
    pub capabilities: Vec<(&'static str, bool)>,
    /// Most vCPUs of one machine (KVM_CAP_MAX_VCPUS).
    pub max_vcpus: usize,
}

/// The version of the KVM API that a machine needs.
pub const API_VERSION: i32 = KVM_API_VERSION as i32;

impl Host {
    /// Asks `/dev/kvm`.
    pub fn ask() -> Result<Self, HvError> {
        let kvm = open()?;
        let capabilities = CAPABILITIES.iter().map(|&(cap, name)| (name, kvm.check_extension(cap))).collect();
        Ok(Self { api_version: kvm.get_api_version(), capabilities, max_vcpus: kvm.get_max_vcpus() })
    }
}

fn open() -> Result<Kvm, HvError> {
    Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => HvError::NoKvm,
        libc::EACCES | libc::EPERM => HvError::Permission,
        errno => HvError::call("open of /dev/kvm", errno),
    })
}

fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> HvError {
    move |error| HvError::call(call, error.errno())
}

/// `/dev/kvm`.
pub struct KvmHypervisor {
    kvm: Arc<Kvm>,
}

impl KvmHypervisor {
    /// Opens `/dev/kvm` and checks that it has what a machine needs.
    pub fn open() -> Result<Self, HvError> {
        let kvm = open()?;
        let found = kvm.get_api_version();
        if found != API_VERSION {
            return Err(HvError::ApiVersion { found });
        }
        match CAPABILITIES.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            Some((_, capability)) => Err(HvError::Capability { capability }),
            None => Ok(Self { kvm: Arc::new(kvm) }),
        }
    }
}

impl Hypervisor for KvmHypervisor {
    fn create_vm(&self) -> Result<Arc<dyn HvVm>, HvError> {
        // KVM_CREATE_VM is interrupted by signals that arrive in the middle of it.
        loop {
            match self.kvm.create_vm() {
                Ok(fd) => {
                    return Ok(Arc::new(KvmVm { fd, kvm: self.kvm.clone(), ram: Arc::default() }));
                }
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(failed("KVM_CREATE_VM")(error)),
            }
        }
    }

    fn supported_cpuid(&self) -> Result<CpuId, HvError> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))
    }
}

struct KvmVm {
    fd: VmFd,
    kvm: Arc<Kvm>,
    /// Keeps the guest's memory mapped as long as this VM or one of its vCPUs lives.
    ram: Arc<OnceLock<GuestRam>>,
}

impl Drop for KvmVm {
    /// Lets a worker of the kernel's destroy the VM. Closing the last descriptor does it in place, and waits 10
    /// to 25 ms for RCU's grace periods: time in which a process that is otherwise finished cannot end. Files
    /// that are registered with a ring are released by the kernel's own thread.
    fn drop(&mut self) {
        // Where io_uring is switched off, the last close destroys the VM, and all that is lost is time.
        if let Err(error) = hand_to_kernel(&self.fd) {
            debug!(%error, "the VM is destroyed in place");
        }
    }
}

/// Leaves the last reference to `file` to a worker of the kernel's, once the caller has closed its own.
fn hand_to_kernel(file: &VmFd) -> io::Result<()> {
    let mut params = io_uring_params::default();
    // SAFETY: `params` is valid and asks for nothing; the ring is never mapped and no entry is submitted.
    let ring = unsafe { io_uring_setup(1, &mut params) }?;
    let files = [file.as_raw_fd()];
    // SAFETY: the argument is an array of `files.len()` open descriptors, as this operation wants it.
    unsafe {
        io_uring_register(&ring, IoringRegisterOp::RegisterFiles, files.as_ptr().cast(), files.len() as u32)
    }?;
    Ok(())
}

/// An eventfd that KVM turns into an interrupt.
struct Irqfd(EventFd);

impl IrqLine for Irqfd {
    fn trigger(&self) {
        // It can only fail when the counter is full, and then the interrupt is pending anyway.
        _ = self.0.write(1);
    }
}

impl MsiSender for KvmVm {
    fn send(&self, address: u64, data: u32) {
        let (address_lo, address_hi) = (address as u32, (address >> 32) as u32);
        // KVM refuses a message that says nothing to any vCPU, which is what the guest gets for it.
        _ = self.fd.signal_msi(kvm_msi { address_lo, address_hi, data, ..Default::default() });
    }
}

impl HvVm for KvmVm {
    fn map_memory(&self, ram: &GuestRam) -> Result<(), HvError> {
        if self.ram.set(ram.clone()).is_err() {
            return Err(HvError::call("KVM_SET_USER_MEMORY_REGION", libc::EEXIST));
        }
        self.set_slots(ram, 0)
    }

    fn create_irqchip(&self, pit: bool) -> Result<(), HvError> {
        self.fd.set_tss_address(layout::KVM_TSS as usize).map_err(failed("KVM_SET_TSS_ADDR"))?;
        self.fd.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        if pit {
            // A speaker port that answers, so that kernels which calibrate with it get a result.
            let config = kvm_pit_config { flags: kvm_bindings::KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            self.fd.create_pit2(config).map_err(failed("KVM_CREATE_PIT2"))?;
        }
        Ok(())
    }

    fn create_vcpu(&self, id: u8) -> Result<Box<dyn Vcpu>, HvError> {
        let fd = self.fd.create_vcpu(id.into()).map_err(failed("KVM_CREATE_VCPU"))?;
        Ok(Box::new(KvmVcpu { fd, kvm: self.kvm.clone(), cpuid: Vec::new(), ram: self.ram.clone() }))
    }

    fn irq_line(&self, gsi: u32) -> Result<Arc<dyn IrqLine>, HvError> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|source| HvError::Call { call: "eventfd", source })?;
        self.fd.register_irqfd(&event, gsi).map_err(failed("KVM_IRQFD"))?;
        Ok(Arc::new(Irqfd(event)))
    }

    fn msi_sender(self: Arc<Self>) -> Arc<dyn MsiSender> {
        self
    }

    fn signal_on_write(&self, addr: u64, value: Option<u32>, event: &EventFd) -> Result<(), HvError> {
        let addr = IoEventAddress::Mmio(addr);
        match value {
            Some(value) => self.fd.register_ioevent(event, &addr, value),
            None => self.fd.register_ioevent(event, &addr, NoDatamatch),
        }
        .map_err(failed("KVM_IOEVENTFD"))
    }

    fn save_irqchip(&self, pit: bool) -> Result<IrqchipState, HvError> {
        let chips = IRQCHIPS.map(|chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).map_err(failed("KVM_GET_IRQCHIP")).map(|()| chip)
        });
        let pit = pit.then(|| self.fd.get_pit2().map_err(failed("KVM_GET_PIT2"))).transpose()?;
        Ok(IrqchipState { chips: chips.into_iter().collect::<Result<_, _>>()?, pit })
    }

    fn restore_irqchip(&self, saved: &IrqchipState) -> Result<(), HvError> {
        if !saved.chips.iter().map(|chip| chip.chip_id).eq(IRQCHIPS) {
            return Err(HvError::call("KVM_SET_IRQCHIP", libc::EINVAL));
        }
        saved
            .chips
            .iter()
            .try_for_each(|chip| self.fd.set_irqchip(chip).map_err(failed("KVM_SET_IRQCHIP")))?;
        saved.pit.iter().try_for_each(|pit| self.fd.set_pit2(pit).map_err(failed("KVM_SET_PIT2")))
    }

    fn clock(&self) -> Result<u64, HvError> {
        Ok(self.fd.get_clock().map_err(failed("KVM_GET_CLOCK"))?.clock)
    }

    fn set_clock(&self, nanos: u64) -> Result<(), HvError> {
        let clock = kvm_clock_data { clock: nanos, ..Default::default() };
        self.fd.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))
    }

    fn log_dirty_pages(&self, on: bool) -> Result<(), HvError> {
        let ram = self.ram.get().ok_or_else(|| HvError::call("KVM_SET_USER_MEMORY_REGION", libc::EINVAL))?;
        self.set_slots(ram, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    fn take_dirty_pages(&self, slot: u32, len: u64) -> Result<Vec<u64>, HvError> {
        self.fd.get_dirty_log(slot, len as usize).map_err(failed("KVM_GET_DIRTY_LOG"))
    }
}

/// More model specific registers than any processor has to save: KVM lists some hundreds.
const MAX_MSRS: usize = 4096;

/// The interrupt controllers in the kernel.
const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl KvmVm {
    /// Sets all memory slots, with these flags besides their own.
    fn set_slots(&self, ram: &GuestRam, flags: u32) -> Result<(), HvError> {
        for (slot, region) in ram.slots().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: if region.read_only { KVM_MEM_READONLY } else { flags },
                guest_phys_addr: region.guest_addr,
                memory_size: region.len,
                userspace_addr: region.host_addr,
            };
            // SAFETY: the range is a mapping of `ram`'s, of which this VM and its vCPUs keep a clone.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }
}

struct KvmVcpu {
    fd: VcpuFd,
    kvm: Arc<Kvm>,
    /// As it was set. KVM_GET_CPUID2 has other bits in it, which the guest switched on, or which a KVM that cannot hide the
    /// host's processor shows.
    cpuid: Vec<kvm_cpuid_entry2>,
    ram: Arc<OnceLock<GuestRam>>,
}

// `struct kvm_signal_mask` with the kernel's 8 byte signal set behind it.
#[repr(C)]
struct SignalMask {
    len: u32,
    sigset: [u8; 8],
}

mod ioctls {
    #![allow(missing_docs, reason = "the macro makes a public function")]
    vmm_sys_util::ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, kvm_bindings::KVMIO, 0x8b, u32);
}

/// The signal that kicks vCPUs: blocked everywhere but inside KVM_RUN, so it needs no handler and a kick
/// between two runs is not lost.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

struct SignalKick {
    tid: libc::pid_t,
}

impl Kick for SignalKick {
    fn kick(&self) {
        // SAFETY: a plain system call. The thread may have ended, then the kernel finds none.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.tid, kick_signal()) };
    }
}

/// Blocks the kick signal in this thread and returns the mask that was in force without it.
fn block_kick_signal() -> io::Result<libc::sigset_t> {
    // SAFETY: `set` and `old` are plain data that the calls fill in; zeroes are a valid start.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, kick_signal());
        match libc::pthread_sigmask(libc::SIG_BLOCK, &set, &mut old) {
            0 => {
                libc::sigdelset(&mut old, kick_signal());
                Ok(old)
            }
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// Takes pending kicks off this thread's queue; a signal left there would end every later KVM_RUN at once.
fn swallow_kicks() {
    // SAFETY: as in `block_kick_signal`; the time-out is zero, so this does not wait.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, kick_signal());
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        while libc::sigtimedwait(&set, std::ptr::null_mut(), &zero) > 0 {}
    }
}

impl KvmVcpu {
    fn internal_error(&mut self) -> Result<VcpuFailure, HvError> {
        // SAFETY: exit_reason is KVM_EXIT_INTERNAL_ERROR, for which these members of the union are filled in;
        // both are plain integers.
        let (suberror, failure) = unsafe {
            let exit = &self.fd.get_kvm_run().__bindgen_anon_1;
            (exit.internal.suberror, exit.emulation_failure)
        };
        let (regs, sregs) = (self.regs()?, self.sregs()?);
        if suberror != KVM_INTERNAL_ERROR_EMULATION {
            return Ok(VcpuFailure::Internal { suberror, rip: regs.rip });
        }
        // SAFETY: the anonymous union has one view, plain integers.
        let (size, bytes) = unsafe {
            let insn = &failure.__bindgen_anon_1.__bindgen_anon_1;
            (usize::from(insn.insn_size), insn.insn_bytes)
        };
        let has_bytes = failure.ndata >= 1
            && failure.flags & u64::from(kvm_bindings::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)
                != 0;
        let bytes = if has_bytes { bytes[..size.min(bytes.len())].to_vec() } else { Vec::new() };
        let cpl = sregs.ss.dpl;
        Ok(VcpuFailure::Emulation { rip: regs.rip, bytes, cpl, long_mode: sregs.cs.l == 1 })
    }
}

/// Time stamp counter, and the local APIC timer's deadline on it (SDM vol. 4).
const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Memory type ranges (SDM vol. 3, 12.11), which KVM_GET_MSR_INDEX_LIST leaves out before Linux 6.8.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];

/// The vector of breakpoints, and the instruction that causes one (SDM vol. 3, 6.15).
const BREAKPOINT: u8 = 3;
const INT3: u8 = 0xcc;

/// Frequencies that differ by less than this many millionths are the same one, measured twice.
const TSC_TOLERANCE: u64 = 250;

impl KvmVcpu {
    /// The values of these registers, without those that this KVM does not have.
    fn msrs(&self, indices: &[u32]) -> Result<Vec<(u32, u64)>, HvError> {
        let mut values = Vec::new();
        let mut left = indices;
        while !left.is_empty() {
            let batch = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
            let entries: Vec<_> =
                batch.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
            let mut list =
                Msrs::from_entries(&entries).map_err(|_| HvError::call("KVM_GET_MSRS", libc::E2BIG))?;
            let read = self.fd.get_msrs(&mut list).map_err(failed("KVM_GET_MSRS"))?;
            values.extend(list.as_slice()[..read].iter().map(|entry| (entry.index, entry.data)));
            // It stops at the first that it does not have.
            left = &left[(read + usize::from(read < batch.len()))..];
        }
        Ok(values)
    }

    fn msr(&self, index: u32) -> Result<Option<u64>, HvError> {
        Ok(self.msrs(&[index])?.first().map(|&(_, value)| value))
    }

    fn saved_msrs(&self) -> Result<Vec<(u32, u64)>, HvError> {
        let listed = self.kvm.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        let mut indices = listed.as_slice().to_vec();
        indices.extend(MTRRS.into_iter().flatten());
        indices.retain(|index| ![MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE].contains(index));
        indices.sort_unstable();
        indices.dedup();
        self.msrs(&indices)
    }

    /// Sets registers. One that cannot be set is no error if it has its value already.
    fn restore_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<(), HvError> {
        if msrs.len() > MAX_MSRS {
            return Err(HvError::call("KVM_SET_MSRS", libc::E2BIG));
        }
        let mut left = msrs;
        while !left.is_empty() {
            let batch = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
            let entries: Vec<_> = batch
                .iter()
                .map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() })
                .collect();
            let list =
                Msrs::from_entries(&entries).map_err(|_| HvError::call("KVM_SET_MSRS", libc::E2BIG))?;
            let set = self.fd.set_msrs(&list).map_err(failed("KVM_SET_MSRS"))?;
            if let Some(&(index, data)) = batch.get(set)
                && self.msr(index)?.unwrap_or(0) != data
            {
                return Err(HvError::Msr { index, data });
            }
            left = &left[(set + usize::from(set < batch.len()))..];
        }
        Ok(())
    }

    /// Makes the time stamp counter run as fast as it did in the snapshot.
    fn set_frequency(&mut self, khz: u32) -> Result<(), HvError> {
        let now = self.tsc_khz()?;
        let difference = u64::from(now.abs_diff(khz)) * 1_000_000;
        // KVM takes 0 for its own.
        if khz == 0 {
            return Err(HvError::Frequency { saved: khz, found: now });
        }
        if difference > TSC_TOLERANCE * u64::from(khz) {
            self.fd.set_tsc_khz(khz).map_err(|_| HvError::Frequency { saved: khz, found: now })?;
        }
        Ok(())
    }
}

impl Vcpu for KvmVcpu {
    fn attach(&mut self) -> Result<Arc<dyn Kick>, HvError> {
        let mask = block_kick_signal().map_err(|source| HvError::Call { call: "pthread_sigmask", source })?;
        let mut sigset = [0; 8];
        // SAFETY: the kernel's signal set is the first 64 bits of glibc's.
        sigset.copy_from_slice(unsafe {
            std::slice::from_raw_parts(std::ptr::from_ref(&mask).cast::<u8>(), 8)
        });
        let mask = SignalMask { len: 8, sigset };
        // SAFETY: the ioctl reads `len` and then that many bytes, which `mask` has. It is declared with the
        // fixed part only, as in the KVM API.
        match unsafe { ioctl_with_ref(&self.fd, ioctls::KVM_SET_SIGNAL_MASK(), &mask) } {
            0 => {}
            _ => {
                let source = io::Error::last_os_error();
                return Err(HvError::Call { call: "KVM_SET_SIGNAL_MASK", source });
            }
        }
        // Not libc's: the standard library refers to that weakly, and with LTO a static program then has none.
        Ok(Arc::new(SignalKick { tid: rustix::thread::gettid().as_raw_pid() }))
    }

    fn set_cpuid(&mut self, cpuid: &CpuId) -> Result<(), HvError> {
        self.fd.set_cpuid2(cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        self.cpuid = cpuid.as_slice().to_vec();
        Ok(())
    }

    fn set_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<(), HvError> {
        let entries: Vec<_> =
            msrs.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let list = Msrs::from_entries(&entries).map_err(|_| HvError::call("KVM_SET_MSRS", libc::E2BIG))?;
        match self.fd.set_msrs(&list).map_err(failed("KVM_SET_MSRS"))? {
            n if n == entries.len() => Ok(()),
            _ => Err(HvError::call("KVM_SET_MSRS", libc::EINVAL)),
        }
    }

    fn regs(&self) -> Result<kvm_regs, HvError> {
        self.fd.get_regs().map_err(failed("KVM_GET_REGS"))
    }

    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), HvError> {
        self.fd.set_regs(regs).map_err(failed("KVM_SET_REGS"))
    }

    fn sregs(&self) -> Result<kvm_sregs, HvError> {
        self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))
    }

    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), HvError> {
        self.fd.set_sregs(sregs).map_err(failed("KVM_SET_SREGS"))
    }

    fn set_fpu(&mut self, fpu: &kvm_fpu) -> Result<(), HvError> {
        self.fd.set_fpu(fpu).map_err(failed("KVM_SET_FPU"))
    }

    fn lapic(&self) -> Result<kvm_lapic_state, HvError> {
        self.fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))
    }

    fn set_lapic(&mut self, lapic: &kvm_lapic_state) -> Result<(), HvError> {
        self.fd.set_lapic(lapic).map_err(failed("KVM_SET_LAPIC"))
    }

    /// KVM_GET_VCPU_EVENTS leaves out breakpoints, because a processor that has not delivered one is still in front of the
    /// INT3 and comes to it again. A KVM that does the processor's work itself (kvm-pvm) is behind it by then, and the
    /// breakpoint would be lost. Whether one is on its way, nothing tells, so this says no wherever one could be.
    fn is_whole(&self) -> Result<bool, HvError> {
        let events = self.fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        // The number stays when the last exception has been delivered.
        if events.exception.nr != BREAKPOINT {
            return Ok(true);
        }
        let before = self.regs()?.rip.wrapping_sub(1);
        let place = self.fd.translate_gva(before).map_err(failed("KVM_TRANSLATE"))?;
        let memory = self.ram.get().filter(|_| place.valid != 0).map(GuestRam::memory);
        let byte = memory.and_then(|memory| memory.read_obj(GuestAddress(place.physical_address)).ok());
        Ok(byte != Some(INT3))
    }

    fn save(&self) -> Result<VcpuState, HvError> {
        let fd = &self.fd;
        // First, since it changes what is read after it: the local APIC takes what has come for it, and an exception on
        // its way leaves its address in CR2, or its reason in DR6.
        let mp_state = fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        let events = fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        Ok(VcpuState {
            cpuid: self.cpuid.clone(),
            mp_state,
            regs: self.regs()?,
            sregs: self.sregs()?,
            xsave: fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?,
            xcrs: fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
            debug_regs: fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            lapic: self.lapic()?,
            msrs: self.saved_msrs()?,
            events,
            tsc_khz: self.tsc_khz()?,
        })
    }

    fn restore(&mut self, saved: &VcpuState) -> Result<(), HvError> {
        let cpuid =
            CpuId::from_entries(&saved.cpuid).map_err(|_| HvError::call("KVM_SET_CPUID2", libc::E2BIG))?;
        self.set_cpuid(&cpuid)?;
        self.set_frequency(saved.tsc_khz)?;
        self.fd.set_mp_state(saved.mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
        self.set_regs(&saved.regs)?;
        // It switches the local APIC on, and that takes its registers only then.
        self.set_sregs(&saved.sregs)?;
        // SAFETY: the kernel reads no more than the structure unless a process asked for larger features of the
        // processor (ARCH_REQ_XCOMP_GUEST_PERM), which this one does not.
        unsafe { self.fd.set_xsave(&saved.xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        self.fd.set_xcrs(&saved.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        self.fd.set_debug_regs(&saved.debug_regs).map_err(failed("KVM_SET_DEBUGREGS"))?;
        self.set_lapic(&saved.lapic)?;
        self.restore_msrs(&saved.msrs)?;
        self.fd.set_vcpu_events(&saved.events).map_err(failed("KVM_SET_VCPU_EVENTS"))
    }

    fn tsc_khz(&self) -> Result<u32, HvError> {
        self.fd.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))
    }

    fn clock(&self) -> Result<VcpuClock, HvError> {
        let value = |index| self.msr(index).map(Option::unwrap_or_default);
        let (tsc, deadline) = (value(MSR_IA32_TSC)?, value(MSR_IA32_TSC_DEADLINE)?);
        Ok(VcpuClock { tsc, deadline, offset: tsc::offset(&self.fd) })
    }

    fn set_clock(&mut self, clock: VcpuClock) -> Result<(), HvError> {
        match (clock.offset, tsc::offset(&self.fd)) {
            (Some(offset), _) => tsc::set_offset(&self.fd, offset)?,
            (None, Some(offset)) => {
                let now = self.msr(MSR_IA32_TSC)?.unwrap_or_default();
                tsc::set_offset(&self.fd, offset.wrapping_add(clock.tsc.wrapping_sub(now)))?;
            }
            (None, None) => self.set_msrs(&[(MSR_IA32_TSC, clock.tsc)])?,
        }
        // Where there is none, the timer may just have gone off, which no state tells: rather an interrupt too many, for
        // which a driver finds no reason, than one that never comes. Where its mode is another one, KVM ignores it.
        self.set_msrs(&[(MSR_IA32_TSC_DEADLINE, clock.deadline.max(1))])?;
        // A guest without kvm-clock has nobody to tell.
        _ = self.fd.kvmclock_ctrl();
        Ok(())
    }

    fn run(&mut self) -> Result<Exit<'_>, HvError> {
        let (input, port, data) = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => (true, port, std::ptr::from_mut(data)),
            Ok(VcpuExit::IoOut(port, data)) => (false, port, std::ptr::from_ref(data).cast_mut()),
            // SAFETY (of the four extensions below): `data` lies in the run structure, which lives as long as
            // `self`; the borrow checker cannot see that the other arms no longer hold it.
            Ok(VcpuExit::MmioRead(addr, data)) => {
                let data = std::ptr::from_mut(data);
                // SAFETY: see above.
                return Ok(Exit::MmioRead { addr, data: unsafe { &mut *data } });
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => {
                let data = std::ptr::from_ref(data);
                // SAFETY: see above.
                return Ok(Exit::MmioWrite { addr, data: unsafe { &*data } });
            }
            Ok(VcpuExit::Shutdown) => return Ok(Exit::Shutdown),
            Ok(VcpuExit::Intr) => return Ok(Exit::Interrupted),
            Ok(VcpuExit::InternalError) => return Ok(Exit::Failed(self.internal_error()?)),
            Ok(VcpuExit::FailEntry(reason, _)) => return Ok(Exit::Failed(VcpuFailure::Entry { reason })),
            Ok(other) => {
                return Ok(Exit::Failed(VcpuFailure::Unexpected { exit: format!("{other:?}") }));
            }
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {
                swallow_kicks();
                return Ok(Exit::Interrupted);
            }
            Err(error) => return Err(failed("KVM_RUN")(error)),
        };
        // SAFETY: exit_reason is KVM_EXIT_IO, for which this member of the union is filled in.
        let width = usize::from(unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size }).max(1);
        match input {
            // SAFETY: see above.
            true => Ok(Exit::IoIn { port, width, data: unsafe { &mut *data } }),
            // SAFETY: see above.
            false => Ok(Exit::IoOut { port, width, data: unsafe { &*data } }),
        }
    }
}
