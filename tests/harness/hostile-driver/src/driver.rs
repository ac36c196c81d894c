//! A driver that keeps to the specification, to be broken by the attacks, and to see that a device still works.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::memory::{PAGE, Pages};
use crate::registers::{Field, Registers};

/// Queues that are driven; a device may have more.
pub const MAX_QUEUES: u16 = 8;
/// Most descriptors of a queue: what fits into a page.
pub const MAX_SIZE: u16 = 256;
/// Pages for buffers, behind those for rings.
pub const DATA_PAGES: usize = 8;
/// All pages that a driver needs.
pub const PAGES: usize = MAX_QUEUES as usize * 3 + DATA_PAGES;

/// There is another descriptor.
pub const NEXT: u16 = 1;
/// The device writes the buffer.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

pub const ACKNOWLEDGE: u32 = 1;
pub const DRIVER: u32 = 2;
pub const DRIVER_OK: u32 = 4;
pub const FEATURES_OK: u32 = 8;
pub const NEEDS_RESET: u32 = 64;
pub const RUNNING: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

pub const F_INDIRECT: u64 = 1 << 28;
pub const F_VERSION_1: u64 = 1 << 32;

/// Only there to end a hang.
const DEADLINE: Duration = Duration::from_secs(30);

/// A descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
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

/// Driver's state of one queue.
#[derive(Clone, Copy, Debug, Default)]
struct Queue {
    size: u16,
    avail: u16,
    used: u16,
}

/// The driver of one device.
pub struct Driver<'a> {
    pub regs: &'a Registers,
    pub pages: &'a Pages,
    queues: Vec<Queue>,
}

impl<'a> Driver<'a> {
    /// A driver that has reset the device, and nothing else.
    pub fn new(regs: &'a Registers, pages: &'a Pages) -> Result<Self> {
        let mut driver = Self { regs, pages, queues: Vec::new() };
        driver.reset()?;
        let sizes = (0..MAX_QUEUES).map(|queue| regs.queue_max(queue)).take_while(|&max| max > 0);
        driver.queues = sizes.map(|max| Queue { size: max.min(MAX_SIZE), ..Queue::default() }).collect();
        ensure!(!driver.queues.is_empty(), "the device has no queue");
        Ok(driver)
    }

    /// Number of queues.
    pub fn queue_count(&self) -> u16 {
        self.queues.len() as u16
    }

    /// Descriptors of `queue`.
    pub fn size(&self, queue: u16) -> u16 {
        self.queues[usize::from(queue)].size
    }

    /// The pages of a queue: descriptors, available ring, used ring.
    pub fn rings(&self, queue: u16) -> [usize; 3] {
        let first = usize::from(queue) * 3;
        [first, first + 1, first + 2]
    }

    /// The nth page for buffers.
    pub fn data(&self, nth: usize) -> usize {
        usize::from(MAX_QUEUES) * 3 + nth % DATA_PAGES
    }

    /// Guest physical address of the nth page for buffers.
    pub fn data_at(&self, nth: usize) -> u64 {
        self.pages.physical(self.data(nth))
    }

    /// Resets the device.
    pub fn reset(&mut self) -> Result<()> {
        self.regs.set(Field::Status, 0);
        wait(|| (self.regs.get(Field::Status) == 0).then_some(())).context("a reset never ends")
    }

