//! The control API: HTTP over a unix socket. Firecracker's calls, so that its clients work unchanged, and our own below
//! `/vmm/v1`. docs/api.md describes it, docs/openapi.json is generated from it.

mod control;
pub mod firecracker;
mod http;
mod metrics;
pub mod own;
pub mod strict;

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::oneshot;
use vmm_core::devices::virtio::unix_listener::UnixListener;

use crate::logging::{Form, Logging};
pub use control::{Control, Order};
use http::MAX_CONNECTIONS;
pub use http::{LAST_WORDS, MAX_BODY, first};
pub use metrics::open_sink;

/// How often metrics are written without being asked for.
const FLUSH_INTERVAL: Duration = Duration::from_secs(60);

/// The sockets of the API; their files go away with it.
pub struct Sockets(Vec<UnixListener>);

/// An API that is served. When this is dropped, clients get the rest of their answers before the program can end: the
/// last event, and the answer to who has stopped the machine.
#[must_use]
pub struct Server {
    end: Option<oneshot::Sender<()>>,
    ended: mpsc::Receiver<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.end.take());
        // A call may keep the thread, but not the program.
        _ = self.ended.recv_timeout(LAST_WORDS * 2);
    }
}

impl Sockets {
    /// Listens at each of `paths`, for its owner only. None: there is no API.
    pub fn bind<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> anyhow::Result<Option<Self>> {
        let bind = |path: P| UnixListener::bind("API socket", path.as_ref(), 0);
        let all: Vec<UnixListener> = paths.into_iter().map(bind).collect::<Result<_, _>>()?;
        Ok((!all.is_empty()).then_some(Self(all)))
    }

    /// Serves the API on threads of its own. Requests have bodies of at most `max_body` bytes.
    pub fn serve(&self, control: Arc<Control>, max_body: usize) -> anyhow::Result<Server> {
        let clone = |socket: &UnixListener| socket.as_fd().try_clone_to_owned();
        let sockets: Vec<_> = self.0.iter().map(clone).collect::<Result<_, _>>()?;
        let router = calls(http::Calls::on(control.clone(), max_body)).router(firecracker::missing);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(MAX_CONNECTIONS)
            .build()?;
        let (end, wanted) = oneshot::channel();
        let (over, ended) = mpsc::channel();
        let work = move || {
            let _entered = tracing::error_span!("thread", id = "api").entered();
            runtime.block_on(async {
                let listeners =
                    sockets.into_iter().map(|socket| tokio::net::UnixListener::from_std(socket.into()));
                match listeners.collect() {
                    Ok(listeners) => first(http::serve(listeners, router, wanted), flush(control)).await,
                    Err(error) => tracing::error!(%error, "the API cannot listen"),
                }
            });
            drop(over);
            // Not waiting for calls that still wait for something.
            runtime.shutdown_background();
        };
        thread::Builder::new().name("api".into()).spawn(work).context("cannot start the thread 'api'")?;
        Ok(Server { end: Some(end), ended })
    }
}

/// Writes metrics every minute, on a thread of its own: their file may be slow.
async fn flush(control: Arc<Control>) {
    loop {
        tokio::time::sleep(FLUSH_INTERVAL).await;
        if !control.metrics().is_open() {
            continue;
        }
        let control = control.clone();
        let write = move || {
            let _entered = tracing::error_span!("thread", id = "metrics").entered();
            if let Err(error) = control.metrics().flush(control.vm_if_started().as_deref()) {
                tracing::warn!("{error}");
            }
        };
        _ = tokio::task::spawn_blocking(write).await;
    }
}

fn calls(none: http::Calls<Control>) -> http::Calls<Control> {
    own::calls(firecracker::calls(none))
}

/// The API's description, as in docs/openapi.json.
#[must_use]
pub fn open_api() -> String {
    let (orders, _) = std::sync::mpsc::channel();
    let (logging, _) = Logging::new(Form::Text);
    let transport = vmm_core::config::Transport::Mmio;
    let control = Control::empty("", transport, MAX_BODY, orders, logging.into());
    let none = http::Calls::on(Arc::new(control), MAX_BODY).described();
    let document = calls(none).open_api("vmm");
    // OpenAPI's registry of formats knows them as `uint32` and `uint64`.
    document.to_pretty_json().unwrap_or_default().replace("\"u-int", "\"uint") + "\n"
}
