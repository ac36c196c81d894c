//! What the lab host boots: Debian's kernel and an initramfs with busybox, iproute2, modules and the agent.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::debian::DebianKernel;
use crate::{binaries, cache, command, initramfs, packages};

/// Installed on the build machine, for the lab.
const PACKAGES: [&str; 4] = ["qemu-system-x86", "busybox-static", "e2fsprogs", "iproute2"];
/// Loaded as the lab host starts.
const MODULES: [&str; 5] = ["virtio_pci", "virtio_blk", "virtio_net", "kvm-amd", "tun"];
/// There to be loaded with `modprobe`.
const MORE_MODULES: [&str; 6] = ["loop", "overlay", "bridge", "veth", "vhost_net", "vhost_vsock"];
/// Programs of the build machine that go into the lab host in place of busybox's, with the libraries they need: busybox would
/// prefer its own `ip` to any other, from its shell and its `unshare`, and that knows no tap.
const PROGRAMS: [&str; 4] = ["ip", "sh", "unshare", "nsenter"];
/// To be counted up when what `build` does changes.
const FORMAT: u32 = 1;

/// The files that a lab host boots from.
#[derive(Clone, Debug)]
pub struct Image {
    /// Debian's kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

/// Builds the lab host's image, or takes it from the cache.
pub fn prepare() -> Result<Image> {
    packages::ensure(&PACKAGES)?;
    let kernel = DebianKernel::prepare()?;
    let agent = binaries::build(&["--package", "lab-agent"])?;
    let recipe = format!(
        "format {FORMAT}, {}, {MODULES:?} {MORE_MODULES:?} {PROGRAMS:?}, agent {}",
        kernel.vmlinuz.display(),
        super::content_hash(&agent)?
    );
    let dir = cache::build_once("lab", &recipe, |dir| {
        eprintln!("building the lab host's image");
        build(&kernel, &agent, dir)
    })?;
    Ok(Image { kernel: kernel.vmlinuz, initrd: dir.join("initrd.img") })
}

fn build(kernel: &DebianKernel, agent: &Path, dir: &Path) -> Result<()> {
    let root = tempfile::tempdir_in(dir)?;
    let root = root.path();
    for name in ["bin", "sbin", "etc", "root"] {
        fs::create_dir(root.join(name))?;
    }
    fs::copy(agent, root.join("init"))?;
    let busybox = packages::find_program("busybox")?;
    fs::copy(&busybox, root.join("bin/busybox"))?;
    for program in PROGRAMS {
        copy_program(program, root)?;
    }
    for applet in command::output(Command::new(&busybox).arg("--list"))?.lines() {
        let link = root.join("bin").join(applet);
        if !link.exists() {
            symlink("busybox", link)?;
        }
    }
    let at_start = kernel.install_modules(&MODULES, root)?;
    fs::write(root.join("etc/modules-at-start"), at_start.join("\n"))?;
    kernel.install_modules(&MORE_MODULES, root)?;
    let depmod = packages::find_program("depmod")?;
    command::run(Command::new(depmod).arg("-b").arg(root).arg(&kernel.release))?;
    initramfs::pack(root, &dir.join("initrd.img"))
}

/// Copies a program and the shared libraries that it is linked with.
fn copy_program(name: &str, root: &Path) -> Result<()> {
    let program = packages::find_program(name)?;
    fs::copy(&program, root.join("bin").join(name))?;
    let linked = command::output(Command::new("ldd").arg(&program))?;
    for library in linked.split_whitespace().filter(|word| word.starts_with('/')) {
        let target = root.join(&library[1..]);
        fs::create_dir_all(target.parent().context("library without a directory")?)?;
        fs::copy(library, target).with_context(|| format!("copy {library}"))?;
    }
    Ok(())
}
