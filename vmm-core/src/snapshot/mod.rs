//! Snapshots: a paused machine as a directory, and the way back.
//!
//! A snapshot is a directory of three files, described in docs/snapshot-format.md: the manifest, readable and with the
//! machine's whole configuration; the state of all its parts; and its memory, which is mapped and not read.
//! [`Snapshot::open`] checks the first two as a whole, [`crate::Vm::restore`] builds the machine from the configuration as
//! any other, and gives each part its state.

mod clone;
pub mod manifest;
pub mod memory_file;
pub mod state_file;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use devices::registry::DeviceConfig;
use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags, flock, renameat_with};
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, VmConfig};
use crate::hypervisor::saved::VcpuState;
use crate::x86_64::{Slots, features};
pub(crate) use clone::GenerationId;
pub use clone::{Hostname, MachineId, Persona, Unlike};
use manifest::{DevicePlace, Diff, Manifest, MemoryMap, MemoryRange};
use memory_file::{MemoryFileError, MemoryImage, Pages, Written};
use state_file::{SectionError, Sections};

/// Names of the files of a snapshot.
const MANIFEST: &str = "manifest.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";

/// Most bytes of a manifest. That of a diff lists its pages.
const MAX_MANIFEST: u64 = 64 << 20;
/// Most diffs, one over the other, that are restored together.
const MAX_CHAIN: usize = 64;

/// What of the memory a snapshot has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SnapshotKind {
    /// All of it.
    #[default]
    Full,
    /// The pages that were written since the machine's last snapshot, or since it was restored from one. It needs
    /// [`VmConfig::track_dirty`].
    Diff,
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
    #[error("'{path}' is there already and is no snapshot; choose another directory", path = .0.display())]
    Taken(PathBuf),
    /// What was opened is no snapshot.
    #[error("'{path}' is no snapshot: {reason}", path = path.display())]
    Manifest {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Its state is of no use.
    #[error("the state of the snapshot '{path}' is of no use: {source}", path = path.display())]
    State {
        /// The directory.
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
    #[error("'{path}' is what the diff is a difference to; choose another directory", path = .0.display())]
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
    /// Its configuration is not possible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A part of the machine could not be saved.
    #[error("cannot save the machine: {0}")]
    Save(SectionError),
    /// Only a machine that has run and not ended has something to save.
    #[error("a machine that is {state} cannot be saved")]
    NotRunning {
        /// Its state.
        state: &'static str,
    },
}

impl SnapshotFailed {
    fn io(action: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path: path.clone(), source }
    }
}

/// A snapshot, opened and checked, ready to be restored.
#[derive(Debug)]
pub struct Snapshot {
    pub(crate) path: PathBuf,
    pub(crate) manifest: Manifest,
    pub(crate) sections: Sections,
    pub(crate) image: Arc<MemoryImage>,
    /// What the machine is to be now.
    pub(crate) config: VmConfig,
}

impl Snapshot {
    /// Opens the snapshot in the directory `path`.
    pub fn open(path: &Path) -> Result<Self, SnapshotFailed> {
        let manifest = read_manifest(path)?;
        let state = path.join(STATE);
        let bytes = read_at_most(&state, state_file::MAX_BYTES as u64)?;
        let wrong = |source| SnapshotFailed::State { path: path.into(), source };
        if bytes.len() as u64 != manifest.state_bytes || crc32fast::hash(&bytes) != manifest.state_crc32 {
            return Err(wrong(SectionError::Damaged));
        }
        let sections = Sections::from_bytes(&bytes).map_err(wrong)?;
        let image = Arc::new(open_memory(path, &manifest)?);
        let config = manifest.config.clone();
        Ok(Self { path: path.into(), manifest, sections, image, config })
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

    /// Features of the processor that the guest has seen, by Linux's names.
    pub fn cpu_features(&self) -> Vec<&'static str> {
        let first: Result<VcpuState, _> = self.sections.state("vcpu0");
        first.map_or_else(|_| Vec::new(), |vcpu| features::features(&vcpu.cpuid))
    }

    /// This snapshot, for diffs of the machine that is restored from it.
    pub(crate) fn as_base(&self) -> Base {
        let path = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        Base { id: self.manifest.id.clone(), path }
    }

    /// Restores the machine with another configuration: what it is to the guest must stay, and what it is on the host may
    /// change: paths, taps, limits, and also Ethernet addresses and CIDs, of which the guest is told. A disk may be larger.
    pub fn set_config(&mut self, config: VmConfig) -> Result<(), Unlike> {
        clone::check(&self.manifest.config, &config)?;
        self.config = config;
        Ok(())
    }
}

