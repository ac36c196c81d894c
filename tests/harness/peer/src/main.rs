//! One end of stream connections, for tests and benchmarks of vsock: the same program runs in the guest, on its
//! vsock, and on the host, on unix sockets. Both serve, and both call.
//!
//! `serve ADDRESS` prints `serving` and does for each connection what its first byte says: `e` gives everything
//! back, `k` takes everything and answers with count and checksum, `s` sends as many bytes as it is told, `m` never
//! reads. Every other command calls such a peer, checks what it does, and prints one line.

mod address;
mod clock;
mod rounds;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use address::{Address, Stream, accept};
use anyhow::{Context, Result, bail, ensure};

/// Bytes of one read or write of a bulk transfer.
const CHUNK: usize = 64 << 10;
/// A thread needs no more stack than for a chunk's handle.
const STACK: usize = 64 << 10;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let Err(error) = run(&arguments) {
        println!("stream-peer: {error:#}");
        std::process::exit(1);
    }
}

fn run(arguments: &[&str]) -> Result<()> {
    raise_file_limit();
    match *arguments {
        ["serve", address] => serve(&address.parse()?),
        ["echo", address, count] => echo(&address.parse()?, count.parse()?),
        ["send", address, bytes] => send(&address.parse()?, bytes.parse()?),
        ["receive", address, bytes] => receive(&address.parse()?, bytes.parse()?),
        ["flood", address] => flood(&address.parse()?),
        ["refused", address] => refused(&address.parse()?),
        ["ping", address, count] => ping(&address.parse()?, count.parse()?),
        ["connects", address, count] => connects(&address.parse()?, count.parse()?),
        ["pipe", address] => pipe(&address.parse()?),
        ["clock"] => clock::serve(),
        ["rounds", disk] => rounds::serve(disk),
        ["wait-for-end", address] => wait_for_end(&address.parse()?),
        _ => bail!("there is no such command: {}", arguments.join(" ")),
    }
}

/// A thousand connections take as many descriptors.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

fn serve(address: &Address) -> Result<()> {
    let listener = address.listen()?;
    println!("serving");
    loop {
        let stream = accept(&listener)?;
        thread::Builder::new().stack_size(STACK).spawn(move || {
            // A connection that breaks is the caller's to notice.
            _ = serve_one(stream);
        })?;
    }
}

fn serve_one(mut stream: Stream) -> Result<()> {
    let mut what = [0];
    stream.read_exact(&mut what)?;
    match &what {
        b"e" => {
            let mut chunk = vec![0; 4096];
            loop {
                match stream.read(&mut chunk)? {
                    0 => break,
                    n => stream.write_all(&chunk[..n])?,
                }
            }
        }
        b"k" => {
            let mut sum = Sum::default();
            let mut chunk = vec![0; CHUNK];
            loop {
                match stream.read(&mut chunk)? {
                    0 => break,
                    n => sum.add(&chunk[..n]),
                }
            }
            stream.write_all(&sum.bytes())?;
        }
        b"s" => {
            let mut count = [0; 8];
            stream.read_exact(&mut count)?;
            write_pattern(&mut stream, u64::from_le_bytes(count))?;
        }
        b"m" => thread::sleep(Duration::MAX),
        _ => bail!("it says {what:?}"),
    }
    Ok(())
}

/// Count and checksum of a stream: FNV-1a over words, so that it costs less than the stream itself.
#[derive(Debug, Default, PartialEq)]
struct Sum {
    count: u64,
    hash: u64,
    word: [u8; 8],
}

impl Sum {
    fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let at = (self.count % 8) as usize;
            if at == 0 && bytes.len() >= 8 {
                let (words, _) = bytes.as_chunks::<8>();
                words.iter().for_each(|word| self.mix(u64::from_le_bytes(*word)));
                self.count += words.len() as u64 * 8;
                bytes = &bytes[words.len() * 8..];
                continue;
            }
            self.word[at] = bytes[0];
            self.count += 1;
            bytes = &bytes[1..];
            if at == 7 {
                self.mix(u64::from_le_bytes(self.word));
            }
        }
    }

    fn mix(&mut self, word: u64) {
        self.hash = (self.hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(29);
    }

    fn bytes(&self) -> [u8; 16] {
        let rest = &self.word[..(self.count % 8) as usize];
        let hash = rest.iter().fold(self.hash, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(31));
        (u128::from(self.count) << 64 | u128::from(hash)).to_le_bytes()
    }
}

/// A mebibyte that repeats at no power of two.
fn pattern() -> Vec<u8> {
    let mut state = 1u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take((1 << 20) - 7).collect()
}

fn write_pattern(stream: &mut Stream, count: u64) -> Result<[u8; 16]> {
    let pattern = pattern();
    let (mut sum, mut done) = (Sum::default(), 0);
    while done < count {
        let from = (done % pattern.len() as u64) as usize;
        let len = (pattern.len() - from).min(CHUNK).min((count - done) as usize);
        let part = &pattern[from..from + len];
        stream.write_all(part).with_context(|| format!("after {done} bytes"))?;
        sum.add(part);
        done += len as u64;
    }
    Ok(sum.bytes())
}

