//! The control thread: it owns a machine, and is the only one that changes its state.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use devices::registry::Patch;

use crate::capture::Running;
use crate::config::VmConfig;
use crate::diagnosis;
use crate::event::{Journal, What};
use crate::machine::{Inbox, Machine, Reported, Usage};
use crate::snapshot::memory_file::Pages;
use crate::snapshot::memory_writer::MemoryWriter;
use crate::snapshot::{Base, Captured, DiskTarget, SnapshotKind};
use crate::state::{IllegalTransition, StopReason, VmState};
use crate::vcpu::VcpuEnd;
use crate::vm::{Job, VmError};

/// What the control thread is asked to do.
#[derive(Clone, Debug)]
pub(crate) enum Command {
    Start,
    Pause,
    Resume,
    Stop { grace: Duration },
    PowerButton,
    Update { name: String, patch: Patch },
}

impl Command {
    /// Ends the machine, whatever its guest does.
    pub const KILL: Self = Self::Stop { grace: Duration::ZERO };

    /// Whether it is [`Self::KILL`].
    pub fn is_kill(&self) -> bool {
        matches!(self, Self::Stop { grace } if grace.is_zero())
    }

    /// Whether it ends a machine in this state without asking its guest, which has nothing to lose where it does not run.
    pub fn ends_at_once(&self, state: &VmState) -> bool {
        self.is_kill() || matches!(self, Self::Stop { .. } if *state != VmState::Running)
    }
}

/// What reaches the control thread.
pub(crate) enum Message {
    Command(Command, Sender<Result<(), VmError>>),
    Usage(Sender<Usage>),
    /// Begin to log what is written, for a snapshot whose memory is written while the machine runs.
    BeginAhead {
        kind: SnapshotKind,
        reply: Sender<Result<Option<Running>, VmError>>,
    },
    /// What was written since the last call.
    DirtyPages(Sender<Result<Pages, VmError>>),
    /// That snapshot is made, or has failed.
    EndAhead,
    /// Save the machine's state, what of its memory is not written yet, and its disks.
    Capture {
        memory: MemoryWriter,
        ahead: bool,
        disks: DiskTarget,
        kind: SnapshotKind,
        reply: Sender<Result<Captured, VmError>>,
    },
    /// What was captured last is in this snapshot.
    Captured(Base),
    /// A snapshot is made, or has failed.
    SnapshotEnded,
    /// Devices have put something into the inbox.
    Reported,
    VcpuEnded(u8, VcpuEnd),
    /// Memory of the snapshot cannot be had, for this reason.
    MemoryLost(String),
    /// The thread of this name died of a panic.
    ThreadPanicked(String),
}

/// How long a guest whose kernel panicked has to print its last words and reset itself.
const PANIC_GRACE: Duration = Duration::from_secs(1);
/// How soon after a kernel's last words on the console a reset is part of its panic.
const LAST_WORDS_GRACE: Duration = Duration::from_secs(10);
/// How often the power button is pressed of a guest that is to switch itself off: who does not listen yet, as while it boots,
/// does not hear the first time.
const PRESS_INTERVAL: Duration = Duration::from_secs(1);

/// State that handles can look at while the control thread works.
pub(crate) struct Shared {
    pub state: Mutex<VmState>,
    pub changed: Condvar,
    pub config: Mutex<VmConfig>,
    pub aliases: BTreeMap<String, String>,
    pub journal: Arc<Journal>,
    /// A paused machine does not go on, whoever asks: it is being saved to be ended.
    pub stands_still: AtomicBool,
    /// It is to end at once, as soon as the control thread comes to it.
    pub ends: AtomicBool,
    /// Snapshots of it that are being made, or wait for that.
    pub jobs: Mutex<Vec<Arc<Job>>>,
}

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, VmState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn jobs(&self) -> MutexGuard<'_, Vec<Arc<Job>>> {
        self.jobs.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn is_being_saved(&self) -> bool {
        !self.jobs().is_empty()
    }

    /// Whether it has ended, or is about to.
    pub fn is_ending(&self) -> bool {
        self.ends.load(Ordering::Acquire) || matches!(*self.lock(), VmState::Stopping | VmState::Stopped(_))
    }

    pub fn config(&self) -> MutexGuard<'_, VmConfig> {
        self.config.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn transition(&self, to: VmState) -> Result<(), IllegalTransition> {
        let mut state = self.lock();
        state.transition(to.clone())?;
        self.enter(state, to);
        Ok(())
    }

    /// Tells everybody about the new state. Under its lock, so that the journal has the states in their order.
    pub fn enter(&self, state: MutexGuard<'_, VmState>, new: VmState) {
        self.journal.record(What::State(new));
        drop(state);
        self.changed.notify_all();
    }
}

