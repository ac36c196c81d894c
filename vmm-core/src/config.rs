//! What a machine is: plain data, the same for command line, configuration file, API and snapshot manifest.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use devices::params::is_default;
use devices::registry::DeviceConfig;
use devices::size::ByteSize;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::memory::{Backing, HUGE_PAGE, HugePages};
pub use crate::x86_64::kernel::BootProtocol;
pub use crate::x86_64::profile::CpuProfile;
use crate::x86_64::{Slots, layout};

/// RAM of a machine that does not say.
pub const DEFAULT_MEMORY: ByteSize = ByteSize(256 << 20);

/// Kernel command line of a machine that does not say: serial console, few messages, and a guest that ends
/// (instead of hanging) when it panics or reboots.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 quiet reboot=t panic=-1";

/// A machine, before it is built.
///
/// Configuration files have the same form; what is not said is as in [`VmConfig::default`].
///
/// ```
/// use vmm_core::VmConfig;
/// use vmm_core::devices::size::ByteSize;
///
/// let text = r#"{"kernel": "vmlinux", "memory": "1G", "devices": [{"kind": "disk", "path": "root.img", "root": true}]}"#;
/// let config: VmConfig = serde_json::from_str(text)?;
/// assert_eq!((config.cpus, config.memory), (1, ByteSize(1 << 30)));
/// assert_eq!(config.device_names(), ["disk0"]);
/// config.validate()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// Kernel: an ELF vmlinux or a bzImage. [`crate::Vm`] needs one; the command fills in its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line in place of [`DEFAULT_CMDLINE`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// What to add to the kernel command line. After a word `--` it goes to the guest's init.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub append: Option<String>,
    /// How the kernel is entered.
    pub boot_protocol: BootProtocol,
    /// How the guest reaches its virtio devices.
    pub transport: Transport,
    /// Number of vCPUs, 1 to 32.
    pub cpus: u8,
    /// Features of the host's processor that the guest sees.
    #[serde(skip_serializing_if = "is_default")]
    pub cpu_profile: CpuProfile,
    /// RAM, in whole pages of 4 KiB. What lies beyond the MMIO gap goes above 4 GiB.
    pub memory: ByteSize,
    /// Which pages of the host's the RAM is made of.
    pub hugepages: HugePages,
    /// All of the RAM is taken from the host before the guest starts.
    pub mem_prealloc: bool,
    /// The RAM is in a memfd, so that it can be shared with another process.
    pub mem_shared: bool,
    /// What the guest writes to its RAM is tracked, so that a snapshot can be a difference to the one before it.
    pub track_dirty: bool,
    /// Where the guest's console goes.
    pub serial: SerialConfig,
    /// Virtio devices, in the order in which the guest finds them.
    pub devices: Vec<DeviceConfig>,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            kernel: None,
            initrd: None,
            cmdline: None,
            append: None,
            boot_protocol: BootProtocol::default(),
            transport: Transport::default(),
            cpus: 1,
            cpu_profile: CpuProfile::default(),
            memory: DEFAULT_MEMORY,
            hugepages: HugePages::default(),
            mem_prealloc: false,
            mem_shared: false,
            track_dirty: false,
            serial: SerialConfig::default(),
            devices: Vec::new(),
        }
    }
}

/// How a guest reaches its virtio devices.
///
/// ```
/// use vmm_core::{VmConfig, config::Transport};
///
/// let config = VmConfig { transport: Transport::Pci, ..VmConfig::default() };
/// assert_eq!(serde_json::to_value(&config).unwrap()["transport"], "pci");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Registers in memory: fewest exits until the guest is up.
    #[default]
    Mmio,
    /// PCI with MSI-X: no exits to take an interrupt, and more devices.
    Pci,
}

impl Transport {
    /// What to do about too few places.
    fn more(self) -> String {
        match self {
            Self::Mmio => format!(", and {} on PCI", Slots::max(Self::Pci)),
            Self::Pci => String::new(),
        }
    }
}

