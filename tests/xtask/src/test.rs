//! `cargo xtask test`: everything that CI checks, and where each test ran.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use harness::lab::{self, Hold, Lab};
use harness::{Acceleration, binaries, local_kvm, packages};

use crate::runner::{Counts, Runner};
use crate::{fuzz, images, public_api};

/// Check formatting and lints, and run every layer of tests
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask test\n  cargo xtask test boot\n  cargo xtask test --no-lab --no-checks"
)]
pub struct Test {
    /// Run only tests whose name contains this; formatting, lints, documentation tests and fuzzing are left out then
    filter: Option<String>,
    /// Leave out tests that would run in the lab
    #[arg(long)]
    no_lab: bool,
    /// Leave out formatting and lints
    #[arg(long)]
    no_checks: bool,
    /// Seconds for each fuzz target; 0 leaves fuzzing out
    #[arg(long, default_value_t = 10)]
    fuzz_seconds: u64,
}

/// Tests that have a lab of their own accord, beside those in modules named `hardware`.
const LAB_TESTS: &str = "binary(lab)";
/// Tests that need hardware are in modules of this name; the harness insists.
const HARDWARE_TESTS: &str = "test(/(^|::)hardware::/)";
/// Tests of the command at a terminal, which take its guests on this machine.
const LOCAL_TESTS: &str = "binary(console) | binary(api) | binary(api_properties) | binary(machines) | binary(endurance) | \
    binary(lifecycle) | binary(host_agent) | binary(snapshot) | binary(snapshot_crash) | binary(snapshot_load) | \
    binary(snapshot_tools) | binary(snapshot_truth) | binary(clones) | binary(disks) | binary(forks)";
/// For the linker and for what tests use on this machine.
const PACKAGES: [&str; 9] =
    ["cpio", "gcc", "g++", "libc6-dev", "iproute2", "e2fsprogs", "xfsprogs", "passt", "python3-pip"];

impl Test {
    /// Runs what was asked for. The last line has the totals.
    pub fn run(self) -> Result<ExitCode> {
        let began = Instant::now();
        packages::ensure(&PACKAGES)?;
        let whole = self.filter.is_none();
        if whole && !self.no_checks {
            // Seconds, and what most often fails: before anything heavy.
            step("formatting");
            cargo(&["fmt", "--all", "--check"])?;
        }
        let vmm = self.prepare(whole && !self.no_checks)?;
        let mut totals = Counts::default();
        let report = tempfile::NamedTempFile::new()?;
        let lab = SharedLab::start(self.needs_lab())?;
        let mut runner = Runner::new(&vmm, report.path());
        runner.lab(lab.name());
        step("tests");
        totals.add(runner.tests(self.filter.as_deref(), self.expression().as_deref())?);
        if whole {
            step("device tests on virtio-pci");
            totals.add(runner.devices_on_pci()?);
            step("documentation tests");
            totals.add(runner.doc_tests()?);
            totals.add(fuzz::run(self.fuzz_seconds, "")?);
        }
        drop(lab);
        step("summary");
        println!("{}", places(report.path(), totals)?);
        for name in runner.flaky() {
            println!("passed only at its second try: {name}");
        }
        println!("took {:.0} s", began.elapsed().as_secs_f32());
        println!("{} passed, {} failed", totals.passed, totals.failed);
        ensure!(totals.passed + totals.failed > 0, "no test ran");
        Ok(if totals.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// Lints and builds, while images are made beside; returns the static vmm binary.
    fn prepare(&self, lint: bool) -> Result<std::path::PathBuf> {
        let with_lab = self.needs_lab();
        thread::scope(|scope| {
            let images = scope.spawn(move || {
                images::local()?;
                if with_lab { images::for_lab() } else { Ok(()) }
            });
            let built = (|| {
                if lint {
                    step("lints");
                    cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
                    step("documentation");
                    cargo(&["doc", "--quiet", "--workspace", "--no-deps"])?;
                    public_api::check()?;
                }
                step("build");
                cargo(&["test", "--quiet", "--workspace", "--no-run"])?;
                binaries::vmm()
            })();
            let images = images.join().unwrap_or_else(|_| bail!("building images panicked"));
            let vmm = built?;
            images.context("cannot prepare images")?;
            Ok(vmm)
        })
    }

    /// Whether any test would run in the lab.
    fn needs_lab(&self) -> bool {
        !self.no_lab
    }

    /// What nextest is to leave out.
    fn expression(&self) -> Option<String> {
        let local = local_kvm();
        let mut out = Vec::new();
        if self.no_lab {
            out.push(LAB_TESTS);
            out.extend((local != Some(Acceleration::Hardware)).then_some(HARDWARE_TESTS));
        }
        if local.is_none() {
            println!("left out, because there is no /dev/kvm here that we may open: {LOCAL_TESTS}");
            out.push(LOCAL_TESTS);
        }
        (!out.is_empty()).then(|| format!("not ({})", out.join(" + ")))
    }
}

/// The lab, for as long as tests run.
struct SharedLab(Option<(Lab, Hold)>);

impl SharedLab {
    fn start(wanted: bool) -> Result<Self> {
        if !wanted {
            return Ok(Self(None));
        }
        let lab = Lab::shared()?;
        let hold = lab.hold()?;
        Ok(Self(Some((lab, hold))))
    }

    fn name(&self) -> Option<(&'static str, String)> {
        self.0.as_ref().map(|(lab, _)| (lab::VARIABLE, lab.name()))
    }
}

impl Drop for SharedLab {
    fn drop(&mut self) {
        if let Some((lab, hold)) = self.0.take() {
            drop(hold);
            if let Err(error) = lab.power_off() {
                eprintln!("the lab stays for now: {error:#}");
            }
        }
    }
}

/// How many tests ran where. A test counts once for each place.
fn places(report: &Path, totals: Counts) -> Result<String> {
    let lines = fs::read_to_string(report).with_context(|| format!("read {}", report.display()))?;
    let mut seen: Vec<&str> = lines.lines().collect();
    seen.sort_unstable();
    seen.dedup();
    let mut counts = BTreeMap::new();
    for place in seen.iter().filter_map(|line| line.split('\t').next()) {
        *counts.entry(place).or_insert(0_usize) += 1;
    }
    let mut parts: Vec<String> = counts.iter().map(|(place, count)| format!("{count} in {place}")).collect();
    let mut tests: Vec<&str> = seen.iter().filter_map(|line| line.split('\t').nth(1)).collect();
    tests.sort_unstable();
    tests.dedup();
    parts.push(format!("{} without a VM", (totals.passed + totals.failed).saturating_sub(tests.len())));
    Ok(format!("where tests ran: {}", parts.join(", ")))
}

/// Runs cargo here, its output shown.
fn cargo(arguments: &[&str]) -> Result<()> {
    let status = Command::new("cargo").args(arguments).current_dir(binaries::workspace()).status()?;
    ensure!(status.success(), "`cargo {}` failed", arguments.join(" "));
    Ok(())
}

/// Says what is done now.
pub fn step(what: &str) {
    println!("==> {what}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_that_boots_two_guests_counts_once() {
        let report = tempfile::NamedTempFile::new().unwrap();
        fs::write(report.path(), "lab\ta::x\nlab\ta::x\nlocal ring-3\ta::y\n").unwrap();
        let line = places(report.path(), Counts { passed: 5, failed: 1 }).unwrap();
        assert_eq!(line, "where tests ran: 1 in lab, 1 in local ring-3, 4 without a VM");
    }
}
