//! The device flags, one for each kind in the registry: none is named here.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, Error, FromArgMatches};
use vmm_core::devices::registry::{DeviceConfig, KINDS, Kind};

/// What the device flags say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeviceFlags {
    /// Devices asked for, in the order of the flags.
    pub added: Vec<DeviceConfig>,
    /// Kinds of which there shall be none.
    pub removed: Vec<&'static str>,
}

/// The flag that leaves a kind out.
fn without(kind: &Kind) -> String {
    format!("no-{}", kind.name)
}

fn flag(kind: &'static Kind) -> Arg {
    let arg = Arg::new(kind.name).long(kind.name).help_heading("Devices");
    let arg = arg
        .action(ArgAction::Append)
        .value_name(kind.syntax)
        .value_parser(|text: &str| (kind.parse)(text).map_err(|error| error.to_string()));
    match kind.on_by_default {
        // Such a kind works with nothing chosen.
        true => arg.num_args(0..=1).default_missing_value("").help(format!("{} (on by default)", kind.help)),
        false if kind.single => arg.help(kind.help),
        false => arg.help(format!("{}; repeatable", kind.help)),
    }
}

impl Args for DeviceFlags {
    fn augment_args(mut command: Command) -> Command {
        for kind in KINDS {
            command = command.arg(flag(kind));
            if kind.on_by_default {
                let no = Arg::new(without(kind)).long(without(kind)).help_heading("Devices");
                let no = no.action(ArgAction::SetTrue).conflicts_with(kind.name);
                command = command.arg(no.help(format!("Leave the {} device out", kind.name)));
            }
        }
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for DeviceFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let mut added = Vec::new();
        let mut removed = Vec::new();
        for kind in KINDS {
            if kind.on_by_default && matches.get_flag(&without(kind)) {
                removed.push(kind.name);
            }
            let values = matches.get_many::<DeviceConfig>(kind.name).into_iter().flatten();
            let indices = matches.indices_of(kind.name).into_iter().flatten();
            added.extend(indices.zip(values.cloned()));
        }
        added.sort_by_key(|(index, _)| *index);
        Ok(Self { added: added.into_iter().map(|(_, config)| config).collect(), removed })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
