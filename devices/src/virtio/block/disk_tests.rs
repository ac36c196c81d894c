//! Disks on files of the host, through both engines: what is cleared, direct, in an image or in the way.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::Ordering;

use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, StorageOpenOptions};
use tempfile::{NamedTempFile, TempDir};

use super::tests::ONE_CPU;
use super::*;
use crate::model::MachineShape;
use crate::virtio::queue::{QueueConfig, QueueCore};
use crate::virtio::test_driver::{Driver, rings};

const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;
pub const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const UNMAP: u32 = 1;
pub const MIB: u64 = 1 << 20;

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// A file of 1 MiB, of bytes that tell their sector.
pub fn image() -> NamedTempFile {
    let file = NamedTempFile::new().expect("temporary file");
    let bytes: Vec<u8> = (0..MIB).map(|at| (at / SECTOR) as u8 | 1).collect();
    file.as_file().write_all_at(&bytes, 0).expect("written");
    file.as_file().sync_all().expect("blocks are allocated");
    file
}

pub fn config(file: &NamedTempFile) -> Config {
    Config::new(file.path())
}

/// A driver with everything negotiated.
pub fn driver(config: &Config) -> Driver {
    let mut driver = Driver::new(config.open(&ONE_CPU).expect("opens"));
    driver.start(driver.offered());
    driver
}

pub fn status(driver: &mut Driver, kind: u32, sector: u64, data: &[u8]) -> u8 {
    let reply = driver.request(0, &[&header(kind, sector), data], &[1]);
    assert_eq!(reply.used, Some(1));
    reply.data[0][0]
}

pub fn read(driver: &mut Driver, sector: u64, len: usize) -> Vec<u8> {
    let reply = driver.request(0, &[&header(IN, sector)], &[len, 1]);
    assert_eq!(reply.data[1], [OK]);
    reply.data[0].clone()
}

pub fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn with_each_engine(test: impl Fn(EngineKind)) {
    for engine in [EngineKind::IoUring, EngineKind::Threads] {
        match engine::open(engine) {
            Ok(_) => test(engine),
            // Containers often forbid it; then it is nobody's default there.
            Err(error) => assert!(engine == EngineKind::IoUring, "{error}"),
        }
    }
}

#[test]
fn many_requests_at_once_all_find_their_data_and_their_buffers() {
    with_each_engine(|engine| {
        let file = image();
        let mut driver = driver(&Config { engine, queues: Some(2), ..config(&file) });
        for turn in 0..4u64 {
            let posted: Vec<_> = (0..60u64)
                .map(|nth| {
                    let (queue, sector) = ((nth % 2) as u16, (nth * 31 + turn * 7) % 2047);
                    let (head, rooms) = driver.post(queue, &[&header(IN, sector)], &[700, 324, 1]);
                    (queue, head, sector, rooms)
                })
                .collect();
            driver.kick(0);
            driver.kick(1);
            let used = [driver.used(0), driver.used(1)];
            for (queue, head, sector, rooms) in posted {
                assert!(used[usize::from(queue)].contains(&(head.into(), 1025)));
                let got = [driver.read(rooms[0], 700), driver.read(rooms[1], 324)].concat();
                let want: Vec<u8> = (0..1024).map(|at| (sector + at / 512) as u8 | 1).collect();
                assert!(got == want && driver.read(rooms[2], 1) == [OK], "{engine:?} sector {sector}");
            }
        }
        assert_eq!(driver.counters.requests.load(Ordering::Relaxed), 240);
        assert_eq!(driver.counters.bytes_to_guest.load(Ordering::Relaxed), 240 * 1024);
    });
}

