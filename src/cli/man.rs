//! `vmm man`: manual pages, made from the command line's own description.

use clap::{Args, CommandFactory};
use clap_mangen::Man;

use crate::exit::{ExitStatus, UsageError};

/// Print a manual page
#[derive(Args)]
#[command(after_help = "\
Examples:
  vmm man | man -l -
  vmm man run > /usr/local/share/man/man1/vmm-run.1")]
pub struct ManArgs {
    /// The page of this subcommand, in place of vmm's own
    #[arg(value_name = "SUBCOMMAND")]
    subcommand: Option<String>,
}

/// Runs the subcommand.
pub fn run(args: &ManArgs) -> anyhow::Result<ExitStatus> {
    let mut command = super::Cli::command();
    command.build();
    let page = match &args.subcommand {
        None => command,
        Some(name) => {
            let names: Vec<_> = command
                .get_subcommands()
                .map(|c| c.get_name().to_owned())
                .filter(|name| name != "help")
                .collect();
            let found = command.find_subcommand(name).cloned();
            let page = found.ok_or_else(|| {
                UsageError(format!("there is no subcommand '{name}'; choose one of {}", names.join(", ")))
            })?;
            page.name(format!("vmm-{name}"))
        }
    };
    let mut roff = Vec::new();
    Man::new(page).render(&mut roff)?;
    super::print(&roff)
}
