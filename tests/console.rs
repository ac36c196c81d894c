//! A guest's console on terminals, pipes and files, and every way out. The guests are a few bytes of machine code
//! on this machine's /dev/kvm: what is tested here is the command and not the guest.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use harness::micro::Micro;
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};
use tempfile::TempDir;

/// Only ends a hang.
const DEADLINE: Duration = Duration::from_secs(60);

/// Prints `up`, then sends everything back that it is sent, and reboots after a `q`.
fn echo() -> Micro {
    const ECHO: &[u8] = &[
        0x66, 0xba, 0xfd, 0x03, // start: mov dx, 0x3fd
        0xec, 0xa8, 0x01, 0x74, 0xfb, // wait: in al, dx; test al, 1; jz wait
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xec, 0xee, // in al, dx; out dx, al
        0x3c, b'q', 0x75, 0xed, // cmp al, 'q'; jne start
    ];
    // The port holds input back until a driver has enabled the receive interrupt and connected it (OUT2).
    Micro::new().out8(0x3f9, 1).out8(0x3fc, 8).print("up\n").raw(ECHO).reset()
}

/// Prints `up`, then `x` for ever.
fn flood() -> Micro {
    // mov dx, 0x3f8; mov al, 'x'; again: out dx, al; jmp again
    Micro::new().print("up\n").raw(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd])
}

/// Prints `up`, then does nothing for ever.
fn idle() -> Micro {
    // again: hlt; jmp again
    Micro::new().print("up\n").raw(&[0xf4, 0xeb, 0xfd])
}

/// A kernel file and the command line that boots it.
struct Guest {
    dir: TempDir,
}

impl Guest {
    /// Where no guest can run, this panics: a run of all tests leaves those of this file out then, and says so.
    fn new(micro: &Micro) -> Self {
        assert!(harness::local_kvm().is_some(), "this needs a /dev/kvm on this machine");
        let dir = tempfile::tempdir().unwrap();
        micro.write(&dir.path().join("kernel")).unwrap();
        Self { dir }
    }

    fn kernel(&self) -> PathBuf {
        self.dir.path().join("kernel")
    }

