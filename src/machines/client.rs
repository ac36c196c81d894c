//! Requests to the API of a machine.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use axum::body::{Body, Bytes, to_bytes};
use axum::http::header::{CONNECTION, HOST, UPGRADE};
use axum::http::{HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;

use super::Machine;
use crate::api::own::{CONSOLE, CONSOLE_PROTOCOL};

/// How long a machine may take for its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long somebody waits who looks at many.
const SHORT_PATIENCE: Duration = Duration::from_secs(3);
/// How long it may take to write down all of its memory.
const LONG_PATIENCE: Duration = Duration::from_secs(3600);
/// Largest answer in bytes that is read.
const MAX_ANSWER: usize = 16 << 20;

/// Asks the API of `machine`; a refusal is an error with its sentence.
pub fn ask(machine: &Machine, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
    ask_within(PATIENCE, machine, method, path, body)
}

/// As [`ask`], for who rather goes without an answer than waits for it.
pub fn ask_quickly(machine: &Machine, method: Method, path: &str) -> anyhow::Result<Value> {
    ask_within(SHORT_PATIENCE, machine, method, path, None)
}

/// As [`ask`], for what takes its time.
pub fn ask_for_long(
    machine: &Machine,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> anyhow::Result<Value> {
    ask_within(LONG_PATIENCE, machine, method, path, body)
}

fn ask_within(
    patience: Duration,
    machine: &Machine,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> anyhow::Result<Value> {
    let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
    let request = Request::builder().method(method).uri(path).body(body)?;
    let answer = wait(patience, async { read(send(&machine.api(), request).await?).await });
    let (status, answer) = answer.with_context(|| format!("cannot ask '{}'", machine.name))?;
    match status.is_success() {
        true => Ok(answer),
        false => Err(refusal(&answer)),
    }
}

/// Attaches to the console of `machine`: a stream of bytes both ways, and what has come on it already.
pub fn attach(machine: &Machine) -> anyhow::Result<(UnixStream, Bytes)> {
    let request = Request::get(CONSOLE).header(CONNECTION, "upgrade").header(UPGRADE, CONSOLE_PROTOCOL);
    let request = request.body(Body::empty())?;
    let attached = wait(PATIENCE, async {
        let answer = send(&machine.api(), request).await?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(&read(answer).await?.1));
        }
        let stream = hyper::upgrade::on(answer).await?.downcast::<TokioIo<tokio::net::UnixStream>>();
        let stream = stream.map_err(|_| anyhow!("the connection is of another kind"))?;
        Ok((stream.io.into_inner().into_std()?, stream.read_buf))
    });
    let (stream, read) = attached.with_context(|| format!("cannot attach to '{}'", machine.name))?;
    stream.set_nonblocking(false)?;
    Ok((stream, read))
}

fn wait<T>(patience: Duration, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let work = async { tokio::time::timeout(patience, work).await };
    runtime.block_on(work).unwrap_or_else(|_| bail!("it does not answer"))
}

fn refusal(answer: &Value) -> anyhow::Error {
    anyhow!("{}", answer["fault_message"].as_str().unwrap_or("the request was refused"))
}

async fn send(socket: &Path, mut request: Request<Body>) -> anyhow::Result<Response<Incoming>> {
    let stream = tokio::net::UnixStream::connect(socket).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the exchange, or makes that fail.
    tokio::spawn(connection.with_upgrades());
    request.headers_mut().insert(HOST, HeaderValue::from_static("vmm"));
    Ok(sender.send_request(request).await?)
}

async fn read(answer: Response<Incoming>) -> anyhow::Result<(StatusCode, Value)> {
    let status = answer.status();
    let text = to_bytes(Body::new(answer.into_body()), MAX_ANSWER).await?;
    Ok((status, if text.is_empty() { Value::Null } else { serde_json::from_slice(&text)? }))
}
