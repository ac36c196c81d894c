//! A device with everything that its owner keeps for it: queues, throttles, and what the driver is to be told.
//!
//! The owner gives it turns: after a kick, after an event on the host, when tokens have come back. What all devices
//! need around their own logic is here, once. It has no thread and no event loop, so that tests and fuzz targets run
//! what the machine runs.

use std::any::Any;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ciborium::Value;
use serde::{Deserialize, Serialize};
use tracing::debug;

use super::F_EVENT_IDX;
use super::config_space::{ConfigSpace, ConfigState};
use super::queue::{QueueConfig, QueueCore, QueueState, Queues};
use crate::GuestMemory;
use crate::model::{ActivateError, Counters, HostSource, Notifier, Progress, UpdateError, VirtioDevice};
use crate::snapshot::SnapshotError;
use crate::storage::{Storage, StorageError};
use crate::throttle::{Limits, LogLimit, Throttle, ThrottleState};

/// How often a queue that fills as fast as it is served is served in one turn.
const ROUNDS: usize = 4;

/// A limit of a token each few microseconds is served in portions.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);

/// A device and its queues.
pub struct Unit {
    device: Box<dyn VirtioDevice>,
    mem: GuestMemory,
    notifier: Arc<dyn Notifier>,
    counters: Arc<Counters>,
    config: Arc<ConfigSpace>,
    /// Generation of the configuration space that the driver knows, or was told of.
    generation: u32,
    /// Empty while the device is not active.
    cores: Vec<QueueCore>,
    throttles: Vec<Throttle>,
    /// The driver broke a queue in this activation.
    broken: bool,
    /// Tells this activation from the others.
    epoch: u32,
    log: LogLimit,
}

/// The state of a unit for a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnitState {
    /// None while the device is not active.
    queues: Option<Vec<QueueState>>,
    throttles: Vec<ThrottleState>,
    broken: bool,
    config: ConfigState,
    counters: Vec<(String, u64)>,
    /// See [`VirtioDevice::save`].
    device: Value,
}

impl UnitState {
    /// Whether the driver has started the device.
    pub fn is_active(&self) -> bool {
        self.queues.is_some()
    }

    /// The bytes of the configuration space.
    pub fn config(&self) -> &[u8] {
        self.config.bytes()
    }

    /// Whether the driver was told that it broke a queue.
    pub fn is_broken(&self) -> bool {
        self.broken
    }
}

