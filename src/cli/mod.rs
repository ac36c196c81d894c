//! The command line: one file for each subcommand.

mod api;
mod check;
mod completion;
mod detach;
mod device_flags;
mod fork;
mod host;
mod machines;
mod man;
mod restore;
mod run;
mod snapshot;
mod usage;

use std::ffi::OsString;
use std::fmt::Display;
use std::io::ErrorKind::BrokenPipe;
use std::io::Write;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Instant;

use clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use vmm_core::{BuildError, config::ConfigError};

pub use crate::exit::ExitStatus;
use crate::exit::{self, UsageError};
pub(crate) use run::root_disk;

/// A minimal hypervisor: a VM as small, as fast and as pleasant as a container, with a kernel of its own.
#[derive(Parser)]
#[command(name = "vmm", version, max_term_width = 110)]
#[command(after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{}", exit::COMMANDS_HELP))]
#[command(subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  vmm run                                     a shell in a guest of its own
  vmm run --kernel vmlinux --rootfs disk.img  your kernel and your root file system
  vmm check                                   what this host can do

'vmm run --help' lists the flags and the exit statuses.";

#[derive(Subcommand)]
enum Command {
    Run(Box<run::RunArgs>),
    Check(check::CheckArgs),
    Restore(Box<restore::RestoreArgs>),
    Snapshot(snapshot::SnapshotArgs),
    Fork(fork::ForkArgs),
    Api(api::ApiArgs),
    Completion(completion::CompletionArgs),
    Man(man::ManArgs),
    #[command(flatten)]
    Machine(machines::MachineCommand),
}

/// Runs the command. `start` is when the process began.
pub fn main(start: Instant) -> ExitStatus {
    let mut arguments = std::env::args_os();
    if arguments.next().is_some_and(|program| api::is_firecracker(program.as_ref())) {
        return finish(api::firecracker(start));
    }
    match completion::answer() {
        Ok(false) => {}
        answered => return finish(answered.map(|_| ExitStatus::Success)),
    }
    let result = match parse(&std::env::args_os().collect::<Vec<_>>()) {
        Ok(cli) => dispatch(cli.command, start),
        Err(error) if !error.use_stderr() || error.kind() == DisplayHelpOnMissingArgumentOrSubcommand => {
            // Help or version.
            match error.print().and_then(|()| std::io::stdout().flush()) {
                _ if error.use_stderr() => Ok(ExitStatus::Usage),
                Err(cause) if cause.kind() != BrokenPipe => Err(cannot_write(&cause)),
                // A reader that has seen enough is no error.
                _ => Ok(ExitStatus::Success),
            }
        }
        Err(error) => Err(usage::sentence(&error, &asked_for()).into()),
    };
    finish(result)
}

/// Reads the command line. The flags of all commands take longer to make than those of one to read: the others are made only
/// where they are needed, for help and for what is wrong.
fn parse(arguments: &[OsString]) -> Result<Cli, clap::Error> {
    let flags = match arguments.get(1).and_then(|name| name.to_str()) {
        Some("run") => Some(run::RunArgs::augment_args as fn(clap::Command) -> clap::Command),
        Some("restore") => Some(restore::RestoreArgs::augment_args as _),
        Some("api") => Some(api::ApiArgs::augment_args as _),
        _ => None,
    };
    let read = |command: clap::Command| {
        command.try_get_matches_from(arguments).and_then(|matches| Cli::from_arg_matches(&matches))
    };
    let alone = flags.zip(arguments.get(1)).map(|(flags, name)| {
        read(
            clap::Command::new("vmm")
                .subcommand(flags(clap::Command::new(name.to_string_lossy().into_owned()))),
        )
    });
    match alone {
        Some(Ok(cli)) => Ok(cli),
        _ => read(Cli::command()),
    }
}

