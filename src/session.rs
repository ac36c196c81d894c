//! A guest that runs in the foreground: its console on standard input and output, signals, and the end.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::stdio::{stdin, stdout};
use vmm_core::config::SerialConfig;
use vmm_core::console::{ConsoleInput, ConsoleReader};
use vmm_core::{StopReason, Vm, VmState};

use crate::attach::Clients;
use crate::machines::log::Log;
use crate::signals::{Request, Signals};
use crate::terminal::{self, KEYS_HELP, KeyCommand, Keys, Terminal};

/// How long output is gathered after the first byte of a burst: long for a guest, short for a person.
const SETTLE: Duration = Duration::from_micros(500);
/// Most bytes of one write to standard output.
const OUTPUT_CHUNK: usize = 16 << 10;
/// Most bytes of one read from standard input.
const INPUT_CHUNK: usize = 4 << 10;
/// How long the last output may take when somebody wants the end now.
const FLUSH_GRACE: Duration = Duration::from_millis(250);
/// How often a guest in the background looks whether it has the terminal again.
const BACKGROUND_INTERVAL: Duration = Duration::from_millis(500);

/// Why the command ended a guest that would have gone on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Ctrl-A x.
    Key,
    /// The signal with this number.
    Signal(u8),
    /// Nobody reads standard output any more.
    OutputClosed,
    /// Standard output cannot be written: what the kernel said.
    OutputFailed(String),
}

/// How a guest ended.
#[derive(Debug)]
pub struct Ended {
    /// What became of the machine.
    pub reason: StopReason,
    /// What the command had to do with it.
    pub cause: Option<Cause>,
}

/// What the threads of a session share.
struct Session {
    vm: Arc<Vm>,
    clients: Arc<Clients>,
    cause: OnceLock<Cause>,
    events: Sender<Event>,
}

/// What the main thread waits for once the machine has stopped.
enum Event {
    /// All output is written, or will never be.
    Flushed,
    /// Somebody wants the end now.
    Hurry,
}

/// The session whose machine a signal ends, if there is one.
type Current = Arc<Mutex<Option<Arc<Session>>>>;

/// The thread that waits for signals.
pub struct SignalThread {
    session: Current,
    leftover: Arc<OnceLock<PathBuf>>,
}

impl SignalThread {
    /// Starts it; to be done before any other thread is started, so that none of them gets a signal.
    pub fn start() -> anyhow::Result<Self> {
        let signals = Signals::block();
        let (session, leftover) = (Current::default(), Arc::new(OnceLock::new()));
        spawn("signals", {
            let (session, leftover) = (session.clone(), leftover.clone());
            move || serve_signals(&signals, &session, &leftover)
        })?;
        Ok(Self { session, leftover })
    }

    fn current(&self) -> MutexGuard<'_, Option<Arc<Session>>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes this file when a signal ends the process without a machine that could end first.
    pub fn remove_at_death(&self, path: &Path) {
        _ = self.leftover.set(path.into());
    }
}

/// How a guest is run.
pub struct Manner {
    /// Where its console is.
    pub console: Console,
    /// Who has a part in it, unless the machine itself has it.
    pub clients: Arc<Clients>,
    /// Nothing is said but errors.
    pub quiet: bool,
    /// What comes from a snapshot waits until somebody lets it go on.
    pub stays_paused: bool,
}

/// Where a guest's console is.
pub enum Console {
    /// On standard input and output.
    Stdio,
    /// In a log.
    Log(Log),
    /// The machine itself has it: in a file, or nowhere.
    Machine,
}

impl Console {
    /// Where it is when nothing but `serial` is said.
    pub fn of(serial: &SerialConfig) -> Self {
        match serial {
            SerialConfig::Stdio => Self::Stdio,
            SerialConfig::Null | SerialConfig::File(_) => Self::Machine,
        }
    }
}

