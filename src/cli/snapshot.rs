//! `vmm snapshot`: a machine with a name is saved to a directory, and what was saved is looked at.

use std::path::{Path, PathBuf};

use anyhow::bail;
use axum::http::Method;
use clap::{Args, Subcommand};
use clap_complete::ArgValueCandidates;
use serde_json::json;
use vmm_core::Snapshot;

use super::machines::StateArgs;
use super::{completion, print};
use crate::exit::ExitStatus;
use crate::machines::{Machine, client, find_alive};

/// Save a machine with a name to a directory, or look at what was saved
///
/// The machine stands still for some milliseconds, or as long as it takes to copy the disks that it can write, and goes
/// on. An older snapshot in the directory is replaced, once the
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
    /// Leave out the disks, which whoever restores the machine then has to provide as they were
    #[arg(long)]
    no_disks: bool,
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

/// Runs the subcommand `snapshot`.
pub fn run(args: &SnapshotArgs) -> anyhow::Result<ExitStatus> {
    match (&args.look, &args.name, &args.to) {
        (Some(LookCommand::Inspect { dir }), ..) => inspect(dir),
        (None, Some(name), Some(to)) => {
            let machine = find_alive(&args.state.open()?, name)?;
            save(&machine, to, if args.diff { "diff" } else { "full" }, !args.no_disks)?;
            if args.stop {
                super::machines::stop(&machine, 0)?;
            }
            Ok(ExitStatus::Success)
        }
        // The parser asks for both.
        (None, ..) => bail!("name a machine and a directory: vmm snapshot NAME --to DIR"),
    }
}

/// Lets the machine save itself; `kind` is as the API has it.
pub(super) fn save(machine: &Machine, to: &Path, kind: &str, disks: bool) -> anyhow::Result<()> {
    // The machine may run in another directory.
    let to = std::path::absolute(to)?;
    client::ask_for_long(
        machine,
        Method::PUT,
        "/vmm/v1/snapshot",
        Some(&json!({ "path": to, "kind": kind, "disks": disks })),
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
