//! What a machine costs in memory besides the guest's own, and how large the binary is.

use std::io::Read;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use harness::{Kernel, binaries, local_kvm};

use super::measure::{Subject, median};
use super::qemu;
use super::table::Table;

const RAM_KIB: u64 = 128 << 10;
/// What every guest is told, before and after what says where its devices are.
const COMMAND_LINE: [&str; 2] = ["console=ttyS0 quiet reboot=t panic=-1 root=/dev/vda ro", "-- sleep 1000"];

/// Resident memory of one process in KiB, guest RAM left out.
#[derive(Clone, Copy, Debug, Default)]
struct Resident {
    anonymous: u64,
    file: u64,
}

/// One mapping of a process: its range, and KiB of it.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    start: u64,
    end: u64,
    rss: u64,
    anonymous: u64,
}

impl Resident {
    /// Adds up the mappings of `pid`. Guest RAM is the one run of adjacent mappings that is at least as large; advice
    /// on a part of it splits it up.
    fn of(pid: u32) -> Result<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        let mut mappings: Vec<Mapping> = Vec::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let address = |text: &str| u64::from_str_radix(text, 16).ok();
            if let Some((Some(start), Some(end))) =
                words[0].split_once('-').map(|(start, end)| (address(start), address(end)))
            {
                mappings.push(Mapping { start, end, rss: 0, anonymous: 0 });
            } else if let (Some(mapping), [name, kib, "kB"]) = (mappings.last_mut(), &words[..]) {
                match *name {
                    "Rss:" => mapping.rss = kib.parse()?,
                    "Anonymous:" => mapping.anonymous = kib.parse()?,
                    _ => {}
                }
            }
        }
        let mut all = Self::default();
        for run in mappings.chunk_by(|a, b| a.end == b.start) {
            let size: u64 = run.iter().map(|mapping| mapping.end - mapping.start).sum();
            for mapping in run.iter().filter(|_| size >> 10 < RAM_KIB) {
                all.anonymous += mapping.anonymous;
                all.file += mapping.rss - mapping.anonymous;
            }
        }
        Ok(all)
    }
}

/// Measures `runs` machines of each program, one after the other.
pub fn run(runs: usize) -> Result<Table> {
    let acceleration = local_kvm().context("there is no /dev/kvm here that we may use")?;
    let kernel = Kernel::ours(acceleration).file()?.display().to_string();
    let disk = harness::demo_image()?.display().to_string();
    let vmm = binaries::release()?;
    let arguments =
        format!("run --memory 128M -q --no-balloon --kernel {kernel} --rootfs {disk},ro --cmdline");
    let ours = Subject::new("vmm", &vmm.display().to_string(), &arguments).arg(COMMAND_LINE.join(" "));
    let arguments = format!(
        "-kernel {kernel} -drive file={disk},format=raw,readonly=on,if=none,id=root -device \
         virtio-blk-device,drive=root -object rng-random,id=r,filename=/dev/urandom -device virtio-rng-device,rng=r -append"
    );
    let [before, after] = COMMAND_LINE;
    let theirs = qemu::microvm("QEMU microvm", true, qemu::WITHOUT_ACPI, &arguments)?;
    let theirs = qemu::with_serial_on_stdout(theirs).arg(format!("{before} {} {after}", qemu::TWO_DEVICES));
    let mut table = Table::new(
        format!("memory: resident besides 128 MiB of guest RAM, 1 vCPU, init runs, medians of {runs}"),
        ["anonymous KiB", "file KiB", "all KiB"],
    );
    for subject in [ours, theirs] {
        let sizes = (0..runs).map(|_| resident(&subject)).collect::<Result<Vec<_>>>()?;
        let middle = |value: fn(&Resident) -> u64| median(sizes.iter().map(value)).unwrap_or(0) as f64;
        table.row(
            &subject.name,
            &[middle(|r| r.anonymous), middle(|r| r.file), middle(|r| r.anonymous + r.file)],
        );
    }
    table.notes.push(format!("binary: {} KiB, static and stripped", std::fs::metadata(&vmm)?.len() >> 10));
    Ok(table)
}

/// Starts a machine, waits until its init says that it runs, and looks.
fn resident(subject: &Subject) -> Result<Resident> {
    let mut child = subject.command().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let seen = wait_for_init(&mut child).and_then(|()| {
        // What init does right after its message belongs to the start.
        std::thread::sleep(Duration::from_millis(200));
        Resident::of(child.id())
    });
    child.kill()?;
    child.wait()?;
    seen
}

fn wait_for_init(child: &mut Child) -> Result<()> {
    const DEADLINE: Duration = Duration::from_secs(60);
    let began = Instant::now();
    let mut output = child.stdout.take().context("standard output is a pipe")?;
    let (mut text, mut buf) = (Vec::new(), [0; 4096]);
    while !text.windows(10).any(|window| window == b"user space") {
        let n = output.read(&mut buf)?;
        if n == 0 || began.elapsed() > DEADLINE {
            bail!("the guest did not reach its init: {}", String::from_utf8_lossy(&text));
        }
        text.extend_from_slice(&buf[..n]);
    }
    // Whatever comes later is not read; it is little, and the pipe stays open.
    child.stdout = Some(output);
    Ok(())
}
