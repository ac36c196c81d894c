//! Our own calls, below a prefix of their own, so that clients of Firecracker's are not disturbed.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request as HttpRequest;
use axum::http::StatusCode;
use axum::http::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::body::{Body as _, Frame};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa::openapi::HttpMethod::{Get, Patch, Put};
use vmm_core::event::What;
use vmm_core::{Event, Events, Milestone, SnapshotKind, Vm, VmState};

use super::control::Control;
use super::http::{Calls, Json, Refusal, Request};
use super::metrics;

/// Where our own calls are.
const METRICS: &str = "/vmm/v1/metrics";
const EVENTS: &str = "/vmm/v1/events";
/// The console's call.
pub const CONSOLE: &str = "/vmm/v1/console";

/// What a connection speaks that is attached to the console: the guest's bytes, both ways.
pub const CONSOLE_PROTOCOL: &str = "vmm-console";

/// Longest time that a guest is given to shut down, in seconds.
const MAX_DEADLINE: u64 = 24 * 60 * 60;

/// Everything about a machine at this moment.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Inspection {
    /// The machine's name.
    pub name: String,
    /// Number of this process.
    pub pid: u32,
    /// `not started`, `created`, `running`, `paused`, `stopping` or `stopped`.
    pub state: String,
    /// A snapshot is being made.
    pub saving: bool,
    /// Microseconds from the start of the process to each milestone that is reached.
    pub milestones: BTreeMap<String, u64>,
    /// What is logged: a level, or levels of modules.
    pub log: String,
    /// The machine's configuration, with what was changed since.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<Value>,
    /// What it takes of the host, unless that cannot be said because it stands still to be saved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Its virtio devices.
    pub devices: Vec<Device>,
    /// Exits of all vCPUs, by cause.
    pub exits: BTreeMap<String, u64>,
}

/// What a machine takes of the host.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// CPU time of each vCPU's thread in microseconds.
    pub vcpu_micros: Vec<u64>,
    /// CPU time of the devices' event loops in microseconds.
    pub device_micros: u64,
    /// Guest memory that is in the host's memory, in bytes.
    pub memory_resident_bytes: u64,
}

/// A virtio device.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// What it has counted.
    pub counters: BTreeMap<String, u64>,
}

/// How to stop a machine.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// Seconds that the guest has to shut down after the power button was pressed; 0: none.
    #[schema(maximum = 86400)]
    pub deadline_s: u64,
}

/// Where and how to save a machine.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// Directory of the snapshot. A snapshot that is there is replaced.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// What of the memory is saved.
    #[serde(default)]
    pub kind: Kind,
    /// Whether disks are taken along that the guest can write. `true` if it is left out.
    #[serde(default = "yes")]
    pub disks: bool,
    /// The machine ends with it, and its guest does not run again.
    #[serde(default)]
    pub stop: bool,
}

/// A snapshot that is being made.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotPlace {
    /// Its directory, as it was given when it was begun.
    #[schema(value_type = String)]
    pub path: PathBuf,
}

fn yes() -> bool {
    true
}

/// What of the memory is in a snapshot.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// All of it.
    #[default]
    Full,
    /// What was written since the last snapshot.
    Diff,
    /// All of it, and the next diff is not one to this: it is removed as soon as clones run from it.
    Clones,
}

/// A snapshot that was made.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct SnapshotMade {
    /// The snapshot's identity.
    pub id: String,
    /// How long the machine stood still, in microseconds.
    pub paused_micros: u64,
    /// Bytes of memory that were written.
    pub memory_bytes: u64,
}

/// What is to be logged.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// A level, or levels of modules: `warn,vmm_core=debug`.
    pub filter: String,
}

/// Keys of a device's configuration and their new values; null takes one away.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[schema(value_type = Object)]
pub struct DevicePatch(pub serde_json::Map<String, Value>);

