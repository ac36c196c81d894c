//! The block device as a driver and as a hostile driver see it, and disks as an operator gives them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use std::path::Path;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SIZE_MAX};

use super::*;
use crate::model::MachineShape;
use crate::virtio::test_driver::{DATA, Desc, Driver, INDIRECT, NEXT, Reply, WRITE};

/// The machine around the disks.
pub const ONE_CPU: MachineShape = MachineShape { cpus: 1, memory: 256 << 20, memory_stays: false };
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const FLUSH_FEATURE: u64 = 1 << VIRTIO_BLK_F_FLUSH;
/// Sectors of a specimen.
const SECTORS: u64 = 128;

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// A driver of a specimen, and the specimen's file.
fn driver(ro: bool, features: u64) -> (Driver, File) {
    let block = Block::specimen(ro);
    let file = File::from(block.disk.fd().try_clone_to_owned().expect("descriptor"));
    (start(block, features), file)
}

fn start(block: Block, features: u64) -> Driver {
    let mut driver = Driver::new(Box::new(block));
    driver.start(features);
    driver
}

/// A request with room for `room` bytes of data. Returns the status and that room.
fn ask(driver: &mut Driver, header: &[u8], data: &[u8], room: usize) -> (u8, Vec<u8>) {
    let reply = driver.request(0, &[header, data], &[room, 1]);
    assert_eq!(reply.used, Some(room as u32 + 1));
    (reply.data[1][0], reply.data[0].clone())
}

fn status(driver: &mut Driver, header: &[u8], data: &[u8], room: usize) -> u8 {
    ask(driver, header, data, room).0
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; (SECTORS * SECTOR) as usize];
    file.read_exact_at(&mut bytes, 0).expect("the whole disk");
    bytes
}

#[test]
fn what_is_written_is_read_back_by_guest_and_host() {
    let (mut driver, file) = driver(false, FLUSH_FEATURE);
    let data: Vec<u8> = (0..2048).map(|i| (i % 251) as u8).collect();
    assert_eq!(status(&mut driver, &header(OUT, 124), &data, 0), OK);
    assert_eq!(ask(&mut driver, &header(IN, 124), &[], 2048), (OK, data.clone()));
    assert_eq!(content(&file)[124 * 512..], data);
    assert_eq!(ask(&mut driver, &header(IN, 7), &[], 512), (OK, vec![7; 512]));
    assert_eq!(status(&mut driver, &header(FLUSH, 0), &[], 0), OK);
    assert_eq!(driver.counters.bytes_from_guest.load(Ordering::Relaxed), 2048);
    assert_eq!(driver.counters.bytes_to_guest.load(Ordering::Relaxed), 2048 + 512);
    assert_eq!(driver.counters.guest_mistakes.load(Ordering::Relaxed), 0);
}

#[test]
fn every_page_that_a_read_fills_is_marked_dirty() {
    let (mut driver, _) = driver(false, 0);
    let (_, pages) = driver.post(0, &[&header(IN, 0), &[0; 4096 - 16]], &[4096, 2 * 4096, 512, 1]);
    driver.clear_dirty();
    driver.kick(0);
    assert_eq!(driver.used(0).len(), 1);
    for page in [pages[0], pages[1], pages[1] + 4096, pages[2]] {
        assert!(driver.is_dirty(page), "{page:#x}");
    }
    assert!(!driver.is_dirty(pages[0] - 1), "the device only read there");
    assert!(!driver.is_dirty(pages[3] + 4096));
}

#[test]
fn the_capacity_is_the_files() {
    let (driver, _) = driver(false, 0);
    let mut bytes = [0; 24];
    driver.read_config(0, &mut bytes);
    assert_eq!(bytes[..8], SECTORS.to_le_bytes());
    assert_ne!(driver.offered() & 1 << VIRTIO_BLK_F_SIZE_MAX, 0);
    assert_eq!(bytes[8..12], (256u32 << 10).to_le_bytes(), "size_max");
    assert_eq!(bytes[12..16], 254u32.to_le_bytes(), "seg_max");
    assert_eq!(bytes[20..24], 512u32.to_le_bytes(), "blk_size");
}

