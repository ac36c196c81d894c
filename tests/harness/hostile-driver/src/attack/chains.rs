//! Chains that no driver builds.

use anyhow::{Result, ensure};

use super::Ground;
use crate::driver::{Desc, Driver, F_INDIRECT, INDIRECT, NEEDS_RESET, NEXT, WRITE};
use crate::registers::Field;

/// Descriptors by index, and the table that indirect ones point to.
type Chain = (Vec<(u16, Desc)>, Vec<Desc>);

/// All of them. Data page 5 is where buffers may be, page 6 has the table.
fn malformed(driver: &Driver<'_>, ground: &Ground) -> Vec<Chain> {
    let good = Desc { addr: driver.data_at(5), len: 64, flags: WRITE, next: 0 };
    let table = Desc { addr: driver.data_at(6), len: 32, flags: INDIRECT, next: 0 };
    let one = |desc| (vec![(0, desc)], vec![]);
    let indirect = |entries| (vec![(0, table)], entries);
    let more = WRITE | NEXT;
    let mut chains = vec![
        one(Desc { flags: more, ..good }),
        (vec![(0, Desc { flags: more, next: 1, ..good }), (1, Desc { flags: more, ..good })], vec![]),
        one(Desc { flags: more, next: 256, ..good }),
        one(Desc { flags: more, next: u16::MAX, ..good }),
        one(Desc { len: u32::MAX, ..good }),
        one(Desc { addr: u64::MAX - 62, ..good }),
        one(Desc { addr: ground.end_of_ram - 1, ..good }),
        (vec![(0, Desc { flags: more, next: 1, ..good }), (1, Desc { flags: 0, ..good })], vec![]),
        one(Desc { len: 0, ..table }),
        one(Desc { len: 15, ..table }),
        one(Desc { len: 24, ..table }),
        one(Desc { len: 16 << 16, ..table }),
        one(Desc { len: u32::MAX - 15, ..table }),
        one(Desc { flags: INDIRECT | NEXT, next: 1, ..table }),
        one(Desc { flags: INDIRECT | WRITE, ..table }),
        indirect(vec![Desc { addr: driver.data_at(6), len: 16, flags: INDIRECT, next: 0 }]),
        indirect(vec![Desc { flags: more, next: 2, ..good }]),
        indirect(vec![Desc { flags: more, next: 0, ..good }]),
        indirect(vec![Desc { flags: more, next: 1, ..good }, Desc { flags: more, next: 0, ..good }]),
    ];
    for addr in ground.bad_addresses(driver) {
        chains.push(one(Desc { addr, ..good }));
        chains.push(one(Desc { addr, flags: 0, ..good }));
        chains.push(one(Desc { addr, ..table }));
        chains.push(indirect(vec![Desc { addr, ..good }]));
    }
    chains
}

/// Offers each to each queue; the device returns it or asks for a reset.
pub fn chains(driver: &mut Driver<'_>, ground: &Ground) -> Result<()> {
    for queue in 0..driver.queue_count() {
        driver.start(F_INDIRECT)?;
        for (nth, (descs, table)) in malformed(driver, ground).into_iter().enumerate() {
            if driver.regs.get(Field::Status) & NEEDS_RESET != 0 {
                driver.start(F_INDIRECT)?;
            }
            driver.pages.fill(driver.data(5), 0x5a);
            let bytes: Vec<u8> = table.iter().flat_map(|desc| desc.bytes()).collect();
            driver.pages.write(driver.data(6), 0, &bytes);
            descs.iter().for_each(|&(index, desc)| driver.describe(queue, index, desc));
            driver.offer(queue, 0);
            driver.regs.notify(queue);
            let answer = crate::driver::wait(|| match driver.used(queue) {
                None if driver.regs.get(Field::Status) & NEEDS_RESET != 0 => Some((0, 0)),
                used => used,
            });
            ensure!(answer == Some((0, 0)), "queue {queue}, chain {nth} ({descs:x?}): {answer:?}");
            let touched = driver.pages.read(driver.data(5), 0, 64).iter().any(|&byte| byte != 0x5a);
            ensure!(!touched, "queue {queue}, chain {nth} ({descs:x?}): its buffer is written");
        }
    }
    Ok(())
}
