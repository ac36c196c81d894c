//! Ports of the host at which programs of the guest are reached.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer};
use serde::{Serialize, Serializer};

/// One published port; text form `[ADDRESS:]PORT:GUEST_PORT[/udp]`, with an IPv6 address in brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    /// Where the host listens; everywhere if it is left out.
    pub address: Option<IpAddr>,
    /// The host's port.
    pub port: u16,
    /// The guest's port.
    pub guest_port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
}

/// What is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A text that names no published port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' names no port to publish; write [ADDRESS:]PORT:GUEST_PORT[/udp], such as 127.0.0.1:8080:80")]
pub struct PublishError(String);

impl Publish {
    /// Whether the host's port is free: takes it and lets go of it again.
    pub fn try_bind(&self) -> std::io::Result<()> {
        let address = SocketAddr::new(self.address.unwrap_or(IpAddr::from([0; 4])), self.port);
        match self.protocol {
            Protocol::Tcp => std::net::TcpListener::bind(address).map(drop),
            Protocol::Udp => std::net::UdpSocket::bind(address).map(drop),
        }
    }
}

impl FromStr for Publish {
    type Err = PublishError;

    fn from_str(text: &str) -> Result<Self, PublishError> {
        let error = || PublishError(text.into());
        let (ports, protocol) = match text.rsplit_once('/') {
            None => (text, Protocol::Tcp),
            Some((ports, "tcp")) => (ports, Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some(_) => return Err(error()),
        };
        let port = |digits: &str| {
            let number = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten();
            number.filter(|&port| port != 0).ok_or_else(error)
        };
        let (rest, guest) = ports.rsplit_once(':').ok_or_else(error)?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (None, rest),
            Some((address, host)) => {
                let bare = match address.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
                    Some(inner) => inner.filter(|inner| inner.contains(':')),
                    None => Some(address).filter(|address| !address.contains(':')),
                };
                (Some(bare.and_then(|bare| bare.parse().ok()).ok_or_else(error)?), host)
            }
        };
        Ok(Self { address, port: port(host)?, guest_port: port(guest)?, protocol })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            None => {}
        }
        write!(f, "{}:{}", self.port, self.guest_port)?;
        f.write_str(match self.protocol {
            Protocol::Tcp => "",
            Protocol::Udp => "/udp",
        })
    }
}

impl Serialize for Publish {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Publish {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ports_are_written_as_they_are_read() {
        for text in ["8080:80", "127.0.0.1:8080:80", "[::1]:5353:53/udp", "65535:1/udp"] {
            assert_eq!(text.parse::<Publish>().map(|p| p.to_string()), Ok(text.into()));
        }
        assert_eq!("8080:80/tcp".parse::<Publish>().map(|p| p.to_string()), Ok("8080:80".into()));
    }

    #[test]
    fn what_names_no_port_is_refused() {
        for text in [
            "",
            "80",
            "80:",
            ":80",
            "0:80",
            "80:0",
            "65536:80",
            "80:65536",
            "+80:80",
            "80:80/icmp",
            "80:80/",
            "::1:80:80",
            "[127.0.0.1]:80:80",
            "[::1:80:80",
            "localhost:80:80",
            "1:2:3:4",
            "a:80:80",
            "[]:1:1",
        ] {
            assert_eq!(text.parse::<Publish>(), Err(PublishError(text.into())));
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC*|[0-9:./\\[\\]udtcp]{0,30}") {
            if let Ok(publish) = text.parse::<Publish>() {
                prop_assert_eq!(publish.to_string().parse(), Ok(publish));
            }
        }
    }
}
