//! Registers: out of turn, out of range, in every width.

use anyhow::{Result, ensure};

use super::Ground;
use super::random::Random;
use crate::driver::{DRIVER_OK, Driver, F_VERSION_1, FEATURES_OK, NEEDS_RESET, RUNNING};
use crate::memory::{Mapping, PAGE};
use crate::registers::{Field, QUEUE_FIELDS, Registers};

/// All fields of all queues, and of some that do not exist.
fn queues(driver: &Driver<'_>) -> Vec<u32> {
    let mut all = Vec::new();
    for queue in 0..driver.queue_count() + 2 {
        driver.regs.set(Field::QueueSel, queue.into());
        all.extend(QUEUE_FIELDS.map(|field| driver.regs.get(field)));
    }
    all
}

/// Writes queue registers after DRIVER_OK, in every order that chance comes up with.
pub fn queue_registers(driver: &mut Driver<'_>, ground: &Ground) -> Result<()> {
    let mut random = Random::new(ground.seed);
    driver.start(0)?;
    let before = queues(driver);
    for round in 0..16 {
        let mut order = QUEUE_FIELDS;
        random.shuffle(&mut order);
        let selections = (0..u32::from(driver.queue_count()) + 2).chain([0xffff, 0x1_0000, u32::MAX]);
        for queue in selections {
            driver.regs.set(Field::QueueSel, queue);
            for field in order {
                let values = [0, 1, 3, 0x8000, 0xffff, u32::MAX, random.next() as u32];
                driver.regs.set(field, values[random.below(values.len())]);
            }
        }
        driver.regs.accept(random.next());
        ensure!(queues(driver) == before, "round {round}: registers of an active device changed");
    }
    crate::kinds::honest(ground.id, driver)?;
    // Sizes and addresses of no queue: the device does not start, and is not harmed.
    let max = driver.size(0);
    let good = driver.rings(0).map(|page| driver.pages.physical(page));
    let mut bad: Vec<(u32, [u64; 3])> =
        [0, 3, u32::from(max) - 1, 0x8000, 0xffff].map(|size| (size, good)).to_vec();
    for address in ground.bad_addresses(driver).into_iter().chain([good[0] + 1, !0xf]) {
        for ring in 0..3 {
            let mut rings = good;
            rings[ring] = address;
            bad.push((max.into(), rings));
        }
    }
    for (size, rings) in bad {
        driver.negotiate(0)?;
        driver.describe_queue(0, size, rings);
        driver.regs.set(Field::QueueReady, 1);
        driver.regs.set(Field::Status, RUNNING);
        let status = driver.regs.get(Field::Status);
        ensure!(status & NEEDS_RESET != 0, "starts with size {size} and rings {rings:x?}: {status:#x}");
        (0..driver.queue_count()).for_each(|queue| driver.regs.notify(queue));
    }
    Ok(())
}

/// Skips states, goes back, fails, and starts twice.
pub fn status(driver: &mut Driver<'_>, _: &Ground) -> Result<()> {
    for status in [2, 4, 6, 8, 12, 14, 15, 64, 0x80, 0xcf, 0xff] {
        driver.reset()?;
        driver.regs.set(Field::Status, status);
        let now = driver.regs.get(Field::Status);
        ensure!(now & (DRIVER_OK | FEATURES_OK) == 0, "{status:#x} from nothing makes {now:#x}");
        driver.regs.notify(0);
    }
    // Features that nobody offered, and none.
    for features in [0, F_VERSION_1 | !driver.regs.offered(), u64::MAX] {
        driver.reset()?;
        driver.regs.set(Field::Status, 1);
        driver.regs.set(Field::Status, 3);
        driver.regs.accept(features);
        driver.regs.set(Field::Status, 11);
        driver.regs.set(Field::Status, 15);
        let now = driver.regs.get(Field::Status);
        ensure!(now & (DRIVER_OK | FEATURES_OK) == 0, "features {features:#x}: {now:#x}");
    }
    driver.start(0)?;
    for status in [1, 3, 11, 15, 15] {
        driver.regs.set(Field::Status, status);
        ensure!(driver.regs.get(Field::Status) == RUNNING, "{status} takes bits back");
    }
    driver.regs.set(Field::Status, RUNNING | 0x80);
    driver.regs.set(Field::Status, RUNNING);
    ensure!(driver.regs.get(Field::Status) == RUNNING | 0x80, "FAILED is forgotten");
    for _ in 0..16 {
        driver.start(0)?;
    }
    Ok(())
}

