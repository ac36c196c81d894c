//! `vmm api`: a control API that waits for a machine to be configured and started; and the same under Firecracker's
//! name, with the flags that its clients pass.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::Instant;

use anyhow::{Context, anyhow};
use clap::{ArgAction, Args, Parser};
use tracing_subscriber::filter::Targets;
use vmm_core::config::Transport;
use vmm_core::console::WhenFull;
use vmm_core::devices::virtio::net::mmds::Metadata;

use super::{host, run, say};
use crate::api::firecracker::VERSION;
use crate::api::firecracker::types::{FullConfiguration, Logger, Metrics, MmdsContents};
use crate::api::strict;
use crate::api::{Control, MAX_BODY, Order, Sockets, open_api};
use crate::attach::Clients;
use crate::exit::{ExitStatus, UsageError};
use crate::logging::{Form, LogArgs, Logging};
use crate::session::{self, Console, Manner, SignalThread};

/// Serve the control API on a unix socket and wait for a machine to be configured
///
/// Speaks Firecracker's API, and more below /vmm/v1. The machine's console is standard input and output; when the guest
/// ends, so does vmm.
#[derive(Args, Clone, Debug)]
pub struct ApiArgs {
    /// Path of the socket, which only its owner can use
    #[arg(long, value_name = "PATH", required_unless_present = "open_api")]
    api_sock: Option<PathBuf>,

    /// The machine's name in the API
    #[arg(long, value_name = "NAME", default_value = "vmm")]
    id: String,

    /// How the guest reaches its devices: mmio or pci
    #[arg(long, value_name = "TRANSPORT", value_parser = run::named::<Transport>(&["mmio", "pci"]), default_value = "mmio")]
    transport: Transport,

    #[command(flatten)]
    log: LogArgs,

    /// Print the API's description (OpenAPI) and end
    #[arg(long, exclusive = true)]
    open_api: bool,
}

/// Runs the subcommand.
/// `start` is when the process began.
pub fn run(args: &ApiArgs, start: Instant) -> anyhow::Result<ExitStatus> {
    if args.open_api {
        return super::print(open_api().as_bytes());
    }
    let service = Service {
        socket: args.api_sock.clone(),
        id: args.id.clone(),
        transport: args.transport,
        max_body: MAX_BODY,
        metadata_limit: MAX_BODY,
        metadata: None,
        logging: Logging::start(&args.log, None)?,
        launch: None,
        metrics: None,
    };
    service.run(start)
}

/// The flags of Firecracker, which this program is called by its name.
#[derive(Parser, Debug)]
#[command(name = "firecracker", disable_version_flag = true, about = "A VMM with Firecracker's API: vmm")]
#[allow(clippy::struct_excessive_bools, reason = "they are Firecracker's flags")]
struct FirecrackerArgs {
    /// Path of the API's socket
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    api_sock: PathBuf,
    /// The machine's name
    #[arg(long, default_value = "anonymous-instance")]
    id: String,
    /// Configuration of the machine, which is started at once
    #[arg(long, value_name = "PATH")]
    config_file: Option<PathBuf>,
    /// Serve no API
    #[arg(long, requires = "config_file")]
    no_api: bool,
    /// File or FIFO for log lines
    #[arg(long, value_name = "PATH")]
    log_path: Option<PathBuf>,
    /// Off, Trace, Debug, Info, Warn or Error
    #[arg(long, default_value = "Info")]
    level: String,
    /// Log only this module
    #[arg(long)]
    module: Option<String>,
    /// Log lines name their level
    #[arg(long)]
    show_level: bool,
    /// Log lines name where they come from
    #[arg(long)]
    show_log_origin: bool,
    /// File or FIFO for metrics
    #[arg(long, value_name = "PATH")]
    metrics_path: Option<PathBuf>,
    /// Data for the guest's metadata service
    #[arg(long, value_name = "PATH")]
    metadata: Option<PathBuf>,
    /// Taken and without effect: milestones tell more
    #[arg(long)]
    boot_timer: bool,
    /// Largest body of a request in bytes
    #[arg(long, value_name = "BYTES", default_value_t = MAX_BODY)]
    http_api_max_payload_size: usize,
    /// Most bytes of metadata; as the largest body of a request if it is left out
    #[arg(long, value_name = "BYTES")]
    mmds_size_limit: Option<usize>,
    /// Taken and without effect: there are no seccomp filters
    #[arg(long)]
    no_seccomp: bool,
    /// Taken and without effect: there are no seccomp filters
    #[arg(long, value_name = "PATH")]
    seccomp_filter: Option<PathBuf>,
    /// The guest reaches its devices by PCI
    #[arg(long)]
    enable_pci: bool,
    /// Taken and without effect
    #[arg(long, value_name = "MICROSECONDS")]
    start_time_us: Option<u64>,
    /// Taken and without effect
    #[arg(long, value_name = "MICROSECONDS")]
    start_time_cpu_us: Option<u64>,
    /// Taken and without effect
    #[arg(long, value_name = "MICROSECONDS")]
    parent_cpu_time_us: Option<u64>,
    /// Print the version
    #[arg(long, short = 'V', action = ArgAction::SetTrue)]
    version: bool,
}

/// Whether this program was called by Firecracker's name.
pub fn is_firecracker(program: &Path) -> bool {
    program.file_name().is_some_and(|name| name == "firecracker")
}