/// Where the guest's first serial port goes. Written as `stdio`, `null` or `file=PATH`.
///
/// ```
/// use vmm_core::config::SerialConfig;
///
/// assert_eq!("file=guest.log".parse(), Ok(SerialConfig::File("guest.log".into())));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialConfig {
    /// To whoever runs the machine: the command's terminal, or [`crate::Vm::take_console`].
    #[default]
    Stdio,
    /// Nowhere.
    Null,
    /// To a file, of which at most [`devices::log_file::MAX`] bytes are written.
    File(PathBuf),
}

impl FromStr for SerialConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.split_once('=')) {
            ("stdio", _) => Ok(Self::Stdio),
            ("null", _) => Ok(Self::Null),
            (_, Some(("file", path))) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(format!("'{text}' is no serial port; use stdio, null or file=PATH")),
        }
    }
}

impl fmt::Display for SerialConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::Null => f.write_str("null"),
            Self::File(path) => write!(f, "file={}", path.display()),
        }
    }
}

impl Serialize for SerialConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SerialConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A configuration that no machine can be built from: a sentence for the operator.
///
/// ```
/// use vmm_core::VmConfig;
///
/// let error = VmConfig::default().validate().unwrap_err();
/// assert_eq!(error.to_string(), "no kernel is given; name one");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No kernel is given.
    #[error("no kernel is given; name one")]
    NoKernel,
    /// Number of vCPUs out of range.
    #[error("{cpus} vCPUs are not possible; give it 1 to {max}", max = layout::MAX_CPUS)]
    Cpus {
        /// Number asked for.
        cpus: u8,
    },
    /// RAM out of range.
    #[error("{memory} of memory are not possible; give it {min} to {max}, in multiples of 4K",
        min = ByteSize(layout::MIN_RAM), max = ByteSize(layout::MAX_RAM))]
    Memory {
        /// Size asked for.
        memory: ByteSize,
    },
    /// RAM that huge pages cannot make up.
    #[error("{memory} of memory are not possible with huge pages; give it a multiple of 2M")]
    HugePages {
        /// Size asked for.
        memory: ByteSize,
    },
    /// The command line is too long or has control characters.
    #[error("the kernel command line {problem}")]
    Cmdline {
        /// What is wrong and what is allowed.
        problem: String,
    },
    /// Two devices have one name.
    #[error("two devices are named '{name}'; give one of them another id")]
    DeviceName {
        /// The name.
        name: String,
    },
    /// More than one device of a kind of which a guest takes one.
    #[error("a Linux guest takes one {kind} device; leave the others out")]
    Single {
        /// The kind.
        kind: &'static str,
    },
    /// Two devices have the root file system.
    #[error("both '{first}' and '{second}' are to be the root file system; leave root out of one")]
    Roots {
        /// Name of one device.
        first: String,
        /// Name of the other.
        second: String,
    },
    /// More devices than places.
    #[error("{count} devices are too many; {max} is the limit{remedy}", max = Slots::max(*transport),
        remedy = transport.more())]
    TooManyDevices {
        /// Number of devices.
        count: usize,
        /// Where they would have been.
        transport: Transport,
    },
}

