//! A driver for tests and fuzz targets: real rings in real guest memory, in front of the real transport, with
//! an owner that gives the device its turns on the caller's thread.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap};

use super::F_VERSION_1;
use super::queue::QueueConfig;
use super::test_wire::{Interrupts, Kind, Signals, Wire};
use super::unit::{Unit, UnitState};
use crate::GuestMemory;
use crate::model::{
    ActivateError, BusDevice, Counters, DeviceHost, Identity, Progress, UpdateError, VirtioDevice,
};
use crate::snapshot::{Saved, Snapshot, SnapshotError};
use crate::throttle::Limits;

/// The two regions of guest memory, with a hole between them.
pub const REGIONS: [(u64, usize); 2] = [(0, 0x10_0000), (0x20_0000, 0x1_0000)];
/// Where buffers may be: everything in the first region from here is the driver's to use.
pub const DATA: u64 = 0x4_0000;
/// Bytes of a page, the unit of the dirty bitmap.
pub const PAGE: usize = 4096;

/// The descriptor says that another one follows.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// The device writes the descriptor's buffer.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// The descriptor's buffer is a table of descriptors.
pub const INDIRECT: u16 = virtio_bindings::virtio_ring::VRING_DESC_F_INDIRECT as u16;

/// Turns after which a device that still has work with a driver that does nothing counts as stuck.
const MAX_TURNS: usize = 100_000;

/// Guest memory of the two [`REGIONS`], with a dirty bitmap.
pub fn memory() -> GuestMemory {
    let page = NonZeroUsize::new(PAGE).expect("a page has a size");
    let regions = REGIONS.map(|(base, len)| {
        let mapping = MmapRegionBuilder::new_with_bitmap(len, Some(AtomicBitmap::new(len, page)))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .expect("memory");
        GuestRegionMmap::new(mapping, GuestAddress(base)).expect("no overflow")
    });
    GuestMemory::from_regions(regions.into()).expect("no overlap")
}

/// What a machine's runner is to a device, without a thread: turns happen in the call that causes them.
struct Host(Mutex<Unit>);

impl Host {
    fn unit(&self) -> MutexGuard<'_, Unit> {
        self.0.lock().expect("no panic in a turn")
    }

    /// Runs `turn` on the active device until it is done.
    fn turns(&self, mut turn: impl FnMut(&mut Unit) -> Progress) {
        let mut unit = self.unit();
        for _ in 0..MAX_TURNS {
            if !unit.is_active() || turn(&mut unit) == Progress::Done {
                return;
            }
        }
        panic!("the device never gets done");
    }

    fn host_events(&self) {
        let sources = self.unit().host_sources();
        for source in sources {
            let mut again = Vec::new();
            self.turns(|unit| unit.serve_source(source.token, |queue| again.push(queue)));
            again.into_iter().for_each(|queue| self.kick(queue));
        }
    }
}

impl DeviceHost for Host {
    fn name(&self) -> &str {
        "test"
    }

    fn activate(&self, features: u64, queues: &[QueueConfig]) -> Result<(), ActivateError> {
        self.unit().activate(features, queues)
    }

    fn reset(&self) {
        self.unit().reset();
    }

    fn save(&self) -> Result<UnitState, SnapshotError> {
        let mut unit = self.unit();
        unit.drain();
        unit.save()
    }

    fn restore(&self, saved: &UnitState, features: u64, queues: &[QueueConfig]) -> Result<(), SnapshotError> {
        self.unit().restore(saved, features, queues)
    }

    fn kick(&self, queue: u16) {
        let mut again = Vec::new();
        self.turns(|unit| unit.serve_queue(queue, |queue| again.push(queue)));
        again.into_iter().for_each(|queue| self.kick(queue));
        // What takes its time on the host is waited for, so that a test finds it done.
        self.unit().drain();
    }
}

/// One descriptor of a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Desc {
    /// Guest physical address of its buffer.
    pub addr: u64,
    /// Bytes of its buffer.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The index of the descriptor that follows.
    pub next: u16,
}

