//! How much of the memory that a guest frees comes back to the host by itself, and when: free-page reporting, on our machine
//! and on QEMU's.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::{Kernel, local_kvm, tools_image};

use super::load::Options;
use super::machine::Machine;
use super::measure::Subject;
use super::qemu;
use super::table::Table;

/// MiB that the guest takes and frees.
const TAKEN: u64 = 200;
/// What is not back by then counts as not given back.
const PATIENCE: Duration = Duration::from_secs(15);
/// No more comes when nothing has come for so long.
const QUIET: Duration = Duration::from_secs(5);

const COLUMNS: [&str; 7] =
    ["taken MiB", "back MiB", "s to first", "s to 90%", "s to last", "VMM ms", "vCPU ms"];

/// Measures.
pub fn run(options: &Options) -> Result<Table> {
    options.jobs(&["reporting"], |name| name)?;
    let acceleration = local_kvm().context("there is no /dev/kvm here that we may use")?;
    let kernel = Kernel::ours(acceleration).file()?.display().to_string();
    let root = tools_image()?.display().to_string();
    let mut subjects = options
        .ours(|more| format!("run --memory 512M -q --kernel {kernel} --rootfs {root},ro {more} -- sh"))?;
    let arguments = format!(
        "-m 512 -kernel {kernel} \
         -drive file={root},format=raw,readonly=on,if=none,id=root -device virtio-blk-device,drive=root \
         -device virtio-balloon-device,free-page-reporting=on"
    );
    subjects.push(qemu::at_shell("QEMU", &arguments)?);
    subjects.retain(|subject| options.has_machine(&subject.name));
    let mut table = Table::new(
        format!(
            "balloon: free-page reporting; a guest of 1 vCPU, 512 MiB fills {TAKEN} MiB and frees them; medians of {} runs",
            options.runs
        ),
        COLUMNS,
    );
    let machines: Vec<&str> = subjects.iter().map(|subject| subject.name.as_str()).collect();
    options.measure(&mut table, &["reporting"], &machines, |at| Ok(vec![turn(&subjects[at])?]))?;
    table.notes.push("resident memory of the VMM's process; seconds since the guest has freed its memory, until the first MiB, 90 % of what comes back, and the last MiB were there".into());
    table
        .notes
        .push("VMM, vCPU ms: processor time from the guest's freeing until the last MiB was back".into());
    Ok(table)
}

/// One guest that frees its memory.
fn turn(subject: &Subject) -> Result<Vec<f64>> {
    let mut machine = Machine::boot(subject, None)?;
    let before = machine.resident()?;
    machine.shell(&format!("dd if=/dev/zero bs=1M count={TAKEN} 2>/dev/null | tr '\\0' x >/tmp/fill"))?;
    let full = machine.resident()?;
    ensure!(full > before, "{} does not grow when its guest takes memory", subject.name);
    let used = machine.usage()?;
    machine.shell("rm /tmp/fill")?;
    let began = Instant::now();
    // What was back when, and what had been used by then.
    let mut seen = vec![(Duration::ZERO, 0, machine.usage()?.since(&used))];
    let mut last = Duration::ZERO;
    while began.elapsed() < PATIENCE && (last.is_zero() || began.elapsed() < last + QUIET) {
        std::thread::sleep(Duration::from_millis(10));
        let back = full.saturating_sub(machine.resident()?) >> 20;
        if seen.last().is_some_and(|&(_, most, _)| back > most) {
            last = began.elapsed();
            seen.push((last, back, machine.usage()?.since(&used)));
        }
    }
    machine.end()?;
    let (_, most, usage) = seen.last().context("a beginning")?;
    let reached = |share: f64| {
        let at = seen.iter().find(|(_, back, _)| *back > 0 && *back as f64 >= share * *most as f64);
        at.map_or(f64::NAN, |(at, ..)| at.as_secs_f64())
    };
    let mib = |bytes: u64| (bytes >> 20) as f64;
    let millis = |time: Duration| time.as_secs_f64() * 1e3;
    Ok(vec![
        mib(full - before),
        *most as f64,
        reached(0.0),
        reached(0.9),
        reached(1.0),
        millis(usage.others),
        millis(usage.vcpus),
    ])
}
