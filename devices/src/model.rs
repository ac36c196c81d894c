//! The traits that hold the device model together.
//!
//! [`VirtioDevice`] is what one device file implements; [`DeviceHost`] and [`Notifier`] are what it and its
//! transport are handed. Everything that runs (threads, eventfds, epoll) is on the other side of these.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::os::fd::{BorrowedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ciborium::Value;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::snapshot::SnapshotError;
use crate::storage::{Storage, StorageError};
use crate::throttle::Limits;
use crate::virtio::config_space::ConfigSpace;
use crate::virtio::net::MacAddr;
use crate::virtio::queue::{QueueConfig, Queues};
use crate::virtio::unit::UnitState;

/// Something that answers on an address range of a bus, port I/O or MMIO.
///
/// It takes `&self`: a vCPU holds no lock of the bus while it is here, so a device guards its own state.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads at `offset` from the start of the range. `data` arrives
    /// zeroed and may have any length the guest chose.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes what the guest wrote at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// An interrupt line into the guest's interrupt controller; edge triggered.
pub trait IrqLine: Send + Sync {
    /// Raises the line once.
    fn trigger(&self);
}

/// Sends message signalled interrupts into the guest's interrupt controller.
pub trait MsiSender: Send + Sync {
    /// Sends one. Address and data are the guest's own choice, and what they do is the guest's own affair.
    fn send(&self, address: u64, data: u32);
}

/// How the owner of a virtio device tells the guest that something happened. Each transport has its own.
pub trait Notifier: Send + Sync {
    /// Buffers of `queue` were used and the driver wants to know.
    fn queue_used(&self, queue: u16);

    /// The configuration space changed (virtio 1.3 §2.5).
    fn config_changed(&self);

    /// The device cannot go on before a reset: DEVICE_NEEDS_RESET (virtio 1.3 §2.1.2).
    fn needs_reset(&self);
}

/// What a transport asks of whoever owns the device and its queues.
///
/// The calls come from a vCPU thread and return when the owner has done them, so that a driver which reads
/// the status back sees the truth.
pub trait DeviceHost: Send + Sync {
    /// What log lines call the device.
    fn name(&self) -> &str;

    /// The driver set DRIVER_OK: start the device with these negotiated features and queues.
    fn activate(&self, features: u64, queues: &[QueueConfig]) -> Result<(), ActivateError>;

    /// The driver wrote 0 to the status register: drop the queues, return to the fresh state.
    fn reset(&self);

    /// The driver notified `queue` by a register write that no ioeventfd caught.
    fn kick(&self, queue: u16);

    /// The driver wrote to the configuration space, where it may.
    fn config_written(&self) {}

    /// The device's state for a snapshot.
    fn save(&self) -> Result<UnitState, SnapshotError>;

    /// The device takes over a state: see [`crate::virtio::unit::Unit::restore`].
    fn restore(&self, saved: &UnitState, features: u64, queues: &[QueueConfig]) -> Result<(), SnapshotError>;
}

/// Why a device could not be started with what the driver configured.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ActivateError {
    /// A queue's size is not a power of two, or is larger than offered.
    #[error("queue {queue} has size {size}; a power of two up to {max} is allowed")]
    QueueSize {
        /// Queue index.
        queue: u16,
        /// Size in descriptors that the driver wrote.
        size: u16,
        /// Largest size in descriptors that the device offers.
        max: u16,
    },
    /// A ring is misaligned or does not lie in guest memory.
    #[error("the rings of queue {queue} are misaligned or outside guest memory")]
    QueueAddress {
        /// Queue index.
        queue: u16,
    },
    /// The owner of the device is gone or could not watch it.
    #[error("the device's runner is not available")]
    Runner,
}

/// Whether a device has more to do right now than it did in this call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Everything that could be done is done: wait for the next kick or host event.
    Done,
    /// Work is left because this call's budget is used up: call again soon, after the others had a turn.
    More,
}

/// A host file descriptor that a device waits for.
///
/// It is watched edge triggered: after an event the device reads (or writes) until `EAGAIN`, or remembers by itself
/// that it has not. A device with many descriptors has an epoll instance of its own, and that is its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostSource {
    /// The descriptor; the device owns it and keeps it open as long as the device lives.
    pub fd: RawFd,
    /// The device's own name for it, handed back in [`VirtioDevice::host_event`].
    pub token: u32,
    /// Watched for room to write, too.
    pub writable: bool,
}

