//! A guest's network under load: netload in the guest and on the host, through a tap, on our machine and on QEMU's.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use harness::net::{GUEST_ADDRESS, HOST_ADDRESS, TAP};
use harness::{Acceleration, Kernel, NetNs, Place, Process, local_kvm, netload, tools_image};

use super::load::Options;
use super::machine::Machine;
use super::measure::Subject;
use super::qemu;
use super::table::Table;
use super::usage;

/// Of the interface under test, whoever makes it: the host need not ask again who has the guest's address.
const MAC: &str = "02:00:00:00:77:02";
/// Where netload serves on the host.
const PORT: u16 = 7000;

/// What a job counts, and so what its costs are divided by.
#[derive(Clone, Copy, PartialEq)]
enum Unit {
    /// MiB of payload that have arrived.
    Mebibyte,
    /// Packets that the guest's interface has received.
    Received,
    /// Packets that the guest's interface has sent.
    Sent,
    /// Packets that have gone there and come back.
    RoundTrip,
}

/// One load: netload's name for it, with the guest as the client.
struct Job {
    name: &'static str,
    load: &'static str,
    bytes: u32,
    unit: Unit,
}

const JOBS: [Job; 7] = [
    Job { name: "tcp-to-host", load: "tcp-out", bytes: 64, unit: Unit::Mebibyte },
    Job { name: "tcp-to-guest", load: "tcp-in", bytes: 64, unit: Unit::Mebibyte },
    Job { name: "udp64-to-host", load: "udp-out", bytes: 64, unit: Unit::Sent },
    Job { name: "udp64-to-guest", load: "udp-in", bytes: 64, unit: Unit::Received },
    Job { name: "udp1400-to-host", load: "udp-out", bytes: 1400, unit: Unit::Sent },
    Job { name: "udp1400-to-guest", load: "udp-in", bytes: 1400, unit: Unit::Received },
    Job { name: "ping-pong", load: "ping", bytes: 64, unit: Unit::RoundTrip },
];

const COLUMNS: [&str; 5] = ["Gbit/s", "k/s", "p50 us", "p99 us", "units/CPU s"];

impl Job {
    fn run(&self, seconds: u32, machine: &mut Machine) -> Result<Vec<f64>> {
        let before = self.packets(machine)?;
        let Self { load, bytes, .. } = self;
        let window = machine.window(&format!("netload {HOST_ADDRESS}:{PORT} {load} {seconds} {bytes}"))?;
        let packets = self.packets(machine)? - before;
        let [arrived, bytes, seconds, p50, p99] = counted(&window.output)?;
        let units = match self.unit {
            Unit::Mebibyte => bytes / 1_048_576.0,
            Unit::RoundTrip => arrived,
            Unit::Received | Unit::Sent => packets,
        };
        let unless = |absent: bool, value: f64| if absent { f64::NAN } else { value };
        let (stream, trip) = (self.unit == Unit::Mebibyte, self.unit == Unit::RoundTrip);
        let speeds = [
            unless(trip, bytes * 8e-9 / seconds),
            unless(stream, arrived / 1e3 / seconds),
            unless(!trip, p50),
            unless(!trip, p99),
            units / window.usage.seconds(),
        ];
        Ok(speeds.into_iter().chain(window.per(units)).collect())
    }

    /// How many the guest's interface has sent, or received, so far.
    fn packets(&self, machine: &mut Machine) -> Result<f64> {
        let way = if self.unit == Unit::Sent { "tx" } else { "rx" };
        let count = machine.shell(&format!("cat /sys/class/net/eth0/statistics/{way}_packets"))?;
        count.trim().parse().with_context(|| format!("not a count of packets: {count}"))
    }
}

/// What netload says at its end: packets and bytes that have arrived, in how many seconds, and two percentiles.
fn counted(output: &str) -> Result<[f64; 5]> {
    let line = output.lines().find_map(|line| line.strip_prefix("@counted "));
    let words = line.with_context(|| format!("netload has counted nothing: {output}"))?.split_whitespace();
    let values = words.map(str::parse).collect::<Result<Vec<f64>, _>>()?;
    values.try_into().map_err(|values| anyhow!("netload counts five things, not {values:?}"))
}

