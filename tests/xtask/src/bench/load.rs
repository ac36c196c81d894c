//! What the benchmarks of a guest's devices have in common: their options, and machines that take turns at the same jobs.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use harness::binaries;

use super::measure::{Subject, median_of};
use super::table::Table;

/// How to measure.
#[derive(Args)]
pub struct Options {
    /// Boots of each machine; every job runs once in each, and medians are printed
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub runs: usize,
    /// Seconds for each job
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub seconds: u32,
    /// Only jobs whose name contains one of these
    #[arg(long, value_name = "TEXT", value_delimiter = ',')]
    jobs: Vec<String>,
    /// Only machines whose name contains one of these
    #[arg(long, value_name = "TEXT", value_delimiter = ',')]
    machines: Vec<String>,
    /// Measure vmm with each of these --transport too
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    transport: Vec<String>,
    /// Measure this binary of vmm too, with all transports
    #[arg(long, value_name = "PATH")]
    against: Option<PathBuf>,
    /// Also print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

impl Options {
    /// The jobs that are asked for, of all that there are.
    pub fn jobs<'a, J>(&self, all: &'a [J], name: impl Fn(&J) -> &str) -> Result<Vec<&'a J>> {
        ensure!(
            self.runs > 0 && self.seconds > 0,
            "no runs, no figures; give --runs and --seconds 1 or more"
        );
        let jobs: Vec<&J> = all.iter().filter(|job| chosen(&self.jobs, name(job))).collect();
        let names: Vec<&str> = all.iter().map(name).collect();
        ensure!(!jobs.is_empty(), "there is no such job; there are {}", names.join(", "));
        Ok(jobs)
    }

    /// Whether the machine of this name is asked for.
    pub fn has_machine(&self, name: &str) -> bool {
        chosen(&self.machines, name)
    }

    /// Our own machines: the binary as it is now, another one, other transports. `arguments` follow the program.
    pub fn ours(&self, arguments: impl Fn(&str) -> String) -> Result<Vec<Subject>> {
        let release = binaries::release()?;
        let subject = |name: &str, vmm: &PathBuf, more: &str| {
            Subject::new(name, &vmm.display().to_string(), &arguments(more))
        };
        let binaries =
            [("vmm", &release)].into_iter().chain(self.against.iter().map(|other| ("other vmm", other)));
        let variants = |(name, vmm): (&str, &PathBuf)| {
            let transports = self.transport.iter();
            let other =
                transports.map(|how| subject(&format!("{name} {how}"), vmm, &format!("--transport {how}")));
            [subject(name, vmm, "")].into_iter().chain(other).collect::<Vec<_>>()
        };
        Ok(binaries.flat_map(variants).collect())
    }

    /// In each run every machine has its turn, a list of values for each job; the medians become the table's rows.
    pub fn measure(
        &self,
        table: &mut Table,
        jobs: &[&str],
        machines: &[&str],
        mut turn: impl FnMut(usize) -> Result<Vec<Vec<f64>>>,
    ) -> Result<()> {
        ensure!(!machines.is_empty(), "there is no such machine; leave --machines out to see all");
        let mut turns = vec![Vec::with_capacity(self.runs); machines.len()];
        for run in 1..=self.runs {
            eprintln!("run {run} of {}", self.runs);
            for (machine, turns) in turns.iter_mut().enumerate() {
                turns.push(turn(machine)?);
            }
        }
        for (at, job) in jobs.iter().enumerate() {
            for (machine, turns) in machines.iter().zip(&turns) {
                let runs: Vec<Vec<f64>> = turns.iter().map(|turn| turn[at].clone()).collect();
                table.row(&format!("{job}  {machine}"), &median_of(&runs));
            }
        }
        Ok(())
    }
}

/// Whether a name is one of those asked for; nothing asked for is everything.
fn chosen(texts: &[String], name: &str) -> bool {
    texts.is_empty() || texts.iter().any(|text| name.contains(text.as_str()))
}
