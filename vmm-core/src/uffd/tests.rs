//! Memory that comes when it is asked for, by a thread of ours and by another process.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::mm::{Advice, madvise};
use vm_memory::{Bytes, GuestAddress};

use super::touched::{BLOCK, Touched};
use super::*;
use crate::memory::Backing;
use crate::snapshot::memory_file::{MemoryImage, PAGE};
use crate::snapshot::memory_writer::{MemoryWriter, touched};

const SIZE: u64 = 8 << 20;
const ID: &str = "0123456789abcdef0123456789abcdef";

/// A file whose every page begins with its number, but for holes from the fourth MiB on.
fn image(dir: &Path) -> Arc<MemoryImage> {
    let (base, diff) = (dir.join("base"), dir.join("diff"));
    let file = File::create(&base).unwrap();
    file.set_len(SIZE).unwrap();
    for page in 0..(4 << 20) / PAGE {
        file.write_all_at(&(page + 1).to_le_bytes(), page * PAGE).unwrap();
    }
    let file = File::create(&diff).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(&[0xff; PAGE as usize], 20 * PAGE).unwrap();
    file.write_all_at(&[0xee; 8], SIZE - PAGE).unwrap();
    let mut image = MemoryImage::open(&base, SIZE).unwrap();
    image.add_diff(&diff, &[(20 * PAGE, 2 * PAGE), (SIZE - PAGE, PAGE)]).unwrap();
    Arc::new(image)
}

/// What the page at `offset` begins with.
fn want(page: u64) -> u64 {
    match page {
        20 => u64::MAX,
        21 => 0,
        page if page == SIZE / PAGE - 1 => 0xeeee_eeee_eeee_eeee,
        page if page < (4 << 20) / PAGE => page + 1,
        _ => 0,
    }
}

fn get(ram: &GuestRam, page: u64) -> u64 {
    ram.memory().read_obj(GuestAddress(page * PAGE)).unwrap()
}

fn empty() -> GuestRam {
    GuestRam::new(SIZE, Backing::default(), None).unwrap()
}

fn filled(image: Arc<MemoryImage>, touched: Option<TouchedFile>) -> GuestRam {
    let mut ram = empty();
    ram.fill_on_demand(image, touched).unwrap();
    ram
}

fn pending(ram: &GuestRam) -> u64 {
    ram.faults().unwrap().pending(SIZE).count()
}

fn wait_filled(ram: &GuestRam) {
    while pending(ram) > 0 {
        std::thread::yield_now();
    }
}

/// Gives a page back, as a balloon does.
#[allow(unsafe_code, reason = "memory is given back by address")]
fn give_back(ram: &GuestRam, page: u64) {
    let host = ram.regions().next().unwrap().host_addr + page * PAGE;
    // SAFETY: the page is one of `ram`'s, to which there is no reference.
    unsafe { madvise(host as *mut _, PAGE as usize, Advice::LinuxDontNeed) }.unwrap();
}

#[test]
fn what_is_asked_for_comes_and_then_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let ram = filled(image(dir.path()), None);
    for page in [5, 20, 21, 1500, SIZE / PAGE - 1] {
        assert_eq!(get(&ram, page), want(page), "page {page}");
    }
    wait_filled(&ram);
    for page in 0..SIZE / PAGE {
        assert_eq!(get(&ram, page), want(page), "page {page}");
    }
    ram.memory().write_obj(7_u64, GuestAddress(5 * PAGE)).unwrap();
    give_back(&ram, 5);
    assert_eq!(get(&ram, 5), 0, "once all is there, too");
}

#[test]
fn what_was_given_back_is_zero_and_not_the_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    // As long as the guest does not run, nothing comes by itself while it is recorded.
    let ram = filled(image(dir.path()), TouchedFile::in_dir(dir.path(), ID));
    assert_eq!(get(&ram, 100), 101);
    for page in [100, 101, 700] {
        give_back(&ram, page);
    }
    for page in [100, 101, 700] {
        assert_eq!(get(&ram, page), 0, "page {page}");
    }
    assert_eq!((get(&ram, 102), get(&ram, 701)), (103, 702));
    assert!(pending(&ram) > 900);
}

#[test]
fn memory_is_saved_whole_before_all_of_it_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let ram = filled(image(dir.path()), TouchedFile::in_dir(dir.path(), ID));
    ram.memory().write_obj(7_u64, GuestAddress(30 * PAGE)).unwrap();
    give_back(&ram, 31);
    let file = Arc::new(tempfile::tempfile().unwrap());
    let mut writer = MemoryWriter::new(file.clone(), SIZE, false).unwrap();
    writer.write(&ram, &touched(&ram).unwrap()).unwrap();
    for page in 0..SIZE / PAGE {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, page * PAGE).unwrap();
        let want = match page {
            30 => 7,
            31 => 0,
            page => want(page),
        };
        assert_eq!(u64::from_le_bytes(bytes), want, "page {page}");
    }
}

