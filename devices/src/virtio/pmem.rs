//! The persistent memory device (virtio 1.3 §5.19): a disk image that is memory of the guest's.
//!
//! The guest reads and writes the host's page cache by itself, and machines that have one image read-only have one
//! copy of it. All that is left to the device is to make writes durable.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{SeekFrom, fdatasync, seek};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;

use super::block::open_locked;
use super::config_space::ConfigSpace;
use super::queue::Queues;
use crate::model::{Counters, DeviceKind, MachineShape, OpenError, Progress, VirtioDevice, Window};
use crate::params::is_default;
use crate::snapshot::SnapshotError;
use crate::storage::{self, Storage, StorageError};
use crate::throttle::{Limits, LogLimit, TokenBucket};

/// VIRTIO_PMEM_REQ_TYPE_FLUSH (virtio 1.3 §5.19.6).
const FLUSH: u32 = 0;
/// `ret` of a request (virtio 1.3 §5.19.7).
const OK: u32 = 0;
const FAILED: u32 = u32::MAX;

/// Configuration.
///
/// ```
/// use devices::{params, virtio::pmem::Config};
///
/// let config: Config = params::from_str("root.img,ro,root", Some("path"))?;
/// assert!(config.ro && config.root);
/// # Ok::<(), params::ParamError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Disk image, or a block device. One that is written is a multiple of 2 MiB.
    pub path: PathBuf,
    /// The guest can only read it, and machines can share it.
    #[serde(default)]
    pub ro: bool,
    /// The guest writes to a copy of its own, which ends with the machine; the file is only read.
    #[serde(default, skip_serializing_if = "is_default")]
    pub private: bool,
    /// Limit in requests, each of which makes the host write what the guest wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
    /// What the operator calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The guest's root file system is on it.
    #[serde(default)]
    pub root: bool,
}

impl DeviceKind for Config {
    const NAME: &'static str = "pmem";
    const SYNTAX: &'static str = "path=FILE[,ro][,private][,root][,id=NAME][,ops=LIMIT]";
    const HELP: &'static str = "A disk image as memory; read-only, all machines share one copy";
    const BARE_KEY: Option<&'static str> = Some("path");
    const HOST: &'static [&'static str] = &["path", "private"];

    fn open(&self, _: &MachineShape) -> Result<Box<dyn VirtioDevice>, OpenError> {
        let what = "persistent memory";
        let private = self.private && !self.ro;
        let fd = open_locked(what, &self.path, self.ro || private, false)?;
        let error = OpenError::file(what, &self.path);
        let fd = match private {
            false => fd,
            true => storage::private_copy(&self.path, fd.as_fd())
                .map_err(|e| error(&format!("it cannot be copied ({e})"), "make room beside it"))?
                .into(),
        };
        // A block device has no size in its inode, but an end.
        let bytes = seek(&fd, SeekFrom::End(0))
            .map_err(|errno| error(&errno.to_string(), "check that it is a disk image"))?;
        let whole = bytes.is_multiple_of(Window::ALIGN);
        match (bytes, self.ro || whole) {
            (0, _) => Err(error("it is empty", "give it a size with truncate(1)")),
            (_, false) => Err(error(
                &format!("its size of {bytes} bytes is not a multiple of 2 MiB"),
                "extend it with truncate(1), or add ',ro'",
            )),
            (_, true) => {
                let pmem = Pmem::new(fd, bytes, self.ro);
                Ok(Box::new(Pmem { root: self.root, path: self.path.clone(), private, ..pmem }))
            }
        }
    }

    fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    fn begin_with(&mut self, saved: &Path, format: &str) -> Result<(), OpenError> {
        if format != "raw" {
            return Err(Self::refused(format!("the format '{format}' is not possible here")));
        }
        (self.path, self.private) = (saved.into(), true);
        Ok(())
    }

    fn changed_from(&mut self, before: &Self) {
        self.private &= !(before.private && self.path != before.path);
    }

    fn limits(&self) -> Vec<Limits> {
        vec![Limits { bandwidth: None, ops: self.ops }]
    }

    fn is_root(&self) -> bool {
        self.root
    }

    /// A flush waits for the host's disk, and nobody else should.
    fn own_runner(&self) -> bool {
        !self.ro
    }

    #[cfg(any(test, feature = "specimen"))]
    fn specimen() -> Box<dyn VirtioDevice> {
        let fd = rustix::fs::memfd_create("specimen", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
        rustix::fs::ftruncate(&fd, Window::ALIGN).expect("memory");
        Box::new(Pmem::new(fd, Window::ALIGN, false))
    }
}

/// The persistent memory device.
struct Pmem {
    fd: OwnedFd,
    bytes: u64,
    /// What the operator calls it.
    path: PathBuf,
    read_only: bool,
    /// It ends with the machine.
    private: bool,
    root: bool,
    config: Arc<ConfigSpace>,
    counters: Arc<Counters>,
    log: LogLimit,
}

