//! The handle to a virtual machine, and the control thread behind it that owns its state.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::model::{Counters, UpdateError};
use devices::registry::{DeviceConfig, Patch};

use crate::VmBuilder;
use crate::config::VmConfig;
use crate::console::{ConsoleInput, ConsoleReader};
use crate::diagnosis;
use crate::event::{Events, Journal, What};
use crate::exits::{ExitCount, ExitLog};
use crate::hypervisor::HvError;
use crate::machine::{Inbox, Machine, Milestones, Reported, Tracking, Usage};
use crate::runner::{RunnerError, UnitHandle, UpdateFailed};
use crate::snapshot::memory_file::{self, Which};
use crate::snapshot::{
    Base, Captured, Draft, MemoryTarget, Place, Snapshot, SnapshotFailed, SnapshotKind, SnapshotReport,
};
use crate::spans;
use crate::state::{IllegalTransition, StopReason, VmState};
use crate::vcpu::VcpuEnd;

/// A call on a [`Vm`] that failed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The machine's state does not allow it.
    #[error(transparent)]
    State(#[from] IllegalTransition),
    /// The hypervisor failed.
    #[error(transparent)]
    Hypervisor(#[from] HvError),
    /// The devices' event loop failed.
    #[error(transparent)]
    Runner(#[from] RunnerError),
    /// The machine has no device of this name.
    #[error("there is no device '{name}'; {known}")]
    NoDevice {
        /// The name asked for.
        name: String,
        /// Names that there are.
        known: String,
    },
    /// A device's configuration could not be changed.
    #[error(transparent)]
    Update(#[from] UpdateError),
    /// A snapshot could not be made.
    #[error(transparent)]
    Snapshot(#[from] SnapshotFailed),
    /// The control thread has ended.
    #[error("the machine is gone")]
    Gone,
}

impl From<UpdateFailed> for VmError {
    fn from(failed: UpdateFailed) -> Self {
        match failed {
            UpdateFailed::Device(error) => Self::Update(error),
            UpdateFailed::Runner(error) => Self::Runner(error),
        }
    }
}

/// A device of a machine, for whoever watches it.
///
/// ```no_run
/// # fn tell(vm: &vmm_core::Vm) {
/// for device in vm.devices() {
///     for (counter, value) in device.counters.all() {
///         println!("{} {counter}: {value}", device.name);
///     }
/// }
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DeviceStatus {
    /// Its id, or its kind and its number among those of its kind.
    pub name: String,
    /// Its kind.
    pub kind: &'static str,
    /// What it has counted since the machine was built.
    pub counters: Arc<Counters>,
}

/// What the control thread is asked to do.
#[derive(Clone, Debug)]
pub(crate) enum Command {
    Start,
    Pause,
    Resume,
    Kill,
    Stop { grace: Duration },
    PowerButton,
    Update { name: String, patch: Patch },
}

/// What reaches the control thread.
pub(crate) enum Message {
    Command(Command, Sender<Result<(), VmError>>),
    Usage(Sender<Usage>),
    /// Save the machine's state, and its memory to this file.
    Capture {
        memory: MemoryTarget,
        kind: SnapshotKind,
        reply: Sender<Result<Captured, VmError>>,
    },
    /// What was captured last is in this snapshot.
    Captured(Base),
    /// Devices have put something into the inbox.
    Reported,
    VcpuEnded(u8, VcpuEnd),
    /// The thread of this name died of a panic.
    ThreadPanicked(String),
}

/// How long a guest whose kernel panicked has to print its last words and reset itself.
const PANIC_GRACE: Duration = Duration::from_secs(1);
/// How soon after a kernel's last words on the console a reset is part of its panic.
const LAST_WORDS_GRACE: Duration = Duration::from_secs(10);

/// State that handles can look at while the control thread works.
struct Shared {
    state: Mutex<VmState>,
    changed: Condvar,
    config: Mutex<VmConfig>,
    aliases: BTreeMap<String, String>,
    journal: Arc<Journal>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, VmState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn config(&self) -> MutexGuard<'_, VmConfig> {
        self.config.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn transition(&self, to: VmState) -> Result<(), IllegalTransition> {
        let mut state = self.lock();
        state.transition(to.clone())?;
        self.enter(state, to);
        Ok(())
    }

    /// Tells everybody about the new state. Under its lock, so that the journal has the states in their order.
    fn enter(&self, state: MutexGuard<'_, VmState>, new: VmState) {
        self.journal.record(What::State(new));
        drop(state);
        self.changed.notify_all();
    }
}

/// A virtual machine. All methods can be called from any thread; dropping it stops the machine and waits until its
/// threads have ended and its files are closed.
///
/// ```no_run
/// use vmm_core::{Vm, VmConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = VmConfig { kernel: Some("vmlinux".into()), ..VmConfig::default() };
/// let vm = Vm::builder(config).build()?;
/// vm.start()?;
/// let reason = vm.wait();
/// # let _ = reason;
/// # Ok(())
/// # }
/// ```
pub struct Vm {
    control: Sender<Message>,
    shared: Arc<Shared>,
    inbox: Arc<Inbox>,
    console_input: ConsoleInput,
    console: Mutex<Option<ConsoleReader>>,
    devices: Vec<DeviceStatus>,
    exits: Vec<Arc<ExitLog>>,
    /// One snapshot is made at a time.
    snapshots: Mutex<()>,
    thread: Option<JoinHandle<()>>,
}

impl Vm {
    /// Builds the machine that `config` describes.
    pub fn builder(config: VmConfig) -> VmBuilder {
        VmBuilder::new(config)
    }

    /// Prepares to build the machine that `snapshot` was made of. It is then [`VmState::Paused`], and
    /// [`Self::resume`] lets it go on.
    ///
    /// ```no_run
    /// use vmm_core::{Snapshot, Vm};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let vm = Vm::restore(Snapshot::open("web.snapshot".as_ref())?).build()?;
    /// vm.resume()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn restore(snapshot: Snapshot) -> VmBuilder {
        VmBuilder::of_snapshot(snapshot)
    }

    pub(crate) fn run(
        (config, aliases): (VmConfig, BTreeMap<String, String>),
        machine: Machine,
        console: ConsoleReader,
        inbox: Arc<Inbox>,
        messages: Receiver<Message>,
    ) -> Result<Self, std::io::Error> {
        let device = |((name, unit), config): (&(String, Arc<UnitHandle>), &DeviceConfig)| DeviceStatus {
            name: name.clone(),
            kind: config.kind(),
            counters: unit.counters().clone(),
        };
        let state = if machine.asleep.is_some() { VmState::Paused } else { VmState::Created };
        let devices = machine.units.iter().zip(&config.devices).map(device).collect();
        let shared = Arc::new(Shared {
            state: Mutex::new(state.clone()),
            changed: Condvar::new(),
            config: Mutex::new(config),
            aliases,
            journal: machine.journal.clone(),
        });
        shared.journal.record(What::State(state));
        let console_input = machine.console_input.clone();
        let (control, exits) = (machine.control.clone(), machine.exits.clone());
        let thread = std::thread::Builder::new().name("vm-control".into()).spawn({
            let (shared, inbox) = (shared.clone(), inbox.clone());
            let span = spans::thread(&machine.span, "control");
            move || {
                let _entered = span.entered();
                let control = Control {
                    machine: Some(machine),
                    shared: shared.clone(),
                    inbox,
                    panicked: None,
                    last_words: None,
                    kill_at: None,
                };
                let serve = std::panic::AssertUnwindSafe(|| control.serve(&messages));
                if std::panic::catch_unwind(serve).is_err() {
                    // Whoever waits for the machine must not wait for ever.
                    let reason = StopReason::Failed("a bug: the control thread panicked".into());
                    let mut state = shared.lock();
                    *state = VmState::Stopped(reason);
                    let stopped = state.clone();
                    shared.enter(state, stopped);
                }
            }
        })?;
        let console = Mutex::new(Some(console));
        Ok(Self {
            control,
            shared,
            inbox,
            console_input,
            console,
            devices,
            exits,
            snapshots: Mutex::default(),
            thread: Some(thread),
        })
    }

    fn command(&self, command: Command) -> Result<(), VmError> {
        let (reply, answer) = mpsc::channel();
        self.control.send(Message::Command(command, reply)).map_err(|_| VmError::Gone)?;
        answer.recv().map_err(|_| VmError::Gone)?
    }

    /// Lets the guest run.
    pub fn start(&self) -> Result<(), VmError> {
        self.command(Command::Start)
    }

    /// Brings vCPUs and devices to a standstill.
    pub fn pause(&self) -> Result<(), VmError> {
        self.command(Command::Pause)
    }

    /// Lets a paused guest go on.
    pub fn resume(&self) -> Result<(), VmError> {
        self.command(Command::Resume)
    }

    /// Ends the machine and gives its guest time for that: presses the power button, waits until the guest has
    /// switched itself off, and kills it at the deadline. A guest that is paused or was not started has nothing to
    /// lose and is killed at once.
    pub fn stop(&self, deadline: Duration) -> StopReason {
        self.request_stop(deadline);
        self.wait()
    }

    /// As [`Self::stop`], but does not wait for it. Of several deadlines, the first counts.
    pub fn request_stop(&self, deadline: Duration) {
        self.request(Command::Stop { grace: deadline });
    }

    /// Ends the machine at once, without asking the guest. No error if it has ended already.
    pub fn kill(&self) {
        // It fails only when the machine has ended.
        _ = self.command(Command::Kill);
    }

    /// As [`Self::kill`], but does not wait for it: for threads that must stay free.
    pub fn request_kill(&self) {
        self.request(Command::Kill);
    }

    fn request(&self, command: Command) {
        let (reply, _) = mpsc::channel();
        // It fails only when the machine has ended.
        _ = self.control.send(Message::Command(command, reply));
    }

    /// Presses the power button: a guest with ACPI and something that listens (systemd, our init) shuts down.
    pub fn press_power_button(&self) -> Result<(), VmError> {
        self.command(Command::PowerButton)
    }

    /// Changes what can change of the device `name` while the machine runs: its limits, and what its kind allows,
    /// such as a disk's path. After an error it is as it was.
    ///
    /// ```no_run
    /// # use vmm_core::{Vm, devices::registry::Patch};
    /// # fn slow_down(vm: &Vm) -> Result<(), vmm_core::VmError> {
    /// let patch = Patch::from_iter([("bandwidth".to_owned(), "10M/1s".into())]);
    /// vm.update("rng0", patch)
    /// # }
    /// ```
    pub fn update(&self, name: &str, patch: Patch) -> Result<(), VmError> {
        self.command(Command::Update { name: name.into(), patch })
    }

    /// Saves the machine to the directory `to`, where there may be an older snapshot, which it replaces. A running machine
    /// stands still meanwhile, and goes on whether or not it succeeds. Nothing is left behind after an error.
    ///
    /// ```no_run
    /// # use vmm_core::{SnapshotKind, Vm};
    /// # fn save(vm: &Vm) -> Result<(), vmm_core::VmError> {
    /// let report = vm.snapshot("web.snapshot".as_ref(), SnapshotKind::Full)?;
    /// println!("the guest stood still for {} us", report.paused.as_micros());
    /// # Ok(())
    /// # }
    /// ```
    pub fn snapshot(&self, to: &Path, kind: SnapshotKind) -> Result<SnapshotReport, VmError> {
        self.snapshot_at(&Place::Dir(to.into()), kind)
    }

    /// As [`Self::snapshot`], to two files, for [`Snapshot::open_files`]: the state, in which the manifest is, and the memory.
    /// Files that are there are replaced.
    pub fn snapshot_to_files(
        &self,
        state: &Path,
        memory: &Path,
        kind: SnapshotKind,
    ) -> Result<SnapshotReport, VmError> {
        self.snapshot_at(&Place::Files { state: state.into(), memory: memory.into() }, kind)
    }

    fn snapshot_at(&self, place: &Place, kind: SnapshotKind) -> Result<SnapshotReport, VmError> {
        let _one_at_a_time = self.snapshots.lock().unwrap_or_else(|e| e.into_inner());
        let draft = Draft::begin(place)?;
        let memory = draft.memory().map_err(VmError::Snapshot)?;
        let (reply, answer) = mpsc::channel();
        self.control.send(Message::Capture { memory, kind, reply }).map_err(|_| VmError::Gone)?;
        let captured = answer.recv().map_err(|_| VmError::Gone)??;
        let (report, base) = draft.finish(captured)?;
        if kind != SnapshotKind::Clones {
            // It fails only when the machine has ended.
            _ = self.control.send(Message::Captured(base));
        }
        Ok(report)
    }

    /// The machine's configuration, with what [`Self::update`] changed.
    pub fn config(&self) -> VmConfig {
        self.shared.config().clone()
    }

    /// By what the program calls devices, by their names: what [`VmBuilder::aliases`] or the snapshot says.
    pub fn aliases(&self) -> &BTreeMap<String, String> {
        &self.shared.aliases
    }

    /// The machine's virtio devices.
    pub fn devices(&self) -> &[DeviceStatus] {
        &self.devices
    }

    /// What the machine has taken of the host so far; fails when it has ended.
    pub fn usage(&self) -> Result<Usage, VmError> {
        let (reply, answer) = mpsc::channel();
        self.control.send(Message::Usage(reply)).map_err(|_| VmError::Gone)?;
        answer.recv().map_err(|_| VmError::Gone)
    }

    /// Exits of each vCPU, by cause, and by address with [`VmBuilder::trace_exits`].
    pub fn exits(&self) -> Vec<Vec<ExitCount>> {
        self.exits.iter().map(|log| log.entries()).collect()
    }

    /// Where the machine is in its life.
    pub fn state(&self) -> VmState {
        self.shared.lock().clone()
    }

    /// Waits until the machine has stopped.
    pub fn wait(&self) -> StopReason {
        let mut state = self.shared.lock();
        loop {
            if let VmState::Stopped(reason) = &*state {
                return reason.clone();
            }
            state = self.shared.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// As [`Self::wait`], for at most `timeout`.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<StopReason> {
        let stopped = |state: &mut VmState| !matches!(state, VmState::Stopped(_));
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), timeout, stopped);
        match &*waited.unwrap_or_else(|e| e.into_inner()).0 {
            VmState::Stopped(reason) => Some(reason.clone()),
            _ => None,
        }
    }

    /// Exit status of the guest's command, once its init has reported one.
    pub fn exit_status(&self) -> Option<u8> {
        self.inbox.exit_status()
    }

    /// What happens to the machine, from its first event that is still kept.
    pub fn events(&self) -> Events {
        Events::of(self.shared.journal.clone())
    }

    /// When the guest got how far.
    pub fn milestones(&self) -> &Milestones {
        self.shared.journal.milestones()
    }

    /// The guest's console output, for whoever asks first; empty when the console goes elsewhere.
    pub fn take_console(&self) -> Option<ConsoleReader> {
        self.console.lock().unwrap_or_else(|e| e.into_inner()).take()
    }

    /// The guest's console input.
    pub fn console_input(&self) -> ConsoleInput {
        self.console_input.clone()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }
}

/// The control thread: the only one that changes the machine's state.
struct Control {
    /// Gone once the machine has stopped.
    machine: Option<Machine>,
    shared: Arc<Shared>,
    inbox: Arc<Inbox>,
    /// When the guest's kernel panicked.
    panicked: Option<Instant>,
    /// When a kernel's last words were seen on the console.
    last_words: Option<Instant>,
    /// When the guest is to be gone that was asked to switch itself off.
    kill_at: Option<Instant>,
}

impl Control {
    /// Works until the machine has stopped; dropping the receiver tells later callers.
    fn serve(mut self, messages: &Receiver<Message>) {
        while self.machine.is_some() {
            let end = self.end_by_itself();
            let left = end.as_ref().map(|(at, _)| at.checked_duration_since(Instant::now()));
            let message = match left {
                None => messages.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(Some(left)) => messages.recv_timeout(left),
                // However much there still is to read.
                Some(None) => Err(RecvTimeoutError::Timeout),
            };
            match message {
                Ok(Message::Command(command, reply)) => {
                    // The caller may have given up.
                    _ = reply.send(self.command(command));
                }
                Ok(Message::Usage(reply)) => {
                    // The caller may have given up; without a machine, its channel ends.
                    _ = self.machine.as_ref().map(|machine| reply.send(machine.usage()));
                }
                Ok(Message::Capture { memory, kind, reply }) => _ = reply.send(self.capture(&memory, kind)),
                Ok(Message::Captured(base)) => self.captured(base),
                Ok(Message::Reported) => self.reported(),
                Ok(Message::VcpuEnded(id, end)) => self.vcpu_ended(id, end),
                Ok(Message::ThreadPanicked(name)) => {
                    self.stop(StopReason::Failed(format!("a bug: the thread {name} panicked")));
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.stop(end.map_or(StopReason::Requested, |(_, reason)| reason));
                }
                Err(RecvTimeoutError::Disconnected) => self.stop(StopReason::Requested),
            }
        }
    }

    /// When, and why, the machine ends if nothing else ends it before.
    fn end_by_itself(&self) -> Option<(Instant, StopReason)> {
        let paused = *self.shared.lock() == VmState::Paused;
        let panic = self.panicked.filter(|_| !paused).map(|at| (at + PANIC_GRACE, StopReason::GuestPanic));
        let killed = self.kill_at.map(|at| (at, StopReason::Requested));
        panic.into_iter().chain(killed).min_by_key(|&(at, _)| at)
    }

    fn command(&mut self, command: Command) -> Result<(), VmError> {
        let machine = self.machine.as_mut().ok_or(VmError::Gone)?;
        match command {
            Command::Start => {
                self.shared.lock().expect(&VmState::Created, VmState::Running)?;
                self.shared.transition(VmState::Running)?;
                if let Err(error) = machine.start() {
                    self.stop(StopReason::Failed(error.to_string()));
                    return Err(error.into());
                }
            }
            Command::Pause => {
                self.shared.lock().expect(&VmState::Running, VmState::Paused)?;
                machine.pause()?;
                self.shared.transition(VmState::Paused)?;
            }
            Command::Resume => {
                self.shared.lock().expect(&VmState::Paused, VmState::Running)?;
                machine.resume()?;
                self.shared.transition(VmState::Running)?;
            }
            Command::Kill => self.stop(StopReason::Requested),
            Command::Stop { grace } => {
                let running = *self.shared.lock() == VmState::Running;
                if !running || grace.is_zero() {
                    self.stop(StopReason::Requested);
                } else {
                    machine.power_button.trigger();
                    // Beyond what a clock can say there is no deadline.
                    let at = Instant::now().checked_add(grace);
                    self.kill_at = self.kill_at.into_iter().chain(at).min();
                }
            }
            Command::PowerButton => machine.power_button.trigger(),
            Command::Update { name, patch } => {
                let mut config = self.shared.config();
                let names = config.device_names();
                let known = match names.is_empty() {
                    true => "it has none".into(),
                    false => format!("there are {}", names.join(", ")),
                };
                let at = names.iter().position(|known| *known == name);
                let at = at.ok_or(VmError::NoDevice { name, known })?;
                let update = config.devices[at].patched(&patch)?;
                machine.units[at].1.update(&update)?;
                config.devices[at] = update.config;
                let device = names[at].clone();
                self.shared.journal.record(What::Updated { device });
            }
        }
        Ok(())
    }

    fn capture(&mut self, memory: &MemoryTarget, kind: SnapshotKind) -> Result<Captured, VmError> {
        let machine = self.machine.as_mut().ok_or(VmError::Gone)?;
        let config = self.shared.config().clone();
        let running = match &*self.shared.lock() {
            VmState::Running => true,
            VmState::Paused => false,
            state => return Err(SnapshotFailed::NotRunning { state: state.name() }.into()),
        };
        let start = Instant::now();
        if running {
            machine.pause()?;
        }
        let captured = Self::save(machine, memory, kind, config, self.inbox.exit_status());
        if running {
            machine.resume()?;
        }
        let aliases = self.shared.aliases.clone();
        Ok(Captured { paused: start.elapsed(), aliases, ..captured? })
    }

    /// Saves a machine that stands still.
    fn save(
        machine: &mut Machine,
        memory: &MemoryTarget,
        kind: SnapshotKind,
        config: VmConfig,
        exit_status: Option<u8>,
    ) -> Result<Captured, VmError> {
        let sections = machine.save(exit_status).map_err(SnapshotFailed::Save)?;
        machine.take_dirty_pages()?;
        let diff = match (kind, &machine.tracking) {
            (SnapshotKind::Full | SnapshotKind::Clones, _) => None,
            (SnapshotKind::Diff, Some(Tracking { base: Some(base), pending })) => {
                Some((base.clone(), pending.clone()))
            }
            (SnapshotKind::Diff, tracking) => {
                let remedy = match tracking {
                    Some(_) => "make a full snapshot first",
                    None => "start it with --track-dirty",
                };
                return Err(SnapshotFailed::NoBase { remedy }.into());
            }
        };
        let which = match &diff {
            None => Which::All,
            Some((_, pages)) if memory.exactly => Which::Exactly(pages),
            Some((_, pages)) => Which::Only(pages),
        };
        let written = memory_file::write(&machine.ram, which, &memory.file)
            .map_err(|source| SnapshotFailed::Io { action: "write", path: "memory".into(), source })?;
        Ok(Captured { sections, written, config, aliases: BTreeMap::new(), paused: Duration::ZERO, diff })
    }

    /// The pages that were dirty when the machine was captured are in the snapshot `base`.
    fn captured(&mut self, base: Base) {
        if let Some(tracking) = self.machine.as_mut().and_then(|machine| machine.tracking.as_mut()) {
            tracking.pending.clear();
            tracking.base = Some(base);
        }
    }

    fn reported(&mut self) {
        let reported = self.inbox.take();
        self.note_panic(reported);
        if reported.power_off {
            self.stop(StopReason::GuestPowerOff);
        } else if reported.reset {
            self.stop(StopReason::GuestReset);
        }
    }

    fn note_panic(&mut self, reported: Reported) {
        if reported.panicked {
            self.panicked.get_or_insert_with(|| {
                self.shared.journal.record(What::GuestPanic);
                Instant::now()
            });
        }
        if reported.last_words {
            self.last_words = Some(Instant::now());
        }
    }

    fn vcpu_ended(&mut self, id: u8, end: VcpuEnd) {
        let reason = match end {
            VcpuEnd::Told => return,
            VcpuEnd::Shutdown => StopReason::GuestReset,
            VcpuEnd::Failed(failure) => {
                let hardware = diagnosis::has_hardware_virtualisation();
                StopReason::Failed(diagnosis::explain(id, &failure, hardware))
            }
            VcpuEnd::Hypervisor(error) => StopReason::Failed(error.to_string()),
            VcpuEnd::Panicked => StopReason::Failed(format!("a bug: the thread of vCPU {id} panicked")),
        };
        self.stop(reason);
    }

    /// Takes the machine down. What a panicked guest does next is part of its panic.
    fn stop(&mut self, reason: StopReason) {
        let Some(machine) = self.machine.take() else { return };
        self.note_panic(self.inbox.take());
        let last_words = self.last_words.is_some_and(|at| at.elapsed() < LAST_WORDS_GRACE);
        let reason = match reason {
            StopReason::GuestReset | StopReason::GuestPowerOff if self.panicked.is_some() => {
                StopReason::GuestPanic
            }
            // Anybody can print the words, but with a reset right after them they were a kernel's.
            StopReason::GuestReset if last_words => StopReason::GuestPanic,
            reason => reason,
        };
        // From every state in which there still is a machine, the diagram goes to `Stopping`.
        _ = self.shared.transition(VmState::Stopping);
        drop(machine);
        _ = self.shared.transition(VmState::Stopped(reason));
    }
}
