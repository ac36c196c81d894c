//! From what Firecracker's clients say to a machine's configuration.

use std::collections::HashMap;

use serde_json::{Map, Value};
use vmm_core::VmConfig;
use vmm_core::config::{SerialConfig, Transport};
use vmm_core::devices::registry::{DeviceConfig, Patch};
use vmm_core::devices::size::ByteSize;
use vmm_core::devices::throttle;
use vmm_core::devices::virtio::net::mmds::{Metadata, Version};
use vmm_core::devices::virtio::{balloon, block, net, pmem, rng, vsock};
use vmm_core::memory::HugePages;

use super::Aliases;
use super::types::{
    Balloon, BootSource, CacheType, Drive, Entropy, FullConfiguration, HugePages as FirecrackerPages,
    IoEngine, MachineConfiguration, MmdsConfig, MmdsContents, MmdsVersion, NetworkInterface, Pmem,
    RateLimiter, Serial, TokenBucket, Vsock,
};

/// What the guest's kernel gets from a client that gives it no command line: a guest that ends instead of hanging.
const BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd";

/// A machine, and what its devices are called in the API, in their order.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// The machine.
    pub config: VmConfig,
    /// For each device its name in the API, if it has one there.
    pub ids: Vec<Option<String>>,
}

impl FullConfiguration {
    /// The machine that this describes, with this metadata; an error is a sentence for the client.
    pub fn machine(&self, transport: Transport, contents: &MmdsContents) -> Result<Machine, String> {
        let boot = self
            .boot_source
            .as_ref()
            .ok_or("Cannot start the machine without a kernel; PUT /boot-source first.")?;
        let mut append = Vec::new();
        let mut devices: Vec<(Option<String>, DeviceConfig)> = Vec::new();
        // As Firecracker has it: the root disk is the first.
        let (root, others): (Vec<&Drive>, Vec<&Drive>) =
            self.drives.iter().partition(|drive| drive.is_root_device);
        for drive in root.into_iter().chain(others) {
            devices.push((Some(drive.drive_id.clone()), DeviceConfig::Disk(disk(drive)?)));
            append.extend(drive.root_partition().map(|id| format!("root=PARTUUID={id} {}", drive.mode())));
        }
        for memory in &self.pmem {
            devices.push((Some(memory.id.clone()), DeviceConfig::Pmem(memory.device())));
        }
        self.mmds_config.as_ref().map_or(Ok(()), |mmds| mmds.check(&self.network_interfaces))?;
        for interface in &self.network_interfaces {
            let allowed = |mmds: &&MmdsConfig| mmds.network_interfaces.contains(&interface.iface_id);
            let metadata = self.mmds_config.as_ref().filter(allowed).map(|mmds| mmds.metadata(contents));
            let config = net::Config { metadata, ..network(interface)? };
            devices.push((Some(interface.iface_id.clone()), DeviceConfig::Net(config)));
        }
        if let Some(vsock) = &self.vsock {
            let (path, cid) = (vsock.uds_path.clone(), vsock.guest_cid);
            devices
                .push((None, DeviceConfig::Vsock(vsock::Config { path, cid, bandwidth: None, ops: None })));
        }
        if let Some(balloon) = &self.balloon {
            devices.push((None, DeviceConfig::Balloon(balloon.device()?)));
        }
        if let Some(entropy) = &self.entropy {
            let throttle::Limits { bandwidth, ops } = limits(entropy.rate_limiter);
            devices.push((None, DeviceConfig::Rng(rng::Config { bandwidth, ops })));
        }
        let (ids, devices) = devices.into_iter().unzip();
        let machine = &self.machine_config;
        let console = self.serial.as_ref().and_then(|serial| serial.serial_out_path.clone());
        let config = VmConfig {
            kernel: Some(boot.kernel_image_path.clone()),
            initrd: boot.initrd_path.clone(),
            cmdline: Some(boot.boot_args.clone().unwrap_or_else(|| BOOT_ARGS.into())),
            append: (!append.is_empty()).then(|| append.join(" ")),
            transport,
            cpus: machine.vcpu_count,
            memory: mebibytes(machine.mem_size_mib)?,
            hugepages: machine.huge_pages.backing(),
            track_dirty: machine.track_dirty_pages,
            serial: console.map_or(SerialConfig::Stdio, SerialConfig::File),
            devices,
            ..VmConfig::default()
        };
        Ok(Machine { config, ids })
    }
}

