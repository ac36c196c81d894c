//! How soon a machine that comes from a snapshot runs, and answers.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::answering::{self, Parent, SIZES};
use super::measure::{median_of, p95_of};
use super::qemu_file::Migrating;
use super::table::Table;

/// Ways to restore, each with its memory mode. The last has what the one before it recorded.
const MODES: [(&str, &str); 4] =
    [("map", "map"), ("copy", "copy"), ("uffd", "uffd"), ("uffd, recorded", "uffd")];
/// What a restore in the mode uffd records.
const RECORD: &str = "memory.touched";

/// Restores each machine `runs` times in each way, in turn, with its files in the page cache and not.
pub fn run(runs: usize) -> Result<Table> {
    let columns = ["first exit ms", "p95 ms", "answer ms", "p95 ms", "minor faults", "major faults"];
    let mut table = Table::new(
        format!(
            "restore: process start to the guest's first exit, to the first answer; 1 vCPU, medians of {runs}"
        ),
        columns,
    );
    for (memory, filled) in SIZES {
        let parent = Parent::boot(memory, filled, "")?;
        let saved = parent.path("saved");
        parent.save(&saved, "full")?;
        let mut theirs = Migrating::boot(memory, filled)?;
        theirs.save()?;
        for cold in [false, true] {
            let mut values = vec![Vec::new(); MODES.len() + 1];
            for round in 0..=runs {
                let mut turn = Vec::new();
                for (name, mode) in MODES {
                    if name == "uffd" {
                        _ = std::fs::remove_file(saved.join(RECORD));
                    }
                    if cold {
                        answering::forget(&saved)?;
                    }
                    turn.push(ours(&parent, &saved, mode)?);
                }
                if cold {
                    answering::forget(theirs.dir())?;
                }
                turn.push(theirs.restore()?);
                if round > 0 {
                    values.iter_mut().zip(turn).for_each(|(values, turn)| values.push(turn));
                }
            }
            for (name, values) in
                MODES.map(|(name, _)| format!("vmm {name}")).into_iter().chain(["QEMU".into()]).zip(&values)
            {
                let (middle, high) = (median_of(values), p95_of(values));
                let cache = if cold { "cold" } else { "warm" };
                table.row(
                    &format!("{memory} MiB  {cache}  {name}"),
                    &[middle[0], high[0], middle[1], high[1], middle[2], middle[3]],
                );
            }
        }
    }
    table.notes.push("first exit: since main, as --timings prints it; answer: since before the process is made; vmm's answers are over vsock, QEMU's on the console, by a shell".into());
    table.notes.push("recorded: with what the restore before it touched up to its answer".into());
    table.notes.push(
        "cold: the snapshot's files are not in the page cache; faults: of the VMM's process up to the answer"
            .into(),
    );
    Ok(table)
}

/// Milliseconds to the first exit and to the answer, minor and major faults up to it.
fn ours(parent: &Parent, saved: &Path, mode: &str) -> Result<Vec<f64>> {
    let vsock = parent.path("restored");
    _ = std::fs::remove_file(&vsock);
    let mut command: Command =
        parent.command(&format!("restore --timings --serial null --memory-mode {mode} --set"));
    command.arg(format!("vsock0.path={}", vsock.display())).arg(saved);
    let began = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let answer = answering::answered(&vsock).map(|()| answering::millis(began));
    let faults = answering::faults(child.id());
    kill_process(Pid::from_child(&child), Signal::TERM)?;
    let mut said = String::new();
    child.stderr.take().context("standard error is a pipe")?.read_to_string(&mut said)?;
    child.wait()?;
    let first =
        said.lines().find_map(|line| line.trim().strip_suffix(" ms  first exit")?.trim().parse().ok());
    let [minor, major] = faults?;
    Ok(vec![first.with_context(|| format!("no first exit: {said}"))?, answer?, minor, major])
}
