//! The control API: how soon it is there, how soon it answers, and what fifty machines that are started by it cost. Beside
//! it QEMU with its own control socket (QMP).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::binaries;
use harness::micro::Micro;

use super::measure::{Subject, median_of};
use super::qemu;
use super::table::Table;

/// Requests of one run.
const REQUESTS: usize = 2000;
/// Machines that are started at once.
const MACHINES: usize = 50;
/// Only ends a hang.
const DEADLINE: Duration = Duration::from_secs(30);

const COLUMNS: [&str; 5] = ["ready ms", "p50 us", "p99 us", "starts/s", "Pss KiB"];

/// A program with a control socket, which ends with this value.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

/// Measures `runs` times.
pub fn run(runs: usize) -> Result<Table> {
    let dir = tempfile::tempdir()?;
    let vmm = binaries::release()?;
    let (socket, kernel) = (dir.path().join("api.sock"), dir.path().join("idle"));
    // hlt for ever
    Micro::new().raw(&[0xf4, 0xeb, 0xfd]).write(&kernel)?;
    let ours =
        Subject::new("vmm", &vmm.display().to_string(), &format!("api --api-sock {}", socket.display()));
    let qmp = format!("-S -qmp unix:{},server=on,wait=off", socket.display());
    let theirs = qemu::microvm("QEMU microvm", false, "", &qmp)?;
    let (mut of_ours, mut of_theirs) = (Vec::new(), Vec::new());
    for round in 0..=runs {
        let our = [answers(&ours, &socket, http)?, fifty(&vmm, &kernel, &dir.path().join("state"))?].concat();
        let their = answers(&theirs, &socket, qmp_status)?;
        if round > 0 {
            of_ours.push(our);
            of_theirs.push(their);
        }
    }
    let title = format!(
        "api: start to the first answer, {REQUESTS} requests, {MACHINES} machines; medians of {runs}"
    );
    let mut table = Table::new(title, COLUMNS);
    table.row(&ours.name, &median_of(&of_ours));
    table.row(&theirs.name, &[median_of(&of_theirs), vec![f64::NAN; 2]].concat());
    table.notes.push("p50, p99: GET / and query-status, one after the other on one connection".into());
    table.notes.push(format!(
        "starts/s: {MACHINES} times 'vmm run --detach' at once, a guest of 16 MiB that does nothing; Pss of one of them"
    ));
    Ok(table)
}

/// Milliseconds from the start to the first answer, then the median and the 99th percentile of the others in microseconds.
fn answers(
    subject: &Subject,
    socket: &Path,
    ask: fn(&mut BufReader<UnixStream>) -> Result<()>,
) -> Result<Vec<f64>> {
    _ = std::fs::remove_file(socket);
    let began = Instant::now();
    let _served = Served(subject.command().spawn()?);
    let stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(_) => ensure!(began.elapsed() < DEADLINE, "{} does not listen", subject.name),
        }
    };
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut stream = BufReader::new(stream);
    if subject.name != "vmm" {
        // QMP greets, and takes nothing before this.
        line(&mut stream)?;
        stream.get_mut().write_all(b"{\"execute\": \"qmp_capabilities\"}\n")?;
        line(&mut stream)?;
    }
    ask(&mut stream)?;
    let ready = began.elapsed();
    let mut times = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        let began = Instant::now();
        ask(&mut stream)?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    let micros = |at: usize| times[at].as_secs_f64() * 1e6;
    Ok(vec![ready.as_secs_f64() * 1e3, micros(REQUESTS / 2), micros(REQUESTS * 99 / 100)])
}

fn line(stream: &mut BufReader<UnixStream>) -> Result<String> {
    let mut line = String::new();
    stream.read_line(&mut line)?;
    ensure!(!line.is_empty(), "the program has ended");
    Ok(line)
}

fn http(stream: &mut BufReader<UnixStream>) -> Result<()> {
    stream.get_mut().write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")?;
    ensure!(line(stream)?.contains(" 200 "), "no answer");
    let mut len = 0;
    loop {
        let header = line(stream)?.to_ascii_lowercase();
        match header.trim().strip_prefix("content-length:") {
            Some(value) => len = value.trim().parse()?,
            None if header.trim().is_empty() => break,
            None => {}
        }
    }
    let mut body = vec![0; len];
    std::io::Read::read_exact(stream, &mut body)?;
    Ok(())
}

fn qmp_status(stream: &mut BufReader<UnixStream>) -> Result<()> {
    stream.get_mut().write_all(b"{\"execute\": \"query-status\"}\n")?;
    // Events may come in between.
    while !line(stream)?.contains("\"return\"") {}
    Ok(())
}

/// Machines that start in a second, and what one of them takes of the host's memory in KiB.
fn fifty(vmm: &Path, kernel: &Path, state: &Path) -> Result<Vec<f64>> {
    let command = |subcommand: &str| {
        let mut command = Command::new(vmm);
        command.arg(subcommand).arg("--state-dir").arg(state).stdin(Stdio::null()).stdout(Stdio::null());
        command
    };
    let names: Vec<String> = (0..MACHINES).map(|i| format!("m{i}")).collect();
    let began = Instant::now();
    let start = |name: &String| {
        let mut run = command("run");
        run.args(["-q", "--detach", "--rm", "--no-rootfs", "--memory", "16M", "--name", name, "--kernel"]);
        run.arg(kernel).spawn()
    };
    let starts: Vec<Child> = names.iter().map(start).collect::<std::io::Result<_>>()?;
    for mut child in starts {
        ensure!(child.wait()?.success(), "a machine did not start");
    }
    let rate = MACHINES as f64 / began.elapsed().as_secs_f64();
    let mut total = 0;
    for name in &names {
        let lock = std::fs::read_to_string(state.join(name).join("lock"))?;
        let pid = lock.lines().next().context("a process")?;
        let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("Pss")?;
        total += pss.trim().trim_end_matches(" kB").trim().parse::<u64>()?;
    }
    ensure!(command("kill").args(&names).status()?.success(), "a machine was not killed");
    Ok(vec![rate, total as f64 / MACHINES as f64])
}
