//! Debian packages: what tests need is installed when we are root, and asked for in one sentence when we are not.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command;

/// Makes sure that these packages are installed.
pub fn ensure(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages.iter().copied().filter(|package| !installed(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        bail!("some packages are missing; install them: apt-get install {}", missing.join(" "));
    }
    eprintln!("installing {}", missing.join(" "));
    update()?;
    let mut install =
        command::words("apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=600");
    command::run(install.args(&missing).env("DEBIAN_FRONTEND", "noninteractive"))
}

/// A package's name and exact version.
#[derive(Clone, Debug)]
pub struct Version {
    /// Name of the package.
    pub package: String,
    /// Its version, as apt writes it.
    pub version: String,
}

/// The package, and its version, that the newest of the `metas` (tried in turn) depends on, of those whose names start with `prefix`.
pub fn newest(metas: &[&str], prefix: &str) -> Result<Version> {
    let offered = || metas.iter().find_map(|meta| dependency(meta, prefix));
    if let Some(version) = offered() {
        return Ok(version);
    }
    if rustix::process::geteuid().is_root() {
        update()?;
    }
    offered().with_context(|| {
        format!("apt offers no package {prefix}*; run apt-get update, on Debian 12 or later")
    })
}

/// Downloads a package, checked by apt against the archive's signature, and unpacks it below `into`.
pub fn unpack(version: &Version, into: &Path) -> Result<()> {
    let download = tempfile::tempdir()?;
    // Root would otherwise hand the download to a user who may not write here.
    let mut get = command::words("apt-get download -qq -o APT::Sandbox::User=root");
    command::run(get.arg(format!("{}={}", version.package, version.version)).current_dir(&download))?;
    let entry = download.path().read_dir()?.next().context("apt-get download brought nothing")??;
    command::run(Command::new("dpkg-deb").arg("-x").arg(entry.path()).arg(into))
}

/// Where a program of the build machine is; `sbin` counts even when PATH lacks it.
pub fn find_program(name: &str) -> Result<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let found = path
        .split(':')
        .chain(["/usr/sbin", "/sbin"])
        .map(|dir| Path::new(dir).join(name))
        .find(|p| p.is_file());
    found.with_context(|| format!("there is no program '{name}'"))
}

fn installed(package: &str) -> bool {
    let mut query = command::words("dpkg-query -W -f=${db:Status-Status}");
    command::output(query.arg(package)).is_ok_and(|status| status == "installed")
}

fn update() -> Result<()> {
    command::run(&mut command::words("apt-get update -qq -o DPkg::Lock::Timeout=600"))
}

/// Reads `NAME (= VERSION)` from a package's dependencies.
fn dependency(meta: &str, prefix: &str) -> Option<Version> {
    let shown =
        command::output(&mut command::words(&format!("apt-cache show --no-all-versions {meta}"))).ok()?;
    let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    depends.split(", ").find_map(|one| {
        let (package, version) = one.split_once(" (= ")?;
        package.starts_with(prefix).then(|| Version {
            package: package.to_owned(),
            version: version.trim_end_matches(')').to_owned(),
        })
    })
}
