//! What an operator says about a disk.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::disk::Disk;
use super::engine::{self, Kind};
use super::{Block, ID_BYTES};
use crate::model::{DeviceKind, MachineShape, OpenError, VirtioDevice};
use crate::params::is_default;
use crate::size::ByteSize;
use crate::throttle::{Limits, TokenBucket};

/// Most queues of a disk: one a vCPU helps the guest only, since one runner serves them all.
const MAX_QUEUES: u16 = 16;

/// Configuration of a disk.
///
/// ```
/// use devices::{params, virtio::block::Config};
///
/// let config: Config = params::from_str("data.img,ro,bandwidth=10M/1s", Some("path"))?;
/// assert!(config.ro && config.queues.is_none());
/// # Ok::<(), params::ParamError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Disk image, or a block device.
    pub path: PathBuf,
    /// The guest can only read it.
    #[serde(default)]
    pub ro: bool,
    /// The guest writes to a copy of its own, which ends with the machine; the file is only read, and machines can share it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub private: bool,
    /// What is in the file; never guessed from it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub format: Format,
    /// The image may name another file that holds what it does not.
    #[serde(default, skip_serializing_if = "is_default")]
    pub backing: bool,
    /// Capacity in bytes: a file that is shorter is extended (nothing is written there), of one that is longer the
    /// front is used. Without it, the capacity is what the file holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// What stands between the guest and the host's disk.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cache: Cache,
    /// How requests are done.
    #[serde(default, skip_serializing_if = "is_default")]
    pub engine: Kind,
    /// Queues, up to 16; one a vCPU if it is not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Limit in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Limit in requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
    /// Which thread serves it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub runner: Runner,
    /// Up to 20 characters by which a guest finds it in /dev/disk/by-id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The guest's root file system is on it.
    #[serde(default)]
    pub root: bool,
}

/// What is in a disk's file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk, byte for byte.
    #[default]
    Raw,
    /// An image of QEMU's format.
    Qcow2,
}

/// Which thread serves a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Runner {
    /// The one of all devices.
    #[default]
    Shared,
    /// One of its own.
    Own,
}

/// What stands between the guest and the host's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// The host's page cache; the guest's flushes make writes durable.
    #[default]
    Writeback,
    /// Nothing: direct I/O. The guest's flushes make writes durable.
    None,
    /// The host's page cache, and flushes do nothing: what is written is lost when the host fails.
    Unsafe,
}

impl Format {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl DeviceKind for Config {
    const NAME: &'static str = "disk";
    const SYNTAX: &'static str = "path=FILE[,ro][,private][,id=NAME][,format=raw|qcow2][,backing=on][,size=SIZE]\
        [,cache=writeback|none|unsafe][,engine=io_uring|threads][,queues=N]\
        [,bandwidth=LIMIT][,ops=LIMIT][,runner=own]";
    const HELP: &'static str = "A disk, from an image or a block device";
    const BARE_KEY: Option<&'static str> = Some("path");

    const LIVE: &'static [&'static str] = &["path", "size"];
    const HOST: &'static [&'static str] = &["private", "format", "backing", "cache", "engine", "runner"];

    fn open(&self, machine: &MachineShape) -> Result<Box<dyn VirtioDevice>, OpenError> {
        let refuse = |problem: String| Err(Self::refused(problem));
        let id = self.id.as_deref().unwrap_or_default();
        if id.len() > ID_BYTES || !id.bytes().all(|b| b.is_ascii_graphic()) {
            return refuse(format!(
                "id '{id}' does not fit; use at most {ID_BYTES} ASCII characters without spaces"
            ));
        }
        if self.queues.is_some_and(|queues| !(1..=MAX_QUEUES).contains(&queues)) {
            return refuse(format!(
                "queues={} does not fit; use 1 to {MAX_QUEUES}",
                self.queues.unwrap_or(0)
            ));
        }
        if self.format == Format::Raw && self.backing {
            return refuse(
                "backing=on is for images that name a backing file; say format=qcow2, or leave it out".into(),
            );
        }
        if (self.engine, self.format) == (Kind::IoUring, Format::Qcow2) {
            return refuse("engine=io_uring does not do qcow2; leave engine= out".into());
        }
        let disk = Disk::open(self)?;
        let kind = if disk.image().is_some() { Kind::Threads } else { self.engine };
        let engine = match engine::open(kind) {
            Ok(engine) => engine,
            Err(error) => {
                return refuse(format!(
                    "engine=io_uring is not to be had here ({error}); use engine=threads"
                ));
            }
        };
        let queues = self.queues.unwrap_or(u16::from(machine.cpus).clamp(1, MAX_QUEUES));
        Ok(Box::new(Block::new(self.clone(), disk, engine, queues)?))
    }

    fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    fn begin_with(&mut self, saved: &Path, format: &str) -> Result<(), OpenError> {
        self.format = match format {
            "raw" => Format::Raw,
            "qcow2" => Format::Qcow2,
            other => return Err(Self::refused(format!("the format '{other}' is not known here"))),
        };
        self.backing &= self.format == Format::Qcow2;
        if (self.engine, self.format) == (Kind::IoUring, Format::Qcow2) {
            self.engine = Kind::Auto;
        }
        (self.path, self.private) = (saved.into(), true);
        Ok(())
    }

    /// Another file is the one that is meant, and not one to be copied.
    fn changed_from(&mut self, before: &Self) {
        self.private &= !(before.private && self.path != before.path);
    }

    fn limits(&self) -> Vec<Limits> {
        vec![Limits { bandwidth: self.bandwidth, ops: self.ops }]
    }

    fn is_root(&self) -> bool {
        self.root
    }

    fn own_runner(&self) -> bool {
        self.runner == Runner::Own
    }

    #[cfg(any(test, feature = "specimen"))]
    fn specimen() -> Box<dyn VirtioDevice> {
        Box::new(Block::specimen(false))
    }
}

impl Config {
    /// Whether what is written is lost when the host fails, so that nobody needs to wait for it.
    pub fn is_lost(&self) -> bool {
        self.cache == Cache::Unsafe || self.private
    }

    /// A disk from the image at `path`, with nothing else chosen.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.into(),
            ro: false,
            private: false,
            format: Format::Raw,
            backing: false,
            size: None,
            cache: Cache::Writeback,
            engine: Kind::Auto,
            queues: None,
            bandwidth: None,
            ops: None,
            runner: Runner::Shared,
            id: None,
            root: false,
        }
    }
}

/// How Linux names disk number `nth`: a to z, then aa, ab and so on.
pub fn letters(nth: usize) -> String {
    let last = char::from(b'a' + (nth % 26) as u8);
    match nth / 26 {
        0 => last.into(),
        more => letters(more - 1) + &last.to_string(),
    }
}
