//! `cargo xtask images`: everything that takes long to build, into the cache.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use harness::{Kernel, debian, lab, local_kvm};

/// Build guest kernels, root file systems and the lab's image, as far as they are not in the cache
#[derive(clap::Args)]
pub struct Images {}

impl Images {
    /// Builds all of them.
    pub fn run(self) -> Result<ExitCode> {
        let began = Instant::now();
        local()?;
        for_lab()?;
        eprintln!(
            "all images are in {} ({:.0} s)",
            harness::cache::directory()?.display(),
            began.elapsed().as_secs_f32()
        );
        Ok(ExitCode::SUCCESS)
    }
}

/// What guests on this machine's KVM need.
pub fn local() -> Result<()> {
    if let Some(acceleration) = local_kvm() {
        Kernel::ours(acceleration).file()?;
    }
    harness::demo_image()?;
    harness::tools_image()?;
    Ok(())
}

/// What the lab needs, and guests in it.
pub fn for_lab() -> Result<()> {
    lab::prepare()?;
    Kernel::Standard.file()?;
    Kernel::BzImage.file()?;
    debian::initrd()?;
    debian::rootfs()?;
    Ok(())
}
