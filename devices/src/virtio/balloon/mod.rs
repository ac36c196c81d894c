//! The memory balloon (virtio 1.3 §5.5): memory that the guest does not need goes back to the host.
//!
//! Free-page reporting does most of it, by itself: the guest tells which of its pages are free. The balloon proper
//! takes memory away, down to a size that the operator chose, and gives it back when the guest runs out.

mod stats;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ciborium::Value;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::config_space::ConfigSpace;
use super::queue::{Chain, Head, HeldHead, Queues, VirtQueue};
use super::reclaim::{self, PAGE, Reclaimed};
use crate::GuestMemory;
use crate::model::{
    Counters, DeviceKind, Facts, HostSource, MachineShape, OpenError, Progress, UpdateError, VirtioDevice,
};
use crate::size::ByteSize;
use crate::snapshot::{SnapshotError, from_value, to_value};
use crate::throttle::LogLimit;
use stats::Stats;

/// Feature bits (virtio 1.3 §5.5.3).
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_POISON: u64 = 1 << 4;
const F_REPORTING: u64 = 1 << 5;

/// Queues (virtio 1.3 §5.5.2). Where a feature is not negotiated, Linux moves the later queues up and the
/// specification does not; as free page hints are never offered, reporting may come on either of the last two.
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATS: u16 = 2;
const QUEUES: [u16; 5] = [QUEUE_SIZE; 5];
/// Linux wants 32 or more for reporting.
const QUEUE_SIZE: u16 = 128;

/// Most page numbers of one request; Linux sends 256.
const MAX_PFNS: usize = 1 << 12;
/// Bytes given back after which other devices get a turn. In the worst case each page costs a system call.
const MAX_PER_CALL: u64 = 64 << 20;

/// struct virtio_balloon_config (virtio 1.3 §5.5.4): num_pages, actual, free_page_hint_cmd_id, poison_val. The
/// driver writes `actual` and `poison_val`; what lies between the two has no meaning here.
const CONFIG_BYTES: usize = 16;
const WRITABLE: std::ops::Range<usize> = 4..16;

/// The only host event.
const TIMER: u32 = 0;

/// Configuration of the balloon.
///
/// ```
/// use devices::{params, virtio::balloon::Config};
///
/// let config: Config = params::from_str("size=128M,stats=5", None)?;
/// assert!(config.size.0 == 128 << 20 && config.reporting);
/// # Ok::<(), params::ParamError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Memory to take from the guest.
    pub size: ByteSize,
    /// A guest that runs out of memory may take it back.
    pub deflate_on_oom: bool,
    /// Pages that the guest frees go back to the host by themselves.
    pub reporting: bool,
    /// Seconds between questions for the guest's statistics; 0: none are asked.
    pub stats: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self { size: ByteSize(0), deflate_on_oom: true, reporting: true, stats: 0 }
    }
}

impl Config {
    /// What `num_pages` says.
    fn pages(&self, machine: &MachineShape) -> Result<u32, OpenError> {
        let Self { size, .. } = self;
        match u32::try_from(size.0 / PAGE) {
            Ok(pages) if size.0 < machine.memory && size.0.is_multiple_of(PAGE) => Ok(pages),
            _ => Err(Self::refused(format!(
                "size={size} does not fit; give multiples of 4K below the guest's {}",
                ByteSize(machine.memory)
            ))),
        }
    }
}

impl DeviceKind for Config {
    const NAME: &'static str = "balloon";
    const SYNTAX: &'static str = "[size=SIZE][,deflate_on_oom=BOOL][,reporting=BOOL][,stats=SECONDS]";
    const HELP: &'static str = "Gives memory that the guest does not use back to the host";
    const BARE_KEY: Option<&'static str> = Some("size");
    const ON_BY_DEFAULT: bool = true;
    const LIVE: &'static [&'static str] = &["size", "stats"];

    fn open(&self, machine: &MachineShape) -> Result<Box<dyn VirtioDevice>, OpenError> {
        let pages = self.pages(machine)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)
            .map_err(|errno| {
                Self::refused(format!("there is no timer ({errno}); raise the limit of open files"))
            })?;
        Ok(Box::new(Balloon::new(self, pages, *machine, timer)))
    }

    #[cfg(any(test, feature = "specimen"))]
    fn specimen() -> Box<dyn VirtioDevice> {
        Self::default().open(&MachineShape::default()).expect("a timer")
    }
}

/// What others may look at while the device works.
#[derive(Debug)]
struct Shown {
    config: Arc<ConfigSpace>,
    told: Mutex<Told>,
}

/// What the guest told.
#[derive(Debug, Default)]
struct Told {
    inflated: u64,
    deflated: u64,
    reported: u64,
    stats: Stats,
}

