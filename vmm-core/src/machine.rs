//! A built machine: what the control thread owns, and what its devices report.

use std::fmt;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant, SystemTime};

use devices::legacy::boot::{BootPort, Note};
use devices::legacy::i8042::I8042;
use devices::model::{IrqLine, MachineEvent, MachineEvents};
use devices::snapshot::{Saved, Snapshot, SnapshotError, State};
use serde::{Deserialize, Serialize};
use tracing::Span;
use vm_memory::{Bytes, GuestAddress};

use crate::console::{ConsoleInput, OutputControl};
use crate::control::Message;
use crate::event::{Journal, What};
use crate::exits::ExitLog;
use crate::hypervisor::saved::{ClockState, VcpuClock};
use crate::hypervisor::{HvError, HvVm, Vcpu};
use crate::memory::{FaultsError, GuestRam};
use crate::runner::{Runner, RunnerError, UnitHandle};
use crate::snapshot::memory_file::Pages;
use crate::snapshot::state_file::{SectionError, Sections};
use crate::snapshot::{Base, ClockMode, GenerationId};
use crate::spans;
use crate::uffd::Faults;
use crate::vcpu::{Buses, VcpuEnd, VcpuThread, Watch};
use crate::vm::VmError;
use crate::x86_64::layout;

/// A point in a machine's life whose time is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Milestone {
    /// The program began that runs the machine, if it told when: [`crate::VmBuilder::process_start`].
    ProcessStarted,
    /// [`crate::VmBuilder::build`] was called.
    BuildBegan,
    /// Guest memory is mapped.
    MemoryReady,
    /// Kernel and initrd are in guest memory.
    KernelLoaded,
    /// The kernel-side VM exists and has its memory.
    VmCreated,
    /// vCPU threads are about to run.
    Started,
    /// The first vCPU made its first exit.
    FirstExit,
    /// The first byte of output came, on the serial port or a console device: a kernel that is not told to be quiet greets.
    ConsoleOutput,
    /// The guest's init said that it runs.
    UserSpaceReached,
}

impl Milestone {
    /// All of them, in the order in which they are reached; a kernel that is told to be quiet prints late, or never.
    pub const ALL: [Self; 9] = [
        Self::ProcessStarted,
        Self::BuildBegan,
        Self::MemoryReady,
        Self::KernelLoaded,
        Self::VmCreated,
        Self::Started,
        Self::FirstExit,
        Self::ConsoleOutput,
        Self::UserSpaceReached,
    ];

    /// A name that stays, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::ProcessStarted => "process_started",
            Self::BuildBegan => "build_began",
            Self::MemoryReady => "memory_ready",
            Self::KernelLoaded => "kernel_loaded",
            Self::VmCreated => "vm_created",
            Self::Started => "started",
            Self::FirstExit => "first_exit",
            Self::ConsoleOutput => "console_output",
            Self::UserSpaceReached => "user_space_reached",
        }
    }
}

impl fmt::Display for Milestone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ProcessStarted => "process started",
            Self::BuildBegan => "build began",
            Self::MemoryReady => "memory ready",
            Self::KernelLoaded => "kernel loaded",
            Self::VmCreated => "VM created",
            Self::Started => "vCPUs started",
            Self::FirstExit => "first exit",
            Self::ConsoleOutput => "first byte on the console",
            Self::UserSpaceReached => "user space reached",
        })
    }
}

/// When each [`Milestone`] was first reached.
///
/// ```no_run
/// use vmm_core::Milestone;
///
/// # fn tell(vm: &vmm_core::Vm) {
/// for milestone in Milestone::ALL {
///     if let Some(time) = vm.milestones().get(milestone) {
///         println!("{:>10} us  {milestone}", time.as_micros());
///     }
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct Milestones {
    start: Instant,
    /// Microseconds since the start; `u64::MAX` as long as it is not reached.
    micros: [AtomicU64; Milestone::ALL.len()],
}

impl Milestones {
    pub(crate) fn since(start: Instant) -> Self {
        Self { start, micros: std::array::from_fn(|_| AtomicU64::new(u64::MAX)) }
    }

