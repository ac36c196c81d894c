//! The kernels that guests boot.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use guest_images::kernel::Flavour;
use guest_images::progress::Console;
use tempfile::TempDir;

use crate::debian::DebianKernel;
use crate::micro::Micro;
use crate::place::{Acceleration, Needs, Place};

/// File of a micro guest in its directory.
const MICRO: &str = "micro.elf";

/// What a guest boots.
#[derive(Clone, Debug, Default)]
pub enum Kernel {
    /// Our own, in the flavour that the place can run, as an ELF file.
    #[default]
    Default,
    /// Our own for hardware, as an ELF file.
    Standard,
    /// Our own for hardware, as a bzImage.
    BzImage,
    /// Our own for hosts without hardware behind their KVM, as an ELF file.
    Ring3,
    /// Debian's stock cloud kernel, a bzImage.
    DebianCloud,
    /// Some other kernel, for hardware.
    Path(PathBuf),
    /// A program of our own, for any KVM.
    Micro(Arc<TempDir>),
}

impl Kernel {
    /// A micro guest.
    pub fn micro(program: &Micro) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        program.write(&dir.path().join(MICRO))?;
        Ok(Self::Micro(Arc::new(dir)))
    }

    /// What it needs.
    pub fn needs(&self) -> Needs {
        match self {
            Self::Default | Self::Ring3 | Self::Micro(_) => Needs::AnyKvm,
            Self::Standard | Self::BzImage | Self::DebianCloud | Self::Path(_) => Needs::Hardware,
        }
    }

    /// `Default` made definite for a place.
    pub fn at(&self, place: &Place) -> Self {
        match self {
            Self::Default => Self::ours(place.acceleration()),
            other => other.clone(),
        }
    }

    /// Our own kernel in the flavour for this kind of KVM.
    pub fn ours(acceleration: Acceleration) -> Self {
        match acceleration {
            Acceleration::Hardware => Self::Standard,
            Acceleration::None => Self::Ring3,
        }
    }

    /// For people.
    pub fn describe(&self) -> String {
        match self {
            Self::Default => "our kernel".into(),
            Self::Standard => "standard kernel".into(),
            Self::BzImage => "standard kernel (bzImage)".into(),
            Self::Ring3 => "ring-3 kernel".into(),
            Self::DebianCloud => "Debian's cloud kernel".into(),
            Self::Path(path) => path.display().to_string(),
            Self::Micro(_) => "micro guest".into(),
        }
    }

    /// The kernel's file; built or downloaded when it is not in the cache.
    pub fn file(&self) -> Result<PathBuf> {
        let ours = |flavour| guest_images::kernel::build_or_cached(flavour, &mut Console::new());
        match self {
            Self::Default | Self::Standard => Ok(ours(Flavour::Standard)?.vmlinux),
            Self::BzImage => ours(Flavour::Standard)?.bzimage.context("the standard kernel has no bzImage"),
            Self::Ring3 => Ok(ours(Flavour::Ring3)?.vmlinux),
            Self::DebianCloud => Ok(DebianKernel::prepare()?.vmlinuz),
            Self::Path(path) => Ok(path.clone()),
            Self::Micro(dir) => Ok(dir.path().join(MICRO)),
        }
    }
}
