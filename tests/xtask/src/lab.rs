//! `cargo xtask lab`: programs in the lab host.

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::thread;

use anyhow::{Result, ensure};
use harness::process::{Exit, FOREVER, Program};

/// Run a program in the lab host, a Debian host with emulated SVM; without a program, a shell
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask lab -- ls -l /dev/kvm\n  cargo xtask lab -- sh -c 'dmesg | grep -i kvm'\n\n\
    The lab starts when it is needed (4 to 6 s) and ends by itself two minutes after its last use."
)]
pub struct Lab {
    /// Copy this file to /root in the lab host first; may be repeated
    #[arg(long = "copy", value_name = "FILE")]
    copies: Vec<std::path::PathBuf>,
    /// Program and arguments
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

impl Lab {
    /// Runs the command; its exit status becomes ours.
    pub fn run(self) -> Result<ExitCode> {
        let lab = harness::lab::Lab::shared()?;
        for file in &self.copies {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            lab.put(file, &format!("/root/{name}"))?;
        }
        let argv = if self.command.is_empty() {
            ensure!(io::stdin().is_terminal(), "name a program: cargo xtask lab -- CMD");
            eprintln!("a shell in the lab host; Ctrl-D leaves it");
            vec!["sh".to_owned(), "-i".to_owned()]
        } else {
            self.command
        };
        let program = Program { passthrough: true, cwd: Some("/root".into()), ..Program::new(argv) };
        let mut process = lab.spawn(&program)?;
        let stdin = process.take_stdin();
        // Ends with our standard input, or with us.
        thread::spawn(move || stdin.map(|mut stdin| io::copy(&mut io::stdin(), &mut stdin)));
        let exit = process.wait(FOREVER)?.exit;
        Ok(ExitCode::from(match exit {
            Exit::Status(status) => u8::try_from(status).unwrap_or(u8::MAX),
            Exit::Signal(number) => u8::try_from(128 + number).unwrap_or(u8::MAX),
        }))
    }
}
