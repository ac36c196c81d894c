//! `vmm fork`: clones of a machine with a name, which goes on.
//!
//! The snapshot is opened and checked once, by a process that has one thread; each clone is a child of that, which shares
//! what it has read and makes a machine of its own: see docs/adr/0007-clones-are-forked.md.

mod children;

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use vmm_core::snapshot::{Hostname, MachineId, Persona};
use vmm_core::{Snapshot, VmBuilder};

use super::host::{HostArgs, Launch};
use super::machines::One;
use super::snapshot::{Saving, save};
use super::{number, print, restore};
use crate::exit::{ExitStatus, UsageError};
use crate::machines::Machine;
use crate::signals::Ends;
use children::{Answers, Children};

/// How the names begin of directories for the snapshots of forks.
const DIR: &str = "fork-";

/// Start clones of a machine with a name, which goes on
///
/// They are named after it, with a number, run in the background, and share the memory that neither writes.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct ForkArgs {
    #[command(flatten)]
    machine: One,
    /// Number of clones
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = |text: &str| number(text, 1..=1000_u32))]
    n: u32,
    /// Change what a device of the clones is on the host; {} stands for the clone's number
    #[arg(long = "set", value_name = "DEVICE.KEY=VALUE")]
    changes: Vec<String>,
    /// Give the clones host names, in which {} stands for the clone's number; their init must be vmm's
    #[arg(long, value_name = "NAME", value_parser = |text: &str| hostname(text, u32::MAX).map(|_| text.to_owned()))]
    hostname: Option<String>,
    /// Give each clone a machine id of its own; their init must be vmm's
    #[arg(long)]
    machine_ids: bool,
    /// Leave out the disks, which --set then has to provide as they were
    #[arg(long)]
    no_disks: bool,
    /// Remove all that is kept of a clone when it ends
    #[arg(long)]
    rm: bool,
}

const EXAMPLES: &str = "\
Examples:
  vmm fork web -n 10
  vmm fork web -n 10 --hostname web-{} --machine-ids
  vmm fork web --set net0.tap=tap{}";

/// Runs the subcommand.
pub fn run(args: &ForkArgs) -> anyhow::Result<ExitStatus> {
    Ends::until_cut(|signals| fork(args, signals))
}

fn fork(args: &ForkArgs, signals: &Ends) -> anyhow::Result<ExitStatus> {
    let clones = HostArgs::of_clones(args.machine.state(), args.rm);
    let logging = clones.log()?;
    let machine = args.machine.find_alive()?;
    let state = args.machine.state().open()?;
    let dir = ForkDir::make(&machine)?;
    let snapshot = dir.take(&machine, !args.no_disks, signals)?;
    // What is wrong with one is wrong with all.
    args.clone_of(&snapshot, &machine.path("clone"), 1)?;
    let mut children = Children::of(state.clone());
    let mut number = 0;
    for _ in 0..args.n {
        let registered;
        (number, registered) = state.register_next(&machine.name, number + 1)?;
        children.start(registered, |registered, start| {
            let builder = args.clone_of(&snapshot, &registered.machine().path(""), number)?;
            let command = restore::has_command(builder.config());
            let launch = Launch { builder, kept: (), command, logging: logging.clone(), start };
            clones.run_as(|| Ok(Some(registered)), launch)
        })?;
        signals.look()?;
    }
    let Answers { running, failed } = children.wait(signals)?;
    let names: String = running.iter().map(|name| format!("{name}\n")).collect();
    let printed = print(names.as_bytes())?;
    match failed.first() {
        Some((name, why)) => bail!("{} of {} clones did not start; {name}: {why}", failed.len(), args.n),
        None => Ok(printed),
    }
}

impl ForkArgs {
    /// The clone with this number, and this directory.
    fn clone_of(&self, snapshot: &Snapshot, directory: &Path, number: u32) -> anyhow::Result<VmBuilder> {
        let changes: Vec<String> = self.changes.iter().map(|change| numbered(change, number)).collect();
        let hostname = self.hostname.as_ref().map(|name| hostname(name, number)).transpose();
        let machine_id = self.machine_ids.then(MachineId::random).transpose()?;
        let persona = Persona { hostname: hostname.map_err(UsageError)?, machine_id, ..Persona::default() };
        Ok(restore::prepare(snapshot.clone(), Some(directory), &changes, |_| ())?.persona(persona))
    }
}

/// What `text` is for the clone with this number.
fn numbered(text: &str, number: u32) -> String {
    text.replace("{}", &number.to_string())
}

fn hostname(text: &str, number: u32) -> Result<Hostname, String> {
    numbered(text, number).parse()
}

/// A directory in a machine's own for the snapshot of a fork, which goes with this value: what clones need of it, they have
/// open.
struct ForkDir(PathBuf);

impl ForkDir {
    fn make(machine: &Machine) -> anyhow::Result<Self> {
        remove_left(machine);
        let path = machine.path(&format!("{DIR}{}", std::process::id()));
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.with_context(|| format!("cannot make '{}'", path.display()))?;
        Ok(Self(path))
    }

    /// Takes a snapshot of the machine.
    fn take(&self, machine: &Machine, disks: bool, signals: &Ends) -> anyhow::Result<Snapshot> {
        let place = self.0.join("snapshot");
        save(machine, &place, Saving { kind: "clones", disks, stop: false }, signals)?;
        Ok(Snapshot::open(&place)?)
    }
}

impl Drop for ForkDir {
    fn drop(&mut self) {
        _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes what forks of the machine have left that were killed.
fn remove_left(machine: &Machine) {
    let Ok(entries) = fs::read_dir(machine.path("")) else { return };
    let is_left = |entry: &fs::DirEntry| {
        let name = entry.file_name().into_string().unwrap_or_default();
        let number = name.strip_prefix(DIR).and_then(|number| number.parse().ok());
        number.and_then(Pid::from_raw).is_some_and(|pid| test_kill_process(pid) == Err(Errno::SRCH))
    };
    entries.flatten().filter(is_left).for_each(|entry| _ = fs::remove_dir_all(entry.path()));
}
