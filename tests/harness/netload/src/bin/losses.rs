//! `losses`: a load that notices whatever its machine loses: bytes of memory, bytes of a stream, ticks of a timer, time.
//!
//! `losses serve PORT` runs beside the machine, and `losses ADDRESS:PORT` in it. There are two connections between them. One
//! carries a known stream in each direction, all the time. On the other, the server asks how far the machine is: once for
//! each line that it is given, and prints the answer. When its input ends, both ends finish what they have begun, compare what they have
//! sent with what has come, and end with success if all of it was right.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::io::read;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

/// Bytes of one write to the stream, after which it waits a moment: others are to have the processor too.
const BLOCK: usize = 16 << 10;
const PAUSE: Duration = Duration::from_millis(1);
/// 64 MiB of words, in pieces.
const PIECES: usize = 16;
const PIECE: usize = (64 << 20) / 8 / PIECES;
/// Nanoseconds between two ticks.
const TICK: u64 = 10_000_000;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", port] => serve(port.parse()?),
        [server] => load(server),
        _ => bail!("losses serve PORT | losses ADDRESS:PORT"),
    }
}

/// How far both ends are.
#[derive(Default)]
struct Progress {
    /// Nobody is to begin anything more.
    end: AtomicBool,
    /// Bytes of the stream.
    sent: AtomicU64,
    received: AtomicU64,
    /// Times that the whole memory was looked at.
    passes: AtomicU64,
    /// Lines of the timer.
    ticks: AtomicU64,
    clocks: Clocks,
}

impl Progress {
    fn ends(&self) -> bool {
        self.end.load(Ordering::SeqCst)
    }
}

/// The clocks of a machine, which all of its threads look at.
#[derive(Default)]
struct Clocks {
    /// The newest time of each that anybody has seen.
    newest: [AtomicU64; 2],
    backwards: AtomicU64,
}

impl Clocks {
    /// Reads both clocks, in nanoseconds, and counts those that are behind what somebody has seen before.
    fn look(&self) -> [u64; 2] {
        let clocks = [ClockId::Monotonic, ClockId::Realtime];
        std::array::from_fn(|i| {
            let seen = self.newest[i].load(Ordering::SeqCst);
            let time = clock_gettime(clocks[i]);
            let nanos = time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64;
            if nanos < seen {
                self.backwards.fetch_add(1, Ordering::SeqCst);
            }
            self.newest[i].fetch_max(nanos, Ordering::SeqCst);
            nanos
        })
    }
}

/// What the machine answers: the number of the question, and how far it is.
#[derive(Clone, Copy)]
struct Answer([u64; 7]);

impl Answer {
    const BYTES: usize = 7 * 8;

    fn of(number: u64, progress: &Progress) -> Self {
        let [monotonic, realtime] = progress.clocks.look();
        let count = |count: &AtomicU64| count.load(Ordering::SeqCst);
        let backwards = count(&progress.clocks.backwards);
        let [ticks, passes, received] = [&progress.ticks, &progress.passes, &progress.received].map(count);
        Self([number, monotonic, realtime, backwards, ticks, passes, received])
    }

    fn to_bytes(self) -> Vec<u8> {
        self.0.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        Self(std::array::from_fn(|i| u64::from_le_bytes(words[i])))
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[1..].iter().try_for_each(|number| write!(f, "{number} "))
    }
}