impl Unit {
    /// A device that is not active, with these limits for its lanes.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        limits: &[Limits],
        notifier: Arc<dyn Notifier>,
        mem: GuestMemory,
    ) -> Self {
        let config = device.config_space();
        Self {
            counters: device.counters(),
            generation: config.generation(),
            config,
            device,
            mem,
            notifier,
            cores: Vec::new(),
            throttles: limits.iter().map(Throttle::new).collect(),
            broken: false,
            epoch: 0,
            log: LogLimit::default(),
        }
    }

    /// Whether the driver has started the device.
    pub fn is_active(&self) -> bool {
        !self.cores.is_empty()
    }

    /// Counters of the device.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// What the device wants to have watched; to be asked again after [`Self::activate`] and [`Self::update`].
    pub fn host_sources(&self) -> Vec<HostSource> {
        self.device.host_sources()
    }

    /// The driver started the device.
    pub fn activate(&mut self, features: u64, queues: &[QueueConfig]) -> Result<(), ActivateError> {
        self.epoch = self.epoch.wrapping_add(1);
        let event_idx = features & F_EVENT_IDX != 0;
        let core = |(i, config)| {
            let mut core = QueueCore::new(i, config, event_idx, self.epoch, &self.mem)?;
            core.set_lane(self.device.lane(i));
            core.set_patient(self.device.can_wait(i));
            Ok(core)
        };
        self.cores = (0u16..).zip(queues).map(core).collect::<Result<_, _>>()?;
        self.generation = self.config.generation();
        self.device.activate(features);
        Ok(())
    }

    /// The driver reset the device.
    pub fn reset(&mut self) {
        self.device.reset();
        self.cores.clear();
        self.broken = false;
    }

    /// The state for a snapshot. The device is drained.
    pub fn save(&self) -> Result<UnitState, SnapshotError> {
        let counters =
            self.counters.common().map(|(name, counter)| (name.to_owned(), counter.load(Ordering::Relaxed)));
        Ok(UnitState {
            queues: self.is_active().then(|| self.cores.iter().map(QueueCore::save).collect()),
            throttles: self.throttles.iter().map(Throttle::save).collect(),
            broken: self.broken,
            config: self.config.save(),
            counters: counters.into(),
            device: self.device.save()?,
        })
    }

    /// See [`VirtioDevice::storage`].
    pub fn storage(&self) -> Option<Storage> {
        self.device.storage()
    }

    /// See [`VirtioDevice::save_storage`].
    pub fn save_storage(&self, to: &File) -> Result<(), StorageError> {
        self.device.save_storage(to)
    }

    /// Takes over the state of a device whose driver had negotiated `features` and set up `queues`.
    pub fn restore(
        &mut self,
        saved: &UnitState,
        features: u64,
        queues: &[QueueConfig],
    ) -> Result<(), SnapshotError> {
        for (name, counter) in self.counters.common() {
            let value = saved.counters.iter().find(|(saved, _)| saved == name);
            counter.store(value.map_or(0, |&(_, value)| value), Ordering::Relaxed);
        }
        self.throttles.iter_mut().zip(&saved.throttles).for_each(|(throttle, saved)| throttle.restore(saved));
        self.config.compare(&saved.config, |saved, now| self.device.check_config(saved, now))?;
        let told = self.config.generation();
        let differs = self.config.restore(&saved.config);
        let Some(states) = &saved.queues else {
            return if saved.broken { Err(SnapshotError::impossible("broken device")) } else { Ok(()) };
        };
        if states.len() != queues.len() {
            return Err(SnapshotError::impossible("number of queues"));
        }
        self.activate(features, queues).map_err(|error| SnapshotError::Malformed(error.to_string()))?;
        self.cores.iter_mut().zip(states).try_for_each(|(core, state)| core.restore(state))?;
        self.broken = saved.broken;
        if self.broken && self.cores.iter().all(|core| core.fault().is_none()) {
            return Err(SnapshotError::impossible("broken device"));
        }
        let (device, mut queues) = self.lend();
        device.restore(&mut queues, saved.device.clone())?;
        self.cores.iter_mut().zip(states).try_for_each(|(core, state)| core.check_held(state))?;
        if differs {
            // The driver hears of it in the first turn.
            self.generation = told;
        }
        Ok(())
    }

    /// Tells the driver of everything that it may not have heard of. An interrupt too many does no harm, and one that
    /// was on its way when a snapshot was made is in no saved state.
    pub fn announce(&mut self) {
        if self.is_active() {
            (0u16..).take(self.cores.len()).for_each(|queue| self.notifier.queue_used(queue));
            self.settle();
        }
    }

    fn lend(&mut self) -> (&mut dyn VirtioDevice, Queues<'_>) {
        (&mut *self.device, Queues::lend_throttled(&mut self.cores, &mut self.throttles, &self.mem))
    }

    /// Serves `queue` after its driver's kick. [`Progress::More`]: this is to be called again soon, and the driver
    /// will not kick before that. `again` is called with other queues that are to be served soon.
    pub fn serve_queue(&mut self, queue: u16, again: impl FnMut(u16)) -> Progress {
        self.turn(|unit| unit.serve_rounds(queue), Some(queue), again)
    }

    /// Serves the host's event `token`. [`Progress::More`]: this is to be called again soon. `again` is called with
    /// queues for which [`Self::serve_queue`] is to be called soon.
    pub fn serve_source(&mut self, token: u32, again: impl FnMut(u16)) -> Progress {
        let serve = |unit: &mut Self| {
            let (device, mut queues) = unit.lend();
            device.host_event(&mut queues, token)
        };
        self.turn(serve, None, again)
    }

    /// A turn of `serve`, which takes care of queue `but` itself.
    fn turn(
        &mut self,
        serve: impl FnOnce(&mut Self) -> Progress,
        but: Option<u16>,
        mut again: impl FnMut(u16),
    ) -> Progress {
        self.cores.iter_mut().for_each(QueueCore::begin_turn);
        let progress = serve(self);
        // With event index, a driver kicks only when it passes the position that it was last told. A device that
        // used up a queue's chains here waits for that kick.
        for queue in (0u16..).take(self.cores.len()).filter(|&queue| Some(queue) != but) {
            let core = &mut self.cores[usize::from(queue)];
            let more = core.has_moved() && core.enable_kicks(&self.mem);
            if more && self.serve_rounds(queue) == Progress::More {
                again(queue);
            }
        }
        self.settle();
        progress
    }

    /// A driver that is told not to kick while its queue is served anyway, or that suppresses kicks by event index,
    /// announces nothing. So kicks are turned on again before a turn ends, and the queue is looked at once more.
    fn serve_rounds(&mut self, queue: u16) -> Progress {
        let at = usize::from(queue);
        self.cores[at].disable_kicks(&self.mem);
        self.cores[at].stop_waiting();
        for _ in 0..ROUNDS {
            let before = self.cores[at].position();
            let (device, mut queues) = self.lend();
            if device.process(&mut queues, queue) == Progress::More {
                return Progress::More;
            }
            let core = &mut self.cores[at];
            if core.waits_for().is_some() {
                // The owner comes back, whether or not the driver kicks.
                return Progress::Done;
            }
            // Chains that came in before kicks were on again are served now. Chains that the device saw and left
            // alone wait for the host, not for the driver.
            let left_alone = core.position() == before && !core.was_dry();
            if !core.enable_kicks(&self.mem) || (left_alone && !core.waits_for_more()) {
                return Progress::Done;
            }
        }
        // Kicks are on, but for the chains that were just seen none may come.
        Progress::More
    }

    /// When chains that wait for a throttle's tokens may go on, if any do.
    fn tokens_at(&self) -> Option<Instant> {
        self.cores.iter().filter_map(|core| self.throttles.get(core.waits_for()?)?.permits_at()).min()
    }

    /// When [`Self::serve_waiting`] is to be called, if anything waits for tokens or to be told to the driver.
    pub fn due_at(&self) -> Option<Instant> {
        let tokens = self.tokens_at().map(|at| at.max(Instant::now() + SHORTEST_WAIT));
        self.cores.iter().filter_map(QueueCore::interrupt_at).chain(tokens).min()
    }

    /// Sends interrupts that have waited long enough. `again` is called with queues whose chains may go on: they are to be
    /// served.
    pub fn serve_waiting(&mut self, again: impl FnMut(u16)) {
        let now = Instant::now();
        self.end_waits(|at| at <= now);
        if self.tokens_at().is_some_and(|at| at <= now) {
            self.waiting_queues().for_each(again);
        }
    }

    /// The queues whose chains wait for tokens.
    pub fn waiting_queues(&self) -> impl Iterator<Item = u16> + '_ {
        (0u16..).zip(&self.cores).filter(|(_, core)| core.waits_for().is_some()).map(|(queue, _)| queue)
    }

    fn end_waits(&mut self, is_due: impl Fn(Instant) -> bool) {
        for (queue, core) in (0u16..).zip(&mut self.cores) {
            if core.interrupt_at().is_some_and(&is_due) && core.end_wait(&self.mem) {
                self.notifier.queue_used(queue);
            }
        }
    }

    /// Finishes all requests in flight, and tells the driver of all that it is to be told.
    pub fn drain(&mut self) {
        if self.is_active() {
            let (device, mut queues) = self.lend();
            device.drain(&mut queues);
            self.settle();
            self.end_waits(|_| true);
        }
    }

    /// Takes over a changed configuration, see [`VirtioDevice::update`].
    pub fn update(&mut self, config: &dyn Any) -> Result<(), UpdateError> {
        self.drain();
        let updated = self.device.update(config);
        self.settle();
        updated
    }

    /// New limits, with full buckets. Every waiting queue is to be served again.
    pub fn set_limits(&mut self, limits: &[Limits]) {
        self.throttles = limits.iter().map(Throttle::new).collect();
    }

    /// After a turn: interrupts for what was used, news of the configuration space, the count of mistakes and of
    /// waits, and, once an activation, DEVICE_NEEDS_RESET for a queue that the driver broke.
    fn settle(&mut self) {
        for (queue, core) in (0u16..).zip(&mut self.cores) {
            if core.take_notification(&self.mem) {
                self.notifier.queue_used(queue);
            }
            Counters::add(&self.counters.guest_mistakes, core.take_mistakes());
            Counters::add(&self.counters.throttled, core.take_waits());
            if let (Some(fault), false) = (core.fault(), self.broken) {
                if self.log.permits() {
                    debug!(queue, ?fault, "the driver broke a virtqueue; the device needs a reset");
                }
                Counters::add(&self.counters.guest_mistakes, 1);
                self.broken = true;
                self.notifier.needs_reset();
            }
        }
        let generation = self.config.generation();
        if std::mem::replace(&mut self.generation, generation) != generation && self.is_active() {
            self.notifier.config_changed();
        }
    }
}

#[cfg(test)]
#[path = "unit_tests.rs"]
mod tests;
