//! Where a snapshot is: a directory, or two files, as clients of Firecracker have it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ciborium::Value;
use devices::snapshot::{Saved, SnapshotError};
use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags, flock, renameat_with};

use super::manifest::{Diff, FORMAT};
use super::state_file::{self, SectionError, Sections};
use super::{Base, MAX_CHAIN, Run, SnapshotFailed, random, read_manifest};
use crate::uffd::TOUCHED;

/// Names of the files in a directory.
pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const STATE: &str = "state";
pub(super) const MEMORY: &str = "memory";
/// The section of a state file without a directory that the manifest is in.
const SECTION: &str = "manifest";

/// What is between a name and the digits of a draft that is beside it.
const DRAFT: &str = ".vmm-draft.";
const DIGITS: usize = 8;

/// Most bytes of a manifest. That of a diff lists its pages.
pub(super) const MAX_MANIFEST: u64 = 64 << 20;

/// Where a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A directory with everything in it.
    Dir(PathBuf),
    /// Two files: the state, with the manifest as one more section, and the memory.
    Files { state: PathBuf, memory: PathBuf },
}

impl Place {
    /// By what people know it.
    pub fn path(&self) -> &Path {
        match self {
            Self::Dir(path) | Self::Files { state: path, .. } => path,
        }
    }

    /// The memory file.
    pub fn memory(&self) -> PathBuf {
        match self {
            Self::Dir(dir) => dir.join(MEMORY),
            Self::Files { memory, .. } => memory.clone(),
        }
    }

    /// The same wherever the process is.
    pub fn absolute(&self) -> Result<Self, SnapshotFailed> {
        let absolute = |path: &Path| std::path::absolute(path).map_err(SnapshotFailed::io("find", path));
        Ok(match self {
            Self::Dir(dir) => Self::Dir(absolute(dir)?),
            Self::Files { state, memory } => {
                Self::Files { state: absolute(state)?, memory: absolute(memory)? }
            }
        })
    }

    /// The text of the manifest, and the sections, if they are in the same file.
    pub fn read_manifest(&self) -> Result<(Vec<u8>, Option<Sections>), SnapshotFailed> {
        match self {
            Self::Dir(dir) => {
                refuse_links(dir, &[MANIFEST, STATE, MEMORY])?;
                let text = read_at_most(&dir.join(MANIFEST), MAX_MANIFEST);
                Ok((text.map_err(|error| not_there(dir, error))?, None))
            }
            Self::Files { state, .. } => {
                let bytes = read_at_most(state, MAX_MANIFEST + state_file::MAX_BYTES as u64)?;
                let wrong = |source| SnapshotFailed::State { path: state.clone(), source };
                let mut sections = Sections::from_bytes(&bytes).map_err(wrong)?;
                match sections.take(SECTION).map_err(wrong)?.value {
                    Value::Text(text) => Ok((text.into_bytes(), Some(sections))),
                    _ => Err(wrong(SectionError::of(SECTION)(SnapshotError::Malformed(
                        "it is no text".into(),
                    )))),
                }
            }
        }
    }

    /// The bytes of the state file in a directory.
    pub fn read_state(dir: &Path) -> Result<Vec<u8>, SnapshotFailed> {
        read_at_most(&dir.join(STATE), state_file::MAX_BYTES as u64)
    }

    /// Makes a place beside this one, with an empty memory file; for a directory also its lock, which says that somebody is
    /// at work in it. Nothing is left after an error.
    pub fn begin_draft(&self) -> Result<(Self, File, Option<File>), SnapshotFailed> {
        self.check_free()?;
        let draft = match self {
            Self::Dir(dir) => {
                remove_left(dir);
                let draft = beside(dir)?;
                fs::DirBuilder::new()
                    .mode(0o700)
                    .create(&draft)
                    .map_err(SnapshotFailed::io("make", &draft))?;
                Self::Dir(draft)
            }
            Self::Files { state, memory } if state == memory => {
                return Err(SnapshotFailed::OneFile(state.clone()));
            }
            Self::Files { state, memory } => Self::Files { state: beside(state)?, memory: beside(memory)? },
        };
        let memory = draft.memory();
        let files = || {
            let lock = match &draft {
                Self::Dir(dir) => Some(lock(dir)?),
                Self::Files { .. } => None,
            };
            Ok((create(&memory)?, lock))
        };
        match files() {
            Ok((file, lock)) => Ok((draft, file, lock)),
            Err(error) => {
                draft.remove();
                Err(SnapshotFailed::io("make", &memory)(error))
            }
        }
    }

