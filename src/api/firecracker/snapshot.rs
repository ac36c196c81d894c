//! Firecracker's `/snapshot/create` and `/snapshot/load`: a machine in two files.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use utoipa::ToSchema;
use vmm_core::devices::registry::DeviceConfig;
use vmm_core::devices::virtio::net::TapChoice;
use vmm_core::snapshot::ClockMode;
use vmm_core::{Snapshot, SnapshotKind, Vm, VmBuilder, VmConfig, VmState};

use super::types::{HugePages, MmdsContents};
use super::{Aliases, Done, readable};
use crate::api::control::Control;
use crate::api::http::{Json, Refusal, Request};

/// Where and how to save a machine, which is paused.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// What of the memory is saved.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// File for the state.
    #[schema(value_type = String)]
    pub snapshot_path: PathBuf,
    /// File for the memory.
    #[schema(value_type = String)]
    pub mem_file_path: PathBuf,
}

/// What of the memory is in a snapshot.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// What was written since the last snapshot; the rest of the file is a hole.
    Diff,
}

/// A snapshot, and what of its machine is to be otherwise.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// The state.
    #[schema(value_type = String)]
    pub snapshot_path: PathBuf,
    /// Where the memory comes from.
    pub mem_backend: Option<MemoryBackend>,
    /// The memory's file: an older word for `mem_backend`.
    #[schema(value_type = Option<String>)]
    pub mem_file_path: Option<PathBuf>,
    /// The guest goes on at once; else it is paused.
    #[serde(default)]
    pub resume_vm: bool,
    /// What is written to RAM is tracked, for diffs to this snapshot.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// An older word for `track_dirty_pages`.
    #[serde(default)]
    pub enable_diff_snapshots: bool,
    /// Other taps for interfaces.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another socket of the host for vsock.
    pub vsock_override: Option<VsockOverride>,
    /// The guest's clocks go on with the host's; else where they stood.
    #[serde(default)]
    pub clock_realtime: bool,
    /// Pages that the guest's memory is made of; as it was without it.
    pub huge_pages: Option<HugePages>,
}

/// Where memory comes from.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// What is at the path.
    pub backend_type: BackendType,
    /// The path.
    #[schema(value_type = String)]
    pub backend_path: PathBuf,
}

/// What memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub enum BackendType {
    /// A file, which is mapped.
    File,
    /// The unix socket of a process that answers page faults, which is sent a userfaultfd and where memory is.
    Uffd,
}

/// Another tap for an interface.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// The interface's name in this API.
    pub iface_id: String,
    /// The tap.
    pub host_dev_name: String,
}

/// Another socket for vsock.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The socket.
    #[schema(value_type = String)]
    pub uds_path: PathBuf,
}

/// Saves the machine.
pub fn create(control: &Control, request: Request<Json<SnapshotCreate>>) -> Done {
    let SnapshotCreate { snapshot_type, snapshot_path, mem_file_path } = request.body.0;
    let vm = control.vm()?;
    if vm.state() != VmState::Paused {
        let state = vm.state().name();
        return Err(format!("A machine that is {state} cannot be saved; PATCH /vm to pause it first.").into());
    }
    let kind = match snapshot_type {
        SnapshotType::Full => SnapshotKind::Full,
        SnapshotType::Diff => SnapshotKind::Diff,
    };
    vm.snapshot_to_files(&snapshot_path, &mem_file_path, kind)?;
    Ok(())
}

/// Makes the machine that was saved.
pub fn load(control: &Control, request: Request<Json<SnapshotLoad>>) -> Done {
    let load = request.body.0;
    control.restore(load.resume_vm, |metadata| load.machine(metadata))
}

impl SnapshotLoad {
    /// The machine that is to be, with this metadata, if there is some.
    fn machine(&self, metadata: Option<&MmdsContents>) -> Result<VmBuilder, Refusal> {
        let (memory, handler) = self.memory()?;
        readable("The state file", &self.snapshot_path)?;
        let mut snapshot = match handler {
            true => Snapshot::open_state(&self.snapshot_path)?,
            false => {
                readable("The memory file", memory)?;
                Snapshot::open_files(&self.snapshot_path, memory)?
            }
        };
        let mut config = snapshot.config().clone();
        config.track_dirty = self.track_dirty_pages || self.enable_diff_snapshots;
        if let Some(pages) = self.huge_pages {
            config.hugepages = pages.backing();
        }
        self.change_devices(&mut config, &snapshot.manifest().aliases)?;
        if let Some(metadata) = metadata {
            metadata.give_to(&mut config);
        }
        snapshot.set_config(config)?;
        let clock = if self.clock_realtime { ClockMode::Advance } else { ClockMode::Freeze };
        let builder = Vm::restore(snapshot).clock_mode(clock);
        Ok(match handler {
            true => builder.page_fault_handler(memory.into()),
            false => builder,
        })
    }

    fn change_devices(&self, config: &mut VmConfig, aliases: &Aliases) -> Done {
        let names = config.device_names();
        for NetworkOverride { iface_id, host_dev_name } in &self.network_overrides {
            let known = |name: &String| aliases.get(name).unwrap_or(name) == iface_id;
            let mut named = names.iter().zip(&mut config.devices).filter(|(name, _)| known(name));
            let net = named.find_map(|(_, device)| match device {
                DeviceConfig::Net(net) => Some(net),
                _ => None,
            });
            let none = || format!("There is no network interface '{iface_id}' in the snapshot.");
            net.ok_or_else(none)?.tap = Some(TapChoice::Named(host_dev_name.clone()));
        }
        if let Some(VsockOverride { uds_path }) = &self.vsock_override {
            let vsock = config.devices.iter_mut().find_map(|device| match device {
                DeviceConfig::Vsock(vsock) => Some(vsock),
                _ => None,
            });
            vsock.ok_or("There is no vsock in the snapshot.")?.path.clone_from(uds_path);
        }
        Ok(())
    }

    /// The memory's file, or the socket of who has it.
    fn memory(&self) -> Result<(&Path, bool), Refusal> {
        match (&self.mem_backend, &self.mem_file_path) {
            (Some(MemoryBackend { backend_type, backend_path }), None) => {
                Ok((backend_path, *backend_type == BackendType::Uffd))
            }
            (None, Some(path)) => Ok((path, false)),
            (None, None) => Err("The memory is missing; give mem_backend or mem_file_path.".into()),
            (Some(_), Some(_)) => Err("Give either mem_backend or mem_file_path, not both.".into()),
        }
    }
}
