//! `vmm run`: boots a guest and waits for its end.

mod config;
mod quote;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde::de::DeserializeOwned;
use vmm_core::config::{BootProtocol, CpuProfile, SerialConfig, Transport};
use vmm_core::devices::size::ByteSize;
use vmm_core::devices::virtio::block;
use vmm_core::memory::HugePages;
use vmm_core::x86_64::layout::MAX_CPUS;
use vmm_core::{Vm, VmConfig};

pub use config::root_disk;

use super::device_flags::DeviceFlags;
use super::host::{HostArgs, Launch};
use super::number;
use crate::config_file;
use crate::exit::{self, ExitStatus};
use crate::images;
use crate::session::Console;
use crate::terminal;

/// Boot a guest, attach the terminal, return when the guest stops
///
/// Every flag has a default: `vmm run` alone boots this project's own guest kernel with a small root file system
/// to a shell.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES, after_long_help = AFTER_LONG_HELP.as_str())]
pub struct RunArgs {
    /// Kernel: an ELF vmlinux or a bzImage, told apart by content
    ///
    /// Left out: this project's own guest kernel, in the flavour that this host can run, built the first time.
    #[arg(long, value_name = "PATH", help_heading = "Machine")]
    kernel: Option<PathBuf>,

    /// Root file system: a raw disk image, the guest's /dev/vda
    ///
    /// Takes what --disk takes. Left out, and without --initrd: this project's own small root file system, as a
    /// private copy that is thrown away in the end.
    #[arg(long, value_name = "PATH[,ro]", help_heading = "Machine", value_parser = config::parse_root_disk)]
    rootfs: Option<block::Config>,

    /// Attach no root file system, not even this project's own
    #[arg(long, help_heading = "Machine", conflicts_with = "rootfs")]
    no_rootfs: bool,

    /// Initial RAM disk
    #[arg(long, value_name = "PATH", help_heading = "Machine")]
    initrd: Option<PathBuf>,

    /// Kernel command line, in place of the default one
    #[arg(long, value_name = "STR", help_heading = "Machine", allow_hyphen_values = true)]
    cmdline: Option<String>,

    /// What to add to the kernel command line
    #[arg(long, value_name = "STR", help_heading = "Machine", allow_hyphen_values = true)]
    append: Option<String>,

    /// Number of vCPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N", help_heading = "Machine", value_parser = |text: &str| number(text, 1..=MAX_CPUS))]
    cpus: Option<u8>,

    /// RAM, such as 256M or 2G [default: 256M]
    #[arg(long, value_name = "SIZE", help_heading = "Machine")]
    memory: Option<ByteSize>,

    /// Make RAM of the host's 2 MiB pages: reserved (the default of the bare flag) or transparent
    ///
    /// Reserved pages are those of vm.nr_hugepages: all of the RAM is there, or the guest does not start. With
    /// transparent the host gives what it can.
    #[arg(long, value_name = "KIND", help_heading = "Machine",
        value_parser = named::<HugePages>(&["reserved", "transparent", "no"]),
        num_args = 0..=1, require_equals = true, default_missing_value = "reserved")]
    hugepages: Option<HugePages>,

    /// Take all RAM from the host before the guest starts
    #[arg(long, help_heading = "Machine")]
    mem_prealloc: bool,

    /// Features of the host's processor that the guest sees: host, a level from v1 to v4, or a file with a list [default: host]
    ///
    /// Snapshots of a guest go on wherever its features are. Levels are those of the x86-64 psABI; a file has names of
    /// /proc/cpuinfo and of levels, as a JSON list, or in TOML as features = ["v2", "aes"].
    #[arg(long, value_name = "PROFILE", help_heading = "Machine", value_parser = config_file::cpu_profile)]
    cpu_profile: Option<CpuProfile>,

    /// Keep RAM in a memfd, mapped shared, as other processes of the host need it to have a part in it
    #[arg(long, help_heading = "Machine")]
    mem_shared: bool,

    /// Track what is written to RAM, for snapshots that are a difference to the one before
    #[arg(long, help_heading = "Machine")]
    track_dirty: bool,

    /// How the kernel is entered: auto takes PVH where the kernel offers it
    #[arg(long, value_name = "PROTOCOL", help_heading = "Machine",
        value_parser = named::<BootProtocol>(&["auto", "linux", "pvh"]))]
    boot_protocol: Option<BootProtocol>,

    /// How the guest reaches its devices: mmio boots faster, pci takes interrupts with fewer exits [default: mmio]
    #[arg(long, value_name = "TRANSPORT", help_heading = "Machine",
        value_parser = named::<Transport>(&["mmio", "pci"]))]
    transport: Option<Transport>,

    #[command(flatten)]
    devices: DeviceFlags,

    /// Where the guest's console goes: stdio, null or file=PATH [default: stdio]
    #[arg(long, value_name = "WHERE", help_heading = "Console")]
    serial: Option<SerialConfig>,

    /// The machine's configuration as JSON or TOML; flags win over it
    ///
    /// The keys are those that --dry-run prints. Paths are relative to the current directory. A file that has
    /// `devices` lists all of them, but for this project's own root file system; device flags add to the list.
    #[arg(long, value_name = "FILE", help_heading = "Command")]
    config: Option<PathBuf>,

    /// Check everything, print the configuration as JSON, start and create nothing
    #[arg(long, help_heading = "Command")]
    dry_run: bool,

    #[command(flatten)]
    host: HostArgs,

    /// What the guest's init runs, in place of a shell
    ///
    /// Goes to the end of the kernel command line. The guest ends with the command, and vmm with its exit status.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