impl FirecrackerPages {
    /// As the machine has it.
    pub fn backing(self) -> HugePages {
        match self {
            Self::None => HugePages::No,
            Self::Transparent => HugePages::Transparent,
            Self::TwoMib => HugePages::Reserved,
        }
    }

    fn of(pages: HugePages) -> Self {
        match pages {
            HugePages::No => Self::None,
            HugePages::Transparent => Self::Transparent,
            HugePages::Reserved => Self::TwoMib,
        }
    }
}

impl Drive {
    fn root_partition(&self) -> Option<&str> {
        self.partuuid.as_deref().filter(|_| self.is_root_device)
    }

    fn mode(&self) -> &'static str {
        if self.is_read_only == Some(true) { "ro" } else { "rw" }
    }
}

/// MiB as bytes.
pub fn mebibytes(mib: u64) -> Result<ByteSize, String> {
    mib.checked_mul(1 << 20).map(ByteSize).ok_or(format!("{mib} MiB are more than there can be."))
}

fn disk(drive: &Drive) -> Result<block::Config, String> {
    let id = &drive.drive_id;
    if drive.socket.is_some() {
        return Err(format!("Drive {id}: vhost-user (socket) is not supported; give path_on_host."));
    }
    let path = drive.path_on_host.as_ref().ok_or(format!("Drive {id} has no path_on_host."))?;
    let throttle::Limits { bandwidth, ops } = limits(drive.rate_limiter);
    Ok(block::Config {
        ro: drive.is_read_only == Some(true),
        cache: match drive.cache_type {
            CacheType::Unsafe => block::Cache::Unsafe,
            CacheType::Writeback => block::Cache::Writeback,
        },
        engine: match drive.io_engine {
            // Which is not ordered by name: whatever is best here.
            IoEngine::Sync => block::EngineKind::Auto,
            IoEngine::Async => block::EngineKind::IoUring,
        },
        queues: Some(1),
        bandwidth,
        ops,
        root: drive.is_root_device && drive.partuuid.is_none(),
        ..block::Config::new(path)
    })
}

fn network(interface: &NetworkInterface) -> Result<net::Config, String> {
    let mac = interface.guest_mac.as_deref().map(str::parse).transpose();
    let (rx, tx) = (limits(interface.rx_rate_limiter), limits(interface.tx_rate_limiter));
    Ok(net::Config {
        tap: Some(net::TapChoice::Named(interface.host_dev_name.clone())),
        mac: mac.map_err(|error| format!("Interface {}: {error}.", interface.iface_id))?,
        mtu: interface.mtu,
        rx_bandwidth: rx.bandwidth,
        rx_ops: rx.ops,
        tx_bandwidth: tx.bandwidth,
        tx_ops: tx.ops,
        ..net::Config::default()
    })
}

impl MmdsConfig {
    /// Checks that these interfaces can serve it; an error is a sentence.
    pub fn check(&self, interfaces: &[NetworkInterface]) -> Result<(), String> {
        if self.network_interfaces.is_empty() {
            return Err(
                "network_interfaces is empty; name an interface that metadata is asked for by.".into()
            );
        }
        for id in &self.network_interfaces {
            if !interfaces.iter().any(|interface| interface.iface_id == *id) {
                return Err(format!("There is no network interface '{id}'; PUT it first."));
            }
        }
        let checked = self.metadata(&MmdsContents::default()).checked();
        checked.map(drop).map_err(|sentence| format!("ipv4_address: {sentence}."))
    }

    /// What an interface has of it, with these contents.
    fn metadata(&self, contents: &MmdsContents) -> Metadata {
        Metadata {
            data: contents.0.clone(),
            version: match self.version {
                MmdsVersion::V1 => Version::V1,
                MmdsVersion::V2 => Version::V2,
            },
            address: self.ipv4_address,
            imds_compat: self.imds_compat,
        }
    }

