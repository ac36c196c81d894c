//! Saving a machine: its memory is written while it runs, and then the control thread lets it stand still, and takes its
//! state and what of the memory has been written meanwhile.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

use crate::config::VmConfig;
use crate::control::{Control, Message};
use crate::machine::{Machine, Tracking};
use crate::memory::GuestRam;
use crate::snapshot::memory_file::Pages;
use crate::snapshot::memory_writer::{MemoryWriter, touched};
use crate::snapshot::{Base, Captured, DiskTarget, SnapshotFailed, SnapshotKind};
use crate::state::VmState;
use crate::vm::VmError;

/// Memory that can be written while its machine runs.
pub(crate) struct Running {
    pub ram: GuestRam,
    /// What a diff has so far.
    pub pending: Option<Pages>,
}

/// What a snapshot does, on its caller's thread, before the machine stands still. Until it is dropped, writes are logged.
pub(crate) struct Ahead<'a> {
    control: &'a Sender<Message>,
    running: Running,
    /// See [`SnapshotKind::lasts`].
    lasts: bool,
}

impl<'a> Ahead<'a> {
    /// Begins to log what is written; `None` if the machine stands still anyway.
    pub fn begin(control: &'a Sender<Message>, kind: SnapshotKind) -> Result<Option<Self>, VmError> {
        let running = ask(control, |reply| Message::BeginAhead { kind, reply })?;
        Ok(running.map(|running| Self { control, running, lasts: kind.lasts() }))
    }

    /// Writes the memory, and then what was written meanwhile. A third time would hardly find less.
    pub fn write(&self, memory: &mut MemoryWriter) -> Result<(), VmError> {
        let Running { ram, pending } = &self.running;
        let first = match pending {
            Some(pages) => pages.clone(),
            None => touched(ram).map_err(failed)?,
        };
        memory.write(ram, &first).map_err(failed)?;
        if self.lasts {
            memory.sync().map_err(failed)?;
        }
        let again = ask(self.control, Message::DirtyPages)?;
        memory.write(ram, &again).map_err(failed)
    }
}

impl Drop for Ahead<'_> {
    fn drop(&mut self) {
        // It fails only when the machine has ended.
        _ = self.control.send(Message::EndAhead);
    }
}

/// Asks the control thread.
pub(crate) fn ask<T>(
    control: &Sender<Message>,
    question: impl FnOnce(Sender<Result<T, VmError>>) -> Message,
) -> Result<T, VmError> {
    let (reply, answer) = mpsc::channel();
    control.send(question(reply)).map_err(|_| VmError::Gone)?;
    answer.recv().map_err(|_| VmError::Gone)?
}

fn failed(source: io::Error) -> VmError {
    SnapshotFailed::Io { action: "write", path: "memory".into(), source }.into()
}

impl Control {
    /// Begins to log what a running machine writes.
    pub fn begin_ahead(&mut self, kind: SnapshotKind) -> Result<Option<Running>, VmError> {
        let is_running = self.can_be_saved()?;
        let machine = self.machine.as_mut().ok_or(VmError::Gone)?;
        if base(machine, kind)?.is_some_and(|(base, _)| !base.is_there()) {
            let remedy = "the one that it was to be a difference to is gone; make a full snapshot first";
            return Err(SnapshotFailed::NoBase { remedy }.into());
        }
        // What other processes write to shared memory is in no log.
        if !is_running || machine.ram.shared_file().is_some() {
            return Ok(None);
        }
        machine.begin_log()?;
        let dirty = machine.take_dirty_pages();
        if dirty.is_err() {
            machine.end_log()?;
        }
        dirty?;
        let pending = match (kind, &machine.tracking) {
            (SnapshotKind::Diff, Some(tracking)) => Some(tracking.pending.clone()),
            _ => None,
        };
        Ok(Some(Running { ram: machine.ram.clone(), pending }))
    }

