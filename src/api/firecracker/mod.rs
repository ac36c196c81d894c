//! Firecracker's API: its paths, bodies, answers, and what may be done before and after the start.

pub mod convert;
mod snapshot;
pub mod types;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use serde_json::Value;
use utoipa::openapi::HttpMethod::{Get, Patch, Put};
use vmm_core::devices::registry::Patch as DevicePatch;
use vmm_core::{VmConfig, VmState};

use super::control::Control;
use super::http::{Calls, Json, Refusal, Request};
use types::{
    Action, ActionType, Balloon, BalloonStatistics, BalloonStatsUpdate, BalloonUpdate, BootSource,
    CpuTemplate, Drive, DriveUpdate, Entropy, FirecrackerVersion, FullConfiguration, InstanceInfo, Logger,
    MachineConfiguration, MachineConfigurationUpdate, Metrics, MmdsConfig, MmdsContents, NetworkInterface,
    NetworkInterfaceUpdate, Pmem, PmemUpdate, Serial, Vm, VmTarget, Vsock,
};

/// The version of Firecracker whose API this is.
pub const VERSION: &str = "1.12.0";

/// By what the API calls devices, by their names in the machine.
pub type Aliases = BTreeMap<String, String>;

type Done = Result<(), Refusal>;
type Answer<T> = Result<Json<T>, Refusal>;

/// Adds Firecracker's calls.
pub fn calls(calls: Calls<Control>) -> Calls<Control> {
    calls
        .call(Get, "/", "The machine's name and state", instance_info)
        .call(Get, "/version", "The version of Firecracker that this stands in for", version)
        .call(Get, "/vm/config", "Everything that is configured", configuration)
        .call(Get, "/machine-config", "vCPUs and memory", machine_config)
        .call(Put, "/machine-config", "Sets vCPUs and memory, before the start", put_machine_config)
        .call(Patch, "/machine-config", "Changes some of it, before the start", patch_machine_config)
        .call(Put, "/boot-source", "Sets what the guest boots, before the start", put_boot_source)
        .call(Put, "/drives/{id}", "Adds or replaces a disk, before the start", put_drive)
        .call(Patch, "/drives/{id}", "Changes a disk's image or limits, after the start", patch_drive)
        .call(
            Put,
            "/network-interfaces/{id}",
            "Adds or replaces an interface, before the start",
            put_interface,
        )
        .call(
            Patch,
            "/network-interfaces/{id}",
            "Changes an interface's limits, after the start",
            patch_interface,
        )
        .call(Put, "/pmem/{id}", "Adds or replaces a disk image as memory, before the start", put_pmem)
        .call(Patch, "/pmem/{id}", "Changes its limits, after the start", patch_pmem)
        .call(Put, "/mmds/config", "Sets how guests ask for metadata, before the start", put_mmds_config)
        .call(Get, "/mmds", "The metadata", metadata)
        .call(Put, "/mmds", "Sets the metadata", put_metadata)
        .call(Patch, "/mmds", "Changes the metadata, as RFC 7396 has it", patch_metadata)
        .call(Put, "/vsock", "Adds sockets between host and guest, before the start", put_vsock)
        .call(Get, "/balloon", "The balloon", balloon)
        .call(Put, "/balloon", "Adds a balloon, before the start", put_balloon)
        .call(Patch, "/balloon", "Changes the balloon's size, after the start", patch_balloon)
        .call(Get, "/balloon/statistics", "What the guest says of its memory", balloon_statistics)
        .call(
            Patch,
            "/balloon/statistics",
            "Changes how often it is asked, after the start",
            patch_balloon_statistics,
        )
        .call(Put, "/entropy", "Adds a source of random numbers, before the start", put_entropy)
        .call(Put, "/serial", "Sets where the console goes, before the start", put_serial)
        .call(Put, "/logger", "Sets where log lines go, before the start", put_logger)
        .call(Put, "/metrics", "Sets where metrics go, before the start", put_metrics)
        .call(Put, "/actions", "Does something", put_actions)
        .call(Put, "/snapshot/create", "Saves the paused machine in two files", snapshot::create)
        .call(Put, "/snapshot/load", "Makes the machine that was saved, in place of a start", snapshot::load)
        .call(Patch, "/vm", "Pauses the machine, or lets it go on", patch_vm)
}

