//! A hypervisor without KVM: its guests are scripts. For tests of everything above the hypervisor.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use devices::model::{IrqLine, MsiSender};
use kvm_bindings::{CpuId, kvm_fpu, kvm_lapic_state, kvm_regs, kvm_sregs};
use vmm_sys_util::eventfd::EventFd;

use super::saved::{IrqchipState, VcpuClock, VcpuState};
use super::{Exit, HvError, HvVm, Hypervisor, Kick, Vcpu, VcpuFailure};
use crate::memory::GuestRam;

/// One thing that a scripted guest does.
#[derive(Clone, Debug)]
pub enum Step {
    /// Writes an item of these bytes to a port.
    Out(u16, Vec<u8>),
    /// Reads an item of so many bytes from a port; the answer goes to [`Observed::reads`].
    In(u16, usize),
    /// Writes to a physical address that is not RAM. A registered ioeventfd takes it, as in KVM.
    Write(u64, Vec<u8>),
    /// Reads so many bytes from such an address.
    Read(u64, usize),
    /// Writes to RAM.
    Poke(u64, Vec<u8>),
    /// Triple fault.
    TripleFault,
    /// A failure of the hypervisor's.
    Fail(VcpuFailure),
    /// Panics, as a bug in the VMM would.
    Panic,
}

/// What the machine did to its scripted guest.
#[derive(Debug, Default)]
pub struct Observed {
    /// Answers to the reads of the script, in order.
    pub reads: Vec<Vec<u8>>,
    /// Interrupts raised, in order.
    pub interrupts: Vec<u32>,
    /// Messages of message signalled interrupts, as address and data, in order.
    pub messages: Vec<(u64, u32)>,
    /// General purpose registers that the boot processor was given.
    pub boot_regs: Option<kvm_regs>,
    /// Number of vCPUs.
    pub vcpus: usize,
}

#[derive(Default)]
struct Shared {
    observed: Mutex<Observed>,
    ioeventfds: Mutex<Vec<(u64, Option<u32>, EventFd)>>,
    ram: Mutex<Option<GuestRam>>,
    steps_done: AtomicU64,
    /// How often a vCPU still has something under way when it is asked.
    unfinished: AtomicU32,
}

impl Shared {
    fn observed(&self) -> MutexGuard<'_, Observed> {
        self.observed.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A hypervisor whose boot processor plays a script and then sleeps until it is stopped; other processors only
/// sleep. Clones share what they observe.
#[derive(Clone, Default)]
pub struct FakeHypervisor {
    script: Vec<Step>,
    shared: Arc<Shared>,
}

impl FakeHypervisor {
    /// A hypervisor for guests that do `script`.
    pub fn new(script: Vec<Step>) -> Self {
        Self { script, shared: Arc::default() }
    }

    /// What the machine has done so far.
    pub fn observed<T>(&self, look: impl FnOnce(&Observed) -> T) -> T {
        look(&self.shared.observed())
    }

    /// A vCPU that is to stand still has something under way, so many times that it is asked.
    pub fn set_unfinished(&self, times: u32) {
        self.shared.unfinished.store(times, Ordering::Release);
    }

    /// How often it still will have.
    pub fn unfinished(&self) -> u32 {
        self.shared.unfinished.load(Ordering::Acquire)
    }

    /// How many steps of the script are done.
    pub fn steps_done(&self) -> u64 {
        self.shared.steps_done.load(Ordering::Acquire)
    }
}

impl Hypervisor for FakeHypervisor {
    fn create_vm(&self) -> Result<Arc<dyn HvVm>, HvError> {
        Ok(Arc::new(FakeVm { script: self.script.clone(), shared: self.shared.clone() }))
    }

    fn supported_cpuid(&self) -> Result<CpuId, HvError> {
        CpuId::new(0).map_err(|_| HvError::call("KVM_GET_SUPPORTED_CPUID", libc::ENOMEM))
    }
}

struct FakeVm {
    script: Vec<Step>,
    shared: Arc<Shared>,
}

struct FakeLine {
    gsi: u32,
    shared: Arc<Shared>,
}

impl IrqLine for FakeLine {
    fn trigger(&self) {
        self.shared.observed().interrupts.push(self.gsi);
    }
}

impl MsiSender for FakeVm {
    fn send(&self, address: u64, data: u32) {
        self.shared.observed().messages.push((address, data));
    }
}

impl HvVm for FakeVm {
    fn map_memory(&self, ram: &GuestRam) -> Result<(), HvError> {
        *self.shared.ram.lock().unwrap_or_else(|e| e.into_inner()) = Some(ram.clone());
        Ok(())
    }

