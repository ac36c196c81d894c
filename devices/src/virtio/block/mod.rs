//! The block device (virtio 1.3 §5.2) on a disk image or a block device of the host.
//!
//! A request goes through three steps: `request` reads it from its chain, a `job` does it, and the device completes
//! it. Jobs that are a copy to or from the host's page cache are done on the spot; all others are given to an `engine`,
//! many at a time, and come back in any order.
//!
//! **Order.** A flush covers the writes that were completed before it was asked for; these are in the host's page
//! cache or on its disk by then, so it needs to wait for nobody. For a driver that did not negotiate FLUSH, each
//! write is durable before it is completed (RWF_DSYNC), in the engine like any other.
//!
//! **Memory.** Whatever the kernel may still write to is kept mapped by its job, and jobs are waited for before a
//! reset, a pause or a drop returns. If the host's disk hangs, so do these.

mod bounce;
mod config;
mod disk;
mod engine;
mod job;
mod qcow2;
mod request;
mod ring;
mod space;
mod threads;

use std::any::Any;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::config_space::ConfigSpace;
use super::queue::{Queues, VirtQueue};
use crate::model::{Counters, DeviceKind, HostSource, OpenError, Progress, UpdateError, VirtioDevice};
use crate::snapshot::SnapshotError;
use crate::storage::{Storage, StorageError};
pub use config::{Cache, Config, Format};
use disk::Disk;
pub(super) use disk::open_locked;
pub use engine::Kind as EngineKind;
use engine::{Engine, Finished};
use job::{Job, Step, Task};
use request::{Operation, Request, Status};

/// Bytes of a sector: the unit of capacity and of request addresses, whatever the disk's block size.
pub const SECTOR: u64 = 512;

/// Bytes of a disk's identity string (virtio 1.3 §5.2.6).
const ID_BYTES: usize = 20;
const QUEUE_SIZE: u16 = 256;
/// Bytes moved after which other devices get a turn. The request that reaches it is done whole.
const MAX_PER_CALL: usize = 16 << 20;
/// Most bytes of data in one request, since a request is not shared between turns.
const MAX_REQUEST: usize = 64 << 20;
/// Most requests in the engine's hands; more stay in their queues.
const MAX_IN_FLIGHT: usize = 256;
/// Most bytes that are read or written on the spot in one go.
const MAX_ON_THE_SPOT: usize = 256 << 10;
/// A copy to the page cache that takes longer than this was made to wait until the host's disk caught up.
const SLOW: Duration = Duration::from_millis(20);
/// How long writes go to the engine then.
const AVOID: Duration = Duration::from_secs(1);
/// Most warnings in a device's life: there is one for each activation, and a guest can reset the device as often
/// as it likes.
const MAX_WARNINGS: u8 = 8;

/// The block device.
struct Block {
    settings: Config,
    disk: Arc<Disk>,
    engine: Box<dyn Engine>,
    /// Capacity in sectors.
    sectors: u64,
    id: [u8; ID_BYTES],
    queue_sizes: Vec<u16>,
    /// Features that the driver negotiated.
    features: u64,
    /// Queues that have chains for which there was no room in the engine.
    waiting: u32,
    /// The host makes writers wait, until then.
    slow_until: Option<Instant>,
    /// Room for what the engine returns.
    done: Vec<Finished>,
    /// The operator was told, in this activation, that the host fails.
    warned: bool,
    warnings: u8,
    config: Arc<ConfigSpace>,
    counters: Arc<Counters>,
}

/// Why a request failed.
enum Failure {
    /// It breaks the specification, or what the device offered.
    Guest,
    /// It is of a type that this device does not have, which a driver may well try.
    Unsupported,
    /// The host's file failed.
    Host(std::io::Error),
}

/// What becomes of a request after a first look.
enum Verdict {
    /// There is something to do.
    Do(Task),
    /// There is not.
    Done,
}

impl Block {
    fn new(settings: Config, disk: Disk, engine: Box<dyn Engine>, queues: u16) -> Result<Self, OpenError> {
        let sectors = disk.capacity(settings.size.map(|size| size.0))?;
        Ok(Self::with_sectors(settings, disk, engine, queues, sectors))
    }

