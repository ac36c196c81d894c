//! Files in and out of the lab host.

use std::fs::{self, File, Permissions};
use std::io::{self, BufRead};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use lab_agent::{Input, MAX_DATA, Reply, receive, send, sparse};

/// A name beside `path` that no one else uses: files appear complete or not at all.
fn unfinished(path: &Path) -> Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let parent = path.parent().context("not the path of a file")?;
    fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    Ok(parent.join(format!(".unfinished-{}", COUNT.fetch_add(1, Ordering::Relaxed))))
}

/// Receives a file and puts it at `path`.
pub fn put(mut input: impl BufRead, path: &str, mode: u32, size: u64) -> Result<()> {
    let path = Path::new(path);
    let temporary = unfinished(path)?;
    let file = File::create(&temporary).with_context(|| format!("create {}", path.display()))?;
    let received = (|| {
        file.set_len(size)?;
        loop {
            match receive::<Input>(&mut input)? {
                Some((Input::Data(offset), data)) => file.write_all_at(&data, offset)?,
                Some((Input::End, _)) => break,
                Some((other, _)) => bail!("unexpected {other:?} within a file"),
                None => bail!("the connection ended within a file"),
            }
        }
        fs::set_permissions(&temporary, Permissions::from_mode(mode))?;
        Ok(fs::rename(&temporary, path)?)
    })();
    if received.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    received.with_context(|| format!("write {}", path.display()))
}

/// Sends the file at `path`.
pub fn get(stream: &TcpStream, path: &str) -> Result<()> {
    let file = File::open(path).with_context(|| format!("open {path}"))?;
    send(stream, &Reply::Size(Some(file.metadata()?.len())), &[])?;
    sparse::read(&file, MAX_DATA, |offset, data| send(stream, &Reply::Data(offset), data))
        .with_context(|| format!("read {path}"))
}

/// Copies within the host.
pub fn copy(from: &str, to: &str) -> Result<()> {
    let temporary = unfinished(Path::new(to))?;
    let copied = sparse::copy(Path::new(from), &temporary).and_then(|()| fs::rename(&temporary, to));
    if copied.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    copied.with_context(|| format!("copy {from} to {to}"))
}

/// Removes what is at `path`, if anything.
pub fn remove(path: &str) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    removed.with_context(|| format!("remove {path}"))
}
