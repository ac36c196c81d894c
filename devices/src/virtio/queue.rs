//! Virtqueues on loan: what a device may do with a queue during one call, and the guard around it.
//!
//! [`QueueCore`] is a queue's state between calls and belongs to whoever runs the device. For the length of a
//! call it is lent out as a [`VirtQueue`], which bounds what a hostile driver can cause: chain length, bytes,
//! chains per call, and a head index can only be in flight once.

use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::buffers::Buffers;
use super::patience::Patience;
use crate::GuestMemory;
use crate::model::ActivateError;
use crate::snapshot::SnapshotError;
use crate::throttle::Throttle;

/// Longest chain in descriptors that a device accepts: what one vectored system call takes (IOV_MAX).
pub const MAX_CHAIN: usize = 1024;

/// What a driver writes to a transport about one queue before it starts the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueConfig {
    /// Largest size in descriptors on offer.
    pub max_size: u16,
    /// Size in descriptors that the driver chose.
    pub size: u16,
    /// The driver made the queue ready.
    pub ready: bool,
    /// Guest physical address of the descriptor area.
    pub desc: u64,
    /// Guest physical address of the driver area (available ring).
    pub driver: u64,
    /// Guest physical address of the device area (used ring).
    pub device: u64,
}

impl QueueConfig {
    /// A fresh queue of at most `max_size` descriptors.
    pub fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, ..Self::default() }
    }

    /// Whether all of the three areas (virtio 1.3 §2.7) is guest memory. The crate's own check logs an error for
    /// each area that is not, as often as a guest likes.
    fn lies_in(&self, mem: &GuestMemory) -> bool {
        let size = usize::from(self.size);
        let areas = [(self.desc, 16 * size), (self.driver, 6 + 2 * size), (self.device, 6 + 8 * size)];
        areas.into_iter().all(|(address, bytes)| mem.check_range(GuestAddress(address), bytes))
    }
}

/// A way in which the driver broke a queue beyond use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// The available index ran ahead by more than the queue's size.
    AvailIndex,
    /// A head index is not below the queue's size.
    HeadIndex,
    /// A head was made available again while the device still had it.
    HeadInFlight,
    /// A ring could not be read or written.
    Memory,
}

/// The state of one active queue between calls.
#[derive(Debug)]
pub struct QueueCore {
    ring: Queue,
    /// A bit per head index that the device holds.
    in_flight: Box<[u64]>,
    /// Tells heads of this activation from heads of an earlier one.
    epoch: u32,
    fault: Option<Fault>,
    mistakes: u64,
    budget: u16,
    pushed: bool,
    /// Used index up to which the driver was interrupted, or did not want to be.
    announced: u16,
    /// For interrupts that can wait.
    patience: Option<Patience>,
    /// [`Self::position`] when this turn began.
    began: u16,
    /// The last look at the available ring found nothing.
    dry: bool,
    /// In this turn, chains were left alone, and the driver's next one is waited for: behind this position.
    left: Option<u16>,
    /// Which throttle it is subject to.
    lane: usize,
    /// Chains wait for that throttle's tokens.
    throttled: bool,
    waits: u64,
}

/// The state of an active queue for a snapshot: all that is neither in its configuration nor in guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    next_avail: u16,
    next_used: u16,
    announced: u16,
    pushed: bool,
    /// Head indices that the device holds.
    in_flight: Vec<u16>,
    fault: Option<Fault>,
}

/// A [`Head`] that a device holds for longer than a request, for a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldHead {
    index: u16,
    writable: u32,
}

/// The head of a chain that the device holds: handed back exactly once, in [`VirtQueue::push`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a head that is not pushed is lost to the driver"]
pub struct Head {
    index: u16,
    epoch: u32,
    writable: u32,
}

impl Head {
    /// What a snapshot keeps of it; [`VirtQueue::hold_again`] makes a head of it.
    pub fn save(&self) -> HeldHead {
        HeldHead { index: self.index, writable: self.writable }
    }
}

/// A chain of buffers that the driver made available.
#[derive(Debug)]
pub struct Chain<'m> {
    /// To be pushed when the request is done.
    pub head: Head,
    /// Where in the available ring it was.
    position: u16,
    /// What the device reads.
    pub readable: Buffers<'m>,
    /// What the device writes.
    pub writable: Buffers<'m>,
}