/// A file that a device wants to have in the guest's address space, apart from RAM: the guest reads and writes it by
/// itself.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    /// What is mapped, shared.
    pub file: BorrowedFd<'a>,
    /// Bytes of it. The guest sees zeroes from there to the next multiple of [`Window::ALIGN`]; only a read-only file
    /// may end elsewhere.
    pub bytes: u64,
    /// The guest can only read it.
    pub read_only: bool,
}

impl Window<'_> {
    /// What address and size in the guest's address space are multiples of, in bytes: large pages, and what Linux can add to
    /// its memory map.
    pub const ALIGN: u64 = 2 << 20;
}

/// One virtio device: identity, configuration space and what it does with its queues.
///
/// It has no thread, eventfd, transport or mutex. Its owner lends it the queues for the length of a call and
/// sends the interrupts that its pushes call for.
pub trait VirtioDevice: Send {
    /// Device ID, virtio 1.3 §5.
    fn device_id(&self) -> u32;

    /// Device-specific feature bits on offer (bits 0 to 23 and 50 to 127 of virtio 1.3 §2.2). The transport
    /// adds the common ones.
    fn features(&self) -> u64;

    /// Largest size in descriptors of each queue; the length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// The configuration space, shared so that a vCPU can read it without this device's owner.
    fn config_space(&self) -> Arc<ConfigSpace>;

    /// Counters of this device.
    fn counters(&self) -> Arc<Counters>;

    /// The driver is ready and `features` are negotiated.
    fn activate(&mut self, features: u64);

    /// The driver notified `queue`. Serves at most what the loan's budget allows.
    fn process(&mut self, queues: &mut Queues<'_>, queue: u16) -> Progress;

    /// Host descriptors to watch while the device is active.
    fn host_sources(&self) -> Vec<HostSource> {
        Vec::new()
    }

    /// The descriptor named `token` became ready.
    fn host_event(&mut self, _queues: &mut Queues<'_>, _token: u32) -> Progress {
        Progress::Done
    }

    /// The file that it wants in the guest's address space. Asked once, before any other call but [`Self::config_space`].
    ///
    /// Buffers of its queues, or of another device's, cannot lie in it: such an address is a guest's mistake.
    fn window(&self) -> Option<Window<'_>> {
        None
    }

    /// [`Self::window`] is at this address of the guest's.
    fn placed(&mut self, _guest_addr: u64) {}

    /// Index into [`DeviceKind::limits`] of the limits that `queue` is subject to.
    fn lane(&self, _queue: u16) -> usize {
        0
    }

    /// Whether the driver goes on without the buffers of `queue` that the device has used, so that an interrupt for them can
    /// wait a little (see `virtio/patience.rs`): a queue by which the driver sends. Asked before anything is negotiated.
    fn can_wait(&self, _queue: u16) -> bool {
        false
    }

    /// Takes over what changed in the configuration: `config` is the kind's own, whole, and differs in nothing but
    /// [`DeviceKind::LIVE`] keys. An error leaves everything as it was.
    ///
    /// Requests in flight are finished: [`Self::drain`] was called before.
    fn update(&mut self, _config: &dyn Any) -> Result<(), UpdateError> {
        Ok(())
    }

    /// Finishes all requests in flight before it returns.
    fn drain(&mut self, _queues: &mut Queues<'_>) {}

    /// What a Linux guest is to be told on its command line about this device, the `nth` (from 0) of its kind.
    fn kernel_parameters(&self, _nth: usize) -> Option<String> {
        None
    }

    /// What a snapshot keeps of the device itself: what is neither in its queues, nor in its configuration space, nor in
    /// its configuration. Nothing, for most.
    fn save(&self) -> Result<Value, SnapshotError> {
        Ok(Value::Null)
    }

    /// What it keeps on the host for its guest, apart from what the guest can only read. Nothing, for most.
    fn storage(&self) -> Option<Storage> {
        None
    }

    /// Writes all of that to the empty file `to`, so that [`DeviceKind::begin_with`] can begin with it. The device is
    /// drained, and nothing runs.
    fn save_storage(&self, _to: &File) -> Result<(), StorageError> {
        Ok(())
    }

    /// Whether a guest that has seen the configuration space `saved` can go on with `now`, which differs where the device alone
    /// writes.
    fn check_config(&self, _saved: &[u8], _now: &[u8]) -> Result<(), SnapshotError> {
        Ok(())
    }

    /// Takes over what [`Self::save`] gave. The device is active, and nothing has run since [`Self::activate`].
    fn restore(&mut self, _queues: &mut Queues<'_>, _saved: Value) -> Result<(), SnapshotError> {
        Ok(())
    }

    /// Forgets all that the driver did. Requests in flight are finished or dropped before this returns.
    fn reset(&mut self);
}

/// What a device's host side may depend on of the machine around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineShape {
    /// Number of vCPUs.
    pub cpus: u8,
    /// RAM in bytes.
    pub memory: u64,
    /// The RAM was taken or reserved on purpose, so it is not to be given back unasked.
    pub memory_stays: bool,
}

