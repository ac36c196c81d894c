//! What devices keep on the host, in a snapshot: a file each, beside the memory.

use std::fs::File;
use std::path::Path;

use devices::registry::DeviceConfig;

use super::manifest::{DiskFile, Manifest};
use super::place::{Place, open_file, refuse_links};
use super::{Draft, SnapshotFailed};
use crate::config::VmConfig;
use crate::machine::Machine;

/// Where a snapshot takes disks, if it does.
#[derive(Clone, Debug)]
pub(crate) struct DiskTarget(Option<Place>);

/// A disk in a snapshot, not yet made to last.
#[derive(Debug)]
pub(crate) struct SavedDisk {
    device: String,
    name: String,
    format: &'static str,
    file: File,
}

impl DiskTarget {
    /// Takes none.
    pub fn none() -> Self {
        Self(None)
    }

    /// Takes them into a draft, if that is a directory.
    pub fn of(draft: &Draft) -> Self {
        Self(matches!(draft.place, Place::Dir(_)).then(|| draft.draft.clone()))
    }

    /// Copies all that the devices of a machine that stands still keep on the host.
    pub fn save(&self, machine: &Machine) -> Result<Vec<SavedDisk>, SnapshotFailed> {
        let mut saved = Vec::new();
        for (at, (device, unit)) in machine.units.iter().enumerate() {
            let failed = |source| SnapshotFailed::Disk { device: device.clone(), source };
            let storage = unit.storage().map_err(|_| failed(devices::storage::StorageError::Gone))?;
            let Some(storage) = storage else { continue };
            let Some(place) = &self.0 else {
                if storage.nameless {
                    return Err(SnapshotFailed::DiskEnds { device: device.clone() });
                }
                continue;
            };
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            let name = match device.bytes().all(plain) {
                true => format!("{device}.{}", storage.format),
                // No plain name has a dot.
                false => format!("device.{at}.{}", storage.format),
            };
            let (file, to) = place.create_disk(&name)?;
            unit.save_storage(to).map_err(failed)?;
            saved.push(SavedDisk { device: device.clone(), name, format: storage.format, file });
        }
        Ok(saved)
    }
}

impl SavedDisk {
    /// Makes it last, if its snapshot shall, and tells what it is.
    pub fn finish(self, draft: &Draft) -> Result<DiskFile, SnapshotFailed> {
        let path = draft.draft.path().join(&self.name);
        let failed = SnapshotFailed::io("write", &path);
        if draft.lasts {
            self.file.sync_all().map_err(&failed)?;
        }
        let bytes = self.file.metadata().map_err(failed)?.len();
        Ok(DiskFile { device: self.device, file: self.name, format: self.format.into(), bytes })
    }
}

impl Manifest {
    /// Names of all files of a snapshot that is a directory.
    pub fn files(&self) -> Vec<&str> {
        let own = [super::place::MANIFEST, super::place::STATE, super::place::MEMORY];
        own.into_iter().chain(self.disks.iter().map(|disk| disk.file.as_str())).collect()
    }
}

/// Checks the names of files that a manifest lists: each is one of its own in the directory.
pub(super) fn check_names(manifest: &Manifest) -> Result<(), String> {
    let names = manifest.files();
    for (i, name) in names.iter().enumerate() {
        // What lies elsewhere is no part of it.
        if Path::new(name).file_name().is_none_or(|last| last != *name) {
            return Err(format!("its disk '{name}' is no file in its directory"));
        }
        if names[..i].contains(name) {
            return Err(format!("it has two files '{name}'"));
        }
    }
    Ok(())
}

/// The machine of the manifest at `place`, as it is to be restored: its disks begin with what was saved.
pub(super) fn config(place: &Place, manifest: &Manifest) -> Result<VmConfig, SnapshotFailed> {
    let mut config = manifest.config.clone();
    let bad = |reason: String| SnapshotFailed::Manifest { path: place.path().into(), reason };
    if manifest.disks.is_empty() {
        return Ok(config);
    }
    let Place::Dir(dir) = place.absolute()? else {
        return Err(bad("it is two files, and lists disks".into()));
    };
    check_names(manifest).map_err(bad)?;
    refuse_links(&dir, &manifest.files())?;
    let names = config.device_names();
    for (i, disk) in manifest.disks.iter().enumerate() {
        let DiskFile { device, file, format, bytes } = disk;
        let at = names.iter().position(|name| name == device);
        let at = at.ok_or_else(|| bad(format!("it has a disk of '{device}', which its machine lacks")))?;
        if manifest.disks[..i].iter().any(|other| other.device == *device) {
            return Err(bad(format!("it has two disks of '{device}'")));
        }
        let path = dir.join(file);
        let found =
            open_file(&path).and_then(|file| file.metadata()).map_err(SnapshotFailed::io("open", &path))?;
        if found.len() != *bytes {
            let found = found.len();
            return Err(bad(format!("its disk '{file}' has {found} bytes, and should have {bytes}")));
        }
        config.devices[at].begin_with(&path, format).map_err(|error| bad(error.to_string()))?;
    }
    Ok(config)
}

/// Takes back from `config` what was said of disks that are others than in `before`.
pub(super) fn replaced(config: &mut VmConfig, before: &VmConfig) {
    let pairs = config.devices.iter_mut().zip(&before.devices);
    pairs.for_each(|(device, before): (&mut DeviceConfig, _)| device.changed_from(before));
}
