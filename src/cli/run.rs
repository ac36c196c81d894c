//! `vmm run`: boots a guest and waits for its end.

mod config;
mod quote;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args};
use serde::de::DeserializeOwned;
use tracing::level_filters::LevelFilter;
use vmm_core::config::{BootProtocol, SerialConfig, Transport};
use vmm_core::console::WhenFull;
use vmm_core::devices::size::ByteSize;
use vmm_core::devices::virtio::block;
use vmm_core::exits::ExitCount;
use vmm_core::memory::HugePages;
use vmm_core::x86_64::layout::MAX_CPUS;
use vmm_core::{Milestone, StopReason, Vm, VmConfig};

pub use config::root_disk;

use super::device_flags::DeviceFlags;
use super::machines::StateArgs;
use super::{detach, say};
use crate::api::{Control, MAX_BODY, Socket};
use crate::config_file;
use crate::exit::{self, ExitStatus};
use crate::images;
use crate::logging::{LogArgs, Logging};
use crate::machines::console::ConsoleServer;
use crate::machines::log::Log;
use crate::machines::{self, Outcome, Registered};
use crate::session::{self, Cause, Console, Ended, Manner, SignalThread};
use crate::terminal::{self, Stderr};

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
    #[arg(long, value_name = "N", help_heading = "Machine", value_parser = cpus)]
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

    /// Keep RAM in a memfd, mapped shared, as other processes of the host need it to have a part in it
    #[arg(long, help_heading = "Machine")]
    mem_shared: bool,

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

    /// Give the machine a name, by which vmm ps, logs, attach, stop and others know it
    #[arg(long, value_name = "NAME", value_parser = machines::check_name, help_heading = "Command")]
    name: Option<String>,

    /// Let it run in the background; its name is printed once the guest runs
    #[arg(short, long, help_heading = "Command")]
    detach: bool,

    /// Remove all that is kept of a named machine when it ends
    #[arg(long, help_heading = "Command")]
    rm: bool,

    #[command(flatten)]
    state: StateArgs,

    /// Serve the control API on a unix socket at this path: see docs/api.md
    #[arg(long, value_name = "PATH", help_heading = "Command")]
    api_sock: Option<PathBuf>,

    /// In the end, print on standard error what made vCPUs leave the guest, by cause and address
    #[arg(long, help_heading = "Command")]
    trace_exits: bool,

    /// In the end, print on standard error when the guest got how far
    #[arg(long, help_heading = "Command")]
    timings: bool,

    #[command(flatten)]
    log: LogArgs,

    /// Say more on standard error; repeat for more
    #[arg(short, long, action = ArgAction::Count, conflicts_with_all = ["quiet", "log"], help_heading = "Command")]
    verbose: u8,

    /// Say nothing but errors
    #[arg(short, long, conflicts_with = "log", help_heading = "Command")]
    quiet: bool,

    /// This process is the one in the background
    #[arg(long, hide = true)]
    in_background: bool,

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

fn cpus(text: &str) -> Result<u8, String> {
    let number = text.parse().ok().filter(|number| (1..=MAX_CPUS).contains(number));
    number.ok_or_else(|| format!("write a number from 1 to {MAX_CPUS}"))
}

/// A value by one of the names that it has in a configuration.
pub(super) fn named<T>(names: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| serde_json::from_value::<T>(name.into()))
}

/// Runs the subcommand. `start` is when the process began.
pub fn run(args: &RunArgs, start: Instant) -> anyhow::Result<ExitStatus> {
    let logging = Logging::start(&args.log, args.level())?;
    raise_file_limit();
    let file = args.config.as_deref().map(config_file::load).transpose()?.unwrap_or_default();
    let mut config = config::merge(args, file)?;
    config::spare_own_files(&config, args.config.as_deref())?;
    let own_root = !args.no_rootfs && images::wants_root(&config);
    let console_of_its_own = Console::of(&config.serial);
    if !args.dry_run
        && !args.detach
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
    if args.detach && !args.in_background {
        return detach::start(args.name.clone());
    }
    images::provide_kernel(&mut config, args.quiet)?;
    let root = own_root.then(|| images::provide_root(&mut config, args.quiet)).transpose()?;
    let signals = SignalThread::start()?;
    let named = args.named(&config)?;
    let socket =
        args.api_sock.clone().or_else(|| named.as_ref().map(|named| named.registered.machine().api()));
    let socket = socket.as_deref().map(Socket::bind).transpose()?;
    let name = named.as_ref().map_or("vmm", |named| &named.registered.machine().name);
    let builder = Vm::builder(config)
        .name(name)
        .process_start(start)
        .console_when_full(WhenFull::Wait)
        .trace_exits(args.trace_exits);
    let vm = Arc::new(builder.build()?);
    // The machine has a descriptor of its own.
    drop(root);
    let console = named.as_ref().and_then(|named| named.console.clone());
    let manner = Manner { console: console.unwrap_or(console_of_its_own), quiet: args.quiet };
    let mut server = None;
    let started = || {
        let serve = |socket: &Socket| {
            socket.serve(Arc::new(Control::of(name, vm.clone(), logging.clone())), MAX_BODY)
        };
        server = socket.as_ref().map(serve).transpose()?;
        if let Some(named) = named.as_ref().filter(|_| args.in_background) {
            let log = named.registered.machine().own_log();
            let log = Log::create(&log).with_context(|| format!("cannot write '{}'", log.display()))?;
            logging.write_to(log).map_err(|sentence| anyhow!(sentence))?;
        }
        // What can fail has not: from here on there is a machine.
        if let Some(named) = named.as_ref().filter(|_| !args.rm) {
            named.registered.keep();
        }
        if args.in_background { detach::ready() } else { Ok(()) }
    };
    let ended = session::run(&vm, manner, &signals, started);
    let status = ended.and_then(|ended| {
        args.report(&vm, start);
        status(&ended, (!args.command.is_empty()).then(|| vm.exit_status()))
    });
    if let Some(named) = &named {
        named.finish(&vm, &status);
    }
    status
}

