//! How long a Linux guest takes: process start, init, reboot, process end.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::{Kernel, binaries, local_kvm};

use super::measure::{Subject, interleave, median};
use super::qemu;
use super::table::Table;

/// What every guest is told, before and after what says where its devices are.
const COMMAND_LINE: [&str; 2] = ["console=ttyS0 quiet reboot=t panic=-1 root=/dev/vda ro", "-- reboot -f"];

/// Measures `runs` boots of each program, with the same kernel and the same disk.
pub fn run(runs: usize) -> Result<Table> {
    let acceleration = local_kvm().context("there is no /dev/kvm here that we may use")?;
    let kernel = Kernel::ours(acceleration).file()?.display().to_string();
    let disk = harness::demo_image()?.display().to_string();
    let vmm = binaries::release()?.display().to_string();
    let ours = |name: &str, more: &str| {
        let arguments = format!(
            "run --memory 128M -q --no-balloon --kernel {kernel} --rootfs {disk},ro --cmdline {more}"
        );
        Subject::new(name, &vmm, arguments.trim_end()).arg(COMMAND_LINE.join(" "))
    };
    let drive = format!(
        "-drive file={disk},format=raw,readonly=on,if=none,id=root -device virtio-blk-device,drive=root"
    );
    let rng = "-object rng-random,id=r,filename=/dev/urandom -device virtio-rng-device,rng=r";
    let theirs = |name: &str, machine: &str, devices: &str| -> Result<Subject> {
        let arguments = format!("-kernel {kernel} {drive} {rng} -append");
        let [before, after] = COMMAND_LINE;
        Ok(qemu::microvm(name, true, machine, &arguments)?.arg(format!("{before} {devices} {after}")))
    };
    let subjects = [
        ours("vmm", ""),
        theirs("QEMU microvm", qemu::WITHOUT_ACPI, qemu::TWO_DEVICES)?,
        theirs("QEMU microvm with ACPI", qemu::WITH_ACPI, "")?,
    ];
    for subject in &subjects {
        let output =
            qemu::with_serial_on_stdout(subject.clone()).command().stdout(Stdio::piped()).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(text.contains("user space reached"), "{} does not boot: {text}", subject.name);
    }
    let costs = interleave(&subjects, runs)?;
    let title =
        format!("boot: process start, init, guest reboot, process end; 1 vCPU, 128 MiB, medians of {runs}");
    let mut table = Table::of_processes(title, &subjects, &costs);
    table.notes.extend(phases(&subjects[0], runs)?);
    Ok(table)
}

/// Where the time of our boot goes, as `--timings` tells it.
fn phases(subject: &Subject, runs: usize) -> Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    let mut times: Vec<Vec<u64>> = Vec::new();
    for _ in 0..runs {
        let output = subject.command().arg("--timings").stderr(Stdio::piped()).output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        // Lines of the form `MILLISECONDS ms  NAME`.
        let lines = text.lines().filter_map(|line| {
            let (time, name) = line.trim().split_once(" ms  ")?;
            Some((name.trim().to_owned(), (time.trim().parse::<f64>().ok()? * 1e3) as u64))
        });
        for (name, micros) in lines {
            let at = names.iter().position(|have| *have == name).unwrap_or_else(|| {
                names.push(name);
                times.push(Vec::new());
                names.len() - 1
            });
            times[at].push(micros);
        }
    }
    let medians = times.into_iter().map(|times| median(times).unwrap_or(0));
    Ok(names
        .iter()
        .zip(medians)
        .map(|(name, micros)| {
            format!("{name} after {:.1} ms", Duration::from_micros(micros).as_secs_f64() * 1e3)
        })
        .collect())
}
