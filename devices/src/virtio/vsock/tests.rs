use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use super::guest_model::{CID, Guest, Packet, ROOM, Stream, read_now};
use super::packet::{HEADER_BYTES, Header, NEITHER, NO_RECEIVE, NO_SEND, Op};
use super::table::MAX_CONNECTIONS;
use super::*;
use crate::model::MachineShape;
use crate::throttle::Limits;

const RST: (u16, u32) = (Op::Rst as u16, 0);

fn is_closed(host: &mut UnixStream) -> bool {
    host.set_nonblocking(true).expect("a socket");
    read_now(host).is_none()
}

fn text(packets: &[Packet]) -> Vec<u8> {
    packets.iter().flat_map(|(_, data)| data.clone()).collect()
}

#[test]
fn a_host_program_calls_the_guest() {
    let mut guest = Guest::new();
    let (mut stream, mut host) = guest.called(52);
    host.write_all(b"ping").unwrap();
    assert_eq!(guest.one().1, b"ping");
    stream.write(&mut guest, b"pong");
    assert_eq!(read_now(&mut host), Some(b"pong".to_vec()));
    drop(host);
    assert_eq!(guest.ops(), [(Op::Shutdown as u16, NEITHER)]);
    assert!(guest.send(stream.flags(Op::Rst, 0), &[]));
    assert_eq!(guest.ops(), []);
}

#[test]
fn the_guest_calls_a_host_program() {
    let mut guest = Guest::new();
    let listener = guest.listen(7000);
    let (mut stream, mut host) = guest.call(1025, 7000, &listener);
    stream.write(&mut guest, b"hello");
    assert_eq!(read_now(&mut host), Some(b"hello".to_vec()));
    host.write_all(b"world").unwrap();
    assert_eq!(guest.one().1, b"world");
    assert!(guest.send(stream.header(Op::Rst), &[]));
    assert!(is_closed(&mut host));
}

#[test]
fn a_call_that_nobody_takes_is_refused() {
    let mut guest = Guest::new();
    drop(guest.listen(8));
    std::fs::write(guest.path().with_file_name("v_9"), "").unwrap();
    for port in [7, 8, 9, u32::MAX] {
        assert!(guest.send(Stream::new(1025, port).header(Op::Request), &[]));
        let (header, _) = guest.one();
        assert_eq!((header.op, header.src_port, header.dst_port), (Op::Rst as u16, port, 1025));
    }
    let mut host = guest.connect("CONNECT 5\n");
    let (request, _) = guest.one();
    assert!(guest.send(Stream::new(5, request.src_port).header(Op::Rst), &[]));
    assert!(is_closed(&mut host));
}

#[test]
fn a_direction_that_has_ended_causes_no_more_events() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut events = None;
    let mut guest = Guest::with(|vsock| events = Some(vsock.poller.duplicate()));
    let (stream, host) = guest.called(52);
    assert!(guest.send(stream.flags(Op::Shutdown, NO_SEND), &[]));
    // The guest is told, and takes its time.
    drop(host);
    assert_eq!(guest.ops(), [(Op::Shutdown as u16, NEITHER)]);
    let events = events.expect("a device");
    let mut fds = [PollFd::new(&events, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&Timespec::default())), Ok(0), "the device would spin");
}

#[test]
fn a_first_line_that_is_none_ends_the_connection() {
    let mut guest = Guest::new();
    for line in
        ["\n", "CONNECT\n", "CONNECT x\n", "CONNECT +5\n", "CONNECT 4294967296\n", "CONNECT 1 2\n", "GET /\n"]
            .into_iter()
            .chain(["CONNECT 000000000000000000000000001\n", "CONNECT \u{fffd}\n"])
    {
        let mut host = guest.connect(line);
        assert_eq!(guest.ops(), [], "{line:?}");
        assert!(is_closed(&mut host), "{line:?}");
    }
    for line in ["connect 5\n", "CONNECT  5 \r\n", "CONNECT 0005\n"] {
        let host = guest.connect(line);
        assert_eq!(guest.one().0.dst_port, 5, "{line:?}");
        drop(host);
        assert_eq!(guest.ops(), [RST], "{line:?}: who hangs up early is taken back");
    }
}

