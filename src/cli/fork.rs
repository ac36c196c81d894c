//! `vmm fork`: clones of a machine with a name, which goes on.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, ensure};
use clap::Args;

use super::machines::{One, StateArgs};
use super::print;
use super::snapshot::save;
use crate::exit::ExitStatus;

/// Start clones of a machine with a name, which goes on
///
/// They are named after it, with a number, run in the background, and share the memory that neither writes.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:\n  vmm fork web -n 10\n  vmm fork web --set net0.tap=tap{}")]
pub struct ForkArgs {
    #[command(flatten)]
    machine: One,
    /// Number of clones
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    n: u32,
    /// Change what a device of the clones is on the host; {} stands for the clone's number
    #[arg(long = "set", value_name = "DEVICE.KEY=VALUE")]
    changes: Vec<String>,
    /// Leave out the disks, which --set then has to provide as they were
    #[arg(long)]
    no_disks: bool,
    /// Remove all that is kept of a clone when it ends
    #[arg(long)]
    rm: bool,
}

/// Runs the subcommand.
pub fn run(args: &ForkArgs) -> anyhow::Result<ExitStatus> {
    let machine = args.machine.find_alive()?;
    let state = args.machine.state();
    let taken: Vec<String> = state.open()?.list()?.into_iter().map(|machine| machine.name).collect();
    let dir = machine.path(&format!("fork-{}", std::process::id()));
    save(&machine, &dir, "clones", !args.no_disks)?;
    let numbers = (1..).map(|number| (number, format!("{}-{number}", machine.name)));
    let free = numbers.filter(|(_, name)| !taken.contains(name)).take(args.n as usize);
    let clones: Vec<_> = free.map(|(number, name)| (start(args, state, &dir, number, &name), name)).collect();
    let (mut running, mut failed) = (String::new(), 0);
    for (clone, name) in clones {
        // It has said itself what is wrong.
        match clone.and_then(|mut clone| Ok(clone.wait()?.success())) {
            Ok(true) => running += &format!("{name}\n"),
            Ok(false) => failed += 1,
            Err(error) => return Err(error.context(format!("cannot start {name}"))),
        }
    }
    // What a clone needs of the snapshot, it has open.
    std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove '{}'", dir.display()))?;
    let printed = print(running.as_bytes())?;
    ensure!(failed == 0, "{failed} of {} clones did not start", args.n);
    Ok(printed)
}

fn start(args: &ForkArgs, state: &StateArgs, dir: &Path, number: u32, name: &str) -> anyhow::Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.args(["restore", "--detach", "--name", name]);
    for change in &args.changes {
        command.arg("--set").arg(change.replace("{}", &number.to_string()));
    }
    if args.rm {
        command.arg("--rm");
    }
    state.pass_on(&mut command);
    // A clone that was started prints its name, which is printed here for all of them.
    Ok(command.arg(dir).stdin(Stdio::null()).stdout(Stdio::null()).spawn()?)
}