/// Reads and writes everything in all widths that there are instructions for, at any alignment, and across pages, where
/// the access comes in two parts of odd widths.
pub fn widths(driver: &mut Driver<'_>, ground: &Ground) -> Result<()> {
    let mut random = Random::new(ground.seed);
    driver.start(0)?;
    let map = &driver.regs.map;
    let pages = (0..map.len()).step_by(PAGE);
    for page in pages {
        let registers = (page..page + 0x120).chain(page + PAGE - 16..page + PAGE);
        for offset in registers {
            for width in [1, 2, 4, 8] {
                if offset + width > map.len() {
                    continue;
                }
                map.read(offset, width);
                // Whoever is behind the first page of virtio-mmio is a device of its own.
                if driver.regs.transport() == "pci" || offset < PAGE {
                    map.write(offset, width, [0, !0, random.next()][random.below(3)]);
                }
            }
        }
    }
    Ok(())
}

/// Reads past the end of the device's configuration space and writes all over it; on PCI assigns vectors past the end.
pub fn config_space(driver: &mut Driver<'_>, ground: &Ground) -> Result<()> {
    driver.start(0)?;
    let start = driver.regs.config_offset();
    let map = &driver.regs.map;
    let end = (start + PAGE).min(map.len()) & !(PAGE - 1);
    let bytes = |len: usize| -> Vec<u64> { (start..start + len).map(|offset| map.read(offset, 1)).collect() };
    let before = bytes(0x80);
    for offset in (start..start + 0x80).chain(end - 16..end - 8) {
        for width in [1, 2, 4, 8] {
            map.read(offset, width);
        }
    }
    // What the driver may write (a balloon's actual size, a console's) is up to the kind.
    if ![3, 5].contains(&ground.id) {
        (start..start + 0x80).for_each(|offset| map.write(offset, 1, 0x77));
        ensure!(bytes(0x80) == before, "the configuration space is written");
    }
    if let Some(function) = &driver.regs.function {
        vectors(driver.regs)?;
        configuration_of(function, ground);
        driver.start(0)?;
    }
    crate::kinds::honest(ground.id, driver)
}

/// Writes all over a PCI function's configuration space, in every width, and puts it back in order: what Linux would find
/// changed otherwise is whether the function answers.
fn configuration_of(function: &Mapping, ground: &Ground) {
    const HEADER: usize = 0x100;
    let mut random = Random::new(ground.seed);
    let before: Vec<u64> = (0..HEADER).step_by(4).map(|register| function.read(register, 4)).collect();
    for _ in 0..4 {
        for register in (0..HEADER).chain(HEADER - 8..HEADER + 8).chain(PAGE - 16..PAGE) {
            let width = [1, 2, 4, 8][random.below(4)];
            if register + width <= PAGE {
                function.write(register, width, [0, !0, random.next()][random.below(3)]);
                function.read(register, width);
            }
        }
    }
    let window = |bytes: [u64; 3]| {
        // The window (§4.1.4.9) shows any place of any BAR in any width: what does not exist as well.
        for capability in (0x40..HEADER).step_by(4).filter(|at| before[at / 4] >> 24 & 0xff == 5) {
            for (field, value) in [4, 8, 12].into_iter().zip(bytes) {
                function.write(capability + field, 4, value);
            }
            function.write(capability + 16, 4, random_of(bytes));
            function.read(capability + 16, 4);
        }
    };
    for bar in [0, 1, 5, 6, 0xff] {
        for offset in [0, 1, 0x14, 0x1000, 0x3000, 0x7ffe, 0x8000, 0xffff_fffe, 0xffff_ffff] {
            [0, 1, 2, 3, 4, 8, 0xffff_ffff].into_iter().for_each(|length| window([bar, offset, length]));
        }
    }
    for (register, &value) in (0..HEADER).step_by(4).zip(&before) {
        // The status register clears what is written to it.
        function.write(register, if register == 4 { 2 } else { 4 }, value);
    }
}

fn random_of(bytes: [u64; 3]) -> u64 {
    bytes.iter().fold(0, |sum, byte| sum.rotate_left(7) ^ byte)
}

/// MSI-X vectors that do not exist read back as none (§4.1.5.1.2).
fn vectors(regs: &Registers) -> Result<()> {
    const NO_VECTOR: u64 = 0xffff;
    for vector in [0x40, 0x100, 0x7ff, 0x800, 0xfffe] {
        // The vectors of the configuration and of the selected queue, at these offsets of the common configuration.
        for offset in [0x10, 0x1a] {
            regs.map.write(offset, 2, vector);
            let now = regs.map.read(offset, 2);
            ensure!(now == NO_VECTOR, "vector {vector:#x} at {offset:#x} is accepted as {now:#x}");
        }
    }
    Ok(())
}