#[test]
fn a_first_line_comes_in_pieces_and_what_follows_it_is_kept() {
    let mut guest = Guest::new();
    let mut host = guest.connect("");
    for piece in ["CON", "NECT 5", "2"] {
        assert_eq!(guest.ops(), []);
        host.write_all(piece.as_bytes()).unwrap();
    }
    host.write_all(b"\nearly").unwrap();
    let (request, _) = guest.one();
    let stream = Stream::new(52, request.src_port);
    assert!(guest.send(stream.header(Op::Response), &[]));
    assert_eq!(guest.one().1, b"early");
}

#[test]
fn host_programs_that_say_nothing_and_guests_that_answer_nothing_are_given_up() {
    let mut guest = Guest::with(|device| device.answer_time = Duration::from_millis(50));
    let mut mute = guest.connect("CONN");
    let mut host = guest.connect("CONNECT 6\n");
    assert_eq!(guest.wait().0.op, Op::Request as u16);
    let (reset, _) = guest.wait();
    assert_eq!((reset.op, reset.dst_port), (Op::Rst as u16, 6));
    assert!(is_closed(&mut host));
    assert!(is_closed(&mut mute));
}

#[test]
fn an_answered_call_lives_on_past_the_time_for_answers() {
    let mut guest = Guest::with(|device| device.answer_time = Duration::from_secs(1));
    let (mut stream, mut host) = guest.called(1);
    drop(guest.called(2));
    assert!(guest.send(Stream::new(2, stream.host + 1).header(Op::Rst), &[]));
    std::thread::sleep(Duration::from_millis(1100));
    guest.receive();
    stream.write(&mut guest, b"still here");
    assert_eq!(read_now(&mut host), Some(b"still here".to_vec()));
    let (mut stream, mut host) = guest.called(3);
    stream.write(&mut guest, b"new");
    assert_eq!(read_now(&mut host), Some(b"new".to_vec()));
}

#[test]
fn a_call_waits_while_the_host_program_is_busy() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    rustix::net::listen(&listener, 0).unwrap();
    let _first = guest.call_without_accept(1024, 1);
    assert!(guest.send(Stream::new(1025, 1).header(Op::Request), &[]));
    assert_eq!(guest.ops(), []);
    let _taken = listener.accept().unwrap();
    assert_eq!(guest.wait().0.op, Op::Response as u16);
}

#[test]
fn a_call_to_a_host_program_that_stays_busy_is_given_up() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    rustix::net::listen(&listener, 0).unwrap();
    let _first = guest.call_without_accept(1024, 1);
    assert!(guest.send(Stream::new(1025, 1).header(Op::Request), &[]));
    assert_eq!(guest.wait().0.op, Op::Rst as u16);
}

impl Guest {
    /// The guest calls somebody who has not taken the call yet.
    fn call_without_accept(&mut self, from: u32, port: u32) -> Stream {
        let stream = Stream::new(from, port);
        assert!(self.send(stream.header(Op::Request), &[]));
        assert_eq!(self.one().0.op, Op::Response as u16);
        stream
    }
}

#[test]
fn what_no_driver_may_send_is_counted_and_answered_with_a_reset() {
    let mut guest = Guest::new();
    let stranger = Stream::new(77, 88);
    let rw = stranger.header(Op::Rw);
    for (what, header, mistakes, answered) in [
        ("no connection", rw, 0, true),
        ("a reset of none", stranger.header(Op::Rst), 0, false),
        ("a response to nothing", stranger.header(Op::Response), 0, true),
        ("another host", Header { dst_cid: 1, ..rw }, 0, true),
        ("another guest", Header { src_cid: 4, ..rw }, 1, false),
        ("our own CID", Header { src_cid: 2, ..rw }, 1, false),
        ("high bits of a CID", Header { src_cid: CID | 1 << 32, ..rw }, 1, false),
        ("operation 0", Header { op: 0, ..rw }, 1, true),
        ("operation 8", Header { op: 8, ..rw }, 1, true),
        ("a packet of messages", Header { kind: 2, ..rw }, 1, true),
        ("a call for messages", Header { kind: 2, ..stranger.header(Op::Request) }, 1, true),
        ("more bytes than there are", Header { len: 1, ..rw }, 1, true),
        ("very many bytes", Header { len: u32::MAX, ..rw }, 1, true),
    ] {
        let before = guest.mistakes();
        assert!(guest.send(header, &[]), "{what}");
        assert_eq!(guest.mistakes() - before, mistakes, "{what}");
        let answers: Vec<Header> = guest.receive().into_iter().map(|(header, _)| header).collect();
        assert_eq!(answers.len(), usize::from(answered), "{what}");
        if let Some(answer) = answers.first() {
            let want = (Op::Rst as u16, header.kind, 88, 77);
            assert_eq!((answer.op, answer.kind, answer.src_port, answer.dst_port), want, "{what}");
        }
    }
    for len in [0, 1, 43] {
        let before = guest.mistakes();
        guest.send_raw(&vec![1; len], 100);
        assert_eq!(guest.mistakes() - before, 1, "{len} bytes");
        assert_eq!((guest.driver.used(TX), guest.ops()), (vec![(0, 0)], vec![]), "{len} bytes");
    }
    let _works = guest.called(1);
}