    /// Keeps the time of `milestone`; returns whether it is the first time, which is the only one that counts.
    pub(crate) fn reach(&self, milestone: Milestone, at: Duration) -> bool {
        let now = at.as_micros() as u64;
        let slot = &self.micros[milestone as usize];
        slot.compare_exchange(u64::MAX, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// From where [`Self::get`] counts: when the process started, if that was told, else when the build began.
    pub fn start(&self) -> Instant {
        self.start
    }

    /// Time from [`Self::start`] to `milestone`; `None` if it is not reached.
    pub fn get(&self, milestone: Milestone) -> Option<Duration> {
        match self.micros[milestone as usize].load(Ordering::Relaxed) {
            u64::MAX => None,
            micros => Some(Duration::from_micros(micros)),
        }
    }
}

/// What a machine has taken of the host.
///
/// ```no_run
/// # fn tell(vm: &vmm_core::Vm) -> Result<(), vmm_core::VmError> {
/// let usage = vm.usage()?;
/// println!("{:?} of CPU time, {} MiB resident", usage.vcpus, usage.memory >> 20);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// CPU time of each vCPU's thread, in the guest and for it.
    pub vcpus: Vec<Duration>,
    /// CPU time of the devices' event loops. Helper threads of devices are not in it.
    pub devices: Duration,
    /// Bytes of the guest's RAM that are in the host's memory.
    pub memory: u64,
}

/// Takes what devices report about the whole machine to its control thread. At most one message is under way,
/// however often a guest pokes a register.
pub(crate) struct Inbox {
    pending: AtomicU32,
    exit_status: AtomicU32,
    control: Sender<Message>,
    journal: Arc<Journal>,
}

const RESET: u32 = 1;
const POWER_OFF: u32 = 2;
const PANICKED: u32 = 4;
const LAST_WORDS: u32 = 8;
/// No exit status was reported.
const NO_STATUS: u32 = u32::MAX;

/// How long it takes at most to read or set all clocks when nobody comes in between.
const UNDISTURBED: Duration = Duration::from_millis(1);
/// How often that is tried.
const TRIES: u32 = 8;

/// What has been reported since the control thread last looked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reported {
    pub reset: bool,
    pub power_off: bool,
    pub panicked: bool,
    pub last_words: bool,
}

impl Inbox {
    pub fn new(control: Sender<Message>, journal: Arc<Journal>) -> Self {
        Self { pending: AtomicU32::new(0), exit_status: AtomicU32::new(NO_STATUS), control, journal }
    }

    pub fn take(&self) -> Reported {
        let bits = self.pending.swap(0, Ordering::AcqRel);
        Reported {
            reset: bits & RESET != 0,
            power_off: bits & POWER_OFF != 0,
            panicked: bits & PANICKED != 0,
            last_words: bits & LAST_WORDS != 0,
        }
    }

    /// Takes over what was reported before a snapshot.
    pub fn restore(&self, exit_status: Option<u8>) {
        self.exit_status.store(exit_status.map_or(NO_STATUS, u32::from), Ordering::Release);
    }

    /// Exit status of the guest's command, if its init reported one.
    pub fn exit_status(&self) -> Option<u8> {
        u8::try_from(self.exit_status.load(Ordering::Acquire)).ok()
    }
}

impl MachineEvents for Inbox {
    fn raise(&self, event: MachineEvent) {
        let bit = match event {
            MachineEvent::Reset => RESET,
            MachineEvent::PowerOff => POWER_OFF,
            MachineEvent::Panicked => PANICKED,
            MachineEvent::LastWords => LAST_WORDS,
            MachineEvent::ConsoleOutput => return self.journal.reach(Milestone::ConsoleOutput),
            MachineEvent::UserSpaceReached => return self.journal.reach(Milestone::UserSpaceReached),
            MachineEvent::ExitStatus(status) => {
                // However often a guest reports one, it is one event.
                if self.exit_status.swap(status.into(), Ordering::AcqRel) == NO_STATUS {
                    self.journal.record(What::ExitStatus(status));
                }
                return;
            }
        };
        if self.pending.fetch_or(bit, Ordering::AcqRel) == 0 {
            // It fails only when the machine is being taken down.
            _ = self.control.send(Message::Reported);
        }
    }
}