impl Shown {
    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The field of the configuration space at `offset`.
    fn field(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.config.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The size that the driver says the balloon has.
    fn actual(&self) -> (&'static str, u64) {
        ("actual_bytes", u64::from(self.field(4)) * PAGE)
    }
}

impl Facts for Shown {
    fn facts(&self) -> Vec<(&'static str, u64)> {
        let told = self.told();
        let own = [
            ("target_bytes", u64::from(self.field(0)) * PAGE),
            self.actual(),
            ("inflated_bytes", told.inflated),
            ("deflated_bytes", told.deflated),
            ("reported_bytes", told.reported),
        ];
        let guest = stats::NAMES.iter().zip(told.stats).filter_map(|(name, value)| Some((*name, value?)));
        own.into_iter().chain(guest).collect()
    }

    fn news(&self) -> Option<(&'static str, u64)> {
        Some(self.actual())
    }
}

/// The balloon.
struct Balloon {
    features: u64,
    negotiated: u64,
    machine: MachineShape,
    stats_interval: Duration,
    timer: OwnedFd,
    /// The buffer for statistics, which stays here until they are wanted; no request, so a pause does not end it.
    stats_head: Option<Head>,
    /// Page numbers of the request at hand.
    pfns: Vec<u32>,
    shown: Arc<Shown>,
    counters: Arc<Counters>,
    log: LogLimit,
}

impl Balloon {
    fn new(config: &Config, pages: u32, machine: MachineShape, timer: OwnedFd) -> Self {
        let option = |on: bool, feature| if on { feature } else { 0 };
        let mut bytes = [0; CONFIG_BYTES];
        bytes[..4].copy_from_slice(&pages.to_le_bytes());
        let config_space = Arc::new(ConfigSpace::with_writable(&bytes, WRITABLE));
        let shown = Arc::new(Shown { config: config_space, told: Mutex::default() });
        Self {
            // Page poison is how Linux says what its free pages have to look like.
            features: F_STATS_VQ
                | F_PAGE_POISON
                | option(config.deflate_on_oom, F_DEFLATE_ON_OOM)
                | option(config.reporting && !machine.memory_stays, F_REPORTING),
            negotiated: 0,
            machine,
            stats_interval: Duration::from_secs(config.stats.into()),
            timer,
            stats_head: None,
            pfns: Vec::new(),
            counters: Arc::new(Counters { own: Some(shown.clone()), ..Counters::default() }),
            shown,
            log: LogLimit::default(),
        }
    }

    /// Lets the timer run, or stops it.
    fn set_timer(&self) {
        let seconds = self.stats_interval.as_secs() as i64;
        let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
        let setting = Itimerspec { it_interval: time, it_value: time };
        // It cannot fail: the descriptor is a timer, and the time is one.
        _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting);
    }

    /// Whether what the guest reports may turn into zeroes.
    fn may_zero(&self) -> bool {
        self.negotiated & F_PAGE_POISON == 0 || self.shown.field(12) == 0
    }

    /// Pages go into the balloon: they are the host's now.
    fn inflate(&mut self, mem: &GuestMemory, chain: &mut Chain<'_>) -> Done {
        let mut done = Done { well_formed: self.read_pfns(chain), bytes: 0 };
        let mut given_back = 0;
        for run in self.pfns.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            let len = run.len() as u64 * PAGE;
            done.bytes += len;
            match reclaim::guest_range(mem, u64::from(run[0]) * PAGE, len) {
                Ok(Reclaimed { bytes, outside }) => {
                    given_back += bytes;
                    done.well_formed &= outside == 0;
                }
                Err(error) => self.host_failed(&error),
            }
        }
        self.shown.told().inflated += given_back;
        Counters::add(&self.counters.bytes_from_guest, given_back);
        done
    }

    /// Reads the request's page numbers, sorted and each once. Returns whether that was all of them.
    fn read_pfns(&mut self, chain: &mut Chain<'_>) -> bool {
        self.pfns.clear();
        let well_formed = chain.readable.len().is_multiple_of(4)
            && (4..=4 * MAX_PFNS).contains(&chain.readable.len())
            && chain.writable.is_empty();
        while let (true, Some(pfn)) = (self.pfns.len() < MAX_PFNS, chain.readable.read_obj::<u32>()) {
            self.pfns.push(u32::from_le(pfn));
        }
        self.pfns.sort_unstable();
        self.pfns.dedup();
        well_formed
    }

    /// Pages leave the balloon. They come back as the guest touches them.
    fn deflate(&mut self, chain: &mut Chain<'_>) -> Done {
        let well_formed = self.read_pfns(chain);
        let bytes = self.pfns.len() as u64 * PAGE;
        self.shown.told().deflated += bytes;
        Done { well_formed, bytes }
    }

    /// Pages that are free in the guest.
    fn report(&mut self, mem: &GuestMemory, chain: &Chain<'_>) -> Done {
        let well_formed = chain.readable.is_empty();
        let pieces = if self.may_zero() { chain.writable.iovecs() } else { Vec::new() };
        let mut given_back = 0;
        for piece in &pieces {
            match reclaim::mapped_range(mem, piece) {
                Ok(bytes) => given_back += bytes,
                Err(error) => self.host_failed(&error),
            }
        }
        self.shown.told().reported += given_back;
        Counters::add(&self.counters.bytes_from_guest, given_back);
        Done { well_formed, bytes: given_back }
    }

    /// Takes the driver's statistics, and keeps the buffer until the next are wanted.
    fn take_stats(&mut self, queue: &mut VirtQueue<'_>, mut chain: Chain<'_>) {
        if !stats::read(&mut chain.readable, &mut self.shown.told().stats) {
            queue.count_mistake();
        }
        if let Some(former) = self.stats_head.replace(chain.head) {
            // A driver has one such buffer.
            queue.count_mistake();
            queue.push(former, 0);
        }
    }

    fn host_failed(&self, error: &io::Error) {
        Counters::add(&self.counters.host_errors, 1);
        if self.log.permits() {
            tracing::debug!("balloon: memory is not given back: {error}");
        }
    }
}

