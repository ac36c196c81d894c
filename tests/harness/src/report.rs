//! Says where each test ran: on standard error, and in the file that `$VMM_TEST_REPORT` names, for the summary of a whole run.

use std::fs::OpenOptions;
use std::io::Write;

use anyhow::{Context, Result, ensure};

use crate::place::{Needs, Place};

/// Names the file to which each test appends `PLACE<tab>TEST`.
pub const VARIABLE: &str = "VMM_TEST_REPORT";

/// The running test's name: test program, then its path in it.
pub fn test_name() -> String {
    let program = std::env::current_exe().unwrap_or_default();
    let program = program.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    // Cargo appends a hash to the names of test programs.
    let program = program.rsplit_once('-').map_or(program.as_str(), |(name, _)| name).to_owned();
    match std::thread::current().name() {
        Some(test) => format!("{program}::{test}"),
        None => program,
    }
}

/// Says that the running test boots `what` at `place`.
pub fn boots(what: &str, place: &Place) -> Result<()> {
    let test = test_name();
    eprintln!("[{test}] {what} on {place}");
    let key = match place {
        Place::LocalHardware => "local hardware",
        Place::LocalRing3 => "local ring-3",
        Place::Lab(_) => "lab",
    };
    let Some(path) = std::env::var_os(VARIABLE) else { return Ok(()) };
    let mut file = OpenOptions::new().append(true).create(true).open(&path)?;
    file.write_all(format!("{key}\t{test}\n").as_bytes()).context("write the test report")
}

/// Tests that need hardware are in modules named `hardware`: so the runner knows which they are without running them.
pub fn check_module(needs: Needs) -> Result<()> {
    let test = test_name();
    let marked = test.split("::").any(|part| part == "hardware");
    ensure!(
        needs == Needs::AnyKvm || marked,
        "{test} needs hardware: put it into a module named 'hardware', by which the runner finds what may go to the lab"
    );
    Ok(())
}