impl Desc {
    /// As it is in memory.
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Where the rings of a queue are.
#[derive(Clone, Copy, Debug)]
pub struct Rings {
    /// Descriptor area.
    pub desc: u64,
    /// Driver area.
    pub driver: u64,
    /// Device area.
    pub device: u64,
}

/// The rings of queue `queue`, as [`Driver::start`] places them.
pub fn rings(queue: u16) -> Rings {
    let base = 0x1000 + u64::from(queue) * 0x8000;
    Rings { desc: base, driver: base + 0x4000, device: base + 0x5000 }
}

/// What came of a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// The length in the used ring; `None`: the device kept the chain.
    pub used: Option<u32>,
    /// What is in the writable buffers now.
    pub data: Vec<Vec<u8>>,
}

/// A driver, its guest's memory and a device.
pub struct Driver {
    /// Guest memory.
    pub mem: GuestMemory,
    /// The device's transport.
    pub transport: Wire,
    /// The device's counters.
    pub counters: Arc<Counters>,
    host: Arc<Host>,
    interrupts: Arc<Interrupts>,
    /// For each queue: next free descriptor, available index, used index.
    queues: Vec<[u16; 3]>,
    /// For each queue: its largest size.
    max: Vec<u16>,
    next_data: u64,
}

impl Driver {
    /// A driver of `device`, which has not touched it yet.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::limited(device, &[])
    }

    /// A driver of `device` on this transport.
    pub fn on(kind: Kind, device: Box<dyn VirtioDevice>) -> Self {
        Self::build(kind, device, &[])
    }

    /// A driver of `device` with these limits for its lanes.
    pub fn limited(device: Box<dyn VirtioDevice>, limits: &[Limits]) -> Self {
        Self::build(Kind::chosen(), device, limits)
    }

    /// A driver of `device` on this transport, with these limits for its lanes.
    pub fn build(kind: Kind, device: Box<dyn VirtioDevice>, limits: &[Limits]) -> Self {
        let driver = Self::connect(kind, device, limits, memory());
        driver.transport.enable();
        driver
    }

    /// The state of the device and its transport, for a snapshot.
    pub fn save(&self) -> Result<Saved, SnapshotError> {
        self.transport.save()
    }

    /// The same driver in front of a fresh `device` on a fresh transport over the same memory, after both have taken over
    /// `saved`. What waits goes on, as after the first resume.
    pub fn restored(
        &self,
        device: Box<dyn VirtioDevice>,
        limits: &[Limits],
        saved: &Saved,
    ) -> Result<Self, SnapshotError> {
        let mut driver = self.restored_asleep(device, limits, saved)?;
        driver.wake();
        Ok(driver)
    }

    /// As [`Self::restored`], before the machine goes on.
    pub fn restored_asleep(
        &self,
        device: Box<dyn VirtioDevice>,
        limits: &[Limits],
        saved: &Saved,
    ) -> Result<Self, SnapshotError> {
        let driver = Self::connect(self.transport.kind(), device, limits, self.mem.clone());
        driver.transport.restore(saved)?;
        let (queues, next_data) = (self.queues.clone(), self.next_data);
        Ok(Self { queues, next_data, ..driver })
    }

    /// What a machine's runner does for a device at the first resume.
    pub fn wake(&mut self) {
        self.host.unit().announce();
        (0..self.queue_count()).for_each(|queue| self.host.kick(queue));
        self.host_events();
    }

    fn connect(kind: Kind, device: Box<dyn VirtioDevice>, limits: &[Limits], mem: GuestMemory) -> Self {
        let interrupts = Arc::<Interrupts>::default();
        let signals = Signals::new(kind, device.queue_sizes().len(), interrupts.clone());
        let queues = vec![[0; 3]; device.queue_sizes().len()];
        let counters = device.counters();
        let identity = Identity::of(&*device);
        let unit = Unit::new(device, limits, signals.notifier(), mem.clone());
        let host = Arc::new(Host(Mutex::new(unit)));
        let max = identity.queue_sizes.clone();
        let transport = signals.connect(identity, host.clone());
        Self { mem, transport, counters, host, interrupts, queues, max, next_data: DATA }
    }

    /// Reads a register, by virtio-mmio's offset on every transport.
    pub fn get(&self, offset: u64) -> u32 {
        self.transport.get(offset)
    }

    /// Writes a register, by virtio-mmio's offset on every transport.
    pub fn set(&self, offset: u64, value: u32) {
        self.transport.set(offset, value);
    }

    /// Reads the device's configuration space.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.transport.read(self.transport.device_config() + offset, data);
    }

    /// Writes the device's configuration space.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        self.transport.write(self.transport.device_config() + offset, data);
    }

    /// Device status.
    pub fn status(&self) -> u32 {
        self.get(0x70)
    }

    /// Features on offer.
    pub fn offered(&self) -> u64 {
        let half = |sel: u32| {
            self.set(0x14, sel);
            u64::from(self.get(0x10))
        };
        half(0) | half(1) << 32
    }

    /// Number of queues.
    pub fn queue_count(&self) -> u16 {
        self.queues.len() as u16
    }

    /// Largest size of a queue.
    pub fn queue_max(&self, queue: u16) -> u32 {
        self.max.get(usize::from(queue)).copied().unwrap_or(0).into()
    }

    /// Resets the device and accepts `features`. Returns whether the device agreed.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.transport.enable();
        self.set(0x70, 0);
        self.transport.connect_interrupts();
        self.queues.fill([0; 3]);
        self.next_data = DATA;
        self.set(0x70, 1);
        self.set(0x70, 3);
        for half in [0, 1] {
            self.set(0x24, half);
            self.set(0x20, (features >> (32 * half)) as u32);
        }
        self.set(0x70, 11);
        self.status() & 8 != 0
    }

    /// Tells the device where a queue's rings are, and that it is ready.
    pub fn set_queue(&self, queue: u16, size: u32, rings: Rings) {
        self.set(0x30, queue.into());
        self.set(0x38, size);
        for (offset, address) in [(0x80, rings.desc), (0x90, rings.driver), (0xa0, rings.device)] {
            self.set(offset, address as u32);
            self.set(offset + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    /// Starts the device from any state with `features` and VERSION_1, and with all queues at their full size.
    pub fn start(&mut self, features: u64) {
        assert!(self.negotiate(features | F_VERSION_1), "features {features:#x} are refused");
        for queue in 0..self.queue_count() {
            self.clear_rings(queue);
            self.set_queue(queue, self.queue_max(queue), rings(queue));
        }
        self.set(0x70, 15);
        assert_eq!(self.status(), 15, "the device does not start");
    }

    /// Fills a queue's rings with zeros.
    pub fn clear_rings(&self, queue: u16) {
        self.write(rings(queue).desc, &[0; 0x6000]);
    }

    /// Writes guest memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(address)).expect("memory is there");
    }

    /// Reads guest memory.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(address)).expect("memory is there");
        bytes
    }

    /// Writes a descriptor of a queue's table.
    pub fn set_desc(&self, queue: u16, index: u16, desc: Desc) {
        self.write(rings(queue).desc + u64::from(index) * 16, &desc.bytes());
    }

    /// Makes `head` available.
    pub fn offer(&mut self, queue: u16, head: u16) {
        let size = self.queue_max(queue) as u16;
        let index = &mut self.queues[usize::from(queue)][1];
        let slot = rings(queue).driver + 4 + u64::from(*index % size) * 2;
        *index = index.wrapping_add(1);
        let index = *index;
        self.write(slot, &head.to_le_bytes());
        self.set_avail(queue, index);
    }

    /// Sets the index of the available ring.
    pub fn set_avail(&self, queue: u16, index: u16) {
        self.write(rings(queue).driver + 2, &index.to_le_bytes());
    }

    /// Notifies the device.
    pub fn kick(&self, queue: u16) {
        self.set(0x50, queue.into());
    }

    /// Lets the device see its host sources, as if each had an event.
    pub fn host_events(&self) {
        self.host.host_events();
    }

    /// Waits until chains that wait for tokens may go on, and lets them. Returns whether there were any.
    pub fn wait_for_tokens(&self) -> bool {
        let Some(at) = self.host.unit().due_at() else { return false };
        std::thread::sleep(at.saturating_duration_since(std::time::Instant::now()));
        let mut waiting = Vec::new();
        self.host.unit().serve_waiting(|queue| waiting.push(queue));
        waiting.into_iter().for_each(|queue| self.host.kick(queue));
        true
    }

    /// Lets the device finish its requests in flight, as before a pause.
    pub fn drain(&self) {
        self.host.unit().drain();
    }

    /// What the device keeps on the host.
    pub fn storage(&self) -> Option<crate::storage::Storage> {
        self.host.unit().storage()
    }

    /// Saves what the device keeps on the host.
    pub fn save_storage(&self, to: &std::fs::File) -> Result<(), crate::storage::StorageError> {
        self.host.unit().save_storage(to)
    }

    /// Changes the device's configuration to `config`, which is of its own kind.
    pub fn update(&self, config: &dyn std::any::Any) -> Result<(), UpdateError> {
        self.host.unit().update(config)
    }

    /// Heads and lengths that were used since the last call of this.
    pub fn used(&mut self, queue: u16) -> Vec<(u32, u32)> {
        let size = self.queue_max(queue) as u16;
        let ring = rings(queue).device;
        let end = u16::from_le_bytes([self.read(ring + 2, 1)[0], self.read(ring + 3, 1)[0]]);
        let mut used = Vec::new();
        let mut at = self.queues[usize::from(queue)][2];
        while at != end {
            let element = self.read(ring + 4 + u64::from(at % size) * 8, 8);
            let word =
                |i: usize| u32::from_le_bytes([element[i], element[i + 1], element[i + 2], element[i + 3]]);
            used.push((word(0), word(4)));
            at = at.wrapping_add(1);
        }
        self.queues[usize::from(queue)][2] = end;
        used
    }

    /// How often the device interrupted.
    pub fn interrupts(&self) -> usize {
        self.interrupts.count()
    }

    /// Places buffers in memory (writable ones filled with 0xa5), makes a chain of them available and returns
    /// its head and the addresses of the writable ones. It takes fresh descriptors and memory, and starts over
    /// when either ends.
    pub fn post(&mut self, queue: u16, readable: &[&[u8]], writable: &[usize]) -> (u16, Vec<u64>) {
        let count = (readable.len() + writable.len()) as u16;
        let bytes: usize = readable.iter().map(|part| part.len()).chain(writable.iter().copied()).sum();
        let size = self.queue_max(queue) as u16;
        if self.queues[usize::from(queue)][0] + count > size {
            self.queues[usize::from(queue)][0] = 0;
        }
        if self.next_data + bytes as u64 > REGIONS[0].1 as u64 {
            self.next_data = DATA;
        }
        let head = self.queues[usize::from(queue)][0];
        self.queues[usize::from(queue)][0] += count;
        let mut addresses = Vec::new();
        let parts = readable.iter().map(|part| (0, part.to_vec()));
        let parts = parts.chain(writable.iter().map(|&len| (WRITE, vec![0xa5; len])));
        for (i, (flags, part)) in (head..).zip(parts) {
            let addr = self.next_data;
            self.next_data += part.len() as u64;
            self.write(addr, &part);
            if flags == WRITE {
                addresses.push(addr);
            }
            let more = if i + 1 < head + count { NEXT } else { 0 };
            self.set_desc(queue, i, Desc { addr, len: part.len() as u32, flags: flags | more, next: i + 1 });
        }
        self.offer(queue, head);
        (head, addresses)
    }

    /// Posts one chain, notifies the device, and looks at what came of it.
    pub fn request(&mut self, queue: u16, readable: &[&[u8]], writable: &[usize]) -> Reply {
        let (head, addresses) = self.post(queue, readable, writable);
        self.kick(queue);
        let used = self.used(queue).into_iter().find(|&(id, _)| id == u32::from(head)).map(|(_, len)| len);
        let data = addresses.iter().zip(writable).map(|(&address, &len)| self.read(address, len)).collect();
        Reply { used, data }
    }

    /// Pages of guest memory that are marked as written.
    pub fn is_dirty(&self, address: u64) -> bool {
        use vm_memory::bitmap::Bitmap;
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
        self.mem
            .to_region_addr(GuestAddress(address))
            .is_some_and(|(region, offset)| region.bitmap().dirty_at(offset.0 as usize))
    }

    /// Forgets which pages were written.
    pub fn clear_dirty(&self) {
        use vm_memory::GuestMemoryBackend;
        self.mem.iter().for_each(|region| {
            if let Some(bitmap) = region.get_mmap().bitmap() {
                bitmap.reset();
            }
        });
    }
}
