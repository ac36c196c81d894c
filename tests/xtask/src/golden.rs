//! `cargo xtask golden`: what tests compare snapshots with, made anew where that is right.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use harness::command;

/// In the environment of a test, it says that texts may be written (`devices::shape::WRITE`).
const WRITE: &str = "VMM_GOLDEN";
/// The tests that compare, by their packages and names.
const TESTS: [(&str, &str); 2] =
    [("devices", "saved_types_change_only_with_their_versions"), ("vmm", "binary(snapshot_form)")];

/// Keep the forms of saved states, and a snapshot of this version, in the repository
#[derive(clap::Args)]
pub struct Golden {}

impl Golden {
    /// Runs the tests in the mode in which they write.
    pub fn run(self) -> Result<ExitCode> {
        for (package, filter) in TESTS {
            let filter = if filter.contains('(') { filter.to_owned() } else { format!("test({filter})") };
            let mut tests = command::words("cargo nextest run --package");
            tests.args([package, "--filterset", &filter]).env(WRITE, "1");
            let status = tests.status().context("cannot run cargo nextest")?;
            ensure!(status.success(), "a saved form changed without its version: see above");
        }
        println!("see 'git diff': forms in text files, and snapshots in tests/golden");
        Ok(ExitCode::SUCCESS)
    }
}
