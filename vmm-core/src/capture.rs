//! What the control thread does for a snapshot: it lets the machine stand still, and takes its state and its memory.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::config::VmConfig;
use crate::control::Control;
use crate::machine::{Machine, Tracking};
use crate::snapshot::memory_file::{self, Which};
use crate::snapshot::{Base, Captured, MemoryTarget, SnapshotFailed, SnapshotKind};
use crate::state::VmState;
use crate::vm::VmError;

impl Control {
    pub fn capture(&mut self, memory: &MemoryTarget, kind: SnapshotKind) -> Result<Captured, VmError> {
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
    pub fn captured(&mut self, base: Base) {
        if let Some(tracking) = self.machine.as_mut().and_then(|machine| machine.tracking.as_mut()) {
            tracking.pending.clear();
            tracking.base = Some(base);
        }
    }
}
