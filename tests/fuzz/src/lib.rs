//! A hostile driver, made of whatever bytes the fuzzer comes up with, for any device of the registry; and snapshots that
//! somebody has changed.

mod edit;
/// The micro guests of the tests: a kernel is needed, which nothing executes.
#[path = "../../harness/src/micro.rs"]
pub mod micro;
pub mod snapshot;
pub mod unpack;

use arbitrary::{Arbitrary, Result, Unstructured};
use devices::model::{BusDevice, VirtioDevice};
use devices::virtio::test_driver::{DATA, Desc, Driver, REGIONS};

/// Most steps of one run.
const MAX_STEPS: usize = 64;

/// An address that is likely to be somewhere interesting.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Address {
    Data(u16),
    Rings(u16),
    BeforeEnd(u8),
    InHole(u8),
    Anywhere(u64),
}

impl Address {
    fn value(self) -> u64 {
        let [(_, len), (second, _)] = REGIONS;
        match self {
            Self::Data(offset) => DATA + u64::from(offset),
            Self::Rings(offset) => 0x1000 + u64::from(offset),
            Self::BeforeEnd(offset) => len as u64 - u64::from(offset),
            Self::InHole(offset) => second - u64::from(offset),
            Self::Anywhere(address) => address,
        }
    }
}

/// A length that is likely to matter.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Length {
    Small(u8),
    Medium(u16),
    Sectors(u8),
    Any(u32),
}

impl Length {
    fn value(self) -> u32 {
        match self {
            Self::Small(len) => len.into(),
            Self::Medium(len) => len.into(),
            Self::Sectors(sectors) => u32::from(sectors) * 512,
            Self::Any(len) => len,
        }
    }
}

/// What a request begins with: as long as the headers of the devices that there are.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Header {
    Word([u8; 4]),
    Disk([u8; 16]),
    Packet([u8; 12]),
    Stream([u8; 44]),
    /// A list of items that looks like no header.
    List([u8; 64]),
}

impl Header {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Word(bytes) => bytes,
            Self::Disk(bytes) => bytes,
            Self::Packet(bytes) => bytes,
            Self::Stream(bytes) => bytes,
            Self::List(bytes) => bytes,
        }
    }
}

/// One thing that a driver does.
#[derive(Arbitrary, Debug)]
enum Step {
    /// An access of any width to any register.
    Read { offset: u16, width: u8 },
    /// The same, writing the first bytes of these.
    Write { offset: u16, width: u8, bytes: [u8; 8] },
    /// A write to a register that exists.
    Register { index: u8, value: u32 },
    /// A descriptor.
    Describe { queue: u8, index: u8, addr: Address, len: Length, flags: u8, next: u8 },
    /// Some bytes of memory.
    Fill { at: Address, bytes: [u8; 16] },
    /// A descriptor in memory, for an indirect table.
    Table { slot: u8, addr: Address, len: Length, flags: u8, next: u8 },
    /// A head in the available ring.
    Offer { queue: u8, head: u8 },
    /// Any index of the available ring.
    Jump { queue: u8, index: u16 },
    /// A notification.
    Kick { queue: u8 },
    /// Something happens on the host.
    Host,
    /// A request as a driver would make it: header, what is repeated how often behind it, sizes of writable buffers.
    Request { queue: u8, header: Header, body: [u8; 16], times: u8, room: [Length; 2] },
    /// Reset and start.
    Start { features: u64 },
}

/// Registers that a driver writes, by virtio-mmio's offsets.
const REGISTERS: [u64; 16] =
    [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xfc];

/// Does to `device` what `input` says: it must not panic, get stuck or lose count. The first byte says whether it is
/// started before, and with which features.
pub fn drive(device: Box<dyn VirtioDevice>, input: &[u8]) {
    let Some((start, input)) = input.split_first() else { return };
    let mut driver = Driver::new(device);
    match start % 3 {
        0 => {}
        1 => driver.start(0),
        _ => driver.start(driver.offered()),
    }
    let driver = &mut driver;
    let mut input = Unstructured::new(input);
    for _ in 0..MAX_STEPS {
        match next(&mut input) {
            Ok(Some(step)) => take(driver, step),
            _ => break,
        }
    }
    for queue in 0..driver.queue_count() {
        driver.kick(queue);
    }
    driver.host_events();
    // Whatever happened: a reset makes it as good as new.
    driver.start(0);
    let last = driver.queue_count() - 1;
    assert!(driver.request(last, &[&[0; 16]], &[64]).used.is_some(), "does not work after a reset");
}

fn next(input: &mut Unstructured<'_>) -> Result<Option<Step>> {
    if input.is_empty() { Ok(None) } else { Step::arbitrary(input).map(Some) }
}

fn desc(addr: Address, len: Length, flags: u8, next: u8) -> Desc {
    Desc { addr: addr.value(), len: len.value(), flags: u16::from(flags & 7), next: next.into() }
}

fn take(driver: &mut Driver, step: Step) {
    let queue = |queue: u8| u16::from(queue) % driver.queue_count();
    match step {
        Step::Read { offset, width } => {
            let mut data = [0; 256];
            driver.transport.read(offset.into(), &mut data[..width.into()]);
        }
        Step::Write { offset, width, bytes } => {
            driver.transport.write(offset.into(), &bytes[..usize::from(width % 9)]);
        }
        Step::Register { index, value } => driver.set(REGISTERS[usize::from(index % 16)], value),
        Step::Describe { queue: which, index, addr, len, flags, next } => {
            driver.set_desc(queue(which), index.into(), desc(addr, len, flags, next));
        }
        Step::Fill { at, bytes } => write(driver, at.value(), &bytes),
        Step::Table { slot, addr, len, flags, next } => {
            write(driver, DATA + 16 * u64::from(slot), &desc(addr, len, flags, next).bytes());
        }
        Step::Offer { queue: which, head } => driver.offer(queue(which), head.into()),
        Step::Jump { queue: which, index } => driver.set_avail(queue(which), index),
        Step::Kick { queue: which } => driver.kick(queue(which)),
        Step::Host => driver.host_events(),
        Step::Request { queue: which, header, body, times, room } => {
            let data = body.repeat(usize::from(times));
            let room = room.map(|len| (len.value() % 0x2_0000) as usize);
            driver.request(queue(which), &[header.bytes(), &data], &[room[0], room[1], 1]);
        }
        Step::Start { features } => {
            // Who cannot read the features cannot choose.
            driver.transport.enable();
            let features = driver.offered() & features;
            driver.start(features);
        }
    }
}

/// Writes memory where there is some.
fn write(driver: &Driver, address: u64, bytes: &[u8]) {
    let fits = |(base, len): (u64, usize)| {
        address >= base && address.checked_add(bytes.len() as u64).is_some_and(|end| end <= base + len as u64)
    };
    if REGIONS.into_iter().any(fits) {
        driver.write(address, bytes);
    }
}