    /// What interfaces of these names say of it.
    fn of(metadata: &Metadata, network_interfaces: Vec<String>) -> Self {
        Self {
            network_interfaces,
            version: match metadata.version {
                Version::V1 => MmdsVersion::V1,
                Version::V2 => MmdsVersion::V2,
            },
            ipv4_address: metadata.address,
            imds_compat: metadata.imds_compat,
        }
    }
}

impl MmdsContents {
    /// What the guest of this machine can ask for, if anything.
    pub fn of(config: &VmConfig) -> Option<Self> {
        config.devices.iter().find_map(metadata_of).map(|metadata| Self(metadata.data.clone()))
    }

    /// What changes these contents into `self`: for each interface of this machine that has metadata, by its name.
    pub fn patches(&self, config: &VmConfig) -> Vec<(String, Patch)> {
        let with = |metadata: &Metadata| Metadata { data: self.0.clone(), ..metadata.clone() };
        let patch = |metadata| {
            // What was read from JSON can be written.
            let value = serde_json::to_value(with(metadata)).unwrap_or_default();
            Patch::from_iter([("metadata".to_owned(), value)])
        };
        let named = config.devices.iter().zip(config.device_names());
        named.filter_map(|(device, name)| Some((name, patch(metadata_of(device)?)))).collect()
    }

    /// Puts these contents wherever this machine has metadata.
    pub fn give_to(&self, config: &mut VmConfig) {
        for device in &mut config.devices {
            if let DeviceConfig::Net(net::Config { metadata: Some(metadata), .. }) = device {
                metadata.data.clone_from(&self.0);
            }
        }
    }

    /// Changes these contents as RFC 7396 has it: what is null goes, objects are merged, and all else is replaced.
    pub fn merge(&mut self, patch: Self) {
        merge(&mut self.0, patch.0);
    }
}

fn metadata_of(device: &DeviceConfig) -> Option<&Metadata> {
    match device {
        DeviceConfig::Net(net) => net.metadata.as_ref(),
        _ => None,
    }
}

fn merge(target: &mut Map<String, Value>, patch: Map<String, Value>) {
    for (key, value) in patch {
        match (value, target.get_mut(&key)) {
            (Value::Null, _) => _ = target.remove(&key),
            (Value::Object(patch), Some(Value::Object(target))) => merge(target, patch),
            (Value::Object(patch), _) => {
                // Also in what is new, null is nothing.
                let mut new = Map::new();
                merge(&mut new, patch);
                target.insert(key, new.into());
            }
            (value, _) => _ = target.insert(key, value),
        }
    }
}

impl Pmem {
    fn device(&self) -> pmem::Config {
        pmem::Config {
            path: self.path_on_host.clone(),
            ro: self.read_only,
            private: false,
            ops: limits(self.rate_limiter).ops,
            id: None,
            root: self.root_device,
        }
    }

    fn of(memory: &pmem::Config, id: String) -> Self {
        Self {
            id,
            path_on_host: memory.path.clone(),
            root_device: memory.root,
            read_only: memory.ro,
            rate_limiter: limiter(throttle::Limits { bandwidth: None, ops: memory.ops }),
        }
    }
}

impl Balloon {
    /// The device.
    pub fn device(&self) -> Result<balloon::Config, String> {
        if self.free_page_hinting {
            return Err("free_page_hinting is not supported; free_page_reporting is.".into());
        }
        Ok(balloon::Config {
            size: mebibytes(self.amount_mib)?,
            deflate_on_oom: self.deflate_on_oom,
            reporting: self.free_page_reporting,
            stats: self.stats_polling_interval_s,
        })
    }
}

fn limits(limiter: Option<RateLimiter>) -> throttle::Limits {
    let limit = |bucket: Option<TokenBucket>| bucket.and_then(TokenBucket::limit);
    limiter.map_or(throttle::Limits::default(), |limiter| throttle::Limits {
        bandwidth: limit(limiter.bandwidth),
        ops: limit(limiter.ops),
    })
}

