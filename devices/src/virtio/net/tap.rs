//! A tap interface of the host: frames with a virtio-net header in front of each.
#![allow(unsafe_code, reason = "the tun driver is configured with ioctls")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::header::HEADER_BYTES;
use crate::model::OpenError;

/// Where frames go to and come from: each read and write is one frame, behind a header of
/// [`HEADER_BYTES`] bytes, and neither waits.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// The tun driver is behind it, and does offloads.
    has_offloads: bool,
}

impl Tap {
    /// Opens the tap interface `name`, which exists.
    pub fn open(name: &str) -> Result<Self, OpenError> {
        let error = |reason: String, remedy: &str| OpenError::File {
            what: "tap",
            path: name.into(),
            reason,
            remedy: remedy.into(),
        };
        let make = format!("make it with: ip tuntap add {name} mode tap");
        let fits =
            !name.is_empty() && name.len() < libc::IFNAMSIZ && !name.bytes().any(|b| b == 0 || b == b'/');
        if !fits {
            return Err(error("not the name of an interface".into(), "use at most 15 characters"));
        }
        // The driver would make an interface of this name that nothing is connected to, and that is gone with us.
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
                .map_err(|errno| error(errno.to_string(), "close some files"))?;
        rustix::net::netdevice::name_to_index(&socket, name)
            .map_err(|_| error("no such interface".into(), &make))?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty()).map_err(|errno| match errno {
            Errno::ACCESS | Errno::PERM => {
                error("no permission on /dev/net/tun".into(), "make it readable and writable for you")
            }
            errno => error(format!("/dev/net/tun: {errno}"), "load the kernel's tun module"),
        })?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        // SAFETY: all bytes zero is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF takes an ifreq, which lives through the call.
        ioctl(&fd, |fd| unsafe { libc::ioctl(fd, libc::TUNSETIFF, &raw mut request) }).map_err(|cause| {
            match cause.raw_os_error() {
                Some(libc::EBUSY) => {
                    error("another program uses it".into(), "stop that, or make another tap")
                }
                Some(libc::EPERM) => {
                    error("not permitted".into(), &format!("{make} user $USER, or run with CAP_NET_ADMIN"))
                }
                Some(libc::EINVAL) => error(
                    "not a tap interface with one queue".into(),
                    "make one: ip tuntap add NAME mode tap",
                ),
                _ => error(cause.to_string(), "check it with ip link show"),
            }
        })?;
        let header_bytes = HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ takes an int, which lives through the call.
        ioctl(&fd, |fd| unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const header_bytes) }).map_err(
            |cause| error(cause.to_string(), "use a host kernel with virtio-net headers for taps"),
        )?;
        Ok(Self { fd, has_offloads: true })
    }

    /// Frames over a socket that keeps datagrams apart and does not wait. It does no offloads.
    pub fn from_socket(fd: OwnedFd) -> Self {
        Self { fd, has_offloads: false }
    }

    /// The descriptor of its frames.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether the driver's offloads can be done.
    pub fn has_offloads(&self) -> bool {
        self.has_offloads
    }

    /// Says which unfinished frames the guest takes: without a checksum, and as long segments of TCP over IPv4
    /// and IPv6. The tap finishes the others.
    pub fn set_offload(&self, csum: bool, tso4: bool, tso6: bool) -> io::Result<()> {
        if !self.has_offloads {
            return Ok(());
        }
        let flag = |on: bool, bit: libc::c_uint| if on { bit } else { 0 };
        // Segments have no checksum of their own, so that the driver takes no TSO without CSUM.
        let offload = flag(csum, libc::TUN_F_CSUM)
            | flag(csum && tso4, libc::TUN_F_TSO4)
            | flag(csum && tso6, libc::TUN_F_TSO6);
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        ioctl(&self.fd, |fd| unsafe { libc::ioctl(fd, libc::TUNSETOFFLOAD, libc::c_ulong::from(offload)) })
    }
}

fn ioctl(fd: &OwnedFd, call: impl FnOnce(libc::c_int) -> libc::c_int) -> io::Result<()> {
    match call(fd.as_raw_fd()) {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
