//! What is particular to a kind of device: a request that must work, and requests that no driver should make.

use anyhow::{Context, Result, ensure};

use crate::driver::{DATA_PAGES, Desc, Driver, WRITE};
use crate::memory::PAGE;

/// Name of a device ID; new kinds are attacked as well, without a request of their own.
pub fn name(id: u32) -> &'static str {
    match id {
        1 => "net",
        2 => "disk",
        3 => "console",
        4 => "rng",
        5 => "balloon",
        19 => "vsock",
        27 => "pmem",
        _ => "other",
    }
}

/// Does what the kind of device is there for, once. The device is started with no feature of its own.
pub fn honest(id: u32, driver: &mut Driver<'_>) -> Result<()> {
    match id {
        1 => {
            let frame = [&[0; 12][..], &[0xff; 6], &[2, 0, 0, 0, 0, 9], &[0x88, 0xb5], &[0; 46]].concat();
            driver.request(1, &frame, 0).context("a frame")?;
        }
        2 => {
            let (len, answer) = driver.request(0, &block(0, 0), 513).context("reading a sector")?;
            ensure!(len == 513 && answer[512] == 0, "read {len} bytes, status {}", answer[512]);
        }
        3 => drop(driver.request(1, b"hostile driver was here\n", 0).context("writing to the console")?),
        4 => {
            let (len, answer) = driver.request(0, &[], 64).context("random bytes")?;
            ensure!(len > 0 && answer[..len as usize].iter().any(|&byte| byte != 0xa5), "{len} bytes");
        }
        5 => {
            let frame = ((driver.data_at(2) / PAGE as u64) as u32).to_le_bytes();
            driver.request(0, &frame, 0).context("inflating")?;
            driver.request(1, &frame, 0).context("deflating")?;
        }
        19 => drop(driver.request(1, &packet(2, 1, 3), 0).context("a packet")?),
        27 => {
            let (len, answer) = driver.request(0, &[0; 4], 4).context("a flush")?;
            ensure!(len == 4 && answer[..4] == [0; 4], "flushed with {answer:?}");
        }
        _ => {}
    }
    Ok(())
}

