//! A tap interface of the host: frames with a virtio-net header in front of each.
#![allow(unsafe_code, reason = "the tun driver and interfaces are configured with ioctls")]

use std::io;
use std::mem::zeroed;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::config::Config;
use super::header::HEADER_BYTES;
use crate::model::{DeviceKind, OpenError};

/// Name of a tap of our own; the kernel puts a number at the end.
const OWN_NAME: &str = "vmm%d";
/// What our taps must be.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// One queue of a tap interface: each read and write is one frame, behind a header of [`HEADER_BYTES`] bytes, and
/// neither waits.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// The tun driver is behind it, and does offloads.
    has_offloads: bool,
    /// One of several queues of its interface.
    multi_queue: bool,
    /// The host uses it.
    enabled: bool,
}

/// The two ends of a link of our own making.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The host's.
    pub host: Ipv4Addr,
    /// The guest's.
    pub guest: Ipv4Addr,
    /// Of the network that has both and nothing else.
    pub mask: Ipv4Addr,
}

impl Addresses {
    /// Four addresses of 10.177.0.0/16 that belong to the interface with this index: no other one of this host's
    /// network namespace has them, up to 16384 interfaces.
    fn of_interface(index: u32) -> Self {
        let base = 0x0ab1_0000 | (index & 0x3fff) << 2;
        Self {
            host: Ipv4Addr::from(base + 1),
            guest: Ipv4Addr::from(base + 2),
            mask: Ipv4Addr::new(255, 255, 255, 252),
        }
    }
}

fn error(tap: &str, reason: impl ToString, remedy: impl ToString) -> OpenError {
    OpenError::File { what: "tap", path: tap.into(), reason: reason.to_string(), remedy: remedy.to_string() }
}

/// Opens the tap interface `name`, which exists, with `queues` queues.
pub fn open(name: &str, queues: usize) -> Result<Vec<Tap>, OpenError> {
    let fits = !name.is_empty()
        && name.len() < libc::IFNAMSIZ
        && !name.bytes().any(|b| b == 0 || b == b'/' || b == b'%');
    if !fits {
        return Err(error(name, "not the name of an interface", "use at most 15 characters"));
    }
    // The driver would make an interface of this name that nothing is connected to, and that is gone with us.
    let many = if queues > 1 { " multi_queue" } else { "" };
    let make = format!("make it with: ip tuntap add {name} mode tap{many}");
    let socket = control_socket().map_err(|errno| error(name, errno, "close some files"))?;
    rustix::net::netdevice::name_to_index(&socket, name)
        .map_err(|_| error(name, "no such interface", &make))?;
    let explain = |cause: io::Error| match cause.raw_os_error() {
        Some(libc::EBUSY) => error(name, "another program uses it", "stop that, or make another tap"),
        Some(libc::EPERM) => {
            error(name, "not permitted", format!("{make} user $USER, or run with CAP_NET_ADMIN"))
        }
        Some(libc::EINVAL) if queues > 1 => error(name, "not a tap interface with several queues", &make),
        Some(libc::EINVAL) => error(name, "not a tap interface", "make one: ip tuntap add NAME mode tap"),
        _ => error(name, &cause, "check it with ip link show"),
    };
    let single = || Ok(vec![Tap::attach(name, false)?.0]);
    let several = || (0..queues).map(|_| Ok(Tap::attach(name, true)?.0)).collect();
    match queues {
        // Which of both it is, is the operator's choice.
        1 => single().or_else(|cause| match cause {
            AttachError::Set(cause) if cause.raw_os_error() == Some(libc::EINVAL) => several(),
            cause => Err(cause),
        }),
        _ => several(),
    }
    .map_err(|cause| cause.explain(name, explain))
}

