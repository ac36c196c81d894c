//! What happens to a machine, as a journal that any number of readers can follow at their own pace.
//!
//! Writers are the machine's own threads, and none of them ever waits for a reader: the journal keeps the newest
//! [`KEPT`] events, and a reader that is slower than that is told how many it has missed.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::machine::{Milestone, Milestones};
use crate::state::VmState;

/// How many events a journal keeps.
pub const KEPT: usize = 256;

/// Something that happened to a machine.
///
/// ```no_run
/// use vmm_core::event::What;
///
/// # fn first_panic(vm: &vmm_core::Vm) {
/// if let Some(event) = vm.events().find(|event| event.what == What::GuestPanic) {
///     println!("the guest panicked after {:?}", event.at);
/// }
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Number of the event, from 0.
    pub sequence: u64,
    /// Time since [`Milestones::start`].
    pub at: Duration,
    /// What happened.
    pub what: What,
}

/// What happened.
///
/// ```no_run
/// use vmm_core::{StopReason, VmState, event::What};
///
/// # fn tell(vm: &vmm_core::Vm) {
/// for event in vm.events() {
///     match event.what {
///         What::State(VmState::Stopped(StopReason::GuestPanic)) => println!("to be looked at"),
///         What::Fact { device, name: "actual_bytes", value } => println!("{device} has {value} bytes"),
///         // There may be other kinds in a later version.
///         what => println!("{what}"),
///     }
/// }
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum What {
    /// The machine came into this state. `Stopped`, with the reason, is the last event of every machine.
    State(VmState),
    /// The guest got this far for the first time.
    Milestone(Milestone),
    /// The guest's kernel said that it panicked. It may still print, and reset itself.
    GuestPanic,
    /// The guest's init reported the exit status of its command.
    ExitStatus(u8),
    /// The configuration of this device was changed.
    Updated {
        /// The device's name.
        device: String,
    },
    /// Requests to this device have failed on the host's side since the last such event. It is told at most once
    /// a second and device, and counted in its counters all the time.
    DeviceErrors {
        /// The device's name.
        device: String,
        /// How many there have been since the machine was built.
        total: u64,
    },
    /// Something that this device tells of itself has changed, such as the size of a balloon. It is told at most once a second
    /// and device, the last value always.
    Fact {
        /// The device's name.
        device: String,
        /// The counter's name: see [`devices::model::Counters::all`].
        name: &'static str,
        /// Its value now.
        value: u64,
    },
    /// The reader was slow, and this many events before the next one are forgotten.
    Missed(u64),
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::State(VmState::Stopped(reason)) => write!(f, "stopped: {reason}"),
            Self::State(state) => f.write_str(state.name()),
            Self::Milestone(milestone) => milestone.fmt(f),
            Self::GuestPanic => f.write_str("the guest's kernel panicked"),
            Self::ExitStatus(status) => write!(f, "the guest's command ended with exit status {status}"),
            Self::Updated { device } => write!(f, "{device} was changed"),
            Self::DeviceErrors { device, total } => write!(f, "{device} has had {total} failed requests"),
            Self::Fact { device, name, value } => write!(f, "{name} of {device} is {value} now"),
            Self::Missed(count) => write!(f, "{count} events were missed"),
        }
    }
}

#[derive(Debug, Default)]
struct Log {
    /// Sequence number of the first event that is kept.
    first: u64,
    kept: VecDeque<(Duration, What)>,
    /// There will be no more.
    closed: bool,
    /// How many readers there have been.
    readers: u64,
    /// Tasks that wait for the next event, by the number of their reader.
    wakers: BTreeMap<u64, Waker>,
}

impl Log {
    fn push(&mut self, at: Duration, what: What) {
        if self.kept.len() == KEPT {
            self.kept.pop_front();
            self.first += 1;
        }
        self.kept.push_back((at, what));
    }