/// Measures.
pub fn run(options: &Options) -> Result<Table> {
    let jobs = options.jobs(&JOBS, |job| job.name)?;
    let acceleration = local_kvm().context("there is no /dev/kvm here that we may use")?;
    let (place, cpus) = match acceleration {
        Acceleration::Hardware => (Place::LocalHardware, 2),
        // The ring-3 kernel has no SMP.
        Acceleration::None => (Place::LocalRing3, 1),
    };
    let mut subjects = subjects(options, acceleration, cpus)?;
    subjects.retain(|subject| options.has_machine(&subject.name));
    let net = NetNs::with_queues(&place, cpus > 1)?;
    let _server = serve(&net)?;
    let mut table = Table::new(
        format!(
            "net: netload in a guest of {cpus} vCPU, 512 MiB, and on the host; a tap with {cpus} queue pair, without \
             vhost; medians of {} runs of {} s",
            options.runs, options.seconds
        ),
        COLUMNS.iter().map(|&name| name.to_owned()).chain(usage::columns("unit")),
    );
    let names: Vec<&str> = jobs.iter().map(|job| job.name).collect();
    let machines: Vec<&str> = subjects.iter().map(|subject| subject.name.as_str()).collect();
    options.measure(&mut table, &names, &machines, |at| turn(options, &jobs, &subjects[at], &net))?;
    table.notes.push("unit: of tcp a MiB that has arrived, of udp a packet that the guest's interface has sent or received, of ping-pong a round trip (p50 and p99 are of it)".into());
    table
        .notes
        .push("Gbit/s and k/s: payload and thousands of packets that the receiving program has got".into());
    table.notes.push("units/CPU s: for each second of processor time of all threads of the VMM; us/unit: the same time, of its own threads and of vCPUs with the guest's work".into());
    table.notes.push(usage::NOTE.into());
    Ok(table)
}

/// The machines to compare.
fn subjects(options: &Options, acceleration: Acceleration, cpus: u32) -> Result<Vec<Subject>> {
    let kernel = Kernel::ours(acceleration).file()?.display().to_string();
    let root = tools_image()?.display().to_string();
    let queues = if cpus > 1 { format!(",queues={cpus}") } else { String::new() };
    let mut subjects = options.ours(|more| {
        format!(
            "run --cpus {cpus} --memory 512M -q --kernel {kernel} --rootfs {root},ro \
             --net tap={TAP},mac={MAC}{queues} {more} -- sh"
        )
    })?;
    let mq = if cpus > 1 { ",mq=on" } else { "" };
    let arguments = format!(
        "-smp {cpus} -m 512 -kernel {kernel} \
         -drive file={root},format=raw,readonly=on,if=none,id=root -device virtio-blk-device,drive=root \
         -netdev tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off{queues} \
         -device virtio-net-device,netdev=net,mac={MAC}{mq}"
    );
    subjects.push(qemu::at_shell("QEMU", &arguments)?);
    Ok(subjects)
}

/// All jobs in one boot of a machine.
fn turn(options: &Options, jobs: &[&Job], subject: &Subject, net: &NetNs) -> Result<Vec<Vec<f64>>> {
    let mut machine = Machine::boot(subject, Some(net))?;
    machine.shell(&format!("ip addr add {GUEST_ADDRESS}/24 dev eth0 && ip link set eth0 up"))?;
    let values = jobs.iter().map(|job| {
        let values = job.run(options.seconds, &mut machine);
        values.with_context(|| format!("{} on {}", job.name, subject.name))
    });
    let values = values.collect::<Result<_>>()?;
    machine.end()?;
    Ok(values)
}

/// Netload's end on the host, which serves until it is dropped.
fn serve(net: &NetNs) -> Result<Process> {
    let netload = netload()?;
    let mut server = net.start(&format!("exec {} serve {PORT}", netload.display()))?;
    server.expect("ready", Duration::from_secs(20)).context("netload on the host")?;
    Ok(server)
}
