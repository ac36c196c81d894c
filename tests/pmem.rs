//! virtio-pmem: a disk image that guests have in their address space. The ring-3 kernel makes no block device of it, so
//! a program of the guest looks at it through /dev/mem.

use anyhow::{Context, Result};
use harness::{Disk, Guest, Running};

const MIB: u64 = 1 << 20;
const PAGES: u64 = 64;

/// A guest that has the image in memory, runs `line` with its address in `$at`, and then waits for a line of input.
fn guest(image: &Disk, options: &str, line: &str) -> Result<Running<'static>> {
    let find = "at=$(cat /sys/bus/nd/devices/region0/resource)";
    let mut guest = Guest::new()
        .arg("--pmem")
        .arg(&format!("path={}{options}", image.path().display()))
        .shell(&format!("{find}; {line}; echo looked; read x"))
        .start()?;
    guest.expect("looked").context("look at the image")?;
    Ok(guest)
}

/// Resident and proportional bytes of the VMM's mapping of the image.
fn mapped(guest: &Running<'_>, image: &Disk) -> Result<(u64, u64)> {
    let path = image.path().display().to_string();
    let mappings = guest.smaps()?;
    let ours = || mappings.iter().filter(|mapping| mapping.name == path);
    Ok((ours().map(|mapping| mapping.rss).sum(), ours().map(|mapping| mapping.pss).sum()))
}

fn end(mut guest: Running<'_>) -> Result<()> {
    guest.send("\n")?;
    guest.wait()?.ok()?;
    Ok(())
}

#[test]
fn two_guests_on_one_image_have_one_copy_of_it() -> Result<()> {
    let image = Disk::ext4(16 * MIB)?;
    let touch = format!(
        "i=0; while [ $i -lt {PAGES} ]; do devmem $((at + i * 4096)) 8; i=$((i + 1)); done >/dev/null"
    );
    let [first, second] =
        [guest(&image, ",ro", &touch)?, guest(&image, ",ro", &format!("{touch}; devmem $((at + 1080)) 16"))?];
    let ((rss_1, pss_1), (rss_2, pss_2)) = (mapped(&first, &image)?, mapped(&second, &image)?);
    assert!(rss_1 >= PAGES * 4096 && rss_2 >= PAGES * 4096, "{rss_1} and {rss_2} bytes");
    // Pages that both have count half for each; some may be in one mapping only.
    assert!(pss_1 + pss_2 < (rss_1 + rss_2) * 3 / 4, "{pss_1} and {pss_2} of {rss_1} and {rss_2} bytes");
    end(first)?;
    end(second)
}

#[test]
fn a_guest_sees_the_image_and_writes_it_only_if_it_may() -> Result<()> {
    let image = Disk::ext4(16 * MIB)?;
    // The magic number of ext4, then a write to the boot sector, which ext4 leaves alone.
    let line = "devmem $((at + 1080)) 16; devmem $at 32 0x12345678";
    let before = std::fs::read(image.path())?;
    let mut read_only = guest(&image, ",ro", line)?;
    read_only.send("\n")?;
    read_only.wait()?.ok()?.expect_line("0xEF53")?;
    assert!(std::fs::read(image.path())? == before, "a read-only image changed");
    end(guest(&image, "", line)?)?;
    assert_eq!(std::fs::read(image.path())?[..4], 0x1234_5678u32.to_le_bytes());
    Ok(())
}
