//! The network device between a driver and a socket that stands in for the tap.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use vm_memory::{Bytes, GuestAddress};

use super::header::NUM_BUFFERS;
use super::*;
use crate::model::{DeviceKind, MachineShape};
use crate::virtio::F_EVENT_IDX;
use crate::virtio::queue::{QueueConfig, QueueCore};
use crate::virtio::test_driver::{DATA, Desc, Driver, INDIRECT, Reply, Rings, WRITE, memory, rings};

/// receiveq1.
const RX: u16 = 0;
/// transmitq1.
const TX: u16 = 1;
const MRG: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A socket for a device, and the host's end of it.
fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (device, host) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("pair");
    for end in [&device, &host] {
        rustix::net::sockopt::set_socket_send_buffer_size(end, 1 << 20).expect("buffer");
    }
    (device, host)
}

/// A driver of a network device, and the host's end of its socket.
fn driver(features: u64) -> (Driver, OwnedFd) {
    let (device, host) = pair();
    let setup = Setup { mac: MacAddr::from_name("test"), mtu: None, mac_check: false, boot: None };
    let mut driver =
        Driver::new(Box::new(Net::new(vec![Link::Tap(tap::Tap::from_socket(device))], setup, None)));
    driver.start(features);
    (driver, host)
}

/// A datagram as a tap gives it: a header of zeros and a frame of `len` bytes that begin with `mark`.
fn datagram(mark: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    bytes.extend((0..len).map(|i| mark.wrapping_add((i % 253) as u8)));
    bytes
}

fn send(host: &OwnedFd, bytes: &[u8]) {
    assert_eq!(rustix::net::send(host, bytes, SendFlags::empty()), Ok(bytes.len()));
}

fn recv(host: &OwnedFd) -> Option<Vec<u8>> {
    let mut bytes = vec![0; MAX_FRAME + 100];
    let (len, _) = rustix::net::recv(host.as_fd(), &mut bytes, RecvFlags::empty()).ok()?;
    bytes.truncate(len);
    Some(bytes)
}

/// The same datagram with num_buffers set.
fn with_buffers(mut datagram: Vec<u8>, buffers: u16) -> Vec<u8> {
    datagram[NUM_BUFFERS..HEADER_BYTES].copy_from_slice(&buffers.to_le_bytes());
    datagram
}