    fn arguments(&self) -> Vec<String> {
        let kernel = self.kernel().display().to_string();
        [env!("CARGO_BIN_EXE_vmm"), "run", "--no-rootfs", "--memory", "16M", "--kernel", &kernel]
            .map(Into::into)
            .into()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.arguments()[0]);
        command
            .args(&self.arguments()[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs it with `input` on a pipe.
    fn run(&self, input: &[u8]) -> Output {
        let mut child = self.command().stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }

    fn on_terminal(&self) -> OnTerminal {
        OnTerminal::start(&self.arguments())
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !done() {
        assert!(start.elapsed() < DEADLINE, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for the end; one that does not come leaves nothing running.
#[track_caller]
fn end(child: &mut Child) -> ExitStatus {
    let start = std::time::Instant::now();
    loop {
        match child.try_wait().unwrap() {
            Some(status) => return status,
            None if start.elapsed() > DEADLINE => {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("it does not end");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Whether a write to `pipe` would wait.
fn is_full(pipe: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    poll(&mut [PollFd::new(pipe, PollFlags::OUT)], Some(&Timespec::default())).unwrap() == 0
}

/// A pipe that takes nothing more: its ends for reading and writing.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (read, write) = rustix::pipe::pipe().unwrap();
    while !is_full(&write) {
        rustix::io::write(&write, &[b'.'; 4096]).unwrap();
    }
    (read, write)
}

/// Whether all threads of a process wait for something.
fn sleeps(child: &Child) -> bool {
    let stat = |task: fs::DirEntry| fs::read_to_string(task.path().join("stat")).unwrap_or_default();
    let mut tasks = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    tasks.all(|task| stat(task.unwrap()).rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S')))
}

/// A program whose controlling terminal is ours.
struct OnTerminal {
    child: Child,
    master: File,
    slave: OwnedFd,
    before: Termios,
    seen: Arc<(Mutex<Vec<u8>>, Condvar)>,
}

impl OnTerminal {
    fn start(arguments: &[String]) -> Self {
        Self::start_with(arguments, None)
    }

    /// With its standard output there, and not on the terminal.
    fn start_with(arguments: &[String], stdout: Option<Stdio>) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        let before = tcgetattr(&slave).unwrap();
        let end = || Stdio::from(slave.try_clone().unwrap());
        let mut command = Command::new("setsid");
        command.arg("--ctty").args(arguments).stdin(end()).stderr(end());
        command.stdout(stdout.unwrap_or_else(end));
        let child = command.spawn().unwrap();
        let seen: Arc<(Mutex<Vec<u8>>, Condvar)> = Arc::default();
        let (mut reader, reading) = (File::from(master.try_clone().unwrap()), seen.clone());
        std::thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut buf) {
                reading.0.lock().unwrap().extend_from_slice(&buf[..n]);
                reading.1.notify_all();
            }
        });
        Self { child, master: master.into(), slave, before, seen }
    }

    fn send(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }

    /// Waits until `text` has appeared, and takes everything up to it.
    #[track_caller]
    fn expect(&self, text: &str) {
        let position = |seen: &[u8]| seen.windows(text.len()).position(|window| window == text.as_bytes());
        let seen = self.seen.0.lock().unwrap();
        let waiting = |seen: &mut Vec<u8>| position(seen).is_none();
        let (mut seen, _) = self.seen.1.wait_timeout_while(seen, DEADLINE, waiting).unwrap();
        match position(&seen) {
            Some(at) => drop(seen.drain(..at + text.len())),
            None => panic!("no '{text}' in '{}'", String::from_utf8_lossy(&seen)),
        }
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave).unwrap().local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO)
    }

    #[track_caller]
    fn wait_until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        wait_until(what, || done(self));
    }

    /// Waits for the end; the terminal is as it was.
    #[track_caller]
    fn end(mut self) -> ExitStatus {
        let status = end(&mut self.child);
        let after = tcgetattr(&self.slave).unwrap();
        assert_eq!(format!("{after:?}"), format!("{:?}", self.before), "the terminal is not restored");
        status
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        // A test that failed leaves nothing running.
        _ = self.child.kill();
    }
}

#[test]
fn the_terminal_is_the_guests_until_it_ends() {
    let guest = Guest::new(&echo());
    let mut terminal = guest.on_terminal();
    terminal.expect("up\n");
    assert!(terminal.is_raw());
    // Ctrl-C, Ctrl-Z and Ctrl-\ are the guest's, and so is Ctrl-A when it is typed twice or before another key.
    terminal.send(b"a\x03\x1a\x1c\x01\x01\x01e.");
    terminal.expect("a\x03\x1a\x1c\x01\x01e.");
    terminal.send(b"q");
    assert_eq!(terminal.end().code(), Some(0));
}

#[test]
fn ctrl_a_has_keys_of_its_own() {
    let guest = Guest::new(&echo());
    let mut terminal = guest.on_terminal();
    terminal.expect("up\n");
    terminal.send(b"\x01h");
    terminal.expect("\r\nvmm: Ctrl-A x       stops the guest\r\n");
    terminal.send(b"\x01");
    terminal.send(b"x");
    assert_eq!(terminal.end().code(), Some(0));
}

#[test]
fn ctrl_a_x_works_on_a_guest_that_does_not_listen() {
    let guest = Guest::new(&idle());
    let mut terminal = guest.on_terminal();
    terminal.expect("up\n");
    for _ in 0..64 {
        terminal.send(&[b'.'; 1024]);
    }
    terminal.send(b"\x01x");
    assert_eq!(terminal.end().code(), Some(0));
}

#[test]
fn ctrl_a_x_works_while_nobody_reads_the_output() {
    let guest = Guest::new(&flood());
    let (_read, write) = rustix::pipe::pipe().unwrap();
    let mut terminal = OnTerminal::start_with(&guest.arguments(), Some(write.try_clone().unwrap().into()));
    terminal.expect("Ctrl-A x stops it");
    wait_until("a guest that waits for a reader", || is_full(&write) && sleeps(&terminal.child));
    terminal.send(b"k");
    terminal.send(b"\x01x");
    assert_eq!(terminal.end().code(), Some(0));
}

#[test]
fn signals_end_the_guest_and_restore_the_terminal() {
    let guest = Guest::new(&idle());
    for (signal, status) in [(Signal::HUP, 129), (Signal::INT, 130), (Signal::QUIT, 131), (Signal::TERM, 143)]
    {
        let terminal = guest.on_terminal();
        terminal.expect("up\n");
        assert!(terminal.is_raw());
        kill_process(pid(&terminal.child), signal).unwrap();
        assert_eq!(terminal.end().code(), Some(status), "{signal:?}");
    }
}

#[test]
fn a_failure_restores_the_terminal() {
    // A jump into the MMIO gap.
    let guest = Guest::new(&Micro::new().print("up\n").eax(0xfd00_0000).raw(&[0xff, 0xe0]));
    let terminal = guest.on_terminal();
    terminal.expect("up\n");
    terminal.expect("vmm: ");
    assert_eq!(terminal.end().code(), Some(1));
}

/// A shell with job control that runs `script`, in which `VMM` boots the guest.
fn shell(guest: &Guest, script: &str) -> OnTerminal {
    let script = format!("set -m; {}", script.replace("VMM", &guest.arguments().join(" ")));
    OnTerminal::start(&["sh".into(), "-c".into(), script])
}

#[test]
fn in_the_background_it_leaves_the_terminal_alone_and_takes_it_in_the_foreground() {
    let guest = Guest::new(&echo());
    let mut terminal = shell(&guest, "VMM & read line; echo got $line; fg >/dev/null; echo status $?");
    terminal.expect("up\r\n");
    assert!(!terminal.is_raw());
    terminal.send(b"q\n");
    terminal.expect("got q\r\n");
    terminal.wait_until("raw in the foreground", OnTerminal::is_raw);
    terminal.send(b".q");
    terminal.expect(".q");
    terminal.expect("status 0\r\n");
    assert_eq!(terminal.end().code(), Some(0));
}

#[test]
fn stopped_it_gives_the_terminal_back_and_takes_it_again() {
    let guest = Guest::new(&echo());
    let mut terminal = shell(&guest, "VMM; echo stopped; read line; fg >/dev/null; echo status $?");
    terminal.expect("up\n");
    assert!(terminal.is_raw());
    let sh = terminal.child.id();
    let children = fs::read_to_string(format!("/proc/{sh}/task/{sh}/children")).unwrap();
    let vmm = Pid::from_raw(children.trim().parse().unwrap()).unwrap();
    kill_process(vmm, Signal::TSTP).unwrap();
    terminal.expect("stopped\r\n");
    assert!(!terminal.is_raw());
    terminal.send(b"go on\n");
    terminal.wait_until("raw again", OnTerminal::is_raw);
    terminal.send(b".q");
    terminal.expect(".q");
    terminal.expect("status 0\r\n");
    assert_eq!(terminal.end().code(), Some(0));
}

#[test]
fn a_pipe_goes_to_the_guest_as_it_is() {
    let guest = Guest::new(&echo());
    let bytes: Vec<u8> = (0..=255).filter(|byte| *byte != b'q').chain(*b"\x01x\x01hq").collect();
    let output = guest.run(&bytes);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(output.stdout, [b"up\n", &bytes[..]].concat());
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn the_end_of_the_input_is_not_the_end_of_the_guest() {
    let text = "all of it ".repeat(100);
    let guest = Guest::new(&Micro::new().print(&text).reset());
    for script in ["exec \"$@\" </dev/null", "exec \"$@\" <&-", ": | \"$@\""] {
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).args(guest.arguments());
        let output = command.output().unwrap();
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]), "{script}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), text, "{script}");
    }
}

#[test]
fn a_reader_that_has_seen_enough_ends_the_guest_quietly() {
    let guest = Guest::new(&flood());
    let mut child = guest.command().spawn().unwrap();
    let mut first = [0; 3];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut first).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert_eq!((&first, output.status.code()), (b"up\n", Some(141)), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn a_full_disk_behind_the_output_ends_the_guest_with_a_sentence() {
    let guest = Guest::new(&flood());
    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = guest.command().stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "vmm: cannot write to standard output: No space left on device\n"
    );
}

#[test]
fn a_flood_that_nobody_reads_does_not_keep_a_signal_from_ending_it() {
    let guest = Guest::new(&flood());
    let mut child = guest.command().spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 3]).unwrap();
    kill_process(pid(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
}

#[test]
fn a_flood_that_nobody_reads_makes_its_guest_wait_and_the_vmm_no_larger() {
    // The most memory that a VMM ever had, in KiB, once all its threads wait.
    let peak = |micro: &Micro| {
        let guest = Guest::new(micro);
        let (read, stdout) = rustix::pipe::pipe().unwrap();
        let mut child = guest.command().stdout(stdout.try_clone().unwrap()).spawn().unwrap();
        wait_until("the guest runs", || {
            let mut up = [0; 3];
            rustix::io::read(&read, &mut up).unwrap() == 3 && up == *b"up\n"
        });
        if micro.elf() == flood().elf() {
            wait_until("the pipe is full", || is_full(&stdout));
        }
        wait_until("all threads wait", || sleeps(&child));
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap()
    };
    let (quiet, loud) = (peak(&idle()), peak(&flood()));
    println!("{quiet} KiB at most without a flood, {loud} KiB with one");
    assert!(loud < quiet + 2048, "{quiet} KiB become {loud}");
}

#[test]
fn a_second_signal_does_not_wait_for_what_keeps_the_first_from_its_end() {
    let guest = Guest::new(&idle());
    // Nobody reads standard error, to which the timings go in the end.
    let (_read, stderr) = full_pipe();
    let mut child = guest.command().arg("--timings").stderr(stderr).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
    kill_process(pid(&child), Signal::TERM).unwrap();
    // Two that are pending at once are one.
    wait_until("the first signal is taken", || {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).unwrap();
        pending.trim().bytes().all(|digit| digit == b'0')
    });
    kill_process(pid(&child), Signal::TERM).unwrap();
    assert_eq!(end(&mut child).signal(), Some(Signal::TERM.as_raw()));
}

