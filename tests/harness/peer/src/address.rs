//! Where a peer is, and how to get there.
#![allow(unsafe_code, reason = "rustix has no type for the address of a vsock")]

use std::fmt;
use std::io::{Read, Write};
use std::mem::size_of;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::socket_with;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
};

/// VMADDR_CID_ANY.
const ANY: u32 = u32::MAX;
const BACKLOG: i32 = 4096;

/// A connection, of whatever family: the standard library's type does for all streams.
pub type Stream = TcpStream;

/// Where a peer is.
#[derive(Clone, Debug)]
pub enum Address {
    /// `vsock:CID:PORT`, or `vsock:PORT` to listen.
    Vsock { cid: u32, port: u32 },
    /// `unix:PATH`.
    Unix(PathBuf),
    /// `guest:PATH:PORT`: a port of the guest whose device has its socket at this path.
    Guest { path: PathBuf, port: u32 },
}

impl FromStr for Address {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts: Vec<&str> = text.split(':').collect();
        Ok(match parts[..] {
            ["vsock", port] => Self::Vsock { cid: ANY, port: port.parse()? },
            ["vsock", cid, port] => Self::Vsock { cid: cid.parse()?, port: port.parse()? },
            ["unix", path] => Self::Unix(path.into()),
            ["guest", path, port] => Self::Guest { path: path.into(), port: port.parse()? },
            _ => bail!("'{text}' is none of vsock:PORT, vsock:CID:PORT, unix:PATH, guest:PATH:PORT"),
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock { cid, port } => write!(f, "vsock {cid}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Guest { path, port } => write!(f, "port {port} behind {}", path.display()),
        }
    }
}

impl Address {
    /// Listens there.
    pub fn listen(&self) -> Result<OwnedFd> {
        let bound = || -> Result<OwnedFd> {
            Ok(match self {
                Self::Vsock { cid, port } => {
                    let socket = socket(AddressFamily::VSOCK)?;
                    bind(&socket, &VsockAddress { cid: *cid, port: *port })?;
                    socket
                }
                Self::Unix(path) => {
                    let socket = socket(AddressFamily::UNIX)?;
                    bind(&socket, &SocketAddrUnix::new(path.as_path())?)?;
                    socket
                }
                Self::Guest { .. } => bail!("only the guest can do that"),
            })
        };
        let socket = bound().with_context(|| format!("listen at {self}"))?;
        listen(&socket, BACKLOG)?;
        Ok(socket)
    }

    /// Connects to whoever is there.
    pub fn connect(&self) -> Result<Stream> {
        let connected = || -> Result<Stream> {
            match self {
                Self::Vsock { cid, port } => {
                    let socket = socket(AddressFamily::VSOCK)?;
                    connect(&socket, &VsockAddress { cid: *cid, port: *port })?;
                    Ok(socket.into())
                }
                Self::Unix(path) => {
                    let socket = socket(AddressFamily::UNIX)?;
                    connect(&socket, &SocketAddrUnix::new(path.as_path())?)?;
                    Ok(socket.into())
                }
                Self::Guest { path, port } => {
                    let mut stream = Self::Unix(path.clone()).connect()?;
                    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
                    let mut answer = Vec::new();
                    while answer.last() != Some(&b'\n') {
                        let mut byte = [0];
                        stream.read_exact(&mut byte)?;
                        answer.push(byte[0]);
                    }
                    let port = answer.strip_prefix(b"OK ").and_then(|rest| rest.strip_suffix(b"\n"));
                    let is_number = port.is_some_and(|port| port.iter().all(u8::is_ascii_digit));
                    ensure!(is_number, "the answer is {:?}", String::from_utf8_lossy(&answer));
                    Ok(stream)
                }
            }
        };
        connected().with_context(|| format!("connect to {self}"))
    }
}

/// Takes the next connection of a listening socket.
pub fn accept(listener: &OwnedFd) -> Result<Stream> {
    Ok(accept_with(listener, SocketFlags::CLOEXEC)?.into())
}

fn socket(family: AddressFamily) -> rustix::io::Result<OwnedFd> {
    socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
}

struct VsockAddress {
    cid: u32,
    port: u32,
}

// SAFETY: the pointer that `f` gets is to a whole sockaddr_vm, which lives until `f` has returned.
unsafe impl SocketAddrArg for VsockAddress {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        // SAFETY: a sockaddr_vm is plain numbers, for which zeros are good.
        let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        (address.svm_cid, address.svm_port) = (self.cid, self.port);
        f((&raw const address).cast(), size_of::<libc::sockaddr_vm>() as SocketAddrLen)
    }
}
