//! Snapshots: a paused machine as a directory, and the way back.
//!
//! A snapshot is a directory, described in docs/snapshot-format.md: the manifest, readable and with the machine's whole
//! configuration; the state of all its parts; its memory, which is mapped and not read; and its disks. Or it is two
//! files anywhere, as clients of Firecracker want it: then the manifest is in the state file.
//! [`Snapshot::open`] checks the first two as a whole, [`crate::Vm::restore`] builds the machine from the configuration as
//! any other, and gives each part its state.

mod clone;
pub mod difference;
mod disks;
pub mod manifest;
pub mod memory_file;
pub(crate) mod memory_writer;
mod merge;
pub mod pack;
mod place;
pub mod state_file;
mod verify;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use devices::registry::DeviceConfig;
use devices::storage::StorageError;
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, VmConfig};
use crate::hypervisor::saved::VcpuState;
use crate::uffd::TouchedFile;
use crate::x86_64::{Slots, features};
pub(crate) use clone::GenerationId;
pub use clone::{Hostname, MachineId, Persona, Unlike};
pub(crate) use disks::{DiskTarget, SavedDisk};
use manifest::{DevicePlace, Manifest, MemoryMap, MemoryRange};
use memory_file::{MemoryFileError, MemoryImage, Pages, Run};
use memory_writer::{MemoryWriter, Written};
pub use merge::ChainLink;
use place::Pin;
pub(crate) use place::Place;
use state_file::{SectionError, Sections};

/// Most runs of pages that the diffs of a chain list in all: 128 MiB of memory.
const MAX_LISTED: usize = 8 << 20;
/// Most diffs, one over the other, that are restored together.
const MAX_CHAIN: usize = 64;

/// What of the memory a snapshot has.
///
/// ```no_run
/// use vmm_core::{SnapshotKind, Vm};
///
/// # fn save(vm: &Vm) -> Result<(), vmm_core::VmError> {
/// vm.snapshot("first".as_ref(), SnapshotKind::Full)?;
/// let second = vm.snapshot("second".as_ref(), SnapshotKind::Diff)?;
/// println!("{} bytes were written since", second.memory_bytes);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SnapshotKind {
    /// All of it.
    #[default]
    Full,
    /// The pages that were written since the machine's last snapshot, or since it was restored from one. It needs
    /// [`VmConfig::track_dirty`].
    Diff,
    /// All of it, for machines that are restored at once and a snapshot that is then removed: the next diff is not one to
    /// this.
    Clones,
}

/// How often a snapshot is opened anew that is replaced while it is opened.
const MAX_REPLACED: usize = 8;

impl SnapshotKind {
    /// Whether it is to be there after the host has failed.
    pub(crate) fn lasts(self) -> bool {
        self != Self::Clones
    }
}

/// What a restored guest makes of the time that it slept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClockMode {
    /// It has passed, as for a guest that was not scheduled: wall clock and monotonic clock are right at once.
    #[default]
    Advance,
    /// It has not: its clocks go on where they stood.
    Freeze,
}

/// What came of [`crate::Vm::snapshot`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotReport {
    /// How long the machine stood still.
    pub paused: Duration,
    /// Bytes of memory that were written to disk.
    pub memory_bytes: u64,
    /// Identity of the snapshot.
    pub id: String,
}

