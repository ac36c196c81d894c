//! The network device between a driver and a stream socket with a peer that behaves, or does not.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};

use super::super::{HEADER_BYTES, MAX_FRAME, MacAddr, Net, Setup};
use super::*;
use crate::virtio::test_driver::Driver;

const RX: u16 = 0;
const TX: u16 = 1;

fn driver(features: u64) -> (Driver, OwnedFd) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (ours, peer) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("pair");
    let setup = Setup { mac: MacAddr::from_name("test"), mtu: None, mac_check: false, boot: None };
    let net = Net::new(vec![super::super::Link::Stream(Stream::new(ours))], setup, None);
    let mut driver = Driver::new(Box::new(net));
    driver.start(features);
    (driver, peer)
}

fn frame(mark: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| mark.wrapping_add((i % 251) as u8)).collect()
}

fn message(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes(), frame].concat()
}

fn send(peer: &OwnedFd, bytes: &[u8]) {
    assert_eq!(rustix::net::send(peer, bytes, SendFlags::empty()), Ok(bytes.len()));
}

/// All that the peer can read now.
fn recv(peer: &OwnedFd) -> Vec<u8> {
    let mut all = Vec::new();
    let mut bytes = vec![0; 1 << 16];
    while let Ok((n @ 1.., _)) = rustix::net::recv(peer, &mut bytes[..], RecvFlags::empty()) {
        all.extend_from_slice(&bytes[..n]);
    }
    all
}

fn request(driver: &mut Driver, frame: &[u8]) -> Option<u32> {
    driver.request(TX, &[&[0; HEADER_BYTES], frame], &[]).used
}

/// The frame in the only buffer that was used, without its header.
fn received(driver: &mut Driver, at: u64) -> Vec<u8> {
    let used = driver.used(RX);
    assert_eq!(used.len(), 1);
    driver.read(at, used[0].1 as usize)[HEADER_BYTES..].to_vec()
}

fn link_is_up(driver: &Driver) -> bool {
    let mut status = [0; 2];
    driver.read_config(6, &mut status);
    status == [1, 0]
}

#[test]
fn frames_of_all_lengths_go_out_behind_their_length() {
    let (mut driver, peer) = driver(0);
    for len in [14, 60, 1514, LONG - 1, LONG, 40_000, MAX_FRAME] {
        let sent = frame(3, len);
        assert_eq!(request(&mut driver, &sent), Some(0));
        assert!(recv(&peer) == message(&sent), "{len} bytes");
    }
}

#[test]
fn a_peer_that_does_not_read_makes_the_driver_wait_and_nothing_is_lost() {
    let (mut driver, peer) = driver(0);
    let frames: Vec<_> = (0..60u8).map(|i| frame(i, 500 + 700 * usize::from(i))).collect();
    let mut want: Vec<u8> = Vec::new();
    let mut got: Vec<u8> = Vec::new();
    let mut waited = 0;
    for sent in &frames {
        want.extend(message(sent));
        if request(&mut driver, sent).is_none() {
            waited += 1;
            // Then there is room, which the host says.
            while driver.used(TX).is_empty() {
                let some = recv(&peer);
                assert!(!some.is_empty(), "the device keeps what it could send");
                got.extend(some);
                driver.host_events();
            }
        }
    }
    for _ in 0..3 {
        got.extend(recv(&peer));
        driver.host_events();
    }
    assert!(waited > 0, "the socket took everything");
    assert!(got == want);
    assert_eq!(driver.counters.dropped.load(Ordering::Relaxed), 0);
}

#[test]
fn frames_that_come_in_pieces_arrive_whole() {
    let (mut driver, peer) = driver(1 << VIRTIO_NET_F_MRG_RXBUF);
    for piece in [1, 3, 5, 64, 1000] {
        let sent = frame(piece as u8, 700);
        let (_, at) = driver.post(RX, &[], &[2048]);
        for part in message(&sent).chunks(piece) {
            assert_eq!(driver.used(RX), []);
            send(&peer, part);
            driver.host_events();
        }
        assert!(received(&mut driver, at[0]) == sent, "pieces of {piece}");
    }
}

#[test]
fn frames_wait_for_buffers_in_their_order() {
    let (mut driver, peer) = driver(0);
    let frames: Vec<_> = (0..20).map(|i| frame(i, 1000)).collect();
    send(&peer, &frames.iter().flat_map(|frame| message(frame)).collect::<Vec<_>>());
    driver.host_events();
    for sent in &frames {
        let (_, at) = driver.post(RX, &[], &[2048]);
        driver.kick(RX);
        assert!(received(&mut driver, at[0]) == *sent);
    }
}

