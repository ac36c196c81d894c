//! A guest, a snapshot of it, and clones that go on where it was.
//!
//! `cargo run -p vmm-core --example clones -- CONFIG DIR [COUNT]`: the machine is in a JSON file. It runs for a second, is
//! saved in DIR, and ends; each clone then runs for a second. What a machine prints is printed with its number.

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Duration;
use std::{env, fs, thread};

use vmm_core::{Snapshot, SnapshotKind, Vm, VmConfig};

/// How long each machine runs.
const TURN: Duration = Duration::from_secs(1);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [config, dir, rest @ ..] = &arguments[..] else {
        return Err("usage: clones CONFIG DIR [COUNT]".into());
    };
    let count = rest.first().map_or(Ok(1), |count| count.parse())?;
    let config: VmConfig = serde_json::from_slice(&fs::read(config)?)?;

    let parent = Vm::builder(config).build()?;
    show(&parent, 0);
    parent.start()?;
    thread::sleep(TURN);
    let report = parent.snapshot(Path::new(dir), SnapshotKind::Full)?;
    println!("stood still for {:?}, {} KiB of memory", report.paused, report.memory_bytes >> 10);
    drop(parent);

    let clone = |number| -> Result<Vm, Box<dyn Error>> {
        let vm = Vm::restore(Snapshot::open(Path::new(dir))?).build()?;
        show(&vm, number);
        vm.resume()?;
        Ok(vm)
    };
    let clones = (1..=count).map(clone).collect::<Result<Vec<_>, _>>()?;
    thread::sleep(TURN);
    for (number, vm) in (1..).zip(clones) {
        println!(
            "{number}: {} after {} exits",
            vm.state().name(),
            vm.exits()[0].iter().map(|exit| exit.count).sum::<u64>()
        );
    }
    Ok(())
}

/// Prints the lines of a machine's console.
fn show(vm: &Vm, number: usize) {
    let console = vm.take_console().map(BufReader::new);
    thread::spawn(move || {
        let lines = console.into_iter().flat_map(BufRead::lines).map_while(Result::ok);
        lines.for_each(|line| println!("{number}: {line}"));
    });
}
