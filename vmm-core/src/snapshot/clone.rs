//! What a restored machine has of its own: the generation id, the note for its guest, and what of its configuration may
//! differ from its parent's.

use std::fmt;
use std::io;
use std::str::FromStr;

use devices::legacy::boot::Note;
use devices::registry::DeviceConfig;

use super::random;
use crate::config::VmConfig;

/// A VM generation id. No two machines have the same, and one that goes on from a snapshot has a new one.
pub(crate) type GenerationId = [u8; 16];

/// What the operator wants a clone to be that its parent is not. Our own init reads it when the clone goes on; a guest that
/// has another one is as before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Persona {
    /// Its host name.
    pub hostname: Option<Hostname>,
    /// Its /etc/machine-id.
    pub machine_id: Option<MachineId>,
    /// Its wall clock is the host's: a guest whose own is off by more than a millisecond sets it.
    pub wall_clock: bool,
}

impl Default for Persona {
    fn default() -> Self {
        Self { hostname: None, machine_id: None, wall_clock: true }
    }
}

/// A host name, as Linux and RFC 1123 take it: 1 to 64 letters, digits, hyphens and dots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hostname(String);

impl FromStr for Hostname {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = |label: &str| {
            let plain = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
            plain && !label.is_empty() && !label.starts_with('-') && !label.ends_with('-')
        };
        match text.len() <= 64 && text.split('.').all(fits) {
            true => Ok(Self(text.into())),
            false => Err(format!(
                "'{text}' is no host name; give up to 64 letters, digits, '-' and '.' between them"
            )),
        }
    }
}

impl fmt::Display for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A machine id (machine-id(5)): 128 bits that are not all zero, written as 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineId(u128);

impl MachineId {
    /// A new one, of version 4 (RFC 9562).
    pub fn random() -> io::Result<Self> {
        let bits = u128::from_be_bytes(random::<16>()?);
        const VERSION: u128 = 0xf << 76;
        const VARIANT: u128 = 3 << 62;
        Ok(Self(bits & !(VERSION | VARIANT) | 4 << 76 | 2 << 62))
    }
}

impl FromStr for MachineId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let bits = u128::from_str_radix(text, 16).ok().filter(|bits| digits && *bits != 0);
        bits.map(Self).ok_or_else(|| {
            format!("'{text}' is no machine id; give 32 hexadecimal digits that are not all 0")
        })
    }
}

impl fmt::Display for MachineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Persona {
    /// The note for a clone whose configuration was `parent`, and is `clone`. 32 random bytes for its random pool are in
    /// every one.
    pub(crate) fn note(&self, parent: &VmConfig, clone: &VmConfig) -> io::Result<Note> {
        let seed = random::<32>()?.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = |value: &dyn fmt::Display| value.to_string();
        let names = [
            ("seed", Some(seed)),
            ("hostname", self.hostname.as_ref().map(|name| text(name))),
            ("machine-id", self.machine_id.as_ref().map(|id| text(id))),
        ];
        let names = names.into_iter().filter_map(|(key, value)| Some((key, value?)));
        let macs =
            parent.devices.iter().map(DeviceConfig::mac).zip(clone.devices.iter().map(DeviceConfig::mac));
        let macs = macs.filter_map(|(old, new)| Some((old?, new?))).filter(|(old, new)| old != new);
        let macs = macs.map(|(old, new)| ("mac", format!("{old} {new}")));
        let lines = names.chain(macs).map(|(key, value)| format!("{key}={value}\n")).collect();
        Ok(Note { lines, time: self.wall_clock })
    }
}

/// What cannot be another in a clone, because its guest has seen it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unlike {
    /// A property of the machine.
    #[error(
        "the guest in the snapshot has {what} {saved}, and cannot go on with {found}; leave that as it is"
    )]
    Machine {
        /// Which.
        what: &'static str,
        /// In the snapshot.
        saved: String,
        /// What was asked for.
        found: String,
    },
    /// A property of a device.
    #[error(
        "the guest in the snapshot has seen {key} of {device}, which cannot change now; leave that as it is"
    )]
    Device {
        /// The device's name.
        device: String,
        /// Which.
        key: String,
    },
}

