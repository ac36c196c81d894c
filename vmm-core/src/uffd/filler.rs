//! The thread that fills a restored guest's memory: what is asked for first, and then the rest.
//!
//! A page is pending until it was brought in or given back, and each is brought in once: whatever is missing and not
//! pending is zero.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::GuestMemory;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tracing::{Span, debug};

use super::sys::{Event, Userfault};
use super::touched::{BLOCK, MAX_BLOCKS, Touched, TouchedFile};
use super::{FaultsError, TellLoss, places, register};
use crate::memory::{GuestRam, RamRegion};
use crate::snapshot::memory_file::{MemoryImage, Pages, Run};

/// What is brought in for who asks for a page of it, unless that is recorded: then it is a block.
const AROUND: u64 = 4 * BLOCK;
/// What is brought in between two looks at who waits.
const STEP: u64 = 16 * BLOCK;
/// Of blocks that were touched one after the other, so many are brought in from the lowest up.
const AT_ONCE: usize = 64;
/// So many runs of them the disk may read ahead.
const AHEAD: usize = 256;
/// How long after somebody had to wait the rest stays where it is: there may be more to ask for.
const QUIET: Duration = Duration::from_millis(1);
/// How long what a guest touches first is recorded. The rest is not brought in meanwhile, so that all of it is seen; nor is it
/// when that is known, so that this thread and the guest's are not in each other's way.
const FIRST: Duration = Duration::from_millis(500);
/// How long memory that is lost keeps those waiting who ask for it, at most. The machine is ended before that.
const LOST_WAIT: Duration = Duration::from_secs(5);