impl QueueCore {
    /// Starts a queue as the driver configured it, after checking everything that can be checked now.
    /// `index` is for the error, `epoch` is to differ from that of the queue's previous life.
    ///
    /// A queue that the driver did not make ready is one that it does not want to use: it stays empty.
    pub fn new(
        index: u16,
        config: &QueueConfig,
        event_idx: bool,
        epoch: u32,
        mem: &GuestMemory,
    ) -> Result<Self, ActivateError> {
        let size_error =
            || ActivateError::QueueSize { queue: index, size: config.size, max: config.max_size };
        let address_error = |_| ActivateError::QueueAddress { queue: index };
        let mut ring = Queue::new(config.max_size).map_err(|_| size_error())?;
        if config.ready {
            ring.try_set_size(config.size).map_err(|_| size_error())?;
            ring.try_set_desc_table_address(GuestAddress(config.desc)).map_err(address_error)?;
            ring.try_set_avail_ring_address(GuestAddress(config.driver)).map_err(address_error)?;
            ring.try_set_used_ring_address(GuestAddress(config.device)).map_err(address_error)?;
            ring.set_event_idx(event_idx);
            ring.set_ready(true);
            // The crate takes an available ring at 0 for "not set", and would then refuse every pop.
            if config.driver == 0 || !config.lies_in(mem) {
                return Err(ActivateError::QueueAddress { queue: index });
            }
        }
        let in_flight = vec![0; usize::from(ring.size()).div_ceil(64)].into();
        Ok(Self {
            ring,
            in_flight,
            epoch,
            fault: None,
            mistakes: 0,
            budget: 0,
            pushed: false,
            announced: 0,
            patience: None,
            began: 0,
            dry: false,
            left: None,
            lane: 0,
            throttled: false,
            waits: 0,
        })
    }

    /// The state for a snapshot.
    pub fn save(&self) -> QueueState {
        QueueState {
            next_avail: self.ring.next_avail(),
            next_used: self.ring.next_used(),
            announced: self.announced,
            pushed: self.pushed,
            in_flight: self.held(),
            fault: self.fault,
        }
    }

    /// Takes over the state of a queue with the same configuration, but for the heads that the device holds: it takes them
    /// by [`VirtQueue::hold_again`], and then [`Self::check_held`] looks at them.
    pub fn restore(&mut self, saved: &QueueState) -> Result<(), SnapshotError> {
        // Each chain that was popped was given back, or the device holds it.
        let held = saved.next_avail.wrapping_sub(saved.next_used);
        let adds_up = saved.fault.is_some() || usize::from(held) == saved.in_flight.len();
        let unused = saved.next_avail == 0 && saved.next_used == 0 && saved.fault.is_none();
        if !adds_up || !(self.ring.ready() || unused) {
            return Err(SnapshotError::impossible("position in a queue"));
        }
        self.ring.set_next_avail(saved.next_avail);
        self.ring.set_next_used(saved.next_used);
        (self.announced, self.pushed, self.fault) = (saved.announced, saved.pushed, saved.fault);
        Ok(())
    }

    /// Fails unless the device has taken back the heads that it held: one that it does not know would never be answered.
    pub fn check_held(&mut self, saved: &QueueState) -> Result<(), SnapshotError> {
        if self.fault.is_some() {
            // Nothing is answered in a broken queue, so the device has let go of them.
            let size = self.ring.size();
            for &index in saved.in_flight.iter().filter(|&&index| index < size) {
                let (word, bit) = self.flight_bit(index);
                *word |= bit;
            }
        }
        match self.held() == saved.in_flight {
            true => Ok(()),
            false => Err(SnapshotError::impossible("set of heads in flight")),
        }
    }

    /// Head indices that the device holds, in order.
    fn held(&self) -> Vec<u16> {
        let is_held = |&index: &u16| self.in_flight[usize::from(index / 64)] & 1 << (index % 64) != 0;
        (0..self.ring.size()).filter(is_held).collect()
    }

    /// Makes it subject to throttle number `lane` of those that [`Queues::lend_throttled`] is given.
    pub fn set_lane(&mut self, lane: usize) {
        self.lane = lane;
    }