#[test]
fn a_connection_that_the_guest_breaks_ends_on_both_sides() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    type Break = (&'static str, fn(&Stream) -> Header);
    let broken: [Break; 6] = [
        ("called again", |stream| stream.header(Op::Request)),
        ("answered", |stream| stream.header(Op::Response)),
        ("unknown operation", |stream| Header { op: 99, ..stream.header(Op::Rw) }),
        ("another type", |stream| Header { kind: 2, ..stream.header(Op::Rw) }),
        ("longer than its buffers", |stream| Header { len: 5, ..stream.header(Op::Rw) }),
        ("longer than anything", |stream| Header { len: u32::MAX, ..stream.header(Op::Rw) }),
    ];
    for (what, header) in broken {
        let before = guest.mistakes();
        let (stream, mut host) = guest.call(1024, 1, &listener);
        assert!(guest.send(header(&stream), b"abcd"));
        assert_eq!(guest.ops(), [RST], "{what}");
        assert!(is_closed(&mut host), "{what}");
        assert_eq!(guest.mistakes() - before, 1, "{what}");
    }
    let (stream, mut host) = guest.called(9);
    assert!(guest.send(stream.flags(Op::Shutdown, NO_SEND), &[]));
    assert!(guest.send(Header { len: 1, ..stream.header(Op::Rw) }, b"x"));
    assert_eq!(guest.ops(), [RST], "bytes after their end");
    assert!(is_closed(&mut host));
}

#[test]
fn a_guest_that_sends_before_it_answers_is_reset() {
    let mut guest = Guest::new();
    for op in [Op::Rw, Op::Shutdown, Op::Request] {
        let mut host = guest.connect("CONNECT 5\n");
        let (request, _) = guest.one();
        assert!(guest.send(Stream::new(5, request.src_port).header(op), &[]));
        assert_eq!(guest.ops(), [RST], "{op:?}");
        assert!(is_closed(&mut host), "{op:?}");
    }
}

#[test]
fn only_the_length_in_the_header_counts() {
    let mut guest = Guest::new();
    let (stream, mut host) = guest.called(1);
    assert!(guest.send(Header { len: 2, ..stream.header(Op::Rw) }, b"abcd"));
    assert_eq!(read_now(&mut host), Some(b"ab".to_vec()));
    let bytes = [&Header { len: 3, ..stream.header(Op::Rw) }.to_bytes()[..], b"cde"].concat();
    guest.send_raw(&bytes, 1);
    assert_eq!(read_now(&mut host), Some(b"cde".to_vec()));
}

#[test]
fn a_host_that_does_not_read_costs_as_much_as_was_promised_and_loses_nothing() {
    let mut guest = Guest::new();
    let (mut stream, mut host) = guest.called(1);
    let mut sent: Vec<u8> = Vec::new();
    // The guest sends until it has no credit: the socket is full then, and so is what was promised.
    loop {
        for (header, _) in guest.receive() {
            stream.learn(&header);
        }
        let len = stream.credit().min(50_000);
        if len == 0 {
            break;
        }
        let data: Vec<u8> = (0..len).map(|i| (((sent.len() + i) * 31) >> 3) as u8).collect();
        sent.extend(&data);
        stream.write(&mut guest, &data);
    }
    assert!(sent.len() >= stream.buf_alloc as usize);
    let mut read = Vec::new();
    while read.len() < sent.len() {
        read.extend(read_now(&mut host).expect("it is open"));
        for (header, _) in guest.receive() {
            stream.learn(&header);
        }
    }
    assert!(read == sent);
    assert!(stream.credit() > stream.buf_alloc as usize / 2, "the guest learns of the room");
    assert!(guest.send(stream.header(Op::CreditRequest), &[]));
    let (answer, _) = guest.one();
    assert_eq!((answer.op, answer.fwd_cnt), (Op::CreditUpdate as u16, sent.len() as u32));
}

