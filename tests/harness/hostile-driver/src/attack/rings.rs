//! Rings: indexes that jump, heads that are not there or in flight already, and resets in the middle.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::Ground;
use crate::driver::{DATA_PAGES, Desc, Driver, NEXT, WRITE};
use crate::memory::PAGE;

/// Fills every queue with chains that any device can take.
fn post(driver: &mut Driver<'_>, heads: impl Fn(u16) -> u16) {
    for queue in 0..driver.queue_count() {
        let size = driver.size(queue);
        for index in 0..size {
            let addr = driver.data_at(3 + usize::from(index) % (DATA_PAGES - 3));
            // A disk's read in three parts; for others just bytes.
            let desc = match index % 3 {
                _ if index + 3 > size => Desc { addr, len: 64, flags: WRITE, next: 0 },
                0 => Desc { addr: driver.data_at(2), len: 16, flags: NEXT, next: index + 1 },
                1 => Desc { addr, len: PAGE as u32, flags: NEXT | WRITE, next: index + 1 },
                _ => Desc { addr, len: 1, flags: WRITE, next: 0 },
            };
            driver.describe(queue, index, desc);
        }
        (0..size / 3).for_each(|nth| driver.offer(queue, heads(nth) % size));
        driver.regs.notify(queue);
    }
}

/// Resets with requests in flight. Nothing is written after that.
pub fn reset(driver: &mut Driver<'_>, ground: &Ground) -> Result<()> {
    for round in 0..20 {
        driver.start(if round % 2 == 0 { 0 } else { !(1 << 29) })?;
        crate::kinds::fill_harmlessly(ground.id, driver);
        post(driver, |nth| nth * 3);
        // At once, or when some are done.
        if round % 3 == 0 {
            sleep(Duration::from_micros(100 * round));
        }
        driver.reset()?;
        let pages = 0..driver.pages.count();
        pages.clone().for_each(|page| driver.pages.fill(page, 0x5a));
        for queue in 0..driver.queue_count() {
            driver.regs.notify(queue);
        }
        sleep(Duration::from_millis(1));
        for page in pages {
            let written = driver.pages.read(page, 0, PAGE).iter().any(|&byte| byte != 0x5a);
            ensure!(!written, "device {} writes to page {page} after a reset", ground.id);
        }
    }
    Ok(())
}

/// Breaks the rings of each queue in turn.
pub fn rings(driver: &mut Driver<'_>, ground: &Ground) -> Result<()> {
    for queue in 0..driver.queue_count() {
        let size = driver.size(queue);
        // The same heads again and again, while they may be in flight.
        for heads in [|_| 0, |nth| nth % 2 * 3, |nth| nth % 3] {
            driver.start(0)?;
            crate::kinds::fill_harmlessly(ground.id, driver);
            post(driver, heads);
            post(driver, heads);
        }
        for head in [size, size + 1, 0x7fff, u16::MAX] {
            driver.start(0)?;
            driver.offer(queue, head);
            driver.regs.notify(queue);
        }
        for index in [size + 1, 0x8000, u16::MAX, u16::MAX - size] {
            driver.start(0)?;
            driver.set_avail(queue, index);
            driver.regs.notify(queue);
            // And back.
            driver.set_avail(queue, 0);
            driver.regs.notify(queue);
        }
        // Notifications of nothing, and of queues that are not there.
        driver.start(0)?;
        for nth in 0..5000 {
            driver.regs.notify(if nth % 10 == 0 { nth } else { queue });
        }
        crate::kinds::honest(ground.id, driver)?;
    }
    Ok(())
}
