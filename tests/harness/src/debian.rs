//! Debian guests: the stock kernel, an initramfs that loads what it needs from a disk-less start, and a whole root file system
//! with systemd. All built without root, from the archive that this machine's apt uses.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::{cache, command, initramfs, packages};

mod kernel;

pub use kernel::DebianKernel;

/// What Debian has as modules and a guest of ours needs to reach its root file system and the network, and to hear the power
/// button: its root file system has none of its own.
const MODULES: [&str; 10] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "nd_pmem",
    "virtio_pmem",
    "ext4",
    "button",
    "evdev",
];
const INIT: &str = include_str!("debian/init.sh");
const CUSTOMIZE: &str = include_str!("debian/customize.sh");
/// Beyond Debian's essential packages.
const PACKAGES: &str = "systemd,systemd-sysv,udev,dbus,login,passwd,iproute2,iputils-ping,procps";
/// Size of the root file system, in the words of mkfs.ext4; nearly half of it is holes.
const SIZE: &str = "512M";

/// An initramfs for [`DebianKernel`]: loads the virtio modules, then mounts `root=` and hands over to its init, arguments included.
pub fn initrd() -> Result<PathBuf> {
    packages::ensure(&["busybox-static"])?;
    let kernel = DebianKernel::prepare()?;
    let recipe = format!("{} {MODULES:?} {INIT}", kernel.vmlinuz.display());
    let dir = cache::build_once("debian-initrd", &recipe, |dir| {
        let root = tempfile::tempdir_in(dir)?;
        let root = root.path();
        for name in ["bin", "etc", "proc", "sys", "dev", "root"] {
            fs::create_dir(root.join(name))?;
        }
        fs::copy(packages::find_program("busybox")?, root.join("bin/busybox"))?;
        fs::write(root.join("etc/modules"), kernel.install_modules(&MODULES, root)?.join("\n") + "\n")?;
        fs::write(root.join("init"), INIT)?;
        command::run(Command::new("chmod").arg("755").arg(root.join("init")))?;
        initramfs::pack(root, &dir.join("initrd.img"))
    })?;
    Ok(dir.join("initrd.img"))
}

/// An ext4 image of this machine's own Debian release, small, with systemd; root has no password. Shared: use a copy.
pub fn rootfs() -> Result<PathBuf> {
    packages::ensure(&["mmdebstrap", "e2fsprogs", "fakeroot", "uidmap"])?;
    let release = release()?;
    let recipe = format!("{release} {PACKAGES} {SIZE} {CUSTOMIZE}");
    let dir = cache::build_once("debian-rootfs", &recipe, |dir| {
        eprintln!("building a Debian {release} root file system (one to two minutes)");
        bootstrap(&release, dir)
    })?;
    Ok(dir.join("rootfs.ext4"))
}

fn bootstrap(release: &str, dir: &Path) -> Result<()> {
    let sources = dir.join("sources.list");
    fs::write(&sources, sources_list()?)?;
    let mut bootstrap = command::words("mmdebstrap --quiet --variant=essential");
    bootstrap
        .arg(format!("--include={PACKAGES}"))
        .args(["--aptopt=APT::Install-Recommends \"false\"", "--dpkgopt=force-unsafe-io"])
        .args(
            ["doc", "man", "locale", "info"]
                .map(|name| format!("--dpkgopt=path-exclude=/usr/share/{name}/*")),
        )
        .arg(format!("--customize-hook={CUSTOMIZE}"))
        .args([release, "root.tar", "-"])
        .stdin(Stdio::from(fs::File::open(&sources)?))
        .current_dir(dir);
    command::run(&mut bootstrap)?;
    // fakeroot keeps owners and device nodes without root.
    let pack = format!(
        "PATH=$PATH:/usr/sbin:/sbin; mkdir root && tar xpf root.tar -C root && \
         mkfs.ext4 -q -F -m 0 -d root rootfs.ext4 {SIZE} && rm -r root root.tar sources.list"
    );
    command::run(Command::new("fakeroot").args(["sh", "-c", &pack]).current_dir(dir))
}

/// The release that this machine runs, by name: what its apt offers and has keys for.
fn release() -> Result<String> {
    let file = fs::read_to_string("/etc/os-release").context("/etc/os-release")?;
    let name = file.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name
        .context("/etc/os-release names no VERSION_CODENAME: the Debian guest is built on Debian")?
        .to_owned())
}

/// The archives of this machine's own apt.
fn sources_list() -> Result<String> {
    let mut targets = command::words("apt-get indextargets --format");
    let list =
        command::output(targets.args(["deb $(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]))?;
    let mut lines: Vec<&str> = list.lines().collect();
    lines.sort_unstable();
    lines.dedup();
    Ok(lines.join("\n") + "\n")
}
