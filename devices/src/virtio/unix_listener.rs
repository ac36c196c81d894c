//! A unix socket that is listened on, as a file which goes away with it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
};

use crate::model::OpenError;

/// Longest path of a unix socket in bytes: sun_path less its final zero.
const MAX_PATH: usize = 107;
/// Connections that wait to be taken.
const BACKLOG: i32 = 1024;
/// How often to try for the lock of a directory, a millisecond apart.
const LOCK_TRIES: usize = 500;
/// Who may connect: only the owner.
const MODE: u32 = 0o600;

/// A socket that programs on the host connect to.
#[derive(Debug)]
pub struct UnixListener {
    socket: OwnedFd,
    /// Its path, device and inode; `None`: it has a name in the abstract space.
    file: Option<(PathBuf, (u64, u64))>,
}

impl UnixListener {
    /// Listens at `path`, for its owner only, with `spare` bytes left of what a path may have. A socket that nobody
    /// listens on any more is replaced; everything else that is there stays, and is an error about `what`.
    pub fn bind(what: &'static str, path: &Path, spare: usize) -> Result<Self, OpenError> {
        let error = OpenError::file(what, path);
        let max = MAX_PATH - spare;
        let len = path.as_os_str().len();
        if len == 0 || len > max {
            let remedy = format!("use a path of 1 to {max} bytes");
            return Err(error(&format!("its path has {len} bytes"), &remedy));
        }
        let os = |errno: Errno| match errno {
            Errno::NOENT => error("no such directory", "make the directory first"),
            Errno::ACCESS | Errno::PERM | Errno::ROFS => {
                error("no permission to write to its directory", "choose a directory of yours")
            }
            errno => error(&errno.to_string(), "check the path"),
        };
        // Held while we look at what is there and replace it, so that two VMs do not take each other's away.
        let _lock = lock_directory(path).map_err(os)?;
        match look_at(path).map_err(os)? {
            Existing::Nothing => {}
            Existing::Stale => rustix::fs::unlink(path).map_err(os)?,
            Existing::Live => {
                let remedy = "stop the program that listens on it, or choose another path";
                return Err(error("it is in use", remedy));
            }
            Existing::Other => {
                return Err(error("it exists and is no socket", "remove it, or choose another path"));
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
        let listener = Self { socket, file: Some((path.into(), (stat.st_dev, stat.st_ino))) };
        listen(&listener.socket, BACKLOG)?;
        Ok(listener)
    }

    /// A listener without a file.
    #[cfg(any(test, feature = "specimen"))]
    pub fn abstract_name() -> Self {
        let socket = new_socket().expect("socket");
        // An address without a name lets the kernel choose one.
        bind(&socket, &SocketAddrUnix::new_unnamed()).expect("bind");
        listen(&socket, BACKLOG).expect("listen");
        Self { socket, file: None }
    }

    /// Takes a connection, which does not wait.
    pub fn accept(&self) -> rustix::io::Result<OwnedFd> {
        accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
    }

    /// The path of its file.
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|(path, _)| path.as_path())
    }
}

impl AsFd for UnixListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for UnixListener {
    fn drop(&mut self) {
        // Not if somebody has put another one there.
        if let Some((path, identity)) = &self.file
            && rustix::fs::lstat(path).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == *identity)
        {
            _ = rustix::fs::unlink(path);
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
