//! The block device (virtio 1.3 §5.2) on a raw disk image or a block device of the host.
//!
//! A request goes through three steps: `request` reads it from its chain, `file` does it, and the device
//! completes it. Today the second step is synchronous; an engine that is not needs no change to the others.

mod file;
mod request;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::config_space::ConfigSpace;
use super::queue::Queues;
use crate::model::{Counters, DeviceKind, MachineShape, OpenError, Progress, VirtioDevice};
use file::Disk;
use request::{Operation, Request, Status};

/// Bytes of a sector: the unit of capacity and of request addresses, whatever the disk's block size.
pub const SECTOR: u64 = 512;

/// Bytes of a disk's identity string (virtio 1.3 §5.2.6).
const ID_BYTES: usize = 20;
const QUEUE_SIZE: u16 = 256;
/// Bytes moved after which other devices get a turn. The request that reaches it is done whole.
const MAX_PER_CALL: usize = 16 << 20;
/// Most bytes of data in one request, since a request is not shared between turns.
const MAX_REQUEST: usize = 64 << 20;
/// Most buffers of data in one request: its chain also has a header and a status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes in one buffer.
const SIZE_MAX: u32 = 256 << 10;
/// A driver that keeps to the two never meets the limit.
const _: () = assert!(SEG_MAX as usize * SIZE_MAX as usize <= MAX_REQUEST);
/// Most warnings in a device's life: there is one for each activation, and a guest can reset the device as often
/// as it likes.
const MAX_WARNINGS: u8 = 8;

/// Configuration of a disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Raw disk image, or a block device.
    pub path: PathBuf,
    /// The guest can only read it.
    #[serde(default)]
    pub ro: bool,
    /// Up to 20 characters by which a guest finds it in /dev/disk/by-id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The guest's root file system is on it.
    #[serde(default)]
    pub root: bool,
}

impl DeviceKind for Config {
    const NAME: &'static str = "disk";
    const SYNTAX: &'static str = "path=FILE[,ro][,id=NAME]";
    const HELP: &'static str = "A disk, from a raw image or a block device";
    const BARE_KEY: Option<&'static str> = Some("path");

    fn open(&self, _: &MachineShape) -> Result<Box<dyn VirtioDevice>, OpenError> {
        let id = self.id.as_deref().unwrap_or_default();
        if id.len() > ID_BYTES || !id.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(OpenError::Value {
                kind: Self::NAME,
                problem: format!(
                    "id '{id}' does not fit; use at most {ID_BYTES} ASCII characters without spaces"
                ),
            });
        }
        Ok(Box::new(Block::new(Disk::open(&self.path, self.ro)?, id)))
    }

    fn kernel_parameters(&self, nth: usize) -> Option<String> {
        let mode = if self.ro { "ro" } else { "rw" };
        self.root.then(|| format!("root=/dev/vd{} {mode}", letters(nth)))
    }

    #[cfg(any(test, feature = "specimen"))]
    fn specimen() -> Box<dyn VirtioDevice> {
        Box::new(Block::specimen(false))
    }
}

impl Config {
    /// A disk from the image at `path`, with nothing else chosen.
    pub fn new(path: &Path) -> Self {
        Self { path: path.into(), ro: false, id: None, root: false }
    }
}

/// How Linux names disk number `nth`: a to z, then aa, ab and so on.
fn letters(nth: usize) -> String {
    let last = char::from(b'a' + (nth % 26) as u8);
    match nth / 26 {
        0 => last.into(),
        more => letters(more - 1) + &last.to_string(),
    }
}

/// The block device.
struct Block {
    disk: Disk,
    id: [u8; ID_BYTES],
    /// The driver flushes by itself. Until it says so, a write is not done before it is on the disk.
    driver_flushes: bool,
    /// The operator was told, in this activation, that the host fails.
    warned: bool,
    warnings: u8,
    config: Arc<ConfigSpace>,
    counters: Arc<Counters>,
}

impl Block {
    fn new(disk: Disk, id: &str) -> Self {
        let mut id_bytes = [0; ID_BYTES];
        id_bytes[..id.len()].copy_from_slice(id.as_bytes());
        let config = Arc::new(ConfigSpace::read_only(&config_bytes(disk.sectors())));
        Self {
            disk,
            id: id_bytes,
            driver_flushes: false,
            warned: false,
            warnings: 0,
            config,
            counters: Arc::default(),
        }
    }