/// Reads and checks a manifest.
fn read_manifest(path: &Path) -> Result<Manifest, SnapshotFailed> {
    let file = path.join(MANIFEST);
    let bad = |reason: String| SnapshotFailed::Manifest { path: path.into(), reason };
    let bytes = read_at_most(&file, MAX_MANIFEST)?;
    #[derive(serde::Deserialize)]
    struct Form {
        format: u32,
    }
    let Form { format } =
        serde_json::from_slice(&bytes).map_err(|error| bad(format!("{MANIFEST}: {error}")))?;
    if format > manifest::FORMAT {
        let known = manifest::FORMAT;
        return Err(bad(format!(
            "it has form {format}, and this program reads up to {known}; use the program that made it"
        )));
    }
    let manifest: Manifest =
        serde_json::from_slice(&bytes).map_err(|error| bad(format!("{MANIFEST}: {error}")))?;
    let config = &manifest.config;
    config.validate().map_err(|error| bad(format!("{MANIFEST}: {error}")))?;
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

/// The memory of a snapshot, with what it is a difference to.
fn open_memory(path: &Path, manifest: &Manifest) -> Result<MemoryImage, SnapshotFailed> {
    let bytes = manifest.memory.bytes;
    let mut above: Vec<(PathBuf, Diff)> = Vec::new();
    let (mut path, mut diff) = (path.to_owned(), manifest.memory.diff.clone());
    while let Some(this) = diff {
        let parent = path.join(&this.path);
        if above.len() == MAX_CHAIN {
            return Err(SnapshotFailed::Chain(above.swap_remove(0).0));
        }
        // Before the next one is read, so that no chain takes more memory than its longest list.
        memory_file::check_pages(&this.pages, bytes)?;
        let below = read_manifest(&parent)?;
        if below.id != this.parent || below.memory.bytes != bytes {
            return Err(SnapshotFailed::WrongBase { path: parent, diff: path });
        }
        above.push((path, this));
        (path, diff) = (parent, below.memory.diff);
    }
    let mut image = MemoryImage::open(&path.join(MEMORY), bytes)?;
    for (path, diff) in above.into_iter().rev() {
        image.add_diff(&path.join(MEMORY), &diff.pages)?;
    }
    Ok(image)
}

/// Opens a file of a snapshot to read it. A pipe, which would wait for a writer, is none.
fn open_file(path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK.bits() as i32;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no regular file")),
    }
}

/// Reads a file that has at most `limit` bytes.
fn read_at_most(path: &Path, limit: u64) -> Result<Vec<u8>, SnapshotFailed> {
    let error = SnapshotFailed::io("read", path);
    let file = open_file(path).map_err(&error)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(&error)?;
    match bytes.len() as u64 > limit {
        true => Err(error(io::ErrorKind::FileTooLarge.into())),
        false => Ok(bytes),
    }
}

/// The machine at one moment, on its way into a directory.
pub(crate) struct Captured {
    pub sections: Sections,
    pub written: Written,
    pub config: VmConfig,
    /// How long the machine stood still for it.
    pub paused: Duration,
    /// For a diff: what it is a difference to, and in which pages.
    pub diff: Option<(Base, Pages)>,
}

/// What a diff is a difference to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Base {
    pub id: String,
    pub path: PathBuf,
}

/// A snapshot in the making, in a directory beside its place. Dropped unfinished, it is gone.
pub(crate) struct Draft {
    place: PathBuf,
    dir: PathBuf,
    memory: File,
    /// Locked, which says that somebody is at work on it.
    _lock: File,
}

impl Draft {
    /// Begins a snapshot that is to be at `place`.
    pub fn begin(place: &Path) -> Result<Self, SnapshotFailed> {
        let place = std::path::absolute(place).map_err(SnapshotFailed::io("find", place))?;
        if is_taken(&place) {
            return Err(SnapshotFailed::Taken(place));
        }
        let name = place.file_name().ok_or_else(|| SnapshotFailed::Taken(place.clone()))?;
        let name = format!(".{}.", name.display());
        remove_left(&place, &name);
        let dir = place.with_file_name(format!("{name}{:08x}", random::<4>().map_or(0, u32::from_le_bytes)));
        fs::DirBuilder::new().mode(0o700).create(&dir).map_err(SnapshotFailed::io("make", &dir))?;
        let path = dir.join(MEMORY);
        let files = || {
            let lock = File::open(&dir)?;
            flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            Ok((lock, create(&path)?))
        };
        match files() {
            Ok((lock, memory)) => Ok(Self { place, dir, memory, _lock: lock }),
            Err(error) => {
                _ = fs::remove_dir_all(&dir);
                Err(SnapshotFailed::io("make", &path)(error))
            }
        }
    }