#[test]
fn a_reset_and_a_drop_return_when_nothing_is_in_flight_any_more() {
    with_each_engine(|engine| {
        let (file, mut board) = (image(), Driver::new(Box::new(Block::specimen(false))));
        // Flushes take their time with both engines. The rings are those that a driver would have made.
        board.clear_rings(0);
        (0..50).for_each(|_| _ = board.post(0, &[&header(FLUSH, 0)], &[1]));
        let rings = rings(0);
        let config = QueueConfig {
            ready: true,
            desc: rings.desc,
            driver: rings.driver,
            device: rings.device,
            ..QueueConfig::new(QUEUE_SIZE)
        };
        let begin = |block: &mut Block| {
            let core = QueueCore::new(0, &config, false, 1, &board.mem).expect("good rings");
            block.activate(1 << VIRTIO_BLK_F_FLUSH);
            block.process(&mut Queues::lend(&mut [core], &board.mem), 0);
        };
        let mut block = block_on(&file, engine);
        begin(&mut block);
        block.reset();
        assert_eq!(block.engine.in_flight(), 0);
        begin(&mut block);
        let disk = Arc::downgrade(&block.disk);
        drop(block);
        assert_eq!(disk.strong_count(), 0, "each job in flight has the disk");
    });
}

#[test]
fn discarded_blocks_return_to_the_file_system_and_zeroed_ones_as_the_driver_likes() {
    with_each_engine(|engine| {
        let file = image();
        let blocks = || file.as_file().metadata().expect("metadata").blocks();
        let mut driver = driver(&Config { engine, ..config(&file) });
        let full = blocks();
        assert!(full >= 2048);
        assert_eq!(status(&mut driver, WRITE_ZEROES, 0, &segment(0, 256, 0)), OK);
        assert_eq!(blocks(), full, "kept");
        assert_eq!(read(&mut driver, 0, 256 * 512), [0; 256 * 512]);
        assert_eq!(read(&mut driver, 256, 512), [1; 512]);
        assert_eq!(status(&mut driver, WRITE_ZEROES, 0, &segment(0, 256, UNMAP)), OK);
        assert_eq!(blocks(), full - 256);
        let both = [segment(512, 256, 0), segment(1024, 512, 0)].concat();
        assert_eq!(status(&mut driver, DISCARD, 0, &both), OK);
        assert_eq!(blocks(), full - 1024);
        assert_eq!(read(&mut driver, 768, 512), [1; 512], "between the two");
        assert_eq!(file.as_file().metadata().expect("metadata").len(), MIB);
    });
}

#[test]
fn where_the_host_cannot_zero_zeros_are_written() {
    with_each_engine(|engine| {
        // Memory files have no ZERO_RANGE.
        let mut driver = Driver::new(Box::new(Block::on(Disk::specimen(false), engine)));
        driver.start(driver.offered());
        assert_eq!(status(&mut driver, WRITE_ZEROES, 0, &segment(1, 100, 0)), OK);
        assert_eq!(read(&mut driver, 1, 51200), [0; 51200]);
        assert_eq!((read(&mut driver, 0, 512), read(&mut driver, 101, 512)), (vec![0; 512], vec![101; 512]));
    });
}

#[test]
fn ranges_to_clear_are_all_checked_before_the_first_is_touched() {
    let file = image();
    let mut driver = driver(&config(&file));
    let before = std::fs::read(file.path()).expect("readable");
    let good = segment(0, 8, 0);
    let refused = [
        (vec![], IOERR),
        (vec![0; 15], IOERR),
        ([&good[..], &[0]].concat(), IOERR),
        (good.repeat(33), IOERR),
        (segment(0, 0, 0), IOERR),
        (segment(2048, 1, 0), IOERR),
        (segment(0, 2049, 0), IOERR),
        (segment(u64::MAX, 1, 0), IOERR),
        (segment(u64::MAX / 512 + 1, 1, 0), IOERR),
        (segment(0, u32::MAX, 0), IOERR),
        (segment(0, 1, 2), UNSUPP),
        (segment(0, 1, 1 << 31), UNSUPP),
    ];
    for (data, want) in refused {
        for kind in [DISCARD, WRITE_ZEROES] {
            assert_eq!(status(&mut driver, kind, 0, &data), want, "type {kind}: {data:?}");
            if data.len() == 16 {
                let after_a_good_one = [&good[..], &data].concat();
                assert_eq!(status(&mut driver, kind, 0, &after_a_good_one), want, "type {kind}: {data:?}");
            }
        }
    }
    assert_eq!(status(&mut driver, DISCARD, 0, &segment(0, 8, UNMAP)), UNSUPP, "only zeroing can unmap");
    assert!(std::fs::read(file.path()).expect("readable") == before);
    assert_eq!(status(&mut driver, DISCARD, 0, &good.repeat(32)), OK);
}

