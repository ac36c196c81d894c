//! From flags and a configuration file to one machine.

use std::path::Path;

use vmm_core::VmConfig;
use vmm_core::devices::params::{self, ParamError};
use vmm_core::devices::registry::{DeviceConfig, KINDS};
use vmm_core::devices::virtio::block;

use super::{RunArgs, quote};
use crate::config_file::ConfigFile;
use crate::exit::UsageError;

/// By which a guest finds its root disk in /dev/disk/by-id.
const ROOT_ID: &str = "rootfs";

/// The value of `--rootfs`: a disk.
pub fn root_disk(text: &str) -> Result<block::Config, ParamError> {
    Ok(as_root(params::from_str(text, Some("path"))?))
}

/// The root disk on the image at `path`, with nothing else chosen.
pub fn default_root_disk(path: &Path) -> DeviceConfig {
    DeviceConfig::Disk(as_root(block::Config::new(path)))
}

fn as_root(mut disk: block::Config) -> block::Config {
    disk.root = true;
    disk.id.get_or_insert_with(|| ROOT_ID.into());
    disk
}

fn is_root(device: &DeviceConfig) -> bool {
    matches!(device, DeviceConfig::Disk(disk) if disk.root)
}

/// The machine that `args` and `file` describe. Flags win, and device flags add.
pub fn merge(args: &RunArgs, file: ConfigFile) -> Result<VmConfig, UsageError> {
    let ConfigFile { mut config, lists_devices } = file;
    replace(&mut config.kernel, args.kernel.clone().map(Some));
    replace(&mut config.initrd, args.initrd.clone().map(Some));
    replace(&mut config.cmdline, args.cmdline.clone().map(Some));
    replace(&mut config.append, args.append.clone().map(Some));
    replace(&mut config.cpus, args.cpus);
    replace(&mut config.memory, args.memory);
    replace(&mut config.boot_protocol, args.boot_protocol);
    replace(&mut config.serial, args.serial.clone());
    add_command(args, &mut config)?;

    let devices = &mut config.devices;
    if let Some(disk) = &args.rootfs {
        devices.retain(|device| !is_root(device));
        devices.insert(0, DeviceConfig::Disk(disk.clone()));
    }
    if args.no_rootfs {
        devices.retain(|device| !is_root(device));
    }
    devices.retain(|device| !args.devices.removed.contains(&device.kind()));
    for device in &args.devices.added {
        let is_switch = KINDS.iter().any(|kind| kind.name == device.kind() && kind.syntax.is_empty());
        if !is_switch || !devices.contains(device) {
            devices.push(device.clone());
        }
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

/// Puts the command behind ` -- ` on the kernel command line.
fn add_command(args: &RunArgs, config: &mut VmConfig) -> Result<(), UsageError> {
    if args.command.is_empty() {
        return Ok(());
    }
    let taken = [&config.cmdline, &config.append];
    if taken.into_iter().flatten().any(|line| quote::has_init_arguments(line)) {
        return Err(UsageError(
            "the kernel command line already says what init runs; leave out its ' -- ', or the command"
                .into(),
        ));
    }
    let command = quote::init_arguments(&args.command)?;
    let append = config.append.take().unwrap_or_default();
    config.append = Some(format!("{append} -- {command}").trim_start().into());
    Ok(())
}
