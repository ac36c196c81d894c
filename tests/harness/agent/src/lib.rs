//! The lab's protocol, spoken over TCP between the harness and the agent in the lab host.
//!
//! A connection carries one request. Each message is one line of JSON, which says how many raw bytes follow it:
//!
//! ```text
//! {"body":{"Stdout":null},"len":5}\n
//! hello
//! ```
//!
//! The client opens with a [`Hello`], the agent answers with [`Reply`] messages. Sizes are bounded on both sides;
//! what does not fit into one message is sent as several.

use std::io::{self, BufRead, ErrorKind, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub mod sparse;

/// The agent's TCP port inside the lab host.
pub const PORT: u16 = 7000;
/// What the agent prints on the lab host's console when it listens.
pub const READY: &str = "lab-agent: ready";
/// Longest JSON line, in bytes: command lines and environments have to fit.
pub const MAX_LINE: u64 = 1 << 20;
/// Most raw bytes in one message.
pub const MAX_DATA: usize = 1 << 20;
/// Kernel parameter that carries the lab's identity, which each [`Hello`] has to name.
pub const ID_PARAMETER: &str = "lab.id=";
/// Kernel parameter: the lab host powers off after this many seconds without a connection.
pub const IDLE_PARAMETER: &str = "lab.idle=";

/// First message on a connection.
#[derive(Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Identity of the lab that the client means: a port may have changed hands since it was written down.
    pub lab: String,
    /// What is wanted.
    pub request: Request,
}

/// What a client may ask for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Answers `Done`; the lab counts as used for as long as the connection stays open.
    Hold,
    /// Runs a program in a session of its own. Then: client sends [`Input`], agent sends `Stdout`, `Stderr` and, at the end, `Exited`.
    /// When the connection ends first, the program and its process group are killed.
    Exec {
        /// Program and arguments; the program is looked up in PATH.
        argv: Vec<String>,
        /// Variables added to the agent's own environment.
        env: Vec<(String, String)>,
        /// Working directory.
        cwd: Option<String>,
    },
    /// Creates or replaces a file: client sends `Input::Data` and `Input::End`, agent answers `Done`.
    /// The file appears under its name only when it is complete.
    Put {
        /// Absolute path; missing directories are made.
        path: String,
        /// Permission bits.
        mode: u32,
        /// Size in bytes; what no `Data` covers is a hole.
        size: u64,
    },
    /// Reads a file: agent answers `Size`, `Data`…, `Done`.
    Get {
        /// Absolute path.
        path: String,
    },
    /// Answers `Size`, or `Size` with `None` when there is no such file.
    Stat {
        /// Absolute path.
        path: String,
    },
    /// Copies a file within the lab host, holes kept; answers `Done`.
    Copy {
        /// Absolute path of an existing file.
        from: String,
        /// Absolute path; missing directories are made.
        to: String,
    },
    /// Removes a file or a directory with all that is in it; answers `Done`, also when there is none.
    Remove {
        /// Absolute path.
        path: String,
    },
    /// Powers the lab host off after `Done`; refused while others are connected.
    PowerOff,
}

/// What a client sends after its request.
#[derive(Debug, Serialize, Deserialize)]
pub enum Input {
    /// Bytes for the program's standard input.
    Stdin,
    /// End of the program's standard input.
    StdinEnd,
    /// A signal for the program itself.
    Signal(i32),
    /// Bytes of a file, at this offset.
    Data(u64),
    /// The file is complete.
    End,
}

/// What the agent answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// Bytes that the program wrote to its standard output.
    Stdout,
    /// Bytes that the program wrote to its standard error.
    Stderr,
    /// The program ended. The last message.
    Exited(Exit),
    /// A file's size in bytes; `None`: there is no such file.
    Size(Option<u64>),
    /// Bytes of a file, at this offset.
    Data(u64),
    /// The request was carried out. The last message.
    Done,
    /// The request failed; the text says why. The last message.
    Failed(String),
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// It exited with this status.
    Status(i32),
    /// This signal ended it.
    Signal(i32),
}

impl From<std::process::ExitStatus> for Exit {
    fn from(status: std::process::ExitStatus) -> Self {
        use std::os::unix::process::ExitStatusExt;
        match (status.code(), status.signal()) {
            (Some(code), _) => Exit::Status(code),
            (None, signal) => Exit::Signal(signal.unwrap_or_default()),
        }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Status(code) => write!(f, "exit status {code}"),
            Exit::Signal(number) => write!(f, "signal {number}"),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Line<T> {
    body: T,
    len: usize,
}

/// Writes one message. `data` is at most [`MAX_DATA`] bytes long.
pub fn send<T: Serialize>(mut to: impl Write, body: &T, data: &[u8]) -> io::Result<()> {
    if data.len() > MAX_DATA {
        return Err(io::Error::new(ErrorKind::InvalidInput, "message too long"));
    }
    let mut message = serde_json::to_vec(&Line { body, len: data.len() })?;
    message.push(b'\n');
    message.extend_from_slice(data);
    to.write_all(&message)?;
    to.flush()
}

/// Reads one message; `None` when the other side has closed the connection.
pub fn receive<T: DeserializeOwned>(mut from: impl BufRead) -> io::Result<Option<(T, Vec<u8>)>> {
    let mut line = Vec::new();
    from.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    let line: Line<T> = serde_json::from_slice(&line)?;
    if line.len > MAX_DATA {
        return Err(io::Error::new(ErrorKind::InvalidData, "message too long"));
    }
    let mut data = vec![0; line.len];
    from.read_exact(&mut data)?;
    Ok(Some((line.body, data)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let mut wire = Vec::new();
        send(&mut wire, &Reply::Stdout, b"hello\nworld").unwrap();
        send(&mut wire, &Reply::Exited(Exit::Signal(9)), b"").unwrap();
        let mut wire = &wire[..];
        let (reply, data) = receive::<Reply>(&mut wire).unwrap().unwrap();
        assert!(matches!(reply, Reply::Stdout));
        assert_eq!(data, b"hello\nworld");
        let (reply, _) = receive::<Reply>(&mut wire).unwrap().unwrap();
        assert!(matches!(reply, Reply::Exited(Exit::Signal(9))));
        assert!(receive::<Reply>(&mut wire).unwrap().is_none());
    }

    #[test]
    fn lengths_beyond_the_bound_are_refused() {
        let wire = format!("{{\"body\":\"Done\",\"len\":{}}}\n", MAX_DATA + 1);
        assert!(receive::<Reply>(wire.as_bytes()).is_err());
        assert!(send(Vec::new(), &Reply::Done, &vec![0; MAX_DATA + 1]).is_err());
        let endless = vec![b' '; 2 * MAX_LINE as usize];
        assert!(receive::<Reply>(&endless[..]).is_err());
    }
}