    fn with_sectors(
        settings: Config,
        disk: Disk,
        engine: Box<dyn Engine>,
        queues: u16,
        sectors: u64,
    ) -> Self {
        let mut id = [0; ID_BYTES];
        let name = settings.id.as_deref().unwrap_or_default();
        id[..name.len()].copy_from_slice(name.as_bytes());
        let config = ConfigSpace::read_only(&space::bytes(sectors, disk.block(), queues.into()));
        Self {
            settings,
            disk: disk.into(),
            engine,
            sectors,
            id,
            queue_sizes: vec![QUEUE_SIZE; queues.into()],
            features: 0,
            waiting: 0,
            slow_until: None,
            done: Vec::new(),
            warned: false,
            warnings: 0,
            config: config.into(),
            counters: Arc::default(),
        }
    }

    /// A disk of 64 KiB in memory with two queues, whose sectors hold their own number in every byte.
    #[cfg(any(test, feature = "specimen"))]
    fn specimen(ro: bool) -> Self {
        Self::on(Disk::specimen(ro), EngineKind::Auto)
    }

    #[cfg(any(test, feature = "specimen"))]
    fn on(disk: Disk, engine: EngineKind) -> Self {
        let settings =
            Config { ro: disk.read_only(), id: Some("specimen".into()), ..Config::new(disk.path()) };
        Self::new(settings, disk, engine::open(engine).expect("an engine"), 2).expect("a disk")
    }

