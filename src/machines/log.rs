//! A machine's log: two files of a limited size, the newer of which becomes the older when it is full.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes of one file.
pub const FILE_MAX: u64 = 4 << 20;
/// How often a reader that follows looks for more.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(50);

/// A log that is written.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: Option<File>,
    len: u64,
    max: u64,
}

fn older(path: &Path) -> PathBuf {
    path.with_extension("1")
}

impl Log {
    /// An empty log at `path`.
    pub fn create(path: &Path) -> io::Result<Self> {
        Self::with_max(path, FILE_MAX)
    }

    fn with_max(path: &Path, max: u64) -> io::Result<Self> {
        let mut log = Self { path: path.into(), file: None, len: 0, max };
        log.file = Some(log.open()?);
        Ok(log)
    }

    fn open(&self) -> io::Result<File> {
        File::options().create(true).write(true).truncate(true).mode(0o600).open(&self.path)
    }

    /// Appends `data`. What cannot be written, as on a full disk, is lost: a guest does not wait for its log.
    pub fn append(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.len == self.max {
                self.rotate();
            }
            let Some(file) = &mut self.file else { return };
            let n = data.len().min((self.max - self.len) as usize);
            if file.write_all(&data[..n]).is_err() {
                return;
            }
            self.len += n as u64;
            data = &data[n..];
        }
    }

    fn rotate(&mut self) {
        // If it fails, the file is emptied: a limit is a limit.
        _ = fs::rename(&self.path, older(&self.path));
        self.file = self.open().ok();
        self.len = 0;
    }
}

/// Waits for so long and says whether more may come.
pub type Follow<'a> = &'a dyn Fn(Duration) -> io::Result<bool>;

/// Copies the log at `path` to `out`, or its last `tail` lines. With `follow`, goes on with what comes, for as long as it says
/// so.
pub fn copy(
    path: &Path,
    out: &mut impl Write,
    tail: Option<usize>,
    follow: Option<Follow<'_>>,
) -> io::Result<()> {
    let old = File::open(older(path)).ok();
    let mut file = File::open(path)?;
    match tail {
        None => _ = old.map(|mut old| io::copy(&mut old, out)).transpose()?,
        // Of two files at most.
        Some(lines) => {
            let mut text = Vec::new();
            old.map(|mut old| old.read_to_end(&mut text)).transpose()?;
            file.read_to_end(&mut text)?;
            out.write_all(last_lines(&text, lines))?;
        }
    }
    let mut pause = Duration::ZERO;
    loop {
        // Asked before reading: what was written before the end is not missed.
        let more = follow.map_or(Ok(false), |follow| follow(pause))?;
        pause = Duration::ZERO;
        io::copy(&mut Read::by_ref(&mut file), out)?;
        out.flush()?;
        let Ok(now) = fs::metadata(path) else { return Ok(()) };
        let old = file.metadata()?;
        if (now.dev(), now.ino()) != (old.dev(), old.ino()) {
            // Full, and this is the older one now; the rest of it is copied already.
            io::copy(&mut file, out)?;
            file = File::open(path)?;
        } else if now.len() < file.stream_position()? {
            file.seek(SeekFrom::Start(0))?;
        } else if !more {
            return Ok(());
        } else {
            pause = FOLLOW_INTERVAL;
        }
    }
}

/// The last `lines` lines of a text, of which the very last need not be whole.
fn last_lines(text: &[u8], lines: usize) -> &[u8] {
    let Some(before) = lines.checked_sub(1) else { return &[] };
    let whole = text.strip_suffix(b"\n").unwrap_or(text);
    let starts = whole.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    &text[starts.into_iter().nth(before).unwrap_or(0)..]
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_log_keeps_the_newest_and_no_more_than_two_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Log::with_max(&path, 10).unwrap();
        let all: Vec<u8> = (0..35).map(|i| b'a' + i % 26).collect();
        all.chunks(7).for_each(|piece| log.append(piece));
        let mut kept = Vec::new();
        copy(&path, &mut kept, None, None).unwrap();
        assert_eq!(kept, all[20..]);
        let files = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(files, 2);
    }

    #[test]
    fn the_last_lines_may_be_in_two_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Log::with_max(&path, 10).unwrap();
        log.append(b"one\ntwo\nthree\nfour");
        let last = |lines| {
            let mut out = Vec::new();
            copy(&path, &mut out, Some(lines), None).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!([0, 1, 2, 3].map(last), ["", "four", "three\nfour", "two\nthree\nfour"]);
        assert_eq!(last(usize::MAX), "one\ntwo\nthree\nfour");
        log.append(b"\n");
        assert_eq!(last(1), "four\n");
    }

    #[test]
    fn who_follows_sees_what_is_written_on_both_sides_of_a_change_of_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Log::with_max(&path, 1000).unwrap();
        log.append(b"begin ");
        let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let reader = thread::spawn({
            let (path, done) = (path.clone(), done.clone());
            move || {
                let mut out = Vec::new();
                let follow = |pause| {
                    thread::sleep(pause);
                    Ok(!done.load(std::sync::atomic::Ordering::Acquire))
                };
                copy(&path, &mut out, None, Some(&follow)).map(|()| out)
            }
        });
        thread::sleep(Duration::from_millis(20));
        log.append(&[b'x'; 1500]);
        log.append(b" end");
        done.store(true, std::sync::atomic::Ordering::Release);
        let out = String::from_utf8(reader.join().unwrap().unwrap()).unwrap();
        assert!(out.starts_with("begin x") && out.ends_with("x end"), "{}", out.len());
        assert_eq!(out.len(), 6 + 1500 + 4);
    }
}