/// A snapshot could not be made, or is of no use: a sentence for the operator.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotFailed {
    /// Somebody called [`crate::Vm::cancel_snapshot`].
    #[error("the snapshot was cancelled")]
    Cancelled,
    /// One to the same place has begun and not ended.
    #[error("a snapshot to '{path}' is being made already")]
    Busy {
        /// The place.
        path: String,
    },
    /// A file cannot be read or written.
    #[error("cannot {action} '{path}': {source}")]
    Io {
        /// What was done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The place for a snapshot is taken.
    #[error("'{path}' is there already and is no snapshot; choose another place", path = .0.display())]
    Taken(PathBuf),
    /// Replacing a snapshot would take along what else is in its directory.
    #[error("'{path}' has something besides a snapshot in it, which would go with it; choose another place", path = .0.display())]
    NotAlone(PathBuf),
    /// One file for two purposes.
    #[error("'{path}' cannot be both the state and the memory of a snapshot; choose two files", path = .0.display())]
    OneFile(PathBuf),
    /// One snapshot after the other came to its place.
    #[error("'{path}' is replaced all the time; restore it when it is not", path = .0.display())]
    Replaced(PathBuf),
    /// What was opened is no snapshot.
    #[error("'{path}' is no snapshot: {reason}", path = path.display())]
    Manifest {
        /// The directory or the state file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Its state is of no use.
    #[error("the state of the snapshot '{path}' is of no use: {source}", path = path.display())]
    State {
        /// The directory or the state file.
        path: PathBuf,
        /// What is wrong.
        source: SectionError,
    },
    /// Its memory is of no use.
    #[error(transparent)]
    Memory(#[from] MemoryFileError),
    /// A diff without what it is a difference to.
    #[error(
        "a diff snapshot needs one that it is a difference to, and a machine that tracks what is written; {remedy}"
    )]
    NoBase {
        /// What to do.
        remedy: &'static str,
    },
    /// A diff cannot replace what it is a difference to.
    #[error("'{path}' is what the diff is a difference to; choose another place", path = .0.display())]
    OverBase(PathBuf),
    /// The snapshot below a diff is another one than it was.
    #[error("'{path}' is not the snapshot that '{diff}' is a difference to", path = path.display(), diff = diff.display())]
    WrongBase {
        /// What was found.
        path: PathBuf,
        /// The diff.
        diff: PathBuf,
    },
    /// Diffs over diffs without end.
    #[error("the diff '{path}' lies over more than {MAX_CHAIN} others, or over itself; make a full snapshot", path = .0.display())]
    Chain(PathBuf),
    /// Another process has its memory.
    #[error("the memory of '{path}' is another process's to give; open it with its memory file", path = .0.display())]
    NoMemory(PathBuf),
    /// A packed snapshot cannot be written.
    #[error("cannot write the packed snapshot: {0}")]
    Pack(String),
    /// A packed snapshot is none, or was changed.
    #[error("the packed snapshot is of no use: {0}")]
    Unpack(String),
    /// A disk is not what the guest knows.
    #[error("{device} is on '{path}', which {problem}", path = path.display())]
    OtherDisk {
        /// The device's name.
        device: String,
        /// Its file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// Its configuration is not possible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A part of the machine could not be saved.
    #[error("cannot save the machine: {0}")]
    Save(SectionError),
    /// What a device keeps on the host could not be copied.
    #[error("{device} cannot be taken along: {source}")]
    Disk {
        /// The device's name.
        device: String,
        /// What is wrong.
        source: StorageError,
    },
    /// What a device keeps on the host ends with the machine, and was not to be copied.
    #[error(
        "{device} ends with its machine, which is of no use without it; make a snapshot that takes disks along"
    )]
    DiskEnds {
        /// The device's name.
        device: String,
    },
    /// Only a machine that has run and not ended has something to save.
    #[error("a machine that is {state} cannot be saved")]
    NotRunning {
        /// Its state.
        state: &'static str,
    },
}

impl SnapshotFailed {
    fn io(action: &'static str, path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = place::without_draft(path);
        move |source| Self::Io { action, path: path.clone(), source }
    }
}

/// A snapshot, opened and checked, ready to be restored: see [`crate::Vm::restore`].
///
/// ```no_run
/// use vmm_core::Snapshot;
///
/// # fn look() -> Result<(), Box<dyn std::error::Error>> {
/// let mut snapshot = Snapshot::open("web.snapshot".as_ref())?;
/// let config = snapshot.config().clone();
/// println!("it has {} and {} vCPUs", config.memory, config.cpus);
/// // What may be another than it was: see docs/clones.md.
/// snapshot.set_config(config)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub(crate) place: Place,
    pub(crate) manifest: Manifest,
    pub(crate) sections: Sections,
    /// `None` if somebody else has it.
    pub(crate) image: Option<Arc<MemoryImage>>,
    /// What the machine is to be now.
    pub(crate) config: VmConfig,
}

