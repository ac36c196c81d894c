//! Request and answer bodies of Firecracker's API. Names and meaning are those of its documentation.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;
use vmm_core::devices::throttle;
use vmm_core::devices::virtio::net::mmds;

/// Answer to every request that failed.
#[derive(Debug, Serialize, ToSchema)]
pub struct Fault {
    /// One sentence.
    pub fault_message: String,
}

/// Answer to `GET /`.
#[derive(Debug, Serialize, ToSchema)]
pub struct InstanceInfo {
    /// The program's name.
    pub app_name: String,
    /// The machine's name, as on the command line.
    pub id: String,
    /// `Not started`, `Running` or `Paused`.
    pub state: String,
    /// The program's version.
    pub vmm_version: String,
}

/// Answer to `GET /version`.
#[derive(Debug, Serialize, ToSchema)]
pub struct FirecrackerVersion {
    /// The version of Firecracker whose API this is.
    pub firecracker_version: String,
}

/// What the guest boots.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// An ELF vmlinux or a bzImage on the host.
    #[schema(value_type = String)]
    pub kernel_image_path: PathBuf,
    /// Kernel command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
    /// Initial RAM disk on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initrd_path: Option<PathBuf>,
}

/// vCPUs and memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfiguration {
    /// 1 to 32.
    #[schema(minimum = 1, maximum = 32)]
    pub vcpu_count: u8,
    /// RAM in MiB.
    pub mem_size_mib: u64,
    /// Simultaneous multithreading. Guests see no siblings here.
    #[serde(default)]
    pub smt: bool,
    /// Only `None`: guests see the host's processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// What is written to RAM is tracked, for diff snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Pages that the guest's memory is made of.
    #[serde(default)]
    pub huge_pages: HugePages,
}

impl Default for MachineConfiguration {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
        }
    }
}

/// A change of [`MachineConfiguration`]: what is left out stays.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigurationUpdate {
    /// 1 to 32.
    #[schema(minimum = 1, maximum = 32)]
    pub vcpu_count: Option<u8>,
    /// RAM in MiB.
    pub mem_size_mib: Option<u64>,
    /// Simultaneous multithreading.
    pub smt: Option<bool>,
    /// Only `None`.
    pub cpu_template: Option<CpuTemplate>,
    /// What is written to RAM is tracked, for diff snapshots.
    pub track_dirty_pages: Option<bool>,
    /// Pages that the guest's memory is made of.
    pub huge_pages: Option<HugePages>,
}

/// Static processor templates, of which only `None` is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs, reason = "names of Firecracker's templates")]
pub enum CpuTemplate {
    None,
    C3,
    T2,
    T2A,
    T2CL,
    T2S,
    V1N1,
}

/// Pages that guest memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum HugePages {
    /// Small ones.
    #[default]
    None,
    /// Transparent huge pages.
    Transparent,
    /// 2 MiB pages of the host's reserve.
    #[serde(rename = "2M")]
    TwoMib,
}

/// Limits in bytes and in operations; one that is left out stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// In bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// In operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A token bucket. With a size or a time of 0 there is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens that it holds.
    pub size: u64,
    /// Tokens that are there once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which it fills.
    pub refill_time: u64,
}

impl TokenBucket {
    /// As devices take it; `None` is no limit.
    pub fn limit(self) -> Option<throttle::TokenBucket> {
        let Self { size, one_time_burst, refill_time } = self;
        let one_time_burst = one_time_burst.unwrap_or(0);
        (size > 0 && refill_time > 0).then_some(throttle::TokenBucket { size, refill_time, one_time_burst })
    }
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name in this API.
    pub drive_id: String,
    /// The guest's root file system is on it.
    pub is_root_device: bool,
    /// Image or block device on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub path_on_host: Option<PathBuf>,
    /// The guest can only read it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_read_only: Option<bool>,
    /// Unique ID of the partition that the root file system is on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// Whether a guest's flush makes its writes durable.
    #[serde(default)]
    pub cache_type: CacheType,
    /// How requests are done.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// Limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// Socket of a vhost-user backend; not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
}

/// Whether a guest's flush makes its writes durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum CacheType {
    /// It does nothing.
    #[default]
    Unsafe,
    /// It does.
    Writeback,
}