/// A machine with a name.
struct Named {
    registered: Registered,
    /// Where its console is, when that is not decided by its configuration alone.
    console: Option<Console>,
}

impl Named {
    /// Writes down how it ended.
    fn finish(&self, vm: &Vm, status: &anyhow::Result<ExitStatus>) {
        let (code, reason) = match status {
            Ok(status) => (status.code(), vm.wait().to_string()),
            Err(error) => (ExitStatus::Failure.code(), super::sentence(error)),
        };
        if let Err(error) = self.registered.finish(&Outcome { status: code, reason }) {
            say(&format!("cannot write down how the machine ended: {error}"));
        }
    }
}

impl RunArgs {
    /// The level that -q and -v ask for.
    fn level(&self) -> Option<LevelFilter> {
        match (self.quiet, self.verbose) {
            (true, _) => Some(LevelFilter::ERROR),
            (false, 0) => None,
            (false, 1) => Some(LevelFilter::INFO),
            (false, 2) => Some(LevelFilter::DEBUG),
            (false, _) => Some(LevelFilter::TRACE),
        }
    }

    /// Takes the machine's name, if it has one.
    fn named(&self, config: &VmConfig) -> anyhow::Result<Option<Named>> {
        let Some(name) = &self.name else { return Ok(None) };
        let registered = self.state.open()?.register(name)?;
        let attachable = self.in_background && config.serial == SerialConfig::Stdio;
        let console = attachable.then(|| ConsoleServer::start(registered.machine())).transpose()?;
        Ok(Some(Named { registered, console: console.map(|server| Console::Attachable(Arc::new(server))) }))
    }

    /// Prints what was asked for about a machine that has ended.
    fn report(&self, vm: &Vm, start: Instant) {
        if self.timings {
            print_timings(vm, start.elapsed());
        }
        if self.trace_exits {
            print_exits(vm);
        }
    }
}

/// A device may take a file descriptor for each of its guest's connections, and a shell's limit is often 1024.
pub(super) fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // Where it cannot be raised, the device says what it runs out of.
    _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Checks what can be checked without making anything, and prints the configuration.
fn dry_run(config: VmConfig) -> anyhow::Result<ExitStatus> {
    let mut json = serde_json::to_vec_pretty(&config)?;
    json.push(b'\n');
    Vm::builder(config).check()?;
    super::print(&json)
}

/// How the command ends when a guest has ended like this. `command`: exit status of the command that it was
/// started for, if it was, and if its init has reported one.
pub(super) fn status(ended: &Ended, command: Option<Option<u8>>) -> anyhow::Result<ExitStatus> {
    Ok(match (&ended.reason, &ended.cause) {
        (StopReason::Failed(why), _) => return Err(anyhow!("{why}")),
        (StopReason::GuestPanic, _) => {
            say("the guest's kernel panicked");
            ExitStatus::GuestPanic
        }
        (_, Some(Cause::Signal(number))) => ExitStatus::Signal(*number),
        (_, Some(Cause::OutputClosed)) => ExitStatus::SIGPIPE,
        (_, Some(Cause::OutputFailed(why))) => return Err(anyhow!("cannot write to standard output: {why}")),
        (StopReason::GuestReset | StopReason::GuestPowerOff, None) => match command {
            None => ExitStatus::Success,
            Some(Some(status)) => ExitStatus::Command(status),
            Some(None) => {
                return Err(anyhow!(
                    "the guest ended before it said how the command ended; is its init vmm's own?"
                ));
            }
        },
        (_, Some(Cause::Key)) | (StopReason::Requested, None) => ExitStatus::Success,
    })
}

/// A table of exits by cause and address, the most frequent first.
fn print_exits(vm: &Vm) {
    let mut rows: Vec<(usize, ExitCount)> = Vec::new();
    for (vcpu, exits) in vm.exits().into_iter().enumerate() {
        rows.extend(exits.into_iter().map(|exit| (vcpu, exit)));
    }
    rows.sort_by_key(|(_, exit)| std::cmp::Reverse(exit.count));
    let total: u64 = rows.iter().map(|(_, exit)| exit.count).sum();
    let row = |(vcpu, exit): &(usize, ExitCount)| {
        let address = exit.address.map(|address| format!(" {address:#x}")).unwrap_or_default();
        format!("{:>10}  vcpu{vcpu} {}{address}\n", exit.count, exit.cause)
    };
    let table: String = rows.iter().map(row).chain([format!("{total:>10}  exits\n")]).collect();
    // With standard error gone there is nobody to tell.
    _ = Stderr.write_all(table.as_bytes());
}

/// A table of milliseconds from the start of the process, and what was reached.
fn print_timings(vm: &Vm, stopped: Duration) {
    let reached = |milestone: &Milestone| Some((milestone.to_string(), vm.milestones().get(*milestone)?));
    let mut rows: Vec<_> = Milestone::ALL.iter().filter_map(reached).collect();
    rows.push(("stopped".into(), stopped));
    rows.sort_by_key(|&(_, time)| time);
    let table: String =
        rows.iter().map(|(name, time)| format!("{:>10.3} ms  {name}\n", time.as_secs_f64() * 1e3)).collect();
    // With standard error gone there is nobody to tell.
    _ = Stderr.write_all(table.as_bytes());
}
