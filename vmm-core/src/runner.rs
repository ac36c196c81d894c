//! The runner: an event loop on a thread that owns devices and their queues.
//!
//! What turns a device needs, its [`Unit`] knows; what calls for a turn is watched here: kicks, host sources, tokens that
//! have come back. All devices of a machine share one runner, but for those that ask for one of their own.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::news::NewsWatch;
pub use crate::news::{News, TellNews};
use crate::spans;
use crate::vcpu::thread_time;
use devices::GuestMemory;
use devices::model::{
    ActivateError, Counters, DeviceHost, HostSource, Notifier, Progress, UpdateError, VirtioDevice,
};
use devices::registry::Update;
use devices::snapshot::SnapshotError;
use devices::storage::{Storage, StorageError};
use devices::throttle::Limits;
use devices::virtio::queue::QueueConfig;
use devices::virtio::unit::{Unit, UnitState};
use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId, SubscriberOps,
};
use tracing::{Span, debug, warn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

/// A runner could not be started, or has ended.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// The event loop could not be made or reached.
    #[error("the I/O event loop is not available: {0}")]
    EventLoop(#[from] event_manager::Error),
    /// The thread or an eventfd could not be made.
    #[error("cannot start the I/O thread: {0}")]
    Start(#[from] std::io::Error),
}

/// Epoll data of a unit's descriptors: queue numbers, then these, then host sources.
const AGAIN: u32 = 0x1_0000;
const DUE: u32 = 0x1_0001;
const SOURCE: u32 = 0x2_0000;

/// A [`Unit`] on an event loop.
struct Subscriber {
    unit: Unit,
    /// Where log lines of the device come from.
    span: Span,
    /// One a queue; ioeventfds of the driver's notifications.
    kicks: Arc<[EventFd]>,
    /// Signalled by the subscriber itself to be called again.
    again: Arc<EventFd>,
    /// Host sources that are to be served again.
    pending: Vec<u32>,
    /// Expires when something that the unit holds back may go on.
    timer: TimerFd,
    /// When that is.
    expires: Option<Instant>,
    /// What is watched for the device while it is active.
    sources: Vec<HostSource>,
    paused: bool,
    /// The device came from a snapshot and has not run since.
    restored: bool,
    news: NewsWatch,
    /// Gone once it was told.
    tell_output: Option<TellOutput>,
}

/// Called once, on the runner's thread, when a device has had the first bytes from the guest.
pub type TellOutput = Box<dyn FnOnce() + Send>;

impl Subscriber {
    /// Gives the device one turn on `queue`.
    fn serve_queue(&mut self, queue: u16) {
        let kicks = &self.kicks;
        if self.unit.serve_queue(queue, |queue| signal(&kicks[usize::from(queue)])) == Progress::More {
            signal(&kicks[usize::from(queue)]);
        }
        self.set_timer();
    }

    fn serve_source(&mut self, token: u32) {
        let kicks = &self.kicks;
        if self.unit.serve_source(token, |queue| signal(&kicks[usize::from(queue)])) == Progress::More {
            if !self.pending.contains(&token) {
                self.pending.push(token);
            }
            signal(&self.again);
        }
        self.set_timer();
    }

    fn serve_pending(&mut self) {
        for token in std::mem::take(&mut self.pending) {
            self.serve_source(token);
        }
    }

    fn set_timer(&mut self) {
        if let Some(at) = self.unit.due_at() {
            self.wake_at(at);
        }
    }

    fn wake_at(&mut self, at: Instant) {
        if self.expires.is_some_and(|expires| expires <= at) {
            return;
        }
        // Zero would stop it.
        let wait = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        match self.timer.reset(wait, None) {
            Ok(()) => self.expires = Some(at),
            Err(error) => warn!(%error, "cannot wait for a device's limit"),
        }
    }

    /// The timer has expired, perhaps for something that has gone on since.
    fn serve_waiting(&mut self) {
        let kicks = &self.kicks;
        self.unit.serve_waiting(|queue| signal(&kicks[usize::from(queue)]));
        self.set_timer();
    }

    /// Calls everything once, for what may have happened while nobody looked.
    fn wake_all(&mut self) {
        self.pending = self.sources.iter().map(|source| source.token).collect();
        self.kicks.iter().chain([&*self.again]).for_each(signal);
    }

    fn activate(&mut self, features: u64, queues: &[QueueConfig]) -> Result<(), ActivateError> {
        self.unit.activate(features, queues)?;
        self.sources = self.unit.host_sources();
        self.wake_all();
        Ok(())
    }

    fn reset(&mut self) -> Vec<HostSource> {
        self.unit.reset();
        self.pending.clear();
        std::mem::take(&mut self.sources)
    }

    fn update(&mut self, update: &Update) -> Result<(), UpdateError> {
        if update.device {
            self.unit.update(update.config.as_any())?;
        }
        if update.limits {
            self.unit.set_limits(&update.config.limits());
            self.unit.waiting_queues().for_each(|queue| signal(&self.kicks[usize::from(queue)]));
        }
        Ok(())
    }
}

fn signal(event: &EventFd) {
    // It can only fail when the counter is full, and then the event is pending anyway.
    _ = event.write(1);
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let kicks = self.kicks.iter().enumerate().map(|(i, event)| (event.as_raw_fd(), i as u32));
        let own = [(self.again.as_raw_fd(), AGAIN), (self.timer.as_raw_fd(), DUE)];
        for (fd, data) in kicks.chain(own) {
            if let Err(error) = ops.add(Events::with_data_raw(fd, data, EventSet::IN)) {
                warn!(%error, "cannot watch a queue");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        self.in_span(|subscriber| subscriber.turn(events));
    }
}

impl Subscriber {
    /// Does something for the device, whose log lines say so.
    fn in_span<R>(&mut self, work: impl FnOnce(&mut Self) -> R) -> R {
        let span = std::mem::replace(&mut self.span, Span::none());
        let result = span.in_scope(|| work(self));
        self.span = span;
        result
    }

    fn turn(&mut self, events: Events) {
        let data = events.data();
        match data {
            ..AGAIN => _ = self.kicks[data as usize].read(),
            AGAIN => _ = self.again.read(),
            DUE => (_, self.expires) = (self.timer.wait(), None),
            _ => {}
        }
        // What happens while the device is paused or off is made up for by `wake_all`.
        if !self.unit.is_active() || self.paused {
            return;
        }
        match data {
            ..AGAIN => self.serve_queue(data as u16),
            AGAIN => self.serve_pending(),
            DUE => self.serve_waiting(),
            _ => self.serve_source(data - SOURCE),
        }
        let counters = self.unit.counters();
        if let Some(tell) =
            self.tell_output.take_if(|_| counters.bytes_from_guest.load(Ordering::Relaxed) > 0)
        {
            tell();
        }
        if let Some(at) = self.news.look(counters, Instant::now()) {
            self.wake_at(at);
        }
    }
}

/// A device on its way to a runner.
pub struct NewUnit {
    /// The device, open.
    pub device: Box<dyn VirtioDevice>,
    /// What log lines call it.
    pub name: String,
    /// Limits of its lanes.
    pub limits: Vec<Limits>,
    /// Whom to tell what is to be known of it.
    pub tell_news: TellNews,
    /// Whom to tell of its first output, if that is of interest.
    pub tell_output: Option<TellOutput>,
}

/// A thread with an event loop that owns devices.
pub struct Runner {
    endpoint: RemoteEndpoint<Subscriber>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    tid: i32,
    /// Of the thread.
    span: Span,
}

impl Runner {
    /// Starts the thread named `name` of the machine with the span `vm`. `on_panic` is called, on that thread, when it dies before it is told to.
    pub fn start(
        name: &str,
        vm: &Span,
        on_panic: impl FnOnce() + Send + 'static,
    ) -> Result<Self, RunnerError> {
        let mut manager = EventManager::<Subscriber>::new()?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let (started, tid) = mpsc::channel();
        let span = spans::thread(vm, name);
        let thread = std::thread::Builder::new().name(name.into()).spawn({
            let (stop, span) = (stop.clone(), span.clone());
            move || {
                let _entered = span.entered();
                _ = started.send(rustix::thread::gettid().as_raw_nonzero().get());
                let run = std::panic::AssertUnwindSafe(|| {
                    while !stop.load(Ordering::Acquire) {
                        if let Err(error) = manager.run() {
                            warn!(%error, "the I/O event loop failed");
                            return false;
                        }
                    }
                    true
                });
                if !std::panic::catch_unwind(run).unwrap_or(false) {
                    on_panic();
                }
            }
        })?;
        let tid = tid.recv().map_err(|_| std::io::Error::from(std::io::ErrorKind::BrokenPipe))?;
        Ok(Self { endpoint, stop, thread: Some(thread), tid, span })
    }

    /// Tells the thread to end; dropping the runner waits for that.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        // It fails only when the thread is gone.
        _ = self.endpoint.kick();
    }

    /// Time that the thread has run.
    pub fn cpu_time(&self) -> Duration {
        thread_time(self.tid)
    }

    /// Moves a device to this runner. The handle is what its transport talks to.
    pub fn add(
        &self,
        new: NewUnit,
        notifier: Arc<dyn Notifier>,
        mem: GuestMemory,
    ) -> Result<Arc<UnitHandle>, RunnerError> {
        let NewUnit { device, name, limits, tell_news, tell_output } = new;
        let kicks = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<Result<Arc<[_]>, _>>()?;
        let again = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let unit = Unit::new(device, &limits, notifier, mem);
        let counters = unit.counters().clone();
        let subscriber = Subscriber {
            unit,
            span: spans::device(&self.span, &name),
            kicks: kicks.clone(),
            again: again.clone(),
            pending: Vec::new(),
            timer: TimerFd::new().map_err(std::io::Error::from)?,
            expires: None,
            sources: Vec::new(),
            paused: false,
            restored: false,
            news: NewsWatch::new(&counters, tell_news),
            tell_output,
        };
        let id = self
            .endpoint
            .call_blocking(move |ops| Ok::<_, event_manager::Error>(ops.add_subscriber(subscriber)))?;
        Ok(Arc::new(UnitHandle { endpoint: self.endpoint.clone(), id, name, kicks, again, counters }))
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }
}

/// A device that lives on a runner, seen from elsewhere.
pub struct UnitHandle {
    endpoint: RemoteEndpoint<Subscriber>,
    id: SubscriberId,
    name: String,
    kicks: Arc<[EventFd]>,
    /// Gives the device a turn.
    again: Arc<EventFd>,
    counters: Arc<Counters>,
}

/// A device's configuration could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum UpdateFailed {
    /// The device refused it.
    #[error(transparent)]
    Device(#[from] UpdateError),
    /// The runner is gone.
    #[error(transparent)]
    Runner(#[from] RunnerError),
}

impl From<event_manager::Error> for UpdateFailed {
    fn from(error: event_manager::Error) -> Self {
        Self::Runner(error.into())
    }
}

impl UnitHandle {
    /// The events that stand for the driver's notifications, one a queue.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Stops or lets go on everything that the device does. When this returns, a paused device touches neither
    /// guest memory nor its files.
    pub fn set_paused(&self, paused: bool) -> Result<(), RunnerError> {
        let id = self.id;
        Ok(self.endpoint.call_blocking(move |ops| {
            let subscriber = ops.subscriber_mut(id)?;
            subscriber.paused = paused;
            match paused {
                true => subscriber.in_span(|subscriber| subscriber.unit.drain()),
                false if subscriber.unit.is_active() => subscriber.in_span(|subscriber| {
                    if std::mem::take(&mut subscriber.restored) {
                        subscriber.unit.announce();
                    }
                    subscriber.wake_all();
                }),
                false => {}
            }
            Ok::<_, event_manager::Error>(())
        })?)
    }

    /// See [`VirtioDevice::storage`].
    pub fn storage(&self) -> Result<Option<Storage>, RunnerError> {
        let id = self.id;
        Ok(self.endpoint.call_blocking(move |ops| {
            Ok::<_, event_manager::Error>(ops.subscriber_mut(id)?.unit.storage())
        })?)
    }

    /// See [`VirtioDevice::save_storage`]. The device is paused.
    pub fn save_storage(&self, to: File) -> Result<(), StorageError> {
        let id = self.id;
        let saved = self.endpoint.call_blocking(move |ops| {
            let subscriber = ops.subscriber_mut(id)?;
            Ok::<_, event_manager::Error>(subscriber.in_span(|subscriber| subscriber.unit.save_storage(&to)))
        });
        saved.unwrap_or(Err(StorageError::Gone))
    }

    /// Counters of the device.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Changes the device's configuration. After an error it is as it was.
    pub fn update(&self, update: &Update) -> Result<(), UpdateFailed> {
        let (id, update) = (self.id, update.clone());
        self.endpoint.call_blocking(move |ops| {
            // The device may close what is watched, and open something else under the same number.
            let before = ops.subscriber_mut(id)?.sources.clone();
            watch(ops, id, &before, false)?;
            let subscriber = ops.subscriber_mut(id)?;
            let updated = subscriber.in_span(|subscriber| subscriber.update(&update));
            if subscriber.unit.is_active() {
                subscriber.sources = subscriber.unit.host_sources();
            }
            let after = subscriber.sources.clone();
            watch(ops, id, &after, true)?;
            Ok(updated?)
        })
    }
}

/// Watches or stops watching host sources, edge triggered.
fn watch(
    ops: &mut dyn SubscriberOps<Subscriber = Subscriber>,
    id: SubscriberId,
    sources: &[HostSource],
    on: bool,
) -> event_manager::Result<()> {
    let mut ops = ops.event_ops(id)?;
    sources.iter().try_for_each(|source| {
        let room = if source.writable { EventSet::OUT } else { EventSet::empty() };
        let set = EventSet::IN | EventSet::EDGE_TRIGGERED | room;
        let events = Events::with_data_raw(source.fd, SOURCE + source.token, set);
        if on { ops.add(events) } else { ops.remove(events) }
    })
}

/// An [`ActivateError`] that the event loop's errors convert to.
struct CallError(ActivateError);

impl From<event_manager::Error> for CallError {
    fn from(_: event_manager::Error) -> Self {
        Self(ActivateError::Runner)
    }
}

fn runner_gone(error: event_manager::Error) -> SnapshotError {
    SnapshotError::Host { call: "the device's event loop", reason: error.to_string() }
}

impl DeviceHost for UnitHandle {
    fn name(&self) -> &str {
        &self.name
    }

    fn activate(&self, features: u64, queues: &[QueueConfig]) -> Result<(), ActivateError> {
        let (id, queues) = (self.id, queues.to_vec());
        self.endpoint
            .call_blocking(move |ops| {
                let unit = ops.subscriber_mut(id)?;
                unit.in_span(|unit| unit.activate(features, &queues)).map_err(CallError)?;
                let sources = unit.sources.clone();
                watch(ops, id, &sources, true).or_else(|error| {
                    // The driver is told that the device did not start, so it must not have.
                    ops.subscriber_mut(id)?.reset();
                    Err(error.into())
                })
            })
            .map_err(|CallError(error)| error)
    }

    fn reset(&self) {
        let id = self.id;
        let done = self.endpoint.call_blocking(move |ops| {
            let sources = ops.subscriber_mut(id)?.in_span(Subscriber::reset);
            watch(ops, id, &sources, false)
        });
        if let Err(error) = done {
            debug!(%error, "a reset did not reach its device");
        }
    }

    fn save(&self) -> Result<UnitState, SnapshotError> {
        let id = self.id;
        let saved = self
            .endpoint
            .call_blocking(move |ops| Ok::<_, event_manager::Error>(ops.subscriber_mut(id)?.unit.save()));
        saved.map_err(runner_gone)?
    }

    fn restore(&self, saved: &UnitState, features: u64, queues: &[QueueConfig]) -> Result<(), SnapshotError> {
        let (id, saved, queues) = (self.id, saved.clone(), queues.to_vec());
        let restored = self.endpoint.call_blocking(move |ops| {
            let subscriber = ops.subscriber_mut(id)?;
            let restored = subscriber.unit.restore(&saved, features, &queues);
            subscriber.restored = true;
            if subscriber.unit.is_active() {
                subscriber.sources = subscriber.unit.host_sources();
            }
            let sources = subscriber.sources.clone();
            watch(ops, id, &sources, true)?;
            Ok::<_, event_manager::Error>(restored)
        });
        restored.map_err(runner_gone)?
    }

    fn kick(&self, queue: u16) {
        if let Some(event) = self.kicks.get(usize::from(queue)) {
            _ = event.write(1);
        }
    }

    fn config_written(&self) {
        signal(&self.again);
    }
}
