//! The commands for machines with a name: one `vmm run` each, which these find by its directory and ask by its API.

mod stats;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use axum::http::Method;
use clap::{Args, Subcommand, ValueEnum};
use clap_complete::ArgValueCandidates;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use rustix::stdio::{stdin, stdout};
use serde::Serialize;
use serde_json::{Map, json};

use super::{completion, number, print};
use crate::api::own::Inspection;
use crate::exit::ExitStatus;
use crate::logging;
use crate::machines::replay::Replay;
use crate::machines::{Machine, StateDir, client, find_alive, log};
use crate::session::{self, pause};
use crate::terminal::{self, KeyCommand, Keys, Terminal};

/// How long a machine that was killed may take to be gone.
const KILL_GRACE: Duration = Duration::from_secs(5);

/// Where machines are.
#[derive(Args, Clone, Debug)]
pub struct StateArgs {
    /// Directory of named machines [default: $XDG_RUNTIME_DIR/vmm]
    #[arg(long, value_name = "PATH", help_heading = "Command")]
    state_dir: Option<PathBuf>,
}

impl StateArgs {
    /// The directory.
    pub fn open(&self) -> anyhow::Result<StateDir> {
        StateDir::open(self.state_dir.as_deref())
    }
}

/// A machine.
#[derive(Args, Clone, Debug)]
pub struct One {
    /// The machine's name, or what is unique of its beginning
    #[arg(add = ArgValueCandidates::new(completion::machines))]
    name: String,
    #[command(flatten)]
    state: StateArgs,
}

impl One {
    fn find(&self) -> anyhow::Result<Machine> {
        self.state.open()?.find(&self.name)
    }

    /// The machine, which runs.
    pub fn find_alive(&self) -> anyhow::Result<Machine> {
        find_alive(&self.state.open()?, &self.name)
    }

    /// Where machines are.
    pub fn state(&self) -> &StateArgs {
        &self.state
    }
}

/// With how many machines something is done at once: each takes some open files.
const AT_ONCE: usize = 16;

/// Machines.
#[derive(Args, Clone, Debug)]
pub struct Several {
    /// The machines' names, or what is unique of their beginnings
    #[arg(required = true, value_name = "NAME", add = ArgValueCandidates::new(completion::machines))]
    names: Vec<String>,
    #[command(flatten)]
    state: StateArgs,
}

impl Several {
    /// Does `work` with many of them at once, with the others even if one fails.
    fn each(
        &self,
        work: impl Fn(&StateDir, &Machine) -> anyhow::Result<()> + Sync,
    ) -> anyhow::Result<ExitStatus> {
        let state = self.state.open()?;
        let work = |name: &String| state.find(name).and_then(|machine| work(&state, &machine));
        let mut failures = Vec::new();
        for names in self.names.chunks(AT_ONCE) {
            thread::scope(|scope| {
                let threads: Vec<_> = names.iter().map(|name| scope.spawn(|| work(name))).collect();
                let panicked = |_| Err(anyhow!("a bug: the thread for a machine panicked"));
                let done = threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked));
                failures.extend(done.filter_map(Result::err));
            });
        }
        let mut failures = failures.into_iter();
        let first = failures.next();
        failures.for_each(|error| super::say(&super::sentence(&error)));
        first.map_or(Ok(ExitStatus::Success), Err)
    }
}

/// The form of what is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// For programs
    Json,
}

