//! The loads: what each end does, and what it counts.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail, ensure};

/// Bytes of one TCP read or write.
const TCP_BLOCK: usize = 128 << 10;
/// Bytes of packets, as the kernel counts them, that wait for a UDP receiver.
const UDP_BUFFER: usize = 16 << 20;
/// A UDP receiver that hears nothing for so long has heard the end.
const SILENCE: Duration = Duration::from_millis(500);

/// Which load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// One TCP stream from the client.
    TcpOut,
    /// One TCP stream to the client.
    TcpIn,
    /// UDP packets from the client, as fast as it can.
    UdpOut,
    /// UDP packets to the client.
    UdpIn,
    /// One UDP packet to and fro.
    Ping,
}

const NAMES: [(&str, Load); 5] = [
    ("tcp-out", Load::TcpOut),
    ("tcp-in", Load::TcpIn),
    ("udp-out", Load::UdpOut),
    ("udp-in", Load::UdpIn),
    ("ping", Load::Ping),
];

/// A load, for how long, and bytes of each packet.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Which.
    pub load: Load,
    /// How long the sender sends.
    pub time: Duration,
    /// UDP payload; of no meaning for TCP.
    pub bytes: usize,
}

impl FromStr for Spec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let (name, seconds, bytes) = match words[..] {
            [name, seconds] => (name, seconds, "64"),
            [name, seconds, bytes] => (name, seconds, bytes),
            _ => bail!("'{text}' is not LOAD SECONDS [BYTES]"),
        };
        let load =
            NAMES.iter().find(|(known, _)| *known == name).with_context(|| format!("no load '{name}'"))?.1;
        let bytes = bytes.parse()?;
        ensure!((16..=65_000).contains(&bytes), "a packet has 16 to 65000 bytes");
        Ok(Self { load, time: Duration::from_secs_f64(seconds.parse()?), bytes })
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(_, load)| *load == self.load).map_or("", |(name, _)| name);
        write!(f, "{name} {} {}", self.time.as_secs_f64(), self.bytes)
    }
}

/// What has arrived at one end, and in what time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counted {
    /// Packets, or for TCP reads that brought something.
    pub packets: u64,
    /// Payload.
    pub bytes: u64,
    /// First to last arrival.
    pub seconds: f64,
    /// Median of round trips, in microseconds; 0 for what has none.
    pub p50: f64,
    /// 99 of 100 round trips took at most so many microseconds.
    pub p99: f64,
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { packets, bytes, seconds, p50, p99 } = self;
        write!(f, "@counted {packets} {bytes} {seconds:.6} {p50:.1} {p99:.1}")
    }
}

impl FromStr for Counted {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let ["@counted", packets, bytes, seconds, p50, p99] = words[..] else {
            bail!("'{text}' counts nothing")
        };
        Ok(Self {
            packets: packets.parse()?,
            bytes: bytes.parse()?,
            seconds: seconds.parse()?,
            p50: p50.parse()?,
            p99: p99.parse()?,
        })
    }
}

/// The server's end of a load.
pub enum End {
    /// Waits for the stream.
    Tcp(TcpListener),
    /// Packets come and go here.
    Udp(UdpSocket),
}

impl End {
    /// Takes a free port.
    pub fn listen(spec: &Spec, address: IpAddr) -> Result<Self> {
        Ok(match spec.load {
            Load::TcpOut | Load::TcpIn => Self::Tcp(TcpListener::bind((address, 0))?),
            Load::UdpOut | Load::UdpIn | Load::Ping => Self::Udp(UdpSocket::bind((address, 0))?),
        })
    }

    /// The port taken.
    pub fn port(&self) -> u16 {
        let address = match self {
            Self::Tcp(listener) => listener.local_addr(),
            Self::Udp(socket) => socket.local_addr(),
        };
        address.map_or(0, |address| address.port())
    }

    /// Does the server's part; counts what arrives here.
    pub fn serve(self, spec: &Spec, client: IpAddr) -> Result<Counted> {
        match self {
            Self::Tcp(listener) => {
                let stream = listener.accept()?.0;
                if spec.load == Load::TcpOut { take(stream) } else { give(stream, spec.time) }
            }
            Self::Udp(socket) => match spec.load {
                Load::UdpIn => {
                    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
                    let (_, peer) = socket.recv_from(&mut [0; 16]).context("no packet says where to send")?;
                    ensure!(peer.ip() == client, "a packet from a stranger");
                    socket.connect(peer)?;
                    flood(&socket, spec)
                }
                Load::Ping => echo(&socket, spec),
                _ => drain(&socket, spec),
            },
        }
    }
}