impl VmConfig {
    /// Checks everything that can be checked without opening anything.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(1..=layout::MAX_CPUS).contains(&self.cpus) {
            return Err(ConfigError::Cpus { cpus: self.cpus });
        }
        let bytes = self.memory.0;
        if !(layout::MIN_RAM..=layout::MAX_RAM).contains(&bytes) || !bytes.is_multiple_of(4096) {
            return Err(ConfigError::Memory { memory: self.memory });
        }
        if self.hugepages == HugePages::Reserved && !bytes.is_multiple_of(HUGE_PAGE) {
            return Err(ConfigError::HugePages { memory: self.memory });
        }
        if self.devices.len() > Slots::max(self.transport) {
            let (count, transport) = (self.devices.len(), self.transport);
            return Err(ConfigError::TooManyDevices { count, transport });
        }
        let names = self.device_names();
        if let Some(name) =
            names.iter().enumerate().find_map(|(i, name)| names[..i].contains(name).then_some(name))
        {
            return Err(ConfigError::DeviceName { name: name.clone() });
        }
        let more = self.devices.iter().enumerate().find(|&(i, device)| device.is_single() && self.nth(i) > 0);
        if let Some((_, device)) = more {
            return Err(ConfigError::Single { kind: device.kind() });
        }
        let mut roots = self.devices.iter().zip(names).filter(|(device, _)| device.is_root());
        if let (Some((_, first)), Some((_, second))) = (roots.next(), roots.next()) {
            return Err(ConfigError::Roots { first, second });
        }
        self.kernel_command_line(&[])?;
        // Last, so that this error says that all else is right.
        self.kernel.as_ref().map(|_| ()).ok_or(ConfigError::NoKernel)
    }

    /// How the RAM is kept on the host.
    pub fn backing(&self) -> Backing {
        Backing { huge_pages: self.hugepages, shared: self.mem_shared }
    }

    /// What each device is called: its id, or its kind and its number among those of its kind, such as `disk0`.
    pub fn device_names(&self) -> Vec<String> {
        let name = |(i, device): (usize, &DeviceConfig)| match device.id() {
            Some(id) => id.to_owned(),
            None => format!("{}{}", device.kind(), self.nth(i)),
        };
        self.devices.iter().enumerate().map(name).collect()
    }

    /// How many devices of its kind are before device `i`.
    pub(crate) fn nth(&self, i: usize) -> usize {
        self.devices[..i].iter().filter(|other| other.kind() == self.devices[i].kind()).count()
    }

    /// The kernel command line of this machine: base, then `parameters` (those of the machine and of its devices), then
    /// [`Self::append`].
    pub fn kernel_command_line(&self, parameters: &[String]) -> Result<String, ConfigError> {
        let base = self.cmdline.as_deref().unwrap_or(DEFAULT_CMDLINE);
        // Parameters go before the arguments of init.
        let (base, base_args) = split_command_line(base);
        let (append, append_args) = split_command_line(self.append.as_deref().unwrap_or_default());
        let init_args = base_args.or(append_args);
        let more = init_args.is_some_and(|args| split_command_line(args).1.is_some());
        if more || base_args.and(append_args).is_some() {
            let problem = "has more than one '--' before arguments of init; leave one in".into();
            return Err(ConfigError::Cmdline { problem });
        }
        let mut words = vec![base.trim().to_owned()];
        words.extend(parameters.iter().cloned());
        words.push(append.trim().to_owned());
        words.extend(init_args.filter(|args| !args.is_empty()).map(|args| format!("-- {args}")));
        words.retain(|word| !word.is_empty());
        let line = words.join(" ");
        let problem = if line.len() >= layout::CMDLINE_MAX {
            format!("has {} bytes; {} is the limit", line.len(), layout::CMDLINE_MAX - 1)
        } else if line.contains(['\0', '\n', '\r']) {
            "has a line break or a NUL in it; leave it out".into()
        } else {
            return Ok(line);
        };
        Err(ConfigError::Cmdline { problem })
    }
}