#[test]
fn descriptors_begin_and_end_where_they_like() {
    let (mut driver, _) = driver(false, 0);
    let bytes = header(IN, 9);
    let split: Vec<&[u8]> = bytes.chunks(1).collect();
    // The status is the last writable byte, be it alone or not.
    for room in [vec![513], vec![512, 1], vec![1, 511, 1], vec![300, 213], vec![0, 512, 0, 1, 0]] {
        let Reply { used, data } = driver.request(0, &split, &room);
        let data = data.concat();
        assert_eq!((used, data[512]), (Some(513), OK), "{room:?}");
        assert_eq!(data[..512], [9; 512], "{room:?}");
    }
    let many = vec![1; 200];
    assert_eq!(
        driver.request(0, &[&bytes[..3], &bytes[3..]], &many).used,
        Some(200),
        "199 bytes are no sector"
    );
}

#[test]
fn a_write_takes_its_data_from_the_descriptor_of_the_header_too() {
    let (mut driver, file) = driver(false, 0);
    let mut all = header(OUT, 3).to_vec();
    all.extend([0xcc; 512]);
    assert_eq!(driver.request(0, &[&all], &[1]), Reply { used: Some(1), data: vec![vec![OK]] });
    assert_eq!(content(&file)[3 * 512..4 * 512], [0xcc; 512]);
}

#[test]
fn the_identity_is_20_bytes() {
    let (mut driver, _) = driver(false, 0);
    let mut id = *b"specimen\0\0\0\0\0\0\0\0\0\0\0\0";
    assert_eq!(ask(&mut driver, &header(GET_ID, 0), &[], 20), (OK, id.to_vec()));
    assert_eq!(ask(&mut driver, &header(GET_ID, 0), &[], 4), (OK, b"spec".to_vec()));
    id[8..].fill(0);
    assert_eq!(ask(&mut driver, &header(GET_ID, 0), &[], 30).1, [&id[..], &[0; 10]].concat());
}

#[test]
fn unknown_requests_are_unsupported_and_no_mistake() {
    let (mut driver, file) = driver(false, 0);
    let before = content(&file);
    for kind in [2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 0x8000_0000, 0x8000_0001, u32::MAX] {
        let (status, data) = ask(&mut driver, &header(kind, 0), &[1; 512], 512);
        assert_eq!((status, data), (UNSUPP, vec![0; 512]), "type {kind:#x}");
    }
    assert!(content(&file) == before);
    assert_eq!(driver.counters.guest_mistakes.load(Ordering::Relaxed), 0);
}

#[test]
fn requests_past_the_end_or_of_part_of_a_sector_fail() {
    let (mut driver, file) = driver(false, 0);
    let before = content(&file);
    let cases = [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (0, SECTORS as usize * 512 + 512),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX / 512 + 1, 512),
        (1 << 63, 512),
        (u64::MAX - 1, 1024),
        (0, 1),
        (0, 511),
        (0, 513),
    ];
    for (sector, len) in cases {
        assert_eq!(status(&mut driver, &header(IN, sector), &[], len), IOERR, "read {len} at {sector}");
        assert_eq!(
            status(&mut driver, &header(OUT, sector), &vec![1; len], 0),
            IOERR,
            "write {len} at {sector}"
        );
    }
    assert!(content(&file) == before);
    assert_eq!(driver.counters.guest_mistakes.load(Ordering::Relaxed), 2 * cases.len() as u64);
    assert_eq!(status(&mut driver, &header(IN, SECTORS), &[], 0), OK, "nothing at the very end");
    assert_eq!(status(&mut driver, &header(IN, SECTORS + 1), &[], 0), IOERR, "nothing after it");
}

#[test]
fn chains_without_a_header_or_a_status_come_back_untouched() {
    let (mut driver, _) = driver(false, 0);
    let short = driver.request(0, &[&header(IN, 0)[..15]], &[512, 1]);
    assert_eq!(short, Reply { used: Some(0), data: vec![vec![0xa5; 512], vec![0xa5]] });
    assert_eq!(driver.request(0, &[&header(OUT, 0), &[1; 512]], &[]).used, Some(0));
    assert_eq!(driver.request(0, &[], &[512, 1]).used, Some(0));
    assert_eq!(driver.counters.guest_mistakes.load(Ordering::Relaxed), 3);
}

