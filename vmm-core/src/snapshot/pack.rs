//! A snapshot as one stream, for transport: a tar archive, compressed by zstd.
//!
//! The form is described in docs/snapshot-format.md. What is unpacked may come from anywhere: entries have their names and
//! their order, nothing is larger than the manifest says, which comes first, and no manifest may name another snapshot.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use tar::{EntryType, Header};

use super::manifest::{DiskFile, Manifest};
use super::memory_file::flat::{self, not_zero};
use super::memory_file::{MemoryFileError, Run, check_pages};
use super::place::{MANIFEST, MAX_MANIFEST, MEMORY, STATE, open_file};
use super::state_file::{self, Sections};
use super::{Draft, Place, Snapshot, SnapshotFailed, SnapshotKind, check_sections, disks, parse_manifest};

/// What is copied at a time.
const PIECE: u64 = 1 << 20;
/// Most zeroes behind the last entry: more than any tar makes.
const MAX_PADDING: usize = 1 << 20;
/// Fast, and not much larger than the best.
const LEVEL: i32 = 3;

/// Is told how many bytes of memory are done, and how many there are in all.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

impl Snapshot {
    /// Writes all of the snapshot, compressed, and of its memory what is not zero. One that is a difference to another is
    /// merged on the way, as by [`Self::merge_to`]; any other stays the same, with its id. Returns the id.
    pub fn pack(&self, to: impl Write, progress: Progress<'_>) -> Result<String, SnapshotFailed> {
        self.check_memory()?;
        let error = SnapshotFailed::io("read", &self.place.memory());
        let flat = self.memory_image()?.flat().map_err(&error)?;
        let contents = flat.contents().map_err(&error)?;
        let (manifest, state) = match self.manifest.memory.diff {
            None => self.as_it_is(contents.crc32())?,
            Some(_) => self.alone(contents.crc32())?,
        };
        let read_memory = |offset, buffer: &mut [u8]| flat.read_at(offset, buffer);
        let memory = Sparse { name: MEMORY.into(), runs: contents.runs, read: Box::new(read_memory) };
        let mut files = vec![memory];
        for disk in &manifest.disks {
            files.push(Sparse::disk(self.place.path(), &disk.file, disk.bytes)?);
        }
        let (mut done, total) = (0, files.iter().map(Sparse::bytes).sum());
        let mut count = |bytes| {
            done += bytes;
            progress(done, total);
        };
        let write = || -> io::Result<()> {
            let mut encoder = zstd::Encoder::new(to, LEVEL)?;
            encoder.include_checksum(true)?;
            let mut archive = tar::Builder::new(encoder);
            for (name, bytes) in [(MANIFEST, serde_json::to_vec_pretty(&manifest)?), (STATE, state.clone())] {
                archive.append(&header(name, bytes.len() as u64, &manifest)?, &bytes[..])?;
            }
            for file in &files {
                let map = serde_json::to_vec(&file.runs)?;
                archive.append(&header(&map_of(&file.name), map.len() as u64, &manifest)?, &map[..])?;
                let data = BufReader::with_capacity(PIECE as usize, file.reader(&mut count));
                archive.append(&header(&file.name, file.bytes(), &manifest)?, data)?;
            }
            archive.into_inner()?.finish()?.flush()
        };
        write().map_err(|error| SnapshotFailed::Pack(error.to_string()))?;
        Ok(manifest.id)
    }

    /// Makes a snapshot in the directory `dir` of what [`Self::pack`] has written. After an error there is what was there
    /// before. Returns its id.
    ///
    /// Whoever made it says in its configuration which files of this host a restored machine opens: look at
    /// [`Self::config`] before a snapshot is restored that is not your own.
    pub fn unpack(from: impl Read, dir: &Path, progress: Progress<'_>) -> Result<String, SnapshotFailed> {
        let decoder = zstd::Decoder::new(from).map_err(unreadable)?.single_frame();
        let mut archive = tar::Archive::new(decoder);
        let unpacked = {
            // Raw: no name is longer than its header, and no header is about another.
            let mut entries = archive.entries().map_err(unreadable)?.raw(true);
            let mut next = |name: &str| next(&mut entries, name);
            let manifest = parse_manifest(dir, &next(MANIFEST)?.all(MAX_MANIFEST)?)?;
            if manifest.memory.diff.is_some() {
                return Err(damaged("its manifest is that of a difference to another snapshot"));
            }
            let state = next(STATE)?.exactly(manifest.state_bytes.min(state_file::MAX_BYTES as u64))?;
            let sections = check_sections(dir, &manifest, &state)?;
            disks::check_names(&manifest).map_err(|reason| damaged(&reason))?;
            let runs = next(&map_of(MEMORY))?.runs(manifest.memory.bytes)?;
            check_pages(&runs, manifest.memory.bytes)?;
            let mut unpacked = Unpacked {
                draft: Draft::begin(&Place::Dir(dir.into()), SnapshotKind::Full)?,
                manifest,
                sections,
                state,
                progress,
            };
            unpacked.memory(next(MEMORY)?, &runs)?;
            for disk in unpacked.manifest.disks.clone() {
                let runs = next(&map_of(&disk.file))?.runs(disk.bytes)?;
                unpacked.disk(next(&disk.file)?, &disk, &runs)?;
            }
            if entries.next().is_some() {
                return Err(damaged("it has more than a snapshot"));
            }
            unpacked
        };
        let mut decoder = archive.into_inner();
        // To its very end, where zstd's checksum is.
        padding(&mut decoder)?;
        if !decoder.finish().fill_buf().map_err(unreadable)?.is_empty() {
            return Err(damaged("something follows its end"));
        }
        unpacked.put()
    }