    /// Lets interrupts wait, if `patient`.
    pub fn set_patient(&mut self, patient: bool) {
        self.patience = patient.then(Patience::default);
    }

    /// When an interrupt that waits is to be sent, with [`Self::end_wait`].
    pub fn interrupt_at(&self) -> Option<Instant> {
        self.patience.as_ref()?.due()
    }

    /// The throttle that chains wait for, if they do.
    pub fn waits_for(&self) -> Option<usize> {
        self.throttled.then_some(self.lane)
    }

    /// How often chains began to wait since the last call of this.
    pub fn take_waits(&mut self) -> u64 {
        std::mem::take(&mut self.waits)
    }

    /// Chains no longer wait for the throttle, for all that the owner knows.
    pub fn stop_waiting(&mut self) {
        self.throttled = false;
    }

    /// How the driver broke this queue, if it did. It stays unusable until the device is reset.
    pub fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// Whether there is a ring to look at: the driver made it ready, and has not broken it.
    fn is_usable(&self) -> bool {
        self.fault.is_none() && self.ring.ready()
    }

    /// Malformed chains since the last call of this.
    pub fn take_mistakes(&mut self) -> u64 {
        std::mem::take(&mut self.mistakes)
    }

    /// How many chains the device holds.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether the driver wants to be interrupted for what was pushed since it was last (virtio 1.3 §2.7.7.2).
    fn wants_interrupt(&mut self, mem: &GuestMemory) -> bool {
        if !self.pushed || !self.is_usable() {
            return false;
        }
        // The used index must be visible before the driver's word is read.
        fence(Ordering::SeqCst);
        let event_idx = self.ring.event_idx_enabled();
        let used_event = if event_idx { 4 + 2 * u64::from(self.ring.size()) } else { 0 };
        let word = mem.load(GuestAddress(self.ring.avail_ring() + used_event), Ordering::Relaxed);
        match word.map(u16::from_le) {
            Ok(used_event) if event_idx => {
                let passed = self.ring.next_used().wrapping_sub(used_event).wrapping_sub(1);
                passed < self.unannounced()
            }
            Ok(flags) => u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0,
            Err(_) => self.break_with(Fault::Memory),
        }
    }

    fn unannounced(&self) -> u16 {
        self.ring.next_used().wrapping_sub(self.announced)
    }

    /// Whether the driver is to be interrupted now for what was pushed. If it can wait, it may be only later, at
    /// [`Self::interrupt_at`].
    pub fn take_notification(&mut self, mem: &GuestMemory) -> bool {
        let wanted = self.wants_interrupt(mem);
        let (used, size) = (self.unannounced(), self.ring.size());
        if let Some(patience) = &mut self.patience {
            if wanted && patience.holds_back(used, size) {
                return false;
            }
            patience.paid();
        }
        self.announced();
        wanted
    }

    /// As [`Self::take_notification`], for what has waited long enough.
    pub fn end_wait(&mut self, mem: &GuestMemory) -> bool {
        let wanted = self.wants_interrupt(mem);
        if let Some(patience) = &mut self.patience {
            if wanted { patience.ended() } else { patience.paid() }
        }
        self.announced();
        wanted
    }

    fn announced(&mut self) {
        (self.pushed, self.announced) = (false, self.ring.next_used());
    }

    /// Asks the driver not to kick while the queue is being served anyway.
    pub fn disable_kicks(&mut self, mem: &GuestMemory) {
        if self.is_usable() && self.ring.disable_notification(mem).is_err() {
            self.break_with(Fault::Memory);
        }
    }

    /// Asks for kicks again. Returns whether chains came in meanwhile, which no kick will announce.
    pub fn enable_kicks(&mut self, mem: &GuestMemory) -> bool {
        if !self.is_usable() {
            return false;
        }
        let position = self.position();
        // With event index, the driver kicks when it passes the position that it is told.
        self.ring.set_next_avail(self.left.unwrap_or(position));
        let enabled = self.ring.enable_notification(mem);
        self.ring.set_next_avail(position);
        match enabled {
            Ok(more) => more,
            Err(_) => self.break_with(Fault::Memory),
        }
    }

    /// Where the device is in the available ring: moves when a chain is popped.
    pub fn position(&self) -> u16 {
        self.ring.next_avail()
    }

