//! `vmm snapshot` and `vmm fork`: a machine with a name is saved, and others go on from there.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail, ensure};
use axum::http::Method;
use clap::{Args, Subcommand};
use clap_complete::ArgValueCandidates;
use serde_json::json;
use vmm_core::Snapshot;

use super::machines::{One, StateArgs};
use super::{completion, print};
use crate::exit::ExitStatus;
use crate::machines::{Machine, client, find_alive};

/// Save a machine with a name to a directory, or look at what was saved
///
/// The machine stands still for some milliseconds and goes on. An older snapshot in the directory is replaced, once the
/// new one is whole.
#[derive(Args, Clone, Debug)]
#[command(subcommand_negates_reqs = true, args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
pub struct SnapshotArgs {
    /// The machine's name, or what is unique of its beginning
    #[arg(required = true, add = ArgValueCandidates::new(completion::machines))]
    name: Option<String>,
    /// Directory of the snapshot
    #[arg(long, value_name = "DIR", required = true)]
    to: Option<PathBuf>,
    /// Save only what was written since the last snapshot, which stays needed; the machine runs with --track-dirty
    #[arg(long)]
    diff: bool,
    /// Kill the machine once it is saved
    #[arg(long)]
    stop: bool,
    #[command(flatten)]
    state: StateArgs,
    #[command(subcommand)]
    look: Option<LookCommand>,
}

#[derive(Subcommand, Clone, Debug)]
enum LookCommand {
    /// Explain a snapshot
    Inspect {
        /// Directory of the snapshot
        dir: PathBuf,
    },
}

const EXAMPLES: &str = "\
Examples:
  vmm snapshot web --to web.snapshot
  vmm snapshot web --to web.snapshot --stop
  vmm snapshot inspect web.snapshot";

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
    /// Remove all that is kept of a clone when it ends
    #[arg(long)]
    rm: bool,
}

/// Runs the subcommand `snapshot`.
pub fn run(args: &SnapshotArgs) -> anyhow::Result<ExitStatus> {
    match (&args.look, &args.name, &args.to) {
        (Some(LookCommand::Inspect { dir }), ..) => inspect(dir),
        (None, Some(name), Some(to)) => {
            let machine = find_alive(&args.state.open()?, name)?;
            save(&machine, to, if args.diff { "diff" } else { "full" })?;
            if args.stop {
                super::machines::stop(&machine, 0)?;
            }
            Ok(ExitStatus::Success)
        }
        // The parser asks for both.
        (None, ..) => bail!("name a machine and a directory: vmm snapshot NAME --to DIR"),
    }
}

fn save(machine: &Machine, to: &Path, kind: &str) -> anyhow::Result<()> {
    // The machine may run in another directory.
    let to = std::path::absolute(to)?;
    client::ask_for_long(
        machine,
        Method::PUT,
        "/vmm/v1/snapshot",
        Some(&json!({ "path": to, "kind": kind })),
    )?;
    Ok(())
}

/// Tells what is in a snapshot.
fn inspect(dir: &Path) -> anyhow::Result<ExitStatus> {
    let snapshot = Snapshot::open(dir)?;
    let sections = snapshot.sections().iter();
    let sections: Vec<_> =
        sections.map(|section| json!({ "name": section.name, "version": section.saved.version })).collect();
    let mut text = serde_json::to_vec_pretty(&json!({
        "manifest": snapshot.manifest(),
        "state": sections,
        "cpu_features": snapshot.cpu_features(),
    }))?;
    text.push(b'\n');
    print(&text)
}

/// Runs the subcommand `fork`.
pub fn fork(args: &ForkArgs) -> anyhow::Result<ExitStatus> {
    let machine = args.machine.find_alive()?;
    let state = args.machine.state();
    let taken: Vec<String> = state.open()?.list()?.into_iter().map(|machine| machine.name).collect();
    let dir = machine.path(&format!("fork-{}", std::process::id()));
    save(&machine, &dir, "clones")?;
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