/// What Firecracker has at a path and we do not, with its verb.
pub fn missing(method: &str, path: &str) -> Option<&'static str> {
    let first = path.split('/').nth(1)?;
    Some(match (method, first) {
        (_, "cpu-config") => "custom processor templates are",
        (_, "hotplug") => "plugging in memory while the machine runs is",
        (_, "balloon") if path.starts_with("/balloon/hinting/") => "free page hinting is",
        ("DELETE", "drives" | "pmem" | "network-interfaces") => "taking a device away is",
        _ => return None,
    })
}

fn instance_info(control: &Control, _: Request<()>) -> Answer<InstanceInfo> {
    Ok(Json(InstanceInfo {
        app_name: "Firecracker".into(),
        id: control.id.clone(),
        state: control.state_name().into(),
        vmm_version: VERSION.into(),
    }))
}

fn version(_: &Control, _: Request<()>) -> Answer<FirecrackerVersion> {
    Ok(Json(FirecrackerVersion { firecracker_version: VERSION.into() }))
}

fn configuration(control: &Control, _: Request<()>) -> Answer<FullConfiguration> {
    Ok(Json(control.configuration()))
}

fn machine_config(control: &Control, _: Request<()>) -> Answer<MachineConfiguration> {
    Ok(Json(control.configuration().machine_config))
}

fn put_machine_config(control: &Control, request: Request<Json<MachineConfiguration>>) -> Done {
    set_machine_config(control, |_| request.body.0)
}

fn patch_machine_config(control: &Control, request: Request<Json<MachineConfigurationUpdate>>) -> Done {
    let update = request.body.0;
    set_machine_config(control, |old| MachineConfiguration {
        vcpu_count: update.vcpu_count.unwrap_or(old.vcpu_count),
        mem_size_mib: update.mem_size_mib.unwrap_or(old.mem_size_mib),
        smt: update.smt.unwrap_or(old.smt),
        cpu_template: update.cpu_template.or(old.cpu_template),
        track_dirty_pages: update.track_dirty_pages.unwrap_or(old.track_dirty_pages),
        huge_pages: update.huge_pages.unwrap_or(old.huge_pages),
    })
}

fn set_machine_config(
    control: &Control,
    change: impl FnOnce(&MachineConfiguration) -> MachineConfiguration,
) -> Done {
    control.configure(|configuration| {
        let new = change(&configuration.machine_config);
        if new.cpu_template.is_some_and(|template| template != CpuTemplate::None) {
            return Err("cpu_template is not supported; guests see the host's processor.".into());
        }
        let memory = convert::mebibytes(new.mem_size_mib).map_err(Refusal)?;
        // Whether such a machine can be, but for its kernel.
        let machine =
            VmConfig { kernel: Some("kernel".into()), cpus: new.vcpu_count, memory, ..VmConfig::default() };
        machine.validate()?;
        configuration.machine_config = new;
        Ok(())
    })
}

fn put_boot_source(control: &Control, request: Request<Json<BootSource>>) -> Done {
    let boot = request.body.0;
    control.configure(|configuration| {
        readable("The kernel file", &boot.kernel_image_path)?;
        boot.initrd_path.as_deref().map_or(Ok(()), |path| readable("The initrd file", path))?;
        configuration.boot_source = Some(boot);
        Ok(())
    })
}

fn readable(what: &str, path: &Path) -> Done {
    // Without waiting for the other end of what turns out to be a FIFO.
    let file = File::options().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path);
    match file.and_then(|file| file.metadata()).map(|meta| meta.file_type()) {
        Ok(kind) if kind.is_file() || kind.is_block_device() => Ok(()),
        Ok(kind) if kind.is_dir() => Err(format!("{what} '{}' is a directory.", path.display()).into()),
        Ok(_) => Err(format!("{what} '{}' is neither a file nor a block device.", path.display()).into()),
        Err(error) => Err(format!("{what} '{}' cannot be opened: {error}.", path.display()).into()),
    }
}

fn same_id(path: &str, body: &str) -> Done {
    match path == body {
        true => Ok(()),
        false => {
            Err(format!("The id from the path [{path}] does not match the id from the body [{body}]!").into())
        }
    }
}