    /// A turn begins.
    pub fn begin_turn(&mut self) {
        self.began = self.position();
        self.left = None;
    }

    /// Whether chains were popped in this turn.
    pub fn has_moved(&self) -> bool {
        self.position() != self.began
    }

    /// Whether the driver's next chain is waited for, behind those that were left alone.
    pub fn waits_for_more(&self) -> bool {
        self.left.is_some()
    }

    /// Whether the device, in the last call, looked for chains until there were none.
    pub fn was_dry(&self) -> bool {
        self.dry
    }

    /// Records that the driver broke the queue; always false, for the callers' convenience.
    fn break_with(&mut self, fault: Fault) -> bool {
        self.fault.get_or_insert(fault);
        false
    }

    fn flight_bit(&mut self, index: u16) -> (&mut u64, u64) {
        (&mut self.in_flight[usize::from(index / 64)], 1 << (index % 64))
    }

    /// The driver may not use `head` again before this: clears its bit and writes the used ring.
    fn push(&mut self, mem: &GuestMemory, head: Head, written: u32) {
        if head.epoch != self.epoch || !self.is_usable() {
            return;
        }
        let (word, bit) = self.flight_bit(head.index);
        *word &= !bit;
        match self.ring.add_used(mem, head.index, written.min(head.writable)) {
            Ok(()) => self.pushed = true,
            Err(_) => _ = self.break_with(Fault::Memory),
        }
    }
}

/// All queues of a device on loan for one call.
#[derive(Debug)]
pub struct Queues<'a> {
    cores: &'a mut [QueueCore],
    throttles: &'a mut [Throttle],
    mem: &'a GuestMemory,
}

impl<'a> Queues<'a> {
    /// Lends `cores` out, each with a fresh budget of as many chains as it has descriptors.
    pub fn lend(cores: &'a mut [QueueCore], mem: &'a GuestMemory) -> Self {
        Self::lend_throttled(cores, &mut [], mem)
    }

    /// As [`Self::lend`], each subject to the throttle of its lane if there is one.
    pub fn lend_throttled(
        cores: &'a mut [QueueCore],
        throttles: &'a mut [Throttle],
        mem: &'a GuestMemory,
    ) -> Self {
        for core in cores.iter_mut() {
            core.budget = core.ring.size();
            core.dry = false;
        }
        // One look at the clock a turn, and none without limits.
        if throttles.iter().any(Throttle::is_limited) {
            let now = Instant::now();
            throttles.iter_mut().for_each(|throttle| throttle.refill(now));
        }
        Self { cores, throttles, mem }
    }

    /// Guest memory, for a device whose requests outlive the call.
    pub fn memory(&self) -> &'a GuestMemory {
        self.mem
    }

    /// Queue number `index`.
    ///
    /// # Panics
    /// When the device has no such queue: the device names its own queues, never the driver.
    pub fn get(&mut self, index: u16) -> VirtQueue<'_> {
        let core = &mut self.cores[usize::from(index)];
        let throttle = self.throttles.get_mut(core.lane).filter(|throttle| throttle.is_limited());
        VirtQueue { core, throttle, mem: self.mem }
    }
}

/// A queue on loan for one call.
#[derive(Debug)]
pub struct VirtQueue<'a> {
    core: &'a mut QueueCore,
    throttle: Option<&'a mut Throttle>,
    mem: &'a GuestMemory,
}

