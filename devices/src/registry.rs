//! The list of virtio device kinds: one line a device.
//!
//! Configuration, command line flags, conformance tests and fuzz targets are generated from it, so adding a
//! device is one file and one line.

use std::any::Any;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::model::{DeviceKind, MachineShape, OpenError, UpdateError, VirtioDevice};
use crate::params::{self, ParamError};
use crate::throttle::{self, Limits};
use crate::virtio::net::MacAddr;
use crate::virtio::{balloon, block, console, net, pmem, rng, vsock};

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
    /// See [`DeviceKind::SINGLE`].
    pub single: bool,
    /// Parses the flag's value.
    pub parse: fn(&str) -> Result<DeviceConfig, ParamError>,
    /// A device for tests, see [`DeviceKind::specimen`].
    #[cfg(any(test, feature = "specimen"))]
    pub specimen: fn() -> Box<dyn VirtioDevice>,
}

macro_rules! registry {
    ($($variant:ident => $config:ty,)+) => {
        /// The configuration of one device, of any kind.
        ///
        /// ```
        /// use devices::registry::DeviceConfig;
        ///
        /// let text = r#"{"kind": "disk", "path": "data.img", "ro": true}"#;
        /// let disk: DeviceConfig = serde_json::from_str(text)?;
        /// assert!(disk.kind() == "disk" && !disk.is_root());
        /// # Ok::<(), serde_json::Error>(())
        /// ```
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "kind", rename_all = "lowercase")]
        pub enum DeviceConfig {
            $(
                #[doc = concat!("A [`", stringify!($config), "`].")]
                $variant($config),
            )+
        }

        /// All kinds, in the order in which help lists them.
        ///
        /// ```
        /// use devices::registry::KINDS;
        ///
        /// let disk = KINDS.iter().find(|kind| kind.name == "disk").expect("the registry has it");
        /// let config = (disk.parse)("data.img,ro")?;
        /// assert_eq!(config.kind(), "disk");
        /// # Ok::<(), devices::params::ParamError>(())
        /// ```
        pub const KINDS: &[Kind] = &[$(
            Kind {
                name: <$config>::NAME,
                syntax: <$config>::SYNTAX,
                help: <$config>::HELP,
                on_by_default: <$config>::ON_BY_DEFAULT,
                single: <$config>::SINGLE,
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
            pub fn open(&self, machine: &MachineShape) -> Result<Box<dyn VirtioDevice>, OpenError> {
                match self { $(Self::$variant(config) => config.open(machine),)+ }
            }

            /// See [`DeviceKind::id`].
            pub fn id(&self) -> Option<&str> {
                match self { $(Self::$variant(config) => config.id(),)+ }
            }

            /// See [`DeviceKind::limits`].
            pub fn limits(&self) -> Vec<Limits> {
                match self { $(Self::$variant(config) => config.limits(),)+ }
            }

            /// See [`DeviceKind::is_root`].
            pub fn is_root(&self) -> bool {
                match self { $(Self::$variant(config) => config.is_root(),)+ }
            }

            /// See [`DeviceKind::is_console`].
            pub fn is_console(&self) -> bool {
                match self { $(Self::$variant(config) => config.is_console(),)+ }
            }

            /// See [`DeviceKind::own_runner`].
            pub fn own_runner(&self) -> bool {
                match self { $(Self::$variant(config) => config.own_runner(),)+ }
            }

            /// The kind's own configuration, for [`VirtioDevice::update`].
            pub fn as_any(&self) -> &dyn Any {
                match self { $(Self::$variant(config) => config,)+ }
            }

            /// See [`DeviceKind::mac`].
            pub fn mac(&self) -> Option<MacAddr> {
                match self { $(Self::$variant(config) => config.mac(),)+ }
            }

            /// See [`DeviceKind::pin`].
            pub fn pin(&mut self) {
                match self { $(Self::$variant(config) => config.pin(),)+ }
            }

            /// See [`DeviceKind::begin_with`].
            pub fn begin_with(&mut self, saved: &Path, format: &str) -> Result<(), OpenError> {
                match self { $(Self::$variant(config) => config.begin_with(saved, format),)+ }
            }

            /// See [`DeviceKind::changed_from`].
            pub fn changed_from(&mut self, before: &Self) {
                match (self, before) {
                    $((Self::$variant(config), Self::$variant(before)) => config.changed_from(before),)+
                    _ => {}
                }
            }

            /// See [`DeviceKind::HOST`].
            fn host_keys(&self) -> &'static [&'static str] {
                match self { $(Self::$variant(_) => <$config>::HOST,)+ }
            }

            /// See [`DeviceKind::LIVE`].
            fn live_keys(&self) -> &'static [&'static str] {
                match self { $(Self::$variant(_) => <$config>::LIVE,)+ }
            }

            /// See [`DeviceKind::SINGLE`].
            pub fn is_single(&self) -> bool {
                match self { $(Self::$variant(_) => <$config>::SINGLE,)+ }
            }
        }
    };
}

