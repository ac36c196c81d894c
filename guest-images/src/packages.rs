//! Tools that image builds call, and the Debian packages that bring them.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::progress::Progress;

/// Why a tool is missing still.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// Only root can install packages.
    #[error("missing packages: {0}; install them with `sudo apt-get install {0}`")]
    Missing(String),
    /// apt-get did not manage to.
    #[error("cannot install the packages {0}: apt-get failed; install them by hand")]
    InstallFailed(String),
}

/// Something on the host that a build needs.
pub(crate) struct Need {
    /// An absolute path, or a command looked up in `PATH`.
    pub probe: &'static str,
    /// The Debian package that has it.
    pub package: &'static str,
}

impl Need {
    fn is_met(&self) -> bool {
        if self.probe.starts_with('/') { Path::new(self.probe).exists() } else { find(self.probe).is_some() }
    }
}

/// Looks a command up in `PATH`, and where root's tools are.
pub(crate) fn find(command: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(command))
        .find(|candidate| candidate.is_file())
}

/// Makes sure that all needs are met: root installs what is missing, others are told what to install.
pub(crate) fn provide(needs: &[Need], progress: &mut dyn Progress) -> Result<(), PackageError> {
    let mut missing: Vec<&str> =
        needs.iter().filter(|need| !need.is_met()).map(|need| need.package).collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !rustix::process::geteuid().is_root() || find("apt-get").is_none() {
        return Err(PackageError::Missing(names));
    }
    progress.step(&format!("installing {names}"), None);
    let apt_get = |arguments: &[&str]| {
        let status = Command::new("apt-get")
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success())
    };
    // An update that fails (no network) does not matter when the packages are known already.
    apt_get(&["update", "-qq"]);
    let mut arguments = vec!["install", "-y", "-qq", "--no-install-recommends"];
    arguments.extend(&missing);
    if apt_get(&arguments) && needs.iter().all(Need::is_met) {
        return Ok(());
    }
    Err(PackageError::InstallFailed(names))
}
