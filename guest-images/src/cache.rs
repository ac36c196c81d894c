//! Where built things live: found by the hash of what they are built from, whole or not there at all.

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// No place to put things.
    #[error("no cache directory: set XDG_CACHE_HOME or HOME")]
    NoHome,
    /// The directory or a file in it cannot be made.
    #[error("cannot use the cache at {path}; set XDG_CACHE_HOME to a directory that you can write to")]
    Unusable {
        /// What was touched.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// `$XDG_CACHE_HOME/vmm`, or `~/.cache/vmm`.
///
/// # Errors
/// [`CacheError::NoHome`] when the environment names neither.
pub fn directory() -> Result<PathBuf, CacheError> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .map(|base| base.join("vmm"))
        .ok_or(CacheError::NoHome)
}

/// A short name for a recipe: the first 48 bits of the SHA-256 of its parts, in hexadecimal.
#[must_use]
pub fn hash<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut sha = Sha256::new();
    for part in parts {
        // Lengths, so that moving a byte from one part to the next is another recipe.
        sha.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_le_bytes());
        sha.update(part);
    }
    sha.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// One kind of thing in the cache, e.g. `kernel`: a directory with an entry for each recipe.
pub(crate) struct Shelf {
    path: PathBuf,
}

/// The right to build one entry, for one process at a time.
pub(crate) struct BuildLock {
    _file: File,
}

impl Shelf {
    /// Opens the shelf `kind` of the cache at `base`, making it when needed.
    pub fn open(base: &Path, kind: &str) -> Result<Self, CacheError> {
        let path = base.join(kind);
        fs::create_dir_all(&path).map_err(|source| CacheError::Unusable { path: path.clone(), source })?;
        Ok(Self { path })
    }

    /// The path of the entry `name`, which exists only when the entry is whole.
    pub fn entry(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Waits until nobody else builds `name`, and sweeps away what an interrupted build has left.
    pub fn lock(&self, name: &str) -> Result<BuildLock, CacheError> {
        let path = self.path.join(format!(".{name}.lock"));
        let unusable = |source| CacheError::Unusable { path: path.clone(), source };
        let file = File::create(&path).map_err(unusable)?;
        file.lock().map_err(unusable)?;
        let prefix = temporary_prefix(name);
        for entry in fs::read_dir(&self.path).map_err(unusable)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                // What cannot be removed is in nobody's way.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        Ok(BuildLock { _file: file })
    }

    /// A directory to build `name` in; it vanishes with the value.
    pub fn workspace(&self, name: &str, _lock: &BuildLock) -> Result<TempDir, CacheError> {
        tempfile::Builder::new()
            .prefix(&temporary_prefix(name))
            .tempdir_in(&self.path)
            .map_err(|source| CacheError::Unusable { path: self.path.clone(), source })
    }

    /// Moves `built` (a file or directory inside a workspace) into place as entry `name`, in one step.
    pub fn publish(&self, built: &Path, name: &str, _lock: &BuildLock) -> Result<PathBuf, CacheError> {
        let target = self.entry(name);
        let unusable = |source| CacheError::Unusable { path: target.clone(), source };
        // On the disk before it has its name: a crash must not leave a name with nothing behind it.
        File::open(built)
            .and_then(|file| rustix::fs::syncfs(&file).map_err(io::Error::from))
            .map_err(unusable)?;
        match fs::rename(built, &target) {
            // Somebody has put it there by hand meanwhile: the same recipe, so the same thing.
            Err(_) if target.exists() => Ok(target),
            result => result.map(|()| target.clone()).map_err(unusable),
        }
    }
}

fn temporary_prefix(name: &str) -> String {
    format!(".{name}.build-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_is_its_parts_in_their_places() {
        let name = hash([b"ab".as_slice(), b"c"]);
        assert_eq!(name.len(), 12);
        assert_eq!(name, hash([b"ab".as_slice(), b"c"]));
        assert_ne!(name, hash([b"a".as_slice(), b"bc"]));
        assert_ne!(name, hash([b"ab".as_slice(), b"d"]));
    }

    #[test]
    fn an_entry_appears_whole_and_leftovers_go() {
        let base = tempfile::tempdir().unwrap();
        let shelf = Shelf::open(base.path(), "things").unwrap();
        let leftover = shelf.path.join(".one.build-dead");
        fs::create_dir(&leftover).unwrap();
        let lock = shelf.lock("one").unwrap();
        assert!(!leftover.exists());
        let workspace = shelf.workspace("one", &lock).unwrap();
        let built = workspace.path().join("out");
        fs::create_dir(&built).unwrap();
        fs::write(built.join("file"), "whole").unwrap();
        assert!(!shelf.entry("one").exists());
        let entry = shelf.publish(&built, "one", &lock).unwrap();
        drop(workspace);
        assert_eq!(fs::read(entry.join("file")).unwrap(), b"whole");
        let names: Vec<_> =
            fs::read_dir(&shelf.path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "the entry and its lock: {names:?}");

        let again = shelf.workspace("one", &lock).unwrap();
        fs::create_dir(again.path().join("out")).unwrap();
        assert_eq!(shelf.publish(&again.path().join("out"), "one", &lock).unwrap(), entry);
    }
}