    fn create_irqchip(&self, _pit: bool) -> Result<(), HvError> {
        Ok(())
    }

    fn create_vcpu(&self, id: u8) -> Result<Box<dyn Vcpu>, HvError> {
        self.shared.observed().vcpus += 1;
        let script = if id == 0 { self.script.clone().into() } else { VecDeque::new() };
        Ok(Box::new(FakeVcpu {
            script,
            shared: self.shared.clone(),
            kick: Arc::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            lapic: kvm_lapic_state::default(),
            data: Vec::new(),
            answer_due: false,
        }))
    }

    fn irq_line(&self, gsi: u32) -> Result<Arc<dyn IrqLine>, HvError> {
        Ok(Arc::new(FakeLine { gsi, shared: self.shared.clone() }))
    }

    fn msi_sender(self: Arc<Self>) -> Arc<dyn MsiSender> {
        self
    }

    fn signal_on_write(&self, addr: u64, value: Option<u32>, event: &EventFd) -> Result<(), HvError> {
        let event = event.try_clone().map_err(|source| HvError::Call { call: "dup", source })?;
        self.shared.ioeventfds.lock().unwrap_or_else(|e| e.into_inner()).push((addr, value, event));
        Ok(())
    }

    fn save_irqchip(&self, pit: bool) -> Result<IrqchipState, HvError> {
        Ok(IrqchipState { chips: vec![Default::default(); 3], pit: pit.then(Default::default) })
    }

    fn restore_irqchip(&self, _saved: &IrqchipState) -> Result<(), HvError> {
        Ok(())
    }

    fn clock(&self) -> Result<u64, HvError> {
        Ok(0)
    }

    fn set_clock(&self, _nanos: u64) -> Result<(), HvError> {
        Ok(())
    }

    fn log_dirty_pages(&self, _on: bool) -> Result<(), HvError> {
        Ok(())
    }

    fn take_dirty_pages(&self, _slot: u32, len: u64) -> Result<Vec<u64>, HvError> {
        // A script writes what it likes.
        Ok(vec![u64::MAX; (len / 4096).div_ceil(64) as usize])
    }
}

#[derive(Default)]
struct FakeKick {
    pending: AtomicBool,
    lock: Mutex<()>,
    changed: Condvar,
}

impl FakeKick {
    fn wait(&self) {
        let mut guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
        while !self.pending.swap(false, Ordering::AcqRel) {
            guard = self.changed.wait(guard).unwrap_or_else(|e| e.into_inner());
        }
    }
}

impl Kick for FakeKick {
    fn kick(&self) {
        let _guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
        self.pending.store(true, Ordering::Release);
        self.changed.notify_all();
    }
}

struct FakeVcpu {
    script: VecDeque<Step>,
    shared: Arc<Shared>,
    kick: Arc<FakeKick>,
    regs: kvm_regs,
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    /// Data of the exit under way.
    data: Vec<u8>,
    /// The exit under way is a read.
    answer_due: bool,
}

impl FakeVcpu {
    /// Whether an ioeventfd took the write.
    fn signalled(&self, addr: u64, data: &[u8]) -> bool {
        let events = self.shared.ioeventfds.lock().unwrap_or_else(|e| e.into_inner());
        let written = data.try_into().map(u32::from_le_bytes).ok();
        let hit = events.iter().find(|(a, v, _)| *a == addr && (v.is_none() || *v == written));
        hit.is_some_and(|(_, _, event)| event.write(1).is_ok())
    }
}

impl Vcpu for FakeVcpu {
    fn attach(&mut self) -> Result<Arc<dyn Kick>, HvError> {
        Ok(self.kick.clone())
    }

    fn set_cpuid(&mut self, _cpuid: &CpuId) -> Result<(), HvError> {
        Ok(())
    }

