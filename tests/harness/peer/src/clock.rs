//! What a guest's clocks say, for a host that compares them with its own.

use std::io::BufRead;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use rustix::time::{ClockId, clock_gettime};

/// Answers each line of standard input with `clock: REALTIME MONOTONIC BACKWARDS RANDOM`: two clocks in nanoseconds, how
/// often any thread has seen one of them go backwards, and 16 random bytes. A thread for each CPU looks all the time.
pub fn serve() -> Result<()> {
    let clocks = Arc::new(Clocks::default());
    for _ in 0..thread::available_parallelism()?.get() {
        let clocks = clocks.clone();
        thread::spawn(move || {
            loop {
                clocks.look();
                thread::sleep(Duration::from_millis(1));
            }
        });
    }
    println!("ticking");
    for line in std::io::stdin().lock().lines() {
        line?;
        let mut random = [0; 16];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let random: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let [realtime, monotonic] = clocks.look();
        println!("clock: {realtime} {monotonic} {} {random}", clocks.backwards());
    }
    Ok(())
}

/// Two clocks, at which several threads look.
#[derive(Default)]
pub struct Clocks {
    newest: [AtomicU64; 2],
    backwards: AtomicU64,
}

impl Clocks {
    /// Reads both clocks, and counts those that are behind what somebody has seen before.
    pub fn look(&self) -> [u64; 2] {
        let clocks = [ClockId::Realtime, ClockId::Monotonic];
        std::array::from_fn(|i| {
            let seen = self.newest[i].load(Ordering::SeqCst);
            let time = clock_gettime(clocks[i]);
            let nanos = time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64;
            if nanos < seen {
                self.backwards.fetch_add(1, Ordering::SeqCst);
            }
            self.newest[i].fetch_max(nanos, Ordering::SeqCst);
            nanos
        })
    }

    /// How often any thread has seen one of them go backwards.
    pub fn backwards(&self) -> u64 {
        self.backwards.load(Ordering::SeqCst)
    }
}