#[test]
fn a_read_only_disk_refuses_writes_whatever_the_driver_agreed_to() {
    for features in [0, 1 << VIRTIO_BLK_F_RO, FLUSH_FEATURE] {
        let (mut driver, file) = driver(true, features);
        assert_ne!(driver.offered() & 1 << VIRTIO_BLK_F_RO, 0);
        let before = content(&file);
        assert_eq!(status(&mut driver, &header(OUT, 0), &[1; 512], 0), IOERR);
        let Reply { data, .. } = driver.request(0, &[&header(OUT, 1), &[1; 100], &[1; 412]], &[1]);
        assert_eq!(data, [[IOERR]]);
        for kind in [11, 13, 14] {
            assert_eq!(status(&mut driver, &header(kind, 0), &[0; 16], 0), UNSUPP, "discard, zero, erase");
        }
        assert_eq!(status(&mut driver, &header(FLUSH, 0), &[], 0), OK);
        assert_eq!(ask(&mut driver, &header(IN, 5), &[], 512), (OK, vec![5; 512]));
        assert!(content(&file) == before, "features {features:#x}");
    }
}

#[test]
fn a_read_only_disk_is_opened_for_reading_only() {
    let file = image(512);
    let disk = Disk::open(&Config { ro: true, ..Config::new(file.path()) }).expect("opens");
    let error = rustix::io::pwrite(disk.fd(), b"x", 0).expect_err("no write access");
    assert_eq!(error, rustix::io::Errno::BADF);
}

#[test]
fn a_file_that_was_cut_short_gives_errors_and_no_old_memory() {
    let (mut driver, file) = driver(false, 0);
    file.set_len(512 * 10 + 100).expect("truncate");
    assert_eq!(ask(&mut driver, &header(IN, 9), &[], 512), (OK, vec![9; 512]));
    let (status, data) = ask(&mut driver, &header(IN, 10), &[], 1024);
    assert_eq!(status, IOERR);
    assert_eq!(data[..100], [10; 100]);
    assert_eq!(data[100..], [0; 924]);
    assert_eq!(driver.counters.host_errors.load(Ordering::Relaxed), 1);
}

/// A disk of 8 sectors on whatever is open.
fn odd(file: File, path: &str, engine: EngineKind) -> Block {
    let settings = Config { engine, ..Config::new(Path::new(path)) };
    let disk = Disk::on(file.into(), Path::new(path), false);
    Block::with_sectors(settings, disk, engine::open(engine).expect("an engine"), 1, 8)
}

/// A disk on a character device of the host, for its errors.
fn odd_disk(path: &str) -> Block {
    let file = File::options().read(true).write(true).open(path).expect(path);
    odd(file, path, EngineKind::Auto)
}

#[test]
fn a_full_host_is_an_error_of_the_request() {
    let mut driver = start(odd_disk("/dev/full"), FLUSH_FEATURE);
    assert_eq!(status(&mut driver, &header(OUT, 0), &[1; 512], 0), IOERR);
    assert_eq!(driver.counters.host_errors.load(Ordering::Relaxed), 1);
}

/// What `act` logs, with this thread's subscriber.
fn logged(act: impl FnOnce()) -> String {
    let file = tempfile::tempfile().expect("temporary file");
    let writer = file.try_clone().expect("descriptor");
    let subscriber = tracing_subscriber::fmt().with_ansi(false).without_time().with_writer(writer).finish();
    tracing::subscriber::with_default(subscriber, act);
    let mut bytes = vec![0; file.metadata().expect("size").len() as usize];
    file.read_exact_at(&mut bytes, 0).expect("the log");
    String::from_utf8(bytes).expect("text")
}

#[test]
fn the_operator_hears_once_per_activation_that_the_host_fails() {
    let mut driver = Driver::new(Box::new(odd_disk("/dev/full")));
    let turn = |driver: &mut Driver| {
        driver.start(FLUSH_FEATURE);
        for sector in 0..3 {
            assert_eq!(status(driver, &header(OUT, sector), &[1; 512], 0), IOERR);
        }
    };
    let log = logged(|| turn(&mut driver));
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains("WARN") && log.contains("disk '/dev/full'"), "{log}");
    assert!(log.contains("No space left on device"), "{log}");
    let log = logged(|| turn(&mut driver));
    assert_eq!(log.lines().count(), 1, "a new activation: {log}");
    assert_eq!(driver.counters.host_errors.load(Ordering::Relaxed), 6);
    let log = logged(|| (0..50).for_each(|_| turn(&mut driver)));
    assert_eq!(log.lines().count(), usize::from(MAX_WARNINGS) - 2, "a guest cannot fill the log: {log}");
    let log = logged(|| _ = status(&mut driver, &header(OUT, 99), &[1; 512], 0));
    assert_eq!(log, "", "the guest's mistake");
}

