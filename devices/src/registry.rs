//! The list of virtio device kinds: one line a device.
//!
//! Configuration, command line flags, conformance tests and fuzz targets are generated from it, so adding a
//! device is one file and one line.

use serde::{Deserialize, Serialize};

use crate::model::{DeviceKind, OpenError, VirtioDevice};
use crate::params::{self, ParamError};
use crate::virtio::{block, net, rng};

/// A device kind, as the command line needs to know it.
pub struct Kind {
    /// Name: flag, configuration key and metrics prefix.
    pub name: &'static str,
    /// Syntax of the flag's value.
    pub syntax: &'static str,
    /// One line of help.
    pub help: &'static str,
    /// See [`DeviceKind::ON_BY_DEFAULT`].
    pub on_by_default: bool,
    /// Parses the flag's value.
    pub parse: fn(&str) -> Result<DeviceConfig, ParamError>,
    /// A device for tests, see [`DeviceKind::specimen`].
    #[cfg(any(test, feature = "specimen"))]
    pub specimen: fn() -> Box<dyn VirtioDevice>,
}

macro_rules! registry {
    ($($variant:ident => $config:ty,)+) => {
        /// The configuration of one device, of any kind.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "kind", rename_all = "lowercase")]
        pub enum DeviceConfig {
            $(
                #[doc = concat!("A [`", stringify!($config), "`].")]
                $variant($config),
            )+
        }

        /// All kinds, in the order in which help lists them.
        pub const KINDS: &[Kind] = &[$(
            Kind {
                name: <$config>::NAME,
                syntax: <$config>::SYNTAX,
                help: <$config>::HELP,
                on_by_default: <$config>::ON_BY_DEFAULT,
                parse: |text| params::from_str(text, <$config>::BARE_KEY).map(DeviceConfig::$variant),
                #[cfg(any(test, feature = "specimen"))]
                specimen: <$config>::specimen,
            },
        )+];

        impl DeviceConfig {
            /// The name of its kind.
            pub fn kind(&self) -> &'static str {
                match self { $(Self::$variant(_) => <$config>::NAME,)+ }
            }

            /// Opens the host's side and makes the device.
            pub fn open(&self) -> Result<Box<dyn VirtioDevice>, OpenError> {
                match self { $(Self::$variant(config) => config.open(),)+ }
            }

            /// See [`DeviceKind::kernel_parameters`].
            pub fn kernel_parameters(&self, nth: usize) -> Option<String> {
                match self { $(Self::$variant(config) => config.kernel_parameters(nth),)+ }
            }
        }
    };
}

registry! {
    Disk => block::Config,
    Net => net::Config,
    Rng => rng::Config,
}
