//! The lab: a Debian host in QEMU's software emulation, whose CPU has AMD SVM with nested paging, and real `kvm_amd` in it.
//!
//! What needs hardware semantics runs here on machines without them: stock kernels, SMP, bzImage. It is slow (10 to 30 times
//! slower than hardware) and true. One lab serves all tests of a user; it ends by itself when nobody has been connected for
//! [`IDLE`].

use std::fs::File;
use std::io::{BufReader, Read};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab_agent::{Hello, Input, MAX_DATA, Reply, Request, receive, send, sparse};
use sha2::{Digest, Sha256};

use crate::process::{Output, Process, Program};

mod image;
mod start;

pub use image::prepare;

/// How long an unused lab stays.
pub const IDLE: Duration = Duration::from_secs(120);
/// Names a running lab to use, as [`Lab::name`] writes it.
pub const VARIABLE: &str = "VMM_LAB";

/// A running lab host.
#[derive(Clone, Debug)]
pub struct Lab {
    address: SocketAddr,
    id: String,
}

/// Keeps the lab from ending while it exists.
pub struct Hold(#[expect(dead_code, reason = "held open")] TcpStream);

impl Lab {
    /// The lab that everyone shares: the one that `$VMM_LAB` names, the one that runs already, or one started now.
    pub fn shared() -> Result<Self> {
        match std::env::var(VARIABLE) {
            Ok(name) => {
                let lab = Self::from_name(&name)?;
                lab.hold()
                    .with_context(|| format!("{VARIABLE} names a lab that does not answer; unset it"))?;
                Ok(lab)
            }
            Err(_) => start::running_or_new(),
        }
    }

    /// The lab by its name, `ADDRESS/ID`.
    fn from_name(name: &str) -> Result<Self> {
        let (address, id) = name.split_once('/').with_context(|| format!("'{name}' is not ADDRESS/ID"))?;
        Ok(Self { address: address.parse()?, id: id.to_owned() })
    }

    /// Its name, for [`VARIABLE`].
    pub fn name(&self) -> String {
        format!("{}/{}", self.address, self.id)
    }

    /// Keeps the lab until the hold is dropped.
    pub fn hold(&self) -> Result<Hold> {
        let connection = self.ask(Request::Hold)?;
        done(&connection)?;
        Ok(Hold(connection))
    }

    /// Starts a program in the lab host.
    pub fn spawn(&self, program: &Program) -> Result<Process> {
        let Program { argv, env, cwd, passthrough } = program.clone();
        Process::follow_lab(self.ask(Request::Exec { argv, env, cwd })?, passthrough)
    }

    /// Runs a line of shell in the lab host, to its end.
    pub fn shell(&self, line: &str) -> Result<Output> {
        self.spawn(&Program::shell(line))?.wait(Duration::from_secs(120))
    }

    /// Copies a file of this machine to `path` in the lab host. Holes stay holes.
    pub fn put(&self, file: &Path, path: &str) -> Result<()> {
        let source = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
        let metadata = source.metadata()?;
        let mode = metadata.permissions().mode() & 0o777;
        let connection = self.ask(Request::Put { path: path.to_owned(), mode, size: metadata.len() })?;
        // An error of the agent's says more than the broken connection that follows from it.
        let sent =
            sparse::read(&source, MAX_DATA, |offset, data| send(&connection, &Input::Data(offset), data))
                .and_then(|()| send(&connection, &Input::End, &[]));
        done(&connection)
            .and(sent.map_err(Into::into))
            .with_context(|| format!("copy {} to the lab", file.display()))
    }

    /// Makes a file of this machine available in the lab host, to be read, and returns its path there. What has been
    /// copied once is found by its content.
    pub fn provide(&self, file: &Path) -> Result<String> {
        let path = format!("/scratch/store/{}", content_hash(file)?);
        if self.size(&path)?.is_none() {
            self.put(file, &path)?;
        }
        Ok(path)
    }

    /// Copies a file of the lab host to this machine. Holes stay holes.
    pub fn get(&self, path: &str, file: &Path) -> Result<()> {
        let target = File::create(file).with_context(|| format!("cannot create {}", file.display()))?;
        let connection = self.ask(Request::Get { path: path.to_owned() })?;
        let mut input = BufReader::with_capacity(1 << 18, &connection);
        loop {
            match receive::<Reply>(&mut input)? {
                Some((Reply::Size(Some(size)), _)) => target.set_len(size)?,
                Some((Reply::Data(offset), data)) => target.write_all_at(&data, offset)?,
                Some((Reply::Done, _)) => return Ok(()),
                Some((Reply::Failed(why), _)) => bail!("the lab cannot give {path}: {why}"),
                Some((other, _)) => bail!("the lab answered {other:?}"),
                None => bail!("the lab went away"),
            }
        }
    }

    /// The size of a file in the lab host, in bytes, if it is there.
    pub fn size(&self, path: &str) -> Result<Option<u64>> {
        let connection = self.ask(Request::Stat { path: path.to_owned() })?;
        match receive::<Reply>(BufReader::new(&connection))? {
            Some((Reply::Size(size), _)) => Ok(size),
            other => bail!("the lab answered {other:?}"),
        }
    }

    /// Copies a file within the lab host. Holes stay holes.
    pub fn copy(&self, from: &str, to: &str) -> Result<()> {
        done(&self.ask(Request::Copy { from: from.to_owned(), to: to.to_owned() })?)
    }

    /// Removes a file or a directory with all that is in it.
    pub fn remove(&self, path: &str) -> Result<()> {
        done(&self.ask(Request::Remove { path: path.to_owned() })?)
    }

    /// Powers the lab off, unless others are connected: then it ends by itself after they are gone.
    pub fn power_off(&self) -> Result<()> {
        let connection = self.ask(Request::PowerOff)?;
        done(&connection)?;
        // QEMU closes the connection as it exits.
        let _ = (&connection).read(&mut [0]);
        Ok(())
    }

    fn ask(&self, request: Request) -> Result<TcpStream> {
        let stream = TcpStream::connect(self.address).context("the lab does not answer")?;
        stream.set_nodelay(true)?;
        send(&stream, &Hello { lab: self.id.clone(), request }, &[]).context("the lab does not listen")?;
        Ok(stream)
    }
}

fn done(connection: &TcpStream) -> Result<()> {
    match receive::<Reply>(BufReader::new(connection))? {
        Some((Reply::Done, _)) => Ok(()),
        Some((Reply::Failed(why), _)) => bail!("the lab refused: {why}"),
        other => bail!("the lab answered {other:?}"),
    }
}

/// A name for a file's content and mode. Holes count as the zeros that they are, without being read.
pub(crate) fn content_hash(file: &Path) -> Result<String> {
    let source = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
    let metadata = source.metadata()?;
    ensure!(metadata.is_file(), "{} is not a file", file.display());
    let mut hash = Sha256::new();
    hash.update(metadata.len().to_le_bytes());
    hash.update(metadata.permissions().mode().to_le_bytes());
    sparse::read(&source, 1 << 20, |offset, data| {
        hash.update(offset.to_le_bytes());
        hash.update(data);
        Ok(())
    })?;
    Ok(crate::cache::hex(&hash.finalize()))
}