impl Snapshot {
    /// Opens the snapshot in the directory `path`. All of it is of one snapshot, even if another one replaces it meanwhile.
    pub fn open(path: &Path) -> Result<Self, SnapshotFailed> {
        for _ in 0..MAX_REPLACED {
            let pin = Pin::of(path);
            let opened = Self::open_once(path);
            // Without a directory there is nothing to replace.
            if pin.is_none_or(|pin| pin.is_at(path)) {
                return opened;
            }
        }
        Err(SnapshotFailed::Replaced(path.into()))
    }

    fn open_once(path: &Path) -> Result<Self, SnapshotFailed> {
        let (manifest, _) = read_manifest(&Place::Dir(path.into()))?;
        let sections = read_sections(path, &manifest)?;
        Self::with_memory(Place::Dir(path.into()), manifest, sections)
    }

    /// Opens the snapshot in two files that [`crate::Vm::snapshot_to_files`] has made. `memory` may be the memory of a diff,
    /// or all of the memory, into which somebody has put the diff's pages.
    pub fn open_files(state: &Path, memory: &Path) -> Result<Self, SnapshotFailed> {
        let place = Place::Files { state: state.into(), memory: memory.into() };
        let (manifest, sections) = read_manifest(&place)?;
        Self::with_memory(place, manifest, sections.unwrap_or_default())
    }

    /// As [`Self::open_files`] for a machine whose memory somebody else brings in:
    /// [`crate::VmBuilder::page_fault_handler`].
    pub fn open_state(state: &Path) -> Result<Self, SnapshotFailed> {
        let place = Place::Files { state: state.into(), memory: PathBuf::new() };
        let (manifest, sections) = read_manifest(&place)?;
        let config = disks::config(&place, &manifest)?;
        Ok(Self { place, manifest, sections: sections.unwrap_or_default(), image: None, config })
    }

    fn with_memory(place: Place, manifest: Manifest, sections: Sections) -> Result<Self, SnapshotFailed> {
        let image = Some(Arc::new(open_memory(&place, &manifest)?));
        let config = disks::config(&place, &manifest)?;
        Ok(Self { place, manifest, sections, image, config })
    }

    /// What the machine is. Paths, addresses and names of the host may be changed with [`Self::set_config`].
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// What is known of it.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The state of the machine's parts.
    pub fn sections(&self) -> &Sections {
        &self.sections
    }

    /// Its memory, to be looked at.
    fn memory_image(&self) -> Result<&MemoryImage, SnapshotFailed> {
        self.image.as_deref().ok_or_else(|| SnapshotFailed::NoMemory(self.place.path().into()))
    }

    /// Features of the processor that the guest has seen, by Linux's names.
    pub fn cpu_features(&self) -> Vec<&'static str> {
        let first: Result<VcpuState, _> = self.sections.state("vcpu0");
        first.map_or_else(|_| Vec::new(), |vcpu| features::features(&vcpu.cpuid))
    }

    /// This snapshot, for diffs of the machine that is restored from it, unless its memory is somebody else's.
    pub(crate) fn as_base(&self) -> Option<Base> {
        self.image.as_ref()?;
        let place = self.place.absolute().unwrap_or_else(|_| self.place.clone());
        Some(Base { id: self.manifest.id.clone(), place })
    }

    /// Where it is kept what of its memory was touched first; of a snapshot in two files nowhere.
    pub(crate) fn touched(&self) -> Option<TouchedFile> {
        match &self.place {
            Place::Dir(dir) => TouchedFile::in_dir(dir, &self.manifest.id),
            Place::Files { .. } => None,
        }
    }

    /// Restores the machine with another configuration: what it is to the guest must stay, and what it is on the host may
    /// change: paths, taps, limits, and also Ethernet addresses and CIDs, of which the guest is told. A disk may be larger.
    /// One with another path than here is used as it is, and not what was saved of it.
    pub fn set_config(&mut self, mut config: VmConfig) -> Result<(), Unlike> {
        clone::check(&self.manifest.config, &config)?;
        disks::replaced(&mut config, &self.config);
        self.config = config;
        Ok(())
    }
}