/// What a snapshot keeps of the balloon. The guest tells its statistics again.
#[derive(Serialize, Deserialize)]
struct State {
    stats_head: Option<HeldHead>,
    inflated: u64,
    deflated: u64,
    reported: u64,
}

/// What came of a request.
struct Done {
    /// It keeps to the specification.
    well_formed: bool,
    /// Bytes that it was about.
    bytes: u64,
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn config_space(&self) -> Arc<ConfigSpace> {
        self.shown.config.clone()
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn activate(&mut self, features: u64) {
        self.negotiated = features;
        self.set_timer();
    }

    fn process(&mut self, queues: &mut Queues<'_>, index: u16) -> Progress {
        let mem = queues.memory();
        let mut queue = queues.get(index);
        let mut bytes = 0;
        while bytes < MAX_PER_CALL {
            let Some(mut chain) = queue.pop() else {
                return if queue.exhausted() { Progress::More } else { Progress::Done };
            };
            Counters::add(&self.counters.requests, 1);
            let done = match index {
                INFLATE => self.inflate(mem, &mut chain),
                DEFLATE => self.deflate(&mut chain),
                STATS if self.negotiated & F_STATS_VQ != 0 => {
                    self.take_stats(&mut queue, chain);
                    continue;
                }
                _ if self.negotiated & F_REPORTING != 0 => self.report(mem, &chain),
                _ => Done { well_formed: false, bytes: 0 },
            };
            if !done.well_formed {
                queue.count_mistake();
            }
            bytes += done.bytes;
            queue.push(chain.head, 0);
        }
        Progress::More
    }

    fn host_sources(&self) -> Vec<HostSource> {
        vec![HostSource { fd: self.timer.as_raw_fd(), token: TIMER, writable: false }]
    }

    fn host_event(&mut self, queues: &mut Queues<'_>, _token: u32) -> Progress {
        // Without this, the timer would not tell again.
        let ticked = rustix::io::read(&self.timer, &mut [0; 8]).is_ok();
        if ticked && let Some(head) = self.stats_head.take() {
            queues.get(STATS).push(head, 0);
        }
        Progress::Done
    }

    fn update(&mut self, config: &dyn std::any::Any) -> Result<(), UpdateError> {
        let Some(config) = config.downcast_ref::<Config>() else { return Ok(()) };
        let pages = config.pages(&self.machine)?;
        self.stats_interval = Duration::from_secs(config.stats.into());
        self.set_timer();
        if pages != self.shown.field(0) {
            self.shown.config.update(|bytes| bytes[..4].copy_from_slice(&pages.to_le_bytes()));
        }
        Ok(())
    }

    fn save(&self) -> Result<Value, SnapshotError> {
        let told = self.shown.told();
        to_value(&State {
            stats_head: self.stats_head.as_ref().map(Head::save),
            inflated: told.inflated,
            deflated: told.deflated,
            reported: told.reported,
        })
    }

    fn restore(&mut self, queues: &mut Queues<'_>, saved: Value) -> Result<(), SnapshotError> {
        let saved: State = from_value(saved)?;
        self.stats_head = saved.stats_head.map(|head| queues.get(STATS).hold_again(head)).transpose()?;
        let mut told = self.shown.told();
        (told.inflated, told.deflated, told.reported) = (saved.inflated, saved.deflated, saved.reported);
        Ok(())
    }

    fn reset(&mut self) {
        self.negotiated = 0;
        self.stats_head = None;
        self.shown.config.driver_write(WRITABLE.start as u64, &[0; WRITABLE.end - WRITABLE.start]);
        self.shown.told().stats = Stats::default();
    }
}

#[cfg(test)]
mod tests;