#[test]
fn a_limit_on_files_is_a_full_disk() {
    let guest = Guest::new(&Micro::new().print(&"much too much ".repeat(100)).reset());
    let run = |more: &str| {
        let script = format!("ulimit -f 1; exec \"$@\" {more}");
        let mut command = Command::new("sh");
        command.args(["-c", &script, "sh"]).args(guest.arguments()).current_dir(guest.dir.path());
        command.stdin(Stdio::null()).output().unwrap()
    };
    let output = run("--serial file=log");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let written = fs::metadata(guest.dir.path().join("log")).unwrap().len();
    assert!((1..1400).contains(&written), "{written} bytes");
    let output = run(">out");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(said, "vmm: cannot write to standard output: File too large\n");
}

#[test]
fn a_guest_that_ends_before_its_command_is_no_success() {
    // The first resets itself, the second triple faults.
    for micro in [Micro::new().reset(), Micro::new().raw(&[0x0f, 0x0b])] {
        let guest = Guest::new(&micro);
        let output = guest.command().args(["--", "true"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.starts_with("vmm: the guest ended before it said how the command ended;"), "{said}");
        assert_eq!(guest.command().status().unwrap().code(), Some(0), "no command, no complaint");
    }
}

#[test]
fn a_signal_that_was_ignored_from_the_start_stays_ignored() {
    let guest = Guest::new(&echo());
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP INT; exec \"$@\"", "sh"]).args(guest.arguments());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut up = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
    kill_process(pid(&child), Signal::HUP).unwrap();
    kill_process(pid(&child), Signal::INT).unwrap();
    child.stdin.take().unwrap().write_all(b"still here q").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), &b"still here q"[..]));
}