/// Tells what went wrong, if something did.
fn finish(result: anyhow::Result<ExitStatus>) -> ExitStatus {
    result.unwrap_or_else(|error| {
        say(&sentence(&error));
        status_of(&error)
    })
}

/// The command that was asked for, as far as there is one.
fn asked_for() -> String {
    let (mut command, mut name) = (Cli::command(), "vmm".to_owned());
    for word in std::env::args_os().skip(1) {
        let Some(found) = command.find_subcommand(&word).cloned() else { break };
        command = found;
        name += &format!(" {}", command.get_name());
    }
    name
}

fn dispatch(command: Command, start: Instant) -> anyhow::Result<ExitStatus> {
    match command {
        Command::Run(args) => run::run(&args, start),
        Command::Restore(args) => restore::run(&args, start),
        Command::Snapshot(args) => snapshot::run(&args),
        Command::Fork(args) => fork::run(&args),
        Command::Api(args) => api::run(&args, start),
        Command::Check(args) => check::run(&args),
        Command::Completion(args) => completion::run(&args),
        Command::Man(args) => man::run(&args),
        Command::Machine(command) => machines::run(&command),
    }
}

/// A number in this range.
fn number<T: FromStr + PartialOrd + Display>(text: &str, range: RangeInclusive<T>) -> Result<T, String> {
    let number = text.parse().ok().filter(|number| range.contains(number));
    number.ok_or_else(|| format!("write a number from {} to {}", range.start(), range.end()))
}

/// The value of a key as it is written on a command line: a number or a truth value where it is one, and nothing for an
/// empty text.
fn value(text: &str) -> serde_json::Value {
    match text {
        "" => serde_json::Value::Null,
        text => text
            .parse::<u64>()
            .map(serde_json::Value::from)
            .or(text.parse::<bool>().map(serde_json::Value::from))
            .unwrap_or(text.into()),
    }
}

/// Whose fault an error is.
fn status_of(error: &anyhow::Error) -> ExitStatus {
    let config = |error: &anyhow::Error| {
        error.is::<ConfigError>() || matches!(error.downcast_ref(), Some(BuildError::Config(_)))
    };
    match error.is::<UsageError>() || config(error) {
        true => ExitStatus::Usage,
        false => ExitStatus::Failure,
    }
}

/// An error and its causes, as far as it does not name them itself, without error numbers.
fn sentence(error: &anyhow::Error) -> String {
    let sentence = error.chain().skip(1).fold(error.to_string(), |sentence, cause| {
        let cause = cause.to_string();
        if sentence.contains(&cause) { sentence } else { format!("{sentence}: {cause}") }
    });
    let mut parts = sentence.split(" (os error ");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| {
        text + part.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start_matches(')')
    })
}

/// Tells the operator something, on one line of standard error whatever is in it.
pub(crate) fn say(sentence: &str) {
    let line: String = sentence.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    // With standard error gone there is nobody to tell.
    _ = writeln!(crate::terminal::Stderr, "vmm: {line}");
}

/// Writes what a subcommand makes to standard output.
fn print(bytes: &[u8]) -> anyhow::Result<ExitStatus> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == BrokenPipe => Ok(ExitStatus::SIGPIPE),
        Err(error) => Err(cannot_write(&error)),
        Ok(()) => Ok(ExitStatus::Success),
    }
}

fn cannot_write(cause: &std::io::Error) -> anyhow::Error {
    anyhow::anyhow!("cannot write to standard output: {cause}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("{text}")]
        struct Outer {
            text: &'static str,
            source: std::fmt::Error,
        }
        let inner = std::fmt::Error.to_string();
        let told = |text| sentence(&Outer { text, source: std::fmt::Error }.into());
        assert_eq!(told("cannot read"), format!("cannot read: {inner}"));
        let text: &'static str = format!("no: {inner}; do").leak();
        assert_eq!(told(text), text);
        assert_eq!(told("no (os error 2); do (os error 13)").split(": ").next(), Some("no; do"));
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
