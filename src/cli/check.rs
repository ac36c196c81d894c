//! `vmm check`: what this host can do, and what to do about what it cannot.

mod probes;
mod report;

use clap::Args;
use clap::builder::PossibleValuesParser;

use crate::exit::ExitStatus;

/// Report what this host can do, and what to do about what it cannot
#[derive(Args)]
#[command(after_help = "Exit status: 0 if a guest can run, 1 if not.")]
pub struct CheckArgs {
    /// How to print the report
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    #[arg(value_parser = PossibleValuesParser::new(["text", "json"]))]
    format: String,
}

/// Runs the subcommand.
pub fn run(args: &CheckArgs) -> anyhow::Result<ExitStatus> {
    let report = probes::all();
    let text = match args.format.as_str() {
        "json" => report.json()?,
        _ => report.text(&report::Style::of_stdout()),
    };
    match (super::print(text.as_bytes())?, report.guest_can_run) {
        (ExitStatus::Success, false) => Ok(ExitStatus::Failure),
        (status, _) => Ok(status),
    }
}