impl Pmem {
    fn new(fd: OwnedFd, bytes: u64, read_only: bool) -> Self {
        // struct virtio_pmem_config (virtio 1.3 §5.19.4): start, known when it is placed, and size.
        let mut config = [0; 16];
        config[8..].copy_from_slice(&bytes.next_multiple_of(Window::ALIGN).to_le_bytes());
        let config = Arc::new(ConfigSpace::read_only(&config));
        let (counters, log) = (Arc::default(), LogLimit::default());
        let path = PathBuf::new();
        Self { fd, bytes, path, read_only, private: false, root: false, config, counters, log }
    }

    /// Makes durable what was written so far; returns `ret` of the requests for it.
    fn flush(&mut self) -> u32 {
        if self.private {
            return OK;
        }
        if self.read_only {
            // The device has no word for it: this is how a guest learns that what it wrote is nowhere.
            return FAILED;
        }
        match fdatasync(&self.fd) {
            Ok(()) => OK,
            Err(errno) => {
                Counters::add(&self.counters.host_errors, 1);
                if self.log.permits() {
                    tracing::warn!("pmem: what the guest wrote is not durable: {errno}");
                }
                FAILED
            }
        }
    }
}

impl VirtioDevice for Pmem {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_PMEM
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn config_space(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }

    /// It is memory, and stays where it is and as large as it is.
    fn check_config(&self, saved: &[u8], now: &[u8]) -> Result<(), SnapshotError> {
        let [saved, found] = [saved, now].map(|config| {
            let (start, bytes) = config.split_at_checked(8)?;
            Some([start, bytes].map(|half| half.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))))
        });
        let text = |place: Option<[u64; 2]>| {
            place.map_or_else(String::new, |[start, bytes]| format!("{bytes} bytes at {start:#x}"))
        };
        SnapshotError::unless_same("persistent memory of", text(saved), text(found))
    }

    fn storage(&self) -> Option<Storage> {
        (!self.read_only).then(|| Storage::of(self.fd.as_fd(), "raw", self.private))
    }

    /// What the guest has written is in the file, as others see it.
    fn save_storage(&self, to: &File) -> Result<(), StorageError> {
        storage::save(&self.path, self.fd.as_fd(), to)
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn window(&self) -> Option<Window<'_>> {
        Some(Window { file: self.fd.as_fd(), bytes: self.bytes, read_only: self.read_only })
    }

    fn placed(&mut self, guest_addr: u64) {
        self.config.update(|bytes| bytes[..8].copy_from_slice(&guest_addr.to_le_bytes()));
    }

    fn activate(&mut self, _features: u64) {}

    fn process(&mut self, queues: &mut Queues<'_>, queue: u16) -> Progress {
        let mut queue = queues.get(queue);
        let mut chains = Vec::new();
        while let Some(mut chain) = queue.pop() {
            let asked = chain.readable.read_obj::<u32>().map(u32::from_le);
            chains.push((chain, asked));
        }
        // One flush is for all that asked before it.
        let flushed = chains.iter().any(|(_, asked)| *asked == Some(FLUSH)).then(|| self.flush());
        for (mut chain, asked) in chains {
            let ret = if asked == Some(FLUSH) { flushed.unwrap_or(FAILED) } else { FAILED };
            let well_formed = asked == Some(FLUSH) && chain.readable.is_empty();
            let told = chain.writable.write_obj(&ret.to_le());
            if !(well_formed && told) {
                queue.count_mistake();
            }
            Counters::add(&self.counters.requests, 1);
            queue.push(chain.head, if told { size_of_val(&ret) as u32 } else { 0 });
        }
        if queue.exhausted() { Progress::More } else { Progress::Done }
    }

    fn kernel_parameters(&self, nth: usize) -> Option<String> {
        let mode = if self.read_only { "ro" } else { "rw" };
        self.root.then(|| format!("root=/dev/pmem{nth} {mode}"))
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::virtio::test_driver::{Driver, Reply};

    /// A file of `bytes`, gone with the returned directory's guard.
    fn image(bytes: u64) -> (tempfile::NamedTempFile, Config) {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(bytes).expect("room");
        let config =
            Config { path: file.path().into(), ro: false, private: false, ops: None, id: None, root: false };
        (file, config)
    }

    fn driver(fd: OwnedFd) -> Driver {
        let mut driver = Driver::new(Box::new(Pmem::new(fd, Window::ALIGN, false)));
        driver.start(0);
        driver
    }

    fn count(driver: &Driver) -> (u64, u64, u64) {
        let counters = &driver.counters;
        let [requests, mistakes, errors] =
            [&counters.requests, &counters.guest_mistakes, &counters.host_errors]
                .map(|counter| counter.load(Ordering::Relaxed));
        (requests, mistakes, errors)
    }

    #[test]
    fn the_driver_learns_where_it_is_and_how_large() {
        for (bytes, ro, size) in [(4 << 20, false, 4 << 20), ((2 << 20) + 1, true, 4u64 << 20)] {
            let (_file, config) = image(bytes);
            let mut device = Config { ro, ..config }.open(&MachineShape::default()).expect("a device");
            let window = device.window().expect("a window");
            assert_eq!((window.bytes, window.read_only), (bytes, ro));
            device.placed(5 << 30);
            let driver = Driver::new(device);
            let mut space = [0; 16];
            driver.read_config(0, &mut space);
            driver.write_config(0, &[0xff; 16]);
            assert_eq!(space[..8], (5u64 << 30).to_le_bytes());
            assert_eq!(space[8..], size.to_le_bytes());
        }
    }

    #[test]
    fn a_flush_is_answered_and_anything_else_fails() {
        let file: OwnedFd = tempfile::tempfile().expect("a file").into();
        let mut driver = driver(file);
        let answer = |ret: u32| Reply { used: Some(4), data: vec![ret.to_le_bytes().to_vec()] };
        assert_eq!(driver.request(0, &[&[0; 4]], &[4]), answer(OK));
        assert_eq!(driver.request(0, &[&[0; 2], &[0; 2]], &[4]), answer(OK));
        assert_eq!(count(&driver), (2, 0, 0));
        assert_eq!(driver.request(0, &[&[1, 0, 0, 0]], &[4]), answer(FAILED));
        assert_eq!(driver.request(0, &[&[0; 3]], &[4]), answer(FAILED));
        assert_eq!(driver.request(0, &[], &[4]), answer(FAILED));
        assert_eq!(
            driver.request(0, &[&[0; 5]], &[4]),
            answer(OK),
            "what comes after the type means nothing"
        );
        assert_eq!(driver.request(0, &[&[0; 4]], &[3]).used, Some(0), "no room for an answer");
        assert_eq!(driver.request(0, &[&[0; 4]], &[]).used, Some(0));
        assert_eq!(count(&driver), (8, 6, 0));
    }

    #[test]
    fn a_full_queue_of_requests_is_answered() {
        let mut driver = driver(tempfile::tempfile().expect("a file").into());
        for _ in 0..32 {
            driver.post(0, &[&[0; 4]], &[4]);
        }
        driver.kick(0);
        assert_eq!(driver.used(0).len(), 32);
    }

    #[test]
    fn what_the_host_could_not_write_is_told() {
        // A pipe has nothing that could be made durable.
        let (_read, write) = rustix::pipe::pipe().expect("a pipe");
        let mut driver = driver(write);
        let reply = driver.request(0, &[&[0; 4]], &[4]);
        assert_eq!(reply, Reply { used: Some(4), data: vec![vec![0xff; 4]] });
        assert_eq!(count(&driver), (1, 0, 1));
    }

    #[test]
    fn nothing_becomes_durable_in_a_read_only_image() {
        let (_file, config) = image(2 << 20);
        let config = Config { ro: true, ..config };
        let mut driver = Driver::new(config.open(&MachineShape::default()).expect("a device"));
        driver.start(0);
        let reply = driver.request(0, &[&[0; 4]], &[4]);
        assert_eq!(reply, Reply { used: Some(4), data: vec![vec![0xff; 4]] });
        assert_eq!(count(&driver), (1, 0, 0), "it is nobody's mistake");
    }

    #[test]
    fn images_that_cannot_be_memory_are_refused() {
        let open = |config: &Config| config.open(&MachineShape::default()).map(drop);
        for (bytes, ro, want) in [
            (0, true, "it is empty"),
            (
                1 << 20,
                false,
                "its size of 1048576 bytes is not a multiple of 2 MiB; extend it with truncate(1), or add ',ro'",
            ),
        ] {
            let (_file, config) = image(bytes);
            let error = open(&Config { ro, ..config }).expect_err("refused").to_string();
            assert!(error.contains(want), "{error}");
        }
        let (_file, config) = image(2 << 20);
        let written = config.open(&MachineShape::default()).expect("a device");
        let read = Config { ro: true, ..config };
        let error = open(&read).expect_err("in use").to_string();
        assert!(error.contains("another VM is writing to it"), "{error}");
        drop(written);
        let [first, second] = [(); 2].map(|()| read.open(&MachineShape::default()));
        assert!(first.is_ok() && second.is_ok(), "readers share it");
    }

    #[test]
    fn the_root_file_system_can_be_on_it() {
        let (_file, config) = image(2 << 20);
        let told = |config: &Config, nth| {
            config.open(&MachineShape::default()).expect("a device").kernel_parameters(nth)
        };
        assert_eq!(told(&config, 0), None);
        let root = Config { root: true, ..config };
        assert_eq!(told(&root, 0).as_deref(), Some("root=/dev/pmem0 rw"));
        let root = Config { ro: true, ..root };
        assert_eq!(told(&root, 1).as_deref(), Some("root=/dev/pmem1 ro"));
        assert!(root.is_root() && !root.own_runner());
    }
}