#[test]
fn what_a_guest_touched_first_is_there_for_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let file = || TouchedFile::in_dir(dir.path(), ID);
    let ram = filled(image(dir.path()), file());
    // The second and the fourth are in blocks that were touched.
    for page in [900, 901, 33, 32, 1500, 0] {
        get(&ram, page);
    }
    assert_eq!(file().unwrap().read(SIZE), None);
    ram.faults().unwrap().guest_runs();
    wait_filled(&ram);
    let pages = BLOCK / PAGE;
    let blocks = |touched: &[u64]| touched.iter().map(|page| (page / pages) as u32).collect();
    let whole = Touched { blocks: blocks(&[900, 33, 1500, 0]), whole: true };
    assert_eq!(file().unwrap().read(SIZE), Some(whole));
    let image = image(dir.path());
    let all = image.data().count();
    let again = filled(image, file());
    // Before the guest runs: what is no zeroes of the four blocks.
    while all - pending(&again) < 3 * BLOCK / PAGE {
        std::thread::yield_now();
    }
    again.faults().unwrap().guest_runs();
    wait_filled(&again);
    assert!((0..SIZE / PAGE).all(|page| get(&again, page) == want(page)));
}

#[test]
fn what_a_guest_touched_that_ended_early_is_there_for_the_next_one_which_adds_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = || TouchedFile::in_dir(dir.path(), ID);
    let image = image(dir.path());
    for (page, blocks) in [(33, vec![8]), (900, vec![8, 225]), (34, vec![8, 225])] {
        let ram = filled(image.clone(), file());
        ram.faults().unwrap().guest_runs();
        assert_eq!(get(&ram, page), want(page));
        ram.faults().unwrap().finish();
        assert_eq!(file().unwrap().read(SIZE), Some(Touched { blocks, whole: false }));
    }
    // One that has not run adds nothing.
    let ram = filled(image, file());
    get(&ram, 500);
    ram.faults().unwrap().finish();
    assert_eq!(file().unwrap().read(SIZE), Some(Touched { blocks: vec![8, 225], whole: false }));
}

#[test]
fn memory_that_cannot_be_read_ends_the_machine_and_nobody_waits_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let ram = filled(image(dir.path()), TouchedFile::in_dir(dir.path(), ID));
    let (tell, told) = mpsc::channel();
    let faults = ram.faults().unwrap();
    faults.watch(Box::new(move |reason| tell.send(reason).unwrap())).unwrap();
    File::options().write(true).open(dir.path().join("base")).unwrap().set_len(1 << 20).unwrap();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| get(&ram, 800));
        assert!(told.recv().unwrap().starts_with("cannot read the snapshot's memory"));
        assert!(faults.is_lost() && !waits.is_finished(), "nobody gets zeroes while the machine runs");
        assert!(faults.check().unwrap_err().to_string().contains("is lost"), "nor is what follows saved");
        assert!(faults.end().is_none());
        assert_eq!(waits.join().unwrap(), 0);
    });
    // While a machine is built, it is an error.
    let ram = filled(image(dir.path()), None);
    File::options().write(true).open(dir.path().join("base")).unwrap().set_len(1 << 20).unwrap();
    get(&ram, 800);
    while !ram.faults().unwrap().is_lost() {
        std::thread::yield_now();
    }
    let error = ram.faults().unwrap().watch(Box::new(|_| ())).unwrap_err();
    assert!(error.to_string().contains("is lost"), "{error}");
}

#[test]
fn another_process_gets_the_faults_and_its_end_keeps_nobody_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let mut ram = empty();
    let error = ram.hand_faults_to(&path, PAGE).unwrap_err().to_string();
    assert!(error.contains("start the handler first"), "{error}");
    let listener = UnixListener::bind(&path).unwrap();
    ram.hand_faults_to(&path, PAGE).unwrap();
    // What it is sent; the descriptor is lost with the message, as if the handler had ended at once.
    let mut text = vec![0; 4096];
    let (mut socket, _) = listener.accept().unwrap();
    let len = socket.read(&mut text).unwrap();
    let mappings: serde_json::Value = serde_json::from_slice(&text[..len]).unwrap();
    let region = ram.regions().next().unwrap();
    let want = serde_json::json!([{
        "base_host_virt_addr": region.host_addr, "size": SIZE, "offset": 0, "page_size": 4096, "page_size_kib": 4096,
    }]);
    assert_eq!(mappings, want);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| get(&ram, 3));
        let _ended = ram.faults().unwrap().end();
        assert_eq!(waits.join().unwrap(), 0);
    });
}
