//! The runner: an event loop on a thread that owns devices and their queues.
//!
//! Everything that all devices need around their logic is here, once: kicks, interrupt suppression, budgets,
//! activation, reset, pause. All devices of a machine share one runner by default.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use devices::GuestMemory;
use devices::model::{ActivateError, Counters, DeviceHost, HostSource, Notifier, Progress, VirtioDevice};
use devices::virtio::F_EVENT_IDX;
use devices::virtio::queue::{QueueConfig, QueueCore};
use devices::virtio::service;
use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId, SubscriberOps,
};
use tracing::{debug, warn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

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

/// Epoll data of a unit's descriptors: queue numbers, then this, then host sources.
const AGAIN: u32 = 0x1_0000;
const SOURCE: u32 = 0x2_0000;

/// A device with everything that its owner keeps for it.
struct Unit {
    device: Box<dyn VirtioDevice>,
    /// One a queue; ioeventfds of the driver's notifications.
    kicks: Arc<[EventFd]>,
    /// Signalled by the unit itself to be called again.
    again: EventFd,
    /// Host sources that are to be served again.
    pending: Vec<u32>,
    notifier: Arc<dyn Notifier>,
    counters: Arc<Counters>,
    mem: GuestMemory,
    /// Empty while the device is not active.
    cores: Vec<QueueCore>,
    sources: Vec<HostSource>,
    /// The driver broke a queue in this activation.
    broken: bool,
    epoch: u32,
    paused: bool,
}

impl Unit {
    fn is_active(&self) -> bool {
        !self.cores.is_empty()
    }

    /// Gives the device one turn on `queue`.
    fn serve_queue(&mut self, queue: u16) {
        if service::serve_queue(&mut *self.device, &mut self.cores, &self.mem, queue) == Progress::More {
            self.signal(&self.kicks[usize::from(queue)]);
        }
        self.settle();
    }

    fn serve_source(&mut self, token: u32) {
        let kicks = self.kicks.clone();
        let again = |queue: u16| _ = kicks[usize::from(queue)].write(1);
        let progress = service::serve_source(&mut *self.device, &mut self.cores, &self.mem, token, again);
        if progress == Progress::More {
            if !self.pending.contains(&token) {
                self.pending.push(token);
            }
            self.signal(&self.again);
        }
        self.settle();
    }

    fn serve_pending(&mut self) {
        for token in std::mem::take(&mut self.pending) {
            self.serve_source(token);
        }
    }

    /// Interrupts, mistakes and faults of the turn that just ended.
    fn settle(&mut self) {
        service::settle(&mut self.cores, &self.mem, &self.counters, &*self.notifier, &mut self.broken);
    }

    fn signal(&self, event: &EventFd) {
        // It can only fail when the counter is full, and then the event is pending anyway.
        _ = event.write(1);
    }

    /// Calls everything once, for what may have happened while nobody looked.
    fn wake_all(&mut self) {
        self.pending = self.sources.iter().map(|source| source.token).collect();
        for event in self.kicks.iter().chain([&self.again]) {
            self.signal(event);
        }
    }

    fn activate(&mut self, features: u64, queues: &[QueueConfig]) -> Result<(), ActivateError> {
        self.epoch = self.epoch.wrapping_add(1);
        let event_idx = features & F_EVENT_IDX != 0;
        let cores = queues
            .iter()
            .enumerate()
            .map(|(i, config)| QueueCore::new(i as u16, config, event_idx, self.epoch, &self.mem))
            .collect::<Result<_, _>>()?;
        self.device.activate(features);
        self.sources = self.device.host_sources();
        self.cores = cores;
        self.wake_all();
        Ok(())
    }

    fn reset(&mut self) -> Vec<HostSource> {
        self.device.reset();
        self.cores.clear();
        self.pending.clear();
        self.broken = false;
        std::mem::take(&mut self.sources)
    }
}

impl MutEventSubscriber for Unit {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let kicks = self.kicks.iter().enumerate().map(|(i, event)| (event, i as u32));
        for (event, data) in kicks.chain([(&self.again, AGAIN)]) {
            if let Err(error) = ops.add(Events::with_data(event, data, EventSet::IN)) {
                warn!(%error, "cannot watch a queue");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let data = events.data();
        match data {
            ..AGAIN => _ = self.kicks[data as usize].read(),
            AGAIN => _ = self.again.read(),
            _ => {}
        }
        // What happens while the device is paused or off is made up for by `wake_all`.
        if !self.is_active() || self.paused {
            return;
        }
        match data {
            ..AGAIN => self.serve_queue(data as u16),
            AGAIN => self.serve_pending(),
            _ => self.serve_source(data - SOURCE),
        }
    }
}

/// A thread with an event loop that owns devices.
pub struct Runner {
    endpoint: RemoteEndpoint<Unit>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Runner {
    /// Starts the thread named `name`. `on_panic` is called, on that thread, when it dies before it is told to.
    pub fn start(name: &str, on_panic: impl FnOnce() + Send + 'static) -> Result<Self, RunnerError> {
        let mut manager = EventManager::<Unit>::new()?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name(name.into()).spawn({
            let stop = stop.clone();
            move || {
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
        Ok(Self { endpoint, stop, thread: Some(thread) })
    }

    /// Moves `device` to this runner. The handle is what its transport talks to.
    pub fn add(
        &self,
        device: Box<dyn VirtioDevice>,
        notifier: Arc<dyn Notifier>,
        mem: GuestMemory,
    ) -> Result<Arc<UnitHandle>, RunnerError> {
        let kicks = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<Result<Arc<[_]>, _>>()?;
        let unit = Unit {
            counters: device.counters(),
            device,
            kicks: kicks.clone(),
            again: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            pending: Vec::new(),
            notifier,
            mem,
            cores: Vec::new(),
            sources: Vec::new(),
            broken: false,
            epoch: 0,
            paused: false,
        };
        let id = self
            .endpoint
            .call_blocking(move |ops| Ok::<_, event_manager::Error>(ops.add_subscriber(unit)))?;
        Ok(Arc::new(UnitHandle { endpoint: self.endpoint.clone(), id, kicks }))
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // It fails only when the thread is gone.
        _ = self.endpoint.kick();
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }
}

/// A device that lives on a runner, seen from elsewhere.
pub struct UnitHandle {
    endpoint: RemoteEndpoint<Unit>,
    id: SubscriberId,
    kicks: Arc<[EventFd]>,
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
            let unit = ops.subscriber_mut(id)?;
            unit.paused = paused;
            if !paused && unit.is_active() {
                unit.wake_all();
            }
            Ok::<_, event_manager::Error>(())
        })?)
    }
}

/// Watches or stops watching host sources, edge triggered.
fn watch(
    ops: &mut dyn SubscriberOps<Subscriber = Unit>,
    id: SubscriberId,
    sources: &[HostSource],
    on: bool,
) -> event_manager::Result<()> {
    let mut ops = ops.event_ops(id)?;
    sources.iter().try_for_each(|source| {
        let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
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

impl DeviceHost for UnitHandle {
    fn activate(&self, features: u64, queues: &[QueueConfig]) -> Result<(), ActivateError> {
        let (id, queues) = (self.id, queues.to_vec());
        self.endpoint
            .call_blocking(move |ops| {
                let unit = ops.subscriber_mut(id)?;
                unit.activate(features, &queues).map_err(CallError)?;
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
            let sources = ops.subscriber_mut(id)?.reset();
            watch(ops, id, &sources, false)
        });
        if let Err(error) = done {
            debug!(%error, "a reset did not reach its device");
        }
    }

    fn kick(&self, queue: u16) {
        if let Some(event) = self.kicks.get(usize::from(queue)) {
            _ = event.write(1);
        }
    }
}