#[test]
fn more_than_was_promised_ends_the_connection() {
    let mut guest = Guest::new();
    let (mut stream, mut host) = guest.called(1);
    while stream.credit() > 0 {
        let data = vec![1; stream.credit().min(60_000)];
        stream.write(&mut guest, &data);
        guest.receive().iter().for_each(|(header, _)| stream.learn(header));
    }
    let before = guest.mistakes();
    // The device may have room again for up to half of it and not have said so yet.
    let data = vec![1; stream.buf_alloc as usize / 2 + 1];
    stream.write(&mut guest, &data);
    assert_eq!((guest.ops(), guest.mistakes() - before), (vec![RST], 1));
    while read_now(&mut host).is_some() {}
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut guest = Guest::new();
    let (mut stream, mut host) = guest.called(1);
    let data: Vec<u8> = (0..150_000u32).map(|i| (i % 251) as u8).collect();
    assert_eq!(host.write(&data).unwrap(), data.len());
    let packets = guest.receive();
    let mut got = text(&packets);
    assert_eq!(got.len(), ROOM as usize);
    assert_eq!(packets.last().unwrap().0.op, Op::CreditRequest as u16, "it asks once");
    // What cannot be true is not believed.
    for fwd_cnt in [1 << 31, u32::MAX, ROOM + 1, ROOM + 1000] {
        assert!(guest.send(Header { fwd_cnt, ..stream.header(Op::CreditUpdate) }, &[]));
        assert_eq!(guest.ops(), [], "{fwd_cnt:#x}");
    }
    // Less room than there was, and none at all.
    for buf_alloc in [0, ROOM / 2] {
        let header = Header { buf_alloc, fwd_cnt: 1000, ..stream.header(Op::CreditUpdate) };
        assert!(guest.send(header, &[]));
        assert_eq!(text(&guest.receive()).len(), 0);
    }
    while got.len() < data.len() {
        stream.taken = got.len() as u32;
        assert!(guest.send(stream.header(Op::CreditUpdate), &[]));
        let more = text(&guest.receive());
        assert!(!more.is_empty());
        got.extend(more);
    }
    assert!(got == data);
    // An old count that was overtaken changes nothing.
    stream.taken = got.len() as u32;
    assert!(guest.send(stream.header(Op::CreditUpdate), &[]));
    assert!(guest.send(Header { fwd_cnt: 0, ..stream.header(Op::CreditUpdate) }, &[]));
    assert_eq!(host.write(&data[..60_000]).unwrap(), 60_000);
    assert_eq!(text(&guest.receive()).len(), 60_000);
}

#[test]
fn each_side_ends_one_direction_and_the_other_goes_on() {
    let mut guest = Guest::new();
    let (mut stream, mut host) = guest.called(1);
    host.write_all(b"last").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let packets = guest.receive();
    assert_eq!(text(&packets), b"last");
    assert_eq!(packets.last().map(|(h, _)| (h.op, h.flags)), Some((Op::Shutdown as u16, NO_SEND)));
    stream.write(&mut guest, b"answer");
    assert!(guest.send(stream.flags(Op::Shutdown, NO_SEND), &[]));
    host.set_nonblocking(false).unwrap();
    let mut answer = String::new();
    host.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    assert!(guest.send(stream.flags(Op::Shutdown, NEITHER), &[]));
    assert_eq!(guest.ops(), [RST]);

    let (mut stream, mut host) = guest.called(2);
    assert!(guest.send(stream.flags(Op::Shutdown, NO_RECEIVE), &[]));
    assert!(host.write_all(b"nobody reads this").is_err());
    stream.write(&mut guest, b"still sent");
    assert_eq!(read_now(&mut host), Some(b"still sent".to_vec()));
    drop(host);
    assert_eq!(guest.ops(), [(Op::Shutdown as u16, NEITHER)]);

    let (mut stream, host) = guest.called(3);
    host.shutdown(Shutdown::Read).unwrap();
    stream.write(&mut guest, b"nobody reads this");
    assert_eq!(guest.ops(), [(Op::Shutdown as u16, NO_RECEIVE)]);
    stream.write(&mut guest, b"and it is no mistake");
    assert_eq!(guest.ops(), []);
}