/// What a snapshot keeps of a machine as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MachineState {
    /// It has an i8254.
    pub pit: bool,
    pub pci: PciAccess,
    /// What the guest's init has reported.
    pub exit_status: Option<u8>,
}

impl State for MachineState {
    const VERSION: u16 = 1;
}

/// Which ways to the PCI bus a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PciAccess {
    /// Configuration mechanism #1.
    pub ports: bool,
    /// ECAM.
    pub memory: bool,
}

/// Which pages of a machine differ from its last snapshot.
pub(crate) struct Tracking {
    /// The last snapshot.
    pub base: Option<Base>,
    /// Pages that were taken from the logs and are in no snapshot yet.
    pub pending: Pages,
}

/// What becomes of a restored machine when it goes on.
pub(crate) struct Asleep {
    /// The clocks of the snapshot.
    pub clock: ClockState,
    pub generation: GenerationId,
    /// The guest takes the interrupt for a new one. A guest early in its boot has nothing yet that would, and dies of an
    /// interrupt that it does not expect.
    pub hears_generation: bool,
    pub note: Note,
}

/// Everything that a machine consists of. Dropping it ends its threads, vCPUs first.
pub(crate) struct Machine {
    /// vCPUs that have not started, or not since their machine was restored.
    pub idle: Vec<Box<dyn Vcpu>>,
    pub running: Vec<VcpuThread>,
    /// Devices by name, in the order of the configuration.
    pub units: Vec<(String, Arc<UnitHandle>)>,
    /// The shared one, if any device is on it, and one for each device that has its own.
    pub runners: Vec<Runner>,
    pub buses: Arc<Buses>,
    pub power_button: Arc<dyn IrqLine>,
    pub keyboard: Arc<I8042>,
    pub console_input: ConsoleInput,
    pub console_output: OutputControl,
    pub journal: Arc<Journal>,
    /// One a vCPU.
    pub exits: Vec<Arc<ExitLog>>,
    pub ram: GuestRam,
    pub control: Sender<Message>,
    pub span: Span,
    pub vm: Arc<dyn HvVm>,
    /// What has a state of its own besides vCPUs and their hypervisor, by the names of sections.
    pub parts: Vec<(String, Arc<dyn Snapshot>)>,
    pub pit: bool,
    pub pci: PciAccess,
    pub boot_port: Arc<BootPort>,
    /// Tells the guest's kernel of a new generation id.
    pub generation_changed: Arc<dyn IrqLine>,
    /// Of a machine that comes from a snapshot, until it goes on.
    pub asleep: Option<Asleep>,
    /// How much of the time that it slept passes for a restored guest.
    pub clock_mode: ClockMode,
    pub tracking: Option<Tracking>,
}

impl Machine {
    /// Lets all vCPUs run for the first time.
    pub fn start(&mut self) -> Result<(), HvError> {
        self.journal.reach(Milestone::Started);
        for (id, vcpu) in std::mem::take(&mut self.idle).into_iter().enumerate() {
            let (id, control) = (id as u8, self.control.clone());
            let on_end = move |end: VcpuEnd| {
                // It fails only when the machine is being taken down.
                _ = control.send(Message::VcpuEnded(id, end));
            };
            let watch = Watch {
                journal: self.journal.clone(),
                exits: self.exits[usize::from(id)].clone(),
                span: spans::thread(&self.span, &format!("vcpu{id}")),
            };
            self.running.push(VcpuThread::start(id, vcpu, self.buses.clone(), watch, on_end)?);
        }
        Ok(())
    }

