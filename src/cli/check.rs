//! `vmm check`: what this host can do.

use clap::Args;

use crate::exit::ExitStatus;

/// Report what this host can do, and what to do about what it cannot
#[derive(Args)]
pub struct CheckArgs {}

/// Runs the subcommand.
pub fn run(_args: &CheckArgs) -> anyhow::Result<ExitStatus> {
    Ok(ExitStatus::Success)
}
