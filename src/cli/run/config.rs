//! From flags and a configuration file to one machine.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use vmm_core::VmConfig;
use vmm_core::config::{ConfigError, SerialConfig, split_command_line};
use vmm_core::devices::params::{self, ParamError};
use vmm_core::devices::registry::{DeviceConfig, KINDS};
use vmm_core::devices::virtio::block;

use super::{RunArgs, quote};
use crate::config_file::ConfigFile;
use crate::exit::UsageError;

/// By which a guest finds its root disk in /dev/disk/by-id.
const ROOT_ID: &str = "rootfs";

/// The value of `--rootfs`: a disk.
pub fn parse_root_disk(text: &str) -> Result<block::Config, ParamError> {
    Ok(as_root(params::from_str(text, Some("path"))?))
}

/// The root disk on the image at `path`, with nothing else chosen.
pub fn root_disk(path: &Path) -> DeviceConfig {
    DeviceConfig::Disk(as_root(block::Config::new(path)))
}

fn as_root(mut disk: block::Config) -> block::Config {
    disk.root = true;
    disk.id.get_or_insert_with(|| ROOT_ID.into());
    disk
}

/// The machine that `args` and `file` describe. Flags win, and device flags add.
pub fn merge(args: &RunArgs, file: ConfigFile) -> Result<VmConfig, UsageError> {
    let ConfigFile { mut config, lists_devices } = file;
    replace(&mut config.kernel, args.kernel.clone().map(Some));
    replace(&mut config.initrd, args.initrd.clone().map(Some));
    replace(&mut config.cmdline, args.cmdline.clone().map(Some));
    replace(&mut config.append, args.append.clone().map(Some));
    replace(&mut config.cpus, args.cpus);
    replace(&mut config.cpu_profile, args.cpu_profile.clone());
    replace(&mut config.memory, args.memory);
    replace(&mut config.hugepages, args.hugepages);
    config.mem_prealloc |= args.mem_prealloc;
    config.mem_shared |= args.mem_shared;
    config.track_dirty |= args.track_dirty;
    replace(&mut config.boot_protocol, args.boot_protocol);
    replace(&mut config.transport, args.transport);
    replace(&mut config.serial, args.serial.clone());
    add_command(args, &mut config)?;

    let devices = &mut config.devices;
    if let Some(disk) = &args.rootfs {
        devices.retain(|device| !device.is_root());
        devices.insert(0, DeviceConfig::Disk(disk.clone()));
    }
    if args.no_rootfs {
        devices.retain(|device| !device.is_root());
    }
    devices.retain(|device| !args.devices.removed.contains(&device.kind()));
    for device in &args.devices.added {
        // Of a kind that is there anyway, a flag says how it is to be.
        if KINDS.iter().any(|kind| kind.name == device.kind() && kind.on_by_default) {
            devices.retain(|other| other.kind() != device.kind());
        }
        devices.push(device.clone());
    }
    if !lists_devices {
        for kind in KINDS.iter().filter(|kind| kind.on_by_default) {
            let there = devices.iter().any(|device| device.kind() == kind.name);
            if !there && !args.devices.removed.contains(&kind.name) {
                devices.push((kind.parse)("").map_err(|error| UsageError(error.to_string()))?);
            }
        }
    }
    Ok(config)
}

fn replace<T>(value: &mut T, flag: Option<T>) {
    if let Some(flag) = flag {
        *value = flag;
    }
}

/// Adds `parameters` to the kernel command line, before what else is added.
pub fn append_first(config: &mut VmConfig, parameters: &str) {
    let append = config.append.take().unwrap_or_default();
    config.append = Some(format!("{parameters} {append}").trim_end().into());
}

/// Checks what can be checked without opening anything. `own_root`: it gets this project's own root disk, too.
pub fn validate(config: &VmConfig, own_root: bool) -> anyhow::Result<()> {
    let mut whole = config.clone();
    if own_root {
        // Nothing that is checked depends on where its image will be.
        whole.devices.insert(0, root_disk(Path::new("rootfs")));
    }
    match whole.validate() {
        Ok(()) | Err(ConfigError::NoKernel) => Ok(()),
        Err(error @ ConfigError::TooManyDevices { .. }) if own_root => Err(UsageError(format!(
            "{error}, and one is this project's own root disk; --no-rootfs leaves it out"
        ))
        .into()),
        Err(error) => Err(error.into()),
    }
}