    /// A disk of 64 KiB in memory, whose sectors hold their own number in every byte.
    #[cfg(any(test, feature = "specimen"))]
    fn specimen(ro: bool) -> Self {
        Self::new(Disk::specimen(ro), "specimen")
    }

    /// Does one request, short of completing it.
    fn serve(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        match request.operation {
            Operation::Read { sector } => {
                let bytes = request.to_guest.len();
                self.disk.read(&mut request.to_guest, self.extent(sector, bytes)?)?;
                Counters::add(&self.counters.bytes_to_guest, bytes as u64);
            }
            Operation::Write { sector } => {
                let bytes = request.from_guest.len();
                let offset = self.extent(sector, bytes)?;
                // The driver may not have looked at VIRTIO_BLK_F_RO.
                if self.disk.read_only() {
                    return Err(Failure::Guest);
                }
                self.disk.write(&mut request.from_guest, offset)?;
                if !self.driver_flushes {
                    self.disk.flush()?;
                }
                Counters::add(&self.counters.bytes_from_guest, bytes as u64);
            }
            Operation::Flush => self.disk.flush()?,
            Operation::GetId => _ = request.to_guest.write(&self.id),
            Operation::Unsupported => return Err(Failure::Unsupported),
            Operation::TooLarge => return Err(Failure::Guest),
        }
        Ok(())
    }

    /// Counts a failure of the host, and tells the operator of the first.
    fn host_failed(&mut self, error: &std::io::Error) {
        Counters::add(&self.counters.host_errors, 1);
        let path = self.disk.path().display();
        if self.warned || self.warnings == MAX_WARNINGS {
            return tracing::debug!("disk '{path}': {error}");
        }
        (self.warned, self.warnings) = (true, self.warnings + 1);
        tracing::warn!(
            "disk '{path}': {error}; the guest gets I/O errors, and more of them are only counted"
        );
    }

    /// Where on the disk `bytes` bytes from `sector` are, if they are on it at all.
    fn extent(&self, sector: u64, bytes: usize) -> Result<u64, Failure> {
        let whole = (bytes as u64).is_multiple_of(SECTOR);
        let end = sector.checked_add(bytes as u64 / SECTOR);
        match end {
            // The capacity is a file's size, so that an offset below it fits in 63 bits.
            Some(end) if whole && end <= self.disk.sectors() => Ok(sector * SECTOR),
            _ => Err(Failure::Guest),
        }
    }
}

/// Why a request failed.
enum Failure {
    /// It breaks the specification, or what the device offered.
    Guest,
    /// It is of a type that this device does not have, which a driver may well try.
    Unsupported,
    /// The host's file failed.
    Host(std::io::Error),
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Host(error)
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let ro = if self.disk.read_only() { 1 << VIRTIO_BLK_F_RO } else { 0 };
        1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | ro
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config_space(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn activate(&mut self, features: u64) {
        self.driver_flushes = features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        self.warned = false;
    }

    fn process(&mut self, queues: &mut Queues<'_>, queue: u16) -> Progress {
        let mut queue = queues.get(queue);
        let mut moved = 0;
        while moved < MAX_PER_CALL {
            let Some(chain) = queue.pop() else {
                return if queue.exhausted() { Progress::More } else { Progress::Done };
            };
            let mut request = match Request::parse(chain) {
                Ok(request) => request,
                Err(head) => {
                    queue.count_mistake();
                    queue.push(head, 0);
                    continue;
                }
            };
            moved += request.bytes();
            let status = match self.serve(&mut request) {
                Ok(()) => Status::Ok,
                Err(Failure::Unsupported) => Status::Unsupported,
                Err(Failure::Guest) => {
                    queue.count_mistake();
                    Status::IoError
                }
                Err(Failure::Host(error)) => {
                    self.host_failed(&error);
                    Status::IoError
                }
            };
            Counters::add(&self.counters.requests, 1);
            let (head, written) = request.complete(status);
            queue.push(head, written);
        }
        Progress::More
    }

    fn reset(&mut self) {
        self.driver_flushes = false;
    }
}

/// struct virtio_blk_config (virtio 1.3 §5.2.4) up to the field that we use last, blk_size.
fn config_bytes(sectors: u64) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&sectors.to_le_bytes());
    bytes[8..12].copy_from_slice(&SIZE_MAX.to_le_bytes());
    bytes[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
    bytes[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests;
