//! virtio-pmem: a disk image that guests have in their address space, which Linux mounts without a copy of its own (DAX).

use anyhow::Result;
use harness::{Disk, Guest, Live, Place, Running, demo_image};
use serde_json::json;

const MIB: u64 = 1 << 20;

/// Resident and proportional bytes of the VMM's mapping of the image.
fn mapped(guest: &Running<'_>, image: &Disk) -> Result<(u64, u64)> {
    let path = guest.place().provide(image.path())?;
    let mappings = guest.smaps()?;
    let ours = || mappings.iter().filter(|mapping| mapping.name == path);
    Ok((ours().map(|mapping| mapping.rss).sum(), ours().map(|mapping| mapping.pss).sum()))
}

fn hash(image: &Disk, place: &Place) -> Result<String> {
    place.shell(&format!("sha256sum {}", place.provide(image.path())?))?.ok()
}

/// Two guests have their root file system on one image, and each tries to write to it.
fn share<'a>(image: &'a Disk, guest: impl Fn() -> Guest<'a>) -> Result<()> {
    let line = "mount; dd if=/dev/pmem0 of=/dev/null bs=1M count=64 2>/dev/null; echo looked; read x; \
                mount -o remount,rw / && dd if=/dev/zero of=/new bs=4k count=1 conv=fsync || echo refused";
    let start = || guest().pmem(image, ",ro,root").append("rootflags=dax").shell(line).start();
    let [mut first, mut second] = [start()?, start()?];
    for guest in [&mut first, &mut second] {
        let mounts = guest.expect("looked")?;
        let root = mounts.lines().find(|line| line.contains(" on / type ext4")).unwrap_or_default();
        assert!(root.contains("(ro,") && root.contains("dax"), "{mounts}");
    }
    let before = hash(image, first.place())?;
    let ((rss_1, pss_1), (rss_2, pss_2)) = (mapped(&first, image)?, mapped(&second, image)?);
    assert!(rss_1 >= 64 * MIB && rss_2 >= 64 * MIB, "{rss_1} and {rss_2} bytes");
    // Pages that both have count half for each; some may be in one mapping only.
    assert!(pss_1 + pss_2 < (rss_1 + rss_2) * 3 / 4, "{pss_1} and {pss_2} of {rss_1} and {rss_2} bytes");
    for mut guest in [first, second] {
        let place = guest.place().clone();
        guest.send("\n")?;
        guest.wait()?.ok()?.expect_line("refused")?;
        assert_eq!(hash(image, &place)?, before);
    }
    Ok(())
}

/// A guest writes to its root file system, and another one has it.
fn keep<'a>(image: &'a Disk, guest: impl Fn() -> Guest<'a>) -> Result<()> {
    let line = "dd if=/dev/urandom of=/data bs=64k count=32 conv=fsync && echo durable; sha256sum < /data > /sum; sync";
    let run = guest().pmem(image, ",root").shell(line).run()?;
    run.ok()?.expect_line("durable")?;
    image.check_ext4()?;
    let sum = image.read_file("/sum")?;
    guest().pmem(image, ",root").shell("sha256sum < /data").run()?.ok()?.expect_line(sum.trim())?;
    Ok(())
}

#[test]
fn two_guests_have_their_root_on_one_image_and_one_copy_of_it_which_stays_as_it_is() -> Result<()> {
    let image = Disk::of_others(demo_image()?);
    for transport in ["mmio", "pci"] {
        share(&image, || Guest::new().transport(transport))?;
    }
    Ok(())
}

#[test]
fn what_a_guest_writes_to_its_root_is_in_the_image() -> Result<()> {
    keep(&Disk::copy_of(&demo_image()?)?, Guest::new)
}

#[test]
fn what_reaches_an_image_past_every_file_system_is_dropped_unless_the_guest_may_write() -> Result<()> {
    let image = Disk::ext4(16 * MIB)?;
    // The magic number of ext4, then a write to the boot sector, which ext4 leaves alone.
    let line =
        "at=$(cat /sys/bus/nd/devices/region0/resource); devmem $((at + 1080)) 16; devmem $at 32 0x12345678";
    let before = std::fs::read(image.path())?;
    let run = Guest::new().pmem(&image, ",ro").shell(line).run()?;
    run.ok()?.expect_line("0xEF53")?;
    assert!(std::fs::read(image.path())? == before, "a read-only image changed");
    Guest::new().pmem(&image, "").shell(line).run()?.ok()?;
    assert_eq!(std::fs::read(image.path())?[..4], 0x1234_5678u32.to_le_bytes());
    Ok(())
}

#[test]
fn the_host_is_asked_to_make_durable_what_a_guest_fsyncs_and_nothing_else() -> Result<()> {
    let live = Live::new()?;
    live.on_host("truncate -s 64M image && PATH=$PATH:/sbin:/usr/sbin mkfs.ext4 -q -b 4096 image")?;
    let device = json!({"kind": "pmem", "path": live.path("image")});
    let line = "mount -o dax /dev/pmem0 /mnt && dd if=/dev/zero of=/mnt/x bs=64k count=16 conv=fsync 2>/dev/null; echo up; read x; \
                cat /mnt/x > /dev/null; echo read; read x; \
                dd if=/dev/zero of=/mnt/x bs=64k count=1 conv=notrunc,fsync 2>/dev/null; echo synced; read x";
    let mut guest = live.device(device).start(line)?;
    guest.expect("up\r\n")?;
    let first = guest.counter("pmem0", "requests")?;
    guest.send("")?;
    guest.expect("read\r\n")?;
    assert_eq!(guest.counter("pmem0", "requests")?, first, "it reads memory");
    guest.send("")?;
    guest.expect("synced\r\n")?;
    let counters = guest.counters("pmem0")?;
    assert!(counters["requests"] > first, "{counters:?}");
    assert_eq!([counters["host_errors"], counters["guest_mistakes"]], [0; 2]);
    Ok(())
}

mod hardware {
    use harness::{Kernel, debian};

    use super::*;

    #[test]
    fn two_guests_share_their_root() -> Result<()> {
        share(&Disk::of_others(demo_image()?), || Guest::new().kernel(Kernel::Standard))
    }

    /// Debian's kernel has no DAX; the device is what it expects.
    #[test]
    fn debian_has_its_root_on_it() -> Result<()> {
        let initrd = debian::initrd()?;
        let image = Disk::copy_of(&demo_image()?)?;
        keep(&image, || Guest::new().kernel(Kernel::DebianCloud).initrd(&initrd))
    }
}