    fn negotiated(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Whether what is written is to be durable before it is completed: for a driver that cannot flush.
    fn durable(&self) -> bool {
        !self.negotiated(VIRTIO_BLK_F_FLUSH) && !self.settings.is_lost()
    }

    /// Takes chains from a queue as long as there are some, the call's budget lasts, and there is room.
    fn take(&mut self, queue: &mut VirtQueue<'_>, index: u16) -> Progress {
        let mut moved = 0;
        while moved < MAX_PER_CALL {
            if self.engine.in_flight() >= MAX_IN_FLIGHT {
                self.waiting |= 1 << index;
                return Progress::Done;
            }
            let Some(chain) = queue.pop() else {
                return if queue.exhausted() { Progress::More } else { Progress::Done };
            };
            let request = match Request::parse(chain) {
                Ok(request) => request,
                Err(head) => {
                    queue.count_mistake();
                    queue.push(head, 0);
                    continue;
                }
            };
            moved += request.bytes();
            queue.charge(request.bytes());
            self.begin(request, queue, index);
        }
        Progress::More
    }

    /// Looks at a request, and does it or has it done.
    fn begin(&mut self, mut request: Request<'_>, queue: &mut VirtQueue<'_>, index: u16) {
        match self.judge(&mut request) {
            Ok(Verdict::Do(task)) => {
                let (data, ticket) = request.hold(index);
                self.go_on(Box::new(Job::new(self.disk.clone(), task, data, ticket)), queue);
            }
            verdict => {
                let status = self.status(verdict.map(|_| ()), queue);
                let (head, written) = request.complete(status);
                queue.push(head, written);
            }
        }
    }

    /// Checks a request, and says what is to be done.
    fn judge(&self, request: &mut Request<'_>) -> Result<Verdict, Failure> {
        let durable = self.durable();
        let task = match request.operation {
            Operation::Read { sector } => Task::Read { offset: self.extent(sector, request.to_guest.len())? },
            Operation::Write { sector } => {
                let offset = self.extent(sector, request.from_guest.len())?;
                self.writable()?;
                Task::Write { offset, durable }
            }
            // There is nothing to flush, and some file systems refuse it; or the operator does not want it.
            Operation::Flush if self.disk.read_only() || self.settings.is_lost() => {
                return Ok(Verdict::Done);
            }
            Operation::Flush => Task::Flush,
            Operation::GetId => {
                request.to_guest.write(&self.id);
                return Ok(Verdict::Done);
            }
            Operation::Discard if self.negotiated(VIRTIO_BLK_F_DISCARD) => self.clear(request)?,
            Operation::WriteZeroes if self.negotiated(VIRTIO_BLK_F_WRITE_ZEROES) => self.clear(request)?,
            Operation::Discard | Operation::WriteZeroes | Operation::Unsupported => {
                return Err(Failure::Unsupported);
            }
            Operation::TooLarge => return Err(Failure::Guest),
        };
        Ok(Verdict::Do(task))
    }

    /// The driver may not have looked at VIRTIO_BLK_F_RO.
    fn writable(&self) -> Result<(), Failure> {
        if self.disk.read_only() { Err(Failure::Guest) } else { Ok(()) }
    }

    fn clear(&self, request: &mut Request<'_>) -> Result<Task, Failure> {
        self.writable()?;
        let ranges = request.ranges(self.sectors, self.disk.block()).map_err(|status| match status {
            Status::Unsupported => Failure::Unsupported,
            _ => Failure::Guest,
        })?;
        Ok(Task::Clear { ranges, durable: self.durable() })
    }

    /// Does a job's steps as far as they can be done on the spot, and gives the first that cannot to the engine.
    fn go_on(&mut self, mut job: Box<Job>, queue: &mut VirtQueue<'_>) {
        while job.prepare() {
            let Some(result) = self.on_the_spot(&mut job) else { return self.engine.start(job) };
            if let Err(error) = job.advance(result) {
                return self.complete(*job, Err(Failure::Host(error)), queue);
            }
        }
        self.complete(*job, Ok(()), queue);
    }

    /// Does a step that is a mere copy to or from the host's page cache, which no engine does faster: io_uring would hand
    /// writes to a thread of the kernel on most file systems, and a ring costs more than the call it saves.
    fn on_the_spot(&mut self, job: &mut Job) -> Option<std::io::Result<usize>> {
        let copies = self.settings.cache != Cache::None && job.bytes() <= MAX_ON_THE_SPOT;
        match job.step() {
            Step::Read { .. } if copies => job.perform_cached(),
            Step::Write { durable: false, .. } if copies && job.disk().image().is_none() => self.copy(job),
            _ => None,
        }
    }

    /// Writes to the page cache, but while the host makes its writers wait.
    fn copy(&mut self, job: &mut Job) -> Option<std::io::Result<usize>> {
        let began = Instant::now();
        if self.slow_until.is_some_and(|until| began <= until) {
            return None;
        }
        self.slow_until = None;
        let result = job.perform();
        let ended = Instant::now();
        if ended - began > SLOW {
            self.slow_until = Some(ended + AVOID);
        }
        Some(result)
    }

    /// Gives a request that has been done, or has failed, back to the driver.
    fn complete(&mut self, job: Job, result: Result<(), Failure>, queue: &mut VirtQueue<'_>) {
        if result.is_ok() {
            let bytes = job.ticket.bytes as u64;
            match job.step() {
                Step::Read { .. } => Counters::add(&self.counters.bytes_to_guest, bytes),
                Step::Write { .. } => Counters::add(&self.counters.bytes_from_guest, bytes),
                Step::Sync | Step::Clear { .. } => {}
            }
        }
        let status = self.status(result, queue);
        let (head, written) = job.end().complete(status);
        queue.push(head, written);
    }

    /// Counts a request that has ended, and says how.
    fn status(&mut self, result: Result<(), Failure>, queue: &mut VirtQueue<'_>) -> Status {
        Counters::add(&self.counters.requests, 1);
        match result {
            Ok(()) => Status::Ok,
            Err(Failure::Unsupported) => Status::Unsupported,
            Err(Failure::Guest) => {
                queue.count_mistake();
                Status::IoError
            }
            Err(Failure::Host(error)) => {
                self.host_failed(&error);
                Status::IoError
            }
        }
    }

    /// Begins what was given to the engine, and completes what is done, until nothing more is done at once.
    fn collect(&mut self, queues: &mut Queues<'_>) {
        loop {
            self.engine.submit();
            let mut done = std::mem::take(&mut self.done);
            self.engine.finished(&mut done);
            let idle = done.is_empty();
            for Finished { mut job, result } in done.drain(..) {
                let mut queue = queues.get(job.ticket.queue);
                match job.advance(result) {
                    Ok(()) => self.go_on(job, &mut queue),
                    Err(error) => self.complete(*job, Err(Failure::Host(error)), &mut queue),
                }
            }
            self.done = done;
            if idle {
                return;
            }
        }
    }

    /// Serves queues whose chains found no room, now that there is some.
    fn serve_waiting(&mut self, queues: &mut Queues<'_>) -> Progress {
        let mut progress = Progress::Done;
        while self.waiting != 0 && self.engine.in_flight() < MAX_IN_FLIGHT && progress == Progress::Done {
            let index = self.waiting.trailing_zeros() as u16;
            self.waiting &= !(1 << index);
            progress = self.take(&mut queues.get(index), index);
            self.collect(queues);
            if progress == Progress::More {
                self.waiting |= 1 << index;
            }
        }
        progress
    }

    /// Counts a failure of the host, and tells the operator of the first.
    fn host_failed(&mut self, error: &std::io::Error) {
        Counters::add(&self.counters.host_errors, 1);
        if self.warned || self.warnings == MAX_WARNINGS {
            return;
        }
        let path = self.disk.path().display();
        (self.warned, self.warnings) = (true, self.warnings + 1);
        tracing::warn!(
            "disk '{path}': {error}; the guest gets I/O errors, and more of them are only counted"
        );
    }

    /// Where on the disk `bytes` bytes from `sector` are, if they are on it at all.
    fn extent(&self, sector: u64, bytes: usize) -> Result<u64, Failure> {
        let end = sector.checked_add(bytes as u64 / SECTOR);
        if end.is_none_or(|end| end > self.sectors) {
            return Err(Failure::Guest);
        }
        // The capacity is a file's size, so that an offset below it fits in 63 bits.
        let offset = sector * SECTOR;
        let whole = (offset | bytes as u64).is_multiple_of(self.disk.block().into());
        if whole { Ok(offset) } else { Err(Failure::Guest) }
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        space::features(self.disk.read_only(), self.queue_sizes.len())
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config_space(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        self.warned = false;
    }

    fn process(&mut self, queues: &mut Queues<'_>, queue: u16) -> Progress {
        let progress = self.take(&mut queues.get(queue), queue);
        self.collect(queues);
        match (progress, self.serve_waiting(queues)) {
            (Progress::Done, Progress::Done) => Progress::Done,
            _ => Progress::More,
        }
    }

    fn host_sources(&self) -> Vec<HostSource> {
        vec![HostSource { fd: self.engine.event(), token: 0, writable: false }]
    }

    fn host_event(&mut self, queues: &mut Queues<'_>, _token: u32) -> Progress {
        self.collect(queues);
        self.serve_waiting(queues)
    }

    /// A larger disk is news for the driver, as when it grows while the machine runs. A smaller one lacks what file systems
    /// in the guest's memory know to be there.
    fn check_config(&self, saved: &[u8], now: &[u8]) -> Result<(), SnapshotError> {
        let bytes = |config: &[u8]| {
            let sectors = config.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            sectors.saturating_mul(SECTOR)
        };
        let (saved, found) = (bytes(saved), bytes(now));
        match found < saved {
            true => Err(SnapshotError::Differs {
                what: "a disk of this many bytes:",
                saved: saved.to_string(),
                found: found.to_string(),
            }),
            false => Ok(()),
        }
    }

    fn storage(&self) -> Option<Storage> {
        self.disk.storage()
    }

    fn save_storage(&self, to: &File) -> Result<(), StorageError> {
        self.disk.save(to)
    }

    fn update(&mut self, config: &dyn Any) -> Result<(), UpdateError> {
        let Some(config) = config.downcast_ref::<Config>() else { return Ok(()) };
        let size = config.size.map(|size| size.0);
        let moved = config.path != self.settings.path;
        let sectors = if moved {
            let disk = Disk::open(config)?;
            if disk.block() != self.disk.block() {
                let problem = format!(
                    "'{}' has blocks of {} bytes, and the guest knows the disk with {}; choose a file on the same file system",
                    config.path.display(),
                    disk.block(),
                    self.disk.block()
                );
                return Err(Config::refused(problem).into());
            }
            let sectors = disk.capacity(size)?;
            self.disk = disk.into();
            sectors
        } else {
            self.disk.capacity(size)?
        };
        self.settings = config.clone();
        if moved || sectors != self.sectors {
            self.sectors = sectors;
            self.config.update(|bytes| bytes[..8].copy_from_slice(&sectors.to_le_bytes()));
        }
        Ok(())
    }

    fn drain(&mut self, queues: &mut Queues<'_>) {
        self.collect(queues);
        while self.engine.in_flight() > 0 {
            self.engine.wait();
            self.collect(queues);
        }
    }

    fn kernel_parameters(&self, nth: usize) -> Option<String> {
        let mode = if self.settings.ro { "ro" } else { "rw" };
        self.settings.root.then(|| format!("root=/dev/vd{} {mode}", config::letters(nth)))
    }

    fn reset(&mut self) {
        while self.engine.in_flight() > 0 {
            self.engine.wait();
            self.engine.finished(&mut self.done);
            self.done.clear();
        }
        (self.features, self.waiting) = (0, 0);
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod disk_tests;

#[cfg(test)]
mod saved_tests;
