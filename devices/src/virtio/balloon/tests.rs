use std::sync::atomic::Ordering;

use rustix::mm::{MapFlags, ProtFlags};

use super::*;
use crate::virtio::test_driver::{DATA, Driver, REGIONS};

/// Where the pages are that tests give away: behind what the driver places its buffers in.
const PAGES: u64 = DATA + 0x8_0000;
const REPORTING: u16 = 3;

fn driver(config: &Config) -> Driver {
    let mut driver = Driver::new(config.open(&MachineShape::default()).expect("a balloon"));
    let features = driver.offered() & (F_STATS_VQ | F_DEFLATE_ON_OOM | F_REPORTING);
    driver.start(features);
    driver
}

/// Page numbers as a request has them.
fn pfns(addresses: &[u64]) -> Vec<u8> {
    addresses.iter().flat_map(|address| ((address / PAGE) as u32).to_le_bytes()).collect()
}

fn mistakes(driver: &Driver) -> u64 {
    driver.counters.guest_mistakes.load(Ordering::Relaxed)
}

fn fact(driver: &Driver, name: &str) -> u64 {
    let facts = driver.counters.all();
    facts.iter().find(|(have, _)| *have == name).unwrap_or_else(|| panic!("{name} in {facts:?}")).1
}

/// A field of the configuration space.
fn config_u32(driver: &Driver, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    driver.read_config(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// Fills the page at `address` with something.
fn fill(driver: &Driver, address: u64) {
    driver.write(address, &[0x5a; PAGE as usize]);
}

fn is_zero(driver: &Driver, address: u64) -> bool {
    driver.read(address, PAGE as usize).iter().all(|&byte| byte == 0)
}

#[test]
fn pages_in_the_balloon_are_the_hosts_and_their_neighbours_are_not() {
    let mut driver = driver(&Config::default());
    let pages: Vec<u64> = (0..8).map(|i| PAGES + i * PAGE).collect();
    pages.iter().for_each(|&page| fill(&driver, page));
    driver.clear_dirty();
    // In any order, and one of them twice.
    let list = pfns(&[pages[3], pages[2], pages[6], pages[2], pages[1]]);
    assert_eq!(driver.request(INFLATE, &[&list], &[]).used, Some(0));
    let zero: Vec<bool> = pages.iter().map(|&page| is_zero(&driver, page)).collect();
    assert_eq!(zero, [false, true, true, true, false, false, true, false]);
    assert_eq!(pages.iter().map(|&page| driver.is_dirty(page)).collect::<Vec<_>>(), zero);
    assert_eq!((fact(&driver, "inflated_bytes"), mistakes(&driver)), (4 * PAGE, 0));
    assert_eq!(driver.request(DEFLATE, &[&list], &[]).used, Some(0));
    assert_eq!(fact(&driver, "deflated_bytes"), 4 * PAGE);
}

#[test]
fn page_numbers_outside_of_memory_are_mistakes_and_the_others_count() {
    let mut driver = driver(&Config::default());
    fill(&driver, PAGES);
    let [(_, first), (second, _)] = REGIONS;
    let list = pfns(&[first as u64, second - PAGE, 1 << 40, PAGES, u64::from(u32::MAX) * PAGE]);
    assert_eq!(driver.request(INFLATE, &[&list], &[]).used, Some(0));
    assert!(is_zero(&driver, PAGES));
    assert_eq!(mistakes(&driver), 1, "one for the request");
    assert_eq!(fact(&driver, "inflated_bytes"), PAGE);
    // Over the hole, as one run.
    let run: Vec<u64> = (first as u64 - PAGE..second + PAGE).step_by(PAGE as usize).collect();
    assert_eq!(driver.request(INFLATE, &[&pfns(&run)], &[]).used, Some(0));
    assert_eq!(fact(&driver, "inflated_bytes"), 3 * PAGE);
}

#[test]
fn lists_of_any_length_and_shape_are_survived() {
    let mut driver = driver(&Config::default());
    let long = pfns(&vec![PAGES; MAX_PFNS + 1]);
    for (queue, list, writable, wrong) in [
        (INFLATE, &[][..], &[64][..], true),
        (INFLATE, &[1, 2, 3][..], &[], true),
        (INFLATE, &pfns(&[PAGES])[..], &[64], true),
        (INFLATE, &long[..], &[], true),
        (DEFLATE, &long[..], &[], true),
        (DEFLATE, &long[4..], &[], false),
        (REPORTING, &[1; 64][..], &[], true),
        (REPORTING + 1, &[][..], &[64], false),
    ] {
        let before = mistakes(&driver);
        let readable: Vec<&[u8]> = if list.is_empty() { vec![] } else { vec![list] };
        assert_eq!(driver.request(queue, &readable, writable).used, Some(0));
        assert_eq!(mistakes(&driver) > before, wrong, "queue {queue}, {} bytes", list.len());
    }
}

#[test]
fn a_full_queue_of_requests_takes_several_turns_and_all_are_done() {
    let mut driver = driver(&Config::default());
    let list: Vec<u64> = (0..64).map(|i| PAGES + i * PAGE).collect();
    for _ in 0..QUEUE_SIZE {
        driver.post(INFLATE, &[&pfns(&list)], &[]);
    }
    driver.kick(INFLATE);
    assert_eq!(driver.used(INFLATE).len(), usize::from(QUEUE_SIZE));
    assert_eq!(mistakes(&driver), 0);
}

/// Reports `len` bytes from `address` as free.
fn report(driver: &mut Driver, queue: u16, address: u64, len: u32) {
    use crate::virtio::test_driver::{Desc, WRITE};
    driver.set_desc(queue, 0, Desc { addr: address, len, flags: WRITE, next: 0 });
    driver.offer(queue, 0);
    driver.kick(queue);
    assert_eq!(driver.used(queue), [(0, 0)]);
}

#[test]
fn reported_pages_are_the_hosts_and_halves_of_pages_are_not() {
    for queue in [REPORTING, REPORTING + 1] {
        let mut driver = driver(&Config::default());
        (0..4).for_each(|i| fill(&driver, PAGES + i * PAGE));
        report(&mut driver, queue, PAGES + 100, 3 * PAGE as u32);
        let zero: Vec<bool> = (0..4).map(|i| is_zero(&driver, PAGES + i * PAGE)).collect();
        assert_eq!(zero, [false, true, true, false]);
        assert_eq!((fact(&driver, "reported_bytes"), mistakes(&driver)), (2 * PAGE, 0));
    }
}

#[test]
fn what_the_guest_wants_poisoned_stays_as_it_is() {
    let mut driver = driver(&Config::default());
    driver.start(F_STATS_VQ | F_REPORTING | F_PAGE_POISON);
    for (poison, zeroed) in [(0xaaaa_aaaa_u32, false), (0, true)] {
        driver.write_config(12, &poison.to_le_bytes());
        fill(&driver, PAGES);
        report(&mut driver, REPORTING, PAGES, PAGE as u32);
        assert_eq!(is_zero(&driver, PAGES), zeroed, "{poison:#x}");
    }
}

#[test]
fn reporting_is_not_offered_where_memory_is_to_stay() {
    let offered = |config: &Config, machine: &MachineShape| {
        config.open(machine).expect("a balloon").features() & (F_REPORTING | F_DEFLATE_ON_OOM)
    };
    let machine = MachineShape::default();
    let both = F_REPORTING | F_DEFLATE_ON_OOM;
    assert_eq!(offered(&Config::default(), &machine), both);
    assert_eq!(
        offered(&Config::default(), &MachineShape { memory_stays: true, ..machine }),
        F_DEFLATE_ON_OOM
    );
    let neither = Config { reporting: false, deflate_on_oom: false, ..Config::default() };
    assert_eq!(offered(&neither, &machine), 0);
}

#[test]
fn the_size_is_the_operators_and_what_came_of_it_the_guests() {
    let config = Config { size: ByteSize(8 << 20), ..Config::default() };
    let driver = driver(&config);
    assert_eq!(config_u32(&driver, 0), 2048);
    driver.write_config(4, &1000u32.to_le_bytes());
    driver.write_config(0, &7u32.to_le_bytes());
    assert_eq!((fact(&driver, "target_bytes"), fact(&driver, "actual_bytes")), (8 << 20, 1000 * PAGE));
    let interrupts = driver.interrupts();
    driver.update(&Config { size: ByteSize(16 << 20), ..config.clone() }).expect("it fits");
    assert_eq!(config_u32(&driver, 0), 4096);
    assert!(driver.interrupts() > interrupts, "the driver is told");
    for size in [256 << 20, 4097, u64::MAX] {
        let config = Config { size: ByteSize(size), ..config.clone() };
        let error = driver.update(&config).expect_err("too much").to_string();
        assert!(error.contains("multiples of 4K below the guest's 256M"), "{error}");
        assert!(config.open(&MachineShape::default()).is_err());
    }
    assert_eq!(config_u32(&driver, 0), 4096);
}

#[test]
fn statistics_are_kept_by_name_and_asked_for_when_the_timer_says_so() {
    let config = Config { stats: 3600, ..Config::default() };
    let mut driver = driver(&config);
    let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let text = [entry(4, 1234), entry(0xfff0, 1), entry(5, 5678)].concat();
    driver.post(STATS, &[&text], &[]);
    driver.kick(STATS);
    assert_eq!((fact(&driver, "guest_free_bytes"), fact(&driver, "guest_total_bytes")), (1234, 5678));
    driver.host_events();
    assert_eq!(driver.used(STATS), [], "the device keeps the buffer");
    driver.update(&Config { stats: 1, ..config }).expect("it is live");
    let mut used = Vec::new();
    while used.is_empty() {
        std::thread::sleep(Duration::from_millis(20));
        driver.host_events();
        used = driver.used(STATS);
    }
    assert_eq!(used.len(), 1);
    // A half entry, and a second buffer before the first is back.
    driver.post(STATS, &[&entry(4, 99)[..9]], &[]);
    driver.post(STATS, &[&entry(4, 100)], &[]);
    driver.kick(STATS);
    assert_eq!((driver.used(STATS).len(), mistakes(&driver)), (1, 2));
    assert_eq!(fact(&driver, "guest_free_bytes"), 100);
}

#[test]
fn statistics_of_any_number_are_survived() {
    let mut driver = driver(&Config::default());
    let known = driver.counters.all().len() + stats::NAMES.len();
    for (entries, wrong) in [(0, false), (64, false), (65, true), (5000, true)] {
        let text: Vec<u8> =
            (0..entries).flat_map(|tag: u16| [tag.to_le_bytes().to_vec(), vec![7; 8]].concat()).collect();
        let before = mistakes(&driver);
        driver.start(F_STATS_VQ);
        driver.post(STATS, &[&text], &[]);
        driver.kick(STATS);
        assert_eq!(mistakes(&driver) > before, wrong, "{entries} entries");
        assert!(driver.counters.all().len() <= known, "only what has a name is kept");
    }
}

#[test]
fn shared_memory_goes_back_too_and_huge_pages_stay() {
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap};
    for (huge, want) in [(false, 2 * PAGE), (true, 0)] {
        let file = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
        rustix::fs::ftruncate(&file, 8 * PAGE).expect("memory");
        let mapping = MmapRegionBuilder::new_with_bitmap(8 * PAGE as usize, None)
            .with_mmap_prot((ProtFlags::READ | ProtFlags::WRITE).bits() as i32)
            .with_mmap_flags(MapFlags::SHARED.bits() as i32)
            .with_hugetlbfs(huge)
            .with_file_offset(FileOffset::new(file.into(), 0))
            .build()
            .expect("a mapping");
        let region = GuestRegionMmap::new(mapping, GuestAddress(0)).expect("no overflow");
        let mem = GuestMemory::from_regions(vec![region]).expect("one region");
        mem.write_slice(&[1; 8 * PAGE as usize], GuestAddress(0)).expect("memory");
        let done = reclaim::guest_range(&mem, PAGE, 2 * PAGE).expect("a memfd has holes");
        assert_eq!(done, Reclaimed { bytes: want, outside: 0 });
        let mut all = [0; 8 * PAGE as usize];
        mem.read_slice(&mut all, GuestAddress(0)).expect("memory");
        assert_eq!(all.iter().filter(|&&byte| byte == 0).count() as u64, want);
    }
}

#[test]
fn a_balloon_that_is_being_inflated_goes_on_elsewhere() {
    let config = Config { size: ByteSize(8 << 20), ..Config::default() };
    let mut driver = driver(&config);
    let [first, second] = [PAGES, PAGES + PAGE];
    [first, second].iter().for_each(|&page| fill(&driver, page));
    driver.write_config(4, &1u32.to_le_bytes());
    assert_eq!(driver.request(INFLATE, &[&pfns(&[first])], &[]).used, Some(0));
    // This one is on its way.
    driver.post(INFLATE, &[&pfns(&[second])], &[]);
    let saved = driver.save().expect("it is saved");
    let device = config.open(&MachineShape::default()).expect("a balloon");
    let mut again = driver.restored(device, &[], &saved).expect("it is restored");
    assert_eq!((again.used(INFLATE).len(), is_zero(&again, second)), (1, true));
    assert_eq!(
        (config_u32(&again, 0), config_u32(&again, 4)),
        (2048, 1),
        "the target, and how far it had come"
    );
    assert_eq!(fact(&again, "inflated_bytes"), 2 * PAGE);
    assert_eq!(again.request(DEFLATE, &[&pfns(&[first, second])], &[]).used, Some(0));
    assert_eq!((fact(&again, "deflated_bytes"), mistakes(&again)), (2 * PAGE, 0));
}
