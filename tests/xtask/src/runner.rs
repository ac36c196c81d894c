//! Runs cargo-nextest, or cargo test where that is missing, shows what they print, and counts.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use harness::{binaries, report};

/// How many tests passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Passed.
    pub passed: usize,
    /// Failed, timed out or could not be started.
    pub failed: usize,
}

impl Counts {
    /// Adds others.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Names the transport to the tests of devices (`VARIABLE` of `devices::virtio::test_wire`).
pub const TEST_TRANSPORT: &str = "VMM_TEST_TRANSPORT";

/// Runs tests with the same environment.
pub struct Runner {
    environment: Vec<(&'static str, String)>,
    /// Tests that passed at their second try.
    flaky: RefCell<Vec<String>>,
}

impl Runner {
    /// For this vmm binary, with the report of where tests ran going to that file.
    pub fn new(vmm: &Path, report: &Path) -> Self {
        let vmm = ("VMM_BIN", vmm.display().to_string());
        let environment = vec![vmm, (report::VARIABLE, report.display().to_string())];
        Self { environment, flaky: RefCell::default() }
    }

    /// Tests that passed, but only at their second try.
    pub fn flaky(&self) -> Vec<String> {
        self.flaky.borrow().clone()
    }

    /// Names the lab to tests.
    pub fn lab(&mut self, variable: Option<(&'static str, String)>) {
        self.environment.extend(variable);
    }

    /// All tests but those in documentation; `expression` is nextest's.
    pub fn tests(&self, filter: Option<&str>, expression: Option<&str>) -> Result<Counts> {
        let nextest = Command::new("cargo").args(["nextest", "--version"]).output()?.status.success();
        let mut arguments = match (nextest, expression) {
            (true, _) => vec!["nextest", "run", "--workspace", "--no-fail-fast"],
            (false, None) => vec!["test", "--workspace", "--all-targets", "--no-fail-fast"],
            (false, Some(_)) => bail!("leaving out the lab takes cargo-nextest: cargo install cargo-nextest"),
        };
        arguments.extend(expression.iter().flat_map(|expression| ["--filterset", expression]));
        arguments.extend(filter);
        self.run(&arguments, if nextest { nextest_line } else { libtest_line })
    }

    /// The tests of devices once more, on virtio-pci: those that do not name their transport.
    pub fn devices_on_pci(&mut self) -> Result<Counts> {
        self.environment.push((TEST_TRANSPORT, "pci".into()));
        // One of the tests of reclaimed memory uses up the process's mappings, which all tests share here.
        let tests = ["test", "--package", "devices", "--lib", "--", "virtio::", "--skip", "virtio::reclaim"];
        let counts = self.run(&tests, libtest_line);
        self.environment.pop();
        counts
    }

    /// The tests in documentation, which nextest does not run.
    pub fn doc_tests(&self) -> Result<Counts> {
        self.run(&["test", "--doc", "--workspace"], libtest_line)
    }

    fn run(&self, arguments: &[&str], count: fn(&str) -> Option<Counts>) -> Result<Counts> {
        let mut command = Command::new("sh");
        command
            .args(["-c", "exec cargo \"$@\" 2>&1", "cargo"])
            .args(arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(binaries::workspace())
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot run cargo")?;
        let output = child.stdout.take().context("no output of cargo")?;
        let mut counts = Counts::default();
        for line in BufReader::new(output).split(b'\n') {
            let line = line?;
            let mut out = std::io::stdout().lock();
            out.write_all(&line)?;
            out.write_all(b"\n")?;
            let line = String::from_utf8_lossy(&line);
            counts.add(count(&line).unwrap_or_default());
            self.flaky.borrow_mut().extend(flaky_line(&line));
        }
        let status = child.wait()?;
        if !status.success() && counts.failed == 0 {
            bail!("`cargo {}` failed before or after its tests", arguments.join(" "));
        }
        Ok(counts)
    }
}

/// `     Summary [   0.960s] 7 tests run: 5 passed (1 slow), 1 failed, 1 timed out, 2 skipped`
fn nextest_line(line: &str) -> Option<Counts> {
    let (_, summary) = line.trim_start().strip_prefix("Summary [")?.split_once("] ")?;
    let (run, results) = summary.split_once(" run: ")?;
    // With --no-fail-fast off or after an interrupt this reads `3/7 tests`.
    let run: usize = run.split([' ', '/']).next()?.parse().ok()?;
    let passed = results.split(", ").find_map(|part| part.split_once(" passed"))?.0.parse().ok()?;
    Some(Counts { passed, failed: run - passed })
}

/// `   FLAKY 2/2 [   0.960s] vmm::boot a_guest_boots`
fn flaky_line(line: &str) -> Option<String> {
    let (_, name) = line.trim_start().strip_prefix("FLAKY ")?.split_once("] ")?;
    Some(name.trim().to_owned())
}

/// `test result: ok. 7 passed; 0 failed; 0 ignored; …`
fn libtest_line(line: &str) -> Option<Counts> {
    let results = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let number =
        |word: &str| results.split("; ").find_map(|part| part.strip_suffix(word)?.trim().parse().ok());
    Some(Counts { passed: number("passed")?, failed: number("failed")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_from_both_runners() {
        let line =
            "     Summary [  10.960s] 9 tests run: 6 passed (1 slow), 2 failed, 1 timed out, 2 skipped";
        assert_eq!(nextest_line(line), Some(Counts { passed: 6, failed: 3 }));
        let line = "test result: FAILED. 7 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.96s";
        assert_eq!(libtest_line(line), Some(Counts { passed: 7, failed: 2 }));
        assert_eq!(
            nextest_line("     Summary [  10.960s] 9 tests run: 9 passed (1 slow, 2 flaky), 0 skipped"),
            Some(Counts { passed: 9, failed: 0 })
        );
        let flaky = flaky_line("   FLAKY 2/2 [   1.012s] (2/9) vmm::boot a_guest_boots");
        assert_eq!(flaky.as_deref(), Some("(2/9) vmm::boot a_guest_boots"));
        assert_eq!(nextest_line("        PASS [   0.009s] harness::lab two_clients_at_once"), None);
    }
}