impl Default for MachineShape {
    /// One vCPU and 256 MiB.
    fn default() -> Self {
        Self { cpus: 1, memory: 256 << 20, memory_stays: false }
    }
}

/// What a transport shows of a device, apart from the device itself.
#[derive(Clone, Debug)]
pub struct Identity {
    /// See [`VirtioDevice::device_id`].
    pub id: u32,
    /// See [`VirtioDevice::features`].
    pub features: u64,
    /// See [`VirtioDevice::queue_sizes`].
    pub queue_sizes: Vec<u16>,
    /// See [`VirtioDevice::config_space`].
    pub config: Arc<ConfigSpace>,
}

impl Identity {
    /// The identity of `device`.
    pub fn of(device: &dyn VirtioDevice) -> Self {
        Self {
            id: device.device_id(),
            features: device.features(),
            queue_sizes: device.queue_sizes().to_vec(),
            config: device.config_space(),
        }
    }
}

/// Counts that every device keeps, readable from any thread while it works.
///
/// ```
/// use devices::model::Counters;
///
/// let counters = Counters::default();
/// Counters::add(&counters.requests, 2);
/// assert!(counters.all().contains(&("requests", 2)));
/// ```
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests or packets completed.
    pub requests: AtomicU64,
    /// Bytes moved from the host to the guest.
    pub bytes_to_guest: AtomicU64,
    /// Bytes moved from the guest to the host.
    pub bytes_from_guest: AtomicU64,
    /// Packets dropped, because the other side could not take them.
    pub dropped: AtomicU64,
    /// Requests that failed for a reason on the host.
    pub host_errors: AtomicU64,
    /// Requests that broke the specification.
    pub guest_mistakes: AtomicU64,
    /// Times that requests had to wait for a limit.
    pub throttled: AtomicU64,
    /// What only this kind of device has.
    pub own: Option<Arc<dyn Facts>>,
}

impl Counters {
    /// Adds `n` to one of the counters; order between counters does not matter.
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }

    /// Those that every device has, by names that stay.
    pub fn common(&self) -> [(&'static str, &AtomicU64); 7] {
        [
            ("requests", &self.requests),
            ("bytes_to_guest", &self.bytes_to_guest),
            ("bytes_from_guest", &self.bytes_from_guest),
            ("dropped", &self.dropped),
            ("host_errors", &self.host_errors),
            ("guest_mistakes", &self.guest_mistakes),
            ("throttled", &self.throttled),
        ]
    }

    /// See [`Facts::news`].
    pub fn news(&self) -> Option<(&'static str, u64)> {
        self.own.as_ref()?.news()
    }

    /// All of them, by names that stay.
    pub fn all(&self) -> Vec<(&'static str, u64)> {
        let own = self.own.iter().flat_map(|own| own.facts());
        let common = self.common().map(|(name, counter)| (name, counter.load(Ordering::Relaxed)));
        common.into_iter().chain(own).collect()
    }
}

/// What only one kind of device has to tell the operator, readable from any thread while it works.
pub trait Facts: fmt::Debug + Send + Sync {
    /// Names that stay, and their values now.
    fn facts(&self) -> Vec<(&'static str, u64)>;

    /// The one of them, if any, of which the operator is told when it changes. It is looked at after every turn of the
    /// device.
    fn news(&self) -> Option<(&'static str, u64)> {
        None
    }
}

/// A device kind's configuration: plain data, and the way from data to a device.
///
/// One implementation per device file, named once in [`crate::registry`].
pub trait DeviceKind: Clone + fmt::Debug + PartialEq + Serialize + DeserializeOwned {
    /// The kind's name: command line flag, `kind` in a configuration, prefix of its metrics.
    const NAME: &'static str;

    /// Syntax of the command line value, such as `path=FILE[,ro]`.
    const SYNTAX: &'static str;

    /// One line for `--help`.
    const HELP: &'static str;

    /// The key that a bare first value stands for (`--disk FILE` is `--disk path=FILE`), if any.
    const BARE_KEY: Option<&'static str> = None;

    /// A machine that says nothing has one, so the command line has a flag to leave it out. Such a kind works
    /// with nothing chosen.
    const ON_BY_DEFAULT: bool = false;

    /// A Linux guest takes only one device of this kind, so that a machine has no more.
    const SINGLE: bool = false;

