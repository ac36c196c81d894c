//! What a guest does on each of its CPUs, for a host that looks whether all of it goes on after a snapshot.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::rand::{GetRandomFlags, getrandom};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::clock::Clocks;

/// Between two rounds: a timer ends it.
const PAUSE: Duration = Duration::from_millis(20);
/// Between two lines: a slow console has them printed by then, so that the host sees none long after it was said.
const BETWEEN_LINES: Duration = Duration::from_secs(1);
/// How the kernel says that it is a clone.
const FORKED: &str = "crng reseeded due to virtual machine fork";

/// A piece of a disk, where direct I/O can reach it.
#[repr(align(4096))]
struct Block([u8; 4096]);

/// Goes round on each CPU: looks at the clocks, reads the CPU's own block of the disk `name`, which has to be as the last
/// round left it, and writes it anew. Says all the time `rounds: REALTIME MONOTONIC BACKWARDS RANDOM GENERATIONS` and three
/// things of each CPU, with commas between: rounds, interrupts of its timer, and of the disk. Times are in nanoseconds;
/// BACKWARDS is how often a CPU has seen a clock go backwards, RANDOM is 16 bytes, and GENERATIONS how often the kernel
/// has said that it is a clone, before those bytes were asked for.
pub fn serve(name: &str) -> Result<()> {
    let cpus = thread::available_parallelism()?.get();
    let clocks = Arc::new(Clocks::default());
    let rounds: Arc<[AtomicU64]> = (0..cpus).map(|_| AtomicU64::new(0)).collect();
    let disk = Path::new("/dev").join(name);
    let disk = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(disk)?;
    let disk = Arc::new(disk);
    for cpu in 0..cpus {
        let (clocks, rounds, disk) = (clocks.clone(), rounds.clone(), disk.clone());
        thread::spawn(move || {
            if let Err(error) = go_round(cpu, &clocks, &rounds[cpu], &disk) {
                println!("wrong: CPU {cpu}: {error:#}");
            }
        });
    }
    let device = fs::read_link(format!("/sys/block/{name}/device"))?;
    let device = device.file_name().and_then(|name| name.to_str()).context("a device")?.to_owned();
    let mut log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
    let mut generations = 0;
    for number in 0.. {
        generations += count_forks(&mut log);
        let mut random = [0; 16];
        getrandom(&mut random, GetRandomFlags::empty())?;
        let random: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let interrupts = fs::read_to_string("/proc/interrupts")?;
        give_to_cpu(number % cpus, &interrupts, &device);
        let [realtime, monotonic] = clocks.look();
        let backwards = clocks.backwards();
        let rounds = rounds.iter().map(|rounds| rounds.load(Ordering::SeqCst)).collect();
        let each = [rounds, count(&interrupts, "LOC:", cpus), count(&interrupts, &device, cpus)].map(joined);
        println!("rounds: {realtime} {monotonic} {backwards} {random} {generations} {}", each.join(" "));
        thread::sleep(BETWEEN_LINES);
    }
    Ok(())
}

fn go_round(cpu: usize, clocks: &Clocks, rounds: &AtomicU64, disk: &File) -> Result<()> {
    let mut this = CpuSet::new();
    this.set(cpu);
    sched_setaffinity(None, &this)?;
    let mut block = Block([0; 4096]);
    let at = (cpu * block.0.len()) as u64;
    loop {
        clocks.look();
        let round = rounds.load(Ordering::SeqCst);
        disk.read_exact_at(&mut block.0, at)?;
        let (found, _) = block.0.as_chunks::<8>();
        ensure!(found.iter().all(|word| *word == round.to_le_bytes()), "its block is not of round {round}");
        let (words, _) = block.0.as_chunks_mut::<8>();
        words.fill((round + 1).to_le_bytes());
        disk.write_all_at(&block.0, at)?;
        rounds.store(round + 1, Ordering::SeqCst);
        thread::sleep(PAUSE);
    }
}

/// How often the kernel has said that it is a clone since this was called before.
fn count_forks(log: &mut File) -> u64 {
    let mut record = [0; 8192];
    let mut count = 0;
    // An error is that there are no more.
    while let Ok(length) = log.read(&mut record) {
        count += u64::from(String::from_utf8_lossy(&record[..length]).contains(FORKED));
    }
    count
}

/// Lets the CPU take interrupts of the device, where it has one that all CPUs share.
fn give_to_cpu(cpu: usize, interrupts: &str, device: &str) {
    let lines = interrupts.lines().filter(|line| line.contains(device));
    for number in lines.filter_map(|line| line.split(':').next()) {
        // One of a single queue stays where it is.
        _ = fs::write(format!("/proc/irq/{}/smp_affinity_list", number.trim()), cpu.to_string());
    }
}

/// The interrupts of each CPU in those lines of /proc/interrupts that have this word.
fn count(interrupts: &str, word: &str, cpus: usize) -> Vec<u64> {
    let mut sums = vec![0; cpus];
    for line in interrupts.lines().filter(|line| line.contains(word)) {
        for (sum, count) in sums.iter_mut().zip(line.split_whitespace().skip(1)) {
            *sum += count.parse().unwrap_or(0);
        }
    }
    sums
}

fn joined(numbers: Vec<u64>) -> String {
    numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
}
