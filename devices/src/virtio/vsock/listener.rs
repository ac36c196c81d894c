//! The unix sockets on the host: the one that is listened on, and those of programs that guests call.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    recv, socket_with,
};

use crate::model::OpenError;

/// Longest path of a unix socket in bytes: sun_path less its final zero.
const MAX_PATH: usize = 107;
/// Longest end of a path that a guest's call adds: `_` and a port.
const MAX_SUFFIX: usize = 11;
/// Connections that wait to be taken.
const BACKLOG: i32 = 1024;
/// Longest line that opens a connection, with its end. `CONNECT 4294967295\r\n` has 20 bytes.
const MAX_LINE: usize = 32;
/// How often to try for the lock of a directory, a millisecond apart.
const LOCK_TRIES: usize = 500;
/// Who may connect: only the owner.
const MODE: u32 = 0o600;

/// The socket that programs on the host connect to. Its file goes away with it.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    place: Place,
}

/// Where a listener is.
#[derive(Debug)]
enum Place {
    /// A file: its path, device and inode.
    File { path: PathBuf, identity: (u64, u64) },
    /// A name in the abstract space. Whoever a guest calls, it gets itself.
    #[cfg(any(test, feature = "specimen"))]
    Loop(rustix::net::SocketAddrAny),
}

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

impl Listener {
    /// Listens at `path`, for its owner only. A socket that nobody listens on any more is replaced; everything
    /// else that is there stays, and is an error.
    pub fn bind(path: &Path) -> Result<Self, OpenError> {
        let error = |reason: String, remedy: &str| OpenError::File {
            what: "vsock socket",
            path: path.display().to_string(),
            reason,
            remedy: remedy.into(),
        };
        let max = MAX_PATH - MAX_SUFFIX;
        let len = path.as_os_str().len();
        if len == 0 || len > max {
            let remedy = format!("use a path of 1 to {max} bytes, so that there is room for _PORT");
            return Err(error(format!("its path has {len} bytes"), &remedy));
        }
        let os = |errno: Errno| match errno {
            Errno::NOENT => error("no such directory".into(), "make the directory first"),
            Errno::ACCESS | Errno::PERM | Errno::ROFS => {
                error("no permission to write to its directory".into(), "choose a directory of yours")
            }
            errno => error(errno.to_string(), "check the path"),
        };
        // Held while we look at what is there and replace it, so that two VMs do not take each other's away.
        let _lock = lock_directory(path).map_err(os)?;
        match look_at(path).map_err(os)? {
            Existing::Nothing => {}
            Existing::Stale => rustix::fs::unlink(path).map_err(os)?,
            Existing::Live => {
                let remedy = "stop the program that listens on it, or choose another path";
                return Err(error("it is in use".into(), remedy));
            }
            Existing::Other => {
                return Err(error("it exists and is no socket".into(), "remove it, or choose another path"));
            }
        }
        Self::listen_at(path).map_err(os)
    }

    fn listen_at(path: &Path) -> rustix::io::Result<Self> {
        let socket = new_socket()?;
        // The file gets the socket's mode: it is nobody else's at any moment.
        rustix::fs::fchmod(&socket, Mode::from_raw_mode(MODE))?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        let stat = rustix::fs::lstat(path)?;
        let place = Place::File { path: path.into(), identity: (stat.st_dev, stat.st_ino) };
        let listener = Self { socket, place };
        listen(&listener.socket, BACKLOG)?;
        Ok(listener)
    }

    /// A listener without a file, which is also everybody that a guest can call.
    #[cfg(any(test, feature = "specimen"))]
    pub fn specimen() -> Self {
        let socket = new_socket().expect("socket");
        // An address without a name lets the kernel choose one.
        bind(&socket, &SocketAddrUnix::new_unnamed()).expect("bind");
        listen(&socket, BACKLOG).expect("listen");
        let own = rustix::net::getsockname(&socket).expect("own address");
        Self { socket, place: Place::Loop(own) }
    }

    /// Takes a connection of a host program, which does not wait.
    pub fn accept(&self) -> rustix::io::Result<OwnedFd> {
        accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
    }

    /// Connects `socket` to the host program that listens for guests' calls to `port`. `WOULDBLOCK`: it has more
    /// calls waiting than it wants, so this is worth another try.
    pub fn call(&self, socket: BorrowedFd<'_>, port: u32) -> rustix::io::Result<()> {
        match &self.place {
            Place::File { path, .. } => {
                let mut name = path.clone().into_os_string();
                name.push(format!("_{port}"));
                connect(socket, &SocketAddrUnix::new(Path::new(&name))?)
            }
            #[cfg(any(test, feature = "specimen"))]
            Place::Loop(own) => connect(socket, own),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        match &self.place {
            // Not if somebody has put another one there.
            Place::File { path, identity } => {
                if rustix::fs::lstat(path).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == *identity) {
                    _ = rustix::fs::unlink(path);
                }
            }
            #[cfg(any(test, feature = "specimen"))]
            Place::Loop(_) => {}
        }
    }
}

/// A unix stream socket that does not wait.
pub fn new_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Locks the directory of `path` against others who do the same, until the file is closed.
fn lock_directory(path: &Path) -> rustix::io::Result<File> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let directory = rustix::fs::open(parent.unwrap_or(Path::new(".")), flags, Mode::empty())?;
    // Who holds it has it for some microseconds. Somebody who keeps it means no good, and does not stop us.
    for _ in 0..LOCK_TRIES {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(1)),
            other => return other.map(|()| directory.into()),
        }
    }
    Ok(directory.into())
}

/// What is at a path.
enum Existing {
    Nothing,
    /// A socket that nobody listens on.
    Stale,
    /// A socket with somebody behind it.
    Live,
    /// Something else, such as a symbolic link to anything.
    Other,
}

fn look_at(path: &Path) -> rustix::io::Result<Existing> {
    let metadata = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Existing::Nothing),
        other => other.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?,
    };
    if !metadata.file_type().is_socket() {
        return Ok(Existing::Other);
    }
    match connect(&new_socket()?, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => Ok(Existing::Stale),
        // Also one that refuses us for another reason: it is not ours to remove.
        _ => Ok(Existing::Live),
    }
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
