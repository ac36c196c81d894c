//! `vmm snapshot`: a machine with a name is saved to a directory, and what was saved is looked at, merged and packed.

mod diff;
mod inspect;
mod pack;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{anyhow, bail};
use axum::http::Method;
use clap::{Args, Subcommand};
use clap_complete::ArgValueCandidates;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::json;
use vmm_core::Snapshot;

use super::completion;
use super::machines::{Format, StateArgs};
use crate::exit::ExitStatus;
use crate::machines::{Machine, client, find_alive};
use crate::signals::{Cut, Ends};

/// The calls that save a machine, and that do not any more.
const PATH: &str = "/vmm/v1/snapshot";
const CANCEL: &str = "/vmm/v1/snapshot/cancel";

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
    saved: Option<SavedCommand>,
}

/// What can be done with snapshots that are there.
#[derive(Subcommand, Clone, Debug)]
enum SavedCommand {
    /// Explain a snapshot
    #[command(
        after_help = "Examples:\n  vmm snapshot inspect web.snapshot\n  vmm snapshot inspect web.snapshot --verify"
    )]
    Inspect {
        /// Directory of the snapshot
        dir: PathBuf,
        /// The form of what is printed
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
        /// Read all of it and of the snapshots that it is a difference to, look for its disks, and say all that is wrong
        #[arg(long)]
        verify: bool,
    },
    /// Tell what differs between two snapshots
    #[command(after_help = "Examples:\n  vmm snapshot diff monday.snapshot tuesday.snapshot")]
    Diff {
        /// Directory of a snapshot
        from: PathBuf,
        /// Directory of another one
        to: PathBuf,
        /// The form of what is printed
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Make one full snapshot of a diff and what it is a difference to
    ///
    /// The new one has an id of its own. The old ones stay as they are: diffs that were made to them need them.
    #[command(after_help = "Examples:\n  vmm snapshot merge tuesday.snapshot --to all.snapshot")]
    Merge {
        /// Directory of the snapshot
        dir: PathBuf,
        /// Directory of the new one
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
    },
    /// Write a snapshot into one compressed file, for transport
    ///
    /// A diff is merged with what it is a difference to on the way; any other snapshot stays the same.
    #[command(
        after_help = "Examples:\n  vmm snapshot pack web.snapshot --to web.vmmsnap\n  vmm snapshot pack web.snapshot --to - | ssh host vmm snapshot unpack - --to web.snapshot"
    )]
    Pack {
        /// Directory of the snapshot
        dir: PathBuf,
        /// The file, which must not be there yet; - is standard output
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
    },
    /// Make a snapshot of a packed one
    ///
    /// Whoever made it chose which files of this host a machine that goes on from it opens: look at it with vmm snapshot
    /// inspect before you restore what is not your own.
    #[command(after_help = "Examples:\n  vmm snapshot unpack web.vmmsnap --to web.snapshot")]
    Unpack {
        /// The packed snapshot; - is standard input
        file: PathBuf,
        /// Directory of the snapshot
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
    },
}

const EXAMPLES: &str = "\
Examples:
  vmm snapshot web --to web.snapshot
  vmm snapshot web --to web.snapshot --stop
  vmm snapshot inspect web.snapshot
  vmm snapshot pack web.snapshot --to web.vmmsnap";

/// Runs the subcommand `snapshot`.
pub fn run(args: &SnapshotArgs) -> anyhow::Result<ExitStatus> {
    match (&args.saved, &args.name, &args.to) {
        (Some(command), ..) => command.run(),
        (None, Some(name), Some(to)) => {
            let machine = find_alive(&args.state.open()?, name)?;
            let kind = if args.diff { "diff" } else { "full" };
            let how = Saving { kind, disks: !args.no_disks, stop: args.stop };
            Ends::until_cut(|signals| {
                save(&machine, to, how, signals)?;
                Ok(ExitStatus::Success)
            })
        }
        // The parser asks for both.
        (None, ..) => bail!("name a machine and a directory: vmm snapshot NAME --to DIR"),
    }
}

/// How a machine is saved, in the API's words.
#[derive(Clone, Copy, Debug)]
pub(super) struct Saving {
    pub kind: &'static str,
    pub disks: bool,
    pub stop: bool,
}

/// Lets the machine save itself, and end with that if it shall stop. A signal cancels it. Afterwards there are no more threads
/// than before.
pub(super) fn save(machine: &Machine, to: &Path, how: Saving, signals: &Ends) -> anyhow::Result<()> {
    let Saving { kind, disks, stop } = how;
    // The machine may run in another directory.
    let to = std::path::absolute(to)?;
    let watch = machine.watch()?;
    let body = json!({ "path": to, "kind": kind, "disks": disks, "stop": stop });
    let (done, end) = pipe_with(PipeFlags::CLOEXEC)?;
    let asked = thread::scope(|scope| {
        let saver = thread::Builder::new().name("snapshot".into()).spawn_scoped(scope, || {
            let _until_it_returns = end;
            client::ask_for_long(machine, Method::PUT, PATH, Some(&body))
        })?;
        let waited = signals.wait_for(&done);
        if waited.is_err() {
            cancel(machine, &to, &done);
            // Who asks twice does not wait for it.
            signals.wait_for(&done).unwrap_or_else(Cut::die);
        }
        let asked =
            saver.join().map_err(|_| anyhow!("a bug: the thread that asks for the snapshot panicked"))?;
        if waited.is_err() && asked.is_ok() {
            super::say(&format!("'{}' was whole already", to.display()));
        }
        waited?;
        asked
    });
    asked?;
    if stop {
        watch.wait(None);
    }
    Ok(())
}

/// Cancels the snapshot to `to`, once it has begun and until it is `done`.
fn cancel(machine: &Machine, to: &Path, done: &OwnedFd) {
    let body = json!({ "path": to });
    let is_done = || {
        let moment = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        poll(&mut [PollFd::new(done, PollFlags::IN)], Some(&moment)).is_ok_and(|ready| ready > 0)
    };
    while client::ask(machine, Method::PUT, CANCEL, Some(&body)).is_err() && !is_done() {}
}

impl SavedCommand {
    fn run(&self) -> anyhow::Result<ExitStatus> {
        match self {
            Self::Inspect { dir, format, verify } => inspect::run(dir, *format, *verify),
            Self::Diff { from, to, format } => diff::run(from, to, *format),
            Self::Merge { dir, to } => {
                let merged = Snapshot::open(dir)?.merge_to(to)?;
                super::print(format!("{}\n", merged.id).as_bytes())
            }
            Self::Pack { dir, to } => pack::pack(dir, to),
            Self::Unpack { file, to } => pack::unpack(file, to),
        }
    }
}

/// A text of a snapshot, which may come from anywhere, without what a terminal takes as a command.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
