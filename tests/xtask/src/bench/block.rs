//! A disk of a guest under load: fio in the guest, on our machine and on QEMU's, and on the host for comparison.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use harness::{Kernel, binaries, command, local_kvm, packages, tools_image};
use serde_json::Value;

use super::load;
use super::machine::Machine;
use super::measure::Subject;
use super::qemu;
use super::table::Table;
use super::usage;

/// How to measure disks.
#[derive(Args)]
// Both types have the same name, which clap gives to the group of their options.
#[group(skip)]
pub struct Options {
    #[command(flatten)]
    pub load: load::Options,
    /// Measure vmm with these options of --disk too, such as cache=none; repeat for more
    #[arg(long, value_name = "OPTIONS")]
    disk: Vec<String>,
    /// Where the disk's file is made; by default where temporary files are
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Size of the disk in MiB; it has to fit into the page cache
    #[arg(long, default_value_t = 512, value_name = "MIB")]
    size: u64,
    /// fio's engine in the guest
    #[arg(long, default_value = "libaio", value_name = "NAME")]
    engine: String,
}

/// One load.
struct Job {
    name: &'static str,
    pattern: &'static str,
    block: &'static str,
    depth: u32,
}

const JOBS: [Job; 6] = [
    Job { name: "4k-randread-1", pattern: "randread", block: "4k", depth: 1 },
    Job { name: "4k-randwrite-1", pattern: "randwrite", block: "4k", depth: 1 },
    Job { name: "4k-randread-32", pattern: "randread", block: "4k", depth: 32 },
    Job { name: "4k-randwrite-32", pattern: "randwrite", block: "4k", depth: 32 },
    Job { name: "128k-read-32", pattern: "read", block: "128k", depth: 32 },
    Job { name: "128k-write-32", pattern: "write", block: "128k", depth: 32 },
];

const COLUMNS: [&str; 4] = ["IOPS", "MiB/s", "p50 us", "p99 us"];

impl Job {
    /// fio's command line, but for the file.
    fn arguments(&self, options: &Options, engine: &str) -> String {
        let Self { name, pattern, block, depth } = self;
        format!(
            "--name={name} --rw={pattern} --bs={block} --iodepth={depth} --ioengine={engine} --time_based --thread \
             --runtime={} --invalidate=0 --randrepeat=0 --norandommap --lat_percentiles=1 --clat_percentiles=0 \
             --output-format=json",
            options.load.seconds
        )
    }

    /// Runs it in a guest.
    fn in_guest(&self, options: &Options, machine: &mut Machine, disk: &str) -> Result<Vec<f64>> {
        // The marks are put together by the shell that fio starts: fio's report repeats its options.
        let line = format!(
            "fio {} --filename={disk} --direct=1 --output=/tmp/out --eta=never \
             --exec_prerun=\"echo @be''gin > /dev/console #\" \
             --exec_postrun=\"echo @en''d > /dev/console #\"; cat /tmp/out",
            self.arguments(options, &options.engine)
        );
        let window = machine.window(&line)?;
        let fio = parse(&window.output)?;
        let mut values = speeds(&fio, options)?;
        values.extend(window.per(requests(&fio)?));
        Ok(values)
    }

    /// Runs it on the host, on the same file: nothing in a guest can be faster.
    fn on_host(&self, options: &Options, file: &Path) -> Result<Vec<f64>> {
        let mut fio = command::words(&format!("fio {}", self.arguments(options, "io_uring")));
        let fio = parse(&command::output(fio.arg("--filename").arg(file))?)?;
        let mut values = speeds(&fio, options)?;
        // The host has no VMM.
        values.resize(columns().len(), f64::NAN);
        Ok(values)
    }
}

