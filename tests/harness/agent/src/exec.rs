//! Runs a program for a client: input, output and signals go over the connection.

use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use lab_agent::{Exit, Input, Reply, receive, send};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};

/// Bytes read from the program at a time.
const CHUNK: usize = 64 << 10;

/// Runs `argv` until it ends, or kills it when the client goes away.
pub fn exec(
    input: BufReader<&TcpStream>,
    stream: &TcpStream,
    argv: &[String],
    env: &[(String, String)],
    cwd: Option<&str>,
) -> Result<()> {
    let (program, arguments) = argv.split_first().context("no program named")?;
    let mut command = Command::new(program);
    command.args(arguments).envs(env.iter().map(|(name, value)| (name, value)));
    if let Some(cwd) = cwd {
        command.current_dir(cwd);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().with_context(|| format!("run {program}"))?;
    let pid = Pid::from_child(&child);
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let output = Mutex::new(stream);
    thread::scope(|scope| {
        // Input has a thread of its own, so that a program which reads none still gets its signals.
        let (to_stdin, from_client) = mpsc::channel();
        scope.spawn(move || write_input(stdin, &from_client));
        scope.spawn(move || forward_input(input, to_stdin, pid));
        let out = scope.spawn(|| forward_output(stdout, &output, &Reply::Stdout));
        let err = scope.spawn(|| forward_output(stderr, &output, &Reply::Stderr));
        let exit = wait(pid);
        // What the program left running would hold its output open.
        let _ = kill_process_group(pid, Signal::KILL);
        let _ = (out.join(), err.join());
        let stream = output.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = send(*stream, &Reply::Exited(exit), &[]);
        // Ends the input threads; what was sent still arrives.
        let _ = stream.shutdown(Shutdown::Both);
    });
    child.wait().context("wait for the program")?;
    Ok(())
}

/// Waits without reaping: the number stays the program's own for as long as a thread here may signal it.
fn wait(pid: Pid) -> Exit {
    loop {
        match waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
            Ok(Some(status)) => match status.exit_status() {
                Some(code) => return Exit::Status(code),
                None => return Exit::Signal(status.terminating_signal().unwrap_or_default()),
            },
            Ok(None) | Err(Errno::INTR) => {}
            Err(_) => return Exit::Signal(0),
        }
    }
}

fn write_input(stdin: Option<ChildStdin>, from_client: &Receiver<Vec<u8>>) {
    let Some(mut stdin) = stdin else { return };
    while let Ok(data) = from_client.recv() {
        if stdin.write_all(&data).is_err() {
            // A program that has closed its input does not want the rest.
            return;
        }
    }
}

fn forward_input(mut input: BufReader<&TcpStream>, to_stdin: Sender<Vec<u8>>, pid: Pid) {
    let mut to_stdin = Some(to_stdin);
    while let Ok(Some((message, data))) = receive::<Input>(&mut input) {
        match message {
            Input::Stdin => {
                if let Some(to_stdin) = &to_stdin {
                    let _ = to_stdin.send(data);
                }
            }
            Input::StdinEnd => to_stdin = None,
            Input::Signal(number) => {
                if let Some(signal) = Signal::from_named_raw(number) {
                    let _ = kill_process(pid, signal);
                }
            }
            Input::Data(_) | Input::End => break,
        }
    }
    let _ = kill_process_group(pid, Signal::KILL);
}

fn forward_output(from: Option<impl Read>, to: &Mutex<&TcpStream>, kind: &Reply) {
    let Some(mut from) = from else { return };
    let mut buffer = vec![0; CHUNK];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let stream = to.lock().unwrap_or_else(PoisonError::into_inner);
        if send(*stream, kind, &buffer[..count]).is_err() {
            return;
        }
    }
}