/// Reads and checks a manifest, and reads what is in the same file.
fn read_manifest(place: &Place) -> Result<(Manifest, Option<Sections>), SnapshotFailed> {
    let (bytes, sections) = place.read_manifest()?;
    Ok((parse_manifest(place.path(), &bytes)?, sections))
}

/// Checks a manifest, which is or shall be at `path`.
fn parse_manifest(path: &Path, bytes: &[u8]) -> Result<Manifest, SnapshotFailed> {
    let bad = |reason: String| SnapshotFailed::Manifest { path: path.into(), reason };
    #[derive(serde::Deserialize)]
    struct Form {
        format: u32,
    }
    let Form { format } =
        serde_json::from_slice(bytes).map_err(|error| bad(format!("its manifest: {error}")))?;
    if format > manifest::FORMAT {
        let known = manifest::FORMAT;
        return Err(bad(format!(
            "it has form {format}, and this program reads up to {known}; use the program that made it"
        )));
    }
    let manifest: Manifest =
        serde_json::from_slice(bytes).map_err(|error| bad(format!("its manifest: {error}")))?;
    let config = &manifest.config;
    config.validate().map_err(|error| bad(format!("its manifest: {error}")))?;
    let ranges = ranges(config.memory.0);
    if manifest.memory.bytes != config.memory.0 || manifest.memory.ranges != ranges {
        return Err(bad("its memory map is not that of its machine".into()));
    }
    if manifest.devices != places(config) {
        return Err(bad(
            "its devices are not where this program puts them; use the program that made it".into()
        ));
    }
    Ok(manifest)
}

/// Where RAM of so many bytes is in the guest's address space.
fn ranges(bytes: u64) -> Vec<MemoryRange> {
    let ranges = crate::x86_64::layout::ram_ranges(bytes);
    ranges.into_iter().map(|(address, bytes)| MemoryRange { address, bytes }).collect()
}

/// Where the devices of `config` are.
fn places(config: &VmConfig) -> Vec<DevicePlace> {
    let addresses: Vec<u64> = match Slots::new(config.transport, config.devices.len()) {
        Slots::Mmio(slots) => slots.iter().map(|slot| slot.addr).collect(),
        Slots::Pci(bars) => bars.into_iter().map(u64::from).collect(),
    };
    let devices = config.device_names().into_iter().zip(&config.devices).zip(addresses);
    devices
        .map(|((name, device), address)| DevicePlace { name, kind: device.kind().into(), address })
        .collect()
}

/// Reads and checks the state in the directory `dir`.
fn read_sections(dir: &Path, manifest: &Manifest) -> Result<Sections, SnapshotFailed> {
    check_sections(dir, manifest, &Place::read_state(dir)?)
}

/// Checks the bytes of a state file, which is or shall be in the directory `dir`.
fn check_sections(dir: &Path, manifest: &Manifest, bytes: &[u8]) -> Result<Sections, SnapshotFailed> {
    let wrong = |source| SnapshotFailed::State { path: dir.into(), source };
    match bytes.len() as u64 == manifest.state_bytes && crc32fast::hash(bytes) == manifest.state_crc32 {
        true => Sections::from_bytes(bytes).map_err(wrong),
        false => Err(wrong(SectionError::Damaged)),
    }
}

/// A snapshot in a chain.
pub(crate) struct Link {
    pub place: Place,
    pub manifest: Manifest,
    /// Somebody has put the diff's pages into all of the memory, of which nobody knows the checksum.
    pub filled_up: bool,
}

impl Link {
    /// The pages that count, unless all do.
    pub fn pages(&self) -> Option<&[Run]> {
        let diff = self.manifest.memory.diff.as_ref().filter(|_| !self.filled_up);
        diff.map(|diff| &diff.pages[..])
    }
}