/// Adds `new`, or puts it in the place of the one with the same key.
fn put<T>(list: &mut Vec<T>, new: T, key: impl Fn(&T) -> &str) {
    match list.iter().position(|old| key(old) == key(&new)) {
        Some(at) => list[at] = new,
        None => list.push(new),
    }
}

fn put_drive(control: &Control, Request { id, body: Json(drive) }: Request<Json<Drive>>) -> Done {
    same_id(&id, &drive.drive_id)?;
    control.configure(|configuration| {
        let other_root = |other: &Drive| other.is_root_device && other.drive_id != id;
        if drive.is_root_device && configuration.drives.iter().any(other_root) {
            return Err("A root block device already exists!".into());
        }
        if let Some(path) = &drive.path_on_host {
            readable("The disk", path)?;
        }
        put(&mut configuration.drives, drive, |drive| &drive.drive_id);
        Ok(())
    })
}

fn patch_drive(control: &Control, Request { id, body: Json(update) }: Request<Json<DriveUpdate>>) -> Done {
    same_id(&id, &update.drive_id)?;
    let mut patch = convert::limits_patch("", update.rate_limiter);
    patch.extend(update.path_on_host.as_ref().map(|path| ("path".to_owned(), path.to_string_lossy().into())));
    control.update("drive", &id, patch)
}

fn put_interface(
    control: &Control,
    Request { id, body: Json(interface) }: Request<Json<NetworkInterface>>,
) -> Done {
    same_id(&id, &interface.iface_id)?;
    control.configure(|configuration| {
        let others = || configuration.network_interfaces.iter().filter(|other| other.iface_id != id);
        if let Some(mac) = &interface.guest_mac {
            mac.parse::<vmm_core::devices::virtio::net::MacAddr>()?;
            if others()
                .any(|other| other.guest_mac.as_ref().is_some_and(|other| other.eq_ignore_ascii_case(mac)))
            {
                return Err(format!("The MAC address is already in use: {mac}").into());
            }
        }
        if others().any(|other| other.host_dev_name == interface.host_dev_name) {
            return Err(format!("The host device name is already in use: {}", interface.host_dev_name).into());
        }
        put(&mut configuration.network_interfaces, interface, |interface| &interface.iface_id);
        Ok(())
    })
}

fn patch_interface(
    control: &Control,
    Request { id, body: Json(update) }: Request<Json<NetworkInterfaceUpdate>>,
) -> Done {
    same_id(&id, &update.iface_id)?;
    let mut patch = convert::limits_patch("rx_", update.rx_rate_limiter);
    patch.extend(convert::limits_patch("tx_", update.tx_rate_limiter));
    control.update("network interface", &id, patch)
}

fn put_pmem(control: &Control, Request { id, body: Json(memory) }: Request<Json<Pmem>>) -> Done {
    same_id(&id, &memory.id)?;
    control.configure(|configuration| {
        readable("The image", &memory.path_on_host)?;
        put(&mut configuration.pmem, memory, |memory| &memory.id);
        Ok(())
    })
}

fn patch_pmem(control: &Control, Request { id, body: Json(update) }: Request<Json<PmemUpdate>>) -> Done {
    same_id(&id, &update.id)?;
    let mut patch = convert::limits_patch("", update.rate_limiter);
    // What the guest reads and writes is not seen by anybody.
    patch.remove("bandwidth");
    control.update("persistent memory", &id, patch)
}

fn put_mmds_config(control: &Control, request: Request<Json<MmdsConfig>>) -> Done {
    control.configure(|configuration| {
        let mmds = request.body.0;
        mmds.check(&configuration.network_interfaces).map_err(Refusal)?;
        configuration.mmds_config = Some(mmds);
        Ok(())
    })
}

fn metadata(control: &Control, _: Request<()>) -> Answer<MmdsContents> {
    Ok(Json(control.metadata().unwrap_or_default()))
}

fn put_metadata(control: &Control, request: Request<Json<MmdsContents>>) -> Done {
    control.set_metadata(|_| Ok(request.body.0))
}

fn patch_metadata(control: &Control, request: Request<Json<MmdsContents>>) -> Done {
    control.set_metadata(|contents| {
        let missing = || Refusal("The MMDS data store is not initialized; PUT /mmds first.".into());
        let mut contents = contents.ok_or_else(missing)?;
        contents.merge(request.body.0);
        Ok(contents)
    })
}