#[test]
fn a_driver_that_did_not_negotiate_them_cannot_discard_or_zero() {
    let file = image();
    let mut driver = Driver::new(config(&file).open(&ONE_CPU).expect("opens"));
    driver.start(0);
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(status(&mut driver, kind, 0, &segment(0, 8, 0)), UNSUPP);
    }
}

#[test]
fn direct_disks_take_any_memory_of_the_guest() {
    with_each_engine(|engine| {
        let file = image();
        let config = Config { engine, cache: Cache::None, ..config(&file) };
        // Some file systems have no direct I/O, which is one sentence.
        let device = match config.open(&ONE_CPU) {
            Ok(device) => device,
            Err(error) => return assert!(error.to_string().contains("has no direct I/O")),
        };
        let mut block = [0; 4];
        device.config_space().read(20, &mut block);
        let block = u32::from_le_bytes(block) as usize;
        assert!([512, 4096].contains(&block));
        let mut driver = Driver::new(device);
        driver.start(driver.offered());
        let sector = 8;
        // Buffers of odd lengths at odd addresses, more than a copy holds.
        let data: Vec<u8> = (0..200 << 10).map(|i| (i % 253) as u8).collect();
        let (one, more) = data.split_at(4097);
        let reply = driver.request(0, &[&header(OUT, sector), one, more], &[1]);
        assert_eq!(reply.data, [[OK]]);
        assert_eq!(status(&mut driver, FLUSH, 0, &[]), OK);
        let reply = driver.request(0, &[&header(IN, sector)], &[1, data.len() - 2, 1, 1]);
        assert!(reply.data[..3].concat() == data && reply.data[3] == [OK], "{engine:?}");
        let mut on_host = vec![0; data.len()];
        file.as_file().read_exact_at(&mut on_host, sector * SECTOR).expect("read");
        assert!(on_host == data);
    });
}

#[test]
fn a_host_that_fails_is_an_error_of_the_request_with_each_engine() {
    with_each_engine(|engine| {
        let file = image();
        let mut driver = driver(&Config { engine, ..config(&file) });
        file.as_file().set_len(MIB / 2).expect("cut short");
        assert_eq!(driver.request(0, &[&header(IN, 2000)], &[512, 1]).data, [vec![0; 512], vec![IOERR]]);
        assert_eq!(driver.counters.host_errors.load(Ordering::Relaxed), 1);
        assert_eq!(read(&mut driver, 4, 512), [5; 512], "it goes on");
    });
}

#[test]
fn the_size_extends_a_file_or_limits_what_is_used_of_it() {
    let file = image();
    let capacity = |config: &Config| {
        let mut bytes = [0; 8];
        config
            .open(&ONE_CPU)
            .map(|device| device.config_space().read(0, &mut bytes))
            .map(|()| u64::from_le_bytes(bytes))
    };
    let sized = |size: u64| Config { size: Some(crate::size::ByteSize(size)), ..config(&file) };
    assert_eq!(capacity(&config(&file)).ok(), Some(2048));
    assert_eq!(capacity(&sized(MIB / 2)).ok(), Some(1024));
    assert_eq!(file.as_file().metadata().expect("metadata").len(), MIB, "nothing is cut off");
    let error = capacity(&Config { ro: true, ..sized(2 * MIB) }).expect_err("it cannot be extended");
    assert!(error.to_string().contains("it is read-only and smaller than 'size'"), "{error}");
    assert_eq!(capacity(&sized(2 * MIB)).ok(), Some(4096));
    assert_eq!(file.as_file().metadata().expect("metadata").len(), 2 * MIB);
    assert!(capacity(&sized(1000)).is_err());
}