/// The snapshot at `place`, and what it is a difference to, down to one with all of the memory.
fn links(place: &Place, manifest: &Manifest) -> Result<Vec<Link>, SnapshotFailed> {
    let bytes = manifest.memory.bytes;
    let mut links: Vec<Link> = Vec::new();
    let mut next = Some((place.clone(), manifest.clone()));
    let mut listed = 0;
    while let Some((place, manifest)) = next.take() {
        let Some(diff) = &manifest.memory.diff else {
            links.push(Link { place, manifest, filled_up: false });
            break;
        };
        listed += diff.pages.len();
        let again = links.iter().any(|link| link.manifest.id == manifest.id);
        if links.len() == MAX_CHAIN || listed > MAX_LISTED || again {
            let top = links.first().map_or(&place, |link| &link.place);
            return Err(SnapshotFailed::Chain(top.path().into()));
        }
        memory_file::check_pages(&diff.pages, bytes)?;
        // Clients of Firecracker put the pages of a diff over its base by themselves.
        let files = matches!(place, Place::Files { .. });
        let filled_up = files && memory_file::has_more_than(&place.memory(), bytes, &diff.pages)?;
        if !filled_up {
            let parent = place.base_of(diff);
            if !parent.path().exists() {
                let reason =
                    format!("it is a difference to '{}', which is not there", parent.path().display());
                return Err(SnapshotFailed::Manifest { path: place.path().into(), reason });
            }
            let (below, _) = read_manifest(&parent)?;
            if below.id != diff.parent || below.memory.bytes != bytes {
                return Err(SnapshotFailed::WrongBase {
                    path: parent.path().into(),
                    diff: place.path().into(),
                });
            }
            next = Some((parent, below));
        }
        links.push(Link { place, manifest, filled_up });
    }
    Ok(links)
}

/// The memory of a snapshot, with what it is a difference to.
fn open_memory(place: &Place, manifest: &Manifest) -> Result<MemoryImage, SnapshotFailed> {
    let bytes = manifest.memory.bytes;
    let mut image: Option<MemoryImage> = None;
    for link in links(place, manifest)?.iter().rev() {
        let file = link.place.memory();
        match (&mut image, link.pages()) {
            (Some(image), Some(pages)) => image.add_diff(&file, pages)?,
            _ => image = Some(MemoryImage::open(&file, bytes)?),
        }
    }
    // There is one link at least.
    image.map_or_else(|| Ok(MemoryImage::open(&place.memory(), bytes)?), Ok)
}

/// The machine at one moment, on its way into a directory.
pub(crate) struct Captured {
    pub sections: Sections,
    pub written: Written,
    pub disks: Vec<SavedDisk>,
    pub config: VmConfig,
    pub aliases: BTreeMap<String, String>,
    /// How long the machine stood still for it.
    pub paused: Duration,
    /// For a diff: what it is a difference to, and in which pages.
    pub diff: Option<(Base, Pages)>,
}

/// What a diff is a difference to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Base {
    pub id: String,
    pub place: Place,
}

impl Base {
    /// Whether it still is where it was made. Clients of Firecracker may take its two files away, and put them together with the
    /// diff by themselves.
    pub fn is_there(&self) -> bool {
        match &self.place {
            Place::Dir(_) => read_manifest(&self.place).is_ok_and(|(manifest, _)| manifest.id == self.id),
            Place::Files { .. } => true,
        }
    }
}

/// A snapshot in the making, beside its place. Dropped unfinished, it is gone.
pub(crate) struct Draft {
    place: Place,
    draft: Place,
    memory: Arc<File>,
    /// It is to be there after a crash of the host.
    lasts: bool,
    /// Locked, which says that somebody is at work on it.
    _lock: Option<File>,
}

impl Draft {
    /// Begins a snapshot that is to be at `place`.
    pub fn begin(place: &Place, kind: SnapshotKind) -> Result<Self, SnapshotFailed> {
        let place = place.absolute()?;
        let (draft, memory, lock) = place.begin_draft()?;
        Ok(Self { place, draft, memory: memory.into(), lasts: kind.lasts(), _lock: lock })
    }

