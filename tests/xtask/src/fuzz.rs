//! The fuzz targets, each for a short bounded time. libFuzzer comes with the `libfuzzer-sys` crate, so that the nightly
//! toolchain is all it takes.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use harness::{binaries, command};
use serde::Deserialize;

use crate::runner::Counts;
use crate::test::step;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// What makes code report to libFuzzer where it has been, and the address sanitizer watch it.
const FLAGS: &str = "--cfg fuzzing -Zsanitizer=address -Cdebug-assertions -Ccodegen-units=1 \
    -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares";

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// Fuzzes each target for this many seconds; each counts as one test.
pub fn run(seconds: u64) -> Result<Counts> {
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
    for name in targets(&manifest)? {
        let passed = fuzz(&binaries.join(&name), &dir, seconds)?;
        println!("{} fuzz {name} ({seconds} s)", if passed { "PASS" } else { "FAIL" });
        counts.add(Counts { passed: usize::from(passed), failed: usize::from(!passed) });
    }
    Ok(counts)
}

fn targets(manifest: &Path) -> Result<Vec<String>> {
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
fn fuzz(binary: &Path, dir: &Path, seconds: u64) -> Result<bool> {
    let name = binary.file_name().unwrap_or_default();
    let corpus = binaries::target_dir().join("fuzz/corpus").join(name);
    let artifacts = dir.join("artifacts").join(name);
    for made in [&corpus, &artifacts] {
        std::fs::create_dir_all(made)?;
    }
    let mut fuzz = Command::new(binary);
    fuzz.arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-timeout=10", "-rss_limit_mb=2048", "-verbosity=0", "-print_final_stats=1"])
        .arg(&corpus);
    let seeds = dir.join("corpus").join(name);
    if seeds.is_dir() {
        fuzz.arg(seeds);
    }
    let output = fuzz.output().with_context(|| format!("cannot run {}", binary.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        let units = said.lines().find(|line| line.starts_with("stat::number_of_executed_units"));
        println!("{}", units.unwrap_or_default());
    } else {
        println!("{said}");
    }
    Ok(output.status.success())
}