/// What a guest knows of its machine.
fn properties(config: &VmConfig) -> [(&'static str, String); 5] {
    let devices = config.device_names().into_iter().zip(&config.devices);
    let devices: Vec<String> = devices.map(|(name, device)| format!("{name} ({})", device.kind())).collect();
    let devices = if devices.is_empty() { "none".into() } else { devices.join(", ") };
    [
        ("vCPUs:", config.cpus.to_string()),
        ("the processor profile", config.cpu_profile.to_string()),
        ("memory:", config.memory.to_string()),
        ("the transport", format!("{:?}", config.transport).to_lowercase()),
        ("the devices", devices),
    ]
}

/// Checks that a guest that has run on `parent` can go on on `clone`.
pub(crate) fn check(parent: &VmConfig, clone: &VmConfig) -> Result<(), Unlike> {
    for ((what, saved), (_, found)) in properties(parent).into_iter().zip(properties(clone)) {
        if saved != found {
            return Err(Unlike::Machine { what, saved, found });
        }
    }
    let pairs = parent.devices.iter().zip(&clone.devices).zip(parent.device_names());
    let mut seen = pairs.filter_map(|((old, new), device)| {
        old.differs_to_guest(new).map(|key| Unlike::Device { device, key })
    });
    seen.next().map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use devices::registry::KINDS;
    use devices::size::ByteSize;

    use super::*;
    use crate::config::{CpuProfile, Transport};

    fn with(devices: &[(&str, &str)]) -> VmConfig {
        let device = |(kind, text): &(&str, &str)| {
            let kind = KINDS.iter().find(|known| known.name == *kind).unwrap();
            (kind.parse)(text).unwrap()
        };
        VmConfig {
            kernel: Some("vmlinux".into()),
            devices: devices.iter().map(device).collect(),
            ..VmConfig::default()
        }
    }

    #[test]
    fn what_a_guest_has_seen_stays() {
        let parent = with(&[("disk", "a"), ("net", "tap=t0")]);
        let cases = [
            (VmConfig { cpus: 2, ..parent.clone() }, "has vCPUs: 1, and cannot go on with 2"),
            (
                VmConfig { memory: ByteSize(1 << 30), ..parent.clone() },
                "has memory: 256M, and cannot go on with 1G",
            ),
            (
                VmConfig { cpu_profile: CpuProfile::named("v2").unwrap(), ..parent.clone() },
                "has the processor profile host, and cannot go on with v2",
            ),
            (
                VmConfig { transport: Transport::Pci, ..parent.clone() },
                "has the transport mmio, and cannot go on with pci",
            ),
            (
                with(&[("disk", "a")]),
                "has the devices disk0 (disk), net0 (net), and cannot go on with disk0 (disk);",
            ),
            (with(&[]), "cannot go on with none"),
            (with(&[("net", "tap=t0"), ("disk", "a")]), "cannot go on with net0 (net), disk0 (disk)"),
            (with(&[("disk", "a,id=x"), ("net", "tap=t0")]), "cannot go on with x (disk), net0 (net)"),
            (with(&[("disk", "a,ro"), ("net", "tap=t0")]), "has seen ro of disk0,"),
            (with(&[("disk", "a,queues=2"), ("net", "tap=t0")]), "has seen queues of disk0,"),
            (with(&[("disk", "a"), ("net", "tap=t0,mtu=1400")]), "has seen mtu of net0,"),
        ];
        for (clone, want) in cases {
            let error = check(&parent, &clone).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn what_is_the_hosts_may_change() {
        let parent = with(&[("disk", "a"), ("net", "tap=t0"), ("vsock", "v"), ("console", "null")]);
        let clone = with(&[
            ("disk", "b,bandwidth=1M/1s,engine=threads"),
            ("net", "user,mac=02:00:00:00:00:01,tx_ops=9/1s"),
            ("vsock", "w,cid=9"),
            ("console", "pty"),
        ]);
        assert_eq!(check(&parent, &clone), Ok(()));
        assert_eq!(check(&parent, &VmConfig { track_dirty: true, kernel: None, ..clone }), Ok(()));
    }

    #[test]
    fn a_note_says_what_is_new() {
        let mut parent = with(&[("disk", "a"), ("net", "tap=t0"), ("net", "tap=t1,mac=02:00:00:00:00:01")]);
        let note = |persona: &Persona, clone: &VmConfig| persona.note(&parent, clone).unwrap();
        let plain = [note(&Persona::default(), &parent), note(&Persona::default(), &parent)];
        assert_ne!(plain[0], plain[1], "a seed is for one clone");
        assert!(plain[0].time && plain[0].lines.starts_with("seed=") && plain[0].lines.len() == 5 + 64 + 1);

        let persona = Persona {
            hostname: Some("web-1.example".parse().unwrap()),
            machine_id: Some("0123456789abcdef0123456789ABCDEF".parse().unwrap()),
            wall_clock: false,
        };
        let clone = with(&[("disk", "a"), ("net", "tap=t2"), ("net", "tap=t3,mac=02:00:00:00:00:02")]);
        let Note { lines, time } = note(&persona, &clone);
        let old = parent.devices[1].mac().unwrap();
        let new = clone.devices[1].mac().unwrap();
        let want = format!(
            "hostname=web-1.example\nmachine-id=0123456789abcdef0123456789abcdef\nmac={old} {new}\n\
             mac=02:00:00:00:00:01 02:00:00:00:00:02\n"
        );
        assert_eq!((lines.split_once('\n').unwrap().1, time), (&want[..], false));

        // What is written into a snapshot follows from no name of the host's.
        parent.devices.iter_mut().for_each(DeviceConfig::pin);
        let mut moved = parent.clone();
        moved.devices[1] =
            serde_json::from_value(serde_json::json!({"kind": "net", "tap": "t9", "mac": old.to_string()}))
                .unwrap();
        assert!(!Persona::default().note(&parent, &moved).unwrap().lines.contains("mac="));
        assert_eq!(
            parent.devices[1],
            serde_json::from_value(serde_json::json!({"kind": "net", "tap": "t0", "mac": old.to_string()}))
                .unwrap()
        );
    }

    #[test]
    fn a_snapshot_keeps_no_metadata() {
        let net = |data: serde_json::Value| -> DeviceConfig {
            let text =
                serde_json::json!({"kind": "net", "fd": [7], "metadata": {"data": data, "version": "V2"}});
            serde_json::from_value(text).unwrap()
        };
        let (mut saved, empty) =
            (net(serde_json::json!({"password": "hunter2"})), net(serde_json::json!({})));
        saved.pin();
        assert_eq!(saved, empty);
        let with = |device| VmConfig { devices: vec![device], ..VmConfig::default() };
        assert_eq!(check(&with(empty), &with(net(serde_json::json!({"its": "own"})))), Ok(()));
    }

    #[test]
    fn names_and_ids_are_checked() {
        for name in ["a", "web-1.example", &"x".repeat(64)] {
            assert_eq!(name.parse::<Hostname>().unwrap().to_string(), name);
        }
        for name in ["", "-a", "a-", "a..b", ".a", "a_b", "a b", "a\nb", "a=b", "\u{e4}", &"x".repeat(65)] {
            assert!(name.parse::<Hostname>().is_err(), "{name}");
        }
        for id in
            ["", "0", &"0".repeat(32), &"g".repeat(32), &"1".repeat(33), "+1234567890123456789012345678901"]
        {
            assert!(id.parse::<MachineId>().is_err(), "{id}");
        }
        let ids = [MachineId::random().unwrap(), MachineId::random().unwrap()];
        assert_ne!(ids[0], ids[1]);
        let text = ids[0].to_string();
        assert_eq!((text.parse(), text.len(), &text[12..13]), (Ok(ids[0]), 32, "4"));
        assert!(matches!(&text[16..17], "8" | "9" | "a" | "b"), "{text}");
    }
}