fn capacity(driver: &Driver) -> u64 {
    u64::from(driver.get(0x100)) | u64::from(driver.get(0x104)) << 32
}

#[test]
fn a_file_that_grew_and_another_file_are_taken_over_while_the_driver_runs() {
    with_each_engine(|engine| {
        let (file, other) = (image(), image());
        other.as_file().write_all_at(&[0xcc; 512], 512).expect("written");
        other.as_file().set_len(MIB / 2).expect("cut short");
        let config = Config { engine, ..config(&file) };
        let mut driver = driver(&config);
        driver.update(&config).expect("nothing changed");
        assert_eq!((capacity(&driver), driver.interrupts()), (2048, 0));
        file.as_file().set_len(3 * MIB).expect("grown");
        driver.update(&config).expect("grown");
        assert_eq!((capacity(&driver), driver.interrupts()), (6144, 1), "the driver is told");
        assert_eq!(status(&mut driver, OUT, 6143, &[1; 512]), OK);
        let swapped = Config { path: other.path().into(), ..config.clone() };
        driver.update(&swapped).expect("swapped");
        assert_eq!(capacity(&driver), 1024);
        assert_eq!(read(&mut driver, 1, 512), [0xcc; 512]);
        assert!(config.open(&ONE_CPU).is_ok(), "the old file is free");
        assert!(refusal(&swapped).contains("another VM is using it"), "the new one is not");
        let missing = Config { path: "/nowhere/at.all".into(), ..swapped.clone() };
        assert!(driver.update(&missing).expect_err("refused").to_string().contains("no such file"));
        assert_eq!(read(&mut driver, 1, 512), [0xcc; 512], "as it was");
        let larger = Config { size: Some(crate::size::ByteSize(2 * MIB)), ..swapped };
        driver.update(&larger).expect("extended");
        assert_eq!((capacity(&driver), other.as_file().metadata().expect("metadata").len()), (4096, 2 * MIB));
    });
}

#[test]
fn there_is_a_queue_a_cpu_unless_the_operator_says_another_number() {
    let file = image();
    for (queues, cpus, want) in [(None, 1, 1), (None, 4, 4), (None, 32, 16), (Some(3), 1, 3)] {
        let device = Config { queues, ..config(&file) }
            .open(&MachineShape { cpus, ..MachineShape::default() })
            .expect("opens");
        let mut count = [0; 2];
        device.config_space().read(34, &mut count);
        assert_eq!((device.queue_sizes().len(), u16::from_le_bytes(count)), (want, want as u16));
        let offered = device.features() & 1 << virtio_bindings::virtio_blk::VIRTIO_BLK_F_MQ != 0;
        assert_eq!(offered, want > 1);
    }
}

/// An empty qcow2 image of 1 MiB in `dir`, on `backing` (file and format) if there is one.
pub fn qcow2(dir: &TempDir, name: &str, backing: Option<(&str, &str)>) -> Config {
    let path = dir.path().join(name);
    let file = File::options().read(true).write(true).create_new(true).open(&path).expect("new");
    let options = StorageOpenOptions::new().write(true).filename(&path);
    let file = imago::file::File::from_open_file(file, options).expect("opens");
    let builder = Qcow2::<imago::file::File>::create_builder(file).size(MIB);
    let builder = match backing {
        Some((file, format)) => builder.backing(file.into(), format.into()),
        None => builder,
    };
    builder.create().expect("created");
    Config { format: Format::Qcow2, ..Config::new(&path) }
}