    /// Manifest and state file of this snapshot, of which nothing changes; its memory has this checksum.
    fn as_it_is(&self, crc32: u32) -> Result<(Manifest, Vec<u8>), SnapshotFailed> {
        let Place::Dir(dir) = &self.place else { return self.alone(crc32) };
        let mut manifest = self.manifest.clone();
        manifest.memory.crc32 = Some(crc32);
        Ok((manifest, Place::read_state(dir)?))
    }
}

/// The header of an entry.
fn header(name: &str, bytes: u64, manifest: &Manifest) -> io::Result<Header> {
    let mut header = Header::new_gnu();
    header.set_path(name)?;
    header.set_entry_type(EntryType::Regular);
    header.set_size(bytes);
    header.set_mode(0o600);
    header.set_mtime(manifest.made_at);
    header.set_cksum();
    Ok(header)
}

/// By what name an archive has the list of what is not zero in a file.
fn map_of(name: &str) -> String {
    format!("{name}.map")
}

/// Reads what is at an offset.
type ReadAt<'a> = dyn Fn(u64, &mut [u8]) -> io::Result<()> + 'a;

/// A file of which only what is not zero is packed.
struct Sparse<'a> {
    name: String,
    /// What is not zero.
    runs: Vec<Run>,
    read: Box<ReadAt<'a>>,
}

impl Sparse<'_> {
    /// The disk `name` of the snapshot in `dir`, of so many bytes.
    fn disk(dir: &Path, name: &str, bytes: u64) -> Result<Self, SnapshotFailed> {
        let path = dir.join(name);
        let error = SnapshotFailed::io("read", &path);
        let file = open_file(&path).map_err(&error)?;
        let runs = flat::runs(&file, bytes).map_err(error)?;
        let read = move |offset, buffer: &mut [u8]| file.read_exact_at(buffer, offset);
        Ok(Self { name: name.into(), runs, read: Box::new(read) })
    }

    fn bytes(&self) -> u64 {
        self.runs.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Reads what is not zero, one run behind the other, and tells `count` how much.
    fn reader<'a>(&'a self, count: &'a mut dyn FnMut(u64)) -> Reader<'a> {
        Reader { read: &self.read, runs: &self.runs, at: 0, count }
    }
}

struct Reader<'a> {
    read: &'a ReadAt<'a>,
    runs: &'a [Run],
    /// How far the first of them is read.
    at: u64,
    count: &'a mut dyn FnMut(u64),
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(&(offset, bytes)) = self.runs.first() else { return Ok(0) };
        let len = (bytes - self.at).min(buffer.len() as u64);
        (self.read)(offset + self.at, &mut buffer[..len as usize])?;
        self.at += len;
        if self.at == bytes {
            (self.runs, self.at) = (&self.runs[1..], 0);
        }
        (self.count)(len);
        Ok(len as usize)
    }
}

/// A file in an archive.
struct Packed<R> {
    name: String,
    bytes: u64,
    data: R,
}

/// The next file, which must have this name.
fn next<'a, R: Read + 'a>(
    entries: &mut tar::Entries<'a, R>,
    name: &str,
) -> Result<Packed<tar::Entry<'a, R>>, SnapshotFailed> {
    let entry = entries.next().ok_or_else(|| damaged(&format!("it ends before '{name}'")))?;
    let data = entry.map_err(unreadable)?;
    let header = data.header();
    if header.entry_type() != EntryType::Regular || *header.path_bytes() != *name.as_bytes() {
        return Err(damaged(&format!("it has something else where '{name}' should be")));
    }
    Ok(Packed { name: name.into(), bytes: data.size(), data })
}

impl<R: Read> Packed<R> {
    /// All of it, which is at most so much.
    fn all(self, most: u64) -> Result<Vec<u8>, SnapshotFailed> {
        match self.bytes > most {
            true => Err(damaged(&format!("'{}' is too large", self.name))),
            false => {
                let bytes = self.bytes;
                self.exactly(bytes)
            }
        }
    }

