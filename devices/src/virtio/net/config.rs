//! What an operator says about a network interface, and how it becomes a device.

use std::fmt;
use std::os::fd::RawFd;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};

use super::link::Link;
use super::mmds::Metadata;
#[cfg(any(test, feature = "specimen"))]
use super::mmds::Mmds;
use super::stream::Stream;
use super::{Boot, MacAddr, Net, Publish, Setup, passt, tap};
use crate::model::{DeviceKind, MachineShape, OpenError, VirtioDevice};
use crate::params::is_default;
use crate::throttle::{Limits, TokenBucket};

/// Most queue pairs of one interface.
pub const MAX_PAIRS: u8 = 16;
/// Range of an interface's MTU in bytes: what IPv4 needs at least (RFC 791), and what fits in the longest frame.
const MTU: std::ops::RangeInclusive<u16> = 68..=65520;
/// MTU of an interface whose segments are never sent as they are: passt takes them apart.
const USER_MTU: u16 = 65520;

/// Configuration of a network interface. Of `user`, `tap` and `fd`, one is given.
///
/// ```
/// use devices::{params, virtio::net::Config};
///
/// let config: Config = params::from_str("user,publish=8080:80", None)?;
/// assert!(config.user && config.publish.len() == 1);
/// # Ok::<(), params::ParamError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, serde::Deserialize)]
// Makes functions of the type's own, for the traits below.
#[serde(deny_unknown_fields, remote = "Self")]
pub struct Config {
    /// The host's network as an ordinary program has it, through passt; needs no root.
    #[serde(default, skip_serializing_if = "is_default")]
    pub user: bool,
    /// A tap interface of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<TapChoice>,
    /// Descriptors of a tap that were inherited, one for each queue pair.
    #[serde(default, skip_serializing_if = "is_default")]
    pub fd: Vec<RawFd>,
    /// Ports of the host, and those of the guest behind them; with `user`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub publish: Vec<Publish>,
    /// The guest's Ethernet address; left out: one that belongs to the names of tap and id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// What the guest sends from another Ethernet address is dropped.
    #[serde(default, skip_serializing_if = "is_default")]
    pub mac_check: bool,
    /// The largest packet in bytes that the guest is to send, 68 to 65520.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Queue pairs, 1 to 16; one if it is left out. The tap has as many queues.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u8>,
    /// What the guest can ask for at an address of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Metadata>,
    /// Most bytes in a time that the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_bandwidth: Option<TokenBucket>,
    /// Most frames in a time that the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_ops: Option<TokenBucket>,
    /// Most bytes in a time that the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_bandwidth: Option<TokenBucket>,
    /// Most frames in a time that the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_ops: Option<TokenBucket>,
    /// A name of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

impl Serialize for Config {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

/// Refuses what does not belong together, wherever it is written.
impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let config = Self::deserialize(deserializer)?;
        config.backend().map_err(de::Error::custom)?;
        Ok(config)
    }
}

/// Which tap. Written as a name, or as `true` (on the command line: as nothing).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TapChoice {
    /// One of our own that is gone when the machine is.
    New,
    /// One that exists.
    Named(String),
}

impl Serialize for TapChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::New => serializer.serialize_bool(true),
            Self::Named(name) => serializer.serialize_str(name),
        }
    }
}

impl<'de> Deserialize<'de> for TapChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Choice;

        impl Visitor<'_> for Choice {
            type Value = TapChoice;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a tap, or true for a new one")
            }

            fn visit_bool<E: de::Error>(self, new: bool) -> Result<TapChoice, E> {
                new.then_some(TapChoice::New)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Bool(new), &self))
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<TapChoice, E> {
                Ok(TapChoice::Named(name.into()))
            }
        }

        deserializer.deserialize_any(Choice)
    }
}

