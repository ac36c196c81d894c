//! `cargo xtask bench`: figures of whole machines, side by side with QEMU's microvm in the same run.
//!
//! Programs take turns (A B A B …), so a machine that gets slower or faster meanwhile does so for both. What is
//! printed are medians, and the ratio of medians.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};

mod answering;
mod api;
mod balloon;
mod block;
mod boot;
mod fork;
mod load;
mod machine;
mod measure;
mod memory;
mod net;
mod qemu;
mod qemu_file;
mod restore;
mod snapshot;
mod start;
mod table;
mod tracepoints;
mod usage;
mod vsock;

/// Measure a whole machine, side by side with QEMU's microvm
#[derive(Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Process start to the guest's first instruction to process end
    Start(Options),
    /// Process start to init to guest reboot to process end
    Boot(Options),
    /// Resident memory besides guest RAM, and size of the binary
    Memory(Options),
    /// The control API: start to answer, latency, and fifty machines
    Api(Options),
    /// fio on a guest's disk: speed, latency, processor time and exits
    Block(block::Options),
    /// TCP and UDP between a guest and its host: speed, latency, processor time and exits
    Net(load::Options),
    /// Streams between a guest and its host by vsock: speed, latency, calls, processor time and exits
    Vsock(load::Options),
    /// Memory that a guest frees: how much of it comes back to the host, and when
    Balloon(load::Options),
    /// Saving a machine: how long it stands still, and size on disk
    Snapshot(Options),
    /// Restoring a machine: first exit, first answer and page faults, with a warm and a cold page cache
    Restore(Options),
    /// A hundred clones of a machine: time until all answer, and memory of each
    Fork(Options),
}

/// How to measure.
#[derive(Args)]
struct Options {
    /// Counted runs of each program; the medians of fewer than 20 are not to be quoted
    #[arg(long, default_value_t = 20, value_name = "N")]
    runs: usize,
    /// Also print the figures as JSON
    #[arg(long)]
    json: bool,
}

impl Bench {
    /// Measures and prints.
    pub fn run(self) -> Result<ExitCode> {
        let (table, json) = match self.what {
            What::Start(options) => (start::run(runs(&options)?)?, options.json),
            What::Boot(options) => (boot::run(runs(&options)?)?, options.json),
            What::Memory(options) => (memory::run(runs(&options)?)?, options.json),
            What::Api(options) => (api::run(runs(&options)?)?, options.json),
            What::Block(options) => (block::run(&options)?, options.load.json),
            What::Net(options) => (net::run(&options)?, options.json),
            What::Vsock(options) => (vsock::run(&options)?, options.json),
            What::Balloon(options) => (balloon::run(&options)?, options.json),
            What::Snapshot(options) => (snapshot::run(runs(&options)?)?, options.json),
            What::Restore(options) => (restore::run(runs(&options)?)?, options.json),
            What::Fork(options) => (fork::run(runs(&options)?)?, options.json),
        };
        println!("{table}");
        if json {
            println!("{}", serde_json::to_string_pretty(&table)?);
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn runs(options: &Options) -> Result<usize> {
    match options.runs {
        0 => bail!("no runs, no figures; give --runs 1 or more"),
        runs => Ok(runs),
    }
}