#[test]
fn writes_are_durable_before_they_are_completed_for_a_driver_that_cannot_flush() {
    let mut block = Block::specimen(false);
    for (features, durable) in [(0, true), (FLUSH_FEATURE, false), (0, true)] {
        block.activate(features);
        assert_eq!(block.durable(), durable, "features {features:#x}");
        block.reset();
    }
    block.settings.cache = Cache::Unsafe;
    block.activate(0);
    assert!(!block.durable(), "the operator does not want it");
}

#[test]
fn a_flush_that_fails_is_an_error_of_the_request() {
    // /dev/null takes writes and cannot be flushed: so a flush shows.
    let mut driver = start(odd_disk("/dev/null"), FLUSH_FEATURE);
    assert_eq!(status(&mut driver, &header(OUT, 0), &[1; 512], 0), OK);
    assert_eq!(status(&mut driver, &header(FLUSH, 0), &[], 0), IOERR);
}

#[test]
fn one_request_of_250_buffers_goes_through_whole() {
    let (mut driver, _) = driver(false, 0);
    // 250 buffers of 256 bytes each, all at the same place but the last.
    driver.write(DATA, &header(IN, 0));
    driver.set_desc(0, 0, Desc { addr: DATA, len: 16, flags: NEXT, next: 1 });
    for i in 1..=250 {
        driver.set_desc(0, i, Desc { addr: DATA + 0x1000, len: 256, flags: WRITE | NEXT, next: i + 1 });
    }
    driver.set_desc(0, 251, Desc { addr: DATA + 0x2000, len: 1, flags: WRITE, next: 0 });
    driver.offer(0, 0);
    driver.kick(0);
    assert_eq!(driver.used(0), [(0, 250 * 256 + 1)]);
    assert_eq!(driver.read(DATA + 0x1000, 256), [124; 256]);
}

/// Posts a request of `kind` by an indirect table: its header, then buffers of the lengths `data`, which all lie
/// at [`PILE`], with these flags, and a status of its own. Returns the used length and the status.
fn ask_for_pile(driver: &mut Driver, kind: u32, data: &[u32], flags: u16) -> (u32, u8) {
    let (table, status) = (DATA + 0x1000, DATA + 0x7000);
    driver.write(DATA, &header(kind, 0));
    driver.write(status, &[0xa5]);
    let mut parts = vec![(DATA, 16, 0)];
    parts.extend(data.iter().map(|&len| (PILE, len, flags)));
    parts.push((status, 1, WRITE));
    let last = parts.len() - 1;
    let descriptors: Vec<u8> = (0..)
        .zip(parts)
        .flat_map(|(i, (addr, len, flags))| {
            let more = if usize::from(i) < last { NEXT } else { 0 };
            Desc { addr, len, flags: flags | more, next: i + 1 }.bytes()
        })
        .collect();
    driver.write(table, &descriptors);
    driver.set_desc(0, 0, Desc { addr: table, len: descriptors.len() as u32, flags: INDIRECT, next: 0 });
    driver.offer(0, 0);
    driver.kick(0);
    let used = driver.used(0);
    assert_eq!(used.len(), 1);
    (used[0].1, driver.read(status, 1)[0])
}

/// Where the buffers of a large request lie on top of each other, and how long the longest are.
const PILE: u64 = DATA + 0x8000;
const PIECE: u32 = 512 << 10;

#[test]
fn a_request_for_more_than_the_limit_gets_its_status_and_nothing_else() {
    let (mut driver, file) = driver(false, 0);
    let before = content(&file);
    let most = vec![PIECE; MAX_REQUEST / PIECE as usize];
    assert_eq!(
        ask_for_pile(&mut driver, GET_ID, &most, WRITE),
        (MAX_REQUEST as u32 + 1, OK),
        "as much as may be"
    );
    let mistakes = |driver: &Driver| driver.counters.guest_mistakes.load(Ordering::Relaxed);
    assert_eq!(mistakes(&driver), 0);
    driver.write(PILE, &vec![0xa5; PIECE as usize]);
    let more = [&most[..], &[1]].concat();
    // Chains that can name some 4 GiB of a guest's memory have as many buffers.
    let huge = [PIECE; 1000];
    for (turn, data) in (0..).zip([&more[..], &huge]) {
        for (nth, kind) in (1..).zip([IN, GET_ID, FLUSH, 99]) {
            // Of what is in front of the status nothing was written, so that no length can be told.
            assert_eq!(ask_for_pile(&mut driver, kind, data, WRITE), (0, IOERR), "type {kind}");
            assert_eq!(mistakes(&driver), turn * 5 + nth);
        }
        assert!(driver.read(PILE, PIECE as usize).iter().all(|&byte| byte == 0xa5));
        assert_eq!(ask_for_pile(&mut driver, OUT, data, 0), (1, IOERR), "the status is all that is writable");
    }
    assert!(content(&file) == before);
    assert_eq!(status(&mut driver, &header(IN, 0), &[], 512), OK, "the device goes on");
}