/// A number in all of whose bytes each of the two has a part.
fn mixed(high: u64, low: u64) -> u64 {
    (high << 32 ^ low).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The bytes of a stream from `at` on: no piece of it is like another one.
fn stream_bytes(at: u64, bytes: &mut [u8]) {
    for (byte, at) in bytes.iter_mut().zip(at..) {
        *byte = mixed(0, at / 8).to_le_bytes()[(at % 8) as usize];
    }
}

/// What one thread does, and what it is called.
type Part = (&'static str, Box<dyn FnOnce() -> Result<()> + Send>);

/// Runs each part on a thread of its own, until all have ended or one has failed.
fn together(parts: Vec<Part>) -> Result<()> {
    let (tell, ends) = mpsc::channel();
    let count = parts.len();
    for (name, part) in parts {
        let tell = tell.clone();
        thread::spawn(move || {
            let end = std::panic::catch_unwind(std::panic::AssertUnwindSafe(part));
            // It fails only when another part has failed before.
            _ = tell.send((name, end));
        });
    }
    for (name, end) in ends.iter().take(count) {
        end.unwrap_or_else(|_| bail!("panicked")).context(name)?;
    }
    Ok(())
}

fn send_stream(mut stream: &TcpStream, progress: &Progress) -> Result<()> {
    let mut block = vec![0; BLOCK];
    while !progress.ends() {
        let at = progress.sent.load(Ordering::SeqCst);
        stream_bytes(at, &mut block);
        stream.write_all(&block).with_context(|| format!("after {at} bytes"))?;
        progress.sent.fetch_add(BLOCK as u64, Ordering::SeqCst);
        thread::sleep(PAUSE);
    }
    Ok(stream.shutdown(Shutdown::Write)?)
}

fn receive_stream(mut stream: &TcpStream, progress: &Progress) -> Result<()> {
    let (mut block, mut want) = (vec![0; BLOCK], vec![0; BLOCK]);
    loop {
        let at = progress.received.load(Ordering::SeqCst);
        let count = stream.read(&mut block).with_context(|| format!("after {at} bytes"))?;
        if count == 0 {
            return Ok(());
        }
        stream_bytes(at, &mut want[..count]);
        let wrong = block[..count].iter().zip(&want).position(|(have, want)| have != want);
        ensure!(wrong.is_none(), "other bytes came than were sent, in {count} from {at} on, at {wrong:?}");
        progress.received.fetch_add(count as u64, Ordering::SeqCst);
    }
}

/// Beside the machine.
fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    println!("serving");
    let (stream, mut questions) = (Arc::new(listener.accept()?.0), listener.accept()?.0);
    questions.set_nodelay(true)?;
    println!("connected");
    let progress = Arc::new(Progress::default());
    let parts = {
        let (sender, receiver) = ((stream.clone(), progress.clone()), (stream, progress.clone()));
        let progress = progress.clone();
        let ask = move || {
            let asked = ask_all(&mut questions, &progress);
            progress.end.store(true, Ordering::SeqCst);
            asked.and_then(|()| Ok(questions.shutdown(Shutdown::Write)?))
        };
        vec![
            ("sending", Box::new(move || send_stream(&sender.0, &sender.1)) as _),
            ("receiving", Box::new(move || receive_stream(&receiver.0, &receiver.1)) as _),
            ("asking", Box::new(ask) as _),
        ]
    };
    together(parts)?;
    println!("sent and received: {:?} {:?}", progress.sent, progress.received);
    Ok(())
}

/// Asks once for each line; prints when, in nanoseconds of the clock here, before and after, then the answer, and what has come here.
fn ask_all(questions: &mut TcpStream, progress: &Progress) -> Result<()> {
    for (number, line) in (0..).zip(std::io::stdin().lines()) {
        line?;
        let [before, _] = progress.clocks.look();
        questions.write_all(&u64::to_le_bytes(number))?;
        let mut bytes = [0; Answer::BYTES];
        questions.read_exact(&mut bytes).context("no answer")?;
        let [after, _] = progress.clocks.look();
        let answer = Answer::from_bytes(&bytes);
        ensure!(answer.0[0] == number, "question {number} has the answer to {}", answer.0[0]);
        println!("answer: {before} {after} {answer}{:?}", progress.received);
    }
    Ok(())
}

/// In the machine.
fn load(server: &str) -> Result<()> {
    let stream = Arc::new(TcpStream::connect(server)?);
    let mut questions = TcpStream::connect(server)?;
    questions.set_nodelay(true)?;
    let progress = Arc::new(Progress::default());
    let part = |part: fn(&TcpStream, &Progress) -> Result<()>| {
        let (stream, progress) = (stream.clone(), progress.clone());
        Box::new(move || part(&stream, &progress)) as _
    };
    let mut parts: Vec<Part> = vec![
        ("sending", part(send_stream)),
        ("receiving", part(receive_stream)),
        ("memory", part(|_, progress| keep_memory(progress))),
        ("timer", part(|_, progress| tick(progress))),
    ];
    let answering = progress.clone();
    parts.push(("answering", Box::new(move || answer_all(&mut questions, &answering))));
    together(parts)?;
    let Progress { sent, received, passes, ticks, clocks, .. } = &*progress;
    println!("losses: {sent:?} {received:?} {passes:?} {ticks:?} {:?}", clocks.backwards);
    Ok(())
}

/// Answers until nobody asks any more, which is the end of all.
fn answer_all(questions: &mut TcpStream, progress: &Progress) -> Result<()> {
    let mut number = [0; 8];
    loop {
        match questions.read_exact(&mut number) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error.into()),
        }
        questions.write_all(&Answer::of(u64::from_le_bytes(number), progress).to_bytes())?;
    }
    progress.end.store(true, Ordering::SeqCst);
    Ok(())
}

/// Looks at every word of the memory again and again, and writes one piece anew each time.
fn keep_memory(progress: &Progress) -> Result<()> {
    let mut generations = [0; PIECES];
    let mut memory = vec![0; PIECES * PIECE];
    let fill = |piece: &mut [u64], generation| {
        piece.iter_mut().zip(0..).for_each(|(word, i)| *word = mixed(generation, i));
    };
    memory.chunks_mut(PIECE).for_each(|piece| fill(piece, 0));
    while !progress.ends() {
        for (number, piece) in memory.chunks(PIECE).enumerate() {
            let generation = generations[number];
            let wrong = piece.iter().zip(0..).position(|(&word, i)| word != mixed(generation, i));
            ensure!(wrong.is_none(), "piece {number} of generation {generation} is wrong at {wrong:?}");
            progress.clocks.look();
        }
        let pass = progress.passes.fetch_add(1, Ordering::SeqCst) + 1;
        let number = pass as usize * 7 % PIECES;
        generations[number] = pass;
        fill(&mut memory[number * PIECE..][..PIECE], pass);
    }
    Ok(())
}

/// Says each time that the timer has expired how often it has, which is as often as the clock says.
fn tick(progress: &Progress) -> Result<()> {
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
    let [now, _] = progress.clocks.look();
    let time = |nanos: u64| Timespec {
        tv_sec: (nanos / 1_000_000_000) as i64,
        tv_nsec: (nanos % 1_000_000_000) as i64,
    };
    let times = Itimerspec { it_interval: time(TICK), it_value: time(now + TICK) };
    timerfd_settime(&timer, TimerfdTimerFlags::ABSTIME, &times)?;
    let mut expired = 0;
    while !progress.ends() {
        let mut count = [0; 8];
        let [before, _] = progress.clocks.look();
        read(&timer, &mut count)?;
        let [after, _] = progress.clocks.look();
        expired += u64::from_le_bytes(count);
        let (least, most) = ((before - now) / TICK, (after - now) / TICK);
        ensure!((least..=most).contains(&expired), "it expired {expired} times, and not {least} to {most}");
        let line = progress.ticks.fetch_add(1, Ordering::SeqCst) + 1;
        println!("tick {line} {expired}");
    }
    Ok(())
}