/// Refuses a file for a console that the machine is made of, because a console's is emptied. `file`: that of the
/// configuration.
pub fn spare_own_files(config: &VmConfig, file: Option<&Path>) -> Result<(), UsageError> {
    let disks = config.devices.iter().filter_map(|device| match device {
        DeviceConfig::Disk(disk) => Some((format!("disk '{}'", disk.path.display()), disk.path.as_path())),
        DeviceConfig::Pmem(pmem) => Some((format!("image '{}'", pmem.path.display()), pmem.path.as_path())),
        _ => None,
    });
    let files =
        [("kernel", config.kernel.as_deref()), ("initrd", config.initrd.as_deref()), ("configuration", file)];
    let files = files.into_iter().filter_map(|(what, path)| Some((what.to_owned(), path?)));
    let files: Vec<_> = files.chain(disks).filter_map(|(what, path)| Some((what, identity(path)?))).collect();
    for (flag, console) in emptied(config) {
        let ours = identity(console);
        if let Some((what, _)) = files.iter().find(|(_, theirs)| Some(*theirs) == ours) {
            return Err(UsageError(format!(
                "the console would overwrite '{}', which is the machine's {what}; give {flag} another file",
                console.display()
            )));
        }
    }
    Ok(())
}

/// Files that a machine empties, with the flags that name them.
fn emptied(config: &VmConfig) -> impl Iterator<Item = (&'static str, &Path)> {
    let serial = match &config.serial {
        SerialConfig::File(path) => Some(("--serial", path.as_path())),
        SerialConfig::Stdio | SerialConfig::Null => None,
    };
    let consoles = config.devices.iter().filter_map(|device| match device {
        DeviceConfig::Console(console) => Some(("--console", console.file.as_deref()?)),
        _ => None,
    });
    serial.into_iter().chain(consoles)
}

/// What two names of one file or block device have in common; `None` for what cannot be overwritten.
fn identity(path: &Path) -> Option<(bool, u64, u64)> {
    let meta = fs::metadata(path).ok()?;
    match meta.file_type() {
        kind if kind.is_file() => Some((true, meta.dev(), meta.ino())),
        kind if kind.is_block_device() => Some((false, meta.rdev(), 0)),
        _ => None,
    }
}

