//! What nobody thought of. The same seed does the same.

use anyhow::Result;

use super::Ground;
use crate::driver::{DATA_PAGES, Desc, Driver, MAX_SIZE};
use crate::memory::PAGE;
use crate::registers::{Field, QUEUE_FIELDS};

/// Steps for each device.
const STEPS: usize = 4000;

/// Numbers that look random (splitmix64).
pub struct Random(u64);

impl Random {
    /// The numbers of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next one.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// Another order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// An address that is ours or nobody's: with others, the device would overwrite Linux.
fn address(driver: &Driver<'_>, ground: &Ground, random: &mut Random) -> (u64, u32) {
    match random.below(8) {
        0 => {
            let bad = ground.bad_addresses(driver);
            (bad[random.below(bad.len())], random.next() as u32)
        }
        1 => (random.next() | 1 << 60, random.next() as u32),
        _ => {
            let offset = [0, random.below(PAGE)][random.below(2)];
            let room = PAGE - offset;
            let len = [1, 4, 8, 12, 16, 44, 512, room][random.below(8)].min(room);
            (driver.data_at(2 + random.below(DATA_PAGES - 2)) + offset as u64, len as u32)
        }
    }
}

/// Bytes in which no frame number is one of Linux's.
fn payload(driver: &Driver<'_>, random: &mut Random) -> Vec<u8> {
    let own = driver.data_at(2) / PAGE as u64;
    let word = |random: &mut Random| match random.below(4) {
        0 => own as u32,
        1 => random.below(16) as u32,
        _ => random.next() as u32 | 1 << 31,
    };
    (0..16).flat_map(|_| word(random).to_le_bytes()).collect()
}

/// Random steps of all kinds, in all states.
pub fn random(driver: &mut Driver<'_>, ground: &Ground) -> Result<()> {
    let random = &mut Random::new(ground.seed);
    let balloon = ground.id == 5;
    driver.start(0)?;
    crate::kinds::fill_harmlessly(ground.id, driver);
    for _ in 0..STEPS {
        let queue = random.below(usize::from(driver.queue_count())) as u16;
        match random.below(16) {
            0..5 => {
                let (addr, len) = address(driver, ground, random);
                let [flags, next] = [random.below(8) as u16, random.below(12) as u16];
                driver.describe(queue, random.below(12) as u16, Desc { addr, len, flags, next });
            }
            5..8 => driver.offer(queue, random.below(12) as u16),
            8..11 => driver.regs.notify(queue),
            11 if !balloon => {
                let page = driver.data(2 + random.below(DATA_PAGES - 2));
                driver.pages.write(page, random.below(PAGE / 64) * 64, &payload(driver, random));
            }
            12 => {
                let field = QUEUE_FIELDS[random.below(QUEUE_FIELDS.len())];
                driver.regs.set(field, random.next() as u32);
            }
            13 if random.below(20) == 0 => {
                driver.set_avail(
                    queue,
                    driver.avail(queue).wrapping_add(random.below(usize::from(MAX_SIZE)) as u16),
                );
            }
            14 if random.below(10) == 0 => driver.regs.set(Field::Status, random.next() as u32 & 0xff),
            15 if random.below(20) == 0 => driver.start(random.next())?,
            _ => drop(driver.used(queue)),
        }
    }
    Ok(())
}
