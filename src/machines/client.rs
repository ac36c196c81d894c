//! Requests to the API of a machine.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, StatusCode};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;

use super::Machine;

/// How long a machine may take for its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to write down all of its memory.
const LONG_PATIENCE: Duration = Duration::from_secs(3600);
/// Largest answer in bytes that is read.
const MAX_ANSWER: usize = 16 << 20;

/// Asks the API of `machine`; a refusal is an error with its sentence.
pub fn ask(machine: &Machine, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
    ask_within(PATIENCE, machine, method, path, body)
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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(async {
        tokio::time::timeout(patience, send(&machine.api(), method, path, body))
            .await
            .unwrap_or_else(|_| bail!("it does not answer"))
    });
    let (status, text) = answer.with_context(|| format!("cannot ask '{}'", machine.name))?;
    let answer = if text.is_empty() { Value::Null } else { serde_json::from_slice(&text)? };
    match status.is_success() {
        true => Ok(answer),
        false => Err(anyhow!("{}", answer["fault_message"].as_str().unwrap_or("the request was refused"))),
    }
}

async fn send(
    socket: &Path,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> anyhow::Result<(StatusCode, Vec<u8>)> {
    let stream = tokio::net::UnixStream::connect(socket).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
    let request = Request::builder().method(method).uri(path).header("host", "vmm").body(body)?;
    // It ends with the exchange, or makes that fail.
    tokio::spawn(connection);
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    Ok((status, to_bytes(Body::new(answer.into_body()), MAX_ANSWER).await?.to_vec()))
}
