//! `cargo xtask demo`: the first command of a newcomer.

use std::io::{self, IsTerminal};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use harness::{Exit, Guest, Process, Program, binaries, local_kvm, packages};

/// Boot the demo guest to its shell, on this machine's KVM
#[derive(clap::Args)]
pub struct Demo {
    /// Type into the guest and read its answers by itself, also when there is a terminal
    #[arg(long)]
    check: bool,
}

/// What our root file system's shell prints when it is ready.
const PROMPT: &str = "# ";
/// Only there to end a hang.
const DEADLINE: Duration = Duration::from_secs(120);

impl Demo {
    /// Builds what is missing and boots.
    pub fn run(self) -> Result<ExitCode> {
        packages::ensure(&["gcc", "libc6-dev"])?;
        eprintln!("building vmm");
        let vmm = binaries::vmm()?;
        crate::images::local()?;
        if local_kvm().is_none() {
            eprintln!(
                "there is no /dev/kvm here that we may use: the demo runs in the lab, an emulated host"
            );
            return in_lab();
        }
        eprintln!("$ vmm run");
        if !self.check && io::stdin().is_terminal() && io::stdout().is_terminal() {
            let status = Command::new(&vmm)
                .arg("run")
                .status()
                .with_context(|| format!("cannot run {}", vmm.display()))?;
            return Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(u8::MAX)));
        }
        let mut process = Process::start_local(&Program::new([vmm.display().to_string(), "run".into()]))?;
        let began = Instant::now();
        process.expect(PROMPT, DEADLINE)?;
        let to_prompt = began.elapsed();
        process.send("uname -a\n")?;
        process.expect(PROMPT, DEADLINE)?;
        process.send("poweroff\n")?;
        let output = process.wait(DEADLINE)?;
        print!("{}{}", String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
        eprintln!("shell prompt after {} ms; vmm ended with {}", to_prompt.as_millis(), output.exit);
        Ok(if output.exit == Exit::Status(0) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn in_lab() -> Result<ExitCode> {
    let mut guest = Guest::new().start()?;
    guest.expect(PROMPT)?;
    guest.send("uname -a\n")?;
    guest.expect(PROMPT)?;
    guest.send("poweroff\n")?;
    let run = guest.wait()?;
    print!("{}", run.console);
    Ok(if run.exit == Exit::Status(0) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