impl<'a> VirtQueue<'a> {
    /// Takes the next chain. `None`: there is none, this call's budget is used up, the queue is broken, or it has to
    /// wait for its throttle. In the last case the owner comes back when it has tokens again.
    ///
    /// A malformed chain never gets here: it is given back with length 0 and counted.
    pub fn pop(&mut self) -> Option<Chain<'a>> {
        loop {
            if !self.core.is_usable() || self.core.budget == 0 {
                return None;
            }
            if self.throttle.as_ref().is_some_and(|throttle| !throttle.permits()) {
                // A queue without chains waits for its driver and not for tokens.
                let end = self.core.ring.avail_idx(self.mem, Ordering::Acquire);
                self.core.dry = end.is_ok_and(|end| end.0 == self.core.position());
                if !self.core.dry {
                    self.core.waits += u64::from(!self.core.throttled);
                    self.core.throttled = true;
                }
                return None;
            }
            let position = self.core.position();
            let mut descriptors = match self.core.ring.iter(self.mem) {
                Ok(mut available) => match available.next() {
                    Some(descriptors) => descriptors,
                    None => {
                        self.core.dry = true;
                        return None;
                    }
                },
                Err(virtio_queue::Error::InvalidAvailRingIndex) => {
                    self.core.break_with(Fault::AvailIndex);
                    return None;
                }
                Err(_) => {
                    self.core.break_with(Fault::Memory);
                    return None;
                }
            };
            self.core.budget -= 1;
            let index = descriptors.head_index();
            if index >= self.core.ring.size() {
                self.core.break_with(Fault::HeadIndex);
                return None;
            }
            let (word, bit) = self.core.flight_bit(index);
            if *word & bit != 0 {
                self.core.break_with(Fault::HeadInFlight);
                return None;
            }
            *word |= bit;
            let head = Head { index, epoch: self.core.epoch, writable: 0 };
            match Buffers::of_chain(&mut descriptors, self.mem) {
                Some((readable, writable)) => {
                    let writable_len = u32::try_from(writable.len()).unwrap_or(u32::MAX);
                    let head = Head { writable: writable_len, ..head };
                    return Some(Chain { head, position, readable, writable });
                }
                None => {
                    self.core.mistakes += 1;
                    self.core.push(self.mem, head, 0);
                }
            }
        }
    }

    /// Puts the chain that was popped last back, as if it had not been popped.
    ///
    /// The ring cannot be rewound over a chain that came after it and was given back already, which only
    /// happens when that one was of no use. Then this one is given back too, with length 0.
    pub fn unpop(&mut self, chain: Chain<'a>) {
        if chain.head.epoch != self.core.epoch || !self.core.is_usable() {
            return;
        }
        if chain.position != self.core.position().wrapping_sub(1) {
            return self.core.push(self.mem, chain.head, 0);
        }
        let (word, bit) = self.core.flight_bit(chain.head.index);
        *word &= !bit;
        self.core.dry = false;
        self.core.ring.go_to_previous_position();
        self.core.budget += 1;
    }

    /// As [`Self::unpop`], and the driver's next chain, behind those that it had [`Self::offered`], is to be announced by a
    /// kick all the same.
    pub fn leave(&mut self, chain: Chain<'a>, offered: u16) {
        self.unpop(chain);
        self.core.left = Some(offered);
    }

    /// How many chains the driver has made available so far, modulo 65536.
    pub fn offered(&self) -> u16 {
        self.core.ring.avail_idx(self.mem, Ordering::Acquire).map_or(0, |index| index.0)
    }

    /// Gives a chain back to the driver, with the number of bytes written to it from its start.
    ///
    /// More than the chain has room for is never reported. A head from before a reset is ignored.
    pub fn push(&mut self, head: Head, written: u32) {
        self.core.push(self.mem, head, written);
    }

    /// A head that the device held when its snapshot was made, and holds again. It can be held once.
    pub fn hold_again(&mut self, held: HeldHead) -> Result<Head, SnapshotError> {
        let HeldHead { index, writable } = held;
        if index >= self.core.ring.size() {
            return Err(SnapshotError::impossible("head index"));
        }
        let (word, bit) = self.core.flight_bit(index);
        if *word & bit != 0 {
            return Err(SnapshotError::impossible("head in flight twice"));
        }
        *word |= bit;
        Ok(Head { index, epoch: self.core.epoch, writable })
    }

    /// One operation of so many bytes: to be called once for each request or packet, as soon as its size is known,
    /// and before the next chain is taken.
    pub fn charge(&mut self, bytes: usize) {
        if let Some(throttle) = &mut self.throttle {
            throttle.charge(bytes as u64);
        }
    }

    /// Counts a request that broke the specification in a way that only the device can see.
    pub fn count_mistake(&mut self) {
        self.core.mistakes += 1;
    }

    /// How many chains this call may still take.
    pub fn budget(&self) -> u16 {
        self.core.budget
    }

    /// Whether the budget of this call is used up, so that chains may be left.
    pub fn exhausted(&self) -> bool {
        self.core.budget == 0
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