/// Commands for machines with a name.
#[derive(Subcommand, Clone, Debug)]
pub enum MachineCommand {
    /// List machines with a name
    Ps {
        /// The form of the list
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
        #[command(flatten)]
        state: StateArgs,
    },
    /// Print what was on a machine's console
    Logs {
        #[command(flatten)]
        machine: One,
        /// Go on with what comes, until the machine ends
        #[arg(short, long)]
        follow: bool,
        /// Begin with the last so many lines
        #[arg(short = 'n', long, value_name = "LINES", value_parser = |text: &str| number(text, 0..=usize::MAX))]
        tail: Option<usize>,
        /// Print what vmm itself has said since the machine went to the background: see --log of vmm run
        #[arg(long)]
        vmm: bool,
    },
    /// Change which log lines a running machine's vmm writes
    #[command(
        after_help = "Examples:\n  vmm log-level web debug\n  vmm log-level web warn,devices::virtio::net=trace; vmm logs -f --vmm web"
    )]
    LogLevel {
        #[command(flatten)]
        machine: One,
        /// A level, or levels of modules: see --log of vmm run
        #[arg(value_parser = |text: &str| logging::parse(text).map(|_| text.to_owned()))]
        filter: String,
    },
    /// Attach the terminal to a machine's console; Ctrl-A d leaves it
    Attach {
        #[command(flatten)]
        machine: One,
    },
    /// Press the power button, and kill the machine when it takes too long
    Stop {
        #[command(flatten)]
        machines: Several,
        /// Seconds that the guest has to shut down
        #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = |text: &str| number(text, 0..=86_400_u64))]
        time: u64,
    },
    /// End a machine at once
    Kill {
        #[command(flatten)]
        machines: Several,
    },
    /// Bring a machine to a standstill
    Pause {
        #[command(flatten)]
        machines: Several,
    },
    /// Let a paused machine go on
    Resume {
        #[command(flatten)]
        machines: Several,
    },
    /// Remove what is kept of a machine that has ended
    Rm {
        #[command(flatten)]
        machines: Several,
        /// Kill it first
        #[arg(short, long)]
        force: bool,
    },
    /// Print all about a machine as JSON
    Inspect {
        #[command(flatten)]
        machine: One,
    },
    Stats(stats::StatsArgs),
    /// Wait until a machine has ended, and end with its exit status
    Wait {
        #[command(flatten)]
        machine: One,
    },
    /// Change a device of a running machine
    #[command(
        after_help = "Examples:\n  vmm update web rootfs bandwidth=10M/1s\n  vmm update web balloon0 size=128M\n  vmm update web disk1 path=new.img"
    )]
    Update {
        #[command(flatten)]
        machine: One,
        /// The device, as vmm inspect names it
        device: String,
        /// Keys and their new values; without a value a key is taken away
        #[arg(required = true, value_name = "KEY=[VALUE]")]
        changes: Vec<String>,
    },
}

/// Runs one of the commands.
pub fn run(command: &MachineCommand) -> anyhow::Result<ExitStatus> {
    match command {
        MachineCommand::Ps { format, state } => ps(&state.open()?, *format),
        MachineCommand::Logs { machine, follow, tail, vmm } => logs(&machine.find()?, *follow, *tail, *vmm),
        MachineCommand::LogLevel { machine, filter } => log_level(&machine.find_alive()?, filter),
        MachineCommand::Attach { machine } => attach(&machine.find_alive()?),
        MachineCommand::Stop { machines, time } => machines.each(|_, machine| stop(machine, *time)),
        MachineCommand::Kill { machines } => machines.each(|_, machine| stop(machine, 0)),
        MachineCommand::Pause { machines } => machines.each(|_, machine| set_state(machine, "Paused")),
        MachineCommand::Resume { machines } => machines.each(|_, machine| set_state(machine, "Resumed")),
        MachineCommand::Rm { machines, force } => machines.each(|state, machine| {
            if *force {
                stop(machine, 0)?;
            }
            state.remove(machine)
        }),
        MachineCommand::Inspect { machine } => inspect(&machine.find()?),
        MachineCommand::Stats(args) => stats::run(args),
        MachineCommand::Wait { machine } => wait(&machine.find()?),
        MachineCommand::Update { machine, device, changes } => {
            update(&machine.find_alive()?, device, changes)
        }
    }
}

/// One line of `vmm ps`.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// As the API has it; `saving` while a snapshot is made, `ended` or `killed` when there is none any more, `unresponsive` when
    /// it does not answer.
    state: String,
    pid: Option<i32>,
    cpus: Option<u64>,
    memory: Option<String>,
    memory_resident_bytes: Option<u64>,
    exit_status: Option<u8>,
    reason: Option<String>,
}

impl Row {
    /// How a terminal shows it: what has ended is faint, what is wrong is red.
    fn colour(&self) -> Option<u8> {
        match self.state.as_str() {
            "paused" => Some(33),
            "ended" => Some(2),
            "killed" | "unresponsive" => Some(31),
            _ => None,
        }
    }
}

fn row(machine: &Machine) -> Row {
    let inspection = machine.is_alive().then(|| ask_inspection(machine));
    let mut row = Row {
        name: machine.name.clone(),
        state: "unresponsive".into(),
        pid: None,
        cpus: None,
        memory: None,
        memory_resident_bytes: None,
        exit_status: None,
        reason: None,
    };
    match inspection {
        Some(Ok(inspection)) => {
            let config = inspection.config.unwrap_or_default();
            row.state = if inspection.saving { "saving".into() } else { inspection.state };
            row.cpus = config["cpus"].as_u64();
            row.memory = config["memory"].as_str().map(str::to_owned);
            row.memory_resident_bytes = inspection.usage.map(|usage| usage.memory_resident_bytes);
            row.pid = machine.pid();
        }
        Some(Err(_)) => row.pid = machine.pid(),
        None => {
            let outcome = machine.outcome();
            row.state = if outcome.is_some() { "ended" } else { "killed" }.into();
            (row.exit_status, row.reason) = outcome.map(|outcome| (outcome.status, outcome.reason)).unzip();
        }
    }
    row
}

