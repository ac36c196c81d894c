//! `vmm completion`: what connects a shell with this program, which is asked what could be meant at each completion. So
//! it knows the machines that there are.

use std::ffi::OsString;
use std::path::Path;

use anyhow::Context;
use clap::builder::PossibleValuesParser;
use clap::{Args, CommandFactory};
use clap_complete::env::Shells;
use clap_complete::{CompleteEnv, CompletionCandidate};

use crate::exit::ExitStatus;
use crate::machines::StateDir;

/// With this variable in its environment, a shell asks.
const VARIABLE: &str = "VMM_COMPLETE";

/// Print what connects a shell's completion with vmm
#[derive(Args)]
#[command(after_help = "\
Examples:
  vmm completion bash > ~/.local/share/bash-completion/completions/vmm
  vmm completion zsh > ~/.zfunc/_vmm
  vmm completion fish > ~/.config/fish/completions/vmm.fish")]
pub struct CompletionArgs {
    /// Which shell
    #[arg(value_name = "SHELL", value_parser = PossibleValuesParser::new(["bash", "zsh", "fish"]))]
    shell: String,
}

/// Runs the subcommand.
pub fn run(args: &CompletionArgs) -> anyhow::Result<ExitStatus> {
    let mut script = Vec::new();
    let shells = Shells::builtins();
    let shell = shells.completer(&args.shell).context("the shell is not known")?;
    shell.write_registration(VARIABLE, "vmm", "vmm", "vmm", &mut script)?;
    super::print(&script)
}

/// Answers if it is a shell that asks; returns whether it was.
pub fn answer() -> anyhow::Result<bool> {
    if std::env::var_os(VARIABLE).is_none() {
        return Ok(false);
    }
    let here = std::env::current_dir().ok();
    let asked = CompleteEnv::with_factory(super::Cli::command).var(VARIABLE).bin("vmm");
    Ok(asked.try_complete(std::env::args_os(), here.as_deref())?)
}

/// Names of machines, of the state directory that the words before say.
pub fn machines() -> Vec<CompletionCandidate> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let state = StateDir::open(state_dir(&words)).and_then(|state| state.list());
    state.unwrap_or_default().into_iter().map(|machine| CompletionCandidate::new(machine.name)).collect()
}

fn state_dir(words: &[OsString]) -> Option<&Path> {
    let at = words.iter().position(|word| word == "--state-dir")?;
    words.get(at + 1).map(Path::new)
}
