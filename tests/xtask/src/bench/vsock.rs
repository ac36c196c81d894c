//! Streams between a guest and its host through the vsock device: stream-peer in the guest calls one on the host.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use harness::{Kernel, Process, Program, binaries, local_kvm, tools_image};

use super::load::Options;
use super::machine::Machine;
use super::measure::Subject;
use super::table::Table;
use super::usage;

/// Port of the peer on the host.
const PORT: u32 = 7;
/// Only there to end a hang.
const DEADLINE: Duration = Duration::from_secs(120);

/// One load, with the guest as the caller.
struct Job {
    name: &'static str,
    /// Stream-peer's name for it.
    load: &'static str,
    /// How much of it there is for each second asked for, in its own unit.
    amount: u64,
    /// How many of these are one unit of the costs.
    unit: u64,
    /// Which of [`COLUMNS`] stream-peer's figure is.
    column: usize,
}

const JOBS: [Job; 4] = [
    Job { name: "stream-to-host", load: "send", amount: 256 << 20, unit: 1 << 20, column: 0 },
    Job { name: "stream-to-guest", load: "receive", amount: 256 << 20, unit: 1 << 20, column: 0 },
    Job { name: "ping-pong", load: "ping", amount: 2000, unit: 1, column: 1 },
    Job { name: "connects", load: "connects", amount: 500, unit: 1, column: 2 },
];

const COLUMNS: [&str; 4] = ["MB/s", "p50 us", "calls/s", "units/CPU s"];

impl Job {
    fn arguments(&self, options: &Options, address: &str) -> String {
        format!("{} {address} {}", self.load, self.amount * u64::from(options.seconds))
    }

    fn in_guest(&self, options: &Options, machine: &mut Machine) -> Result<Vec<f64>> {
        let arguments = self.arguments(options, &format!("vsock:2:{PORT}"));
        let window = machine.window(&format!(
            "echo @be''gin; stream-peer {arguments} >/tmp/out; echo @en''d; cat /tmp/out"
        ))?;
        let units = (self.amount * u64::from(options.seconds)) as f64 / self.unit as f64;
        let mut values = self.speeds(&window.output)?;
        values[COLUMNS.len() - 1] = units / window.usage.seconds();
        values.extend(window.per(units));
        Ok(values)
    }

    /// The same between two processes of the host, through the unix socket alone: nothing in a guest can be faster.
    fn on_host(&self, options: &Options, peer: &Path, socket: &str) -> Result<Vec<f64>> {
        let arguments = self.arguments(options, &format!("unix:{socket}"));
        let mut command = harness::command::words(&format!("{} {arguments}", peer.display()));
        let mut values = self.speeds(&harness::command::output(&mut command)?)?;
        // The host has no VMM.
        values.resize(COLUMNS.len() + usage::columns("").len(), f64::NAN);
        Ok(values)
    }

    /// Stream-peer's one figure, the last number of its line, in its column.
    fn speeds(&self, output: &str) -> Result<Vec<f64>> {
        let mut numbers = output.split_whitespace().filter_map(|word| word.parse().ok());
        let mut values = vec![f64::NAN; COLUMNS.len()];
        values[self.column] =
            numbers.next_back().with_context(|| format!("stream-peer says no figure: {output}"))?;
        Ok(values)
    }
}

/// Measures.
pub fn run(options: &Options) -> Result<Table> {
    let jobs = options.jobs(&JOBS, |job| job.name)?;
    let acceleration = local_kvm().context("there is no /dev/kvm here that we may use")?;
    let kernel = Kernel::ours(acceleration).file()?.display().to_string();
    let root = tools_image()?.display().to_string();
    let peer = binaries::stream_peer()?;
    let dir = tempfile::tempdir()?;
    let device = dir.path().join("v").display().to_string();
    let socket = format!("{device}_{PORT}");
    let mut subjects = options.ours(|more| {
        format!(
            "run --memory 512M -q --kernel {kernel} --rootfs {root},ro --no-balloon --vsock {device} {more} -- sh"
        )
    })?;
    subjects.retain(|subject| options.has_machine(&subject.name));
    let program = Program::new([&peer.display().to_string(), "serve", &format!("unix:{socket}")]);
    let mut server = Process::start_local(&program)?;
    server.expect("serving", DEADLINE)?;
    let mut table = Table::new(
        format!(
            "vsock: stream-peer in a guest of 1 vCPU, 512 MiB, and on the host; medians of {} runs of {} times {} MiB, \
             {} pings, {} calls",
            options.runs,
            options.seconds,
            JOBS[0].amount >> 20,
            JOBS[2].amount,
            JOBS[3].amount
        ),
        COLUMNS.iter().map(|&name| name.to_owned()).chain(usage::columns("unit")),
    );
    let names: Vec<&str> = jobs.iter().map(|job| job.name).collect();
    let machines = subjects.iter().map(|subject| subject.name.as_str());
    let machines: Vec<&str> = machines.chain(options.has_machine("host").then_some("host")).collect();
    options.measure(&mut table, &names, &machines, |at| match subjects.get(at) {
        Some(subject) => turn(options, &jobs, subject),
        None => jobs.iter().map(|job| job.on_host(options, &peer, &socket)).collect(),
    })?;
    table.notes.push("unit: a MiB, a round trip, or a call that is ended at once; host: the same through a unix socket, without a guest".into());
    table.notes.push(
        "QEMU is not here: its vsock devices need the host kernel's vhost-vsock, or another process".into(),
    );
    table.notes.push(usage::NOTE.into());
    Ok(table)
}

/// All jobs in one boot of a machine.
fn turn(options: &Options, jobs: &[&Job], subject: &Subject) -> Result<Vec<Vec<f64>>> {
    let mut machine = Machine::boot(subject, None)?;
    let values = jobs.iter().map(|job| {
        let values = job.in_guest(options, &mut machine);
        values.with_context(|| format!("{} on {}", job.name, subject.name))
    });
    let values = values.collect::<Result<_>>()?;
    machine.end()?;
    Ok(values)
}