/// Does the client's part; counts what arrives here.
pub fn run(spec: &Spec, server: SocketAddr) -> Result<Counted> {
    if matches!(spec.load, Load::TcpOut | Load::TcpIn) {
        let stream = TcpStream::connect(server)?;
        return if spec.load == Load::TcpIn { take(stream) } else { give(stream, spec.time) };
    }
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(server)?;
    match spec.load {
        Load::UdpIn => {
            socket.send(&[0; 16])?;
            drain(&socket, spec)
        }
        Load::Ping => ping(&socket, spec),
        _ => flood(&socket, spec),
    }
}

/// Reads a stream to its end.
fn take(mut stream: TcpStream) -> Result<Counted> {
    let (mut block, mut counted) = (vec![0; TCP_BLOCK], Counted::default());
    let began = Instant::now();
    loop {
        match stream.read(&mut block)? {
            0 => return Ok(Counted { seconds: began.elapsed().as_secs_f64(), ..counted }),
            count => {
                counted.packets += 1;
                counted.bytes += count as u64;
            }
        }
    }
}

/// Writes to a stream for `time`, and waits until all of it has arrived.
fn give(mut stream: TcpStream, time: Duration) -> Result<Counted> {
    let (block, began) = (vec![0x5a; TCP_BLOCK], Instant::now());
    while began.elapsed() < time {
        stream.write_all(&block)?;
    }
    stream.shutdown(Shutdown::Write)?;
    // The other end closes when it has read the end; it writes nothing.
    ensure!(stream.read(&mut [0])? == 0, "the receiver wrote something");
    Ok(Counted::default())
}

/// Sends packets for as long as it is to. Full queues somewhere below are no error.
fn flood(socket: &UdpSocket, spec: &Spec) -> Result<Counted> {
    let (packet, began) = (vec![0x5a; spec.bytes], Instant::now());
    while began.elapsed() < spec.time {
        // The clock costs as much as a packet.
        for _ in 0..16 {
            let _ = socket.send(&packet);
        }
    }
    Ok(Counted::default())
}

/// Counts packets until they end.
fn drain(socket: &UdpSocket, spec: &Spec) -> Result<Counted> {
    let (mut packet, mut counted) = (vec![0; spec.bytes], Counted::default());
    // What is lost in front of a receiver that waits for a processor says nothing about the network. Others than root have
    // to live with the system's limit.
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(socket, UDP_BUFFER);
    // The first one may take its time.
    socket.set_read_timeout(Some(SILENCE + spec.time))?;
    let (mut first, mut last) = (None, Instant::now());
    loop {
        match socket.recv(&mut packet) {
            Ok(bytes) => {
                last = Instant::now();
                if first.is_none() {
                    first = Some(last);
                    socket.set_read_timeout(Some(SILENCE))?;
                }
                counted.packets += 1;
                counted.bytes += bytes as u64;
            }
            Err(error) if silent(&error) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Counted { seconds: first.map_or(0.0, |first| (last - first).as_secs_f64()), ..counted })
}

/// Sends packets back.
fn echo(socket: &UdpSocket, spec: &Spec) -> Result<Counted> {
    let mut packet = vec![0; spec.bytes];
    socket.set_read_timeout(Some(SILENCE * 4))?;
    loop {
        match socket.recv_from(&mut packet) {
            Ok((bytes, peer)) => drop(socket.send_to(&packet[..bytes], peer)?),
            Err(error) if silent(&error) => return Ok(Counted::default()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends a packet, waits until it is back, and again. Its number is in front: one that was given up may still come back.
fn ping(socket: &UdpSocket, spec: &Spec) -> Result<Counted> {
    let (mut packet, mut answer) = (vec![0; spec.bytes], vec![0; spec.bytes]);
    let (mut trips, mut number) = (Vec::new(), 0_u64);
    socket.set_read_timeout(Some(SILENCE))?;
    let began = Instant::now();
    while began.elapsed() < spec.time {
        number += 1;
        packet[..8].copy_from_slice(&number.to_le_bytes());
        let sent = Instant::now();
        socket.send(&packet)?;
        loop {
            match socket.recv(&mut answer) {
                Ok(_) if answer[..8] != packet[..8] => {}
                Ok(_) => break trips.push(sent.elapsed()),
                // Lost: the trip does not count.
                Err(error) if silent(&error) => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    trips.sort_unstable();
    let at = |part: usize| trips.get(trips.len() * part / 100).map_or(0.0, |trip| trip.as_secs_f64() * 1e6);
    let packets = trips.len() as u64;
    Ok(Counted { packets, bytes: packets * spec.bytes as u64, seconds, p50: at(50), p99: at(99) })
}

fn silent(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