    fn set_msrs(&mut self, _msrs: &[(u32, u64)]) -> Result<(), HvError> {
        Ok(())
    }

    fn regs(&self) -> Result<kvm_regs, HvError> {
        Ok(self.regs)
    }

    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), HvError> {
        self.shared.observed().boot_regs = Some(*regs);
        self.regs = *regs;
        Ok(())
    }

    fn sregs(&self) -> Result<kvm_sregs, HvError> {
        Ok(self.sregs)
    }

    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), HvError> {
        self.sregs = *sregs;
        Ok(())
    }

    fn set_fpu(&mut self, _fpu: &kvm_fpu) -> Result<(), HvError> {
        Ok(())
    }

    fn lapic(&self) -> Result<kvm_lapic_state, HvError> {
        Ok(self.lapic)
    }

    fn set_lapic(&mut self, lapic: &kvm_lapic_state) -> Result<(), HvError> {
        self.lapic = *lapic;
        Ok(())
    }

    fn is_whole(&self) -> Result<bool, HvError> {
        let left = &self.shared.unfinished;
        Ok(left.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1)).is_err())
    }

    fn save(&self) -> Result<VcpuState, HvError> {
        Ok(VcpuState {
            cpuid: vec![Default::default()],
            mp_state: Default::default(),
            regs: self.regs,
            sregs: self.sregs,
            xsave: Default::default(),
            xcrs: Default::default(),
            debug_regs: Default::default(),
            lapic: self.lapic,
            msrs: vec![(0x10, 0)],
            events: Default::default(),
            tsc_khz: 1_000_000,
        })
    }

    fn restore(&mut self, saved: &VcpuState) -> Result<(), HvError> {
        (self.regs, self.sregs, self.lapic) = (saved.regs, saved.sregs, saved.lapic);
        Ok(())
    }

    fn tsc_khz(&self) -> Result<u32, HvError> {
        Ok(1_000_000)
    }

    fn clock(&self) -> Result<VcpuClock, HvError> {
        Ok(VcpuClock { tsc: 0, deadline: 0, offset: Some(0) })
    }

    fn set_clock(&mut self, _clock: VcpuClock) -> Result<(), HvError> {
        Ok(())
    }

    fn run(&mut self) -> Result<Exit<'_>, HvError> {
        loop {
            if std::mem::take(&mut self.answer_due) {
                self.shared.observed().reads.push(self.data.clone());
                self.shared.steps_done.fetch_add(1, Ordering::AcqRel);
            }
            if self.kick.pending.swap(false, Ordering::AcqRel) {
                return Ok(Exit::Interrupted);
            }
            let Some(step) = self.script.pop_front() else {
                self.kick.wait();
                return Ok(Exit::Interrupted);
            };
            if !matches!(step, Step::In(..) | Step::Read(..)) {
                self.shared.steps_done.fetch_add(1, Ordering::AcqRel);
            }
            match step {
                Step::Out(port, data) => {
                    self.data = data;
                    return Ok(Exit::IoOut { port, width: self.data.len(), data: &self.data });
                }
                Step::In(port, width) => {
                    (self.data, self.answer_due) = (vec![0; width], true);
                    return Ok(Exit::IoIn { port, width, data: &mut self.data });
                }
                Step::Write(addr, data) if self.signalled(addr, &data) => {}
                Step::Write(addr, data) => {
                    self.data = data;
                    return Ok(Exit::MmioWrite { addr, data: &self.data });
                }
                Step::Read(addr, width) => {
                    (self.data, self.answer_due) = (vec![0; width], true);
                    return Ok(Exit::MmioRead { addr, data: &mut self.data });
                }
                Step::Poke(addr, data) => {
                    let ram = self.shared.ram.lock().unwrap_or_else(|e| e.into_inner()).clone();
                    let mem = ram.expect("a machine maps its memory before it runs");
                    vm_memory::Bytes::write_slice(mem.memory(), &data, vm_memory::GuestAddress(addr))
                        .expect("a script pokes existing memory");
                }
                Step::TripleFault => return Ok(Exit::Shutdown),
                Step::Fail(failure) => return Ok(Exit::Failed(failure)),
                Step::Panic => panic!("the script says so"),
            }
        }
    }
}
