//! Host programs: those that call the guest, and what they say first, and those that the guest calls.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketAddrUnix, connect, recv};

use crate::model::OpenError;
use crate::virtio::unix_listener::UnixListener;

/// Longest end of a path that a guest's call adds: `_` and a port.
const MAX_SUFFIX: usize = 11;
/// Longest line that opens a connection, with its end. `CONNECT 4294967295\r\n` has 20 bytes.
const MAX_LINE: usize = 32;

/// What a host program's first line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// It wants to talk to this port of the guest.
    Connect(u32),
    /// The line has not ended yet.
    Incomplete,
    /// It is no such line, or there is nobody any more.
    Invalid,
}

/// Listens at `path`, with room for what a guest's call adds to it.
pub fn listen(path: &Path) -> Result<UnixListener, OpenError> {
    UnixListener::bind("vsock socket", path, MAX_SUFFIX)
}

/// Connects `socket` to the host program that listens for guests' calls to `port`. `AGAIN`: it has more calls waiting
/// than it wants, so this is worth another try.
///
/// A listener without a file, as tests have it, is also everybody that a guest can call.
pub fn call(listener: &UnixListener, socket: BorrowedFd<'_>, port: u32) -> rustix::io::Result<()> {
    let Some(path) = listener.path() else {
        return connect(socket, &rustix::net::getsockname(listener.as_fd())?);
    };
    let mut name = path.to_owned().into_os_string();
    name.push(format!("_{port}"));
    connect(socket, &SocketAddrUnix::new(Path::new(&name))?)
}

/// Reads the line that opens a connection off `socket`, and no byte of what follows it.
pub fn greeting(socket: BorrowedFd<'_>) -> Greeting {
    let mut line = [0; MAX_LINE];
    let seen = match recv(socket, &mut line, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, 0)) => return Greeting::Invalid,
        Ok((seen, _)) => seen,
        Err(Errno::AGAIN | Errno::INTR) => return Greeting::Incomplete,
        Err(_) => return Greeting::Invalid,
    };
    let Some(end) = line[..seen].iter().position(|&byte| byte == b'\n') else {
        return if seen == MAX_LINE { Greeting::Invalid } else { Greeting::Incomplete };
    };
    let Some(port) = parse(&line[..end]) else { return Greeting::Invalid };
    match recv(socket, &mut line[..=end], RecvFlags::DONTWAIT) {
        Ok((taken, _)) if taken == end + 1 => Greeting::Connect(port),
        _ => Greeting::Invalid,
    }
}

/// The port in `CONNECT port`.
fn parse(line: &[u8]) -> Option<u32> {
    let mut words = str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (verb, port) = (words.next()?, words.next()?);
    let is_number = port.bytes().all(|byte| byte.is_ascii_digit());
    (verb.eq_ignore_ascii_case("connect") && is_number && words.next().is_none())
        .then(|| port.parse().ok())
        .flatten()
}