    /// Makes a file for a disk: to be kept, and to be written.
    pub fn create_disk(&self, name: &str) -> Result<(File, File), SnapshotFailed> {
        let path = self.path().join(name);
        let make = || {
            let file = create(&path)?;
            Ok((file.try_clone()?, file))
        };
        make().map_err(SnapshotFailed::io("make", &path))
    }

    /// Writes state and manifest.
    pub fn write(
        &self,
        mut sections: Sections,
        state: &[u8],
        manifest: Vec<u8>,
    ) -> Result<(), SnapshotFailed> {
        let files = match self {
            Self::Dir(dir) => vec![(dir.join(STATE), state.to_vec()), (dir.join(MANIFEST), manifest)],
            Self::Files { state, .. } => {
                let text = String::from_utf8_lossy(&manifest).into_owned();
                sections.push(SECTION, Saved { version: FORMAT as u16, value: Value::Text(text) });
                vec![(state.clone(), sections.to_bytes().map_err(SnapshotFailed::Save)?)]
            }
        };
        for (path, bytes) in files {
            let write = || create(&path)?.write_all(&bytes);
            write().map_err(SnapshotFailed::io("write", &path))?;
        }
        Ok(())
    }

    /// Makes what [`Self::write`] has written last.
    pub fn sync(&self) -> Result<(), SnapshotFailed> {
        let paths = match self {
            Self::Dir(dir) => vec![dir.join(STATE), dir.join(MANIFEST), dir.clone()],
            Self::Files { state, .. } => vec![state.clone()],
        };
        paths.iter().try_for_each(|path| sync(path).map_err(SnapshotFailed::io("write", path)))
    }

    /// Makes the names of what is here last.
    pub fn sync_parents(&self) -> Result<(), SnapshotFailed> {
        let (path, memory) = (self.path().parent(), self.memory());
        let in_files = memory.parent().filter(|_| matches!(self, Self::Files { .. }));
        let mut parents = path.into_iter().chain(in_files);
        parents.try_for_each(sync).map_err(SnapshotFailed::io("write", self.path()))
    }

    /// Moves a draft that is whole here. What was here is gone, or still there after an error.
    pub fn replace_with(&self, draft: &Self) -> Result<(), SnapshotFailed> {
        let error = SnapshotFailed::io("write", self.path());
        // It may have come meanwhile.
        self.check_free()?;
        let moved = match (self, draft) {
            (Self::Files { state, memory }, Self::Files { state: new_state, memory: new_memory }) => {
                // Never an old state with a new memory: rather none.
                let away = if memory.exists() { remove_file(state) } else { Ok(()) };
                away.and_then(|()| fs::rename(new_memory, memory)).and_then(|()| fs::rename(new_state, state))
            }
            // What was there goes with the draft.
            _ if self.path().exists() => {
                renameat_with(CWD, draft.path(), CWD, self.path(), RenameFlags::EXCHANGE).map_err(Into::into)
            }
            _ => fs::rename(draft.path(), self.path()),
        };
        moved.map_err(error)
    }

    /// Removes a draft, or what is left of it.
    pub fn remove(&self) {
        _ = match self {
            Self::Dir(dir) => fs::remove_dir_all(dir),
            Self::Files { state, memory } => remove_file(state).and(remove_file(memory)),
        };
    }