    /// Lets a machine that comes from a snapshot go on for the first time.
    fn wake(&mut self) -> Result<(), HvError> {
        let Some(Asleep { clock, generation, hears_generation, note }) = self.asleep.take() else {
            return Ok(());
        };
        if let Some(faults) = self.ram.faults() {
            faults.guest_runs();
        }
        together(|| {
            let slept = match self.clock_mode {
                ClockMode::Advance => now().saturating_sub(clock.realtime),
                ClockMode::Freeze => 0,
            };
            self.vm.set_clock(clock.kvmclock.saturating_add(slept))?;
            // Offsets of the first vCPU, as saved and as it is now.
            let mut first = None;
            for (vcpu, saved) in self.idle.iter_mut().zip(&clock.vcpus) {
                let ticks = u128::from(slept) * u128::from(vcpu.tsc_khz()?) / 1_000_000;
                // The others are as far from the first as they were.
                let apart = |(was, now): (u64, u64)| Some(saved.offset?.wrapping_sub(was).wrapping_add(now));
                let (tsc, offset) = (saved.tsc.wrapping_add(ticks as u64), first.and_then(apart));
                vcpu.set_clock(VcpuClock { tsc, deadline: saved.deadline, offset })?;
                first = first.or(saved.offset.zip(vcpu.clock()?.offset));
            }
            Ok(())
        })?;
        self.tell_clone(&generation, hears_generation, note);
        Ok(())
    }

    /// Tells the guest that it is not the one that was saved: its kernel by the generation id, and our own init by the power
    /// button, which that knows to be none. The interrupts are the first that the vCPUs take.
    fn tell_clone(&self, generation: &GenerationId, hears_generation: bool, note: Note) {
        // Every machine has RAM there.
        _ = self.ram.memory().write_slice(generation, GuestAddress(layout::GENERATION_ID));
        // Its driver reads the id when it starts, too.
        if hears_generation {
            self.generation_changed.trigger();
        }
        if self.boot_port.go_on(note) {
            self.power_button.trigger();
        }
    }

    /// Asks the guest to switch itself off: by the power button, or by its keyboard if it has a driver for that, which are
    /// guests without ACPI, and so without a power button.
    pub fn press_power_button(&self) {
        self.boot_port.press();
        self.power_button.trigger();
        self.keyboard.press_ctrl_alt_del();
    }

    /// The state of all parts. The machine is paused.
    pub fn save(&self, exit_status: Option<u8>) -> Result<Sections, SectionError> {
        let mut sections = Sections::default();
        let mut add = |name: String, saved: Result<Saved, SnapshotError>| {
            saved.map_err(SectionError::of(&name)).map(|saved| sections.push(name, saved))
        };
        // First, so that it is nearest to the moment when the machine stood still.
        add("clock".into(), self.clock().map_err(host).and_then(|clock| Saved::of(&clock)))?;
        let machine = MachineState { pit: self.pit, pci: self.pci, exit_status };
        add("machine".into(), Saved::of(&machine))?;
        for (i, vcpu) in self.each_vcpu(|vcpu| vcpu.save()).into_iter().enumerate() {
            add(
                format!("vcpu{i}"),
                vcpu.and_then(|vcpu| vcpu).map_err(host).and_then(|vcpu| Saved::of(&vcpu)),
            )?;
        }
        let irqchip = self.vm.save_irqchip(self.pit);
        add("irqchip".into(), irqchip.map_err(host).and_then(|irqchip| Saved::of(&irqchip)))?;
        self.parts.iter().try_for_each(|(name, part)| add(name.clone(), part.save()))?;
        Ok(sections)
    }

    fn clock(&self) -> Result<ClockState, HvError> {
        if let Some(Asleep { clock, .. }) = &self.asleep {
            return Ok(clock.clone());
        }
        together(|| {
            let vcpus =
                self.each_vcpu(|vcpu| vcpu.clock()).into_iter().map(|clock| clock.and_then(|clock| clock));
            Ok(ClockState {
                realtime: now(),
                kvmclock: self.vm.clock()?,
                vcpus: vcpus.collect::<Result<_, _>>()?,
            })
        })
    }

    /// Looks at every vCPU, whether or not it has run.
    fn each_vcpu<T>(&self, look: impl Fn(&dyn Vcpu) -> T) -> Vec<Result<T, HvError>> {
        let ended = || HvError::Call { call: "the vCPU's thread", source: ErrorKind::BrokenPipe.into() };
        let idle = self.idle.iter().map(|vcpu| Ok(look(&**vcpu)));
        let parked = self.running.iter().map(|vcpu| vcpu.with_parked(&look).ok_or_else(ended));
        idle.chain(parked).collect()
    }