#[test]
fn nothing_is_left_behind_by_a_kill() {
    let guest = Guest::new(&idle());
    let mut child = guest.command().spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(Signal::KILL.as_raw()));
    let names: Vec<_> = fs::read_dir(guest.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["kernel"]);
}

#[test]
fn the_console_can_go_elsewhere() {
    let guest = Guest::new(&Micro::new().print("words").reset());
    let log = guest.dir.path().join("log");
    for (serial, file) in
        [(format!("file={}", log.display()), "words"), ("null".into(), ""), ("file=/dev/full".into(), "")]
    {
        let output = guest.command().args(["--serial", &serial]).output().unwrap();
        assert_eq!(
            (output.status.code(), output.stdout.as_slice()),
            (Some(0), &b""[..]),
            "{serial}: {output:?}"
        );
        if !file.is_empty() {
            assert_eq!(fs::read_to_string(&log).unwrap(), file);
        }
    }
}

#[test]
fn timings_tell_how_far_the_guest_got() {
    let guest = Guest::new(&Micro::new().print("x").reset());
    let output = guest.command().arg("--timings").output().unwrap();
    let table = String::from_utf8(output.stderr).unwrap();
    let rows: Vec<(f64, &str)> = table
        .lines()
        .map(|line| line.split_once(" ms  ").map(|(ms, name)| (ms.trim().parse().unwrap(), name)).unwrap())
        .collect();
    let names: Vec<&str> = rows.iter().map(|(_, name)| *name).collect();
    let reached = [
        "process started",
        "build began",
        "memory ready",
        "kernel loaded",
        "VM created",
        "vCPUs started",
        "first exit",
        "first byte on the console",
        "stopped",
    ];
    assert_eq!(names, reached, "{table}");
    assert!(rows.is_sorted_by(|a, b| a.0 <= b.0), "{table}");
}