#[test]
fn a_long_frame_is_spread_over_buffers() {
    let (mut driver, peer) = driver(1 << VIRTIO_NET_F_MRG_RXBUF);
    let posted: Vec<_> = (0..40).map(|_| driver.post(RX, &[], &[2048]).1[0]).collect();
    let sent = frame(9, MAX_FRAME);
    send(&peer, &message(&sent));
    driver.host_events();
    let used = driver.used(RX);
    let parts = posted.iter().zip(&used).map(|(&at, &(_, len))| driver.read(at, len as usize));
    let got = parts.collect::<Vec<_>>().concat();
    assert_eq!(u16::from_le_bytes([got[10], got[11]]), used.len() as u16);
    assert!(got[HEADER_BYTES..] == sent);
}

#[test]
fn checksums_need_no_check_if_the_driver_agreed() {
    for (features, flags) in [(0, 0), (1 << VIRTIO_NET_F_GUEST_CSUM, 2)] {
        let (mut driver, peer) = driver(features);
        let (_, at) = driver.post(RX, &[], &[2048]);
        send(&peer, &message(&frame(1, 60)));
        driver.host_events();
        assert_eq!(driver.read(at[0], 1), [flags]);
    }
}

#[test]
fn a_frame_of_no_or_few_bytes_is_left_out() {
    let (mut driver, peer) = driver(0);
    let sent = frame(5, 60);
    let (_, at) = driver.post(RX, &[], &[2048]);
    send(&peer, &[message(&[]), message(&[]), message(&[1; 13]), message(&sent)].concat());
    driver.host_events();
    assert_eq!(received(&mut driver, at[0]), sent);
    assert!(link_is_up(&driver));
}

#[test]
fn a_length_that_no_frame_has_ends_the_connection() {
    for length in [MAX_FRAME as u32 + 1, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
        let (mut driver, peer) = driver(0);
        let (_, at) = driver.post(RX, &[], &[2048]);
        send(&peer, &message(&frame(1, 60)));
        send(&peer, &length.to_be_bytes());
        send(&peer, &[0; 5000]);
        driver.host_events();
        assert_eq!(received(&mut driver, at[0]), frame(1, 60));
        assert!(!link_is_up(&driver));
        driver.host_events();
        assert_eq!(request(&mut driver, &frame(1, 60)), Some(0), "frames are dropped");
        assert!(recv(&peer).is_empty());
        assert_eq!(driver.status(), 15);
    }
}

#[test]
fn a_peer_that_goes_away_takes_the_link_down_and_no_more() {
    let (mut driver, peer) = driver(0);
    send(&peer, &[0, 0]);
    drop(peer);
    assert_eq!(request(&mut driver, &frame(1, 60)), Some(0));
    driver.post(RX, &[], &[2048]);
    driver.host_events();
    assert_eq!(driver.used(RX), []);
    assert!(!link_is_up(&driver));
    driver.start(0);
    assert_eq!(request(&mut driver, &frame(1, 60_000)), Some(0));
    assert!(!link_is_up(&driver), "a reset brings no peer back");
}

#[test]
fn a_frame_that_was_half_sent_is_whole_or_not_there_for_the_next_peer() {
    let (mut driver, _peer) = driver(0);
    let mut frames = Vec::new();
    loop {
        frames.push(frame(frames.len() as u8, 40_000));
        if request(&mut driver, &frames[frames.len() - 1]).is_none() {
            break;
        }
    }
    // Behind it, one that nobody has looked at.
    frames.push(frame(99, 60));
    driver.post(TX, &[&[0; HEADER_BYTES], &frames[frames.len() - 1]], &[]);
    let saved = driver.save().expect("it is saved");
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (ours, peer) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("pair");
    let setup = Setup { mac: MacAddr::from_name("test"), mtu: None, mac_check: false, boot: None };
    let net = Net::new(vec![super::super::Link::Stream(Stream::new(ours))], setup, None);
    let mut again = driver.restored(Box::new(net), &[], &saved).expect("it is restored");
    assert_eq!(again.used(TX).len(), 2, "both are done with");
    frames.push(frame(50, 100));
    assert_eq!(request(&mut again, &frames[frames.len() - 1]), Some(0));
    let got = recv(&peer);
    let mut rest = &got[..];
    let mut seen = Vec::new();
    while let Some((len, behind)) = rest.split_first_chunk::<4>() {
        let (whole, behind) = behind.split_at(u32::from_be_bytes(*len) as usize);
        seen.push(frames.iter().position(|sent| sent == whole).expect("a frame that was sent"));
        rest = behind;
    }
    assert!(seen.ends_with(&[frames.len() - 2, frames.len() - 1]), "{seen:?} of {}", frames.len());
}