    /// Goes as far as FEATURES_OK, with `features` of those on offer.
    pub fn negotiate(&mut self, features: u64) -> Result<()> {
        self.reset()?;
        self.regs.set(Field::Status, ACKNOWLEDGE);
        self.regs.set(Field::Status, ACKNOWLEDGE | DRIVER);
        self.regs.accept((self.regs.offered() & features) | F_VERSION_1);
        self.regs.set(Field::Status, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        let status = self.regs.get(Field::Status);
        ensure!(status & FEATURES_OK != 0, "the device refuses its own features: status {status:#x}");
        Ok(())
    }

    /// Clears the rings of `queue` and tells the device of them.
    pub fn set_queue(&mut self, queue: u16) {
        let rings = self.rings(queue);
        rings.iter().for_each(|&page| self.pages.fill(page, 0));
        let state = &mut self.queues[usize::from(queue)];
        (state.avail, state.used) = (0, 0);
        let (size, at) = (state.size, rings.map(|page| self.pages.physical(page)));
        self.describe_queue(queue, size.into(), at);
        self.regs.set(Field::QueueReady, 1);
    }

    /// Writes size and addresses of `queue`, but not that it is ready.
    pub fn describe_queue(&self, queue: u16, size: u32, at: [u64; 3]) {
        self.regs.set(Field::QueueSel, queue.into());
        self.regs.set(Field::QueueSize, size);
        let fields = [
            (Field::Desc, Field::DescHigh),
            (Field::Avail, Field::AvailHigh),
            (Field::Used, Field::UsedHigh),
        ];
        for ((low, high), address) in fields.into_iter().zip(at) {
            self.regs.set(low, address as u32);
            self.regs.set(high, (address >> 32) as u32);
        }
    }

    /// Starts the device from any state.
    pub fn start(&mut self, features: u64) -> Result<()> {
        self.negotiate(features)?;
        (0..self.queue_count()).for_each(|queue| self.set_queue(queue));
        self.regs.set(Field::Status, RUNNING);
        let status = self.regs.get(Field::Status);
        ensure!(status == RUNNING, "the device does not start: status {status:#x}");
        Ok(())
    }

    /// Writes a descriptor.
    pub fn describe(&self, queue: u16, index: u16, desc: Desc) {
        let offset = usize::from(index % MAX_SIZE) * 16;
        self.pages.write(self.rings(queue)[0], offset, &desc.bytes());
    }

    /// Makes `head` available without a notification.
    pub fn offer(&mut self, queue: u16, head: u16) {
        let [_, ring, _] = self.rings(queue);
        let state = &mut self.queues[usize::from(queue)];
        let slot = usize::from(state.avail % state.size);
        self.pages.write(ring, 4 + slot * 2, &head.to_le_bytes());
        state.avail = state.avail.wrapping_add(1);
        let avail = state.avail;
        self.set_avail(queue, avail);
    }

    /// Sets the index of the available ring.
    pub fn set_avail(&self, queue: u16, index: u16) {
        self.pages.write(self.rings(queue)[1], 2, &index.to_le_bytes());
    }

    /// The index of the available ring as the driver counts.
    pub fn avail(&self, queue: u16) -> u16 {
        self.queues[usize::from(queue)].avail
    }

    /// The next entry of the used ring, if there is one: head and length.
    pub fn used(&mut self, queue: u16) -> Option<(u32, u32)> {
        let [_, _, ring] = self.rings(queue);
        let state = &mut self.queues[usize::from(queue)];
        if self.pages.u16(ring, 2) == state.used {
            return None;
        }
        let entry = self.pages.read(ring, 4 + usize::from(state.used % state.size) * 8, 8);
        state.used = state.used.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        Some((word(0), word(4)))
    }

    /// Sends one request whose readable bytes are in data page 0 and whose writable ones are in page 1, the last byte
    /// of which has a descriptor of its own. Returns the length that the device says, and what it wrote.
    pub fn request(&mut self, queue: u16, readable: &[u8], writable: usize) -> Result<(u32, Vec<u8>)> {
        ensure!(readable.len() <= PAGE && writable <= PAGE, "a request fits into two pages");
        let [from, to] = [self.data(0), self.data(1)];
        self.pages.write(from, 0, readable);
        self.pages.fill(to, 0xa5);
        let mut chain = Vec::new();
        if !readable.is_empty() {
            chain.push(Desc { addr: self.data_at(0), len: readable.len() as u32, ..Desc::default() });
        }
        let at = self.data_at(1);
        if writable > 1 {
            chain.push(Desc { addr: at, len: writable as u32 - 1, flags: WRITE, next: 0 });
        }
        if writable > 0 {
            chain.push(Desc { addr: at + writable as u64 - 1, len: 1, flags: WRITE, next: 0 });
        }
        let last = chain.len().saturating_sub(1);
        for (index, mut desc) in (0u16..).zip(chain) {
            if usize::from(index) < last {
                (desc.flags, desc.next) = (desc.flags | NEXT, index + 1);
            }
            self.describe(queue, index, desc);
        }
        self.offer(queue, 0);
        self.regs.notify(queue);
        let answer = wait(|| self.used(queue));
        let Some((head, len)) = answer else {
            bail!("queue {queue} does not answer; status {:#x}", self.regs.get(Field::Status));
        };
        ensure!(head == 0, "queue {queue} answers {head}, which was not asked");
        ensure!(len as usize <= writable, "queue {queue} says that it wrote {len} bytes of {writable}");
        Ok((len, self.pages.read(to, 0, writable)))
    }
}

/// Asks until there is an answer, or until it is clear that there will be none.
pub fn wait<T>(mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let began = Instant::now();
    for turn in 0u64.. {
        let answer = ask();
        if answer.is_some() || began.elapsed() > DEADLINE {
            return answer;
        }
        if turn > 100 {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    None
}