    /// What a reader that has come to `next` is to see: nothing yet, the end, or an event.
    fn after(&self, next: &mut u64) -> Poll<Option<Event>> {
        let missed = self.first.saturating_sub(*next);
        let index = (next.saturating_sub(self.first)) as usize;
        let Some((at, what)) = self.kept.get(index) else {
            return if self.closed { Poll::Ready(None) } else { Poll::Pending };
        };
        let (sequence, what) = match missed {
            0 => (*next, what.clone()),
            // It stands for all that are missing, and has the number of the last of them.
            _ => (self.first - 1, What::Missed(missed)),
        };
        *next = sequence + 1;
        Poll::Ready(Some(Event { sequence, at: *at, what }))
    }
}

/// The journal of one machine.
#[derive(Debug)]
pub(crate) struct Journal {
    milestones: Milestones,
    log: Mutex<Log>,
    changed: Condvar,
}

impl Journal {
    /// The journal of a machine whose build begins now, in a process that started then, if that is known.
    pub fn begin(process_start: Option<Instant>) -> Self {
        let journal = Self::since(process_start.unwrap_or_else(Instant::now));
        if process_start.is_some() {
            journal.milestones.reach(Milestone::ProcessStarted, Duration::ZERO);
            journal.write(journal.lock(), Duration::ZERO, What::Milestone(Milestone::ProcessStarted));
        }
        journal.reach(Milestone::BuildBegan);
        journal
    }

