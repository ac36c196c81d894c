//! Guest memory on the host: which pages it is made of, and when it is there.

use anyhow::{Result, ensure};
use harness::smaps::{self, Mapping};
use harness::{Guest, Needs, Place};

const MIB: u64 = 1 << 20;
const RAM: u64 = 64 * MIB;
/// Only ends a hang.
const DEADLINE: std::time::Duration = std::time::Duration::from_secs(60);

/// Boots a guest of 64 MiB with these options and looks at the VMM's mappings of its memory.
fn memory_of(options: &[&str]) -> Result<Vec<Mapping>> {
    let guest = Guest::new().memory("64M").shell("echo up; read x");
    let mut guest = options.iter().fold(guest, |guest, option| guest.arg(option)).start()?;
    guest.expect("up")?;
    let mappings = smaps::ram(&guest.smaps()?, RAM)?.to_vec();
    guest.send("\n")?;
    guest.wait()?.ok()?;
    Ok(mappings)
}

fn rss(mappings: &[Mapping]) -> u64 {
    mappings.iter().map(|mapping| mapping.rss).sum()
}

#[test]
fn memory_is_taken_when_the_guest_touches_it_or_at_the_start() -> Result<()> {
    let lazily = rss(&memory_of(&[])?);
    assert!((MIB..RAM).contains(&lazily), "{lazily} bytes");
    assert!(rss(&memory_of(&["--mem-prealloc"])?) >= RAM);
    assert!(rss(&memory_of(&["--mem-prealloc", "--mem-shared"])?) >= RAM);
    Ok(())
}

#[test]
fn shared_memory_is_in_a_memfd() -> Result<()> {
    let is_shared = |mapping: &Mapping| mapping.has("sh") && mapping.name.contains("memfd:guest-memory");
    let shared = |mappings: &[Mapping]| -> u64 {
        mappings.iter().filter(|mapping| is_shared(mapping)).map(Mapping::size).sum()
    };
    assert_eq!(shared(&memory_of(&["--mem-shared"])?), RAM);
    assert_eq!(shared(&memory_of(&[])?), 0);
    Ok(())
}

#[test]
fn transparent_huge_pages_are_asked_for_in_all_of_memory() -> Result<()> {
    let advised = |mappings: &[Mapping]| -> u64 {
        mappings.iter().filter(|mapping| mapping.has("hg")).map(Mapping::size).sum()
    };
    assert!(advised(&memory_of(&["--hugepages=transparent"])?) >= RAM);
    assert!(advised(&memory_of(&[])?) < RAM);
    Ok(())
}

/// Pages that were added to the host's reserve, and are taken away again.
struct Reserve {
    place: Place,
    before: u64,
}

impl Reserve {
    const COUNT: &str = "/proc/sys/vm/nr_hugepages";

    /// Adds `pages` to the reserve at `place`; the second value says whether the host could.
    fn add(place: &Place, pages: u64) -> Result<(Self, bool)> {
        let count =
            || -> Result<u64> { Ok(place.shell(&format!("cat {}", Self::COUNT))?.ok()?.trim().parse()?) };
        let reserve = Self { place: place.clone(), before: count()? };
        place.shell(&format!("echo {} > {}", reserve.before + pages, Self::COUNT))?;
        let there = count()? >= reserve.before + pages;
        Ok((reserve, there))
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        _ = self.place.shell(&format!("echo {} > {}", self.before, Self::COUNT));
    }
}

#[test]
fn huge_pages_come_from_the_hosts_reserve_or_the_guest_does_not_start() -> Result<()> {
    let refused = |memory: &str| -> Result<()> {
        let run = Guest::new().memory(memory).arg("--hugepages").command("true").run()?;
        run.status(1)?;
        ensure!(run.stderr.lines().count() == 1, "one sentence: {}", run.stderr);
        ensure!(run.stderr.contains("run 'sysctl vm.nr_hugepages="), "{}", run.stderr);
        Ok(())
    };
    // No host has as many.
    refused("1T")?;
    let (_reserve, there) = Reserve::add(&Place::choose(Needs::AnyKvm)?, RAM / (2 * MIB))?;
    if !there {
        return refused("64M");
    }
    for options in [&["--hugepages"][..], &["--hugepages", "--mem-shared"]] {
        let mappings = memory_of(options)?;
        let huge: u64 = mappings.iter().filter(|m| m.page == 2 * MIB).map(Mapping::size).sum();
        assert_eq!(huge, RAM, "{options:?}: {mappings:?}");
    }
    Ok(())
}

/// Bytes resident in a guest's RAM.
fn resident(guest: &harness::Running<'_>, ram: u64) -> Result<u64> {
    Ok(rss(smaps::ram(&guest.smaps()?, ram)?))
}

/// Looks until less than `limit` bytes of the guest's RAM are resident.
fn falls_below(guest: &harness::Running<'_>, ram: u64, limit: u64) -> Result<()> {
    let began = std::time::Instant::now();
    loop {
        let resident = resident(guest, ram)?;
        if resident < limit {
            return Ok(());
        }
        ensure!(began.elapsed() < DEADLINE, "{resident} bytes are still resident, and not less than {limit}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Fills 200 MiB of memory, says so, and lets go of them after a key.
const FILL_AND_FREE: &str = "mkdir -p /tmp/m; mount -t tmpfs -o size=300m none /tmp/m; \
    dd if=/dev/zero bs=1M count=200 2>/dev/null | tr '\\0' x > /tmp/m/data; echo filled; read x; \
    rm /tmp/m/data; echo freed; read x";

#[test]
fn what_the_guest_frees_goes_back_to_the_host() -> Result<()> {
    for options in [&[][..], &["--mem-shared"]] {
        let guest = Guest::new().memory("512M").shell(FILL_AND_FREE);
        let mut guest = options.iter().fold(guest, |guest, option| guest.arg(option)).start()?;
        guest.expect("filled")?;
        let full = resident(&guest, 512 * MIB)?;
        assert!(full > 200 * MIB, "{full} bytes");
        guest.send("\n")?;
        guest.expect("freed")?;
        falls_below(&guest, 512 * MIB, full - 180 * MIB)?;
        guest.send("\n")?;
        guest.wait()?.ok()?;
    }
    Ok(())
}