fn ps(state: &StateDir, format: Format) -> anyhow::Result<ExitStatus> {
    let machines = state.list()?;
    // A machine that does not answer takes its time; the others do not wait for it.
    let rows: Vec<Row> = thread::scope(|scope| {
        let threads: Vec<_> = machines.iter().map(|machine| scope.spawn(|| row(machine))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    if format == Format::Json {
        return print_json(&rows);
    }
    let colours: Vec<Option<u8>> = rows.iter().map(Row::colour).collect();
    let mut table = vec![["NAME", "STATE", "PID", "CPUS", "MEMORY", "RESIDENT"].map(String::from)];
    for row in rows {
        let state = match (row.exit_status, row.reason) {
            (Some(status), Some(reason)) => format!("{} ({status}: {reason})", row.state),
            _ => row.state,
        };
        let shown = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        table.push([
            row.name,
            state,
            shown(row.pid.map(|pid| pid.to_string())),
            shown(row.cpus.map(|cpus| cpus.to_string())),
            shown(row.memory),
            shown(row.memory_resident_bytes.map(mib)),
        ]);
    }
    let text = columns(&table);
    if !terminal::shows_colours(&std::io::stdout()) {
        return print(text.as_bytes());
    }
    let painted = text.lines().zip([None].into_iter().chain(colours)).map(|(line, colour)| match colour {
        Some(colour) => format!("\x1b[{colour}m{line}\x1b[0m\n"),
        None => format!("{line}\n"),
    });
    print(painted.collect::<String>().as_bytes())
}

pub(super) fn print_json(value: &impl Serialize) -> anyhow::Result<ExitStatus> {
    let mut json = serde_json::to_vec_pretty(value)?;
    json.push(b'\n');
    print(&json)
}

pub(super) fn mib(bytes: u64) -> String {
    format!("{:.1}M", bytes as f64 / f64::from(1 << 20))
}

/// Lines of left-aligned columns.
pub(super) fn columns<const N: usize>(table: &[[String; N]]) -> String {
    let widths: [usize; N] =
        std::array::from_fn(|i| table.iter().map(|row| row[i].chars().count()).max().unwrap_or(0));
    let line = |row: &[String; N]| {
        let cells: Vec<_> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    table.iter().map(line).collect()
}

fn ask_inspection(machine: &Machine) -> anyhow::Result<Inspection> {
    Ok(serde_json::from_value(client::ask_quickly(machine, Method::GET, "/vmm/v1/inspect")?)?)
}

fn log_level(machine: &Machine, filter: &str) -> anyhow::Result<ExitStatus> {
    client::ask(machine, Method::PUT, "/vmm/v1/log", Some(&json!({ "filter": filter })))?;
    Ok(ExitStatus::Success)
}

fn logs(machine: &Machine, follow: bool, tail: Option<usize>, own: bool) -> anyhow::Result<ExitStatus> {
    let more = |time| match pause(time, None) {
        true => Err(std::io::ErrorKind::BrokenPipe.into()),
        false => Ok(machine.is_alive()),
    };
    let follow: Option<log::Follow<'_>> = if follow { Some(&more) } else { None };
    let path = if own { machine.own_log() } else { machine.log() };
    let mut stdout = std::io::stdout().lock();
    let copied = match std::io::IsTerminal::is_terminal(&stdout) {
        true => log::copy(&path, &mut Replay::to(stdout), tail, follow),
        false => log::copy(&path, &mut stdout, tail, follow),
    };
    match copied {
        Ok(()) => Ok(ExitStatus::Success),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(ExitStatus::SIGPIPE),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && own => {
            Err(anyhow!("'{}' says everything on its terminal: it never was in the background", machine.name))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(anyhow!(
            "'{}' has no log: its console is on a terminal or in a file of its own",
            machine.name
        )),
        Err(error) => Err(error).context("cannot copy the log"),
    }
}

fn attach(machine: &Machine) -> anyhow::Result<ExitStatus> {
    let (stream, read) = client::attach(machine)?;
    let terminal = Terminal::take();
    if terminal.is_some() {
        super::say("Ctrl-A d leaves the machine");
    }
    let mut writer = stream.try_clone()?;
    let is_terminal = terminal.is_some();
    // It ends with the process.
    thread::Builder::new().name("input".into()).spawn(move || {
        let (mut keys, mut buf) = (Keys::attached(), [0; 1024]);
        while let Ok(n @ 1..) = session::read(stdin(), &mut buf) {
            let (mut typed, mut guest, mut leave) = (&buf[..n], Vec::new(), false);
            if !is_terminal {
                guest.extend_from_slice(typed);
                typed = &[];
            }
            while !typed.is_empty() && !leave {
                match keys.next_command(&mut typed, &mut guest) {
                    Some(KeyCommand::Detach) => leave = true,
                    Some(KeyCommand::Help) => {
                        super::say("Ctrl-A d leaves the machine, Ctrl-A Ctrl-A sends Ctrl-A")
                    }
                    Some(KeyCommand::Stop) | None => {}
                }
            }
            if writer.write_all(&guest).is_err() {
                return;
            }
            if leave {
                _ = writer.shutdown(std::net::Shutdown::Both);
                return;
            }
        }
    })?;
    let mut buf = [0; 16 << 10];
    let mut ended = session::write_all(stdout(), &read);
    while ended.is_ok() {
        // A guest may be quiet for long.
        if pause(Duration::MAX, Some(stream.as_fd())) {
            ended = Err(Errno::PIPE);
            break;
        }
        match (&stream).read(&mut buf) {
            Ok(n @ 1..) => ended = session::write_all(stdout(), &buf[..n]),
            _ => break,
        }
    }
    drop(terminal);
    match ended {
        Ok(()) => Ok(ExitStatus::Success),
        Err(Errno::PIPE) => Ok(ExitStatus::SIGPIPE),
        Err(error) => Err(super::cannot_write(&error.into())),
    }
}

/// Ends the machine: by its API, with so many seconds for the guest to shut down, and if that does not help, by a signal.
pub fn stop(machine: &Machine, seconds: u64) -> anyhow::Result<()> {
    let Ok(watch) = machine.watch() else { return Ok(()) };
    if !watch.is_alive() {
        return Ok(());
    }
    let asked = client::ask(machine, Method::PUT, "/vmm/v1/stop", Some(&json!({ "deadline_s": seconds })));
    if asked.is_ok() && watch.wait(Some(Duration::from_secs(seconds) + KILL_GRACE)) {
        return Ok(());
    }
    // Its lock is held, so the number is that of its process.
    if let Some(pid) = machine.pid().filter(|_| machine.is_alive()).and_then(Pid::from_raw) {
        kill_process(pid, Signal::KILL).with_context(|| format!("cannot kill '{}'", machine.name))?;
    }
    match watch.wait(Some(KILL_GRACE)) {
        true => Ok(()),
        false => bail!("'{}' does not end", machine.name),
    }
}

fn set_state(machine: &Machine, state: &str) -> anyhow::Result<()> {
    ensure!(machine.is_alive(), "'{}' has ended", machine.name);
    client::ask(machine, Method::PATCH, "/vm", Some(&json!({ "state": state }))).map(drop)
}

fn inspect(machine: &Machine) -> anyhow::Result<ExitStatus> {
    let value = match machine.is_alive() {
        true => client::ask(machine, Method::GET, "/vmm/v1/inspect", None)?,
        false => serde_json::to_value(row(machine))?,
    };
    print_json(&value)
}

fn wait(machine: &Machine) -> anyhow::Result<ExitStatus> {
    let watch = machine.watch()?;
    watch.wait(None);
    match watch.outcome() {
        Some(outcome) => Ok(ExitStatus::Command(outcome.status)),
        None => Err(anyhow!("'{}' was killed before it could say how it ended", machine.name)),
    }
}

fn update(machine: &Machine, device: &str, changes: &[String]) -> anyhow::Result<ExitStatus> {
    // It becomes a part of a path.
    let named = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    ensure!(
        !device.is_empty() && device.bytes().all(named),
        "'{device}' is no name of a device; 'vmm inspect {}' lists them",
        machine.name
    );
    let mut patch = Map::new();
    for change in changes {
        let (key, value) = change.split_once('=').unwrap_or((change, ""));
        patch.insert(key.into(), super::value(value));
    }
    client::ask(machine, Method::PATCH, &format!("/vmm/v1/devices/{device}"), Some(&patch.into()))?;
    Ok(ExitStatus::Success)
}
