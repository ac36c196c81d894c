//! HTTP to a control API's unix socket, as plainly as a test needs it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Only ends a hang.
const DEADLINE: Duration = Duration::from_secs(60);

/// A control API.
#[derive(Clone, Debug)]
pub struct Api {
    socket: PathBuf,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its body.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("no JSON: {self:?}"))
    }

    /// What a refusal says.
    pub fn fault(&self) -> Result<String> {
        ensure!(self.status == 400, "not refused: {self:?}");
        Ok(self.json()?["fault_message"].as_str().context("a refusal has a fault_message")?.to_owned())
    }
}

impl Api {
    /// The API at this socket.
    pub fn at(socket: &Path) -> Self {
        Self { socket: socket.into() }
    }

    /// The same, as soon as somebody listens there.
    pub fn when_ready(socket: &Path) -> Result<Self> {
        let end = Instant::now() + DEADLINE;
        while UnixStream::connect(socket).is_err() {
            ensure!(Instant::now() < end, "nobody listens at {}", socket.display());
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(Self::at(socket))
    }

    /// A connection.
    pub fn connect(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(&self.socket).context("connect to the API")?;
        stream.set_read_timeout(Some(DEADLINE))?;
        Ok(stream)
    }

    /// Sends a request with this text as its body, and waits for the whole answer.
    pub fn send(&self, method: &str, path: &str, body: &str) -> Result<Answer> {
        let mut stream = self.begin(method, path, body)?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").with_context(|| format!("no HTTP: {text:?}"))?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok(Answer { status: status.with_context(|| format!("no status: {head}"))?, body: body.into() })
    }

    fn begin(&self, method: &str, path: &str, body: &str) -> Result<UnixStream> {
        let mut stream = self.connect()?;
        let len = body.len();
        // Who does not take all of a body that is too large still has an answer to it.
        _ = write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}"
        );
        Ok(stream)
    }

    /// `GET path`.
    pub fn get(&self, path: &str) -> Result<Answer> {
        self.send("GET", path, "")
    }

    /// `GET path`, which has to be answered with JSON.
    pub fn get_json(&self, path: &str) -> Result<Value> {
        let answer = self.get(path)?;
        ensure!(answer.status == 200, "GET {path}: {answer:?}");
        answer.json()
    }

    /// `PUT path`, which has to be answered with 204.
    pub fn put(&self, path: &str, body: Value) -> Result<()> {
        self.done("PUT", path, &body)
    }

    /// `PATCH path`, which has to be answered with 204.
    pub fn patch(&self, path: &str, body: Value) -> Result<()> {
        self.done("PATCH", path, &body)
    }

    fn done(&self, method: &str, path: &str, body: &Value) -> Result<()> {
        let answer = self.send(method, path, &body.to_string())?;
        ensure!(answer.status == 204 && answer.body.is_empty(), "{method} {path} {body}: {answer:?}");
        Ok(())
    }

    /// Attached to the machine's console: its bytes, both ways.
    pub fn console(&self) -> Result<UnixStream> {
        let mut stream = self.connect()?;
        write!(
            stream,
            "GET /vmm/v1/console HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: vmm-console\r\n\r\n"
        )?;
        let (mut head, mut byte) = (Vec::new(), [0]);
        // What comes after the head is the guest's.
        while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte)? == 1 {
            head.extend(byte);
        }
        let head = String::from_utf8(head)?;
        ensure!(head.starts_with("HTTP/1.1 101 "), "not attached: {head}");
        Ok(stream)
    }

    /// Lines of JSON of an answer that grows, to its end.
    pub fn follow(&self, path: &str) -> Result<impl Iterator<Item = Value> + use<>> {
        let lines = BufReader::new(self.begin("GET", path, "")?).lines().map_while(Result::ok);
        // Between the lines are the sizes of their chunks.
        Ok(lines.filter_map(|line| serde_json::from_str::<Value>(&line).ok().filter(Value::is_object)))
    }
}