/// What a change of limits is as a change of the device's configuration, whose keys start with `prefix`. A bucket that
/// is left out stays as it is.
pub fn limits_patch(prefix: &str, limiter: Option<RateLimiter>) -> Patch {
    let buckets = limiter.map_or([None; 2], |limiter| [limiter.bandwidth, limiter.ops]);
    let keys = ["bandwidth", "ops"].map(|name| format!("{prefix}{name}"));
    let pairs = keys.into_iter().zip(buckets).filter_map(|(key, bucket)| Some((key, bucket?)));
    pairs
        .map(|(key, bucket)| {
            (key, bucket.limit().map_or(serde_json::Value::Null, |limit| limit.to_string().into()))
        })
        .collect()
}

/// What limits are in these words.
fn limiter(limits: throttle::Limits) -> Option<RateLimiter> {
    let bucket = |throttle::TokenBucket { size, refill_time, one_time_burst }| TokenBucket {
        size,
        one_time_burst: (one_time_burst > 0).then_some(one_time_burst),
        refill_time,
    };
    let throttle::Limits { bandwidth, ops } = limits;
    (bandwidth.is_some() || ops.is_some())
        .then(|| RateLimiter { bandwidth: bandwidth.map(bucket), ops: ops.map(bucket) })
}

// A machine that was configured otherwise, as far as it can be said in these words.

impl FullConfiguration {
    /// The words for `config`.
    pub fn of(config: &VmConfig) -> Self {
        let mut full = Self {
            boot_source: config.kernel.as_ref().map(|kernel| BootSource {
                kernel_image_path: kernel.clone(),
                boot_args: config.kernel_command_line(&[]).ok(),
                initrd_path: config.initrd.clone(),
            }),
            machine_config: MachineConfiguration {
                vcpu_count: config.cpus,
                mem_size_mib: config.memory.0 >> 20,
                track_dirty_pages: config.track_dirty,
                huge_pages: FirecrackerPages::of(config.hugepages),
                ..MachineConfiguration::default()
            },
            serial: match &config.serial {
                SerialConfig::File(path) => Some(Serial { serial_out_path: Some(path.clone()) }),
                SerialConfig::Stdio | SerialConfig::Null => None,
            },
            ..Self::default()
        };
        let named = || config.devices.iter().zip(config.device_names());
        let with_metadata = || named().filter_map(|(device, name)| Some((metadata_of(device)?, name)));
        full.mmds_config = with_metadata()
            .next()
            .map(|(metadata, _)| MmdsConfig::of(metadata, with_metadata().map(|(_, name)| name).collect()));
        for (device, name) in named() {
            match device {
                DeviceConfig::Disk(disk) => full.drives.push(Drive::of(disk, name)),
                DeviceConfig::Net(net) => full.network_interfaces.extend(NetworkInterface::of(net, name)),
                DeviceConfig::Vsock(vsock::Config { path, cid, .. }) => {
                    full.vsock = Some(Vsock { guest_cid: *cid, uds_path: path.clone(), vsock_id: None });
                }
                DeviceConfig::Balloon(balloon) => full.balloon = Some(Balloon::of(balloon)),
                DeviceConfig::Rng(rng::Config { bandwidth, ops }) => {
                    let limits = throttle::Limits { bandwidth: *bandwidth, ops: *ops };
                    full.entropy = Some(Entropy { rate_limiter: limiter(limits) });
                }
                DeviceConfig::Pmem(memory) => full.pmem.push(Pmem::of(memory, name)),
                DeviceConfig::Console(_) => {}
            }
        }
        full
    }
}

impl FullConfiguration {
    /// The same with other names for devices, which were those of the machine.
    pub fn called(mut self, aliases: &Aliases) -> Self {
        let drives = self.drives.iter_mut().map(|drive| &mut drive.drive_id);
        let interfaces = self.network_interfaces.iter_mut().map(|interface| &mut interface.iface_id);
        let memories = self.pmem.iter_mut().map(|memory| &mut memory.id);
        let with_metadata = self.mmds_config.iter_mut().flat_map(|mmds| &mut mmds.network_interfaces);
        for name in drives.chain(interfaces).chain(memories).chain(with_metadata) {
            if let Some(alias) = aliases.get(name) {
                name.clone_from(alias);
            }
        }
        self
    }

    /// Whether something of a machine is in it, and not only what the program itself does.
    pub fn has_machine(&self) -> bool {
        let without = Self { logger: None, metrics: None, ..self.clone() };
        without != Self::default()
    }

