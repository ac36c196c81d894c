//! A running program, on this machine or in the lab, with everything that it has printed so far.

use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
pub use lab_agent::Exit;
use lab_agent::{Input, MAX_DATA, Reply, receive, send};
pub use rustix::process::Signal;
use rustix::process::{Pid, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};

/// Output beyond this many bytes per stream is counted as lost and not kept.
const KEPT: usize = 64 << 20;

/// For waits that a person ends.
pub const FOREVER: Duration = Duration::from_secs(365 * 86_400);

/// A program to run: what to start, and how.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables added to the environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: Option<String>,
    /// Output goes straight to our own standard output and error, and is not kept.
    pub passthrough: bool,
}

impl Program {
    /// A program with its arguments.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self { argv: argv.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// A line for `sh -c`.
    pub fn shell(line: &str) -> Self {
        Self::new(["sh", "-c", line])
    }
}

/// How a program ended, and what it printed.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text, when the program ended with status 0; else an error that shows what it said.
    pub fn ok(self) -> Result<String> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if self.exit != Exit::Status(0) {
            bail!("{}:\n{}{}", self.exit, text(&self.stdout), text(&self.stderr));
        }
        Ok(text(&self.stdout))
    }
}

/// A running program. It is killed when this is dropped before it has ended.
pub struct Process {
    shared: Arc<Shared>,
    control: Control,
    stdin: Option<Stdin>,
    /// How much of standard output `expect` has consumed.
    expected: usize,
}

enum Control {
    Local { child: Child, pid: Pid },
    Lab(TcpStream),
}

/// A program's standard input; it ends when this is dropped.
pub struct Stdin(StdinEnd);

enum StdinEnd {
    Local(ChildStdin),
    Lab(TcpStream),
}

impl Write for Stdin {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            StdinEnd::Local(pipe) => pipe.write(data),
            StdinEnd::Lab(connection) => {
                let part = &data[..data.len().min(MAX_DATA)];
                send(connection, &Input::Stdin, part).map(|()| part.len())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Stdin {
    fn drop(&mut self) {
        if let StdinEnd::Lab(connection) = &self.0 {
            let _ = send(connection, &Input::StdinEnd, &[]);
        }
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// How it ended, or why we shall never know; all output is there by then.
    ended: Option<Result<Exit, String>>,
}

#[derive(Clone, Copy)]
enum Stream {
    Stdout,
    Stderr,
}

impl Process {
    /// Starts a program on this machine.
    pub fn start_local(program: &Program) -> Result<Self> {
        let (name, arguments) = program.argv.split_first().context("no program named")?;
        let mut command = Command::new(name);
        command.args(arguments).envs(program.env.iter().map(|(name, value)| (name, value)));
        if let Some(cwd) = &program.cwd {
            command.current_dir(cwd);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().with_context(|| format!("cannot run {name}"))?;
        let pid = Pid::from_child(&child);
        let shared = Arc::new(Shared::default());
        let passthrough = program.passthrough;
        let reader = |from: Option<Box<dyn Read + Send>>, stream| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let Some(mut from) = from else { return };
                let mut buffer = vec![0; 64 << 10];
                while let Ok(count @ 1..) = from.read(&mut buffer) {
                    shared.keep(stream, &buffer[..count], passthrough);
                }
            })
        };
        let out = reader(child.stdout.take().map(|from| Box::new(from) as _), Stream::Stdout);
        let err = reader(child.stderr.take().map(|from| Box::new(from) as _), Stream::Stderr);
        let watching = Arc::clone(&shared);
        thread::spawn(move || {
            let exit = watch(pid);
            // What the program left running would hold its output open.
            let _ = kill_process_group(pid, Signal::KILL);
            let _ = (out.join(), err.join());
            watching.end(exit);
        });
        let stdin = child.stdin.take().map(|pipe| Stdin(StdinEnd::Local(pipe)));
        Ok(Self { shared, control: Control::Local { child, pid }, stdin, expected: 0 })
    }

    /// Follows a program that the lab's agent has been asked to run on this connection.
    pub(crate) fn follow_lab(connection: TcpStream, passthrough: bool) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let following = Arc::clone(&shared);
        let mut input = BufReader::with_capacity(1 << 18, connection.try_clone()?);
        thread::spawn(move || {
            let ended = loop {
                match receive::<Reply>(&mut input) {
                    Ok(Some((Reply::Stdout, data))) => following.keep(Stream::Stdout, &data, passthrough),
                    Ok(Some((Reply::Stderr, data))) => following.keep(Stream::Stderr, &data, passthrough),
                    Ok(Some((Reply::Exited(exit), _))) => break Ok(exit),
                    Ok(Some((Reply::Failed(why), _))) => break Err(why),
                    Ok(Some((other, _))) => break Err(format!("the lab answered {other:?}")),
                    Ok(None) => break Err("the lab went away".to_owned()),
                    Err(error) => break Err(format!("the lab's connection broke: {error}")),
                }
            };
            following.end(ended);
        });
        let stdin = Some(Stdin(StdinEnd::Lab(connection.try_clone()?)));
        Ok(Self { shared, control: Control::Lab(connection), stdin, expected: 0 })
    }