/// Puts the command behind ` -- ` on the kernel command line.
fn add_command(args: &RunArgs, config: &mut VmConfig) -> Result<(), UsageError> {
    if args.command.is_empty() {
        return Ok(());
    }
    let taken = [&config.cmdline, &config.append];
    if taken.into_iter().flatten().any(|line| split_command_line(line).1.is_some()) {
        return Err(UsageError(
            "the kernel command line already says what init runs; leave out its '--', or the command".into(),
        ));
    }
    let command = quote::init_arguments(&args.command)?;
    let append = config.append.take().unwrap_or_default();
    config.append = Some(format!("{append} -- {command}").trim_start().into());
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches, Parser};
    use vmm_core::config::SerialConfig;
    use vmm_core::devices::size::ByteSize;

    use super::*;

    #[derive(Parser)]
    struct Run {
        #[command(flatten)]
        args: RunArgs,
    }

    /// The configuration that `flags` and a file in JSON make.
    fn machine(file: Option<&str>, flags: &[&str]) -> Result<VmConfig, String> {
        let file = file.map_or_else(ConfigFile::default, |text| ConfigFile {
            config: serde_json::from_str(text).unwrap(),
            lists_devices: text.contains("devices"),
        });
        let matches = Run::command().try_get_matches_from(["run"].iter().chain(flags));
        let run = matches.and_then(|m| Run::from_arg_matches(&m)).map_err(|e| e.to_string())?;
        merge(&run.args, file).map_err(|e| e.to_string())
    }

    /// The devices, each as kind and, for disks, path.
    fn devices(config: &VmConfig) -> Vec<String> {
        let describe = |device: &DeviceConfig| match device {
            DeviceConfig::Disk(disk) => {
                format!("disk {}{}", disk.path.display(), if disk.root { " root" } else { "" })
            }
            other => other.kind().into(),
        };
        config.devices.iter().map(describe).collect()
    }

    const FILE: &str = r#"{"kernel": "k", "cpus": 4, "memory": "1G", "serial": "null", "append": "a",
        "devices": [{"kind": "disk", "path": "r", "root": true}, {"kind": "disk", "path": "d"}]}"#;

    #[test]
    fn flags_win_over_the_file() {
        let config = machine(Some(FILE), &["--cpus", "2", "--serial", "file=x", "--append", "b"]).unwrap();
        assert_eq!((config.cpus, config.memory), (2, ByteSize(1 << 30)));
        assert_eq!(config.serial, SerialConfig::File("x".into()));
        assert_eq!(config.append.as_deref(), Some("b"));
        assert_eq!(config.kernel.as_deref(), Some(Path::new("k")));
    }

    #[test]
    fn device_flags_add_to_the_file_and_rootfs_replaces() {
        let config = machine(Some(FILE), &["--disk", "e", "--rootfs", "n,ro", "--rng"]).unwrap();
        assert_eq!(devices(&config), ["disk n root", "disk d", "disk e", "rng"]);
        let DeviceConfig::Disk(root) = &config.devices[0] else { panic!("a disk") };
        assert_eq!((root.ro, root.id.as_deref()), (true, Some("rootfs")));
        assert_eq!(devices(&machine(Some(FILE), &["--no-rootfs"]).unwrap()), ["disk d"]);
        let pmem = r#"{"devices": [{"kind": "pmem", "path": "r", "root": true}]}"#;
        assert_eq!(devices(&machine(Some(pmem), &["--rootfs", "n"]).unwrap()), ["disk n root"]);
        assert_eq!(devices(&machine(Some(pmem), &["--no-rootfs"]).unwrap()), [""; 0]);
    }

    #[test]
    fn devices_come_in_the_order_of_their_flags() {
        let flags = ["--net", "tap=t", "--disk", "path=a", "--rng", "--net", "tap=u", "--disk", "b,ro"];
        let want = ["net", "disk a", "rng", "net", "disk b", "balloon"];
        assert_eq!(devices(&machine(None, &flags).unwrap()), want);
    }

    #[test]
    fn what_is_on_by_default_can_be_left_out() {
        assert_eq!(devices(&machine(None, &[]).unwrap()), ["rng", "balloon"]);
        assert_eq!(devices(&machine(None, &["--rng"]).unwrap()), ["rng", "balloon"]);
        assert_eq!(devices(&machine(None, &["--balloon", "64M"]).unwrap()), ["balloon", "rng"]);
        assert_eq!(devices(&machine(None, &["--no-rng"]).unwrap()), ["balloon"]);
        assert_eq!(devices(&machine(None, &["--no-rng", "--no-balloon"]).unwrap()), [""; 0]);
        assert!(machine(None, &["--rng", "--no-rng"]).is_err());
        let with = r#"{"devices": [{"kind": "rng"}]}"#;
        assert_eq!(devices(&machine(Some(with), &["--no-rng"]).unwrap()), [""; 0]);
        assert_eq!(devices(&machine(Some(with), &["--rng"]).unwrap()), ["rng"]);
        assert_eq!(devices(&machine(Some(r#"{"devices": []}"#), &[]).unwrap()), [""; 0]);
    }

    #[test]
    fn a_command_goes_behind_what_is_added() {
        let line = |flags: &[&str]| machine(None, flags).map(|config| config.append.unwrap_or_default());
        assert_eq!(line(&["--", "sh", "-c", "a b"]).unwrap(), "-- sh -c \"a b\"");
        assert_eq!(line(&["--append", "x=1", "--", "ls"]).unwrap(), "x=1 -- ls");
        assert_eq!(line(&["--append", "x=1 -- ls"]).unwrap(), "x=1 -- ls");
        let error = line(&["--append", "x=1 -- ls", "--", "ls"]).unwrap_err();
        assert!(error.contains("already says what init runs"), "{error}");
    }
}
