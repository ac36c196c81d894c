//! Disks that go into snapshots and come out of them.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use tempfile::TempDir;

use super::disk_tests::{
    DISCARD, FLUSH, MIB, OK, OUT, WRITE_ZEROES, config, driver, image, qcow2, read, refusal, segment, status,
};
use super::tests::ONE_CPU;
use super::*;
use crate::virtio::test_driver::Driver;

/// Saves the disk to a file of this name.
fn save(driver: &Driver, dir: &TempDir, name: &str) -> std::path::PathBuf {
    let path = dir.path().join(name);
    let file = File::options().read(true).write(true).create_new(true).open(&path).expect("new");
    driver.save_storage(&file).expect("saved");
    path
}

/// The configuration of a machine that begins with what was saved.
fn begun(config: &Config, saved: &Path, format: &str) -> Config {
    let mut config = config.clone();
    config.begin_with(saved, format).expect("a known format");
    config
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("readable")
}

#[test]
fn a_private_disk_begins_as_its_file_and_never_writes_it() {
    let file = image();
    let before = bytes(file.path());
    let private = Config { private: true, ..config(&file) };
    let mut disks = [driver(&private), driver(&private)];
    for (number, disk) in (1..).zip(&mut disks) {
        assert_eq!(read(disk, 9, 512), before[9 * 512..10 * 512]);
        assert_eq!(status(disk, OUT, 9, &[number; 512]), OK);
        assert_eq!(status(disk, FLUSH, 0, &[]), OK);
    }
    for (number, disk) in (1..).zip(&mut disks) {
        assert_eq!(read(disk, 9, 512), [number; 512]);
        assert_eq!(read(disk, 10, 512), before[10 * 512..11 * 512]);
    }
    assert!(bytes(file.path()) == before);
    assert!(refusal(&config(&file)).contains("another VM is using it"), "nobody writes it meanwhile");
    drop(disks);
    assert!(config(&file).open(&ONE_CPU).is_ok());
}

#[test]
fn what_is_saved_of_a_private_disk_needs_nothing_else() {
    let dir = tempfile::tempdir().expect("directory");
    let file = image();
    let mut want = bytes(file.path());
    want.resize(3 << 20, 0);
    let size = Some(crate::size::ByteSize(3 << 20));
    let private = Config { private: true, size, engine: EngineKind::IoUring, ..config(&file) };
    let mut disk = driver(&private);
    // In the middle of a cluster, across two of them, past the end of the file, cleared, and cleared again.
    for (sector, count, byte) in [(9, 1, 3), (250, 12, 4), (2040, 16, 5), (4000, 2, 6)] {
        assert_eq!(status(&mut disk, OUT, sector, &vec![byte; count * 512]), OK);
        want[sector as usize * 512..][..count * 512].fill(byte);
    }
    for (kind, sector, count) in [(DISCARD, 512, 256), (WRITE_ZEROES, 1000, 3), (DISCARD, 256, 3)] {
        assert_eq!(status(&mut disk, kind, 0, &segment(sector, count, 0)), OK);
        let range = sector as usize * 512..(sector as usize + count as usize) * 512;
        let now = read(&mut disk, sector, range.len());
        want[range].copy_from_slice(&now);
    }
    assert_eq!(disk.storage().expect("a disk"), Storage { format: "raw", nameless: true });
    let saved = save(&disk, &dir, "saved");
    drop((disk, file));
    assert!(bytes(&saved) == want, "as the guest knew it");
    assert!(saved.metadata().expect("metadata").blocks() * 512 < 2 << 20, "with holes");

    // And again, from what was saved, which may be removed.
    let mut disk = driver(&begun(&private, &saved, "raw"));
    std::fs::remove_file(&saved).expect("removed");
    assert_eq!(status(&mut disk, OUT, 0, &[9; 512]), OK);
    want[..512].fill(9);
    assert!(bytes(&save(&disk, &dir, "again")) == want);
}

