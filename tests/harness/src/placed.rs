//! Machines with a name where the place of a test is, as their commands know them there.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::binaries;
use crate::place::Place;
use crate::process::{Exit, Output};
use crate::scratch::Scratch;

/// State directory of the machines, among the test's files.
const STATE: &str = "s";
/// Only there to end a hang; stretched in the lab.
const DEADLINE: Duration = Duration::from_secs(60);
/// Between two looks at a log.
const PAUSE: Duration = Duration::from_secs(1);
/// How many of them there are between two looks at machines.
const ROUNDS: u32 = 15;

/// As [`crate::Machines`], but at a [`Place`]. What machines need has to be built before: a lab ends that waits long for it.
pub struct PlacedMachines {
    files: Scratch,
    vmm: String,
}

impl PlacedMachines {
    /// None yet.
    pub fn new(place: &Place) -> Result<Self> {
        let vmm = place.provide(&binaries::vmm()?)?;
        let mut files = Scratch::new(place)?;
        let names = format!("$(ls {STATE} 2>/dev/null)");
        files.at_end(format!("for name in {names}; do {vmm} rm --force --state-dir {STATE} $name; done"));
        Ok(Self { files, vmm })
    }

    /// The working directory of commands.
    pub fn files(&self) -> &Scratch {
        &self.files
    }

    /// A file in a machine's own directory.
    pub fn path_of(&self, name: &str, file: &str) -> String {
        self.files.path(&format!("{STATE}/{name}/{file}"))
    }

    /// The shell's line for `vmm` with these words.
    pub fn command(&self, words: &str) -> String {
        let (subcommand, rest) = words.split_once(' ').unwrap_or((words, ""));
        format!("{} {subcommand} --state-dir {STATE} {rest}", self.vmm)
    }

    /// Runs `vmm` with these words of shell to its end.
    pub fn output(&self, words: &str) -> Result<Output> {
        self.files.run(&self.command(words))
    }

    /// What a command prints that has to succeed.
    pub fn ok(&self, words: &str) -> Result<String> {
        self.output(words)?.ok().with_context(|| format!("vmm {words}"))
    }

    /// What a command says that has to fail with this status, in one line.
    pub fn refused(&self, words: &str, status: i32) -> Result<String> {
        let output = self.output(words)?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.exit == Exit::Status(status), "vmm {words}: {}, {said}", output.exit);
        ensure!(said.lines().count() == 1, "vmm {words}: {said}");
        Ok(said)
    }

    /// Waits until there is in the machine's log what `find` finds in it, as long as the machine runs.
    pub fn find_in_log<T>(&self, name: &str, find: impl Fn(&str) -> Result<Option<T>>) -> Result<T> {
        let end = Instant::now() + DEADLINE * self.files.place().slowness();
        let mut round = 0_u32;
        loop {
            round += 1;
            // Asked before, so that all that an ended one has said was looked at; and seldom, since a program takes the lab as
            // long to start as a guest takes for much of its work.
            let runs = round.is_multiple_of(ROUNDS).then(|| self.ok("ps --format json")).transpose()?;
            let log = self.files.shell(&format!("cat {STATE}/{name}/log"))?;
            if let Some(found) = find(&log).with_context(|| format!("{name} said:\n{log}"))? {
                return Ok(found);
            }
            thread::sleep(PAUSE);
            let Some(runs) = runs else { continue };
            let rows: Vec<serde_json::Value> = serde_json::from_str(&runs)?;
            let row = rows.iter().find(|row| row["name"] == name);
            let row = row.with_context(|| format!("there is no {name}: {runs}"))?;
            let over = row["state"] == "ended" || row["state"] == "killed";
            ensure!(!over && Instant::now() < end, "{row}; its console:\n{log}");
        }
    }

    /// Waits until the log has `text`.
    pub fn expect_log(&self, name: &str, text: &str) -> Result<()> {
        self.find_in_log(name, |log| Ok(log.contains(text).then_some(())))
    }
}
