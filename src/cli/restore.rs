//! `vmm restore`: a machine goes on from its snapshot.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use serde_json::{Map, Value};
use vmm_core::config::{SerialConfig, split_command_line};
use vmm_core::devices::registry::DeviceConfig;
use vmm_core::snapshot::memory_file::MemoryMode;
use vmm_core::snapshot::{ClockMode, Hostname, MachineId, Persona};
use vmm_core::{Snapshot, Vm, VmBuilder, VmConfig};

use super::host::{HostArgs, Launch};
use super::run::named;
use crate::exit::{ExitStatus, UsageError};

/// Let a machine go on from its snapshot
///
/// The snapshot stays as it is, and any number of machines can go on from it at a time. They share its memory, and copy
/// the pages that they write.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct RestoreArgs {
    /// Directory of the snapshot
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Change what a device is on the host, such as disk1.path=FILE; repeat for more
    ///
    /// Devices and keys are those of the configuration in the snapshot's manifest. What the guest sees of a device must
    /// stay, but for its MAC address and CID. A disk with another path is used as it is, and not what was saved of it; a
    /// machine with a name has its vsock at vsock.sock in its own directory, if no other path is set.
    #[arg(long = "set", value_name = "DEVICE.KEY=VALUE", help_heading = "Machine")]
    changes: Vec<String>,

    /// How the guest gets its memory: map shares and copies on write, copy reads all of it first, uffd reads what the guest
    /// asks for and then the rest
    #[arg(long, value_name = "MODE", help_heading = "Machine", default_value = "map",
        value_parser = named::<MemoryMode>(&["map", "copy", "uffd"]))]
    memory_mode: MemoryMode,

    /// Clocks of the guest: advance by the time since the snapshot, or freeze
    #[arg(long, value_name = "MODE", help_heading = "Machine", default_value = "advance",
        value_parser = named::<ClockMode>(&["advance", "freeze"]))]
    clock: ClockMode,

    /// Give the guest another host name; its init must be vmm's
    #[arg(long, value_name = "NAME", help_heading = "Machine")]
    hostname: Option<Hostname>,

    /// Give the guest another machine id: 32 hexadecimal digits, or random; its init must be vmm's
    #[arg(long, value_name = "ID", help_heading = "Machine", value_parser = machine_id)]
    machine_id: Option<MachineId>,

    /// Restore even if this host lacks features of the processor that the guest has seen
    #[arg(long, help_heading = "Machine")]
    force: bool,

    /// Track what is written to RAM, for snapshots that are a difference to this one
    #[arg(long, help_heading = "Machine")]
    track_dirty: bool,

    /// Where the guest's console goes: stdio, null or file=PATH [default: as it was]
    #[arg(long, value_name = "WHERE", help_heading = "Console")]
    serial: Option<SerialConfig>,

    #[command(flatten)]
    host: HostArgs,
}

const EXAMPLES: &str = "\
Examples:
  vmm snapshot web --to web.snapshot
  vmm restore web.snapshot --name web2 --detach
  vmm restore web.snapshot --set disk1.path=copy.img --set net0.tap=tap1";

/// Runs the subcommand. `start` is when the process began.
pub fn run(args: &RestoreArgs, start: Instant) -> anyhow::Result<ExitStatus> {
    let logging = args.host.log()?;
    if args.host.belongs_in_background() {
        return args.host.go_to_background();
    }
    let directory = args.host.machine_directory()?;
    let builder = prepare(Snapshot::open(&args.dir)?, directory.as_deref(), &args.changes, |config| {
        config.track_dirty |= args.track_dirty;
        if let Some(serial) = &args.serial {
            config.serial = serial.clone();
        }
    })?;
    let persona =
        Persona { hostname: args.hostname.clone(), machine_id: args.machine_id, ..Persona::default() };
    let builder = builder
        .memory_mode(args.memory_mode)
        .clock_mode(args.clock)
        .persona(persona)
        .other_processor(args.force);
    let command = has_command(builder.config());
    args.host.run(Launch { builder, kept: (), command, logging, start })
}

/// Prepares to build the machine that was saved, with `changes` of its devices, and others. `directory`: the machine's own.
pub(super) fn prepare(
    mut snapshot: Snapshot,
    directory: Option<&Path>,
    changes: &[String],
    others: impl FnOnce(&mut VmConfig),
) -> anyhow::Result<VmBuilder> {
    let mut config = snapshot.config().clone();
    others(&mut config);
    if let Some(directory) = directory {
        own_sockets(&mut config, directory);
    }
    for change in changes {
        set(&mut config, change)?;
    }
    snapshot.set_config(config)?;
    Ok(Vm::restore(snapshot))
}

/// Whether the guest runs for the sake of one command, as after `vmm run -- COMMAND`.
pub(super) fn has_command(config: &VmConfig) -> bool {
    let lines = [&config.cmdline, &config.append].into_iter().flatten();
    lines.filter_map(|line| split_command_line(line).1).any(|words| !words.is_empty())
}

/// A machine with a name has sockets of its own in its directory, since its parent may still have those of the snapshot.
fn own_sockets(config: &mut VmConfig, directory: &Path) {
    for device in &mut config.devices {
        if let DeviceConfig::Vsock(vsock) = device {
            vsock.path = directory.join("vsock.sock");
        }
    }
}

fn machine_id(text: &str) -> Result<MachineId, String> {
    match text {
        "random" => MachineId::random().map_err(|error| error.to_string()),
        text => text.parse(),
    }
}

/// Changes a key of a device.
fn set(config: &mut VmConfig, change: &str) -> anyhow::Result<()> {
    let wrong = || UsageError(format!("'{change}' is no change of a device; write DEVICE.KEY=VALUE"));
    let (place, value) = change.split_once('=').ok_or_else(wrong)?;
    let (device, key) = place.split_once('.').ok_or_else(wrong)?;
    let names = config.device_names();
    let at = names.iter().position(|name| name == device).ok_or_else(|| {
        UsageError(format!("the snapshot has no device '{device}'; it has {}", names.join(", ")))
    })?;
    let mut keys: Map<String, Value> = match serde_json::to_value(&config.devices[at])? {
        Value::Object(keys) => keys,
        _ => Map::new(),
    };
    keys.insert(key.into(), super::value(value));
    config.devices[at] =
        serde_json::from_value(keys.into()).with_context(|| format!("cannot set {place} to '{value}'"))?;
    Ok(())
}