/// Measures.
pub fn run(options: &Options) -> Result<Table> {
    packages::ensure(&["fio"])?;
    let load = &options.load;
    let jobs = load.jobs(&JOBS, |job| job.name)?;
    let dir = match &options.dir {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    let file = dir.path().join("disk.img");
    fill(&file, options.size)?;
    let mut subjects = subjects(options, &file)?;
    subjects.retain(|subject| load.has_machine(&subject.name));
    let mut table = Table::new(
        format!(
            "block: fio ({}, direct) in a guest of 1 vCPU, 512 MiB; {} MiB file in the page cache on {}; medians of {} runs of {} s",
            options.engine,
            options.size,
            file_system(dir.path())?,
            load.runs,
            load.seconds
        ),
        columns(),
    );
    let names: Vec<&str> = jobs.iter().map(|job| job.name).collect();
    let machines = subjects.iter().map(|subject| subject.name.as_str());
    let machines: Vec<&str> = machines.chain(load.has_machine("host").then_some("host")).collect();
    load.measure(&mut table, &names, &machines, |at| match subjects.get(at) {
        Some(subject) => guest_turn(options, &jobs, subject),
        None => jobs.iter().map(|job| job.on_host(options, &file)).collect(),
    })?;
    table.notes.push("us/IO: processor time of the VMM's own threads, and of the vCPU with the guest's work; the same as s per million I/Os".into());
    table.notes.push(usage::NOTE.into());
    table.notes.push(
        "irqs: the guest's /proc/interrupts; host: fio with io_uring on the same file, not direct".into(),
    );
    Ok(table)
}

/// All jobs in one boot of a machine.
fn guest_turn(options: &Options, jobs: &[&Job], subject: &Subject) -> Result<Vec<Vec<f64>>> {
    let mut machine = Machine::boot(subject, None)?;
    let disk = writable_disk(&mut machine)?;
    let values = jobs.iter().map(|job| {
        let values = job.in_guest(options, &mut machine, &disk);
        values.with_context(|| format!("{} on {}", job.name, subject.name))
    });
    let values = values.collect::<Result<_>>()?;
    machine.end()?;
    Ok(values)
}

fn columns() -> Vec<String> {
    COLUMNS.iter().map(|&name| name.to_owned()).chain(usage::columns("IO")).collect()
}

/// The machines to compare.
fn subjects(options: &Options, file: &Path) -> Result<Vec<Subject>> {
    let acceleration = local_kvm().context("there is no /dev/kvm here that we may use")?;
    let kernel = Kernel::ours(acceleration).file()?.display().to_string();
    let root = tools_image()?.display().to_string();
    let file = file.display();
    let ours = |disk: &str, more: &str| {
        format!(
            "run --memory 512M -q --kernel {kernel} --rootfs {root},ro --disk path={file}{disk} {more} -- sh"
        )
    };
    let mut subjects = options.load.ours(|more| ours("", more))?;
    let vmm = binaries::release()?.display().to_string();
    let variant = |more: &String| Subject::new(&format!("vmm {more}"), &vmm, &ours(&format!(",{more}"), ""));
    subjects.extend(options.disk.iter().map(variant));
    for aio in ["io_uring", "threads"] {
        let arguments = format!(
            "-m 512 -kernel {kernel} \
             -drive file={root},format=raw,readonly=on,if=none,id=root -device virtio-blk-device,drive=root \
             -drive file={file},format=raw,if=none,id=data,aio={aio} -device virtio-blk-device,drive=data"
        );
        subjects.push(qemu::at_shell(&format!("QEMU {aio}"), &arguments)?);
    }
    Ok(subjects)
}

/// The guest's name for the disk under test: the root disk is read-only.
fn writable_disk(machine: &mut Machine) -> Result<String> {
    let found = machine.shell("grep -l 0 /sys/block/vd?/ro")?;
    let name = found.trim().strip_prefix("/sys/block/").and_then(|rest| rest.strip_suffix("/ro"));
    Ok(format!("/dev/{}", name.with_context(|| format!("the guest has no writable disk: {found}"))?))
}

/// fio's answer for its one job.
fn parse(output: &str) -> Result<Value> {
    // There may be remarks before it.
    let json = output.find('{').map_or("", |at| &output[at..]);
    let mut all: Value =
        serde_json::from_str(json).with_context(|| format!("fio printed no JSON: {output}"))?;
    match all["jobs"][0].take() {
        Value::Null => bail!("fio ran no job: {output}"),
        job if job["error"] != 0 => bail!("fio failed with error {}", job["error"]),
        job => Ok(job),
    }
}

/// Adds up one of fio's figures for both directions; one of them is zero.
fn both(fio: &Value, path: &str) -> f64 {
    ["read", "write"].iter().filter_map(|way| fio.pointer(&format!("/{way}{path}"))?.as_f64()).sum()
}

fn requests(fio: &Value) -> Result<f64> {
    let requests = both(fio, "/total_ios");
    ensure!(requests > 0.0, "fio made no request: {fio}");
    Ok(requests)
}

/// IOPS, MiB/s, and percentiles of latency in microseconds.
fn speeds(fio: &Value, options: &Options) -> Result<Vec<f64>> {
    requests(fio).with_context(|| format!("in {} s", options.load.seconds))?;
    let latency = |percent: &str| both(fio, &format!("/lat_ns/percentile/{percent}.000000")) / 1e3;
    Ok(vec![both(fio, "/iops"), both(fio, "/bw_bytes") / 1_048_576.0, latency("50"), latency("99")])
}

/// Writes the whole file, so that there is no hole in it and all of it is in the page cache.
fn fill(path: &Path, mib: u64) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    let block: Vec<u8> =
        (0..1 << 20_u32).map(|at: u32| at.wrapping_mul(0x9e37_79b1).to_le_bytes()[3]).collect();
    for _ in 0..mib {
        file.write_all(&block)?;
    }
    // What is written back later would be measured.
    Ok(file.sync_all()?)
}

/// The type of the file system that has this directory.
fn file_system(dir: &Path) -> Result<String> {
    let dir = fs::canonicalize(dir)?;
    Ok(command::output(Command::new("stat").args(["-f", "-c", "%T"]).arg(dir))?.trim().to_owned())
}