/// An image of `bytes` bytes on the host.
fn image(bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    file.as_file().set_len(bytes).expect("size");
    file
}

fn refusal(config: &Config) -> String {
    config.open(&ONE_CPU).err().expect("refused").to_string()
}

#[test]
fn what_is_no_disk_is_refused_in_one_sentence() {
    let directory = tempfile::tempdir().expect("directory");
    let missing = directory.path().join("missing.img");
    let (empty, odd) = (image(0), image(1000));
    for (path, ro, want) in [
        (missing.as_path(), false, "no such file; check the path, or make an image with truncate(1)"),
        (directory.path(), false, "it is a directory; give a disk image or a block device"),
        (directory.path(), true, "it is a directory; give a disk image or a block device"),
        (
            Path::new("/dev/null"),
            true,
            "it is neither a file nor a block device; give a disk image or a block device",
        ),
        (empty.path(), true, "it is empty; give it a size with truncate(1), or say size=SIZE"),
        (
            odd.path(),
            false,
            "its size of 1000 bytes is not a multiple of 512; extend it with truncate(1), and check that it is a raw image",
        ),
    ] {
        let text = refusal(&Config { ro, ..Config::new(path) });
        assert_eq!(text, format!("cannot open disk '{}': {want}", path.display()));
    }
    let fifo = directory.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("fifo");
    assert!(
        refusal(&Config { ro: true, ..Config::new(&fifo) }).contains("neither a file nor a block device")
    );
    let id = |id: &str| Config { id: Some(id.into()), ..Config::new(image(512).path()) };
    assert_eq!(
        refusal(&id("a name that is too long")),
        "disk: id 'a name that is too long' does not fit; use at most 20 ASCII characters without spaces"
    );
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let file = image(512);
    let config = |ro| Config { ro, ..Config::new(file.path()) };
    let readers =
        [config(true).open(&ONE_CPU).expect("one reader"), config(true).open(&ONE_CPU).expect("another")];
    assert!(refusal(&config(false)).contains("another VM is using it; stop that VM, or add ',ro' to both"));
    drop(readers);
    let writer = config(false).open(&ONE_CPU).expect("a writer");
    assert!(refusal(&config(false)).contains("another VM is using it"));
    assert!(refusal(&config(true)).contains("another VM is writing to it; stop that VM, or make a copy"));
    drop(writer);
    config(false).open(&ONE_CPU).expect("another writer");
}

#[test]
fn the_guest_is_told_where_its_root_is() {
    let disk = |settings: Config| {
        let engine = engine::open(EngineKind::Threads).expect("threads");
        Block::new(settings, Disk::specimen(false), engine, 1).expect("a disk")
    };
    let root = |ro| disk(Config { root: true, ro, ..Config::new(Path::new("x")) });
    assert_eq!(root(false).kernel_parameters(0).as_deref(), Some("root=/dev/vda rw"));
    assert_eq!(root(true).kernel_parameters(25).as_deref(), Some("root=/dev/vdz ro"));
    assert_eq!(root(true).kernel_parameters(26).as_deref(), Some("root=/dev/vdaa ro"));
    assert_eq!(root(true).kernel_parameters(27 * 26).as_deref(), Some("root=/dev/vdaaa ro"));
    assert_eq!(disk(Config::new(Path::new("x"))).kernel_parameters(0), None);
}

#[test]
fn flags_and_files_say_the_same() {
    let parse = crate::registry::KINDS[0].parse;
    let want = Config { ro: true, id: Some("root".into()), ..Config::new(Path::new("/a,b.img")) };
    assert_eq!(parse("/a,,b.img,ro,id=root"), Ok(crate::registry::DeviceConfig::Disk(want)));
    let json = r#"{"kind":"disk","path":"/a,b.img","ro":true,"id":"root"}"#;
    assert_eq!(serde_json::from_str(json).ok(), parse("path=/a,,b.img,ro=on,id=root").ok());
    let unknown =
        serde_json::from_str::<crate::registry::DeviceConfig>(r#"{"kind":"disk","path":"x","rw":true}"#);
    assert!(unknown.expect_err("unknown key").to_string().contains("rw"));
}
