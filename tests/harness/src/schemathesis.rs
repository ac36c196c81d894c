//! Schemathesis, which makes requests from an OpenAPI document: pinned versions from PyPI, in the cache.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{binaries, cache, command};

/// Its command line, to which arguments are added. Where it is not in the cache yet, it is installed.
pub fn command() -> Result<Command> {
    let source = binaries::workspace().join("tests/schemathesis");
    let pinned = source.join("requirements.txt");
    let requirements = std::fs::read_to_string(&pinned)?;
    let python = command::output(&mut command::words("python3 --version"))
        .context("Python is missing; install it: apt-get install python3-pip")?;
    let packages = cache::build_once("python", &format!("{python}{requirements}"), |directory| {
        install(&pinned, directory).context("install Schemathesis with pip, of the package python3-pip")
    })?;
    let mut command = command::words("python3 -m schemathesis.cli run --no-color --warnings off");
    let path = std::env::join_paths([&packages, &source])?;
    command.env("PYTHONPATH", path).env("PYTHONDONTWRITEBYTECODE", "1").env("SCHEMATHESIS_HOOKS", "hooks");
    Ok(command)
}

/// Wheels only: nothing of theirs runs while it is installed.
fn install(pinned: &Path, into: &Path) -> Result<()> {
    let words =
        "python3 -m pip install --quiet --no-input --disable-pip-version-check --no-deps --only-binary :all:";
    let mut pip = command::words(words);
    command::run(
        pip.args(["--root-user-action=ignore", "--target"]).arg(into).arg("--requirement").arg(pinned),
    )
}