/// Splits a kernel command line at its first word `--`: the kernel's parameters, and the arguments of init if there
/// is such a word. Words are what Linux' `next_arg` (lib/cmdline.c) makes of it: white space in double quotes does
/// not end one, and quotes around a whole word do not belong to it.
///
/// ```
/// use vmm_core::config::split_command_line;
///
/// assert_eq!(split_command_line("quiet -- sh -c ls"), ("quiet ", Some("sh -c ls")));
/// assert_eq!(split_command_line("quiet"), ("quiet", None));
/// ```
pub fn split_command_line(line: &str) -> (&str, Option<&str>) {
    let (mut start, mut quoted) = (0, false);
    // Bytes, as in Linux, to which 0xa0 is white space even inside of a character. No `--` is.
    for (at, byte) in line.bytes().chain([b' ']).enumerate() {
        quoted ^= byte == b'"';
        let space = matches!(byte, b'\t'..=b'\r' | b' ' | 0xa0);
        if at < line.len() && (!space || quoted) {
            continue;
        }
        if matches!(&line.as_bytes()[start..at], b"--" | b"\"--\"") {
            return (&line[..start], Some(line[at..].trim()));
        }
        start = at + 1;
    }
    (line, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig { kernel: Some("vmlinux".into()), ..VmConfig::default() }
    }

    #[test]
    fn limits_are_checked() {
        assert_eq!(config().validate(), Ok(()));
        let cases = [
            (VmConfig::default(), "no kernel is given; name one"),
            (VmConfig { cpus: 0, ..config() }, "0 vCPUs are not possible; give it 1 to 32"),
            (VmConfig { cpus: 33, ..config() }, "33 vCPUs are not possible; give it 1 to 32"),
            (
                VmConfig { memory: ByteSize(1 << 20), ..config() },
                "1M of memory are not possible; give it 4M to 1T, in multiples of 4K",
            ),
            (
                VmConfig { memory: ByteSize(33 << 20), hugepages: HugePages::Reserved, ..config() },
                "33M of memory are not possible with huge pages; give it a multiple of 2M",
            ),
            (
                VmConfig { append: Some("x".repeat(2048)), ..config() },
                "the kernel command line has 2086 bytes; 2047 is the limit",
            ),
        ];
        for (config, want) in cases {
            assert_eq!(config.validate().unwrap_err().to_string(), want);
        }
    }

    #[test]
    fn parameters_go_before_the_arguments_of_init() {
        let config = VmConfig {
            cmdline: Some("console=ttyS0 -- sh".into()),
            append: Some("quiet".into()),
            ..config()
        };
        let line = config.kernel_command_line(&["virtio_mmio.device=4K@0xd0000000:5".into()]).unwrap();
        assert_eq!(line, "console=ttyS0 virtio_mmio.device=4K@0xd0000000:5 quiet -- sh");
        for (cmdline, append, want) in [
            ("a --", "b", Ok("a D b")),
            ("a", "b -- c  d", Ok("a D b -- c  d")),
            ("-- c", "", Ok("D -- c")),
            ("x=\"1 -- 2\"", "b -- c", Ok("x=\"1 -- 2\" D b -- c")),
            ("a -- \"b -- c\"", "", Ok("a D -- \"b -- c\"")),
            ("a -- b", "-- c", Err(())),
            ("a -- b -- c", "", Err(())),
        ] {
            let config = VmConfig {
                cmdline: Some(cmdline.into()),
                append: Some(append.into()),
                ..VmConfig::default()
            };
            let line = config.kernel_command_line(&["D".into()]);
            let line =
                line.map_err(|error| assert!(error.to_string().contains("more than one '--'"), "{error}"));
            assert_eq!(
                line.as_deref(),
                want.as_ref().map(|line| *line).map_err(|()| &()),
                "{cmdline} {append}"
            );
        }
    }

    #[test]
    fn command_lines_are_split_where_the_kernel_splits_them() {
        for (line, want) in [
            ("", ("", None)),
            ("quiet", ("quiet", None)),
            ("quiet -- sh -c", ("quiet ", Some("sh -c"))),
            ("-- sh", ("", Some("sh"))),
            ("quiet --", ("quiet ", Some(""))),
            ("quiet\t--\u{b}sh", ("quiet\t", Some("sh"))),
            ("\"--\" sh", ("", Some("sh"))),
            ("x=\"a -- b\"", ("x=\"a -- b\"", None)),
            ("\"a -- b\" -- c -- d", ("\"a -- b\" ", Some("c -- d"))),
            ("a--b --c d-- --=e", ("a--b --c d-- --=e", None)),
            ("x=\"a -- b", ("x=\"a -- b", None)),
            ("\u{e0}-- \u{e0} --", ("\u{e0}", Some("\u{e0} --"))),
        ] {
            assert_eq!(split_command_line(line), want, "{line}");
        }
    }

    #[test]
    fn serial_round_trips() {
        for text in ["stdio", "null", "file=/tmp/a=b"] {
            assert_eq!(text.parse::<SerialConfig>().unwrap().to_string(), text);
        }
        for text in ["", "file=", "tty", "stdio,x"] {
            assert!(text.parse::<SerialConfig>().is_err(), "{text}");
        }
    }
}