    /// The memory file, which is empty.
    pub fn memory(&self) -> Result<File, SnapshotFailed> {
        self.memory.try_clone().map_err(SnapshotFailed::io("open", &self.dir.join(MEMORY)))
    }

    /// Writes what is missing, makes all of it last, and puts it in its place, where another snapshot may be.
    pub fn finish(self, captured: Captured) -> Result<(SnapshotReport, Base), SnapshotFailed> {
        let Captured { sections, written, mut config, paused, diff } = captured;
        config.devices.iter_mut().for_each(DeviceConfig::pin);
        let state = sections.to_bytes().map_err(SnapshotFailed::Save)?;
        let memory = self.dir.join(MEMORY);
        let crc32 = written.crc32(&self.memory).map_err(SnapshotFailed::io("read", &memory))?;
        let id = random::<16>().map_err(SnapshotFailed::io("read", Path::new("/dev/urandom")))?;
        let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
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
                diff: diff.map(|(base, pages)| self.diff(base, &pages, bytes)).transpose()?,
            },
            config,
            state_bytes: state.len() as u64,
            state_crc32: crc32fast::hash(&state),
        };
        let mut text = serde_json::to_vec_pretty(&manifest).map_err(|error| SnapshotFailed::Manifest {
            path: self.place.clone(),
            reason: error.to_string(),
        })?;
        text.push(b'\n');
        self.memory.sync_all().map_err(SnapshotFailed::io("write", &memory))?;
        for (name, bytes) in [(STATE, state), (MANIFEST, text)] {
            let path = self.dir.join(name);
            let write = || {
                let mut file = create(&path)?;
                file.write_all(&bytes)?;
                file.sync_all()
            };
            write().map_err(SnapshotFailed::io("write", &path))?;
        }
        self.put_in_place()?;
        let base = Base { id: id.clone(), path: self.place.clone() };
        Ok((SnapshotReport { paused, memory_bytes: written.bytes(), id }, base))
    }

    /// How the difference to `base` is described here.
    fn diff(&self, base: Base, pages: &Pages, bytes: u64) -> Result<Diff, SnapshotFailed> {
        if base.path == self.place {
            return Err(SnapshotFailed::OverBase(base.path));
        }
        // Snapshots side by side can be moved together.
        let beside = base.path.parent() == self.place.parent();
        let path = match base.path.file_name() {
            Some(name) if beside => Path::new("..").join(name),
            _ => base.path,
        };
        Ok(Diff { parent: base.id, path, pages: pages.runs(0, bytes).collect() })
    }

    fn put_in_place(&self) -> Result<(), SnapshotFailed> {
        let error = SnapshotFailed::io("write", &self.place);
        sync_dir(&self.dir).map_err(&error)?;
        if self.place.exists() {
            // It may have come meanwhile.
            if is_taken(&self.place) {
                return Err(SnapshotFailed::Taken(self.place.clone()));
            }
            // What was there goes with the draft.
            renameat_with(CWD, &self.dir, CWD, &self.place, RenameFlags::EXCHANGE)
                .map_err(|errno| error(errno.into()))?;
        } else {
            fs::rename(&self.dir, &self.place).map_err(&error)?;
        }
        self.place.parent().map_or(Ok(()), sync_dir).map_err(error)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        _ = fs::remove_dir_all(&self.dir);
    }
}

/// Removes what snapshots to `place` have left that were killed: directories with such a beginning of their names and eight
/// digits behind it that nobody has locked.
fn remove_left(place: &Path, beginning: &str) {
    let Some(Ok(entries)) = place.parent().map(fs::read_dir) else { return };
    let is_left = |entry: &fs::DirEntry| {
        let name = entry.file_name();
        let digits = name.to_str().and_then(|name| name.strip_prefix(beginning)).unwrap_or_default();
        digits.len() == 8
            && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
            && entry.file_type().is_ok_and(|kind| kind.is_dir())
    };
    for entry in entries.flatten().filter(is_left) {
        let free = File::open(entry.path())
            .is_ok_and(|dir| flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok());
        if free {
            _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Whether something is at `place` that is neither a snapshot nor an empty directory.
fn is_taken(place: &Path) -> bool {
    match fs::read_dir(place) {
        Ok(mut entries) => entries.next().is_some() && !place.join(MANIFEST).is_file(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// A new file that only its owner reads: the guest's secrets are in it.
fn create(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Bytes of the host's random number generator.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