    fn since(start: Instant) -> Self {
        Self { milestones: Milestones::since(start), log: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn milestones(&self) -> &Milestones {
        &self.milestones
    }

    /// Writes down that the guest got this far, if it is for the first time.
    pub fn reach(&self, milestone: Milestone) {
        // A guest can say so as often as it likes.
        if self.milestones.get(milestone).is_some() {
            return;
        }
        let log = self.lock();
        let at = self.milestones.start().elapsed();
        if self.milestones.reach(milestone, at) {
            self.write(log, at, What::Milestone(milestone));
        }
    }

    pub fn record(&self, what: What) {
        let log = self.lock();
        self.write(log, self.milestones.start().elapsed(), what);
    }

    /// `at` is a time under the lock: events are in its order.
    fn write(&self, mut log: MutexGuard<'_, Log>, at: Duration, what: What) {
        if log.closed {
            return;
        }
        tracing::info!(micros = at.as_micros() as u64, "{what}");
        log.closed = matches!(what, What::State(VmState::Stopped(_)));
        log.push(at, what);
        let wakers = std::mem::take(&mut log.wakers);
        drop(log);
        self.changed.notify_all();
        wakers.into_values().for_each(Waker::wake);
    }
}

/// Follows what happens to a machine, from its first event that is still kept to the one that says that it has
/// stopped. It does not keep the machine alive.
///
/// As an iterator it waits for each event. A task of an async program polls [`Self::poll_next`]:
///
/// ```no_run
/// # async fn follow(vm: &vmm_core::Vm) {
/// let mut events = vm.events();
/// while let Some(event) = std::future::poll_fn(|context| events.poll_next(context)).await {
///     println!("{:?} {}", event.at, event.what);
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct Events {
    journal: Arc<Journal>,
    reader: u64,
    next: u64,
}

impl Events {
    pub(crate) fn of(journal: Arc<Journal>) -> Self {
        let reader = {
            let mut log = journal.lock();
            log.readers += 1;
            log.readers
        };
        Self { journal, reader, next: 0 }
    }

    /// The next event, if there is one already.
    pub fn try_next(&mut self) -> Option<Event> {
        match self.journal.lock().after(&mut self.next) {
            Poll::Ready(event) => event,
            Poll::Pending => None,
        }
    }

    /// The next event, or `None` after the last one. The task is woken when there is something to poll for.
    pub fn poll_next(&mut self, context: &Context<'_>) -> Poll<Option<Event>> {
        let mut log = self.journal.lock();
        let polled = log.after(&mut self.next);
        if polled.is_pending() {
            let old = log.wakers.insert(self.reader, context.waker().clone());
            // Not before: with a waker goes the task of another program's executor, and maybe a reader in it.
            drop(log);
            drop(old);
        }
        polled
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // A machine may be quiet for weeks, while readers come and go.
        let _waker = self.journal.lock().wakers.remove(&self.reader);
    }
}

impl Iterator for Events {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        let mut log = self.journal.lock();
        loop {
            match log.after(&mut self.next) {
                Poll::Ready(event) => return event,
                Poll::Pending => log = self.journal.changed.wait(log).unwrap_or_else(|e| e.into_inner()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::StopReason;

    fn stopped() -> What {
        What::State(VmState::Stopped(StopReason::Requested))
    }

    #[test]
    fn every_reader_sees_everything_and_the_end() {
        let journal = Arc::new(Journal::since(Instant::now()));
        journal.reach(Milestone::Started);
        journal.reach(Milestone::Started);
        let early = std::thread::spawn({
            let events = Events::of(journal.clone());
            move || events.map(|event| event.what).collect::<Vec<_>>()
        });
        journal.record(What::GuestPanic);
        journal.record(stopped());
        journal.record(What::GuestPanic);
        let all = [What::Milestone(Milestone::Started), What::GuestPanic, stopped()];
        assert_eq!(early.join().unwrap(), all);
        let late: Vec<Event> = Events::of(journal).collect();
        assert_eq!(late.iter().map(|event| event.sequence).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(late.is_sorted_by_key(|event| event.at));
    }

    #[test]
    fn a_slow_reader_is_told_what_it_missed() {
        let journal = Arc::new(Journal::since(Instant::now()));
        let mut events = Events::of(journal.clone());
        let status = |i: usize| What::ExitStatus(i as u8);
        (0..KEPT + 3).for_each(|i| journal.record(status(i)));
        let missed = events.try_next().unwrap();
        assert_eq!((missed.sequence, missed.what), (2, What::Missed(3)));
        let first = events.try_next().unwrap();
        assert_eq!((first.sequence, first.what), (3, status(3)));
        assert_eq!(std::iter::from_fn(|| events.try_next()).count(), KEPT - 1);
    }

    #[test]
    fn a_task_is_woken_once_for_an_event() {
        struct Count(std::sync::atomic::AtomicU32);
        impl std::task::Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
        let count = Arc::new(Count(0.into()));
        let waker = Waker::from(count.clone());
        let context = Context::from_waker(&waker);
        let journal = Arc::new(Journal::since(Instant::now()));
        let mut events = Events::of(journal.clone());
        assert!(events.poll_next(&context).is_pending());
        assert!(events.poll_next(&context).is_pending());
        journal.record(stopped());
        assert_eq!(count.0.load(std::sync::atomic::Ordering::Relaxed), 1);
        assert!(matches!(events.poll_next(&context), Poll::Ready(Some(_))));
        assert_eq!(events.poll_next(&context), Poll::Ready(None));
    }

    #[test]
    fn nothing_is_left_of_readers_that_have_gone() {
        let journal = Arc::new(Journal::since(Instant::now()));
        let wakers: Vec<Arc<Ignore>> = (0..3).map(|_| Arc::default()).collect();
        let mut events = Events::of(journal.clone());
        for waker in &wakers {
            // Each time by another task.
            assert!(events.poll_next(&Context::from_waker(&waker.clone().into())).is_pending());
        }
        assert_eq!(wakers.iter().map(Arc::strong_count).collect::<Vec<_>>(), [1, 1, 2]);
        drop(events);
        assert_eq!(Arc::strong_count(&wakers[2]), 1);

        #[derive(Default)]
        struct Ignore;
        impl std::task::Wake for Ignore {
            fn wake(self: Arc<Self>) {}
        }
    }
}
