//! The handle to a virtual machine. The control thread behind it owns the machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::model::{Counters, UpdateError};
use devices::registry::{DeviceConfig, Patch};

use crate::VmBuilder;
use crate::capture::{self, Ahead};
use crate::config::VmConfig;
use crate::console::{ConsoleInput, ConsoleReader};
use crate::control::{Command, Control, Message, Shared};
use crate::event::{Events, What};
use crate::exits::{ExitCount, ExitLog};
use crate::hypervisor::HvError;
use crate::machine::{Inbox, Machine, Milestones, Usage};
use crate::memory::FaultsError;
use crate::runner::{RunnerError, UnitHandle, UpdateFailed};
use crate::snapshot::{DiskTarget, Draft, Place, Snapshot, SnapshotFailed, SnapshotKind, SnapshotReport};
use crate::spans;
use crate::state::{IllegalTransition, StopReason, VmState};
use crate::uffd::Faults;

/// How long the machine's usage is waited for while it is being saved.
const USAGE_PATIENCE: Duration = Duration::from_millis(50);

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
    /// The machine's memory cannot be had.
    #[error(transparent)]
    Memory(#[from] FaultsError),
    /// A snapshot could not be made.
    #[error(transparent)]
    Snapshot(#[from] SnapshotFailed),
    /// The machine stands still until its memory is written.
    #[error("the machine is being saved; ask again when that is done")]
    Saving,
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
    /// Who brings memory in, of a machine whose memory is not there yet.
    faults: Option<Faults>,
    /// Of a machine that was told to end: see [`Faults::end`].
    ended: Mutex<Option<Sender<()>>>,
    thread: Option<JoinHandle<()>>,
}

/// A snapshot that is being made, or waits for that.
#[derive(Debug)]
pub(crate) struct Job {
    /// By what people know it.
    path: PathBuf,
    /// What has become of it, once that is certain.
    end: OnceLock<JobEnd>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum JobEnd {
    Cancelled,
    /// It is whole, and takes its place.
    Placed,
}

impl Job {
    /// Whether this becomes of it, and not something else.
    fn becomes(&self, end: JobEnd) -> bool {
        self.end.set(end).is_ok()
    }

    fn is_cancelled(&self) -> bool {
        self.end.get() == Some(&JobEnd::Cancelled)
    }
}

/// A [`Job`], listed until this is dropped.
struct Listed<'a> {
    vm: &'a Vm,
    job: Arc<Job>,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.vm.shared.jobs().retain(|job| !Arc::ptr_eq(job, &self.job));
        // It fails only when the machine has ended.
        _ = self.vm.control.send(Message::SnapshotEnded);
    }
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
            stands_still: AtomicBool::new(false),
            ends: AtomicBool::new(false),
            jobs: Mutex::default(),
        });
        shared.journal.record(What::State(state));
        let console_input = machine.console_input.clone();
        let (control, exits) = (machine.control.clone(), machine.exits.clone());
        let faults = machine.ram.faults().cloned();
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
                    press_at: None,
                    stop_when_saved: false,
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
            faults,
            ended: Mutex::default(),
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

    /// Ends the machine and gives its guest time for that: presses the power button, every second until the guest has
    /// switched itself off, and kills it at the deadline. A guest that is paused or was not started has nothing to
    /// lose and is ended at once, or when its snapshot that is being made is whole.
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
        self.let_end();
        // It fails only when the machine has ended.
        _ = self.command(Command::KILL);
    }

    /// As [`Self::kill`], but does not wait for it: for threads that must stay free.
    pub fn request_kill(&self) {
        self.request(Command::KILL);
    }

    /// Ends what keeps a machine from ending: a snapshot, and waits for memory that another process does not bring. The control
    /// thread may be at either.
    fn let_end(&self) {
        self.shared.ends.store(true, Ordering::Release);
        let mut ended = self.ended.lock().unwrap_or_else(|e| e.into_inner());
        if ended.is_none() {
            *ended = self.faults.as_ref().and_then(Faults::end);
        }
    }

    fn request(&self, command: Command) {
        // Who gives a machine time gives it time for a snapshot, too: the state of one that is paused may be nowhere else.
        if command.is_kill() {
            self.let_end();
        }
        let (reply, _) = mpsc::channel();
        // It fails only when the machine has ended.
        _ = self.control.send(Message::Command(command, reply));
    }

    /// Presses the power button: a guest with ACPI and something that listens (systemd, our init) shuts down. One without
    /// ACPI that has a driver for the keyboard (i8042) hears Ctrl-Alt-Del.
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

    /// Saves the machine to the directory `to`, where there may be an older snapshot, which it replaces. Disks that the guest
    /// can write are taken along. A running machine stands still meanwhile, and goes on whether or not it succeeds. Nothing
    /// is left behind after an error.
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
        self.snapshot_at(&Place::Dir(to.into()), kind, true)
    }

    /// As [`Self::snapshot`], without disks: who restores it has to see to it that they are as they were.
    pub fn snapshot_without_disks(&self, to: &Path, kind: SnapshotKind) -> Result<SnapshotReport, VmError> {
        self.snapshot_at(&Place::Dir(to.into()), kind, false)
    }

    /// Takes a snapshot and ends the machine, whose guest does not run again after it was saved. If `save` fails, it goes
    /// on, if it ran.
    pub fn end_with<E: From<VmError>>(
        &self,
        save: impl FnOnce() -> Result<SnapshotReport, E>,
    ) -> Result<SnapshotReport, E> {
        let runs = self.state() == VmState::Running;
        if runs {
            self.pause()?;
        }
        self.shared.stands_still.store(true, Ordering::Release);
        let made = save();
        if made.is_ok() {
            self.kill();
        }
        self.shared.stands_still.store(false, Ordering::Release);
        if made.is_err() && runs {
            self.resume()?;
        }
        made
    }

    /// As [`Self::snapshot`], to two files, for [`Snapshot::open_files`]: the state, in which the manifest is, and the memory.
    /// Files that are there are replaced. Disks are not in it.
    pub fn snapshot_to_files(
        &self,
        state: &Path,
        memory: &Path,
        kind: SnapshotKind,
    ) -> Result<SnapshotReport, VmError> {
        self.snapshot_at(&Place::Files { state: state.into(), memory: memory.into() }, kind, false)
    }

    fn snapshot_at(&self, place: &Place, kind: SnapshotKind, disks: bool) -> Result<SnapshotReport, VmError> {
        let job = Arc::new(Job { path: place.path().into(), end: OnceLock::new() });
        {
            // It is by its path that a snapshot is cancelled.
            let mut jobs = self.shared.jobs();
            if jobs.iter().any(|other| other.path == job.path) {
                return Err(SnapshotFailed::Busy { path: job.path.display().to_string() }.into());
            }
            jobs.push(job.clone());
        }
        let listed = Listed { vm: self, job };
        let _one_at_a_time = self.snapshots.lock().unwrap_or_else(|e| e.into_inner());
        let made = self.save(place, kind, disks, &listed.job);
        made.map_err(|error| match () {
            () if listed.job.is_cancelled() => SnapshotFailed::Cancelled.into(),
            () if self.shared.is_ending() => VmError::Gone,
            () => error,
        })
    }

    fn save(
        &self,
        place: &Place,
        kind: SnapshotKind,
        disks: bool,
        job: &Arc<Job>,
    ) -> Result<SnapshotReport, VmError> {
        let draft = Draft::begin(place, kind)?;
        let (shared, wanted) = (self.shared.clone(), job.clone());
        let mut memory = draft
            .memory(self.shared.config().memory.0, kind)?
            .while_wanted(move || !wanted.is_cancelled() && !shared.is_ending());
        let ahead = Ahead::begin(&self.control, kind)?;
        ahead.iter().try_for_each(|ahead| ahead.write(&mut memory))?;
        let disks = if disks { DiskTarget::of(&draft) } else { DiskTarget::none() };
        let capture = |reply| Message::Capture { memory, ahead: ahead.is_some(), disks, kind, reply };
        let captured = capture::ask(&self.control, capture)?;
        drop(ahead);
        let (report, base) = draft.finish(captured, &|| job.becomes(JobEnd::Placed))?;
        if kind.lasts() {
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

    /// Whether a snapshot is being made. What would change the machine may wait for its end.
    pub fn is_saving(&self) -> bool {
        self.shared.is_being_saved()
    }

    /// Ends the snapshot to the directory `to` that is being made, or waits for another one: whoever wants it gets
    /// [`SnapshotFailed::Cancelled`], and what was at `to` stays. Returns whether there was one that is not whole already.
    pub fn cancel_snapshot(&self, to: &Path) -> bool {
        // There is one at most.
        self.shared.jobs().iter().any(|job| job.path == to && job.becomes(JobEnd::Cancelled))
    }

    /// What the machine has taken of the host so far; fails when it has ended, or is being saved and stands still for that.
    pub fn usage(&self) -> Result<Usage, VmError> {
        let (reply, answer) = mpsc::channel();
        self.control.send(Message::Usage(reply)).map_err(|_| VmError::Gone)?;
        loop {
            match answer.recv_timeout(USAGE_PATIENCE) {
                Ok(usage) => return Ok(usage),
                Err(RecvTimeoutError::Disconnected) => return Err(VmError::Gone),
                Err(RecvTimeoutError::Timeout) if self.is_saving() => return Err(VmError::Saving),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
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