    /// Makes a file for a disk: to be kept, and to be written.
    pub fn create_disk(&self, name: &str) -> Result<(File, File), SnapshotFailed> {
        self.draft.create_disk(name)
    }

    /// The file of the memory, to be filled by other means.
    pub fn memory_file(&self) -> &File {
        &self.memory
    }

    /// Where the memory goes, of which there are so many bytes. The file of a diff says itself which pages it has: clients
    /// of Firecracker look for its holes.
    pub fn memory(&self, bytes: u64, kind: SnapshotKind) -> Result<MemoryWriter, SnapshotFailed> {
        let exactly = matches!(self.place, Place::Files { .. }) && kind == SnapshotKind::Diff;
        let writer = MemoryWriter::new(self.memory.clone(), bytes, exactly);
        writer.map_err(SnapshotFailed::io("write", &self.draft.memory()))
    }

    /// Writes what is missing, makes all of it last if it shall, and puts it in its place, where another snapshot may be, if
    /// `wanted` says yes then.
    pub fn finish(
        self,
        captured: Captured,
        wanted: &dyn Fn() -> bool,
    ) -> Result<(SnapshotReport, Base), SnapshotFailed> {
        let Captured { sections, written, disks, mut config, aliases, paused, diff } = captured;
        config.devices.iter_mut().for_each(DeviceConfig::pin);
        let state = sections.to_bytes().map_err(SnapshotFailed::Save)?;
        let memory = self.draft.memory();
        // It is for those who find it much later.
        let crc32 = self.lasts.then(|| written.crc32(&self.memory)).transpose();
        let crc32 = crc32.map_err(SnapshotFailed::io("read", &memory))?;
        let id = new_id()?;
        let made_at =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let bytes = config.memory.0;
        let manifest = Manifest {
            format: manifest::FORMAT,
            id: id.clone(),
            made_by: format!("vmm {}", env!("CARGO_PKG_VERSION")),
            made_at,
            devices: places(&config),
            memory: MemoryMap {
                bytes,
                ranges: ranges(bytes),
                crc32,
                diff: diff
                    .map(|(base, pages)| self.place.diff(base, pages.runs(0, bytes).collect()))
                    .transpose()?,
            },
            disks: disks.into_iter().map(|disk| disk.finish(&self)).collect::<Result<_, _>>()?,
            config,
            aliases,
            state_bytes: state.len() as u64,
            state_crc32: crc32fast::hash(&state),
        };
        let base = self.put(&manifest, sections, &state, wanted)?;
        Ok((SnapshotReport { paused, memory_bytes: written.bytes(), id }, base))
    }

    /// Writes manifest and state, makes all of it last, and puts it in its place.
    fn put(
        self,
        manifest: &Manifest,
        sections: Sections,
        state: &[u8],
        wanted: &dyn Fn() -> bool,
    ) -> Result<Base, SnapshotFailed> {
        let mut text = serde_json::to_vec_pretty(manifest).map_err(|error| SnapshotFailed::Manifest {
            path: self.place.path().into(),
            reason: error.to_string(),
        })?;
        text.push(b'\n');
        self.draft.write(sections, state, text)?;
        if self.lasts {
            self.memory.sync_all().map_err(SnapshotFailed::io("write", &self.draft.memory()))?;
            self.draft.sync()?;
        }
        if !wanted() {
            return Err(SnapshotFailed::Cancelled);
        }
        self.place.replace_with(&self.draft)?;
        if self.lasts {
            self.place.sync_parents()?;
        }
        Ok(Base { id: manifest.id.clone(), place: self.place.clone() })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        self.draft.remove();
    }
}

/// An id that no other snapshot has.
fn new_id() -> Result<String, SnapshotFailed> {
    let id = random::<16>().map_err(SnapshotFailed::io("read", Path::new("/dev/urandom")))?;
    Ok(id.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Bytes of the host's random number generator.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
