//! What is built once and kept: `$XDG_CACHE_HOME/vmm/KIND/HASH/`, where the hash is that of the recipe.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
pub use guest_images::cache::directory;

/// A short name for a recipe.
pub fn hash(recipe: &str) -> String {
    guest_images::cache::hash([recipe.as_bytes()])
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An exclusive lock between processes, held until dropped. Waits for others.
pub struct Lock(#[expect(dead_code, reason = "held for its lock, which ends when the file is closed")] File);

impl Lock {
    /// Takes the lock that the file at `path` stands for; the file and its directory are made if missing.
    pub fn take(path: &Path) -> Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
        }
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        file.lock().with_context(|| format!("lock {}", path.display()))?;
        Ok(Self(file))
    }
}

/// The directory of `kind` for `recipe`, filled by `build` if it is not there yet. It appears only when `build` has
/// succeeded; of several processes one builds and the others wait.
pub fn build_once(kind: &str, recipe: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let parent = directory()?.join(kind);
    let hash = hash(recipe);
    let done = parent.join(&hash);
    if done.is_dir() {
        return Ok(done);
    }
    let _lock = Lock::take(&parent.join(format!(".{hash}.lock")))?;
    if done.is_dir() {
        return Ok(done);
    }
    let unfinished = parent.join(format!(".{hash}.unfinished"));
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished)?;
    }
    fs::create_dir(&unfinished)?;
    build(&unfinished).with_context(|| format!("build {kind}"))?;
    fs::rename(&unfinished, &done)?;
    Ok(done)
}
