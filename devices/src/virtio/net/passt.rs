//! passt, which gives a guest the network that an ordinary program of the host has: it takes frames from a stream
//! socket and makes sockets of the host from what is in them. It needs no privileges, and neither do we.
//!
//! It is a child process that ends with its socket, however we end.
#![allow(unsafe_code, reason = "what a child inherits is settled between fork and exec")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::config::Config;
use super::mac::MacAddr;
use super::publish::{Protocol, Publish};
use crate::model::{DeviceKind, OpenError};

/// Where it is looked for: never in PATH, which may name anything.
const PLACES: [&str; 2] = ["/usr/bin/passt", "/usr/local/bin/passt"];

/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// Of the network that the guest sees.
pub const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// Where the guest sends what is for others.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Where the guest asks for names; the host's own name server answers.
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xa, 2, 0, 0, 0, 0, 0x15);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xa, 2, 0, 0, 0, 0, 2);

/// How long it may take to start. Only there to end a hang.
const START: Duration = Duration::from_secs(20);

/// The process; ended when this is dropped.
#[derive(Debug)]
pub struct Passt {
    child: Child,
    /// What it complains about. It never waits for us to read it.
    complaints: File,
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It ends by itself, now that its socket is closed; this is only to be sure, and to leave no zombie.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// Where passt is.
pub fn find() -> Option<&'static str> {
    PLACES.into_iter().find(|place| Path::new(place).exists())
}

/// Starts it for a guest with the address `mac`. It listens on the published ports when this returns.
pub fn start(mac: MacAddr, publish: &[Publish]) -> Result<(OwnedFd, Passt), OpenError> {
    let program = find().ok_or_else(|| {
        let [one, other] = PLACES;
        Config::refused(format!(
            "user needs passt, which is neither at {one} nor at {other}; install the package passt"
        ))
    })?;
    for port in publish {
        port.try_bind().map_err(|cause| {
            let why = match cause.kind() {
                io::ErrorKind::AddrInUse => "another program listens there; publish another port".into(),
                io::ErrorKind::PermissionDenied => {
                    "not permitted; use a port from 1024 on, or set sysctl net.ipv4.ip_unprivileged_port_start".into()
                }
                io::ErrorKind::AddrNotAvailable => "this host does not have the address".into(),
                _ => cause.to_string(),
            };
            Config::refused(format!("publish={port}: {why}"))
        })?;
    }
    match run(program, mac, publish, &[]) {
        // A host without any network has published ports and itself, at least.
        Err(Failure(words)) if words.contains("interface not usable") => {
            run(program, mac, publish, &["-i", "lo"])
        }
        result => result,
    }
    .map_err(|Failure(words)| Config::refused(format!("passt did not start: {words}")))
}

/// What it said before it ended.
struct Failure(String);

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

fn arguments(publish: &[Publish]) -> Vec<String> {
    let mut arguments: Vec<String> =
        ["-f", "-q", "--no-map-gw", "-n", "24", "-M", "02:00:0a:00:02:02"].map(Into::into).into();
    for (option, address) in [
        ("-a", IpAddr::V4(GUEST)),
        ("-g", IpAddr::V4(GATEWAY)),
        ("--dns-forward", IpAddr::V4(DNS)),
        ("-a", IpAddr::V6(GUEST6)),
        ("-g", IpAddr::V6(GATEWAY6)),
    ] {
        arguments.extend([option.into(), address.to_string()]);
    }
    for (option, protocol) in [("-t", Protocol::Tcp), ("-u", Protocol::Udp)] {
        let mut ports = publish.iter().filter(|publish| publish.protocol == protocol).peekable();
        if ports.peek().is_none() {
            arguments.extend([option.into(), "none".into()]);
        }
        for Publish { address, port, guest_port, .. } in ports {
            let address = address.map(|address| format!("{address}/")).unwrap_or_default();
            arguments.extend([option.into(), format!("{address}{port}:{guest_port}")]);
        }
    }
    arguments
}

