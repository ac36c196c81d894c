//! `vmm snapshot pack` and `unpack`: a snapshot as one file.

use std::fs::{self, File};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use guest_images::progress::{self, Progress};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};
use rustix::io::Errno;
use vmm_core::Snapshot;

use crate::cli::print;
use crate::exit::ExitStatus;

/// Stands for standard input and output.
const STANDARD: &str = "-";

/// Runs `vmm snapshot pack`.
pub fn pack(dir: &Path, to: &Path) -> anyhow::Result<ExitStatus> {
    let snapshot = Snapshot::open(dir)?;
    if to == Path::new(STANDARD) {
        ensure!(
            !io::stdout().is_terminal(),
            "a packed snapshot is nothing for a terminal; send standard output elsewhere"
        );
        shown("packing", |progress| Ok(snapshot.pack(io::stdout().lock(), progress)?))?;
        return Ok(ExitStatus::Success);
    }
    let error = || format!("cannot write '{}'", to.display());
    if to.symlink_metadata().is_ok() {
        bail!("'{}' is there already; choose another place", to.display());
    }
    let draft = Draft::beside(to).with_context(error)?;
    let mut out = BufWriter::new(&draft.file);
    let id = shown("packing", |progress| Ok(snapshot.pack(&mut out, progress)?))?;
    out.flush().and_then(|()| draft.file.sync_all()).with_context(error)?;
    drop(out);
    draft.name(to).with_context(error)?;
    print(format!("{id}\n").as_bytes())
}

/// Runs `vmm snapshot unpack`.
pub fn unpack(file: &Path, to: &Path) -> anyhow::Result<ExitStatus> {
    let id = if file == Path::new(STANDARD) {
        shown("unpacking", |progress| Ok(Snapshot::unpack(io::stdin().lock(), to, progress)?))?
    } else {
        let from = File::open(file).with_context(|| format!("cannot read '{}'", file.display()))?;
        let unpacked = shown("unpacking", |progress| Ok(Snapshot::unpack(from, to, progress)?));
        unpacked.with_context(|| format!("cannot unpack '{}'", file.display()))?
    };
    print(format!("{id}\n").as_bytes())
}

/// Does work of which a terminal shows how far it is.
fn shown<T>(
    what: &str,
    work: impl FnOnce(&mut dyn FnMut(u64, u64)) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    if !io::stderr().is_terminal() {
        return work(&mut |_, _| ());
    }
    let mut console = progress::Console::new();
    let mut all = None;
    let done = work(&mut |done, total| {
        if all != Some(total) {
            all = Some(total);
            console.step(what, all);
        }
        console.advance(done, "");
    });
    console.finish();
    done
}

/// A file without a name until it is whole, where the file system can; else with one that is taken away.
struct Draft {
    file: File,
    name: Option<PathBuf>,
}

impl Draft {
    fn beside(to: &Path) -> io::Result<Self> {
        let dir = match to.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let mode = Mode::RUSR | Mode::WUSR;
        match open(dir, OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, mode) {
            Ok(file) => Ok(Self { file: file.into(), name: None }),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) if dir.is_dir() => {
                let mut name = to.file_name().unwrap_or_default().to_owned();
                name.push(format!(".{}", std::process::id()));
                let name = dir.join(name);
                let file = File::options().write(true).create_new(true).mode(0o600).open(&name)?;
                Ok(Self { file, name: Some(name) })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Gives it its name, which nobody may have.
    fn name(&self, to: &Path) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        match &self.name {
            Some(name) => fs::hard_link(name, to),
            None => {
                let file = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                Ok(linkat(CWD, file, CWD, to, AtFlags::SYMLINK_FOLLOW)?)
            }
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            _ = fs::remove_file(name);
        }
    }
}