    /// Keys, limits apart, whose values can change while the machine runs: see [`VirtioDevice::update`].
    const LIVE: &'static [&'static str] = &[];

    /// Keys, limits and [`Self::LIVE`] apart, that say what the device is on the host: a machine which is restored from a
    /// snapshot may have others there. What is not listed is what the guest has seen.
    const HOST: &'static [&'static str] = &[];

    /// Opens the host's side and makes the device. The error is a sentence for the operator.
    fn open(&self, machine: &MachineShape) -> Result<Box<dyn VirtioDevice>, OpenError>;

    /// How a value is refused: with what is wrong with it and what would be right.
    fn refused(problem: impl Into<String>) -> OpenError {
        OpenError::Value { kind: Self::NAME, problem: problem.into() }
    }

    /// The name that the operator gave this device.
    fn id(&self) -> Option<&str> {
        None
    }

    /// The guest's Ethernet address on it.
    fn mac(&self) -> Option<MacAddr> {
        None
    }

    /// Makes of it what a snapshot keeps: what the guest sees and what follows from names on the host is written down, so that
    /// a machine which is restored with other names has it as well, and secrets are left out.
    fn pin(&mut self) {}

    /// Has the device begin with what [`VirtioDevice::save_storage`] wrote to the file `saved`, in this format. It never writes
    /// that file: what the guest stores is its own, and ends with the machine.
    fn begin_with(&mut self, _saved: &Path, _format: &str) -> Result<(), OpenError> {
        Err(Self::refused("it keeps nothing that a snapshot could have"))
    }

    /// Called when the configuration was `before` and something of it is another now: takes back what was said of that alone.
    fn changed_from(&mut self, _before: &Self) {}

    /// What the guest may use of the device, a lane each (see [`VirtioDevice::lane`]). All kinds name the keys
    /// alike: see [`crate::throttle::is_limit`].
    fn limits(&self) -> Vec<Limits> {
        Vec::new()
    }

    /// The guest's root file system is on it.
    fn is_root(&self) -> bool {
        false
    }

    /// A kernel may print on it.
    fn is_console(&self) -> bool {
        false
    }

    /// The device gets a thread of its own.
    fn own_runner(&self) -> bool {
        false
    }

    /// A working device of this kind that needs neither root nor files of the user: conformance tests and
    /// fuzz targets run on it.
    #[cfg(any(test, feature = "specimen"))]
    fn specimen() -> Box<dyn VirtioDevice>;
}

/// Why the host's side of a device could not be opened: one sentence that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file could not be opened or is of no use.
    #[error("cannot open {what} '{path}': {reason}; {remedy}")]
    File {
        /// What the file is to the user, such as `disk`.
        what: &'static str,
        /// Its path as given.
        path: String,
        /// What is wrong, in a few words.
        reason: String,
        /// What to do about it.
        remedy: String,
    },
    /// A value does not fit.
    #[error("{kind}: {problem}")]
    Value {
        /// The device kind.
        kind: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
}

impl OpenError {
    /// How the file at `path` is refused, which is `what` to the user: with a reason and a remedy.
    pub fn file(what: &'static str, path: &Path) -> impl Fn(&str, &str) -> Self {
        let path = path.display().to_string();
        move |reason, remedy| Self::File {
            what,
            path: path.clone(),
            reason: reason.into(),
            remedy: remedy.into(),
        }
    }
}

/// Why a device's configuration could not be changed while the machine runs: a sentence for the operator.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// The patch does not make a configuration.
    #[error("{kind}: {problem}")]
    Value {
        /// The device kind.
        kind: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The key exists and cannot change now.
    #[error("{kind}: '{key}' cannot change while the machine runs; {can}")]
    Fixed {
        /// The device kind.
        kind: &'static str,
        /// The key.
        key: String,
        /// What can.
        can: String,
    },
    /// The host's side could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// Something that concerns the whole machine, raised by a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest asked for a reset (keyboard controller, ACPI reset register).
    Reset,
    /// The guest asked to be switched off (ACPI sleep register, S5).
    PowerOff,
    /// The guest's kernel panicked (pvpanic).
    Panicked,
    /// The console carried a kernel's last words; only a reset soon after makes a panic of it, since every
    /// program that may write to the console can say them.
    LastWords,
    /// The first byte of output came out of a console.
    ConsoleOutput,
    /// The guest's init runs (a write to the boot port).
    UserSpaceReached,
    /// The guest's init reports the exit status of its command.
    ExitStatus(u8),
}

/// Takes what devices have to say about the whole machine. Called on vCPU threads: it must not wait.
pub trait MachineEvents: Send + Sync {
    /// `event` happened.
    fn raise(&self, event: MachineEvent);
}