fn run(program: &str, mac: MacAddr, publish: &[Publish], more: &[&str]) -> Result<(OwnedFd, Passt), Failure> {
    let (ours, theirs) = UnixStream::pair()?;
    let (complaints, stderr) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(io::Error::from)?;
    for end in [&complaints, &stderr] {
        rustix::fs::fcntl_setfl(end, OFlags::NONBLOCK).map_err(io::Error::from)?;
    }
    let fd = theirs.as_raw_fd();
    let mut command = Command::new(program);
    command.args(arguments(publish)).args(more).arg("--fd").arg(fd.to_string());
    command.env_clear().current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    // SAFETY: the closure makes system calls and nothing else, which is allowed after a fork.
    unsafe {
        command.pre_exec(move || {
            // Of all that is open here, and of what we inherited ourselves, it gets this socket.
            let last = libc::c_uint::MAX;
            let closed = libc::syscall(libc::SYS_close_range, 3, last, libc::CLOSE_RANGE_CLOEXEC);
            if closed < 0 || libc::fcntl(fd, libc::F_SETFD, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let child = command.spawn()?;
    // The command holds the other end of the pipe.
    drop((command, theirs));
    let passt = Passt { child, complaints: File::from(complaints) };
    match greet(&ours, mac) {
        Ok(()) => {
            ours.set_nonblocking(true)?;
            ours.set_read_timeout(None)?;
            Ok((ours.into(), passt))
        }
        Err(cause) => {
            drop(ours);
            let mut passt = passt;
            let mut words = String::new();
            use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
            if matches!(cause.kind(), BrokenPipe | ConnectionReset | UnexpectedEof) {
                // It is about to end, if it has not already, and has said why.
                _ = passt.child.wait();
            }
            _ = (&passt.complaints).take(4096).read_to_string(&mut words);
            let words: Vec<_> = words
                .lines()
                .map(str::trim)
                .filter(|line| {
                    !line.is_empty() && !line.contains("to syslog") && !line.contains("run as root")
                })
                .collect();
            Err(if words.is_empty() { cause.into() } else { Failure(words.join("; ")) })
        }
    }
}

/// Asks who the gateway is, by IPv4 and IPv6, and waits for one of the answers: then passt has started, and knows the
/// guest's address.
fn greet(socket: &UnixStream, mac: MacAddr) -> io::Result<()> {
    for frame in [arp_request(mac), neighbour_solicitation(mac)] {
        let message = [&(frame.len() as u32).to_be_bytes()[..], &frame].concat();
        (&*socket).write_all(&message)?;
    }
    let deadline = Instant::now() + START;
    let read = |bytes: &mut [u8]| {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        socket.set_read_timeout(Some(left))?;
        (&*socket).read_exact(bytes)
    };
    let mut length = [0; 4];
    read(&mut length)?;
    let len = u32::from_be_bytes(length) as usize;
    if len > super::MAX_FRAME {
        return Err(io::ErrorKind::InvalidData.into());
    }
    read(&mut vec![0; len])
}

/// An ARP request (RFC 826) of the guest's for the gateway.
fn arp_request(mac: MacAddr) -> Vec<u8> {
    let mac = mac.bytes();
    let (guest, gateway) = (GUEST.octets(), GATEWAY.octets());
    let ethernet = [&[0xff; 6][..], &mac, &[0x08, 0x06]];
    let arp = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &mac, &guest, &[0; 6], &gateway];
    [ethernet.concat(), arp.concat()].concat()
}

/// A neighbour solicitation (RFC 4861 §4.3) of the guest's for the gateway.
fn neighbour_solicitation(mac: MacAddr) -> Vec<u8> {
    let (guest, gateway) = (GUEST6.octets(), GATEWAY6.octets());
    let ethernet = [&[0x33, 0x33, 0xff, 0, 0, 2][..], &mac.bytes(), &[0x86, 0xdd]];
    let icmp = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &gateway].concat();
    // RFC 8200 §8.1: of addresses, length, next header and message.
    let sum = [&guest[..], &gateway, &[0, icmp.len() as u8, 0, 58], &icmp].concat();
    let sum: u32 = sum.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    let ip = [&[0x60, 0, 0, 0, 0, icmp.len() as u8, 58, 255][..], &guest, &gateway].concat();
    [&ethernet.concat(), &ip, &icmp[..2], &checksum.to_be_bytes(), &icmp[4..]].concat()
}