    /// Takes over what can change while the machine runs. `now`: the machine in these words, by the names of its devices;
    /// `names`: these, by what the API calls the devices.
    pub fn take_over(&mut self, now: &Self, names: &HashMap<String, String>) {
        for drive in &mut self.drives {
            let name = names.get(&drive.drive_id);
            if let Some(new) = now.drives.iter().find(|new| Some(&new.drive_id) == name) {
                drive.path_on_host.clone_from(&new.path_on_host);
                drive.rate_limiter = new.rate_limiter;
            }
        }
        for interface in &mut self.network_interfaces {
            let name = names.get(&interface.iface_id);
            if let Some(new) = now.network_interfaces.iter().find(|new| Some(&new.iface_id) == name) {
                interface.rx_rate_limiter = new.rx_rate_limiter;
                interface.tx_rate_limiter = new.tx_rate_limiter;
            }
        }
        for memory in &mut self.pmem {
            let name = names.get(&memory.id);
            if let Some(new) = now.pmem.iter().find(|new| Some(&new.id) == name) {
                memory.rate_limiter = new.rate_limiter;
            }
        }
        self.balloon.clone_from(&now.balloon);
        self.entropy.clone_from(&now.entropy);
    }
}

impl Drive {
    fn of(disk: &block::Config, name: String) -> Self {
        Self {
            drive_id: name,
            is_root_device: disk.root,
            path_on_host: Some(disk.path.clone()),
            is_read_only: Some(disk.ro),
            partuuid: None,
            cache_type: match disk.cache {
                block::Cache::Unsafe => CacheType::Unsafe,
                block::Cache::Writeback | block::Cache::None => CacheType::Writeback,
            },
            io_engine: match disk.engine {
                block::EngineKind::IoUring => IoEngine::Async,
                block::EngineKind::Auto | block::EngineKind::Threads => IoEngine::Sync,
            },
            rate_limiter: limiter(throttle::Limits { bandwidth: disk.bandwidth, ops: disk.ops }),
            socket: None,
        }
    }
}

impl NetworkInterface {
    /// Only what is a tap has a word here.
    fn of(net: &net::Config, name: String) -> Option<Self> {
        let Some(net::TapChoice::Named(tap)) = &net.tap else { return None };
        Some(Self {
            iface_id: name,
            host_dev_name: tap.clone(),
            guest_mac: net.mac.map(|mac| mac.to_string()),
            mtu: net.mtu,
            rx_rate_limiter: limiter(throttle::Limits { bandwidth: net.rx_bandwidth, ops: net.rx_ops }),
            tx_rate_limiter: limiter(throttle::Limits { bandwidth: net.tx_bandwidth, ops: net.tx_ops }),
        })
    }
}

impl Balloon {
    fn of(balloon: &balloon::Config) -> Self {
        Self {
            amount_mib: balloon.size.0 >> 20,
            deflate_on_oom: balloon.deflate_on_oom,
            stats_polling_interval_s: balloon.stats,
            free_page_hinting: false,
            free_page_reporting: balloon.reporting,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(text: &str) -> FullConfiguration {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_configuration_as_clients_send_it_becomes_a_machine() {
        let machine = full(
            r#"{
                "boot-source": {"kernel_image_path": "k", "boot_args": "console=ttyS0 reboot=k panic=1 pci=off"},
                "drives": [
                    {"drive_id": "data", "path_on_host": "d", "is_root_device": false, "is_read_only": true,
                     "rate_limiter": {"bandwidth": {"size": 1048576, "refill_time": 1000, "one_time_burst": 5}}},
                    {"drive_id": "rootfs", "path_on_host": "r", "is_root_device": true, "io_engine": "Async"}
                ],
                "machine-config": {"vcpu_count": 2, "mem_size_mib": 1024, "huge_pages": "2M"},
                "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap7", "guest_mac": "06:00:ac:10:00:02"}],
                "vsock": {"guest_cid": 7, "uds_path": "v.sock"},
                "balloon": {"amount_mib": 3, "deflate_on_oom": true}
            }"#,
        )
        .machine(Transport::Mmio, &MmdsContents::default())
        .unwrap();
        let Machine { config, ids } = machine;
        assert_eq!(
            (config.cpus, config.memory, config.hugepages),
            (2, ByteSize(1 << 30), HugePages::Reserved)
        );
        assert_eq!(
            config.devices.iter().map(DeviceConfig::kind).collect::<Vec<_>>(),
            ["disk", "disk", "net", "vsock", "balloon"]
        );
        assert_eq!(ids.iter().flatten().collect::<Vec<_>>(), ["rootfs", "data", "eth0"]);
        assert_eq!(config.devices[1].limits()[0].bandwidth.unwrap().to_string(), "1M/1s+5");
        assert_eq!(config.cmdline.as_deref(), Some("console=ttyS0 reboot=k panic=1 pci=off"));
        let DeviceConfig::Disk(root) = &config.devices[0] else { panic!("a disk") };
        assert!(root.root && !root.ro);
    }