    /// What was written since the last call.
    pub fn dirty_pages(&mut self) -> Result<Pages, VmError> {
        Ok(self.machine.as_mut().ok_or(VmError::Gone)?.take_dirty_pages()?)
    }

    /// Ends what [`Self::begin_ahead`] has begun.
    pub fn end_ahead(&self) {
        if let Some(Err(error)) = self.machine.as_ref().map(Machine::end_log) {
            tracing::warn!(%error, "what the guest writes is still logged");
        }
    }

    /// Whether the machine runs; fails if it has nothing to save.
    fn can_be_saved(&self) -> Result<bool, SnapshotFailed> {
        match &*self.shared.lock() {
            VmState::Running => Ok(true),
            VmState::Paused => Ok(false),
            state => Err(SnapshotFailed::NotRunning { state: state.name() }),
        }
    }

    /// Saves the machine. Of its memory, what is not in `memory` yet is written: with `ahead` only what the log has.
    pub fn capture(
        &mut self,
        memory: &mut MemoryWriter,
        ahead: bool,
        disks: &DiskTarget,
        kind: SnapshotKind,
    ) -> Result<Captured, VmError> {
        let running = self.can_be_saved()?;
        let machine = self.machine.as_mut().ok_or(VmError::Gone)?;
        let config = self.shared.config().clone();
        let start = Instant::now();
        if running {
            machine.pause()?;
        }
        let captured = Self::save(machine, memory, ahead, kind, config, self.inbox.exit_status())
            .and_then(|captured| Ok(Captured { disks: disks.save(machine)?, ..captured }));
        if running {
            machine.resume()?;
        }
        let aliases = self.shared.aliases.clone();
        Ok(Captured { paused: start.elapsed(), aliases, ..captured? })
    }

    /// Saves a machine that stands still.
    fn save(
        machine: &mut Machine,
        memory: &mut MemoryWriter,
        ahead: bool,
        kind: SnapshotKind,
        config: VmConfig,
        exit_status: Option<u8>,
    ) -> Result<Captured, VmError> {
        let sections = machine.save(exit_status).map_err(SnapshotFailed::Save)?;
        // There are logs of a machine that is tracked, or whose memory was written while it ran.
        let fresh = match ahead || machine.tracking.is_some() {
            true => Some(machine.take_dirty_pages()?),
            false => None,
        };
        let diff = base(machine, kind)?;
        let pages = match (fresh.filter(|_| ahead), &diff) {
            (Some(fresh), _) => fresh,
            (None, Some((_, pages))) => pages.clone(),
            (None, None) => touched(&machine.ram).map_err(failed)?,
        };
        memory.write(&machine.ram, &pages).map_err(failed)?;
        machine.check_memory()?;
        let (written, disks, aliases) = (memory.written(), Vec::new(), BTreeMap::new());
        Ok(Captured { sections, written, disks, config, aliases, paused: Duration::ZERO, diff })
    }

    /// The pages that were dirty when the machine was captured are in the snapshot `base`.
    pub fn captured(&mut self, base: Base) {
        if let Some(tracking) = self.machine.as_mut().and_then(|machine| machine.tracking.as_mut()) {
            tracking.pending.clear();
            tracking.base = Some(base);
        }
    }
}

/// What a snapshot of this kind is a difference to, and in which pages so far.
fn base(machine: &Machine, kind: SnapshotKind) -> Result<Option<(Base, Pages)>, SnapshotFailed> {
    match (kind, &machine.tracking) {
        (SnapshotKind::Full | SnapshotKind::Clones, _) => Ok(None),
        (SnapshotKind::Diff, Some(Tracking { base: Some(base), pending })) => {
            Ok(Some((base.clone(), pending.clone())))
        }
        (SnapshotKind::Diff, Some(_)) => Err(SnapshotFailed::NoBase { remedy: "make a full snapshot first" }),
        (SnapshotKind::Diff, None) => Err(SnapshotFailed::NoBase { remedy: "start it with --track-dirty" }),
    }
}