/// Makes a tap interface of our own with `queues` queues, which lives as long as its descriptors, and gives it an address
/// and, if it is given, an MTU in bytes.
pub fn make(queues: usize, mtu: Option<u16>) -> Result<(Vec<Tap>, Addresses), OpenError> {
    let explain = |cause: AttachError| match cause {
        AttachError::Open(Errno::ACCESS | Errno::PERM) => not_permitted(),
        AttachError::Set(cause) if cause.raw_os_error() == Some(libc::EPERM) => not_permitted(),
        cause => cause.explain("of our own", |cause| error("of our own", cause, "use --net user")),
    };
    let (first, name) = Tap::attach(OWN_NAME, queues > 1).map_err(explain)?;
    let mut taps = vec![first];
    for _ in 1..queues {
        taps.push(Tap::attach(&name, true).map_err(explain)?.0);
    }
    let addresses =
        set_up(&name, mtu).map_err(|cause| error(&name, cause, "use a tap that you made yourself"))?;
    Ok((taps, addresses))
}

fn not_permitted() -> OpenError {
    Config::refused(
        "making a tap takes root; use --net user, or make one as root (ip tuntap add tap0 mode tap user \
         NAME) and use --net tap=tap0",
    )
}

/// The name of the tap interface behind an open descriptor.
pub fn name(fd: RawFd) -> Option<String> {
    interface(fd).as_ref().map(name_of)
}

/// What TUNGETIFF says of a descriptor, if it is an open tap interface.
fn interface(fd: RawFd) -> Option<libc::ifreq> {
    // SAFETY: all bytes zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { zeroed() };
    // SAFETY: TUNGETIFF fills in an ifreq, which lives through the call; any number may be tried.
    (unsafe { libc::ioctl(fd, libc::TUNGETIFF, &raw mut request) } >= 0).then_some(request)
}

/// Taps that were opened by whoever started us, a descriptor for each queue.
pub fn inherit(fds: &[RawFd]) -> Result<(Vec<Tap>, String), OpenError> {
    let mut name = String::new();
    let mut taps = Vec::new();
    for &fd in fds {
        let wrong = |what: String| {
            Config::refused(format!(
                "fd={fd}: {what}; open it with TUNSETIFF and IFF_TAP | IFF_NO_PI | IFF_VNET_HDR"
            ))
        };
        let request = interface(fd).ok_or_else(|| wrong("no open tap interface".into()))?;
        // SAFETY: TUNGETIFF has set the flags.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & FLAGS != FLAGS {
            return Err(wrong("not a tap with virtio-net headers".into()));
        }
        let this = name_of(&request);
        if !taps.is_empty() && (this != name || flags & libc::IFF_MULTI_QUEUE == 0) {
            return Err(wrong(format!("not another queue of {name}")));
        }
        name = this;
        // SAFETY: it is open, as the call above has shown, and is only borrowed to be duplicated.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let own = rustix::io::fcntl_dupfd_cloexec(borrowed, 3).map_err(|errno| wrong(errno.to_string()))?;
        let nonblocking = rustix::fs::fcntl_getfl(&own)
            .and_then(|flags| rustix::fs::fcntl_setfl(&own, flags | OFlags::NONBLOCK));
        nonblocking.map_err(|errno| wrong(errno.to_string()))?;
        let multi_queue = flags & libc::IFF_MULTI_QUEUE != 0;
        taps.push(Tap::set_header(own, multi_queue).map_err(|cause| wrong(cause.to_string()))?);
    }
    Ok((taps, name))
}

/// Why a queue of an interface could not be opened.
enum AttachError {
    /// /dev/net/tun could not be opened.
    Open(Errno),
    /// The interface could not be attached to.
    Set(io::Error),
    /// The kernel does not know headers of our size.
    Header(io::Error),
}

impl AttachError {
    fn explain(self, name: &str, set: impl FnOnce(io::Error) -> OpenError) -> OpenError {
        match self {
            Self::Open(Errno::ACCESS | Errno::PERM) => {
                error(name, "no permission on /dev/net/tun", "make it readable and writable for you")
            }
            Self::Open(errno) => {
                error(name, format!("/dev/net/tun: {errno}"), "load the kernel's tun module")
            }
            Self::Set(cause) => set(cause),
            Self::Header(cause) => error(name, cause, "use a host kernel with virtio-net headers for taps"),
        }
    }
}