/// How requests are done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum IoEngine {
    /// As is best here.
    #[default]
    Sync,
    /// By io_uring.
    Async,
}

/// A change of a disk while the machine runs.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// As in the path.
    pub drive_id: String,
    /// Another image.
    #[schema(value_type = Option<String>)]
    pub path_on_host: Option<PathBuf>,
    /// Other limits.
    pub rate_limiter: Option<RateLimiter>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name in this API.
    pub iface_id: String,
    /// A tap interface of the host.
    pub host_dev_name: String,
    /// The guest's Ethernet address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// The largest packet that the guest is to send, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Limits of what the guest receives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits of what the guest sends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// A change of a network interface while the machine runs.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceUpdate {
    /// As in the path.
    pub iface_id: String,
    /// Other limits of what the guest receives.
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Other limits of what the guest sends.
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Sockets between host and guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's CID, 3 or more.
    #[schema(minimum = 3)]
    pub guest_cid: u32,
    /// Path of the unix socket on the host.
    #[schema(value_type = String)]
    pub uds_path: PathBuf,
    /// Has no meaning any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

/// Memory that the host takes from the guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// In MiB.
    pub amount_mib: u64,
    /// A guest that runs out of memory may take it back.
    pub deflate_on_oom: bool,
    /// Seconds between questions for the guest's statistics; 0: none are asked.
    #[serde(default)]
    pub stats_polling_interval_s: u32,
    /// Not there.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Pages that the guest frees go back to the host by themselves.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// Another size of the balloon.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// In MiB.
    pub amount_mib: u64,
}

/// Another interval of the balloon's statistics.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatsUpdate {
    /// In seconds. It cannot be switched on or off while the machine runs.
    pub stats_polling_interval_s: u32,
}

/// Answer to `GET /balloon/statistics`. What the guest has not said is left out.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct BalloonStatistics {
    /// Size that was asked for, in pages of 4 KiB.
    pub target_pages: u64,
    /// Size that the balloon has, in pages of 4 KiB.
    pub actual_pages: u64,
    /// Size that was asked for, in MiB.
    pub target_mib: u64,
    /// Size that the balloon has, in MiB.
    pub actual_mib: u64,
    /// What the guest says: `swap_in`, `free_memory`, `total_memory` and so on.
    #[serde(flatten)]
    #[schema(value_type = std::collections::BTreeMap<String, u64>)]
    pub guest: std::collections::BTreeMap<&'static str, u64>,
}

/// Statistics of the guest: their names here, and those of the device's facts.
const GUEST_STATISTICS: [(&str, &str); 16] = [
    ("swap_in", "guest_swap_in_bytes"),
    ("swap_out", "guest_swap_out_bytes"),
    ("major_faults", "guest_major_faults"),
    ("minor_faults", "guest_minor_faults"),
    ("free_memory", "guest_free_bytes"),
    ("total_memory", "guest_total_bytes"),
    ("available_memory", "guest_available_bytes"),
    ("disk_caches", "guest_disk_cache_bytes"),
    ("hugetlb_allocations", "guest_hugetlb_allocations"),
    ("hugetlb_failures", "guest_hugetlb_failures"),
    ("oom_kill", "guest_oom_kills"),
    ("alloc_stall", "guest_allocation_stalls"),
    ("async_scan", "guest_async_scans"),
    ("direct_scan", "guest_direct_scans"),
    ("async_reclaim", "guest_async_reclaims"),
    ("direct_reclaim", "guest_direct_reclaims"),
];

impl BalloonStatistics {
    /// What the device's facts, looked up by name, are in these words.
    pub fn from_facts(fact: impl Fn(&str) -> Option<u64>) -> Self {
        let bytes = |name| fact(name).unwrap_or(0);
        let (target, actual) = (bytes("target_bytes"), bytes("actual_bytes"));
        Self {
            target_pages: target >> 12,
            actual_pages: actual >> 12,
            target_mib: target >> 20,
            actual_mib: actual >> 20,
            guest: GUEST_STATISTICS
                .iter()
                .filter_map(|&(name, fact_name)| Some((name, fact(fact_name)?)))
                .collect(),
        }
    }
}

