//! A chain of diffs becomes one full snapshot.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::storage::copy;
use serde::Serialize;

use super::manifest::{Manifest, MemoryMap};
use super::place::open_file;
use super::{Draft, Place, Snapshot, SnapshotFailed, SnapshotKind, SnapshotReport, links, new_id};

/// A snapshot that another one needs, or that other one itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ChainLink {
    /// Its id.
    pub id: String,
    /// Its directory, or its state file if it is two files.
    pub path: PathBuf,
    /// When it was made, in seconds since 1970.
    pub made_at: u64,
    /// What its memory takes on disk.
    pub on_disk_bytes: u64,
}

impl Snapshot {
    /// This snapshot and those that it is a difference to, from the last to the first.
    pub fn chain(&self) -> Result<Vec<ChainLink>, SnapshotFailed> {
        let links = links(&self.place, &self.manifest)?.into_iter().map(|link| {
            let memory = link.place.memory();
            let meta = fs::metadata(&memory).map_err(SnapshotFailed::io("read", &memory))?;
            Ok(ChainLink {
                id: link.manifest.id,
                path: link.place.path().into(),
                made_at: link.manifest.made_at,
                // The unit of st_blocks (stat(2)).
                on_disk_bytes: meta.blocks() * 512,
            })
        });
        links.collect()
    }

    /// Writes a snapshot of the same machine at the same moment to `dir`, with all of the memory in it, so that it needs no
    /// other. It has an id of its own: a diff to this snapshot is none to that one. The chain stays as it is.
    pub fn merge_to(&self, dir: &Path) -> Result<SnapshotReport, SnapshotFailed> {
        let place = Place::Dir(dir.into());
        self.spare_chain(&place)?;
        self.check_memory()?;
        let draft = Draft::begin(&place, SnapshotKind::Full)?;
        let flat = self.memory_image()?.flat().map_err(SnapshotFailed::io("read", &self.place.memory()))?;
        let contents =
            flat.copy_to(draft.memory_file()).map_err(SnapshotFailed::io("write", &place.memory()))?;
        let (manifest, state) = self.alone(contents.crc32())?;
        for disk in &self.manifest.disks {
            let path = self.place.path().join(&disk.file);
            let from = open_file(&path).map_err(SnapshotFailed::io("read", &path))?;
            let (file, to) = draft.create_disk(&disk.file)?;
            copy(from.as_fd(), &to)
                .and_then(|()| file.sync_all())
                .map_err(SnapshotFailed::io("copy", &path))?;
        }
        let id = manifest.id.clone();
        draft.put(&manifest, self.sections.clone(), &state, &|| true)?;
        Ok(SnapshotReport { paused: Duration::ZERO, memory_bytes: contents.bytes(), id })
    }

    /// Manifest and state file of this snapshot with all of its memory in one file.
    pub(super) fn alone(&self, crc32: u32) -> Result<(Manifest, Vec<u8>), SnapshotFailed> {
        let state = self.sections.to_bytes().map_err(SnapshotFailed::Save)?;
        let manifest = Manifest {
            id: new_id()?,
            memory: MemoryMap { crc32: Some(crc32), diff: None, ..self.manifest.memory.clone() },
            state_bytes: state.len() as u64,
            state_crc32: crc32fast::hash(&state),
            ..self.manifest.clone()
        };
        Ok((manifest, state))
    }

    /// Fails if `place` is that of a snapshot which this one consists of: others may be differences to it.
    fn spare_chain(&self, place: &Place) -> Result<(), SnapshotFailed> {
        let real = |path: &Path| -> PathBuf {
            fs::canonicalize(path).or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.into())
        };
        let there = real(place.path());
        let chain = links(&self.place, &self.manifest)?;
        match chain.iter().any(|link| real(link.place.path()) == there) {
            true => Err(SnapshotFailed::OverBase(place.path().into())),
            false => Ok(()),
        }
    }
}
