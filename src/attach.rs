//! Who is attached to a machine's console, through its API: all see what the guest writes, and what each types goes to it.

use std::convert::Infallible;
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::broadcast;
use vmm_core::console::ConsoleInput;

use crate::api::{LAST_WORDS, first};

/// Who can be attached at a time.
const MAX_CLIENTS: usize = 16;
/// How many pieces of output a client may be behind.
const BEHIND: usize = 256;
/// How long a client may take none of it.
const PATIENCE: Duration = Duration::from_secs(10);

/// All clients of a console.
pub struct Clients {
    /// Gone with the end of the output.
    open: Mutex<Option<Open>>,
    /// Ends when the last client has gone.
    gone: Mutex<mpsc::Receiver<Infallible>>,
}

struct Open {
    output: broadcast::Sender<Bytes>,
    present: mpsc::Sender<Infallible>,
}

/// One of them.
pub struct Client {
    output: broadcast::Receiver<Bytes>,
    _present: mpsc::Sender<Infallible>,
}

impl Default for Clients {
    fn default() -> Self {
        let (present, gone) = mpsc::channel();
        let open = Open { output: broadcast::Sender::new(BEHIND), present };
        Self { open: Mutex::new(Some(open)), gone: Mutex::new(gone) }
    }
}

impl Clients {
    fn open(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows them what the guest has written. It waits for nobody.
    pub fn show(&self, data: &[u8]) {
        if let Some(open) = self.open().as_ref().filter(|open| open.output.receiver_count() > 0) {
            // Whoever was there may have gone.
            _ = open.output.send(Bytes::copy_from_slice(data));
        }
    }

    /// There is no more: they get the rest, but nobody is waited for longer than [`LAST_WORDS`].
    pub fn end(&self) {
        drop(self.open().take());
        _ = self.gone.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(LAST_WORDS);
    }

    /// One more, who sees what is written from now on. An error is a sentence.
    pub fn join(&self) -> Result<Client, String> {
        match &*self.open() {
            None => Err("The machine's console has ended.".into()),
            Some(open) if open.output.receiver_count() >= MAX_CLIENTS => {
                Err(format!("{MAX_CLIENTS} are attached already."))
            }
            Some(open) => Ok(Client { output: open.output.subscribe(), _present: open.present.clone() }),
        }
    }
}

impl Client {
    /// Copies both ways until one of them ends. Who does not read in time is cut off: a guest does not wait for somebody who
    /// left his terminal.
    pub async fn serve(mut self, stream: impl AsyncRead + AsyncWrite, input: ConsoleInput) {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let typed = async {
            let mut buf = [0; 1024];
            while let Ok(n @ 1..) = reader.read(&mut buf).await {
                // A guest that does not read loses what is typed, as at any terminal.
                _ = input.offer(&buf[..n]);
            }
        };
        let shown = async {
            while let Ok(data) = self.output.recv().await {
                let written = tokio::time::timeout(PATIENCE, writer.write_all(&data)).await;
                if !matches!(written, Ok(Ok(()))) {
                    return;
                }
            }
        };
        first(typed, shown).await;
        // Whoever sees the end can be sure that there is a place again.
        drop(self);
        _ = writer.shutdown().await;
    }
}