#[test]
fn a_raw_disk_is_saved_with_its_holes() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("disk");
    let file = File::create(&path).expect("new");
    file.set_len(64 * MIB).expect("room");
    file.write_all_at(&[7; 5000], 41 * MIB).expect("written");
    for cache in [Cache::Writeback, Cache::None] {
        let config = Config { cache, ..Config::new(&path) };
        let Ok(disk) = config.open(&ONE_CPU) else { continue };
        let disk = Driver::new(disk);
        assert_eq!(disk.storage().expect("a disk"), Storage { format: "raw", nameless: false });
        let saved = save(&disk, &dir, &format!("saved-{cache:?}"));
        assert!(bytes(&saved) == bytes(&path), "{cache:?}");
        assert!(saved.metadata().expect("metadata").blocks() * 512 < MIB);
    }
    let ro = Config { ro: true, ..Config::new(&path) };
    assert_eq!(Driver::new(ro.open(&ONE_CPU).expect("opens")).storage(), None);
}

#[test]
fn an_image_is_saved_as_it_is_and_finds_its_backing_file() {
    let dir = tempfile::tempdir().expect("directory");
    std::fs::write(dir.path().join("base.img"), vec![7; MIB as usize]).expect("written");
    let top = Config { backing: true, ..qcow2(&dir, "top.qcow2", Some(("base.img", "raw"))) };
    let mut disk = driver(&top);
    assert_eq!(status(&mut disk, OUT, 9, &[8; 512]), OK);
    assert_eq!(disk.storage().expect("a disk"), Storage { format: "qcow2", nameless: false });
    let elsewhere = tempfile::tempdir().expect("directory");
    let saved = save(&disk, &elsewhere, "saved");
    drop(disk);
    let before = bytes(&saved);
    let config = begun(&top, &saved, "qcow2");
    let mut clones = [driver(&config), driver(&config)];
    for (number, clone) in (1..).zip(&mut clones) {
        assert_eq!((read(clone, 9, 512), read(clone, 10, 512)), (vec![8; 512], vec![7; 512]));
        assert_eq!(status(clone, OUT, 10, &[number; 512]), OK);
    }
    let mut want = vec![7; MIB as usize];
    want[9 * 512..10 * 512].fill(8);
    for (number, clone) in (1..).zip(&clones) {
        want[10 * 512..11 * 512].fill(number);
        let storage = clone.storage().expect("a disk");
        let saved = save(clone, &elsewhere, &format!("clone-{number}"));
        let again = Config { private: true, ..begun(&top, &saved, storage.format) };
        let (mut again, half) = (driver(&again), MIB as usize / 2);
        let halves = [read(&mut again, 0, half), read(&mut again, half as u64 / 512, half)];
        assert!(halves.concat() == want, "{}", storage.format);
    }
    assert!(bytes(&saved) == before);
}

#[test]
fn another_path_is_used_as_it_is() {
    let [file, saved] = [image(), image()];
    let restored = begun(&Config { engine: EngineKind::IoUring, ..config(&file) }, saved.path(), "raw");
    assert!(restored.private && restored.path == saved.path());
    let mut other = Config { path: file.path().into(), ..restored.clone() };
    other.changed_from(&restored);
    assert!(!other.private);
    let mut same = Config { bandwidth: None, ..restored.clone() };
    same.changed_from(&restored);
    assert!(same.private);
    let mut disk = driver(&restored);
    disk.update(&other).expect("it is free");
    assert_eq!(status(&mut disk, OUT, 0, &[9; 512]), OK);
    assert_eq!(bytes(file.path())[..512], [9; 512]);
    assert!(
        begun(&qcow2(&tempfile::tempdir().expect("directory"), "a", None), saved.path(), "raw").format
            == Format::Raw
    );
    assert!(config(&file).begin_with(saved.path(), "vmdk").is_err());
    let missing = Config { private: true, ..Config::new("/nowhere/disk".as_ref()) };
    assert!(refusal(&missing).contains("no such file"));
}