const EXAMPLES: &str = "\
Examples:
  vmm run                                          a shell in a guest of its own
  vmm run -- uname -a                              one command in a guest of its own
  vmm run --kernel vmlinux --rootfs disk.img,ro    your kernel, your root file system
  vmm run --cpus 4 --memory 2G --disk data.img --net tap=tap0
  echo 'uname -a; exit' | vmm run                  keys from a pipe; its end does not end the guest
  vmm run --memory 1G --dry-run > guest.json       write a configuration down
  vmm run --config guest.json                      and use it";

static AFTER_LONG_HELP: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| {
    format!(
        "{EXAMPLES}\n\nOn a terminal:\n  Ctrl-A x       stops the guest\n  Ctrl-A h       lists these keys\n  \
         Ctrl-A Ctrl-A  sends Ctrl-A to the guest\n\n{}",
        exit::HELP
    )
});

/// A value by one of the names that it has in a configuration.
pub(super) fn named<T>(names: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| serde_json::from_value::<T>(name.into()))
}

/// Runs the subcommand. `start` is when the process began.
pub fn run(args: &RunArgs, start: Instant) -> anyhow::Result<ExitStatus> {
    let logging = args.host.log()?;
    let file = args.config.as_deref().map(config_file::load).transpose()?.unwrap_or_default();
    let mut config = config::merge(args, file)?;
    config::spare_own_files(&config, args.config.as_deref())?;
    let own_root = !args.no_rootfs && images::wants_root(&config);
    let console_of_its_own = Console::of(&config.serial);
    if !args.dry_run
        && !args.host.detach
        && matches!(console_of_its_own, Console::Stdio)
        && let Some((columns, lines)) = terminal::size()
    {
        // A serial line does not tell its size. Linux hands this to init as environment, and ours acts on it.
        config::append_first(&mut config, &format!("COLUMNS={columns} LINES={lines}"));
    }
    config::validate(&config, own_root)?;
    if args.dry_run {
        return dry_run(config);
    }
    if args.host.belongs_in_background() {
        return args.host.go_to_background();
    }
    images::provide_kernel(&mut config, args.host.quiet)?;
    let root = own_root.then(|| images::provide_root(&mut config, args.host.quiet)).transpose()?;
    let (builder, command) = (Vm::builder(config), !args.command.is_empty());
    args.host.run(Launch { builder, kept: root, command, logging, start })
}

/// Checks what can be checked without making anything, and prints the configuration.
fn dry_run(config: VmConfig) -> anyhow::Result<ExitStatus> {
    let mut json = serde_json::to_vec_pretty(&config)?;
    json.push(b'\n');
    Vm::builder(config).check()?;
    super::print(&json)
}