/// Runs as Firecracker does.
/// `start` is when the process began.
pub fn firecracker(start: Instant) -> anyhow::Result<ExitStatus> {
    let args = match FirecrackerArgs::try_parse() {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => {
            error.print()?;
            return Ok(ExitStatus::Success);
        }
        Err(error) => return Err(super::usage::sentence(&error, "firecracker").into()),
    };
    if args.version {
        return super::print(format!("Firecracker v{VERSION}\n").as_bytes());
    }
    let metadata = args.metadata.as_deref().map(Metadata::read).transpose().map_err(UsageError)?;
    let level = serde_json::from_value(args.level.clone().into());
    let level = level.map_err(|_| {
        UsageError(format!("'{}' is no level; use Off, Trace, Debug, Info, Warn or Error", args.level))
    })?;
    let launch = args.config_file.as_deref().map(load).transpose()?;
    let logger = Logger {
        log_path: args.log_path,
        level,
        show_level: args.show_level,
        show_log_origin: args.show_log_origin,
        module: args.module,
    };
    let logging = Logging::install(Form::Text, Targets::new());
    logging.set(&logger).map_err(|sentence| anyhow!(sentence))?;
    let service = Service {
        socket: (!args.no_api).then_some(args.api_sock),
        id: args.id,
        transport: if args.enable_pci { Transport::Pci } else { Transport::Mmio },
        max_body: args.http_api_max_payload_size,
        metadata_limit: args.mmds_size_limit.unwrap_or(args.http_api_max_payload_size),
        metadata: metadata.map(|metadata| MmdsContents(metadata.data)),
        logging,
        metrics: args.metrics_path.map(|metrics_path| Metrics { metrics_path }),
        launch,
    };
    service.run(start)
}

/// Reads a configuration file of Firecracker's.
fn load(path: &Path) -> anyhow::Result<FullConfiguration> {
    let shown = path.display();
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read configuration '{shown}'"))?;
    let parsed = strict::from_slice(text.as_bytes());
    Ok(parsed.map_err(|error| UsageError(format!("configuration '{shown}' is not valid: {error}")))?)
}

/// An API without a machine, until somebody asks for one.
struct Service {
    socket: Option<PathBuf>,
    id: String,
    transport: Transport,
    max_body: usize,
    metadata_limit: usize,
    metadata: Option<MmdsContents>,
    logging: Arc<Logging>,
    metrics: Option<Metrics>,
    /// Is to be started at once.
    launch: Option<FullConfiguration>,
}

impl Service {
    fn run(self, start: Instant) -> anyhow::Result<ExitStatus> {
        host::raise_file_limit();
        let signals = SignalThread::start()?;
        let (launcher, launches) = mpsc::channel();
        let (transport, limit) = (self.transport, self.metadata_limit);
        let control = Arc::new(Control::empty(&self.id, transport, limit, launcher, self.logging.clone()));
        if let Some(contents) = self.metadata {
            control.set_metadata(|_| Ok(contents)).map_err(|refusal| anyhow!(refusal.0))?;
        }
        if let Some(metrics) = &self.metrics {
            control.metrics().open(&metrics.metrics_path).map_err(|sentence| anyhow!(sentence))?;
        }
        let sockets = Sockets::bind(&self.socket)?;
        _ = self.socket.as_deref().map(|path| signals.remove_at_death(path));
        let serve = |all: &Sockets| all.serve(control.clone(), self.max_body);
        let _server = sockets.as_ref().map(serve).transpose()?;
        tracing::info!(id = self.id, "vmm {} is ready", env!("CARGO_PKG_VERSION"));
        if let Some(configuration) = self.launch {
            let control = control.clone();
            // The machine is built on this thread, and whoever asks for it waits.
            std::thread::Builder::new()
                .name("start".into())
                .spawn(move || control.start_or_end(configuration))?;
        }
        let status = run_machine(&launches, &signals, control.clients(), &self.id, start)?;
        if let Err(sentence) = control.metrics().flush(control.vm_if_started().as_deref()) {
            say(&sentence);
        }
        Ok(status)
    }
}

/// Builds the machines that are asked for until one starts, and runs that to its end.
fn run_machine(
    orders: &Receiver<Order>,
    signals: &SignalThread,
    clients: &Arc<Clients>,
    name: &str,
    start: Instant,
) -> anyhow::Result<ExitStatus> {
    loop {
        // The API keeps the other end.
        let (builder, stays_paused, reply) = match orders.recv()? {
            Order::Launch { builder, stays_paused, reply } => (builder, stays_paused, reply),
            Order::End(sentence) => return Err(anyhow!(sentence)),
        };
        let console = Console::of(&builder.config().serial);
        let built = builder.name(name).process_start(start).console_when_full(WhenFull::Wait).build();
        let vm = match built {
            Ok(vm) => Arc::new(vm),
            Err(error) => {
                // Whoever asked is gone, and then nobody needs to know.
                _ = reply.send(Err(super::sentence(&error.into())));
                continue;
            }
        };
        let started = {
            let (vm, reply) = (vm.clone(), reply.clone());
            move || {
                // Whoever asked may be gone; the machine runs all the same.
                _ = reply.send(Ok(vm));
                Ok(())
            }
        };
        let manner = Manner { console, clients: clients.clone(), quiet: true, stays_paused };
        match session::run(&vm, manner, signals, started) {
            Ok(ended) => return host::status(&ended, None),
            Err(error) => _ = reply.send(Err(super::sentence(&error))),
        }
    }
}
