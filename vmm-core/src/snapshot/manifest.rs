//! The manifest: what a snapshot is, for people and programs, and what its files must be.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::memory_file::Run;
use crate::config::VmConfig;

/// Version of the manifest's form.
pub const FORMAT: u32 = 1;

/// What a snapshot is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`] of the writer.
    pub format: u32,
    /// 128 random bits in hexadecimal. No two snapshots have the same.
    pub id: String,
    /// Version of the program that made it.
    pub made_by: String,
    /// When, in seconds since 1970.
    pub made_at: u64,
    /// The machine. A restored one is built from it.
    pub config: VmConfig,
    /// By what the program that made the machine calls its devices, by their names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub aliases: BTreeMap<String, String>,
    /// Where its devices are in the guest's address space.
    pub devices: Vec<DevicePlace>,
    /// The memory file.
    pub memory: MemoryMap,
    /// What its devices keep on the host, as far as it was taken along.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskFile>,
    /// Bytes of the state file, as it is in a directory.
    pub state_bytes: u64,
    /// CRC-32 of these.
    pub state_crc32: u32,
}

/// Where a device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DevicePlace {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// Guest physical address of its registers.
    pub address: u64,
}

/// What a device keeps on the host, in a file beside the memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskFile {
    /// Name of the device.
    pub device: String,
    /// Name of the file in the snapshot's directory.
    pub file: String,
    /// What is in it, as the device's kind calls it: `raw` or `qcow2`.
    pub format: String,
    /// Bytes of the file. What is zero may be a hole.
    pub bytes: u64,
}

/// What is in the memory file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryMap {
    /// Bytes of the file: all of the guest's RAM. What is zero may be a hole.
    pub bytes: u64,
    /// Pieces of RAM in the order of the file, without gaps.
    pub ranges: Vec<MemoryRange>,
    /// CRC-32 of the bytes that are no holes, in the order of the file. It is not checked when a snapshot is restored,
    /// which would read all of it. One that is made for clones, and removed as soon as they run, has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crc32: Option<u32>,
    /// Without it, the file is all of the memory. With it, only the pages in `pages` count, and the others are those of
    /// another snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff: Option<Diff>,
}

/// A piece of RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryRange {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What a diff snapshot depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Diff {
    /// [`Manifest::id`] of the snapshot before it.
    pub parent: String,
    /// Its directory, or its state file if it is two files. What does not begin with `/` is relative to this snapshot's
    /// directory, which is that of the state file if it is two files.
    pub path: PathBuf,
    /// Its memory file, if it is two files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<PathBuf>,
    /// Pages that are in the memory file, from the lowest up.
    pub pages: Vec<Run>,
}
