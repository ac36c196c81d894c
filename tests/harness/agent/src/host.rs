//! Sets the lab host up: file systems, modules, network.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

/// Modules to load at start, one path a line, what others need first. Written by the harness.
const MODULES: &str = "/etc/modules-at-start";

/// Brings a freshly booted kernel to the state in which requests make sense.
pub fn set_up() -> Result<()> {
    mount_file_systems()?;
    let modules = fs::read_to_string(MODULES).context(MODULES)?;
    for module in modules.lines() {
        load_module(Path::new(module)).with_context(|| format!("load {module}"))?;
    }
    // A guest's memory is reserved at its full size and touched little: let it be larger than this host's.
    fs::write("/proc/sys/vm/overcommit_memory", "1").context("allow overcommitted memory")?;
    fs::write("/proc/sys/kernel/hostname", "lab").context("set the host name")?;
    run("ip link set lo up")?;
    run("ip addr add 10.0.2.15/24 dev eth0")?;
    run("ip link set eth0 up")?;
    mount_one("/dev/vda", "/scratch", "ext4")
}

/// Ends the lab host at once: nothing in it is worth keeping.
pub fn power_off() {
    let _ = reboot(RebootCommand::PowerOff);
    let _ = reboot(RebootCommand::Restart);
}

/// The value of a kernel parameter, named with its equals sign.
pub fn parameter(name: &str) -> Option<String> {
    let line = fs::read_to_string("/proc/cmdline").ok()?;
    line.split_whitespace().find_map(|word| word.strip_prefix(name)).map(str::to_owned)
}

fn mount_file_systems() -> Result<()> {
    mount_one("proc", "/proc", "proc")?;
    mount_one("sys", "/sys", "sysfs")?;
    // The kernel mounts devtmpfs by itself only over a root file system on a disk.
    mount_one("dev", "/dev", "devtmpfs")?;
    mount_one("pts", "/dev/pts", "devpts")?;
    mount_one("shm", "/dev/shm", "tmpfs")?;
    mount_one("run", "/run", "tmpfs")?;
    mount_one("tmp", "/tmp", "tmpfs")?;
    mount_one("cgroup", "/sys/fs/cgroup", "cgroup2")
}

fn mount_one(source: &str, target: &str, kind: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("create {target}"))?;
    mount(source, target, kind, MountFlags::empty(), None)
        .with_context(|| format!("mount {kind} on {target}"))
}

fn load_module(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    match rustix::system::finit_module(file, c"", 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn run(line: &str) -> Result<()> {
    let mut words = line.split(' ');
    let status =
        Command::new(words.next().unwrap_or_default()).args(words).status().context(line.to_owned())?;
    ensure!(status.success(), "{line}: {status}");
    Ok(())
}