impl Tap {
    /// Opens one queue of the interface `name`; says what it is called.
    fn attach(name: &str, multi_queue: bool) -> Result<(Self, String), AttachError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty()).map_err(AttachError::Open)?;
        let mut request = request(name);
        let many = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
        request.ifr_ifru.ifru_flags = (FLAGS | many) as libc::c_short;
        // SAFETY: TUNSETIFF takes an ifreq, which lives through the call.
        ioctl(&fd, |fd| unsafe { libc::ioctl(fd, libc::TUNSETIFF, &raw mut request) })
            .map_err(AttachError::Set)?;
        Ok((Self::set_header(fd, multi_queue).map_err(AttachError::Header)?, name_of(&request)))
    }

    fn set_header(fd: OwnedFd, multi_queue: bool) -> io::Result<Self> {
        let header_bytes = HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ takes an int, which lives through the call.
        ioctl(&fd, |fd| unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const header_bytes) })?;
        Ok(Self { fd, has_offloads: true, multi_queue, enabled: true })
    }

    /// Frames over a socket that keeps datagrams apart and does not wait. It does no offloads.
    #[cfg(any(test, feature = "specimen"))]
    pub fn from_socket(fd: OwnedFd) -> Self {
        Self { fd, has_offloads: false, multi_queue: false, enabled: true }
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

    /// Lets the host use this queue, or not. It starts in use. An interface with a single queue always uses it.
    pub fn set_enabled(&mut self, on: bool) -> io::Result<()> {
        if !self.multi_queue || on == self.enabled {
            return Ok(());
        }
        let mut request = request("");
        let flag = if on { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: TUNSETQUEUE takes an ifreq, which lives through the call.
        ioctl(&self.fd, |fd| unsafe { libc::ioctl(fd, libc::TUNSETQUEUE, &raw mut request) })?;
        self.enabled = on;
        Ok(())
    }
}

/// A socket to configure interfaces with.
fn control_socket() -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
}

/// Gives the interface `name` an address and an MTU, and switches it on.
fn set_up(name: &str, mtu: Option<u16>) -> io::Result<Addresses> {
    let socket = control_socket()?;
    let addresses = Addresses::of_interface(rustix::net::netdevice::name_to_index(&socket, name)?);
    let set = |call: libc::c_ulong, fill: &dyn Fn(&mut libc::ifreq)| {
        let mut request = request(name);
        fill(&mut request);
        // SAFETY: these calls take an ifreq, which lives through them.
        ioctl(&socket, |fd| unsafe { libc::ioctl(fd, call, &raw mut request) })
    };
    set(libc::SIOCSIFADDR, &|request| request.ifr_ifru.ifru_addr = socket_address(addresses.host))?;
    set(libc::SIOCSIFNETMASK, &|request| request.ifr_ifru.ifru_netmask = socket_address(addresses.mask))?;
    if let Some(mtu) = mtu {
        set(libc::SIOCSIFMTU, &|request| request.ifr_ifru.ifru_mtu = mtu.into())?;
    }
    set(libc::SIOCSIFFLAGS, &|request| {
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_MULTICAST) as libc::c_short
    })?;
    Ok(addresses)
}

/// struct sockaddr_in in a struct sockaddr.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: all bytes zero is a valid sockaddr.
    let mut socket_address: libc::sockaddr = unsafe { zeroed() };
    socket_address.sa_family = libc::AF_INET as libc::sa_family_t;
    for (to, from) in socket_address.sa_data[2..].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    socket_address
}

/// A request about the interface `name`.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: all bytes zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

/// The name in an answer.
fn name_of(request: &libc::ifreq) -> String {
    request.ifr_name.iter().map(|&c| c as u8).take_while(|&b| b != 0).map(char::from).collect()
}

fn ioctl(fd: &OwnedFd, call: impl FnOnce(libc::c_int) -> libc::c_int) -> io::Result<()> {
    match call(fd.as_raw_fd()) {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