/// Starts `vm`, or lets it go on, and runs it to its end, with the terminal as it was afterwards. `started` is called once the guest runs.
pub fn run(
    vm: &Arc<Vm>,
    Manner { console, clients, quiet, stays_paused }: Manner,
    signals: &SignalThread,
    started: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Ended> {
    let (events, finished) = mpsc::channel();
    let session = Arc::new(Session { vm: vm.clone(), clients, cause: OnceLock::new(), events });
    // From here on a signal ends the machine and no longer the process.
    *signals.current() = Some(session.clone());
    let stdio = matches!(console, Console::Stdio);
    let terminal = if stdio { Terminal::take() } else { None };
    let runs = match vm.state() {
        // It comes from a snapshot.
        VmState::Paused if stays_paused => Ok(()),
        VmState::Paused => vm.resume(),
        _ => vm.start(),
    };
    if let Err(error) = runs {
        let mut current = signals.current();
        // Unless a signal was quicker. The next one is for who comes next, or ends the process.
        if session.cause.get().is_none() {
            *current = None;
            return Err(error.into());
        }
    }
    started()?;
    let flushes = match (console, vm.take_console()) {
        (Console::Log(mut log), Some(output)) => {
            let session = session.clone();
            spawn("output", move || {
                session.copy_output(output, |data| {
                    log.append(data);
                    Ok(())
                });
            })?;
            true
        }
        (Console::Stdio, Some(output)) => {
            session.attach_stdio(vm, output, terminal.is_some(), quiet)?;
            true
        }
        _ => false,
    };

    let reason = vm.wait();
    if flushes {
        wait_until_flushed(&finished);
    }
    Ok(Ended { reason, cause: session.cause.get().cloned() })
}

/// Waits until all output is written, but not for long when somebody is in a hurry.
fn wait_until_flushed(finished: &Receiver<Event>) {
    if let Ok(Event::Hurry) = finished.recv() {
        let hurry = std::time::Instant::now();
        while let Ok(Event::Hurry) = finished.recv_timeout(FLUSH_GRACE.saturating_sub(hurry.elapsed())) {}
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let thread = thread::Builder::new().name(name.into()).spawn(work);
    thread.map(drop).with_context(|| format!("cannot start the thread '{name}'"))
}

impl Session {
    /// Starts the threads that copy between the console and standard input and output.
    fn attach_stdio(
        self: &Arc<Self>,
        vm: &Vm,
        output: ConsoleReader,
        terminal: bool,
        quiet: bool,
    ) -> anyhow::Result<()> {
        let (copier, input) = (self.clone(), vm.console_input());
        spawn("output", move || copier.copy_output(output, |data| write_all(stdout(), data)))?;
        let copier = self.clone();
        match terminal {
            true => spawn("input", move || copier.copy_keys(&input))?,
            false => spawn("input", move || copy_input(input))?,
        }
        if terminal && !quiet && !rustix::termios::isatty(stdout()) {
            crate::cli::say("the terminal belongs to the guest; Ctrl-A x stops it, Ctrl-A h lists the keys");
        }
        Ok(())
    }

    /// Ends the guest at once, without waiting until it has ended. The first cause is the one that counts.
    fn end(&self, cause: Cause) {
        _ = self.cause.set(cause);
        // It fails only when the main thread is on its way out.
        _ = self.events.send(Event::Hurry);
        self.vm.request_kill();
    }

    /// The thread that shows the guest's console to all that are attached, and to `write`.
    fn copy_output(&self, mut console: ConsoleReader, mut write: impl FnMut(&[u8]) -> Result<(), Errno>) {
        let mut buf = [0; OUTPUT_CHUNK];
        // The reader does not fail, it ends.
        while let Ok(n @ 1..) = console.read_burst(&mut buf, SETTLE) {
            self.clients.show(&buf[..n]);
            match write(&buf[..n]) {
                Ok(()) => {}
                Err(Errno::PIPE) => return self.end(Cause::OutputClosed),
                // The terminal was closed; SIGHUP says so, but may be ignored.
                Err(Errno::IO) if rustix::termios::isatty(stdout()) => return self.end(Cause::OutputClosed),
                Err(errno) => return self.end(Cause::OutputFailed(errno.to_string())),
            }
        }
        self.clients.end();
        _ = self.events.send(Event::Flushed);
    }

    /// The thread that passes a terminal's keys to the guest.
    fn copy_keys(&self, input: &ConsoleInput) {
        let mut keys = Keys::default();
        let mut buf = [0; INPUT_CHUNK];
        let mut guest = Vec::with_capacity(INPUT_CHUNK);
        loop {
            match terminal::in_foreground() {
                None => return,
                Some(false) => thread::sleep(BACKGROUND_INTERVAL),
                Some(true) => {
                    terminal::make_raw();
                    let mut typed = match read(stdin(), &mut buf) {
                        Ok(0) => return,
                        Ok(n) => &buf[..n],
                        // In the background since, or the terminal is gone.
                        Err(Errno::IO) if terminal::in_foreground() == Some(false) => continue,
                        Err(_) => return,
                    };
                    while !typed.is_empty() {
                        let command = keys.next_command(&mut typed, &mut guest);
                        // A guest that does not read must not keep Ctrl-A x from working.
                        if input.offer(&guest).is_ok_and(|taken| taken < guest.len()) {
                            self.tell("\x07");
                        }
                        guest.clear();
                        match command {
                            Some(KeyCommand::Stop) => return self.end(Cause::Key),
                            Some(KeyCommand::Help) => self.tell(KEYS_HELP),
                            // Whoever started a machine in the foreground does not leave it.
                            Some(KeyCommand::Detach) | None => {}
                        }
                    }
                }
            }
        }
    }

    /// Writes to the operator at the terminal.
    fn tell(&self, text: &str) {
        // With standard error gone there is nobody to tell.
        _ = std::io::Write::write_all(&mut terminal::Stderr, text.as_bytes());
    }
}

fn serve_signals(signals: &Signals, session: &Current, leftover: &OnceLock<PathBuf>) {
    let mut ending = false;
    while let Ok(request) = signals.wait() {
        let current = session.lock().unwrap_or_else(PoisonError::into_inner);
        match (request, &*current) {
            (Request::End(number), Some(session)) if !ending => {
                ending = true;
                session.end(Cause::Signal(number));
            }
            // There is no machine yet, or somebody does not want to wait until it is taken down.
            (Request::End(number), _) => {
                terminal::release();
                _ = leftover.get().map(std::fs::remove_file);
                signals.die(number);
            }
            (Request::Stop, _) => {
                terminal::restore();
                signals.stop_process();
                // Without a shell that could let it go on, the kernel does not stop it.
                terminal::make_raw();
            }
            (Request::Continue, _) => terminal::make_raw(),
        }
    }
}

/// The thread that passes a file or a pipe to the guest. Its end does not end the guest.
fn copy_input(mut input: ConsoleInput) {
    let mut buf = [0; INPUT_CHUNK];
    while let Ok(n @ 1..) = read(stdin(), &mut buf) {
        // It fails when the machine has stopped.
        if std::io::Write::write_all(&mut input, &buf[..n]).is_err() {
            return;
        }
    }
}

/// Reads, waiting even where whoever shares the descriptor has made it non-blocking.
pub fn read(fd: BorrowedFd<'_>, buf: &mut [u8]) -> Result<usize, Errno> {
    loop {
        match rustix::io::read(fd, &mut *buf) {
            Err(Errno::AGAIN) => wait_for(fd, PollFlags::IN),
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// Writes all of `data`, as [`read`] reads.
pub fn write_all(fd: BorrowedFd<'_>, mut data: &[u8]) -> Result<(), Errno> {
    while !data.is_empty() {
        match rustix::io::write(fd, data) {
            Ok(n) => data = &data[n..],
            Err(Errno::AGAIN) => wait_for(fd, PollFlags::OUT),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Waits for so long, or until `input` can be read. Returns at once with true when nobody reads standard output any more.
pub fn pause(time: Duration, input: Option<BorrowedFd<'_>>) -> bool {
    let mut fds = vec![PollFd::from_borrowed_fd(stdout(), PollFlags::empty())];
    fds.extend(input.map(|input| PollFd::from_borrowed_fd(input, PollFlags::IN)));
    // What is too long for the kernel is for ever.
    let time = rustix::event::Timespec::try_from(time).ok();
    _ = poll(&mut fds, time.as_ref());
    fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP)
}

fn wait_for(fd: BorrowedFd<'_>, events: PollFlags) {
    // Whatever it says, the next read or write says it too.
    _ = poll(&mut [PollFd::new(&fd, events)], None);
}
