//! `vmm stats`: what machines take of the host, second by second.

use std::io::IsTerminal;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use clap_complete::ArgValueCandidates;
use serde::Serialize;

use super::{Format, StateArgs, ask_inspection, columns, mib};
use crate::api::own::Inspection;
use crate::cli::{completion, print};
use crate::exit::ExitStatus;
use crate::machines::{Machine, StateDir, find_alive};
use crate::session::pause;

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Show what machines take of the host
#[derive(Args, Clone, Debug)]
pub struct StatsArgs {
    /// Only these
    #[arg(value_name = "NAME", add = ArgValueCandidates::new(completion::machines))]
    names: Vec<String>,
    /// Print once and end
    #[arg(long)]
    once: bool,
    /// The form; json is printed once
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    #[command(flatten)]
    state: StateArgs,
}

/// What has been counted up to a look.
#[derive(Debug)]
struct Sample {
    name: String,
    at: Instant,
    cpu: Duration,
    resident: u64,
    /// Bytes to the guest and from it, of disks and of networks.
    bytes: [u64; 4],
}

impl Sample {
    /// Of a machine that answers.
    fn of(machine: &Machine) -> Option<Self> {
        let inspection = ask_inspection(machine).ok()?;
        let usage = inspection.usage.as_ref();
        let cpu = usage.map_or(0, |usage| usage.vcpu_micros.iter().sum::<u64>() + usage.device_micros);
        let count = |kind, counter| count(&inspection, kind, counter);
        Some(Self {
            name: machine.name.clone(),
            at: Instant::now(),
            cpu: Duration::from_micros(cpu),
            resident: usage.map_or(0, |usage| usage.memory_resident_bytes),
            bytes: [
                count("disk", "bytes_to_guest"),
                count("disk", "bytes_from_guest"),
                count("net", "bytes_to_guest"),
                count("net", "bytes_from_guest"),
            ],
        })
    }
}

/// The sum of a counter of all devices of a kind.
fn count(inspection: &Inspection, kind: &str, counter: &str) -> u64 {
    let devices = inspection.devices.iter().filter(|device| device.kind == kind);
    devices.filter_map(|device| device.counters.get(counter)).sum()
}

/// What a machine takes, between two looks.
#[derive(Debug, Serialize)]
struct Rates {
    name: String,
    /// CPU time by time, of all threads that serve the guest: 1 is one CPU.
    cpus: f64,
    memory_resident_bytes: u64,
    disk_read_bytes_per_second: u64,
    disk_written_bytes_per_second: u64,
    network_received_bytes_per_second: u64,
    network_sent_bytes_per_second: u64,
}

impl Rates {
    fn between(before: &Sample, now: &Sample) -> Self {
        let time = now.at.duration_since(before.at).as_secs_f64();
        let per_second = |i: usize| (now.bytes[i].saturating_sub(before.bytes[i]) as f64 / time) as u64;
        Self {
            name: now.name.clone(),
            cpus: now.cpu.saturating_sub(before.cpu).as_secs_f64() / time,
            memory_resident_bytes: now.resident,
            disk_read_bytes_per_second: per_second(0),
            disk_written_bytes_per_second: per_second(1),
            network_received_bytes_per_second: per_second(2),
            network_sent_bytes_per_second: per_second(3),
        }
    }

    fn row(&self) -> [String; 7] {
        [
            self.name.clone(),
            format!("{:.1}%", self.cpus * 100.0),
            mib(self.memory_resident_bytes),
            mib(self.disk_read_bytes_per_second),
            mib(self.disk_written_bytes_per_second),
            mib(self.network_received_bytes_per_second),
            mib(self.network_sent_bytes_per_second),
        ]
    }
}

/// Runs the subcommand.
pub fn run(args: &StatsArgs) -> anyhow::Result<ExitStatus> {
    let state = args.state.open()?;
    let once = args.once || args.format == Format::Json;
    let mut before = samples(&state, &args.names)?;
    loop {
        if pause(INTERVAL, None) {
            return Ok(ExitStatus::SIGPIPE);
        }
        let now = samples(&state, &args.names)?;
        let old = |new: &Sample| before.iter().find(|old| old.name == new.name);
        let rates: Vec<Rates> = now.iter().filter_map(|new| Some(Rates::between(old(new)?, new))).collect();
        let printed = match args.format {
            Format::Json => super::print_json(&rates)?,
            Format::Table => {
                let head = ["NAME", "CPU", "RESIDENT", "READ/S", "WRITTEN/S", "RECEIVED/S", "SENT/S"];
                let rows: Vec<_> =
                    [head.map(String::from)].into_iter().chain(rates.iter().map(Rates::row)).collect();
                let table = columns(&rows);
                // Written over what is there, so that it does not flicker.
                match !once && std::io::stdout().is_terminal() {
                    true => print(format!("\x1b[H{}\x1b[J", table.replace('\n', "\x1b[K\n")).as_bytes())?,
                    false => print(table.as_bytes())?,
                }
            }
        };
        if once || printed != ExitStatus::Success {
            return Ok(printed);
        }
        before = now;
    }
}

/// Looks at those of these names, or at all that live. Who does not answer does not keep the others waiting.
fn samples(state: &StateDir, names: &[String]) -> anyhow::Result<Vec<Sample>> {
    let machines: Vec<Machine> = match names {
        [] => state.list()?.into_iter().filter(Machine::is_alive).collect(),
        names => names.iter().map(|name| find_alive(state, name)).collect::<anyhow::Result<_>>()?,
    };
    Ok(thread::scope(|scope| {
        let threads: Vec<_> = machines.iter().map(|machine| scope.spawn(|| Sample::of(machine))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()?).collect()
    }))
}
