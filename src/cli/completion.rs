//! `vmm completion`: completion scripts for shells, made from the command line's own description.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::exit::ExitStatus;

/// Print a completion script for a shell
#[derive(Args)]
#[command(after_help = "\
Examples:
  vmm completion bash > ~/.local/share/bash-completion/completions/vmm
  vmm completion zsh > ~/.zfunc/_vmm
  vmm completion fish > ~/.config/fish/completions/vmm.fish")]
pub struct CompletionArgs {
    /// Which shell
    #[arg(value_name = "SHELL", value_parser = shell())]
    shell: Shell,
}

fn shell() -> impl TypedValueParser<Value = Shell> {
    PossibleValuesParser::new(["bash", "zsh", "fish"]).map(|name| match name.as_str() {
        "zsh" => Shell::Zsh,
        "fish" => Shell::Fish,
        _ => Shell::Bash,
    })
}

/// Runs the subcommand.
pub fn run(args: &CompletionArgs) -> anyhow::Result<ExitStatus> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "vmm", &mut script);
    super::print(&script)
}
