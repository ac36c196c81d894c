//! The programs under test and in the lab: built static, so that they run anywhere.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The static `vmm` binary that tests run, here and in the lab: `$VMM_BIN`, or built now.
pub fn vmm() -> Result<PathBuf> {
    match std::env::var_os("VMM_BIN") {
        Some(path) => Ok(path.into()),
        None => build(&["--package", "vmm", "--bin", "vmm"]),
    }
}

/// The static `vmm` binary as users get it, for benchmarks: built with the release profile.
pub fn release() -> Result<PathBuf> {
    build(&["--release", "--package", "vmm", "--bin", "vmm"])
}

/// The static `stream-peer` binary, which runs in guests and beside them.
pub fn stream_peer() -> Result<PathBuf> {
    build(&["--release", "--package", "stream-peer", "--bin", "stream-peer"])
}

/// The static `hostile-driver` binary, which breaks the specification in guests.
pub fn hostile_driver() -> Result<PathBuf> {
    build(&["--release", "--package", "hostile-driver", "--bin", "hostile-driver"])
}

/// Builds one static executable, chosen by arguments to `cargo build`, and returns its path.
pub fn build(arguments: &[&str]) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args([
            "build",
            "--quiet",
            "--message-format=json-render-diagnostics",
            "--target",
            TARGET,
            "--target-dir",
        ])
        .arg(target_dir().join("static"))
        .args(arguments)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .current_dir(workspace());
    let messages = crate::command::output(&mut command)?;
    let executable = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok()?.executable)
        .next_back();
    executable.with_context(|| format!("cargo built no executable for {}", arguments.join(" ")))
}

/// What is of interest in a line of cargo's JSON output.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
}

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here)
}

/// Where cargo builds.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), |dir| workspace().join(dir))
}
