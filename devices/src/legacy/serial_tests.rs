//! The serial port as a driver and as a terminal see it.

use std::sync::atomic::AtomicUsize;

use super::super::test_events::Raised;
use super::*;

#[derive(Default)]
struct Bench {
    interrupts: AtomicUsize,
    wanted: AtomicUsize,
    output: Mutex<Vec<u8>>,
}

impl IrqLine for Bench {
    fn trigger(&self) {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
    }
}

struct Output(Arc<Bench>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.output.lock().expect("lock").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Broken;

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn port() -> (Arc<Bench>, Arc<Raised>, SerialPort) {
    let (bench, events) = (Arc::<Bench>::default(), Raised::new());
    let wanted = bench.clone();
    let port = SerialPort::new(
        bench.clone(),
        events.clone(),
        Box::new(Output(bench.clone())),
        Box::new(move || _ = wanted.wanted.fetch_add(1, Ordering::Relaxed)),
    );
    (bench, events, port)
}

fn read(port: &SerialPort, offset: u64) -> u8 {
    let mut data = [0xaa];
    port.read(offset, &mut data);
    data[0]
}

/// What a driver does last when it opens the port.
fn open(port: &SerialPort) {
    port.write(4, &[0x0b]);
    port.write(1, &[0x05]);
}

fn wanted(bench: &Bench) -> usize {
    bench.wanted.load(Ordering::Relaxed)
}

#[test]
fn output_reaches_the_writer() {
    let (bench, _, port) = port();
    for byte in b"hello\r\n" {
        assert_ne!(read(&port, 5) & 0x20, 0, "the transmitter is always empty");
        port.write(0, &[*byte]);
    }
    assert_eq!(*bench.output.lock().expect("lock"), b"hello\r\n");
}

#[test]
fn input_waits_until_the_driver_opens_the_port() {
    let (bench, _, port) = port();
    assert_eq!(port.input(b"ls\n"), 0);
    // A probe turns all interrupts on for a moment, without OUT2.
    port.write(1, &[0x0f]);
    assert_eq!((port.input(b"ls\n"), wanted(&bench)), (0, 0));
    port.write(1, &[0]);
    open(&port);
    assert_eq!(wanted(&bench), 1);
    let before = bench.interrupts.load(Ordering::Relaxed);
    assert_eq!(port.input(b"ls\n"), 3);
    assert_eq!(bench.interrupts.load(Ordering::Relaxed), before + 1);
    assert_eq!([read(&port, 0), read(&port, 0), read(&port, 0)], *b"ls\n");
    assert_eq!(read(&port, 5) & 1, 0, "no more data");
    assert_eq!(wanted(&bench), 1, "nothing was refused");
}

#[test]
fn a_full_fifo_asks_again_once_it_is_drained() {
    let (bench, _, port) = port();
    open(&port);
    assert_eq!(port.input(&[b'x'; 100]), 64);
    assert_eq!(port.input(b"y"), 0);
    for left in (0..64).rev() {
        assert_eq!(wanted(&bench), 0, "{left} bytes left");
        assert_eq!(read(&port, 0), b'x');
    }
    assert_eq!(wanted(&bench), 1);
    assert_eq!(port.input(b"y"), 1);
    assert_eq!((read(&port, 0), wanted(&bench)), (b'y', 1));
}

#[test]
fn a_console_that_masks_interrupts_for_a_moment_loses_nothing() {
    let (bench, _, port) = port();
    open(&port);
    assert_eq!(port.input(b"a"), 1);
    port.write(1, &[0]);
    assert_eq!(port.input(b"b"), 0);
    port.write(1, &[0x05]);
    assert_eq!((read(&port, 0), wanted(&bench)), (b'a', 1));
    assert_eq!(port.input(b"b"), 1);
}

#[test]
fn loopback_takes_no_input() {
    let (_, _, port) = port();
    open(&port);
    port.write(4, &[0x1b]);
    assert_eq!(port.input(b"a"), 0);
    port.write(0, b"z");
    assert_eq!(read(&port, 0), b'z');
}

#[test]
fn only_accesses_of_one_byte_to_eight_registers_count() {
    let (bench, _, port) = port();
    for (offset, data) in [(0, &b"ab"[..]), (0, b""), (8, b"a"), (0x100, b"a"), (u64::MAX, b"a")] {
        port.write(offset, data);
        let mut answer = vec![0; data.len()];
        port.read(offset, &mut answer);
        assert!(answer.iter().all(|&byte| byte == 0), "{offset} {data:?}");
    }
    assert_eq!(*bench.output.lock().expect("lock"), b"");
}

#[test]
fn output_that_fails_is_counted() {
    let (bench, events, _) = port();
    let port = SerialPort::new(bench, events.clone(), Box::new(Broken), Box::new(|| ()));
    LAST_WORDS.iter().chain(b"\n").for_each(|&byte| port.write(0, &[byte]));
    assert_eq!(port.output_errors(), LAST_WORDS.len() as u64 + 1);
    let heard = [MachineEvent::ConsoleOutput, MachineEvent::LastWords];
    assert_eq!(events.take(), heard, "heard all the same");
}

#[test]
fn a_kernels_last_words_are_heard_at_the_end_of_their_line_every_time() {
    let (_, events, port) = port();
    let say = |text: &str| text.bytes().for_each(|byte| port.write(0, &[byte]));
    say("Kernel panic\nKernel panic - not sync\nnot syncing\n");
    assert_eq!(events.take(), [MachineEvent::ConsoleOutput], "once");
    say("[    1.0] KernelKernel panic - not syncing: no init");
    assert_eq!(events.take(), []);
    say(" found.\r\n");
    assert_eq!(events.take(), [MachineEvent::LastWords], "and no panic: any program can print that");
    say("a line between\nKernel panic - not syncing: Kernel panic - not syncing\n");
    assert_eq!(events.take(), [MachineEvent::LastWords], "a liar cannot use up the one chance to be heard");
}