/// Header of a disk's request.
fn block(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Header of a vsock packet to this CID.
fn packet(cid: u64, kind: u16, operation: u16) -> Vec<u8> {
    let mut header = [0; 44];
    header[..8].copy_from_slice(&3u64.to_le_bytes());
    header[8..16].copy_from_slice(&cid.to_le_bytes());
    header[16..20].copy_from_slice(&1024u32.to_le_bytes());
    header[20..24].copy_from_slice(&9u32.to_le_bytes());
    header[28..30].copy_from_slice(&kind.to_le_bytes());
    header[30..32].copy_from_slice(&operation.to_le_bytes());
    header.to_vec()
}

/// Fills pages with what no device of this kind takes for something of Linux's: a balloon would give the pages that it
/// finds numbers of back to the host, so it finds those of our own.
pub fn fill_harmlessly(id: u32, driver: &Driver<'_>) {
    let word = if id == 5 { (driver.data_at(2) / PAGE as u64) as u32 } else { 0 };
    let bytes = word.to_le_bytes().repeat(PAGE / 4);
    (2..DATA_PAGES).for_each(|nth| driver.pages.write(driver.data(nth), 0, &bytes));
}

/// Gives the device what it answers a request with: a socket device takes no packets while its answers have no room
/// (virtio 1.3 §5.10.6.1.1).
pub fn make_room(id: u32, driver: &mut Driver<'_>) {
    if id == 19 {
        while driver.used(0).is_some() {}
        let head = driver.avail(0) % driver.size(0);
        driver.describe(0, head, Desc { addr: driver.data_at(7), len: PAGE as u32, flags: WRITE, next: 0 });
        driver.offer(0, head);
        driver.regs.notify(0);
    }
}

/// Requests that are well-formed chains and nonsense: queue, readable bytes, room. What comes back is the device's
/// business, but something must come back.
pub fn garbage(id: u32, driver: &Driver<'_>) -> Vec<(u16, Vec<u8>, usize)> {
    let own = (driver.data_at(2) / PAGE as u64) as u32;
    match id {
        1 => frames().map(|frame| (1, frame, 0)).collect(),
        2 => disk().into_iter().map(|request| (0, request, 513)).collect(),
        3 => vec![(1, vec![0; PAGE], 0), (1, vec![], 1), (1, vec![0x1b], 16)],
        4 => vec![(0, vec![1; 64], 0), (0, vec![1; 64], PAGE), (0, vec![], 1)],
        5 => {
            // Frames of Linux would be lost: our own, those of no RAM, and what overflows.
            let mut lists = vec![
                vec![own; PAGE / 4],
                vec![u32::MAX, u32::MAX - 1, 1 << 31, 0xfee00, 0xd0000, 0xc0000, 1 << 20],
            ];
            lists.push(lists.concat().into_iter().take(PAGE / 4).rev().collect());
            let lists = lists.into_iter().map(|list| list.into_iter().flat_map(u32::to_le_bytes).collect());
            lists
                .chain([vec![0xff], vec![0xff; 3], vec![0xff; 7]])
                .flat_map(|list: Vec<u8>| [(0, list.clone(), 0), (1, list, 0)])
                .collect()
        }
        19 => packets().map(|packet| (1, packet, 0)).collect(),
        27 => [0u32, 1, 0xffff, u32::MAX]
            .into_iter()
            .flat_map(|kind| {
                [(0, kind.to_le_bytes().to_vec(), 4), (0, vec![kind as u8; 3], 3), (0, vec![], 4)]
            })
            .collect(),
        _ => vec![],
    }
}

/// Frames with offload headers that contradict them.
fn frames() -> impl Iterator<Item = Vec<u8>> {
    let header = |flags: u8, gso: u8, numbers: [u16; 4]| {
        let mut header = vec![flags, gso];
        numbers.iter().for_each(|number| header.extend(number.to_le_bytes()));
        header.extend([0xff, 0xff]);
        header
    };
    let headers = [
        header(1, 0, [0, 0, u16::MAX, u16::MAX]),
        header(1, 1, [u16::MAX, 0, 0, 0]),
        header(0xff, 0xff, [u16::MAX; 4]),
        header(1, 4, [1, 1, 1, u16::MAX]),
        header(0, 3, [0, 1448, 34, 16]),
        header(2, 0x81, [14, 1, 14, 2]),
    ];
    let headers_only = headers.clone().into_iter();
    let short = headers.clone().into_iter().map(|header| header[..5].to_vec());
    let sizes = [1, 13, 14, 60, 1514, PAGE - 12];
    let frames = headers.into_iter().flat_map(move |header| {
        sizes.into_iter().map(move |size| [header.clone(), vec![0x45; size]].concat())
    });
    headers_only.chain(short).chain(frames)
}

/// Unknown types, sectors past the end, and segments that overflow.
fn disk() -> Vec<Vec<u8>> {
    const KINDS: [u32; 12] = [0, 1, 2, 3, 4, 8, 9, 10, 11, 13, 14, u32::MAX];
    let sectors = [u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 40, i64::MAX as u64];
    let mut requests: Vec<Vec<u8>> =
        KINDS.into_iter().flat_map(|kind| sectors.map(|sector| block(kind, sector))).collect();
    let segment = |sector: u64, count: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let segments = [
        segment(0, u32::MAX, 0),
        segment(u64::MAX, u32::MAX, u32::MAX),
        segment(u64::MAX, 1, 1),
        segment(1 << 40, 0, 0),
        segment(0, 0, 1),
        segment(8, 8, 0xff).repeat(250),
        vec![0xff; 15],
        vec![0; 17],
    ];
    for kind in [1, 11, 13, 14] {
        requests.extend(segments.iter().map(|segment| [block(kind, 0), segment.clone()].concat()));
    }
    // What is no nonsense, but for a disk that is read-only.
    requests.push([block(1, 0), vec![0xee; 512]].concat());
    requests.extend([11, 13, 14].map(|kind| [block(kind, 0), segment(8, 8, 0)].concat()));
    // Shorter than a header.
    requests.extend([vec![], vec![0], vec![0; 15]]);
    requests
}

/// Unknown operations and types, lengths that lie, other people's addresses.
fn packets() -> impl Iterator<Item = Vec<u8>> {
    let operations = (0..10).chain([100, u16::MAX]);
    let kinds = [1, 2, 0, u16::MAX];
    let cids = [2, 0, 1, 3, u64::MAX, 1 << 32 | 2];
    let lens = [0, 1, PAGE as u32, u32::MAX];
    operations.flat_map(move |operation| {
        kinds.into_iter().flat_map(move |kind| {
            cids.into_iter().zip(lens.into_iter().cycle()).map(move |(cid, len)| {
                let mut packet = packet(cid, kind, operation);
                packet[24..28].copy_from_slice(&len.to_le_bytes());
                // Credit that overflows.
                packet[36..44].fill(0xff);
                if operation == 5 {
                    packet.extend([0x42; 100]);
                }
                packet
            })
        })
    })
}
