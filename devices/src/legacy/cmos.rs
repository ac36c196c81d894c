//! The MC146818 real time clock and the rest of the CMOS memory: the time of day from the host's clock.
//!
//! UTC, BCD, 24 hours. The clock never says that an update is in progress and raises no interrupts, so that a
//! guest's drivers read the time without waiting. The guest cannot set it.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::{answer, byte};
use crate::model::BusDevice;
use crate::snapshot::{Saved, Snapshot, SnapshotError, State};

/// First I/O port: the index register; the data register follows.
pub const PORT: u16 = 0x70;
/// Number of ports.
pub const PORTS: u16 = 2;

/// Register A: 32768 Hz time base, periodic rate 1024 Hz, no update in progress.
const STATUS_A: u8 = 0x26;
/// Register B: 24 hours, BCD, all interrupts off.
const STATUS_B: u8 = 0x02;
/// Register D: RAM and time are valid.
const STATUS_D: u8 = 0x80;

/// The clock and its index register.
pub struct Cmos {
    index: AtomicU8,
    /// Seconds since 1970.
    now: fn() -> u64,
}

impl Default for Cmos {
    fn default() -> Self {
        Self::new()
    }
}

impl Cmos {
    /// A clock that shows the host's time.
    pub fn new() -> Self {
        Self::with_clock(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
    }

    /// A clock that shows the time that `now` returns, in seconds since 1970.
    pub fn with_clock(now: fn() -> u64) -> Self {
        Self { index: AtomicU8::new(0), now }
    }

    fn register(&self, index: u8) -> u8 {
        match index {
            0x0a => STATUS_A,
            0x0b => STATUS_B,
            0x0d => STATUS_D,
            0x00 | 0x02 | 0x04 | 0x06..=0x09 | 0x32 => {
                let date = Date::at((self.now)());
                bcd(match index {
                    0x00 => date.second,
                    0x02 => date.minute,
                    0x04 => date.hour,
                    0x06 => date.weekday,
                    0x07 => date.day,
                    0x08 => date.month,
                    0x09 => (date.year % 100) as u8,
                    _ => (date.year / 100 % 100) as u8,
                })
            }
            _ => 0,
        }
    }
}

/// The state for a snapshot. The time is the host's.
#[derive(Serialize, Deserialize)]
struct CmosState {
    index: u8,
}

impl State for CmosState {
    const VERSION: u16 = 1;
}

impl Snapshot for Cmos {
    fn save(&self) -> Result<Saved, SnapshotError> {
        Saved::of(&CmosState { index: self.index.load(Ordering::Relaxed) })
    }

    fn restore(&self, saved: &Saved) -> Result<(), SnapshotError> {
        let CmosState { index } = saved.get()?;
        self.index.store(index & 0x7f, Ordering::Relaxed);
        Ok(())
    }
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 1 {
            answer(data, self.register(self.index.load(Ordering::Relaxed)));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(index)) = (offset, byte(data)) {
            // The top bit masks NMIs and is no part of the index.
            self.index.store(index & 0x7f, Ordering::Relaxed);
        }
    }
}

/// A moment, as the clock's registers show it.
#[derive(Debug, PartialEq, Eq)]
struct Date {
    year: u64,
    month: u8,
    day: u8,
    /// Sunday is 1.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Date {
    /// The date in the proleptic Gregorian calendar, UTC, at `seconds` since 1970.
    fn at(seconds: u64) -> Self {
        let (mut days, second_of_day) = (seconds / 86400, seconds % 86400);
        // 1970-01-01 was a Thursday.
        let weekday = ((days + 4) % 7 + 1) as u8;
        // Count from 2000-03-01 less 400 years: then leap days are last in their year, and cycles start whole.
        days += 135_080;
        let (cycles, days) = (days / 146_097, days % 146_097);
        let century = (days / 36_524).min(3);
        let days = days - century * 36_524;
        let (fours, days) = (days / 1461, days % 1461);
        let years = (days / 365).min(3);
        let day_of_year = days - years * 365;
        // Months from March have 31, 30, 31, 30, 31 days, over and over: 153 days in five months.
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8;
        let year = 1600 + cycles * 400 + century * 100 + fours * 4 + years + month_from_march / 10;
        Self {
            year,
            month: ((month_from_march + 2) % 12 + 1) as u8,
            day,
            weekday,
            hour: (second_of_day / 3600) as u8,
            minute: (second_of_day / 60 % 60) as u8,
            second: (second_of_day % 60) as u8,
        }
    }
}

fn bcd(value: u8) -> u8 {
    ((value / 10) << 4) | (value % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(cmos: &Cmos, index: u8) -> u8 {
        let mut data = [0xaa];
        cmos.write(0, &[index]);
        cmos.read(1, &mut data);
        data[0]
    }

    #[test]
    fn shows_the_time_in_bcd() {
        // Saturday, 2026-11-21 21:34:56 UTC.
        let cmos = Cmos::with_clock(|| 1_795_296_896);
        let shown = [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| read(&cmos, index));
        assert_eq!(shown, [0x20, 0x26, 0x11, 0x21, 0x07, 0x21, 0x34, 0x56]);
        assert_eq!(read(&cmos, 0x80), 0x56, "the NMI bit is no part of the index");
    }

    #[test]
    fn is_ready_at_once_and_cannot_be_set() {
        let cmos = Cmos::with_clock(|| 0);
        for (index, want) in [(0x0a, 0x26), (0x0b, 0x02), (0x0c, 0), (0x0d, 0x80), (0x0f, 0), (0x7f, 0)] {
            assert_eq!(read(&cmos, index), want, "register {index:#x}");
            cmos.write(0, &[index]);
            cmos.write(1, &[0x55]);
            assert_eq!(read(&cmos, index), want, "register {index:#x} after a write");
        }
        let mut wide = [0; 2];
        cmos.read(1, &mut wide);
        cmos.read(0, &mut wide[..1]);
        assert_eq!(wide, [0, 0]);
    }

    #[test]
    fn dates_around_leap_days_and_centuries() {
        for (seconds, want) in [
            (0, (1970, 1, 1, 5)),
            (951_782_400, (2000, 2, 29, 3)),
            (951_868_800, (2000, 3, 1, 4)),
            (1_709_164_800, (2024, 2, 29, 5)),
            (1_735_603_200, (2024, 12, 31, 3)),
            (4_107_456_000, (2100, 2, 28, 1)),
            (4_107_542_400, (2100, 3, 1, 2)),
        ] {
            let date = Date::at(seconds);
            assert_eq!((date.year, date.month, date.day, date.weekday), want, "{seconds}");
        }
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let mut before = Date::at(0);
        for day in 1..200_000u64 {
            let date = Date::at(day * 86400);
            let next = (date.year, date.month, date.day) == (before.year, before.month, before.day + 1);
            let month = (date.year, date.month, date.day) == (before.year, before.month + 1, 1);
            let year = (date.year, date.month, date.day) == (before.year + 1, 1, 1);
            assert!(next || (month && before.day >= 28) || (year && before.day == 31), "{before:?} {date:?}");
            assert_eq!(date.weekday, before.weekday % 7 + 1);
            before = date;
        }
        assert_eq!((before.year, before.month, before.day), (2517, 7, 31));
    }
}