fn counter(counter: &std::sync::atomic::AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[test]
fn the_configuration_has_address_and_link() {
    let (driver, _host) = driver(0);
    let mut bytes = [0; 8];
    driver.read_config(0, &mut bytes);
    assert_eq!(bytes[..6], MacAddr::from_name("test").bytes());
    assert_eq!(bytes[6..], [1, 0], "the link is up");
}

#[test]
fn frames_go_out_whole_behind_a_clean_header() {
    let (mut driver, host) = driver(0);
    for split in [0, 1, 11, 12, 13, 26, 100] {
        let mut sent = datagram(3, 1500);
        // The driver leaves things in the header that mean nothing.
        sent[0] = 0xfe;
        sent[2..HEADER_BYTES].fill(0x77);
        let reply = driver.request(TX, &[&sent[..split], &sent[split..]], &[]);
        assert_eq!(reply.used, Some(0));
        assert_eq!(recv(&host), Some(datagram(3, 1500)), "split at {split}");
    }
    let largest = datagram(1, MAX_FRAME);
    driver.request(TX, &[&largest], &[]);
    assert_eq!(recv(&host), Some(largest));
    assert_eq!(counter(&driver.counters.requests), 8);
    assert_eq!(counter(&driver.counters.bytes_from_guest), 7 * 1500 + MAX_FRAME as u64);
}

#[test]
fn what_is_no_frame_is_not_sent() {
    let (mut driver, host) = driver(0);
    let mut unfinished = datagram(0, 100);
    unfinished[0] = 1;
    let mut segments = datagram(0, 100);
    segments[1] = 1;
    let bad =
        [vec![], vec![0; 11], vec![0; 12], datagram(0, 13), datagram(0, MAX_FRAME + 1), unfinished, segments];
    for (i, bytes) in bad.iter().enumerate() {
        assert_eq!(driver.request(TX, &[bytes], &[]).used, Some(0), "case {i}");
        assert_eq!(recv(&host), None, "case {i}");
        assert_eq!(counter(&driver.counters.guest_mistakes), i as u64 + 1, "case {i}");
    }
    let Reply { used, data } = driver.request(TX, &[&datagram(0, 60)], &[64]);
    assert_eq!((used, data), (Some(0), vec![vec![0xa5; 64]]), "a writable buffer is not touched");
}

#[test]
fn a_frame_of_gigabytes_is_refused_without_reading_it() {
    let (mut driver, host) = driver(0);
    let table: Vec<u8> = (0..1000)
        .flat_map(|i| {
            Desc { addr: DATA + 0x8000, len: 0x8_0000, flags: u16::from(i < 999), next: i + 1 }.bytes()
        })
        .collect();
    driver.write(DATA, &table);
    driver.set_desc(TX, 0, Desc { addr: DATA, len: table.len() as u32, flags: INDIRECT, next: 0 });
    driver.offer(TX, 0);
    driver.kick(TX);
    assert_eq!(driver.used(TX), [(0, 0)]);
    assert_eq!((recv(&host), counter(&driver.counters.guest_mistakes)), (None, 1));
}

#[test]
fn a_frame_in_as_many_pieces_as_a_system_call_takes_is_not_cut_short() {
    let (mut driver, host) = driver(0);
    // The header shares its descriptor with the frame's first bytes, of which 14 are copied.
    for (descriptors, after, sent) in [(1024u16, 0, true), (1024, 1, false), (1025, 0, false)] {
        let len = |i: u16| if i == 0 { HEADER_BYTES as u32 + 14 + after } else { 1 };
        let next = |i: u16| u16::from(i + 1 < descriptors);
        let table: Vec<u8> = (0..descriptors)
            .flat_map(|i| Desc { addr: DATA + 0x8000, len: len(i), flags: next(i), next: i + 1 }.bytes())
            .collect();
        driver.write(DATA, &table);
        driver.set_desc(TX, 0, Desc { addr: DATA, len: table.len() as u32, flags: INDIRECT, next: 0 });
        driver.offer(TX, 0);
        driver.kick(TX);
        assert_eq!(driver.used(TX), [(0, 0)]);
        let frame = usize::from(descriptors) - 1 + HEADER_BYTES + 14 + after as usize;
        assert_eq!(recv(&host).map(|bytes| bytes.len()), sent.then_some(frame), "{descriptors} descriptors");
    }
    assert_eq!(counter(&driver.counters.guest_mistakes), 2);
}

#[test]
fn a_host_that_does_not_keep_up_costs_frames_and_nothing_else() {
    let (mut driver, host) = driver(0);
    let frame = datagram(9, 60_000);
    for _ in 0..100 {
        assert_eq!(driver.request(TX, &[&frame], &[]).used, Some(0));
    }
    let received = std::iter::from_fn(|| recv(&host)).count() as u64;
    assert!((1..100).contains(&received), "{received}");
    assert_eq!(counter(&driver.counters.requests), received);
    assert_eq!(counter(&driver.counters.dropped), 100 - received);
    assert_eq!(counter(&driver.counters.host_errors), 0);
}

#[test]
fn a_closed_host_is_an_error_of_the_host() {
    let (mut driver, host) = driver(0);
    drop(host);
    assert_eq!(driver.request(TX, &[&datagram(1, 60)], &[]).used, Some(0));
    driver.post(RX, &[], &[2048]);
    driver.kick(RX);
    driver.host_events();
    assert_eq!(driver.used(RX), []);
    assert_eq!(counter(&driver.counters.dropped), 1);
    assert!(counter(&driver.counters.host_errors) >= 2);
}

#[test]
fn a_frame_arrives_in_one_buffer_that_is_large_enough() {
    for features in [0, MRG] {
        let (mut driver, host) = driver(features);
        for parts in [&[1526][..], &[12, 1514], &[1, 11, 1, 1513], &[10, 4000]] {
            let sent = datagram(7, 1514);
            let (head, addresses) = driver.post(RX, &[], parts);
            send(&host, &sent);
            driver.host_events();
            assert_eq!(driver.used(RX), [(u32::from(head), sent.len() as u32)], "{parts:?}");
            let got: Vec<u8> =
                addresses.iter().zip(parts).flat_map(|(&at, &len)| driver.read(at, len)).collect();
            assert_eq!(got[..sent.len()], with_buffers(sent.clone(), 1), "{parts:?}");
            assert!(got[sent.len()..].iter().all(|&byte| byte == 0xa5), "{parts:?}: wrote past the frame");
        }
    }
}

#[test]
fn a_long_frame_is_spread_over_buffers_if_the_driver_agreed() {
    let (mut driver, host) = driver(MRG);
    // Twice: first unexpected, by way of the spill buffer; then expected, straight into the buffers.
    for round in 0..3 {
        let posted: Vec<_> = (0..50).map(|_| driver.post(RX, &[], &[1000, 536])).collect();
        let sent = datagram(round, 60_000);
        send(&host, &sent);
        driver.host_events();
        let used = driver.used(RX);
        assert_eq!(used.len(), 60_012_usize.div_ceil(1536), "round {round}");
        assert!(used.iter().zip(&posted).all(|(&(id, _), &(head, _))| id == u32::from(head)));
        assert!(used[..used.len() - 1].iter().all(|&(_, len)| len == 1536));
        let got: Vec<u8> = posted
            .iter()
            .flat_map(|(_, at)| [driver.read(at[0], 1000), driver.read(at[1], 536)].concat())
            .take(sent.len())
            .collect();
        assert!(got == with_buffers(sent, used.len() as u16), "round {round}");
        driver.start(MRG);
    }
}

#[test]
fn every_page_that_a_frame_fills_is_marked_dirty() {
    let (mut driver, host) = driver(MRG);
    let posted: Vec<u64> = (0..23).flat_map(|_| driver.post(RX, &[], &[4096]).1).collect();
    // The first frame comes by way of the spill buffer, the second does not.
    for used in [0..11, 11..22] {
        driver.clear_dirty();
        send(&host, &datagram(1, 10 * 4096 + 100));
        driver.host_events();
        assert_eq!(driver.used(RX).len(), 11);
        for (i, &page) in posted.iter().enumerate() {
            assert_eq!(driver.is_dirty(page), used.contains(&i), "buffer {i} of {used:?}");
        }
    }
}

#[test]
fn a_call_that_has_few_chains_left_does_not_begin_a_frame_it_cannot_end() {
    let mem = memory();
    let Rings { desc, driver, device } = rings(RX);
    let config = QueueConfig { max_size: 256, size: 256, ready: true, desc, driver, device };
    let mut core = QueueCore::new(RX, &config, false, 1, &mem).expect("a good configuration");
    let set_avail = |index: u16| mem.write_obj(index, GuestAddress(driver + 2)).expect("memory");
    for i in 0..256u64 {
        let buffer = Desc { addr: DATA + i * 1536, len: 1536, flags: WRITE, next: 0 };
        mem.write_slice(&buffer.bytes(), GuestAddress(desc + i * 16)).expect("memory");
        mem.write_obj(i as u16, GuestAddress(driver + 4 + i * 2)).expect("memory");
    }
    let (socket, host) = pair();
    let (mut link, counters) = (Link::Tap(tap::Tap::from_socket(socket)), Counters::default());
    let mut spill = vec![0; rx::MAX_DATAGRAM];
    let mut receiver = Receiver::new();
    receiver.activate(true, false);
    send(&host, &datagram(1, 60));
    send(&host, &datagram(2, 60_000));

    let mut queues = Queues::lend(std::slice::from_mut(&mut core), &mem);
    let mut queue = queues.get(0);
    set_avail(256);
    for _ in 0..240 {
        let head = queue.pop().expect("a buffer").head;
        queue.push(head, 0);
    }
    // The driver is as quick as the device, so that buffers are not what is short.
    set_avail(256 + 240);
    assert_eq!(receiver.receive(&mut link, &mut queue, &mut spill, &counters), Progress::More);
    assert_eq!((counter(&counters.requests), counter(&counters.dropped)), (1, 0));
    let mut queues = Queues::lend(std::slice::from_mut(&mut core), &mem);
    assert_eq!(receiver.receive(&mut link, &mut queues.get(0), &mut spill, &counters), Progress::Done);
    assert_eq!((counter(&counters.requests), counter(&counters.dropped)), (2, 0));
}

#[test]
fn the_next_long_frame_is_expected() {
    let (mut driver, host) = driver(MRG);
    for _ in 0..80 {
        driver.post(RX, &[], &[1536]);
    }
    let frames = [datagram(1, 30_000), datagram(2, 30_000), datagram(3, 60), datagram(4, 40_000)];
    frames.iter().for_each(|frame| send(&host, frame));
    driver.host_events();
    let used = driver.used(RX);
    let counts = frames.iter().map(|frame| frame.len().div_ceil(1536));
    assert_eq!(used.len(), counts.sum::<usize>());
    let bytes: u32 = used.iter().map(|&(_, len)| len).sum();
    assert_eq!(bytes as usize, frames.iter().map(Vec::len).sum::<usize>());
    // What was taken for longer frames than came is still there for the next.
    let free = 80 - used.len();
    for _ in 0..free {
        send(&host, &datagram(5, 100));
    }
    driver.host_events();
    assert_eq!(driver.used(RX).len(), free);
    assert_eq!(counter(&driver.counters.dropped), 0);
}

#[test]
fn a_frame_that_does_not_fit_is_dropped_and_the_next_is_not() {
    for (features, len) in [(0, 1525 - 12), (0, 60_000), (MRG, 60_000)] {
        let (mut driver, host) = driver(features);
        for _ in 0..2 {
            driver.post(RX, &[], &[1524]);
        }
        send(&host, &datagram(1, len));
        send(&host, &datagram(2, 60));
        driver.host_events();
        assert_eq!(driver.used(RX), [(0, 72)], "{len}");
        let dropped = u64::from(features == 0 || len > 2 * 1524);
        assert_eq!(counter(&driver.counters.dropped), dropped, "{len}");
    }
}

#[test]
fn frames_wait_for_buffers_and_come_with_the_next_kick() {
    for features in [0, MRG, F_EVENT_IDX, F_EVENT_IDX | MRG] {
        let (mut driver, host) = driver(features);
        for round in 0..5u32 {
            for i in 0..4 {
                send(&host, &datagram(i, 100));
            }
            driver.host_events();
            assert_eq!(driver.used(RX), [], "features {features:#x} round {round}");
            for posted in 1..=4 {
                // A driver with event index kicks only if it passes the position that it was told last.
                let event = avail_event(&driver);
                let position = round * 4 + posted;
                driver.post(RX, &[], &[256]);
                let kick = features & F_EVENT_IDX == 0 || u32::from(event) + 1 == position;
                assert!(kick, "no kick: told {event}, now at {position}");
                driver.kick(RX);
                assert_eq!(driver.used(RX).len(), 1, "features {features:#x} round {round}");
            }
        }
    }
}

fn avail_event(driver: &Driver) -> u16 {
    let at = rings(RX).device + 4 + 8 * 256;
    u16::from_le_bytes([driver.read(at, 1)[0], driver.read(at + 1, 1)[0]])
}

#[test]
fn a_driver_that_runs_out_of_buffers_during_an_event_is_told_to_kick() {
    let (mut driver, host) = driver(F_EVENT_IDX);
    for _ in 0..3 {
        driver.post(RX, &[], &[256]);
    }
    driver.kick(RX);
    for i in 0..5 {
        send(&host, &datagram(i, 100));
    }
    driver.host_events();
    assert_eq!(driver.used(RX).len(), 3);
    assert_eq!(avail_event(&driver), 3, "the next buffer kicks");
    driver.post(RX, &[], &[256]);
    driver.kick(RX);
    assert_eq!(driver.used(RX).len(), 1);
}

#[test]
fn frames_from_before_the_driver_was_ready_arrive() {
    let (mut driver, host) = driver(0);
    driver.set(0x70, 0);
    send(&host, &datagram(1, 100));
    driver.host_events();
    driver.start(0);
    driver.post(RX, &[], &[256]);
    driver.kick(RX);
    assert_eq!(driver.used(RX).len(), 1);
}

#[test]
fn buffers_without_room_for_a_header_come_back() {
    let (mut driver, host) = driver(MRG);
    for (readable, writable) in [(&[][..], &[12][..]), (&[], &[1]), (&[&[1, 2][..]], &[]), (&[&[1]], &[5])] {
        driver.post(RX, readable, writable);
    }
    driver.post(RX, &[], &[13]);
    driver.post(RX, &[], &[256]);
    send(&host, &datagram(1, 100));
    driver.host_events();
    let used = driver.used(RX);
    assert_eq!(used.iter().map(|&(_, len)| len).collect::<Vec<_>>(), [0, 0, 0, 0, 13, 99]);
    assert_eq!(counter(&driver.counters.guest_mistakes), 4);
}

#[test]
fn a_buffer_without_room_behind_others_comes_back_once() {
    let (mut driver, host) = driver(MRG);
    // After a long frame, several buffers are taken for the next.
    (0..2).for_each(|_| _ = driver.post(RX, &[], &[2000]));
    send(&host, &datagram(1, 3000));
    driver.host_events();
    assert_eq!(driver.used(RX).len(), 2);
    let heads = [500, 4, 600].map(|room| u32::from(driver.post(RX, &[], &[room]).0));
    driver.kick(RX);
    driver.host_events();
    for mark in 2..4 {
        send(&host, &datagram(mark, 100));
        driver.host_events();
    }
    let mut used: Vec<u32> = driver.used(RX).into_iter().map(|(head, _)| head).collect();
    used.sort_unstable();
    assert_eq!(used, heads, "each buffer is used once");
    assert_eq!(counter(&driver.counters.guest_mistakes), 1);
}

#[test]
fn a_head_that_is_made_available_twice_breaks_the_queue() {
    let (mut driver, host) = driver(MRG);
    driver.set_desc(RX, 0, Desc { addr: DATA, len: 100, flags: WRITE, next: 0 });
    driver.offer(RX, 0);
    driver.offer(RX, 0);
    send(&host, &datagram(1, 150));
    driver.host_events();
    assert_eq!(driver.status(), 15 | 64);
    assert_eq!(driver.used(RX), []);
}

#[test]
fn a_flood_of_frames_takes_several_turns_and_all_arrive() {
    let (mut driver, host) = driver(MRG);
    let mut arrived = 0;
    for _ in 0..8 {
        (0..256).for_each(|_| _ = driver.post(RX, &[], &[128]));
        let sent =
            std::iter::from_fn(|| rustix::net::send(&host, &datagram(1, 100), SendFlags::empty()).ok());
        let sent = sent.take(256).count();
        driver.host_events();
        let used = driver.used(RX);
        assert_eq!(used.len(), sent);
        arrived += used.len();
        driver.start(MRG);
    }
    assert_eq!(counter(&driver.counters.requests), arrived as u64);
}

#[test]
fn taps_that_cannot_be_opened_are_refused_in_one_sentence() {
    let refusal =
        |tap: &str| Config::on_tap(tap).open(&MachineShape::default()).err().expect("refused").to_string();
    assert_eq!(
        refusal("vmm-no-such-tap"),
        "cannot open tap 'vmm-no-such-tap': no such interface; make it with: ip tuntap add vmm-no-such-tap mode tap"
    );
    for name in ["", "a-name-of-sixteen", "a/b", "a\0b"] {
        assert!(refusal(name).ends_with("not the name of an interface; use at most 15 characters"), "{name}");
    }
    assert!(refusal("lo").starts_with("cannot open tap 'lo': "));
}

fn pairs(count: usize, setup: Setup) -> (Driver, Vec<OwnedFd>) {
    let (devices, hosts): (Vec<_>, Vec<_>) = (0..count).map(|_| pair()).unzip();
    let links = devices.into_iter().map(|fd| Link::Tap(tap::Tap::from_socket(fd))).collect();
    (Driver::new(Box::new(Net::new(links, setup, None))), hosts)
}

const SETUP: Setup = Setup { mac: MacAddr::LOCAL, mtu: None, mac_check: false, boot: None };

#[test]
fn every_pair_has_a_link_of_its_own() {
    let (mut driver, hosts) = pairs(3, SETUP);
    driver.start(driver.offered());
    assert_eq!(driver.queue_count(), 7);
    assert_eq!(driver.request(6, &[&[4, 0, 3, 0]], &[1]).data, [[0]], "three pairs");
    for (i, host) in (0u8..).zip(&hosts) {
        let queue = 2 * u16::from(i);
        driver.request(queue + 1, &[&datagram(i, 100)], &[]);
        assert_eq!(recv(host), Some(datagram(i, 100)));
        send(host, &datagram(0x80 + i, 200));
        driver.post(queue, &[], &[512]);
    }
    driver.host_events();
    for queue in [0, 2, 4] {
        assert_eq!(driver.used(queue).len(), 1, "queue {queue}");
    }
}

#[test]
fn a_driver_without_multi_queue_has_one_pair_and_the_control_queue_behind_it() {
    let (mut driver, hosts) = pairs(2, SETUP);
    driver.start(1 << VIRTIO_NET_F_CTRL_VQ);
    assert_eq!(driver.request(2, &[&[4, 0, 1, 0]], &[1]).data, [[1]], "not negotiated");
    send(&hosts[1], &datagram(1, 100));
    driver.post(3, &[], &[512]);
    driver.host_events();
    assert_eq!(driver.used(3), []);
}

#[test]
fn commands_that_make_no_sense_are_refused() {
    let (mut driver, _hosts) = pairs(2, SETUP);
    driver.start(driver.offered());
    let control = 4;
    let bad: &[&[u8]] = &[
        &[],
        &[4],
        &[4, 0],
        &[4, 0, 1],
        &[4, 0, 0, 0],
        &[4, 0, 3, 0],
        &[4, 0, 0xff, 0xff],
        &[4, 0, 1, 0x80],
        &[4, 0, 1, 0, 0],
        &[4, 1, 1, 0],
        &[0, 0, 1],
        &[1, 1, 2, 2, 2, 2, 2, 2],
        &[2, 0, 1, 0],
        &[5, 0, 0, 0],
        &[0xff; 4],
        &[0xff; 5000],
    ];
    for (i, command) in bad.iter().enumerate() {
        let reply = driver.request(control, &[command], &[1, 8]);
        assert_eq!(reply, Reply { used: Some(1), data: vec![vec![1], vec![0xa5; 8]] }, "{i}");
        assert_eq!(counter(&driver.counters.guest_mistakes), i as u64 + 1);
    }
    assert_eq!(driver.request(control, &[&[4, 0, 2, 0]], &[]).used, Some(0), "no room for an answer");
    for split in 0..4 {
        let command = [4, 0, 2, 0];
        let reply = driver.request(control, &[&command[..split], &command[split..]], &[1]);
        assert_eq!(reply, Reply { used: Some(1), data: vec![vec![0]] });
    }
    assert_eq!(driver.status(), 15);
}

#[test]
fn frames_from_foreign_addresses_are_dropped_if_asked_for() {
    for mac_check in [false, true] {
        let setup = Setup { mac_check, ..SETUP };
        let (mut driver, hosts) = pairs(1, setup);
        driver.start(0);
        let own = SETUP.mac.bytes();
        for at in (0..6).map(Some).chain([None]) {
            let mut sent = datagram(1, 100);
            sent[HEADER_BYTES + 6..][..6].copy_from_slice(&own);
            if let Some(at) = at {
                sent[HEADER_BYTES + 6 + at] ^= 1;
            }
            for split in [0, 12, 18, 20] {
                driver.request(TX, &[&sent[..split], &sent[split..]], &[]);
                let want = (!mac_check || at.is_none()).then(|| sent.clone());
                assert_eq!(recv(&hosts[0]), want, "byte {at:?}, check {mac_check}");
            }
        }
        assert_eq!(counter(&driver.counters.dropped), if mac_check { 24 } else { 0 });
    }
}

#[test]
fn the_configuration_has_mtu_and_pairs() {
    let (driver, _hosts) = pairs(2, Setup { mtu: Some(9000), ..SETUP });
    let mut bytes = [0; 4];
    driver.read_config(8, &mut bytes);
    assert_eq!(bytes, [2, 0, 0x28, 0x23]);
    let offered = driver.offered();
    for bit in [VIRTIO_NET_F_MTU, VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ] {
        assert_ne!(offered & 1 << bit, 0, "feature {bit}");
    }
}

#[test]
fn what_does_not_belong_together_is_refused_in_one_sentence() {
    let refusal = |text: &str| crate::params::from_str::<Config>(text, None).expect_err(text).to_string();
    let one = "give one of user, tap, tap=NAME and fd=NUMBER";
    for (text, want) in [
        ("", one),
        ("user,tap", one),
        ("user,fd=3", one),
        ("tap=a,fd=3", one),
        ("tap=a,publish=1:1", "publish works with user; leave it out, or forward the port on the host"),
        ("user,mtu=67", "mtu=67: give 68 to 65520"),
        ("user,queues=2", "user has one queue pair; leave queues out"),
        ("tap,queues=0", "0 queue pairs are not possible; give queues=1 to 16"),
        ("tap=a,queues=17", "17 queue pairs are not possible; give queues=1 to 16"),
        ("fd=3,queues=2", "queues=2: give 2 times fd=NUMBER"),
    ] {
        assert_eq!(refusal(text), want, "{text}");
    }
    for fd in ["-1", "1023", "2147483647"] {
        let config: Config = crate::params::from_str(&format!("fd={fd}"), None).expect(fd);
        let sentence = config.open(&MachineShape::default()).err().expect(fd).to_string();
        assert!(sentence.starts_with(&format!("net: fd={fd}: no open tap interface; ")), "{sentence}");
    }
}

#[test]
fn a_flag_and_json_say_the_same() {
    for (flag, json) in [
        ("user,publish=8080:80,publish=53:53/udp", r#"{"user":true,"publish":["8080:80","53:53/udp"]}"#),
        ("tap", r#"{"tap":true}"#),
        ("tap=tap0,mac_check,mtu=9000", r#"{"tap":"tap0","mac_check":true,"mtu":9000}"#),
        ("fd=5,fd=6,queues=2", r#"{"fd":[5,6],"queues":2}"#),
        ("user,rx_bandwidth=1M/1s", r#"{"user":true,"rx_bandwidth":"1M/1s"}"#),
    ] {
        let config: Config = crate::params::from_str(flag, None).expect(flag);
        assert_eq!(serde_json::to_string(&config).expect(flag), json);
        assert_eq!(serde_json::from_str::<Config>(json).expect(json), config);
    }
    assert!(serde_json::from_str::<Config>(r#"{"tap":false}"#).is_err());
}

#[test]
fn a_full_tap_and_frames_that_waited_for_buffers_are_left_behind() {
    for features in [0, MRG, F_EVENT_IDX | MRG] {
        let (mut driver, host) = driver(features);
        for mark in 0..4 {
            send(&host, &datagram(mark, 100));
        }
        driver.host_events();
        let frame = datagram(9, 60_000);
        while counter(&driver.counters.dropped) == 0 {
            driver.request(TX, &[&frame], &[]);
        }
        // One is made available, and the device does not know yet.
        driver.post(TX, &[&datagram(7, 60)], &[]);
        let saved = driver.save().expect("it is saved");
        let (device, host) = pair();
        let setup = Setup { mac: MacAddr::from_name("test"), mtu: None, mac_check: false, boot: None };
        let device = Net::new(vec![Link::Tap(tap::Tap::from_socket(device))], setup, None);
        let mut again = driver.restored(Box::new(device), &[], &saved).expect("it is restored");
        assert_eq!((again.used(TX).len(), again.used(RX).len()), (1, 0), "features {features:#x}");
        assert_eq!(recv(&host), Some(datagram(7, 60)));
        send(&host, &datagram(5, 100));
        let reply = again.request(RX, &[], &[256]);
        assert_eq!(reply.used, Some(HEADER_BYTES as u32 + 100), "features {features:#x}");
        assert_eq!(again.request(TX, &[&datagram(8, 60)], &[]).used, Some(0));
        assert_eq!(recv(&host), Some(datagram(8, 60)));
    }
}