/// Where the frames of a configuration go.
enum Backend<'a> {
    User,
    NewTap,
    Tap(&'a str),
    Inherited(&'a [RawFd]),
}

impl Config {
    /// An interface on the tap `name`, with nothing else chosen.
    pub fn on_tap(name: &str) -> Self {
        Self { tap: Some(TapChoice::Named(name.into())), ..Self::default() }
    }

    /// Checks what belongs together, and says what is at the other end, and of how many queue pairs.
    fn backend(&self) -> Result<(Backend<'_>, usize), String> {
        let backend = match (self.user, &self.tap, &self.fd[..]) {
            (true, None, []) => Backend::User,
            (false, Some(TapChoice::New), []) => Backend::NewTap,
            (false, Some(TapChoice::Named(name)), []) => Backend::Tap(name),
            (false, None, fds @ [_, ..]) => Backend::Inherited(fds),
            _ => return Err("give one of user, tap, tap=NAME and fd=NUMBER".into()),
        };
        if !self.publish.is_empty() && !self.user {
            return Err("publish works with user; leave it out, or forward the port on the host".into());
        }
        if let Some(mtu) = self.mtu.filter(|mtu| !MTU.contains(mtu)) {
            return Err(format!("mtu={mtu}: give {} to {}", MTU.start(), MTU.end()));
        }
        let pairs = match (&backend, self.queues) {
            (Backend::User, Some(2..)) => {
                return Err("user has one queue pair; leave queues out".into());
            }
            (Backend::Inherited(fds), queues) => {
                if queues.is_some_and(|queues| usize::from(queues) != fds.len()) {
                    return Err(format!("queues={0}: give {0} times fd=NUMBER", queues.unwrap_or(1)));
                }
                fds.len()
            }
            (_, queues) => queues.unwrap_or(1).into(),
        };
        if !(1..=usize::from(MAX_PAIRS)).contains(&pairs) {
            return Err(format!("{pairs} queue pairs are not possible; give queues=1 to {MAX_PAIRS}"));
        }
        Ok((backend, pairs))
    }

    /// The guest's address on the host's interface `name`.
    fn mac_on(&self, name: &str) -> MacAddr {
        let stable = || match &self.id {
            Some(id) => MacAddr::from_name(&format!("{name}/{id}")),
            None => MacAddr::from_name(name),
        };
        self.mac.unwrap_or_else(stable)
    }
}

impl DeviceKind for Config {
    const NAME: &'static str = "net";
    const SYNTAX: &'static str = "user[,publish=[ADDR:]PORT:GUEST_PORT[/udp]]...|tap[=NAME]|fd=N[,mac=ADDRESS]\
                                  [,mac_check][,mtu=BYTES][,queues=N][,metadata=FILE]\
                                  [,rx_bandwidth=|rx_ops=|tx_bandwidth=|tx_ops=LIMIT]...[,id=NAME]";
    const HELP: &'static str =
        "A network interface: through passt without root, on a tap, or on a new tap as root";

    const LIVE: &'static [&'static str] = &["metadata"];
    const HOST: &'static [&'static str] = &["user", "tap", "fd", "publish", "mac", "mac_check"];

    fn open(&self, _: &MachineShape) -> Result<Box<dyn VirtioDevice>, OpenError> {
        let (backend, pairs) = self.backend().map_err(Self::refused)?;
        let links = |taps: Vec<tap::Tap>| taps.into_iter().map(Link::Tap).collect();
        let (links, mac, boot) = match backend {
            Backend::User => {
                let mac = self.mac_on("user");
                let (socket, passt) = passt::start(mac, &self.publish)?;
                let boot = Boot {
                    address: passt::GUEST,
                    gateway: passt::GATEWAY,
                    mask: passt::MASK,
                    dns: Some(passt::DNS),
                };
                let mtu = self.mtu.or(Some(USER_MTU));
                let setup = Setup { mac, mtu, mac_check: self.mac_check, boot: Some(boot) };
                let net = Net::new(vec![Link::Stream(Stream::new(socket))], setup, Some(passt));
                return Ok(Box::new(net.with_metadata(self.metadata.as_ref())?));
            }
            Backend::NewTap => {
                let (taps, ends) = tap::make(pairs, self.mtu)?;
                let boot = Boot { address: ends.guest, gateway: ends.host, mask: ends.mask, dns: None };
                (links(taps), self.mac_on("tap"), Some(boot))
            }
            Backend::Tap(name) => (links(tap::open(name, pairs)?), self.mac_on(name), None),
            Backend::Inherited(fds) => {
                let (taps, name) = tap::inherit(fds)?;
                (links(taps), self.mac_on(&name), None)
            }
        };
        let setup = Setup { mac, mtu: self.mtu, mac_check: self.mac_check, boot };
        Ok(Box::new(Net::new(links, setup, None).with_metadata(self.metadata.as_ref())?))
    }

    fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    fn mac(&self) -> Option<MacAddr> {
        let name = match (&self.tap, &self.fd[..]) {
            (Some(TapChoice::Named(name)), _) => name.clone(),
            (Some(TapChoice::New), _) => "tap".into(),
            (None, []) => "user".into(),
            // Of one that is not there, nothing is known.
            (None, [fd, ..]) => tap::name(*fd)?,
        };
        Some(self.mac_on(&name))
    }

    fn pin(&mut self) {
        self.mac = DeviceKind::mac(self);
        // Credentials, more often than not.
        if let Some(metadata) = &mut self.metadata {
            metadata.data.clear();
        }
    }

    fn limits(&self) -> Vec<Limits> {
        vec![
            Limits { bandwidth: self.rx_bandwidth, ops: self.rx_ops },
            Limits { bandwidth: self.tx_bandwidth, ops: self.tx_ops },
            // Commands to the device.
            Limits::default(),
        ]
    }

    /// An interface with two queue pairs whose frames come back to it, sockets that are connected to themselves, and with
    /// metadata.
    #[cfg(any(test, feature = "specimen"))]
    fn specimen() -> Box<dyn VirtioDevice> {
        use rustix::net::{AddressFamily, SocketAddrAny, SocketFlags, SocketType};
        let link = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)
                .expect("socket");
            // An address without a name lets the kernel choose one.
            rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new_unnamed()).expect("bind");
            let own: SocketAddrAny = rustix::net::getsockname(&socket).expect("own address");
            rustix::net::connect(&socket, &own).expect("connect");
            Link::Tap(tap::Tap::from_socket(socket))
        };
        let setup =
            Setup { mac: MacAddr::from_name("specimen"), mtu: Some(9000), mac_check: false, boot: None };
        let mmds = Mmds::seeded(Metadata::default(), setup.mtu, 0).expect("a timer");
        Box::new(Net { mmds: Some(mmds), ..Net::new(vec![link(), link()], setup, None) })
    }
}
