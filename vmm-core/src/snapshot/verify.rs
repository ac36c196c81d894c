//! What restoring does not look at, because it would take reading everything, or because it may change before.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use devices::registry::DeviceConfig;
use devices::virtio::block::{Format, SECTOR};
use devices::virtio::transport::DeviceState;
use rustix::fs::{OFlags, SeekFrom, seek};

use super::memory_file::{MemoryFileError, flat};
use super::state_file::Sections;
use super::{Link, Place, Snapshot, SnapshotFailed, disks, links, read_manifest, read_sections};

impl Snapshot {
    /// Reads all of the snapshot in `dir`, and of those that it is a difference to. Returns what is wrong: nothing, if it can be
    /// restored here and is what was saved.
    pub fn verify(dir: &Path) -> Vec<SnapshotFailed> {
        let place = Place::Dir(dir.into());
        let manifest = match read_manifest(&place) {
            Ok((manifest, _)) => manifest,
            Err(error) => return vec![error],
        };
        let mut wrong = Vec::new();
        let sections = read_sections(dir, &manifest).map_err(|error| wrong.push(error)).unwrap_or_default();
        match links(&place, &manifest) {
            Ok(links) => wrong.extend(links.iter().filter_map(|link| memory(link).err())),
            Err(error) => wrong.push(error),
        }
        wrong.extend(disks::config(&place, &manifest).err());
        let names = manifest.config.device_names();
        let disks = manifest.config.devices.iter().zip(names).filter_map(|(config, name)| {
            // Those that were taken along were looked at.
            let elsewhere = manifest.disks.iter().all(|disk| disk.device != name);
            let (path, problem) = elsewhere.then(|| disk(config, &name, &sections))??;
            Some(SnapshotFailed::OtherDisk { device: name, path: path.into(), problem })
        });
        wrong.extend(disks);
        wrong
    }

    /// Reads the memory of all links, so that what is made of it is not right by its checksum only.
    pub(super) fn check_memory(&self) -> Result<(), SnapshotFailed> {
        links(&self.place, &self.manifest)?.iter().try_for_each(memory)
    }
}

/// Reads the memory of one link of a chain.
fn memory(link: &Link) -> Result<(), SnapshotFailed> {
    let (path, map) = (link.place.memory(), &link.manifest.memory);
    let found = flat::crc32(&path, map.bytes, link.pages())?;
    match link.filled_up || map.crc32.is_none_or(|said| said == found) {
        true => Ok(()),
        false => Err(MemoryFileError::Contents { path: path.display().to_string() }.into()),
    }
}

/// What is wrong with the file of a device.
fn disk<'a>(config: &'a DeviceConfig, name: &str, sections: &Sections) -> Option<(&'a Path, String)> {
    let (path, grows) = match config {
        DeviceConfig::Disk(disk) => (&disk.path, disk.size.is_some() || disk.format != Format::Raw),
        DeviceConfig::Pmem(pmem) => (&pmem.path, true),
        _ => return None,
    };
    if path.starts_with("/proc/self/fd") {
        let remedy =
            format!("was a private copy that ended with its machine; restore with --set {name}.path=FILE");
        return Some((path, remedy));
    }
    let bytes = match size(path) {
        Ok(bytes) => bytes,
        Err(error) => return Some((path, format!("cannot be read: {error}"))),
    };
    let state: Option<DeviceState> = sections.state(&format!("device/{name}")).ok();
    let sectors = state.and_then(|state| state.config().first_chunk().copied()).map_or(0, u64::from_le_bytes);
    let seen = sectors.saturating_mul(SECTOR);
    let short = format!(
        "has {bytes} bytes, and the guest has seen {seen}; give it the disk of the time of the snapshot"
    );
    (!grows && bytes < seen).then_some((path, short))
}

/// Bytes of a file or a block device.
fn size(path: &Path) -> io::Result<u64> {
    let check = |meta: Metadata| {
        let kind = meta.file_type();
        match kind.is_file() || kind.is_block_device() {
            true => Ok(()),
            false => Err(io::Error::other("it is neither a file nor a block device")),
        }
    };
    // Opening some devices does something.
    check(fs::metadata(path)?)?;
    // It may be a pipe by now, which would wait for its other end.
    let flags = OFlags::NONBLOCK.bits() as i32;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    check(file.metadata()?)?;
    Ok(seek(&file, SeekFrom::End(0))?)
}