#[test]
fn an_image_keeps_what_is_written_and_gives_back_what_is_discarded() {
    let dir = tempfile::tempdir().expect("directory");
    let config = qcow2(&dir, "a.qcow2", None);
    let data: Vec<u8> = (0..128 << 10).map(|i| (i % 241) as u8).collect();
    let blocks = || std::fs::metadata(&config.path).expect("metadata").blocks();
    {
        let mut driver = driver(&config);
        assert_eq!(read(&mut driver, 0, 512), [0; 512]);
        assert_eq!(status(&mut driver, OUT, 256, &data), OK);
        assert_eq!(status(&mut driver, FLUSH, 0, &[]), OK);
        assert!(read(&mut driver, 256, data.len()) == data);
    }
    let mut driver = driver(&config);
    assert!(read(&mut driver, 256, data.len()) == data, "after it was opened again");
    let full = blocks();
    assert_eq!(status(&mut driver, DISCARD, 0, &segment(256, 256, 0)), OK);
    assert_eq!(status(&mut driver, FLUSH, 0, &[]), OK);
    assert!(blocks() + 200 < full, "{} of {full}", blocks());
    assert_eq!(read(&mut driver, 256, 512), [0; 512]);
    assert_eq!(status(&mut driver, WRITE_ZEROES, 0, &segment(0, 300, 0)), OK);
}

pub fn refusal(config: &Config) -> String {
    config.open(&ONE_CPU).err().expect("refused").to_string()
}

#[test]
fn backing_files_are_opened_when_allowed_locked_and_never_guessed() {
    let dir = tempfile::tempdir().expect("directory");
    let base = dir.path().join("base.img");
    std::fs::write(&base, vec![7; MIB as usize]).expect("written");
    let top = qcow2(&dir, "top.qcow2", Some(("base.img", "raw")));
    let text = refusal(&top);
    assert!(
        text.ends_with(
            "it needs the backing file 'base.img'; add ',backing=on' to allow that, if you trust the image"
        ),
        "{text}"
    );
    let top = Config { backing: true, ..top };
    {
        let mut driver = driver(&top);
        assert_eq!(read(&mut driver, 9, 512), [7; 512]);
        assert_eq!(status(&mut driver, OUT, 9, &[8; 512]), OK);
        assert_eq!((read(&mut driver, 9, 512), read(&mut driver, 10, 512)), (vec![8; 512], vec![7; 512]));
        assert!(
            refusal(&Config::new(&base)).contains("another VM is using it"),
            "nobody writes it meanwhile"
        );
        assert!(Config { ro: true, ..Config::new(&base) }.open(&ONE_CPU).is_ok());
        assert!(refusal(&top).contains("another VM is using it"));
    }
    assert!(std::fs::read(&base).expect("readable") == vec![7; MIB as usize]);
    let odd = Config { backing: true, ..qcow2(&dir, "odd.qcow2", Some(("base.img", "vmdk"))) };
    assert!(refusal(&odd).contains("its format 'vmdk' is not known here"));
    let own = Config { backing: true, ..qcow2(&dir, "own.qcow2", Some(("own.qcow2", "qcow2"))) };
    assert!(refusal(&own).contains("another VM is writing to it"), "itself");
    let own = Config { ro: true, ..own };
    assert!(refusal(&own).contains("too many backing files"));
}

#[test]
fn what_is_no_image_is_refused_in_one_sentence() {
    let file = image();
    let qcow2 = Config { format: Format::Qcow2, ..config(&file) };
    let text = refusal(&qcow2);
    assert!(text.contains("it is no qcow2 image (") && !text.contains('\n'), "{text}");
    let text = refusal(&Config { engine: EngineKind::IoUring, ..qcow2 });
    assert_eq!(text, "disk: engine=io_uring does not do qcow2; leave engine= out");
    let text = refusal(&Config { backing: true, ..config(&file) });
    assert!(text.contains("say format=qcow2"), "{text}");
    for queues in [0, 17, u16::MAX] {
        assert!(refusal(&Config { queues: Some(queues), ..config(&file) }).contains("use 1 to 16"));
    }
}

fn block_on(file: &NamedTempFile, engine: EngineKind) -> Block {
    let settings = Config { engine, ..config(file) };
    let disk = Disk::open(&settings).expect("opens");
    Block::new(settings, disk, engine::open(engine).expect("an engine"), 1).expect("a disk")
}
