//! A machine that becomes many: how long until all of them answer, and what each costs.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use harness::{command, smaps};
use rustix::process::{Pid, Signal, kill_process};

use super::answering::{self, NAME, Parent, SIZES};
use super::measure::{median_of, p95_of};
use super::table::Table;

/// Clones of one fork.
const CLONES: usize = 100;

/// Forks `runs` times.
pub fn run(runs: usize) -> Result<Table> {
    let (memory, filled) = SIZES[0];
    let parent = Parent::boot(memory, filled, "")?;
    let mut values = Vec::new();
    for round in 0..=runs {
        let turn = fork(&parent, u64::from(memory) << 20)?;
        if round > 0 {
            values.push(turn);
        }
    }
    let columns = ["command ms", "all answer ms", "p95 ms", "own KiB", "written KiB", "Pss KiB"];
    let mut table = Table::new(
        format!(
            "fork: {CLONES} clones of a guest of {memory} MiB, of which {filled} MiB are filled; medians of {runs}"
        ),
        columns,
    );
    let (middle, high) = (median_of(&values), p95_of(&values));
    table.row("vmm", &[middle[0], middle[1], high[1], middle[2], middle[3], middle[4]]);
    table.notes.push("command: 'vmm fork' from start to end; all answer: from there until each clone's program has answered once, one after the other".into());
    table.notes.push("of one clone: private memory beside guest RAM, pages of RAM that are its own, and its share of everything".into());
    Ok(table)
}

/// Milliseconds of the command and until all have answered; KiB of one clone: beside RAM, of RAM, and its share.
fn fork(parent: &Parent, ram: u64) -> Result<Vec<f64>> {
    let vsock = |number: &str| parent.path(&format!("v{number}"));
    let began = Instant::now();
    let set = format!("vsock0.path={}", vsock("{}").display());
    command::output(&mut parent.command(&format!("fork {NAME} -n {CLONES} --rm --set {set}")))?;
    let ended = answering::millis(began);
    (1..=CLONES).try_for_each(|number| answering::answered(&vsock(&number.to_string())))?;
    let answered = answering::millis(began);
    let pids = parent.clones()?;
    ensure!(pids.len() == CLONES, "{} clones of {CLONES} live", pids.len());
    let costs = pids.iter().map(|&pid| cost(pid, ram)).collect::<Result<Vec<_>>>()?;
    for &pid in &pids {
        kill_process(Pid::from_raw(pid.cast_signed()).context("a process number")?, Signal::TERM)?;
    }
    while !parent.clones()?.is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Ok([vec![ended, answered], median_of(&costs)].concat())
}

fn cost(pid: u32, bytes: u64) -> Result<Vec<f64>> {
    let mappings = smaps::parse(&std::fs::read_to_string(format!("/proc/{pid}/smaps"))?)?;
    let ram: u64 = smaps::ram(&mappings, bytes)?.iter().map(|mapping| mapping.anonymous).sum();
    let all: u64 = mappings.iter().map(|mapping| mapping.anonymous).sum();
    let pss: u64 = mappings.iter().map(|mapping| mapping.pss).sum();
    Ok([all - ram, ram, pss].map(|bytes| bytes as f64 / 1024.0).to_vec())
}
