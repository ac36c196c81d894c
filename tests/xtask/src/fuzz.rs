//! The fuzz targets, each for a bounded time: a hostile driver for each kind of device of the registry on each transport,
//! and the special targets. libFuzzer comes with the `libfuzzer-sys` crate, so that the nightly toolchain is all it takes.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::{fs, thread};

use anyhow::{Context, Result, bail, ensure};
use devices::registry::KINDS;
use harness::{binaries, command};
use serde::Deserialize;

use crate::runner::{Counts, TEST_TRANSPORT};
use crate::test::step;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// What makes code report to libFuzzer where it has been, and the address sanitizer watch it.
const FLAGS: &str = "--cfg fuzzing -Zsanitizer=address -Cdebug-assertions -Ccodegen-units=1 \
    -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares";
/// The target that is for all kinds of devices, and the variable that chooses one.
const DEVICE: &str = "device";
const KIND: &str = "VMM_FUZZ_KIND";
/// As [`TEST_TRANSPORT`] has them.
const TRANSPORTS: [&str; 2] = ["mmio", "pci"];

/// Fuzz the devices of the registry on each transport, and the special targets
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask fuzz\n  cargo xtask fuzz disk-pci --seconds 1800")]
pub struct Fuzz {
    /// Only targets whose name contains this
    filter: Option<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

impl Fuzz {
    /// Runs what was asked for. The last line has the totals.
    pub fn run(self) -> Result<ExitCode> {
        let counts = run(self.seconds, self.filter.as_deref().unwrap_or_default())?;
        println!("{} passed, {} failed", counts.passed, counts.failed);
        ensure!(counts.passed + counts.failed > 0, "no target ran");
        Ok(if counts.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// A program, and what its environment makes of it.
struct Target {
    name: String,
    binary: String,
    environment: Vec<(&'static str, String)>,
    /// Below tests/fuzz/corpus.
    seeds: String,
}

/// Fuzzes each target whose name contains `filter` for this many seconds, as many at once as there are CPUs; each counts
/// as one test.
pub fn run(seconds: u64, filter: &str) -> Result<Counts> {
    let dir = binaries::workspace().join("tests/fuzz");
    let manifest = dir.join("Cargo.toml");
    let mut counts = Counts::default();
    if seconds == 0 || !manifest.exists() {
        step("fuzzing: left out");
        return Ok(counts);
    }
    if command::output(&mut command::words("cargo +nightly --version")).is_err() {
        step("fuzzing: SKIPPED, it takes the nightly toolchain (rustup toolchain install nightly)");
        return Ok(counts);
    }
    step("fuzzing");
    let binaries = build(&manifest)?;
    let targets = targets(&manifest)?.into_iter().filter(|target| target.name.contains(filter));
    let targets = Mutex::new(targets);
    let next = || targets.lock().unwrap_or_else(|e| e.into_inner()).next();
    let worker = || -> Result<Counts> {
        let mut counts = Counts::default();
        while let Some(target) = next() {
            let passed = fuzz(&target, &binaries, &dir, seconds)?;
            counts.add(Counts { passed: usize::from(passed), failed: usize::from(!passed) });
        }
        Ok(counts)
    };
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..cpus).map(|_| scope.spawn(worker)).collect();
        for worker in workers {
            counts.add(worker.join().unwrap_or_else(|_| bail!("fuzzing panicked"))?);
        }
        Ok(counts)
    })
}

/// Every kind of device on every transport, then the other programs.
fn targets(manifest: &Path) -> Result<Vec<Target>> {
    let binaries = binaries_of(manifest)?;
    let devices = KINDS.iter().flat_map(|kind| {
        TRANSPORTS.map(|transport| Target {
            name: format!("{}-{transport}", kind.name),
            binary: DEVICE.into(),
            environment: vec![(KIND, kind.name.into()), (TEST_TRANSPORT, transport.into())],
            seeds: kind.name.into(),
        })
    });
    let special = binaries.into_iter().filter(|name| name != DEVICE).map(|name| Target {
        name: name.clone(),
        binary: name.clone(),
        environment: vec![],
        seeds: name,
    });
    Ok(devices.chain(special).collect())
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    targets: Vec<Program>,
}

#[derive(Deserialize)]
struct Program {
    name: String,
    kind: Vec<String>,
}

fn binaries_of(manifest: &Path) -> Result<Vec<String>> {
    let mut metadata = command::words("cargo metadata --no-deps --format-version 1 --manifest-path");
    let metadata: Metadata = serde_json::from_str(&command::output(metadata.arg(manifest))?)?;
    let targets = metadata.packages.into_iter().flat_map(|package| package.targets);
    Ok(targets
        .filter(|target| target.kind.iter().any(|kind| kind == "bin"))
        .map(|target| target.name)
        .collect())
}

/// Builds all targets; returns the directory they are in.
fn build(manifest: &Path) -> Result<PathBuf> {
    let target_dir = binaries::target_dir().join("fuzz");
    let mut build = command::words("cargo +nightly build --quiet --release --bins --target");
    build.args([TARGET, "--manifest-path"]).arg(manifest).arg("--target-dir").arg(&target_dir);
    build.env("RUSTFLAGS", FLAGS).env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("RUSTUP_TOOLCHAIN");
    if !build.env_remove("CARGO").status().context("cannot run cargo")?.success() {
        bail!("the fuzz targets do not build");
    }
    Ok(target_dir.join(TARGET).join("release"))
}

/// True when nothing was found. New inputs are kept in the target's corpus, a finding in tests/fuzz/artifacts.
fn fuzz(target: &Target, binaries: &Path, dir: &Path, seconds: u64) -> Result<bool> {
    let corpus = binaries::target_dir().join("fuzz/corpus").join(&target.name);
    let artifacts = dir.join("artifacts").join(&target.name);
    for made in [&corpus, &artifacts] {
        fs::create_dir_all(made)?;
    }
    let binary = binaries.join(&target.binary);
    let mut fuzz = Command::new(&binary);
    fuzz.envs(target.environment.iter().map(|(name, value)| (name, value)))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-timeout=60", "-rss_limit_mb=2048", "-verbosity=0", "-print_final_stats=1"])
        .arg(&corpus);
    let seeds = dir.join("corpus").join(&target.seeds);
    if seeds.is_dir() {
        fuzz.arg(seeds);
    }
    let output = fuzz.output().with_context(|| format!("cannot run {}", binary.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let passed = output.status.success();
    let executed = said.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    if !passed {
        println!("{said}");
    }
    let result = if passed { "PASS" } else { "FAIL" };
    println!("{result} fuzz {} ({seconds} s, {} runs)", target.name, executed.unwrap_or("?").trim());
    Ok(passed)
}