#[test]
fn what_a_guest_sent_before_it_closed_arrives_and_its_port_is_free_at_once() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    let (mut stream, mut host) = guest.call(1024, 1, &listener);
    let mut sent = 0;
    while stream.credit() > 0 {
        let data = vec![b'a'; stream.credit().min(60_000)];
        sent += data.len();
        stream.write(&mut guest, &data);
        guest.receive().iter().for_each(|(header, _)| stream.learn(header));
    }
    assert!(guest.send(stream.flags(Op::Shutdown, NEITHER), &[]));
    assert_eq!(guest.ops(), [RST]);
    let (mut again, mut second) = guest.call(1024, 1, &listener);
    again.write(&mut guest, b"second");
    assert_eq!(read_now(&mut second), Some(b"second".to_vec()));
    let mut read = 0;
    while let Some(bytes) = read_now(&mut host) {
        read += bytes.len();
        guest.driver.host_events();
    }
    assert_eq!(read, sent);
}

#[test]
fn buffers_without_room_for_a_packet_come_back() {
    let mut guest = Guest::stingy(|_| ());
    for (readable, writable) in [(&[][..], &[HEADER_BYTES][..]), (&[], &[1]), (&[&[0][..]], &[4096])] {
        let before = guest.mistakes();
        let reply = guest.driver.request(RX, readable, writable);
        assert_eq!((reply.used, guest.mistakes() - before), (Some(0), 1));
    }
}

#[test]
fn a_guest_that_takes_no_packets_has_its_own_wait_and_loses_none() {
    let mut guest = Guest::stingy(|_| ());
    let mut waiting = 0;
    let mut sent = 0;
    while waiting == 0 {
        assert!(sent < 10_000, "resets pile up");
        waiting = usize::from(!guest.send(Stream::new(sent, 5).header(Op::Rw), &[]));
        sent += 1;
    }
    guest.generous = true;
    guest.give(usize::MAX);
    let resets = guest.receive();
    assert_eq!(resets.len() as u32, sent);
    assert!((0..sent).zip(resets).all(|(port, (header, _))| header.dst_port == port));
    assert_eq!(guest.driver.used(TX), [(0, 0)]);
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::stingy(|_| ());
    guest.give(16);
    let mut hosts: Vec<UnixStream> = (0..8).map(|port| guest.called(port).1).collect();
    for host in &mut hosts {
        host.write_all(&[7; 40_000]).unwrap();
    }
    guest.driver.host_events();
    guest.give(usize::MAX);
    let mut counts = [0; 8];
    for (header, _) in guest.receive().iter().take(64) {
        counts[header.dst_port as usize] += 1;
    }
    assert_eq!(counts, [8; 8]);
}

#[test]
fn thousands_of_connections_are_served_and_one_too_many_is_closed() {
    raise_file_limit();
    let mut guest = Guest::new();
    let mut connections = Vec::new();
    for i in 0..MAX_CONNECTIONS {
        connections.push(guest.called(i as u32));
    }
    assert!(is_closed(&mut { connect_and_look(&mut guest) }));
    for (i, (stream, host)) in connections.iter_mut().enumerate() {
        host.write_all(&i.to_le_bytes()).unwrap();
        stream.write(&mut guest, &i.to_be_bytes());
    }
    let mut came = vec![0; MAX_CONNECTIONS];
    for (header, data) in guest.receive() {
        assert_eq!(data, u64::from(header.dst_port).to_le_bytes());
        came[header.dst_port as usize] += 1;
    }
    assert!(came.iter().all(|&count| count == 1));
    for (i, (_, host)) in connections.iter_mut().enumerate() {
        assert_eq!(read_now(host), Some(i.to_be_bytes().to_vec()));
    }
    let (stream, _) = connections.swap_remove(5);
    assert!(guest.send(stream.header(Op::Rst), &[]));
    let _one_more = guest.called(5);
    // A reset of the device closes them all.
    guest.driver.set(0x70, 0);
    assert!(connections.iter_mut().all(|(_, host)| is_closed(host)));
}