/// The thread, seen from elsewhere. Dropping it ends the thread, and what is pending becomes zero.
#[derive(Debug)]
pub(crate) struct Filler {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    pending: Mutex<Pages>,
    /// Signalled when one of the flags is set.
    changed: OwnedFd,
    stop: AtomicBool,
    guest_runs: AtomicBool,
    give_up: AtomicBool,
    loss: Mutex<Loss>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Loss {
    tell: Option<TellLoss>,
    reason: Option<String>,
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, Pages> {
        self.pending.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn loss(&self) -> MutexGuard<'_, Loss> {
        self.loss.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Nothing has changed since it was looked at.
    fn clear(&self) {
        // It fails only when that is so anyway.
        _ = rustix::io::read(&self.changed, &mut [0_u8; 8]);
    }

    fn set(&self, flag: &AtomicBool) {
        flag.store(true, Ordering::Release);
        // It can only fail when the counter is full, and then the event is pending anyway.
        _ = rustix::io::write(&self.changed, &1_u64.to_ne_bytes());
    }
}

impl Filler {
    /// Brings `image` into `ram`, which is empty. What guests before have touched first comes first; until that is known to be
    /// all, what this one touches is recorded in `touched`.
    pub fn start(
        ram: &GuestRam,
        image: Arc<MemoryImage>,
        touched: Option<TouchedFile>,
    ) -> Result<Self, FaultsError> {
        let pending = image.data();
        let fault = register(ram)?;
        let changed = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let changed = changed.map_err(|error| FaultsError::Thread(error.into()))?;
        let shared = Arc::new(Shared {
            pending: Mutex::new(pending),
            changed,
            stop: AtomicBool::new(false),
            guest_runs: AtomicBool::new(false),
            give_up: AtomicBool::new(false),
            loss: Mutex::default(),
        });
        let first = touched.as_ref().and_then(|touched| touched.read(ram.size())).unwrap_or_default();
        let rest = if touched.is_some() { Rest::AfterStart } else { Rest::Now };
        let worker = Worker {
            fault,
            regions: places(ram),
            _memory: ram.memory().clone(),
            image,
            shared: shared.clone(),
            first: runs_of(&first.blocks, ram.size()),
            recorder: touched.filter(|_| !first.whole).map(|file| Recorder::new(file, first, ram.size())),
            rest,
            next: 0,
            waiting: Vec::new(),
            buffer: Vec::new(),
        };
        let span = Span::current();
        let run = move || span.in_scope(|| worker.run());
        let thread = std::thread::Builder::new().name("memory".into()).spawn(run);
        Ok(Self { shared, thread: Mutex::new(Some(thread.map_err(FaultsError::Thread)?)) })
    }

    /// Pages that are not there yet and are no zeroes.
    pub fn pending(&self) -> Pages {
        self.shared.pending().clone()
    }

    /// Whom to tell when memory cannot be read. Fails if that is so already.
    pub fn watch(&self, tell: TellLoss) -> Result<(), FaultsError> {
        let mut loss = self.shared.loss();
        match &loss.reason {
            Some(reason) => Err(FaultsError::Lost(reason.clone())),
            None => {
                loss.tell = Some(tell);
                Ok(())
            }
        }
    }

    /// The guest runs from now on.
    pub fn guest_runs(&self) {
        self.shared.set(&self.shared.guest_runs);
    }

    /// Memory could not be read.
    pub fn check(&self) -> Result<(), FaultsError> {
        self.shared.loss().reason.clone().map_or(Ok(()), |reason| Err(FaultsError::Lost(reason)))
    }

    /// Nobody is to wait any more for memory that is lost.
    pub fn give_up_lost(&self) {
        self.shared.set(&self.shared.give_up);
    }

    /// Ends the thread.
    pub fn finish(&self) {
        self.shared.set(&self.shared.stop);
        let thread = self.thread.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(thread) = thread {
            _ = thread.join();
        }
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Runs of bytes with these blocks of a memory of so many bytes, the first one last.
fn runs_of(blocks: &[u32], memory: u64) -> Vec<Run> {
    let mut runs = Vec::<Run>::new();
    for blocks in blocks.chunks(AT_ONCE) {
        let mut starts: Vec<u64> = blocks.iter().map(|&block| u64::from(block) * BLOCK).collect();
        starts.sort_unstable();
        let before = runs.len();
        for start in starts {
            let bytes = BLOCK.min(memory - start);
            match runs[before..].last_mut() {
                Some((first, len)) if *first + *len == start && *len < STEP => *len += bytes,
                _ => runs.push((start, bytes)),
            }
        }
    }
    runs.reverse();
    runs
}

/// Keeps which blocks are touched, in their order.
struct Recorder {
    file: TouchedFile,
    touched: Touched,
    seen: Pages,
}

/// When comes what nobody has asked for.
enum Rest {
    /// Some time after the guest's start.
    AfterStart,
    At(Instant),
    Now,
}

impl Recorder {
    /// Begins with what is known.
    fn new(file: TouchedFile, touched: Touched, bytes: u64) -> Self {
        let mut seen = Pages::none(bytes);
        touched.blocks.iter().for_each(|&block| seen.add(u64::from(block) * BLOCK));
        Self { file, touched, seen }
    }

    fn note(&mut self, offset: u64) {
        let start = offset / BLOCK * BLOCK;
        let blocks = &mut self.touched.blocks;
        if !self.seen.contains(start) && blocks.len() < MAX_BLOCKS {
            self.seen.add(start);
            blocks.push((start / BLOCK) as u32);
        }
    }
}

/// What the thread has.
struct Worker {
    fault: Userfault,
    /// With their places in all of the memory.
    regions: Vec<(u64, RamRegion)>,
    /// Stays mapped as long as pages are put into it.
    _memory: GuestMemory,
    image: Arc<MemoryImage>,
    shared: Arc<Shared>,
    recorder: Option<Recorder>,
    /// What is brought in first, the first one last.
    first: Vec<Run>,
    rest: Rest,
    /// Up to where nothing is pending.
    next: u64,
    /// Addresses of pages for which somebody waits.
    waiting: Vec<u64>,
    buffer: Vec<u8>,
}

impl Worker {
    fn run(mut self) {
        let worked = catch_unwind(AssertUnwindSafe(|| self.work()));
        self.finish_record(false);
        match worked {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.lose(format!("cannot read the snapshot's memory: {error}")),
            Err(_) => self.lose("a bug: the thread that brings memory in panicked".into()),
        }
        for &(_, region) in &self.regions {
            if let Err(error) = self.fault.unregister(region) {
                debug!(%error, "memory is still watched");
            }
        }
    }

    /// Works until everything is there, or nobody needs it any more.
    fn work(&mut self) -> io::Result<()> {
        self.first.iter().rev().take(AHEAD).for_each(|&(start, bytes)| self.image.will_be_read(start, bytes));
        loop {
            let served = self.serve()?;
            if self.shared.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            let left = self.holds_back();
            // It is about to be asked for.
            if let Some((start, bytes)) = self.first.pop() {
                if let Some(&(start, bytes)) = self.first.iter().rev().nth(AHEAD - 1) {
                    self.image.will_be_read(start, bytes);
                }
                self.bring_across(start, start + bytes)?;
                // Nobody who has what he waited for is to wait for this thread's turn to end.
                std::thread::yield_now();
                continue;
            }
            if served || !self.waiting.is_empty() {
                self.wait(Some(QUIET))?;
                continue;
            }
            match left {
                Some(left) => self.wait(left)?,
                None if !self.bring_more()? => return Ok(()),
                None => {}
            }
        }
    }

    /// Answers all who wait now. Returns whether there were any.
    fn serve(&mut self) -> io::Result<bool> {
        let mut served = false;
        loop {
            let events = self.fault.events()?;
            for event in &events {
                match *event {
                    Event::Fault(address) => self.waiting.push(address),
                    Event::Removed(start, end) => self.remove(start, end),
                }
            }
            for address in std::mem::take(&mut self.waiting) {
                served = true;
                if !self.answer(address)? {
                    self.waiting.push(address);
                }
            }
            if events.is_empty() {
                return Ok(served);
            }
        }
    }

    /// Brings in the page at `address`, and those around it. Returns whether it is there.
    fn answer(&mut self, address: u64) -> io::Result<bool> {
        let Some((start, offset, end)) = self.place(address) else { return Ok(true) };
        if let Some(recorder) = &mut self.recorder {
            recorder.note(offset);
        }
        if !self.shared.pending().contains(offset) {
            return self.fault.zero(address);
        }
        let part = |bytes: u64| {
            let from = offset / bytes * bytes;
            (from.max(start), (from + bytes).min(end))
        };
        let (mut from, mut to) = part(AROUND);
        if self.recorder.is_some() {
            // The disk reads as much at a time as ever.
            self.image.will_be_read(from, to - from);
            (from, to) = part(BLOCK);
        }
        self.bring(from, to)?;
        Ok(!self.shared.pending().contains(offset))
    }

    /// Where an address is in all of the memory, and from where to where its region goes.
    fn place(&self, address: u64) -> Option<(u64, u64, u64)> {
        self.regions.iter().find_map(|&(start, region)| {
            let at = address.checked_sub(region.host_addr).filter(|&at| at < region.len)?;
            Some((start, start + at, start + region.len))
        })
    }

    /// Brings in what is pending from `start` to `end`, which lie in one region, as far as that is possible now.
    fn bring(&mut self, start: u64, end: u64) -> io::Result<()> {
        let Some(&(first, region)) =
            self.regions.iter().find(|(first, region)| (*first..first + region.len).contains(&start))
        else {
            return Ok(());
        };
        let runs: Vec<Run> = self.shared.pending().runs(start, end).collect();
        for (offset, bytes) in runs {
            self.buffer.resize(bytes as usize, 0);
            self.image.read(offset, &mut self.buffer)?;
            let done = self.fault.copy(region.host_addr + (offset - first), &self.buffer)?;
            self.shared.pending().remove_range(offset, done as u64);
            if (done as u64) < bytes {
                break;
            }
        }
        Ok(())
    }

    /// Pages were given back: they are zeroes.
    fn remove(&mut self, start: u64, end: u64) {
        for &(first, region) in &self.regions {
            let from = start.max(region.host_addr);
            let to = end.min(region.host_addr + region.len);
            if from < to {
                self.shared.pending().remove_range(first + (from - region.host_addr), to - from);
            }
        }
    }

    /// Whether what nobody has asked for waits, and how long, if that is known.
    fn holds_back(&mut self) -> Option<Option<Duration>> {
        if matches!(self.rest, Rest::AfterStart) && self.shared.guest_runs.load(Ordering::Acquire) {
            self.rest = Rest::At(Instant::now() + FIRST);
        }
        match self.rest {
            Rest::AfterStart => Some(None),
            Rest::At(time) => {
                let left = time.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    self.finish_record(true);
                    self.rest = Rest::Now;
                }
                Some(Some(left))
            }
            Rest::Now => None,
        }
    }

    /// Writes down what was touched, if it was recorded while the guest ran. `whole`: it ran for long enough.
    fn finish_record(&mut self, whole: bool) {
        let ran = self.shared.guest_runs.load(Ordering::Acquire);
        if let Some(Recorder { file, mut touched, .. }) = self.recorder.take().filter(|_| ran) {
            touched.whole = whole;
            file.write(&touched);
        }
    }

    /// Brings in some of what nobody has asked for. Returns whether there may be more.
    fn bring_more(&mut self) -> io::Result<bool> {
        let memory = self.regions.last().map_or(0, |(start, region)| start + region.len);
        let run = self.shared.pending().runs(self.next, memory).next();
        let Some((start, bytes)) = run else { return Ok(false) };
        self.next = start;
        self.bring_across(start, start + bytes.min(STEP))?;
        Ok(true)
    }

    /// As [`Self::bring`], but the range may lie in several regions.
    fn bring_across(&mut self, start: u64, end: u64) -> io::Result<()> {
        let pieces: Vec<_> = self
            .regions
            .iter()
            .map(|&(first, region)| (start.max(first), end.min(first + region.len)))
            .filter(|(start, end)| start < end)
            .collect();
        pieces.into_iter().try_for_each(|(start, end)| self.bring(start, end))
    }

    /// Waits for events and flags; without a time for as long as it takes.
    fn wait(&self, time: Option<Duration>) -> io::Result<()> {
        let time = time
            .map(|time| Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) });
        let mut fds =
            [PollFd::new(&self.fault, PollFlags::IN), PollFd::new(&self.shared.changed, PollFlags::IN)];
        match poll(&mut fds, time.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        self.shared.clear();
        Ok(())
    }

    /// Memory cannot be had. Nobody gets it until the machine that needs it is told to end: zeroes would be a lie.
    fn lose(&self, reason: String) {
        let tell = {
            let mut loss = self.shared.loss();
            loss.reason = Some(reason.clone());
            loss.tell.take()
        };
        let Some(tell) = tell else { return };
        tell(reason);
        let until = Instant::now() + LOST_WAIT;
        let ended = || {
            self.shared.stop.load(Ordering::Acquire)
                || self.shared.give_up.load(Ordering::Acquire)
                || Instant::now() >= until
        };
        while !ended() {
            let left = until.saturating_duration_since(Instant::now());
            let time = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            _ = poll(&mut [PollFd::new(&self.shared.changed, PollFlags::IN)], Some(&time));
            self.shared.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_were_touched_come_in_runs_and_in_about_their_order() {
        let memory = 64 << 20;
        assert_eq!(runs_of(&[], memory), []);
        assert_eq!(runs_of(&[2, 0, 5, 1], memory), [(5 * BLOCK, BLOCK), (0, 3 * BLOCK)]);
        // What was touched later comes later, though it is lower.
        let late: Vec<u32> = (100..100 + AT_ONCE as u32).chain([0, 101]).collect();
        assert_eq!(runs_of(&late, memory)[..2], [(101 * BLOCK, BLOCK), (0, BLOCK)]);
        // No run is so long that others wait for it, and the memory's end is one.
        let all: Vec<u32> = (0..40).collect();
        assert_eq!(runs_of(&all, 40 * BLOCK - 1), [(2 * STEP, 8 * BLOCK - 1), (STEP, STEP), (0, STEP)]);
    }
}