/// Adds our own calls.
pub fn calls(calls: Calls<Control>) -> Calls<Control> {
    let (for_metrics, for_events, for_console) =
        (calls.control().clone(), calls.control().clone(), calls.control().clone());
    calls
        .call(Get, "/vmm/v1/inspect", "Everything about the machine at this moment", inspect)
        .call(Put, "/vmm/v1/stop", "Presses the power button, and kills the machine at the deadline", stop)
        .call(Put, "/vmm/v1/snapshot", "Saves the machine, which then goes on if it ran", put_snapshot)
        .call(Put, "/vmm/v1/snapshot/cancel", "Ends a snapshot that is being made", cancel_snapshot)
        .call(Put, "/vmm/v1/log", "Changes which lines are logged, at any time", put_log)
        .call(Patch, "/vmm/v1/devices/{id}", "Changes a device of the running machine", patch_device)
        .raw(METRICS, "Metrics as Prometheus reads them", "text/plain", get(|| prometheus(for_metrics)))
        .raw(
            EVENTS,
            "What happens to the machine from its start to its end, a line of JSON each",
            "application/x-ndjson",
            get(|| events(for_events)),
        )
        .upgrade(
            CONSOLE,
            "The machine's console, after an upgrade of the connection to vmm-console",
            CONSOLE_PROTOCOL,
            get(|request| console(for_console, request)),
        )
}

fn inspect(control: &Control, _: Request<()>) -> Result<Json<Inspection>, Refusal> {
    let vm = control.vm_if_started();
    let vm = vm.as_deref();
    Ok(Json(Inspection {
        name: control.id.clone(),
        pid: std::process::id(),
        state: vm.map_or("not started", |vm| vm.state().name()).into(),
        saving: vm.is_some_and(Vm::is_saving),
        milestones: vm.map(milestones).unwrap_or_default(),
        log: control.logging().filter(),
        config: vm.map(|vm| serde_json::to_value(vm.config())).transpose()?,
        usage: vm.and_then(|vm| vm.usage().ok()).map(|usage| Usage {
            vcpu_micros: usage.vcpus.iter().map(|time| time.as_micros() as u64).collect(),
            device_micros: usage.devices.as_micros() as u64,
            memory_resident_bytes: usage.memory,
        }),
        devices: vm.map(devices).unwrap_or_default(),
        exits: vm.map(exits).unwrap_or_default(),
    }))
}

fn milestones(vm: &Vm) -> BTreeMap<String, u64> {
    let micros = |milestone: Milestone| {
        Some((milestone.name().to_owned(), vm.milestones().get(milestone)?.as_micros() as u64))
    };
    Milestone::ALL.into_iter().filter_map(micros).collect()
}

fn devices(vm: &Vm) -> Vec<Device> {
    let device = |device: &vmm_core::DeviceStatus| Device {
        name: device.name.clone(),
        kind: device.kind.into(),
        counters: device.counters.all().into_iter().map(|(name, count)| (name.to_owned(), count)).collect(),
    };
    vm.devices().iter().map(device).collect()
}

/// Those causes that there were.
fn exits(vm: &Vm) -> BTreeMap<String, u64> {
    let counted = metrics::exits(vm).into_iter().filter(|(_, count)| *count > 0);
    counted.map(|(name, count)| (name.to_owned(), count)).collect()
}

fn stop(control: &Control, request: Request<Json<Stop>>) -> Result<(), Refusal> {
    let seconds = request.body.0.deadline_s;
    if seconds > MAX_DEADLINE {
        return Err(Refusal(format!("deadline_s is {MAX_DEADLINE} at most.")));
    }
    // The answer must not wait: with the machine, this program ends.
    control.vm()?.request_stop(Duration::from_secs(seconds));
    Ok(())
}

fn put_snapshot(
    control: &Control,
    request: Request<Json<SnapshotRequest>>,
) -> Result<Json<SnapshotMade>, Refusal> {
    let SnapshotRequest { path, kind, disks, stop } = request.body.0;
    let kind = match kind {
        Kind::Full => SnapshotKind::Full,
        Kind::Diff => SnapshotKind::Diff,
        Kind::Clones => SnapshotKind::Clones,
    };
    let vm = control.vm()?;
    let save = || match disks {
        true => vm.snapshot(&path, kind),
        false => vm.snapshot_without_disks(&path, kind),
    };
    let report = if stop { vm.end_with(save)? } else { save()? };
    Ok(Json(SnapshotMade {
        id: report.id,
        paused_micros: report.paused.as_micros() as u64,
        memory_bytes: report.memory_bytes,
    }))
}

