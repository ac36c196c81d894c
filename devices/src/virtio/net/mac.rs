//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer};
use serde::{Serialize, Serializer};

/// The Ethernet address of one network interface; text form `02:00:00:12:34:56`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddr([u8; 6]);

/// Why a text is not the address of an interface.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum MacError {
    /// Not six pairs of hexadecimal digits.
    #[error("'{0}' is not a MAC address; write six bytes in hexadecimal, such as 02:00:00:12:34:56")]
    Syntax(String),
    /// An address of a group, or of none.
    #[error("'{0}' is no address of a single interface; make its first byte even, such as 02")]
    Group(String),
}

impl MacAddr {
    /// One that may be used on any link of one's own.
    #[cfg(test)]
    pub(super) const LOCAL: Self = Self([2, 0, 0, 0, 0, 1]);

    /// The address that belongs to a name, locally administered. The same name has the same address in every
    /// run and on every host, so interfaces that meet on one network are to have names of their own.
    pub fn from_name(name: &str) -> Self {
        // FNV-1a: fixed for all time, unlike the standard library's hash.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let [a, b, c, d, e, ..] = hash.to_be_bytes();
        Self([0x02, a, b, c, d, e])
    }

    /// The six bytes, as on the wire.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddr {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let syntax = || MacError::Syntax(text.into());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(syntax)?;
            if !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(syntax());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| syntax())?;
        }
        if parts.next().is_some() {
            return Err(syntax());
        }
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(MacError::Group(text.into()));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for MacAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_of_single_interfaces() {
        for text in ["02:00:00:00:00:00", "52:54:00:ab:cd:ef", "fe:ff:ff:ff:ff:ff"] {
            assert_eq!(text.parse::<MacAddr>().map(|mac| mac.to_string()), Ok(text.to_string()));
        }
        assert_eq!(
            "AA:BB:CC:DD:EE:FF".parse::<MacAddr>().map(MacAddr::bytes),
            Ok([0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff])
        );
        for text in [
            "",
            "02",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "02-00-00-00-00-00",
            "2:0:0:0:0:0",
            "+2:00:00:00:00:00",
        ] {
            assert_eq!(text.parse::<MacAddr>(), Err(MacError::Syntax(text.into())));
        }
        for text in ["ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "00:00:00:00:00:00"] {
            assert_eq!(text.parse::<MacAddr>(), Err(MacError::Group(text.into())));
        }
    }

    #[test]
    fn a_name_always_has_the_same_address() {
        assert_eq!(MacAddr::from_name("tap0").to_string(), "02:d9:63:fc:ef:07");
    }

    proptest! {
        #[test]
        fn every_name_has_an_address_that_can_be_written(name in ".*") {
            let mac = MacAddr::from_name(&name);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        }

        #[test]
        fn no_text_panics(text in "\\PC*|([0-9a-f+]{0,3}:){0,8}") {
            _ = text.parse::<MacAddr>();
        }
    }
}