    #[test]
    fn a_patch_of_metadata_is_a_merge() {
        // From RFC 7396, appendix A, as far as both are objects.
        for (target, patch, want) in [
            (r#"{"a":"b"}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"b":"c"}"#, r#"{"a":"b","b":"c"}"#),
            (r#"{"a":"b","b":"c"}"#, r#"{"a":null}"#, r#"{"b":"c"}"#),
            (r#"{"a":["b"]}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"c"}"#, r#"{"a":["b"]}"#, r#"{"a":["b"]}"#),
            (r#"{"a":{"b":"c"}}"#, r#"{"a":{"b":"d","c":null}}"#, r#"{"a":{"b":"d"}}"#),
            (r#"{"a":[{"b":"c"}]}"#, r#"{"a":[1]}"#, r#"{"a":[1]}"#),
            (r#"{"e":null}"#, r#"{"a":1}"#, r#"{"a":1,"e":null}"#),
            (r#"{}"#, r#"{"a":{"bb":{"ccc":null}}}"#, r#"{"a":{"bb":{}}}"#),
        ] {
            let mut contents: MmdsContents = serde_json::from_str(target).unwrap();
            contents.merge(serde_json::from_str(patch).unwrap());
            assert_eq!(serde_json::to_string(&contents).unwrap(), want, "{target} {patch}");
        }
    }

    #[test]
    fn a_partition_can_be_the_root() {
        let machine = full(
            r#"{"boot-source": {"kernel_image_path": "k", "boot_args": "x"},
                "drives": [{"drive_id": "a", "path_on_host": "d", "is_root_device": true, "partuuid": "01-02"}]}"#,
        );
        let config = machine.machine(Transport::Mmio, &MmdsContents::default()).unwrap().config;
        assert_eq!(config.kernel_command_line(&[]).unwrap(), "x root=PARTUUID=01-02 rw");
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        let base = r#""boot-source": {"kernel_image_path": "k"}"#;
        for (text, want) in [
            ("{}".to_owned(), "PUT /boot-source"),
            (
                format!(r#"{{{base}, "drives": [{{"drive_id": "a", "is_root_device": true}}]}}"#),
                "no path_on_host",
            ),
            (
                format!(
                    r#"{{{base}, "drives": [{{"drive_id": "a", "is_root_device": true, "socket": "s"}}]}}"#
                ),
                "vhost-user",
            ),
            (
                format!(
                    r#"{{{base}, "balloon": {{"amount_mib": 1, "deflate_on_oom": true, "free_page_hinting": true}}}}"#
                ),
                "free_page_hinting",
            ),
        ] {
            let error = full(&text).machine(Transport::Mmio, &MmdsContents::default()).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn limits_change_bucket_by_bucket() {
        let bucket = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 100 });
        let limiter = RateLimiter { bandwidth: bucket(0), ops: None };
        assert_eq!(
            serde_json::Value::Object(limits_patch("", Some(limiter))),
            serde_json::json!({"bandwidth": null})
        );
        let limiter = RateLimiter { bandwidth: None, ops: bucket(7) };
        assert_eq!(
            serde_json::Value::Object(limits_patch("rx_", Some(limiter))),
            serde_json::json!({"rx_ops": "7/100ms"})
        );
        assert!(limits_patch("", None).is_empty());
    }
}