fn connect_and_look(guest: &mut Guest) -> UnixStream {
    let host = guest.connect("CONNECT 5\n");
    assert_eq!(guest.ops(), []);
    host
}

/// A test needs descriptors for both ends of each connection.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).expect("up to the maximum");
}

#[test]
fn a_reset_forgets_everything_and_callers_from_before_the_driver_are_served() {
    let mut guest = Guest::new();
    let (_, mut host) = guest.called(1);
    guest.driver.set(0x70, 0);
    assert!(is_closed(&mut host));
    let _waiting = guest.connect("CONNECT 3\n");
    guest.driver.host_events();
    guest.driver.start(0);
    let mut fresh = guest.into_fresh();
    assert_eq!(fresh.one().0.dst_port, 3);
}

#[test]
fn a_machine_that_goes_on_elsewhere_tells_its_guest() {
    let dir = tempfile::tempdir().unwrap();
    let mut device = Vsock::new(listener::listen(&dir.path().join("v")).unwrap(), CID).unwrap();
    device.restore(&mut Queues::lend(&mut [], &crate::GuestMemory::new()), ciborium::Value::Null).unwrap();
    let mut driver = crate::virtio::test_driver::Driver::new(Box::new(device));
    driver.start(0);
    assert_eq!(driver.request(EVENT, &[], &[3]).used, Some(0), "too short");
    let reply = driver.request(EVENT, &[], &[4]);
    assert_eq!((reply.used, reply.data), (Some(4), vec![vec![0; 4]]));
    assert_eq!(driver.request(EVENT, &[], &[4]).used, None, "once");
}

#[test]
fn connections_that_are_half_closed_or_wait_for_room_end_with_a_restore_and_new_ones_work() {
    let mut guest = Guest::new();
    let (mut half, mut first) = guest.called(1);
    first.write_all(b"last").unwrap();
    first.shutdown(Shutdown::Write).unwrap();
    assert_eq!(text(&guest.receive()), b"last");
    half.write(&mut guest, b"half");
    let (mut full, second) = guest.called(2);
    while full.credit() > 0 {
        let len = full.credit().min(50_000);
        full.write(&mut guest, &vec![7; len]);
        guest.receive().iter().for_each(|(header, _)| full.learn(header));
    }
    // And one that the guest has not answered.
    let _third = guest.connect("CONNECT 3\n");
    guest.receive();

    let saved = guest.driver.save().unwrap();
    let elsewhere = guest.path().with_file_name("w");
    let device = Vsock::new(listener::listen(&elsewhere).unwrap(), CID).unwrap();
    guest.driver = guest.driver.restored(Box::new(device), &[], &saved).unwrap();
    let reply = guest.driver.request(EVENT, &[], &[4]);
    assert_eq!((reply.used, reply.data), (Some(4), vec![vec![0; 4]]), "the guest is told");
    // Its driver gives the buffer back once it has heard.
    guest.driver.post(EVENT, &[], &[4]);
    guest.driver.kick(EVENT);
    for mut host in [first, second] {
        let mut rest = Vec::new();
        host.set_nonblocking(false).unwrap();
        _ = host.read_to_end(&mut rest);
    }
    // What the guest still says of the old ones is answered as what it is.
    assert!(guest.send(Header { len: 1, ..half.header(Op::Rw) }, b"x"));
    assert_eq!(guest.ops(), [RST]);
    let mut caller = UnixStream::connect(elsewhere).unwrap();
    caller.write_all(b"CONNECT 4\n").unwrap();
    let (request, _) = guest.one();
    assert_eq!((request.op, request.dst_port), (Op::Request as u16, 4));
}