/// The control thread: the only one that changes the machine's state.
pub(crate) struct Control {
    /// Gone once the machine has stopped.
    pub machine: Option<Machine>,
    pub shared: Arc<Shared>,
    pub inbox: Arc<Inbox>,
    /// When the guest's kernel panicked.
    pub panicked: Option<Instant>,
    /// When a kernel's last words were seen on the console.
    pub last_words: Option<Instant>,
    /// When the guest is to be gone that was asked to switch itself off.
    pub kill_at: Option<Instant>,
    /// When that guest is asked again.
    pub press_at: Option<Instant>,
    /// It does not run, and ends once it is saved.
    pub stop_when_saved: bool,
}

impl Control {
    /// Works until the machine has stopped; dropping the receiver tells later callers.
    pub fn serve(mut self, messages: &Receiver<Message>) {
        while self.machine.is_some() {
            let next = self.end_by_itself().map(|(at, _)| at).into_iter().chain(self.press_at).min();
            let left = next.map(|at| at.checked_duration_since(Instant::now()));
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
                Ok(Message::BeginAhead { kind, reply }) => _ = reply.send(self.begin_ahead(kind)),
                Ok(Message::DirtyPages(reply)) => _ = reply.send(self.dirty_pages()),
                Ok(Message::EndAhead) => self.end_ahead(),
                Ok(Message::Capture { mut memory, ahead, disks, kind, reply }) => {
                    _ = reply.send(self.capture(&mut memory, ahead, &disks, kind));
                }
                Ok(Message::Captured(base)) => self.captured(base),
                Ok(Message::SnapshotEnded) if self.stop_when_saved && !self.shared.is_being_saved() => {
                    self.stop(StopReason::Requested);
                }
                Ok(Message::SnapshotEnded) => {}
                Ok(Message::Reported) => self.reported(),
                Ok(Message::VcpuEnded(id, end)) => self.vcpu_ended(id, end),
                Ok(Message::MemoryLost(reason)) => self.stop(StopReason::Failed(reason)),
                Ok(Message::ThreadPanicked(name)) => {
                    self.stop(StopReason::Failed(format!("a bug: the thread {name} panicked")));
                }
                Err(RecvTimeoutError::Timeout) => self.time_is_up(Instant::now()),
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

    /// Does what was to be done by now.
    fn time_is_up(&mut self, now: Instant) {
        match self.end_by_itself() {
            Some((at, reason)) if at <= now => self.stop(reason),
            _ if self.press_at.is_some_and(|at| at <= now) => self.ask_to_switch_off(now),
            _ => {}
        }
    }

    /// Presses the power button, again and again until the machine has stopped.
    fn ask_to_switch_off(&mut self, now: Instant) {
        let Some(machine) = &self.machine else { return };
        if *self.shared.lock() == VmState::Running {
            machine.press_power_button();
        }
        self.press_at = Some(now + PRESS_INTERVAL);
    }

    fn command(&mut self, command: Command) -> Result<(), VmError> {
        let machine = self.machine.as_mut().ok_or(VmError::Gone)?;
        let ends = command.ends_at_once(&self.shared.lock());
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
            Command::Resume if self.shared.stands_still.load(Ordering::Acquire) => {
                return Err(VmError::Saving);
            }
            Command::Resume => {
                self.shared.lock().expect(&VmState::Paused, VmState::Running)?;
                machine.resume()?;
                self.shared.transition(VmState::Running)?;
                self.stop_when_saved = false;
            }
            Command::Stop { grace } => {
                // The state of a machine that does not run may be nowhere else.
                self.stop_when_saved = ends && !grace.is_zero() && self.shared.is_being_saved();
                if ends && !self.stop_when_saved {
                    self.stop(StopReason::Requested);
                    return Ok(());
                }
                let now = Instant::now();
                // Beyond what a clock can say there is no deadline.
                self.kill_at = self.kill_at.into_iter().chain(now.checked_add(grace)).min();
                self.ask_to_switch_off(now);
            }
            Command::PowerButton => machine.press_power_button(),
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
        let reason = match reason {
            // What the guest did then was not its own doing.
            StopReason::GuestReset | StopReason::GuestPanic | StopReason::Failed(_)
                if machine.ram.image().is_some_and(|image| !image.is_whole()) =>
            {
                StopReason::Failed("the memory file of its snapshot was cut off while it ran from it".into())
            }
            reason => reason,
        };
        // From every state in which there still is a machine, the diagram goes to `Stopping`.
        _ = self.shared.transition(VmState::Stopping);
        drop(machine);
        _ = self.shared.transition(VmState::Stopped(reason));
    }
}