    /// Fails if something is here that is neither a snapshot nor empty.
    fn check_free(&self) -> Result<(), SnapshotFailed> {
        match self {
            Self::Dir(dir) => {
                let taken = || SnapshotFailed::Taken(dir.clone());
                let there: Vec<OsString> = match fs::read_dir(dir) {
                    Ok(entries) => entries.flatten().map(|entry| entry.file_name()).collect(),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                    Err(_) => return Err(taken()),
                };
                if there.is_empty() {
                    return Ok(());
                }
                let own = own_files(dir).ok_or_else(taken)?;
                // It goes with the snapshot that is replaced.
                match there.iter().all(|name| own.iter().any(|own| own.as_str() == name)) {
                    true => Ok(()),
                    false => Err(SnapshotFailed::NotAlone(dir.clone())),
                }
            }
            // Whether a memory is a memory, nobody can say.
            Self::Files { state, memory } => {
                let other = |path: &&PathBuf| fs::symlink_metadata(path).is_ok_and(|meta| !meta.is_file());
                let taken = [state, memory].into_iter().find(other);
                taken.map_or(Ok(()), |path| Err(SnapshotFailed::Taken(path.clone())))
            }
        }
    }

    /// A file or directory that both places share, by whatever path.
    fn shared_with(&self, other: &Self) -> Option<PathBuf> {
        let paths = |place: &Self| [place.path().to_owned(), place.memory()];
        let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
        let same = |one: &PathBuf, other: &PathBuf| {
            one == other || identity(one).is_some_and(|one| identity(other) == Some(one))
        };
        let ours = paths(self);
        paths(other).into_iter().find(|path| ours.iter().any(|own| same(own, path)))
    }

    /// Fails if a snapshot here would replace `base`, or anything below it.
    fn is_not_below(&self, base: &Self) -> Result<(), SnapshotFailed> {
        let mut link = base.clone();
        for _ in 0..=MAX_CHAIN {
            if let Some(path) = self.shared_with(&link) {
                return Err(SnapshotFailed::OverBase(path));
            }
            // What cannot be read is nothing that could be restored.
            let Ok((manifest, _)) = read_manifest(&link) else { return Ok(()) };
            let Some(diff) = manifest.memory.diff else { return Ok(()) };
            link = link.base_of(&diff);
        }
        Ok(())
    }

    /// How a diff here tells what it is a difference to.
    pub fn diff(&self, base: Base, pages: Vec<Run>) -> Result<Diff, SnapshotFailed> {
        self.is_not_below(&base.place)?;
        let memory = match &base.place {
            Self::Dir(_) => None,
            Self::Files { memory, .. } => Some(self.seen_from_here(memory)),
        };
        Ok(Diff { parent: base.id, path: self.seen_from_here(base.place.path()), memory, pages })
    }

    /// Snapshots side by side can be moved together.
    fn seen_from_here(&self, path: &Path) -> PathBuf {
        match path.file_name() {
            Some(name) if path.parent() == self.path().parent() => match self {
                Self::Dir(_) => Path::new("..").join(name),
                Self::Files { .. } => name.into(),
            },
            _ => path.into(),
        }
    }

    /// Where that is which a diff here is a difference to.
    pub fn base_of(&self, diff: &Diff) -> Self {
        let from = match self {
            Self::Dir(dir) => dir,
            Self::Files { state, .. } => state.parent().unwrap_or(state),
        };
        let path = from.join(&diff.path);
        match &diff.memory {
            None => Self::Dir(path),
            Some(memory) => Self::Files { state: path, memory: from.join(memory) },
        }
    }
}

/// A directory that is held: as long as that is so, no other has its identity.
pub(super) struct Pin(File);

impl Pin {
    /// The directory at `path`, if there is one.
    pub fn of(path: &Path) -> Option<Self> {
        let flags = (OFlags::DIRECTORY | OFlags::NONBLOCK).bits() as i32;
        File::options().read(true).custom_flags(flags).open(path).ok().map(Self)
    }

