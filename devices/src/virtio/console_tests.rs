use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use super::*;
use crate::virtio::test_driver::Driver;

fn start(device: Box<dyn VirtioDevice>) -> Driver {
    let mut driver = Driver::new(device);
    driver.start(0);
    driver
}

fn open(text: &str) -> Result<Box<dyn VirtioDevice>, String> {
    let config: Config =
        crate::params::from_str(text, Config::BARE_KEY).map_err(|error| error.to_string())?;
    config.open(&MachineShape::default()).map_err(|error| error.to_string())
}

fn dropped(driver: &Driver) -> u64 {
    driver.counters.dropped.load(Ordering::Relaxed)
}

/// A console on a socket, and the directory of the socket.
fn on_socket() -> (Driver, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let device = open(&format!("socket={}", dir.path().join("c").display())).unwrap();
    (start(device), dir)
}

fn connect(dir: &tempfile::TempDir) -> UnixStream {
    let stream = UnixStream::connect(dir.path().join("c")).unwrap();
    stream.set_nonblocking(true).unwrap();
    stream
}

/// What can be read now.
fn read_now(mut stream: impl Read) -> Vec<u8> {
    let (mut all, mut chunk) = (Vec::new(), [0; 65536]);
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return all,
            Ok(n) => all.extend(&chunk[..n]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return all,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_program_at_the_socket_types_and_reads() {
    let (mut driver, dir) = on_socket();
    let mut client = connect(&dir);
    driver.host_events();
    assert_eq!(driver.request(TX, &[b"lo", b"gin: "], &[]).used, Some(0));
    assert_eq!(read_now(&client), b"login: ");
    client.write_all(b"root\n").unwrap();
    driver.host_events();
    let reply = driver.request(RX, &[], &[2]);
    assert_eq!((reply.used, reply.data), (Some(2), vec![b"ro".to_vec()]));
    let reply = driver.request(RX, &[], &[1, 64]);
    assert_eq!((reply.used, &reply.data[1][..2]), (Some(3), &b"t\n"[..]));
    let (_, room) = driver.post(RX, &[], &[64]);
    driver.kick(RX);
    assert_eq!(driver.used(RX), []);
    client.write_all(b"later").unwrap();
    driver.host_events();
    assert_eq!(driver.used(RX).iter().map(|&(_, len)| len).collect::<Vec<_>>(), [5]);
    assert_eq!(driver.read(room[0], 5), b"later");
}

#[test]
fn programs_come_and_go_and_the_next_reads_what_nobody_read() {
    let (mut driver, dir) = on_socket();
    driver.request(TX, &[b"early "], &[]);
    let first = connect(&dir);
    let second = connect(&dir);
    driver.host_events();
    assert_eq!(read_now(&first), b"early ");
    driver.request(TX, &[b"for the first"], &[]);
    assert_eq!((read_now(&first), read_now(&second)), (b"for the first".to_vec(), vec![]));
    drop(first);
    driver.request(TX, &[b"between"], &[]);
    driver.host_events();
    assert_eq!(read_now(&second), b"between");
    assert_eq!(dropped(&driver), 0);
}

#[test]
fn who_types_no_more_may_still_read() {
    let (mut driver, dir) = on_socket();
    let mut client = connect(&dir);
    client.write_all(b"command\n").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    driver.host_events();
    assert_eq!(driver.request(RX, &[], &[64]).used, Some(8));
    driver.request(TX, &[b"answer"], &[]);
    driver.host_events();
    driver.request(TX, &[b"s"], &[]);
    assert_eq!(read_now(&client), b"answers");
}

#[test]
fn what_was_typed_before_hanging_up_is_read_to_its_end() {
    let (mut driver, dir) = on_socket();
    let mut client = connect(&dir);
    client.write_all(b"reboot\n").unwrap();
    drop(client);
    driver.host_events();
    driver.host_events();
    let reply = driver.request(RX, &[], &[64]);
    assert_eq!((reply.used, &reply.data[0][..7]), (Some(7), &b"reboot\n"[..]));
    driver.host_events();
    let mut next = connect(&dir);
    next.write_all(b"x").unwrap();
    driver.host_events();
    assert_eq!(driver.request(RX, &[], &[64]).used, Some(1));
}

#[test]
fn output_that_nobody_reads_waits_for_nobody_and_its_end_is_kept() {
    let (mut driver, dir) = on_socket();
    let all: Vec<u8> = (0..300_000u32).map(|i| (i / 251) as u8).collect();
    for part in all.chunks(1000) {
        assert_eq!(driver.request(TX, &[part], &[]).used, Some(0));
    }
    assert!(dropped(&driver) > 0);
    let client = connect(&dir);
    driver.host_events();
    let got = read_now(&client);
    assert_eq!(got.len(), KEPT);
    assert!(all.ends_with(&got));
    // Somebody who is there and does not read: what the socket takes, and the end.
    for part in all.chunks(1000).cycle().take(2000) {
        assert_eq!(driver.request(TX, &[part], &[]).used, Some(0));
    }
    let mut got = Vec::new();
    while got.last() != Some(&b'!') {
        driver.host_events();
        driver.request(TX, &[b"!"], &[]);
        got.extend(read_now(&client));
    }
    assert!(got.len() > KEPT && got.len() < 2_000_000, "{}", got.len());
    // One request that is longer than all that is kept.
    let before = dropped(&driver);
    drop(client);
    driver.host_events();
    driver.request(TX, &[&all], &[]);
    assert_eq!(dropped(&driver) - before, 1);
    let client = connect(&dir);
    driver.host_events();
    assert!(all.ends_with(&read_now(&client)));
}

#[test]
fn requests_that_make_no_sense_are_counted_and_returned() {
    let mut driver = start(Config::specimen());
    let mistakes = |driver: &Driver| driver.counters.guest_mistakes.load(Ordering::Relaxed);
    for (queue, readable, writable) in
        [(RX, &[&[1u8][..]][..], &[][..]), (RX, &[], &[0]), (RX, &[&[1]], &[64]), (TX, &[&[1]], &[64])]
    {
        let before = mistakes(&driver);
        assert_eq!(driver.request(queue, readable, writable).used, Some(0), "{queue} {readable:?}");
        assert_eq!(mistakes(&driver) - before, 1, "{queue} {readable:?}");
    }
}

#[test]
fn a_pseudo_terminal_passes_every_byte_and_echoes_none() {
    let client = open_pty().unwrap();
    let name = rustix::pty::ptsname(&client.fd, Vec::new()).unwrap();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
    let mut terminal = std::fs::File::from(rustix::fs::open(name.as_c_str(), flags, Mode::empty()).unwrap());
    let mut driver = start(Box::new(Console::new(Side::Stream(Stream::new(None, Some(client)).unwrap()))));
    driver.request(TX, &[b"a\r\n\x03\x04b"], &[]);
    assert_eq!(read_now(&terminal), b"a\r\n\x03\x04b");
    terminal.write_all(b"\x03typed\n").unwrap();
    driver.host_events();
    let reply = driver.request(RX, &[], &[64]);
    assert_eq!((reply.used, &reply.data[0][..7]), (Some(7), &b"\x03typed\n"[..]));
    // Nobody reads, and nobody waits for that.
    for _ in 0..200 {
        assert_eq!(driver.request(TX, &[&[b'x'; 4096]], &[]).used, Some(0));
    }
    assert!(dropped(&driver) > 0);
}

#[test]
fn a_file_takes_output_up_to_its_limit_and_is_emptied_by_a_guest_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    drop(open(&format!("file={}", path.display())).unwrap());
    assert!(!path.exists(), "a machine that is never started leaves none");
    std::fs::write(&path, "old").unwrap();
    drop(open(&format!("file={}", path.display())).unwrap());
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    let file = LogFile::open(&path, 8).unwrap();
    let mut driver = start(Box::new(Console::new(Side::File(file))));
    driver.request(TX, &[b"hello"], &[]);
    driver.start(0);
    driver.request(TX, &[b" world"], &[]);
    driver.request(TX, &[b"!"], &[]);
    assert_eq!(std::fs::read(&path).unwrap(), b"hello wo", "a second driver goes on where the first ended");
    assert_eq!(dropped(&driver), 2);
}

#[test]
fn consoles_that_cannot_be_are_refused_in_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    for text in ["pty,null", "null=off", "file=a,socket=b"] {
        assert!(open(text).err().unwrap().contains("exactly one"), "{text}");
    }
    assert!(open(&format!("file={}", path("no/log"))).err().unwrap().contains("make the directory"));
    assert!(open(&format!("file={}", path(""))).err().unwrap().contains("choose a file"));
    std::fs::write(path("file"), "").unwrap();
    assert!(open(&format!("socket={}", path("file"))).err().unwrap().contains("no socket"));
    assert!(open("null").is_ok());
}
