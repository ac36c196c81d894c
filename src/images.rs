//! What a guest gets that was given no kernel or no root file system: this project's own, from guest-images.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

use anyhow::Context;
use guest_images::kernel::{self, Flavour};
use guest_images::progress::{Console, Progress};
use guest_images::rootfs;

use vmm_core::devices::registry::DeviceConfig;
use vmm_core::devices::storage;
use vmm_core::hypervisor::kvm::KvmHypervisor;
use vmm_core::{Vm, VmConfig};

use crate::cli::say;

/// What the choice of the ring-3 kernel means; 'vmm check' says more.
const RING3: &str = "this host's processors offer no VMX or SVM, so the guest boots the ring-3 kernel: it uses one vCPU, runs \
                     64-bit programs only and does not protect itself from them; the VM's own boundary is as strong as ever";

/// Chooses the kernel for a machine that has none; builds it when it is not in the cache.
pub fn provide_kernel(config: &mut VmConfig, quiet: bool) -> anyhow::Result<()> {
    if config.kernel.is_none() {
        let flavour = Flavour::for_host();
        let first_time = kernel::cached(flavour).is_none();
        if first_time {
            // A build takes minutes: what is wrong is better said before. Else it is said soon enough, and nothing is
            // opened twice, which a reader of a FIFO would notice, and which starts passt twice.
            Vm::builder(config.clone()).check()?;
            KvmHypervisor::open()?;
        }
        let built = kernel::build_or_cached(flavour, &mut *progress(quiet))?;
        if flavour == Flavour::Ring3 {
            // Where it is news: at the first time, and to who asks for more.
            match (first_time || config.cpus > 1) && !quiet {
                true => say(RING3),
                false => tracing::info!("{RING3}"),
            }
        }
        config.kernel = Some(built.vmlinux);
    }
    Ok(())
}

/// Whether a machine is one that gets our root file system.
pub fn wants_root(config: &VmConfig) -> bool {
    config.initrd.is_none() && !config.devices.iter().any(DeviceConfig::is_root)
}

/// Gives a machine a root disk that ends with it. The file is to be kept until the machine is built.
pub fn provide_root(config: &mut VmConfig, quiet: bool) -> anyhow::Result<File> {
    let image = rootfs::demo(&mut *progress(quiet))?;
    let copy = File::open(&image).and_then(|file| storage::private_copy(&image, file.as_fd()));
    let copy = copy.with_context(|| format!("cannot copy '{}'", image.display()))?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", copy.as_raw_fd()));
    config.devices.insert(0, crate::cli::root_disk(&path));
    Ok(copy)
}

fn progress(quiet: bool) -> Box<dyn Progress> {
    match quiet {
        true => Box::new(()),
        false => Box::new(Console::new()),
    }
}