    /// Writes to its standard input.
    pub fn send(&mut self, data: impl AsRef<[u8]>) -> Result<()> {
        let stdin = self.stdin.as_mut().context("standard input is closed")?;
        stdin.write_all(data.as_ref()).context("write to standard input")
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Its standard input, for another thread to write to.
    pub fn take_stdin(&mut self) -> Option<Stdin> {
        self.stdin.take()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        match &self.control {
            Control::Local { pid, .. } => Ok(kill_process(*pid, signal)?),
            Control::Lab(connection) => Ok(send(connection, &Input::Signal(signal.as_raw()), &[])?),
        }
    }

    /// Waits until `text` appears on standard output, after what earlier calls have waited for, and returns what came
    /// before it. The deadline is there to end a hang; the error shows all output so far.
    pub fn expect(&mut self, text: &str, deadline: Duration) -> Result<String> {
        let before;
        (before, self.expected) = self.expect_from(self.expected, text, deadline)?;
        Ok(before)
    }

    /// As [`Self::expect`], after the first `from` bytes, whatever was waited for. The second value is where `text` ends.
    pub fn expect_from(&self, from: usize, text: &str, deadline: Duration) -> Result<(String, usize)> {
        let (found, state) = self.shared.wait(deadline, |state| {
            let at = find(&state.stdout[from..], text.as_bytes())?;
            Some((at, String::from_utf8_lossy(&state.stdout[from..from + at]).into_owned()))
        });
        match found {
            Some((at, before)) => Ok((before, from + at + text.len())),
            None => bail!("waited for '{text}', but {}", state.describe(deadline)),
        }
    }

    /// Waits until it ends. The deadline is there to end a hang: past it the program is killed, and the error shows all output.
    pub fn wait(self, deadline: Duration) -> Result<Output> {
        let (_, mut state) = self.shared.wait(deadline, |_| None::<()>);
        match &state.ended {
            Some(Ok(exit)) => {
                let exit = *exit;
                Ok(Output {
                    exit,
                    stdout: std::mem::take(&mut state.stdout),
                    stderr: std::mem::take(&mut state.stderr),
                })
            }
            Some(Err(why)) => bail!("{why}"),
            None => bail!("waited for the end, but {}", state.describe(deadline)),
        }
    }

    /// What it has printed on standard output so far.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().stdout).into_owned()
    }

    /// Its process number, when it runs on this machine.
    pub fn local_pid(&self) -> Option<u32> {
        match &self.control {
            Control::Local { child, .. } => Some(child.id()),
            Control::Lab(_) => None,
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        match &mut self.control {
            Control::Local { child, pid, .. } => {
                if self.shared.lock().ended.is_none() {
                    let _ = kill_process_group(*pid, Signal::KILL);
                }
                let _ = child.wait();
            }
            // The agent kills what nobody listens to.
            Control::Lab(connection) => drop(connection.shutdown(Shutdown::Both)),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, stream: Stream, data: &[u8], passthrough: bool) {
        if passthrough {
            let _ = match stream {
                Stream::Stdout => std::io::stdout().write_all(data).and_then(|()| std::io::stdout().flush()),
                Stream::Stderr => std::io::stderr().write_all(data),
            };
            return;
        }
        let mut state = self.lock();
        let kept = match stream {
            Stream::Stdout => &mut state.stdout,
            Stream::Stderr => &mut state.stderr,
        };
        let room = KEPT.saturating_sub(kept.len());
        kept.extend_from_slice(&data[..data.len().min(room)]);
        self.changed.notify_all();
    }

    fn end(&self, how: Result<Exit, String>) {
        self.lock().ended = Some(how);
        self.changed.notify_all();
    }

    /// Waits until `look` finds something, the program has ended, or the deadline has passed.
    fn wait<T>(
        &self,
        deadline: Duration,
        mut look: impl FnMut(&State) -> Option<T>,
    ) -> (Option<T>, MutexGuard<'_, State>) {
        let end = Instant::now() + deadline;
        let mut state = self.lock();
        loop {
            let found = look(&state);
            let left = end.saturating_duration_since(Instant::now());
            if found.is_some() || state.ended.is_some() || left.is_zero() {
                return (found, state);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    /// What became of the program, with all that it printed.
    fn describe(&self, deadline: Duration) -> String {
        let end = match &self.ended {
            Some(Ok(exit)) => format!("it ended with {exit}"),
            Some(Err(why)) => why.clone(),
            None => format!("nothing came within {} s", deadline.as_secs()),
        };
        let (stdout, stderr) = (String::from_utf8_lossy(&self.stdout), String::from_utf8_lossy(&self.stderr));
        format!("{end}; its output:\n{stdout}\n--- its standard error:\n{stderr}")
    }
}

/// Waits without reaping: the number stays the program's own until `Process` is dropped.
fn watch(pid: Pid) -> Result<Exit, String> {
    loop {
        match waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
            Ok(Some(status)) => {
                return Ok(match status.exit_status() {
                    Some(code) => Exit::Status(code),
                    None => Exit::Signal(status.terminating_signal().unwrap_or_default()),
                });
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(format!("cannot wait for the program: {error}")),
        }
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}
