//! Where a guest can run on this machine, and which place a test gets.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use crate::lab::Lab;
use crate::process::{Output, Process, Program};

/// What a test needs of the place where its guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// A KVM that runs our guest kernel, with or without hardware behind it.
    AnyKvm,
    /// What only VMX or SVM give: stock kernels, several CPUs, bzImage.
    Hardware,
}

/// A place where guests run.
#[derive(Clone, Debug)]
pub enum Place {
    /// This machine's /dev/kvm, with VMX or SVM behind it.
    LocalHardware,
    /// This machine's /dev/kvm without them: only the ring-3 kernel is of use.
    LocalRing3,
    /// The lab host, which emulates SVM.
    Lab(Lab),
}

impl Place {
    /// The best place for a test with these needs: this machine where it will do, else the lab.
    pub fn choose(needs: Needs) -> Result<Self> {
        match (local_kvm(), needs) {
            (Some(Acceleration::Hardware), _) => Ok(Self::LocalHardware),
            (Some(Acceleration::None), Needs::AnyKvm) => Ok(Self::LocalRing3),
            (Some(Acceleration::None), Needs::Hardware) | (None, _) => Ok(Self::Lab(Lab::shared()?)),
        }
    }

    /// A place for guests where tests are root: this machine if they are here, else the lab.
    pub fn with_root() -> Result<Self> {
        match rustix::process::geteuid().is_root() {
            true => Self::choose(Needs::AnyKvm),
            false => Ok(Self::Lab(Lab::shared()?)),
        }
    }

    /// Whether guests have VMX or SVM to run on; the lab's is emulated and counts.
    pub fn acceleration(&self) -> Acceleration {
        match self {
            Self::LocalHardware | Self::Lab(_) => Acceleration::Hardware,
            Self::LocalRing3 => Acceleration::None,
        }
    }

    /// How often the place is slower than hardware, roughly: deadlines are stretched by it.
    pub fn slowness(&self) -> u32 {
        match self {
            Self::LocalHardware | Self::LocalRing3 => 1,
            Self::Lab(_) => 5,
        }
    }

    /// Starts a program there.
    pub fn start(&self, program: &Program) -> Result<Process> {
        match self {
            Self::LocalHardware | Self::LocalRing3 => Process::start_local(program),
            Self::Lab(lab) => lab.spawn(program),
        }
    }

    /// Runs a line of shell there, to its end.
    pub fn shell(&self, line: &str) -> Result<Output> {
        self.start(&Program::shell(line))?.wait(Duration::from_secs(60) * self.slowness())
    }

    /// Makes a file of this machine readable there, and returns its path there.
    pub fn provide(&self, file: &Path) -> Result<String> {
        match self {
            Self::LocalHardware | Self::LocalRing3 => Ok(file.display().to_string()),
            Self::Lab(lab) => lab.provide(file),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LocalHardware => "local /dev/kvm with hardware",
            Self::LocalRing3 => "local /dev/kvm",
            Self::Lab(_) => "the lab",
        })
    }
}

/// What stands behind this machine's /dev/kvm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acceleration {
    /// VMX or SVM.
    Hardware,
    /// Neither: the host kernel emulates guest kernel code.
    None,
}

/// What this machine's /dev/kvm is like; `None` when there is none that we may open.
pub fn local_kvm() -> Option<Acceleration> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").ok()?;
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag| flags.split_whitespace().any(|word| word == flag);
    Some(if has("vmx") || has("svm") { Acceleration::Hardware } else { Acceleration::None })
}