    /// Whether it still is at `path`.
    pub fn is_at(&self, path: &Path) -> bool {
        let identity = |meta: fs::Metadata| (meta.dev(), meta.ino());
        let here = fs::metadata(path).map(identity).ok();
        here.is_some() && here == self.0.metadata().map(identity).ok()
    }
}

/// How the names begin of what is made beside `path`.
fn beginning(path: &Path) -> Option<OsString> {
    let mut name = OsString::from(".");
    name.push(path.file_name()?);
    // Not a name that people give: what nobody has locked is removed.
    name.push(DRAFT);
    Some(name)
}

/// By what people know a path in a draft: the one that it is to have.
pub(super) fn without_draft(path: &Path) -> PathBuf {
    let known = |part: &OsStr| {
        let part = part.to_str()?;
        let (name, _) = part.split_at_checked(part.len().checked_sub(DIGITS)?)?;
        Some(OsString::from(name.strip_suffix(DRAFT)?.strip_prefix('.')?))
    };
    path.iter().map(|part| known(part).unwrap_or_else(|| part.into())).collect()
}

/// A name beside `path` that nobody has.
fn beside(path: &Path) -> Result<PathBuf, SnapshotFailed> {
    let mut name = beginning(path).ok_or_else(|| SnapshotFailed::Taken(path.into()))?;
    name.push(format!("{:08x}", random::<4>().map_or(0, u32::from_le_bytes)));
    Ok(path.with_file_name(name))
}

/// Names of the files of the snapshot in a directory, of whatever version; `None` if its manifest is none: others have files
/// of that name, too.
fn own_files(dir: &Path) -> Option<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Disk {
        file: String,
    }
    #[derive(serde::Deserialize)]
    struct Known {
        #[serde(rename = "format")]
        _format: u32,
        #[serde(rename = "id")]
        _id: String,
        #[serde(rename = "state_crc32")]
        _state: u32,
        #[serde(default)]
        disks: Vec<Disk>,
    }
    let text = read_at_most(&dir.join(MANIFEST), MAX_MANIFEST).ok()?;
    let known: Known = serde_json::from_slice(&text).ok()?;
    let files = [MANIFEST, STATE, MEMORY, TOUCHED].map(String::from);
    Some(files.into_iter().chain(known.disks.into_iter().map(|disk| disk.file)).collect())
}