/// A change of a device's configuration as it is asked for: keys of [`DeviceConfig`] and their new values, null for
/// none.
///
/// ```
/// use devices::registry::Patch;
///
/// let faster = Patch::from_iter([("bandwidth".to_owned(), "10M/1s".into()), ("ops".to_owned(), serde_json::Value::Null)]);
/// assert_eq!(serde_json::to_string(&faster).unwrap(), r#"{"bandwidth":"10M/1s","ops":null}"#);
/// ```
pub type Patch = Map<String, Value>;

/// A change of a device's configuration that can be made while the machine runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// The whole configuration after it.
    pub config: DeviceConfig,
    /// Limits differ.
    pub limits: bool,
    /// What the device itself has to take over differs.
    pub device: bool,
}

impl DeviceConfig {
    /// What `patch` makes of this configuration: its keys replace those that are there, and null takes one away.
    ///
    /// ```
    /// use devices::registry::{DeviceConfig, Patch};
    ///
    /// let rng: DeviceConfig = serde_json::from_str(r#"{"kind": "rng", "ops": "10/1s"}"#)?;
    /// let patch = Patch::from_iter([("ops".to_owned(), "20/1s".into())]);
    /// let update = rng.patched(&patch)?;
    /// assert!(update.limits && !update.device);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn patched(&self, patch: &Patch) -> Result<Update, UpdateError> {
        let kind = self.kind();
        let refused = |error: serde_json::Error| UpdateError::Value { kind, problem: error.to_string() };
        let mut after = self.keys().map_err(refused)?;
        for (key, value) in patch {
            match value {
                Value::Null => after.remove(key),
                value => after.insert(key.clone(), value.clone()),
            };
        }
        let mut config: Self = serde_json::from_value(Value::Object(after)).map_err(refused)?;
        let (mut limits, mut device) = (false, false);
        for key in self.changed(&config).map_err(refused)? {
            if throttle::is_limit(&key) {
                limits = true;
            } else if self.live_keys().contains(&key.as_str()) {
                device = true;
            } else {
                let mut can: Vec<&str> = self.live_keys().to_vec();
                if !self.limits().is_empty() {
                    can.push("limits");
                }
                let can = match &can[..] {
                    [] => "nothing of it can".into(),
                    can => format!("what can: {}", can.join(", ")),
                };
                return Err(UpdateError::Fixed { kind, key, can });
            }
        }
        config.changed_from(self);
        Ok(Update { config, limits, device })
    }

    /// A key that a guest of this device has seen the value of, and whose value in `other` is another.
    pub fn differs_to_guest(&self, other: &Self) -> Option<String> {
        let seen = |key: &String| {
            let known = [self.live_keys(), self.host_keys()].concat();
            !known.contains(&key.as_str()) && !throttle::is_limit(key)
        };
        self.changed(other).ok()?.into_iter().find(seen)
    }

    /// The configuration as it writes itself: a default may be left out or not.
    fn keys(&self) -> Result<Patch, serde_json::Error> {
        match serde_json::to_value(self)? {
            Value::Object(keys) => Ok(keys),
            _ => Ok(Map::new()),
        }
    }

    /// Keys whose values in `other` are others.
    fn changed(&self, other: &Self) -> Result<Vec<String>, serde_json::Error> {
        let (before, after) = (self.keys()?, other.keys()?);
        let all = before.keys().chain(after.keys().filter(|key| !before.contains_key(*key)));
        Ok(all.filter(|key| before.get(*key) != after.get(*key)).cloned().collect())
    }
}

registry! {
    Disk => block::Config,
    Pmem => pmem::Config,
    Net => net::Config,
    Rng => rng::Config,
    Vsock => vsock::Config,
    Balloon => balloon::Config,
    Console => console::Config,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn patch(text: &str, patch: Value) -> Result<Update, String> {
        let kind = KINDS.iter().find(|kind| kind.name == "rng").unwrap();
        let config = (kind.parse)(text).unwrap();
        let Value::Object(patch) = patch else { panic!("an object") };
        config.patched(&patch).map_err(|error| error.to_string())
    }

    #[test]
    fn a_patch_changes_what_it_names() {
        let update = patch("bandwidth=1M/1s", json!({"ops": "10/1s"})).unwrap();
        assert_eq!((update.limits, update.device), (true, false));
        let limits = update.config.limits();
        assert!(limits[0].bandwidth.is_some() && limits[0].ops.is_some());
        let update = patch("bandwidth=1M/1s", json!({"bandwidth": null})).unwrap();
        assert_eq!(update.config.limits(), [Limits::default()]);
        let same = patch("bandwidth=1M/1s", json!({"bandwidth": "1024K/1000ms"})).unwrap();
        assert_eq!((same.limits, same.device), (false, false));
    }

    #[test]
    fn what_cannot_change_is_refused_by_name() {
        for (value, want) in [
            (json!({"nonsense": 1}), "rng: unknown field `nonsense`"),
            (json!({"bandwidth": "much"}), "'much' is not a limit; write SIZE/TIME[+BURST]"),
        ] {
            let error = patch("", value).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
    }
}
