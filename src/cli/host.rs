//! A machine in this process, whatever it begins with: its name, its console, its API, and its end.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use clap::{ArgAction, Args};
use tracing::level_filters::LevelFilter;
use vmm_core::console::WhenFull;
use vmm_core::exits::ExitCount;
use vmm_core::{Milestone, StopReason, Vm, VmBuilder, VmConfig};

use super::machines::StateArgs;
use super::{detach, say};
use crate::api::{Control, MAX_BODY, Sockets};
use crate::attach::Clients;
use crate::exit::ExitStatus;
use crate::logging::{LogArgs, Logging};
use crate::machines::log::Log;
use crate::machines::{self, Machine, Outcome, Registered};
use crate::session::{self, Cause, Console, Ended, Manner, SignalThread};
use crate::terminal::Stderr;

/// What a command that runs a machine is told about everything around it.
#[derive(Args, Clone, Debug)]
pub struct HostArgs {
    /// Give the machine a name, by which vmm ps, logs, attach, stop and others know it
    #[arg(long, value_name = "NAME", value_parser = machines::check_name, help_heading = "Command")]
    name: Option<String>,

    /// Let it run in the background; its name is printed once the guest runs
    #[arg(short, long, help_heading = "Command")]
    pub detach: bool,

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
    pub quiet: bool,

    /// This process is the one in the background
    #[arg(long, hide = true)]
    in_background: bool,
}

/// A machine that is going to be built and run.
pub struct Launch<K> {
    pub builder: VmBuilder,
    /// Stays open until it is built.
    pub kept: K,
    /// It runs for the sake of one command, whose exit status counts.
    pub command: bool,
    pub logging: Arc<Logging>,
    /// When the process began.
    pub start: Instant,
}

impl HostArgs {
    /// Begins to log. Called first, since everything else may have something to say.
    pub fn log(&self) -> anyhow::Result<Arc<Logging>> {
        raise_file_limit();
        Ok(Logging::start(&self.log, self.level())?)
    }

    /// Whether another process is to run the machine: this one in the background.
    pub fn belongs_in_background(&self) -> bool {
        self.detach && !self.in_background
    }

    /// Starts that process, and ends when the guest runs.
    pub fn go_to_background(&self) -> anyhow::Result<ExitStatus> {
        detach::start(self.name.clone())
    }

    /// The directory that the machine is going to have, if it has a name.
    pub fn machine_directory(&self) -> anyhow::Result<Option<PathBuf>> {
        let Some(name) = &self.name else { return Ok(None) };
        Ok(Some(self.state.open()?.directory_of(name)))
    }

    /// For clones of a machine: they run in the background.
    pub fn of_clones(state: &StateArgs, rm: bool) -> Self {
        Self {
            name: None,
            detach: true,
            rm,
            state: state.clone(),
            api_sock: None,
            trace_exits: false,
            timings: false,
            log: LogArgs::default(),
            verbose: 0,
            quiet: false,
            in_background: true,
        }
    }

    /// Builds a machine and runs it to its end.
    pub fn run(&self, launch: Launch<impl Sized>) -> anyhow::Result<ExitStatus> {
        let register = || self.name.as_ref().map(|name| self.state.open()?.register(name)).transpose();
        self.run_as(register, launch)
    }

    /// As [`Self::run`], for a machine that gets its name by `register`.
    pub fn run_as(
        &self,
        register: impl FnOnce() -> anyhow::Result<Option<Registered>>,
        launch: Launch<impl Sized>,
    ) -> anyhow::Result<ExitStatus> {
        let Launch { builder, kept, command, logging, start } = launch;
        let signals = SignalThread::start()?;
        let named = register()?;
        let machine = named.as_ref().map(Registered::machine);
        // Commands by name know only their own.
        let sockets = Sockets::bind(self.api_sock.iter().cloned().chain(machine.map(Machine::api)))?;
        let name = machine.map_or("vmm", |machine| &machine.name);
        let console = self.console(builder.config(), machine)?;
        let builder = builder
            .name(name)
            .process_start(start)
            .console_when_full(WhenFull::Wait)
            .trace_exits(self.trace_exits);
        let vm = Arc::new(builder.build()?);
        // The machine has descriptors of its own.
        drop(kept);
        let clients = Arc::<Clients>::default();
        let manner = Manner { console, clients: clients.clone(), quiet: self.quiet, stays_paused: false };
        let mut server = None;
        let started = || {
            let control = || Control::of(name, vm.clone(), logging.clone(), clients);
            server = sockets.as_ref().map(|all| all.serve(Arc::new(control()), MAX_BODY)).transpose()?;
            if let Some(machine) = machine.filter(|_| self.in_background) {
                let log = machine.own_log();
                let log = Log::create(&log).with_context(|| format!("cannot write '{}'", log.display()))?;
                logging.write_to(log).map_err(|sentence| anyhow!(sentence))?;
            }
            // What can fail has not: from here on there is a machine.
            if let Some(named) = named.as_ref().filter(|_| !self.rm) {
                named.keep();
            }
            if self.in_background { detach::ready() } else { Ok(()) }
        };
        let ended = session::run(&vm, manner, &signals, started);
        let status = ended.and_then(|ended| {
            self.report(&vm, start);
            match ended {
                Ended { reason: StopReason::Requested, cause: None } => {
                    say("the machine was killed");
                    Ok(ExitStatus::Failure)
                }
                ended => status(&ended, command.then(|| vm.exit_status())),
            }
        });
        if let Some(named) = &named {
            write_down_end(named, &vm, &status);
        }
        status
    }

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

    /// Where the console is: what would be on the terminal is in a log when there is none.
    fn console(&self, config: &VmConfig, machine: Option<&Machine>) -> anyhow::Result<Console> {
        match (Console::of(&config.serial), machine.filter(|_| self.in_background).map(Machine::log)) {
            (Console::Stdio, Some(path)) => {
                let log = Log::create(&path).with_context(|| format!("cannot write '{}'", path.display()))?;
                Ok(Console::Log(log))
            }
            (console, _) => Ok(console),
        }
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

/// Writes down how a machine with a name ended.
fn write_down_end(named: &Registered, vm: &Vm, status: &anyhow::Result<ExitStatus>) {
    let (code, reason) = match status {
        Ok(status) => (status.code(), vm.wait().to_string()),
        Err(error) => (ExitStatus::Failure.code(), super::sentence(error)),
    };
    if let Err(error) = named.finish(&Outcome { status: code, reason }) {
        say(&format!("cannot write down how the machine ended: {error}"));
    }
}

/// A device may take a file descriptor for each of its guest's connections, and a shell's limit is often 1024.
pub(super) fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // Where it cannot be raised, the device says what it runs out of.
    _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
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
                    "the guest ended before it said how the command ended; it was stopped, or its init is not vmm's own"
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