/// Removes what snapshots to the directory `place` have left that were killed: directories beside it that nobody has locked.
fn remove_left(place: &Path) {
    let (Some(Ok(entries)), Some(beginning)) = (place.parent().map(fs::read_dir), beginning(place)) else {
        return;
    };
    let is_left = |entry: &fs::DirEntry| {
        let name = entry.file_name();
        let digits = name.as_encoded_bytes().strip_prefix(beginning.as_encoded_bytes()).unwrap_or_default();
        digits.len() == DIGITS
            && digits.iter().all(u8::is_ascii_hexdigit)
            && entry.file_type().is_ok_and(|kind| kind.is_dir())
    };
    for entry in entries.flatten().filter(is_left) {
        if lock(&entry.path()).is_ok() {
            _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Locks a directory, which fails when somebody else has it locked.
fn lock(dir: &Path) -> io::Result<File> {
    let file = File::open(dir)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

/// Fails if a file of the directory is a link, which no snapshot has: it would be another file of this host.
pub(super) fn refuse_links(dir: &Path, names: &[&str]) -> Result<(), SnapshotFailed> {
    match names.iter().map(|name| dir.join(name)).find(|path| path.is_symlink()) {
        Some(link) => Err(SnapshotFailed::io("read", &link)(io::Error::other("it is a link, not a file"))),
        None => Ok(()),
    }
}

/// Why there is no manifest in `dir`, if that is the error.
fn not_there(dir: &Path, error: SnapshotFailed) -> SnapshotFailed {
    let reason = match &error {
        SnapshotFailed::Io { source, .. } if source.kind() == io::ErrorKind::NotADirectory => {
            "it is a file; one that is packed is to be unpacked first"
        }
        SnapshotFailed::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => match dir.exists() {
            true => "there is no manifest.json in it",
            false => "there is nothing of this name",
        },
        _ => return error,
    };
    SnapshotFailed::Manifest { path: dir.into(), reason: reason.into() }
}

/// Opens a file of a snapshot to read it. A pipe, which would wait for a writer, is none.
pub(super) fn open_file(path: &Path) -> io::Result<File> {
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

/// A new file that only its owner reads: the guest's secrets are in it.
fn create(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Removes a file, if it is there.
fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes a file or a directory last.
fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diff_finds_its_base_wherever_both_are() {
        let files = |state: &str, memory: &str| Place::Files { state: state.into(), memory: memory.into() };
        let places = [
            Place::Dir("/a/one".into()),
            Place::Dir("/b/two".into()),
            files("/a/three", "/a/four"),
            files("/a/five", "/c/six"),
            files("/b/seven", "/a/eight"),
        ];
        let diff =
            |from: &Place, to: &Place| from.diff(Base { id: String::new(), place: to.clone() }, Vec::new());
        for (from, to) in places.iter().flat_map(|from| places.iter().map(move |to| (from, to))) {
            if from == to {
                assert!(matches!(diff(from, to), Err(SnapshotFailed::OverBase(_))), "{from:?}");
                continue;
            }
            // "one/../two" is "two" but for symbolic links.
            let plain = |path: PathBuf| {
                PathBuf::from(path.to_str().unwrap().replace("/one/..", "").replace("/two/..", ""))
            };
            let found = match from.base_of(&diff(from, to).unwrap()) {
                Place::Dir(dir) => Place::Dir(plain(dir)),
                Place::Files { state, memory } => Place::Files { state: plain(state), memory: plain(memory) },
            };
            assert_eq!(found, *to, "from {from:?}");
        }
        assert!(diff(&files("/a/other", "/a/four"), &files("/a/three", "/a/four")).is_err(), "its memory");
    }

    #[test]
    fn sentences_have_the_names_that_people_know() {
        let place = Path::new("/a/web");
        let draft = beside(place).unwrap();
        assert_eq!(without_draft(&draft.join("memory")), Path::new("/a/web/memory"));
        assert_eq!(without_draft(&draft), place);
        for other in ["/", "a", "../.vmm-draft.", "/.vmm-draft.1/x", "é.vmm-draft.é234567"] {
            assert_eq!(without_draft(Path::new(other)), Path::new(other));
        }
    }

    #[test]
    fn two_files_come_whole_or_not_at_all_and_are_their_owners() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let place = Place::Files { state: at("state"), memory: at("memory") };
        let names = || {
            let mut names: Vec<_> =
                fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        for text in ["first", "second"] {
            let (draft, mut memory, _) = place.begin_draft().unwrap();
            memory.write_all(text.as_bytes()).unwrap();
            draft.write(Sections::default(), &[], text.into()).unwrap();
            place.replace_with(&draft).unwrap();
            let (manifest, sections) = place.read_manifest().unwrap();
            assert_eq!((manifest, sections.is_some()), (text.into(), true));
            assert_eq!(fs::read(at("memory")).unwrap(), text.as_bytes());
            assert_eq!(names(), ["memory", "state"]);
        }
        for name in names() {
            assert_eq!(fs::metadata(at(name.to_str().unwrap())).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let (draft, ..) = place.begin_draft().unwrap();
        draft.remove();
        assert_eq!(names(), ["memory", "state"], "what was there stays");
        fs::create_dir(at("dir")).unwrap();
        for wrong in [(at("dir"), at("memory")), (at("state"), at("dir")), (at("new"), at("new"))] {
            let wrong = Place::Files { state: wrong.0, memory: wrong.1 };
            assert!(wrong.begin_draft().is_err(), "{wrong:?}");
        }
        assert_eq!(names(), ["dir", "memory", "state"]);
    }
}