/// The source of random numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// The serial port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// File that the guest's console is written to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub serial_out_path: Option<PathBuf>,
}

/// Something to do.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// What.
    pub action_type: ActionType,
}

/// What to do.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
pub enum ActionType {
    /// Write the metrics now.
    FlushMetrics,
    /// Start the machine.
    InstanceStart,
    /// Ask the guest to shut down: the power button, or Ctrl-Alt-Del where the guest has no ACPI.
    SendCtrlAltDel,
}

/// Where a running machine is to go.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// The new state.
    pub state: VmTarget,
}

/// Where a running machine is to go.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
pub enum VmTarget {
    /// vCPUs and devices stand still.
    Paused,
    /// They go on.
    Resumed,
}

/// Where log lines go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// File or FIFO; standard error if it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub log_path: Option<PathBuf>,
    /// The least important lines that are written.
    #[serde(default)]
    pub level: LogLevel,
    /// Lines name their level.
    #[serde(default)]
    pub show_level: bool,
    /// Lines name the place in the code that they come from.
    #[serde(default)]
    pub show_log_origin: bool,
    /// Only lines of this module.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// How important a log line is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs, reason = "the names say it")]
pub enum LogLevel {
    #[serde(alias = "OFF", alias = "off")]
    Off,
    #[serde(alias = "TRACE", alias = "trace")]
    Trace,
    #[serde(alias = "DEBUG", alias = "debug")]
    Debug,
    #[default]
    #[serde(alias = "INFO", alias = "info")]
    Info,
    #[serde(alias = "WARN", alias = "warn", alias = "Warning", alias = "WARNING", alias = "warning")]
    Warn,
    #[serde(alias = "ERROR", alias = "error")]
    Error,
}

/// Where metrics go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// File or FIFO.
    #[schema(value_type = String)]
    pub metrics_path: PathBuf,
}

/// How guests ask for metadata.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// The interfaces by which they can ask, one at least.
    #[schema(min_items = 1)]
    pub network_interfaces: Vec<String>,
    /// Whether they need a token.
    #[serde(default)]
    pub version: MmdsVersion,
    /// The address at which they ask, of 169.254.1.0 to 169.254.254.255.
    #[serde(default = "metadata_address")]
    #[schema(value_type = String, format = "ipv4")]
    pub ipv4_address: Ipv4Addr,
    /// All answers are text, whatever they accept.
    #[serde(default)]
    pub imds_compat: bool,
}

fn metadata_address() -> Ipv4Addr {
    mmds::ADDRESS
}

/// Whether guests need a token to ask for metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MmdsVersion {
    /// They do not.
    #[default]
    V1,
    /// They do.
    V2,
}

/// Metadata for guests: an object of any content.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(value_type = Object)]
pub struct MmdsContents(pub Map<String, Value>);

/// A disk image as memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// Its name in this API.
    pub id: String,
    /// Image or block device on the host.
    #[schema(value_type = String)]
    pub path_on_host: PathBuf,
    /// The guest's root file system is on it.
    #[serde(default)]
    pub root_device: bool,
    /// The guest can only read it.
    #[serde(default)]
    pub read_only: bool,
    /// Limits, of which `ops` counts flushes; bytes are not seen by anybody.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// A change of persistent memory while the machine runs.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PmemUpdate {
    /// As in the path.
    pub id: String,
    /// Other limits.
    pub rate_limiter: Option<RateLimiter>,
}

/// Everything that is configured: the answer to `GET /vm/config`, and what `--config-file` takes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct FullConfiguration {
    /// What the guest boots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_source: Option<BootSource>,
    /// vCPUs and memory.
    pub machine_config: MachineConfiguration,
    /// Disks.
    pub drives: Vec<Drive>,
    /// Network interfaces.
    pub network_interfaces: Vec<NetworkInterface>,
    /// Disk images as memory.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pmem: Vec<Pmem>,
    /// How guests ask for metadata.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mmds_config: Option<MmdsConfig>,
    /// Sockets between host and guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// Memory that the host takes from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// The source of random numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// The serial port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// Where log lines go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// Where metrics go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
}