fn cancel_snapshot(control: &Control, request: Request<Json<SnapshotPlace>>) -> Result<(), Refusal> {
    match control.vm()?.cancel_snapshot(&request.body.0.path) {
        true => Ok(()),
        false => Err("No such snapshot is being made, or it is whole already.".into()),
    }
}

fn put_log(control: &Control, request: Request<Json<Log>>) -> Result<(), Refusal> {
    let filter = crate::logging::parse(&request.body.0.filter).map_err(Refusal)?;
    control.logging().set_filter(filter).map_err(Refusal)
}

fn patch_device(control: &Control, request: Request<Json<DevicePatch>>) -> Result<(), Refusal> {
    control.update_device(&request.id, request.body.0.0)
}

async fn prometheus(control: Arc<Control>) -> Response {
    let text = tokio::task::spawn_blocking(move || {
        metrics::prometheus(&control.id, control.vm_if_started().as_deref())
    });
    match text.await {
        Ok(text) => ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(_) => Refusal("The request failed because of a bug.".into()).into_response(),
    }
}

async fn events(control: Arc<Control>) -> Result<Response, Refusal> {
    let lines = Lines::Waiting(Box::pin(async move { control.when_started().await.events() }));
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::new(lines)).into_response())
}

async fn console(control: Arc<Control>, mut request: HttpRequest) -> Result<Response, Refusal> {
    let (client, input) = control.attach()?;
    let wanted = request.headers().get(UPGRADE).is_some_and(|protocol| protocol == CONSOLE_PROTOCOL);
    let can = request.extensions().get::<OnUpgrade>().is_some() && request.body().is_end_stream();
    if !can || !wanted {
        let asks = format!("Connection: upgrade, Upgrade: {CONSOLE_PROTOCOL}");
        return Err(Refusal(format!(
            "The console takes the whole connection; ask for it with the headers {asks}."
        )));
    }
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        // Who has gone is not attached any more.
        if let Ok(stream) = upgrade.await {
            client.serve(TokioIo::new(stream), input).await;
        }
    });
    let headers = [(CONNECTION, "upgrade"), (UPGRADE, CONSOLE_PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Events as the body of an answer, which grows as they happen.
enum Lines {
    /// For the machine to be started.
    Waiting(Pin<Box<dyn Future<Output = Events> + Send>>),
    Following(Events),
}

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Self::Waiting(started) = &mut *self {
            *self = Self::Following(ready!(started.as_mut().poll(context)));
        }
        let Self::Following(events) = &mut *self else { return Poll::Pending };
        let event = ready!(events.poll_next(context));
        Poll::Ready(event.map(|event| {
            let mut line = event_json(&event).to_string();
            line.push('\n');
            Ok(Frame::data(line.into()))
        }))
    }
}

/// An event in JSON: always `sequence`, `micros` since the process started, `event` and `text`, and what belongs to it.
fn event_json(event: &Event) -> Value {
    let (name, detail): (&str, Vec<(&str, Value)>) = match &event.what {
        What::State(state) => {
            let mut detail = vec![("state", Value::from(state.name()))];
            if let VmState::Stopped(reason) = state {
                detail.push(("reason", reason.name().into()));
            }
            ("state", detail)
        }
        What::Milestone(milestone) => ("milestone", vec![("milestone", milestone.name().into())]),
        What::GuestPanic => ("guest_panic", vec![]),
        What::ExitStatus(status) => ("exit_status", vec![("status", (*status).into())]),
        What::Updated { device } => ("updated", vec![("device", device.clone().into())]),
        What::DeviceErrors { device, total } => {
            ("device_errors", vec![("device", device.clone().into()), ("total", (*total).into())])
        }
        What::Fact { device, name, value } => {
            let detail =
                vec![("device", device.clone().into()), ("fact", (*name).into()), ("value", (*value).into())];
            ("fact", detail)
        }
        What::Missed(count) => ("missed", vec![("count", (*count).into())]),
        other => ("other", vec![("what", other.to_string().into())]),
    };
    let common = [
        ("sequence", Value::from(event.sequence)),
        ("micros", Value::from(event.at.as_micros() as u64)),
        ("event", name.into()),
        ("text", event.what.to_string().into()),
    ];
    common
        .into_iter()
        .chain(detail)
        .map(|(key, value)| (key.to_owned(), value))
        .collect::<serde_json::Map<_, _>>()
        .into()
}