fn put_vsock(control: &Control, request: Request<Json<Vsock>>) -> Done {
    control.configure(|configuration| {
        let vsock = request.body.0;
        if matches!(vsock.guest_cid, 0..=2 | u32::MAX) {
            return Err(format!("guest_cid {} is reserved; use 3 or more.", vsock.guest_cid).into());
        }
        configuration.vsock = Some(vsock);
        Ok(())
    })
}

fn balloon(control: &Control, _: Request<()>) -> Answer<Balloon> {
    control.configuration().balloon.map(Json).ok_or_else(no_balloon)
}

fn no_balloon() -> Refusal {
    Refusal("There is no balloon; PUT /balloon adds one before the start.".into())
}

fn put_balloon(control: &Control, request: Request<Json<Balloon>>) -> Done {
    control.configure(|configuration| {
        let balloon = request.body.0;
        balloon.device().map_err(Refusal)?;
        configuration.balloon = Some(balloon);
        Ok(())
    })
}

fn patch_balloon(control: &Control, request: Request<Json<BalloonUpdate>>) -> Done {
    let mib = request.body.0.amount_mib;
    let size = convert::mebibytes(mib).map_err(Refusal)?;
    update_balloon(control, "size", size.to_string().into())
}

fn patch_balloon_statistics(control: &Control, request: Request<Json<BalloonStatsUpdate>>) -> Done {
    let seconds = request.body.0.stats_polling_interval_s;
    update_balloon(control, "stats", seconds.into())
}

fn update_balloon(control: &Control, key: &str, value: Value) -> Done {
    let vm = control.vm()?;
    let device = vm.devices().iter().find(|device| device.kind == "balloon").ok_or_else(no_balloon)?;
    control.update_device(&device.name, DevicePatch::from_iter([(key.to_owned(), value)]))
}

fn balloon_statistics(control: &Control, _: Request<()>) -> Answer<BalloonStatistics> {
    let vm = control.vm()?;
    let device = vm.devices().iter().find(|device| device.kind == "balloon").ok_or_else(no_balloon)?;
    if control.configuration().balloon.is_none_or(|balloon| balloon.stats_polling_interval_s == 0) {
        return Err("Statistics for the balloon device are not enabled.".into());
    }
    let facts = device.counters.all();
    let fact = |name: &str| facts.iter().find(|(other, _)| *other == name).map(|(_, value)| *value);
    Ok(Json(BalloonStatistics::from_facts(fact)))
}

fn put_entropy(control: &Control, request: Request<Json<Entropy>>) -> Done {
    control.configure(|configuration| {
        configuration.entropy = Some(request.body.0);
        Ok(())
    })
}

fn put_serial(control: &Control, request: Request<Json<Serial>>) -> Done {
    control.configure(|configuration| {
        configuration.serial = Some(request.body.0);
        Ok(())
    })
}

fn put_logger(control: &Control, request: Request<Json<Logger>>) -> Done {
    control.log(request.body.0)
}

fn put_metrics(control: &Control, request: Request<Json<Metrics>>) -> Done {
    let metrics = request.body.0;
    control.configure(|configuration| {
        control.metrics().open(&metrics.metrics_path).map_err(Refusal)?;
        configuration.metrics = Some(metrics);
        Ok(())
    })
}

fn put_actions(control: &Control, request: Request<Json<Action>>) -> Done {
    match request.body.0.action_type {
        ActionType::InstanceStart => control.start(),
        ActionType::FlushMetrics => control.metrics().flush(Some(&*control.vm()?)).map_err(Refusal),
        ActionType::SendCtrlAltDel => Ok(control.vm()?.press_power_button()?),
    }
}

fn patch_vm(control: &Control, request: Request<Json<Vm>>) -> Done {
    let vm = control.vm()?;
    // As in Firecracker, it is no error to ask for the state that is there.
    match (request.body.0.state, vm.state()) {
        (VmTarget::Paused, VmState::Paused) | (VmTarget::Resumed, VmState::Running) => Ok(()),
        (VmTarget::Paused, _) => Ok(vm.pause()?),
        (VmTarget::Resumed, _) => Ok(vm.resume()?),
    }
}