/// Says what a connection is for.
fn open(address: &Address, what: &[u8]) -> Result<Stream> {
    let mut stream = address.connect()?;
    stream.write_all(what)?;
    Ok(stream)
}

/// Has `count` connections open at once, each with bytes of its own that come back, and ends them by half.
fn echo(address: &Address, count: u64) -> Result<()> {
    let mut streams =
        (0..count).map(|_| open(address, b"e")).collect::<Result<Vec<_>>>().context("not all are open")?;
    let message = |i: usize| format!("connection {i} says {}", i * 7919);
    for (i, stream) in streams.iter_mut().enumerate() {
        stream.write_all(message(i).as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
    }
    for (i, stream) in streams.iter_mut().enumerate() {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).with_context(|| format!("connection {i}"))?;
        ensure!(answer == message(i), "connection {i} got '{answer}'");
    }
    println!("echo: {count} connections");
    Ok(())
}

fn rate(bytes: u64, began: Instant) -> u128 {
    u128::from(bytes) / began.elapsed().as_micros().max(1)
}

fn send(address: &Address, bytes: u64) -> Result<()> {
    let mut stream = open(address, b"k")?;
    let began = Instant::now();
    let sum = write_pattern(&mut stream, bytes)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = [0; 16];
    stream.read_exact(&mut answer).context("no answer")?;
    let rate = rate(bytes, began);
    ensure!(answer == sum, "other bytes arrived than were sent");
    println!("sent: {bytes} bytes, {rate} MB/s");
    Ok(())
}

fn receive(address: &Address, bytes: u64) -> Result<()> {
    let mut stream = open(address, b"s")?;
    let began = Instant::now();
    stream.write_all(&bytes.to_le_bytes())?;
    let pattern = pattern();
    let mut chunk = vec![0; CHUNK];
    let mut done = 0;
    loop {
        let n = stream.read(&mut chunk).with_context(|| format!("after {done} bytes"))?;
        if n == 0 {
            break;
        }
        let mut part = &chunk[..n];
        while !part.is_empty() {
            let from = (done % pattern.len() as u64) as usize;
            let len = part.len().min(pattern.len() - from);
            ensure!(
                part[..len] == pattern[from..from + len],
                "other bytes arrived than were sent, at {done}"
            );
            done += len as u64;
            part = &part[len..];
        }
    }
    ensure!(done == bytes, "{done} bytes arrived, not {bytes}");
    println!("received: {bytes} bytes, {} MB/s", rate(bytes, began));
    Ok(())
}

/// Sends to a peer that never reads, until nothing goes any more; others are served meanwhile.
fn flood(address: &Address) -> Result<()> {
    let mut stream = open(address, b"m")?;
    stream.set_nonblocking(true)?;
    let (mut done, mut quiet) = (0u64, 0);
    let chunk = vec![0; CHUNK];
    // Nothing for a while is the end: nobody will say so.
    while quiet < 20 {
        match stream.write(&chunk) {
            Ok(n) => (done, quiet) = (done + n as u64, 0),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                quiet += 1;
                thread::sleep(Duration::from_millis(50));
            }
            Err(error) => return Err(error).with_context(|| format!("after {done} bytes")),
        }
    }
    echo(address, 5)?;
    println!("flood: stuck after {done} bytes");
    Ok(())
}

fn refused(address: &Address) -> Result<()> {
    match address.connect() {
        Ok(_) => bail!("somebody is there"),
        Err(error) => println!("refused: {error:#}"),
    }
    Ok(())
}

fn ping(address: &Address, count: usize) -> Result<()> {
    let mut stream = open(address, b"e")?;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        stream.write_all(b"ping")?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer)?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    println!("ping: {} us", times.get(count / 2).context("no pings")?.as_micros());
    Ok(())
}

fn connects(address: &Address, count: u32) -> Result<()> {
    let began = Instant::now();
    for _ in 0..count {
        let mut stream = open(address, b"e")?;
        stream.shutdown(Shutdown::Write)?;
        ensure!(stream.read(&mut [0])? == 0, "it said something");
    }
    println!("connects: {:.0} /s", f64::from(count) / began.elapsed().as_secs_f64());
    Ok(())
}

/// Holds a connection that says nothing until the other side is gone.
fn wait_for_end(address: &Address) -> Result<()> {
    let mut stream = open(address, b"e")?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    println!("connected");
    // An end is an end, with or without bytes on the way.
    _ = stream.read(&mut [0]);
    println!("ended");
    Ok(())
}

/// Standard input to the connection, and what comes from there to standard output, until the connection ends.
fn pipe(address: &Address) -> Result<()> {
    let mut stream = address.connect()?;
    let mut writer = stream.try_clone()?;
    thread::spawn(move || {
        // When input ends, the other direction goes on.
        _ = std::io::copy(&mut std::io::stdin(), &mut writer);
        writer.shutdown(Shutdown::Write)
    });
    let mut output = std::io::stdout();
    let mut chunk = vec![0; CHUNK];
    loop {
        match stream.read(&mut chunk)? {
            0 => return Ok(()),
            n => output.write_all(&chunk[..n]).and_then(|()| output.flush())?,
        }
    }
}