#[test]
fn a_fifo_has_one_writer_from_start_to_end() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::fs::{CWD, FileType, Mode, OFlags};
    let acceleration = harness::local_kvm().expect("this needs a /dev/kvm on this machine");
    // In the cache, where the command looks for a kernel if it is given none.
    harness::Kernel::ours(acceleration).file().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let [initrd, fifo] = ["initrd", "fifo"].map(|name| dir.path().join(name));
    fs::write(&initrd, harness::initramfs().unwrap()).unwrap();
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, 0o600.into(), 0).unwrap();
    let reader = rustix::fs::open(&fifo, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_vmm"))
        .args(["run", "--no-rootfs", "--serial", "null", "--append", "console=hvc0", "--console"])
        .arg(format!("file={}", fifo.display()))
        .arg("--initrd")
        .arg(&initrd)
        .args(["--", "sh", "-c", "echo hello"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    // Up to the end that a reader such as `cat` would see.
    let mut output = Vec::new();
    let deadline = Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
    while poll(&mut [PollFd::new(&reader, PollFlags::IN)], Some(&deadline)).unwrap() > 0 {
        let mut chunk = [0; 4096];
        match rustix::io::read(&reader, &mut chunk).unwrap() {
            0 => break,
            n => output.extend(&chunk[..n]),
        }
    }
    assert_eq!(end(&mut child).code(), Some(0));
    assert!(String::from_utf8_lossy(&output).contains("hello"), "{output:?}");
}