    /// All of it, which is so much.
    fn exactly(mut self, bytes: u64) -> Result<Vec<u8>, SnapshotFailed> {
        self.has(bytes)?;
        let mut read = Vec::new();
        self.data.read_to_end(&mut read).map_err(unreadable)?;
        match read.len() as u64 == bytes {
            true => Ok(read),
            false => Err(damaged(&format!("it ends within '{}'", self.name))),
        }
    }

    /// A list of what is not zero in a file of so many bytes, from the lowest up.
    fn runs(self, bytes: u64) -> Result<Vec<Run>, SnapshotFailed> {
        let wrong = format!("'{}' is no list of pages", self.name);
        let runs: Vec<Run> = serde_json::from_slice(&self.all(MAX_MANIFEST)?).map_err(|_| damaged(&wrong))?;
        let mut end = 0;
        for &(offset, len) in &runs {
            match offset.checked_add(len) {
                Some(next) if offset >= end && len > 0 && next <= bytes => end = next,
                _ => return Err(damaged(&wrong)),
            }
        }
        Ok(runs)
    }

    fn has(&self, bytes: u64) -> Result<(), SnapshotFailed> {
        match self.bytes == bytes {
            true => Ok(()),
            false => Err(damaged(&format!("'{}' has not the size that it should have", self.name))),
        }
    }
}

/// A snapshot on its way out of an archive.
struct Unpacked<'a> {
    draft: Draft,
    manifest: Manifest,
    sections: Sections,
    state: Vec<u8>,
    progress: Progress<'a>,
}

impl Unpacked<'_> {
    fn memory(&mut self, packed: Packed<impl Read>, runs: &[Run]) -> Result<(), SnapshotFailed> {
        let bytes = self.manifest.memory.bytes;
        let crc32 = fill(self.draft.memory_file(), packed, bytes, runs, self.progress)?;
        match self.manifest.memory.crc32 == Some(crc32) {
            true => Ok(()),
            false => Err(MemoryFileError::Contents { path: MEMORY.into() }.into()),
        }
    }

    fn disk(
        &mut self,
        packed: Packed<impl Read>,
        disk: &DiskFile,
        runs: &[Run],
    ) -> Result<(), SnapshotFailed> {
        let (file, _) = self.draft.create_disk(&disk.file)?;
        fill(&file, packed, disk.bytes, runs, self.progress)?;
        file.sync_all().map_err(SnapshotFailed::io("write", Path::new(&disk.file)))
    }

    fn put(self) -> Result<String, SnapshotFailed> {
        // Its disks are those of its devices.
        disks::config(&self.draft.draft, &self.manifest)?;
        Ok(self.draft.put(&self.manifest, self.sections, &self.state, &|| true)?.id)
    }
}

/// Writes a file of so many bytes: what is zero stays a hole. Returns the CRC-32 of the rest.
fn fill(
    file: &File,
    mut packed: Packed<impl Read>,
    size: u64,
    runs: &[Run],
    progress: Progress<'_>,
) -> Result<u32, SnapshotFailed> {
    let total = runs.iter().map(|(_, bytes)| bytes).sum();
    packed.has(total)?;
    let error = SnapshotFailed::io("write", Path::new(&packed.name));
    file.set_len(size).map_err(&error)?;
    let (mut hasher, mut done) = (crc32fast::Hasher::new(), 0);
    let mut buffer = vec![0; PIECE as usize];
    for &(offset, bytes) in runs {
        for at in (0..bytes).step_by(PIECE as usize) {
            let piece = &mut buffer[..(bytes - at).min(PIECE) as usize];
            packed.data.read_exact(piece).map_err(unreadable)?;
            for (from, to) in not_zero(piece) {
                hasher.update(&piece[from..to]);
                file.write_all_at(&piece[from..to], offset + at + from as u64).map_err(&error)?;
            }
            done += piece.len() as u64;
            progress(done, total);
        }
    }
    Ok(hasher.finalize())
}

/// Reads what is behind the last entry: zeroes.
fn padding(from: &mut impl Read) -> Result<(), SnapshotFailed> {
    let mut rest = Vec::new();
    from.take(MAX_PADDING as u64 + 1).read_to_end(&mut rest).map_err(unreadable)?;
    match rest.len() <= MAX_PADDING && rest.iter().all(|byte| *byte == 0) {
        true => Ok(()),
        false => Err(damaged("it has more than a snapshot")),
    }
}

fn damaged(reason: &str) -> SnapshotFailed {
    SnapshotFailed::Unpack(reason.into())
}

fn unreadable(error: io::Error) -> SnapshotFailed {
    SnapshotFailed::Unpack(error.to_string())
}

#[cfg(test)]
mod tests;
