//! What an operator says about the metadata of an interface.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde::{Deserialize as DeriveDeserialize, Serialize};
use serde_json::{Map, Value};

use crate::params::is_default;

/// Where guests look for metadata if nothing else is said.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Longest file of metadata in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Metadata that the guest can ask for. Written as an object, or as the path of a file with the data, which is read at
/// once.
#[derive(Clone, Debug, PartialEq, Serialize, DeriveDeserialize)]
// Makes functions of the type's own, for the traits below.
#[serde(deny_unknown_fields, remote = "Self")]
pub struct Metadata {
    /// The data.
    #[serde(default)]
    pub data: Map<String, Value>,
    /// How the guest asks.
    #[serde(default, skip_serializing_if = "is_default")]
    pub version: Version,
    /// Where the guest asks: a link-local address.
    #[serde(default = "default_address", skip_serializing_if = "is_default_address")]
    pub address: Ipv4Addr,
    /// All answers are text, even to who wants JSON.
    #[serde(default, skip_serializing_if = "is_default")]
    pub imds_compat: bool,
}

/// How a guest asks for metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, DeriveDeserialize)]
pub enum Version {
    /// A token is taken and not needed.
    #[default]
    V1,
    /// Only with a token.
    V2,
}

fn default_address() -> Ipv4Addr {
    ADDRESS
}

fn is_default_address(address: &Ipv4Addr) -> bool {
    *address == ADDRESS
}

impl Default for Metadata {
    fn default() -> Self {
        Self { data: Map::new(), version: Version::V1, address: ADDRESS, imds_compat: false }
    }
}

impl Metadata {
    /// Checks that the guest does not lose an address of its network's; an error is a sentence.
    pub fn checked(self) -> Result<Self, String> {
        match self.address.octets() {
            // RFC 3927 §2.1 keeps the first and the last 256 of them back.
            [169, 254, 1..=254, _] => Ok(self),
            _ => Err(format!(
                "'{}' is no address for metadata; use one of 169.254.1.0 to 169.254.254.255",
                self.address
            )),
        }
    }

    /// Reads the data in the file at `path`; an error is a sentence.
    pub fn read(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let failed = |error: std::io::Error| format!("cannot read metadata '{shown}': {error}");
        // Without waiting for the other end of what turns out to be a FIFO.
        let flags = OFlags::NONBLOCK.bits() as i32;
        let file = File::options().read(true).custom_flags(flags).open(path).map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(format!("metadata '{shown}' is no file; give one with a JSON object"));
        }
        let mut text = String::new();
        file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > MAX_FILE {
            return Err(format!("metadata '{shown}' has more than {MAX_FILE} bytes; make it smaller"));
        }
        let data = serde_json::from_str(&text)
            .map_err(|error| format!("metadata '{shown}' is no JSON object: {error}"))?;
        Ok(Self { data, ..Self::default() })
    }
}

impl Serialize for Metadata {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the path of a file with metadata, or an object")
            }

            fn visit_str<E: de::Error>(self, path: &str) -> Result<Metadata, E> {
                Metadata::read(Path::new(path)).map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Metadata, A::Error> {
                let metadata = Metadata::deserialize(MapAccessDeserializer::new(map))?;
                metadata.checked().map_err(de::Error::custom)
            }
        }

        deserializer.deserialize_any(Either)
    }
}