#[test]
fn callers_wait_until_the_guest_has_ended_the_connections_of_the_machine_that_was_saved() {
    let told = |answer_time: Duration| {
        let mut guest = Guest::with(|vsock| (vsock.tell_reset, vsock.answer_time) = (true, answer_time));
        // A driver has several; the device has but one thing to say.
        guest.driver.post(EVENT, &[], &[4]);
        guest.driver.post(EVENT, &[], &[4]);
        guest.driver.kick(EVENT);
        assert_eq!(guest.driver.used(EVENT).len(), 1);
        guest
    };
    let mut guest = told(ANSWER_TIME);
    let _caller = guest.connect("CONNECT 3\n");
    assert_eq!(guest.ops(), [], "it would be ended with the others");
    guest.driver.kick(EVENT);
    assert_eq!(guest.ops(), [], "nothing was given back");
    guest.driver.post(EVENT, &[], &[4]);
    guest.driver.kick(EVENT);
    assert_eq!(guest.one().0.dst_port, 3);
    guest.called(4);

    // A driver that keeps it has been told all the same.
    let mut guest = told(Duration::from_millis(50));
    let _caller = guest.connect("CONNECT 5\n");
    assert_eq!(guest.wait().0.op, Op::Request as u16);
    // One that has not been told yet, for want of a buffer, has none that it could confuse with those that come.
    let mut guest = Guest::with(|vsock| vsock.tell_reset = true);
    guest.called(6);
}

fn refusal(path: &Path) -> String {
    listener::listen(path).map(|_| ()).expect_err("it is refused").to_string()
}

#[test]
fn a_stale_socket_is_replaced_and_nothing_else_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    drop(StdListener::bind(&path).unwrap());
    let listener = listener::listen(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(refusal(&path).contains("in use"));
    drop(listener);
    assert!(!path.exists(), "it goes away with its listener");

    std::fs::write(&path, "precious").unwrap();
    assert!(refusal(&path).contains("no socket"));
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).unwrap();
    assert!(refusal(&link).contains("no socket"));
    std::fs::remove_file(&link).unwrap();
    drop(StdListener::bind(dir.path().join("other")).unwrap());
    std::os::unix::fs::symlink(dir.path().join("other"), &link).unwrap();
    assert!(refusal(&link).contains("no socket"));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");

    std::fs::remove_file(&path).unwrap();
    let listener = listener::listen(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "somebody else's").unwrap();
    let inode = std::fs::metadata(&path).unwrap().ino();
    drop(listener);
    assert_eq!(std::fs::metadata(&path).unwrap().ino(), inode);
}

#[test]
fn paths_and_cids_that_cannot_be_are_refused_in_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("x".repeat(90));
    assert!(refusal(&long).contains("use a path of"));
    assert!(refusal(Path::new("")).contains("use a path of"));
    assert!(refusal(&dir.path().join("no/v")).contains("make the directory"));
    for cid in [0, 1, 2, u32::MAX] {
        let config = Config { path: dir.path().join("v"), cid, bandwidth: None, ops: None };
        assert!(
            config.open(&MachineShape::default()).err().unwrap().to_string().contains("reserved"),
            "{cid}"
        );
    }
    let config: Config = crate::params::from_str("/run/x.sock,cid=7", Config::BARE_KEY).unwrap();
    assert_eq!((config.path.to_str(), config.cid), (Some("/run/x.sock"), 7));
    assert_eq!(config.limits(), [Limits::default()]);
}

#[test]
fn bytes_wait_for_their_limit_both_ways_and_none_is_lost() {
    let mut guest = Guest::limited(Limits { bandwidth: "2K/20ms".parse().ok(), ops: None });
    let (mut stream, mut host) = guest.called(1);
    let data: Vec<u8> = (0..5000).map(|i| (i % 251) as u8).collect();
    host.write_all(&data).unwrap();
    for part in data.chunks(1000) {
        let header = Header { len: part.len() as u32, ..stream.header(Op::Rw) };
        stream.sent += part.len() as u32;
        while !guest.send(header, part) {
            while guest.driver.wait_for_tokens() {}
            if guest.driver.used(TX) == [(0, 0)] {
                break;
            }
        }
    }
    let (mut to_guest, mut to_host) = (Vec::new(), Vec::new());
    while to_guest.len() < data.len() || to_host.len() < data.len() {
        to_guest.extend(text(&guest.receive()));
        to_host.extend(read_now(&mut host).unwrap());
        guest.driver.wait_for_tokens();
    }
    assert!(to_guest == data && to_host == data);
    assert!(guest.driver.counters.throttled.load(std::sync::atomic::Ordering::Relaxed) > 0);
}