    /// Begins to log what is written, unless that is done all the time.
    pub fn begin_log(&mut self) -> Result<(), HvError> {
        if self.tracking.is_none() {
            self.vm.log_dirty_pages(true)?;
            // What the VMM wrote before.
            self.ram.take_dirty_pages(&mut Pages::none(self.ram.size()));
        }
        Ok(())
    }

    /// Ends what [`Self::begin_log`] began.
    pub fn end_log(&self) -> Result<(), HvError> {
        match self.tracking {
            Some(_) => Ok(()),
            None => self.vm.log_dirty_pages(false),
        }
    }

    /// Takes what was written since the last call from the logs. It is in [`Tracking::pending`], too.
    pub fn take_dirty_pages(&mut self) -> Result<Pages, HvError> {
        let mut pages = Pages::none(self.ram.size());
        self.ram.take_dirty_pages(&mut pages);
        let mut start = 0;
        let logs = self.ram.regions().zip(0..).try_for_each(|(region, slot)| {
            pages.add_bits(start, self.vm.take_dirty_pages(slot, region.len)?);
            start += region.len;
            Ok(())
        });
        // Also what was taken before an error: it is in no log any more.
        if let Some(tracking) = &mut self.tracking {
            tracking.pending.add_all(&pages);
        }
        logs.map(|()| pages)
    }

    /// Brings vCPUs, then devices, to a standstill.
    pub fn pause(&self) -> Result<(), RunnerError> {
        self.console_output.set_open(true);
        self.running.iter().for_each(VcpuThread::pause);
        self.running.iter().for_each(VcpuThread::wait_parked);
        self.units.iter().try_for_each(|(_, unit)| unit.set_paused(true))
    }

    /// What the machine has taken of the host so far.
    pub fn usage(&self) -> Usage {
        Usage {
            vcpus: self.running.iter().map(VcpuThread::cpu_time).collect(),
            devices: self.runners.iter().map(Runner::cpu_time).sum(),
            memory: self.ram.resident(),
        }
    }

    /// Fails if memory is lost, in whose place there may be zeroes.
    pub fn check_memory(&self) -> Result<(), FaultsError> {
        self.ram.faults().map_or(Ok(()), Faults::check)
    }

    /// Lets devices, then vCPUs, go on.
    pub fn resume(&mut self) -> Result<(), VmError> {
        self.wake()?;
        // Before anything runs on zeroes.
        self.check_memory()?;
        self.console_output.set_open(false);
        self.units.iter().try_for_each(|(_, unit)| unit.set_paused(false))?;
        match self.idle.is_empty() {
            true => self.running.iter().for_each(VcpuThread::resume),
            false => self.start()?,
        }
        Ok(())
    }
}

/// Reads or sets several clocks, again and again until nobody came in between: on a busy host, each of these calls may take
/// as long as another program's turn, by which the clocks would be apart.
fn together<T>(mut work: impl FnMut() -> Result<T, HvError>) -> Result<T, HvError> {
    for _ in 1..TRIES {
        let began = Instant::now();
        let done = work()?;
        if began.elapsed() < UNDISTURBED {
            return Ok(done);
        }
    }
    work()
}

/// Nanoseconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// What the hypervisor said, as an error of a snapshot.
fn host(error: HvError) -> SnapshotError {
    SnapshotError::Host { call: "KVM", reason: error.to_string() }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // A vCPU may wait for room in the console's buffer.
        self.console_output.close();
        self.console_input.close();
        self.running.iter().for_each(VcpuThread::stop);
        // They may wait for memory that does not come, and then get zeroes, with which devices should do little.
        let faults = self.ram.faults();
        if faults.is_some_and(Faults::is_lost) {
            self.runners.iter().for_each(Runner::stop);
        }
        let all_ended = faults.and_then(Faults::end);
        self.running.clear();
        self.units.clear();
        self.runners.clear();
        drop(all_ended);
        if let Some(faults) = faults {
            faults.finish();
        }
    }
}
