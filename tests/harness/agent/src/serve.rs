//! Accepts connections, one request each, and ends the lab host when nobody has been connected for a while.

use std::io::{self, BufReader, Read};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab_agent::{Hello, ID_PARAMETER, IDLE_PARAMETER, PORT, READY, Reply, Request, receive, send};

use crate::{exec, files, host};

/// How many connections there are, with a bell that rings when this changes.
#[derive(Default)]
struct Connections {
    count: Mutex<usize>,
    changed: Condvar,
}

/// Serves until the host has been idle for the time that the kernel command line names.
pub fn serve() -> Result<()> {
    let id = host::parameter(ID_PARAMETER).context("no lab.id= on the kernel command line")?;
    let idle: u64 = match host::parameter(IDLE_PARAMETER) {
        Some(seconds) => seconds.parse().context("lab.idle= takes a number of seconds")?,
        None => bail!("no lab.idle= on the kernel command line"),
    };
    let listener = TcpListener::bind(("0.0.0.0", PORT)).context("listen")?;
    println!("{READY}");
    let connections = Arc::new(Connections::default());
    let accepting = Arc::clone(&connections);
    thread::spawn(move || accept(&listener, &id, &accepting));
    connections.wait_for_idle(Duration::from_secs(idle));
    println!("lab-agent: idle for {idle} s, power off");
    Ok(())
}

impl Connections {
    fn add(&self, change: isize) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = count.saturating_add_signed(change);
        self.changed.notify_all();
    }

    /// Whether there is, or soon will be, only one: the ends of others may still be on their way.
    fn is_last(&self) -> bool {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let patience = Duration::from_secs(2);
        let waited = self.changed.wait_timeout_while(count, patience, |count| *count > 1);
        *waited.unwrap_or_else(PoisonError::into_inner).0 <= 1
    }

    /// Returns when there has been no connection for `idle`.
    fn wait_for_idle(&self, idle: Duration) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (now, timeout) =
                self.changed.wait_timeout(count, idle).unwrap_or_else(PoisonError::into_inner);
            count = now;
            if timeout.timed_out() && *count == 0 {
                return;
            }
        }
    }
}

fn accept(listener: &TcpListener, id: &str, connections: &Arc<Connections>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let id = id.to_owned();
        let connections = Arc::clone(connections);
        connections.add(1);
        thread::spawn(move || {
            if let Err(error) = connection(&stream, &id, &connections) {
                let _ = send(&stream, &Reply::Failed(format!("{error:#}")), &[]);
            }
            connections.add(-1);
        });
    }
}

fn connection(stream: &TcpStream, id: &str, connections: &Connections) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut input = BufReader::with_capacity(1 << 18, stream);
    let Some((hello, _)) = receive::<Hello>(&mut input)? else { return Ok(()) };
    if hello.lab != id {
        bail!("this is another lab");
    }
    match hello.request {
        Request::Hold => {
            send(stream, &Reply::Done, &[])?;
            // Nothing comes; this returns when the client is gone.
            let _ = io::copy(&mut input.take(1 << 20), &mut io::sink());
            return Ok(());
        }
        Request::Exec { argv, env, cwd } => return exec::exec(input, stream, &argv, &env, cwd.as_deref()),
        Request::Put { path, mode, size } => files::put(input, &path, mode, size)?,
        Request::Get { path } => files::get(stream, &path)?,
        Request::Stat { path } => {
            let size = std::fs::metadata(path).ok().map(|metadata| metadata.len());
            return Ok(send(stream, &Reply::Size(size), &[])?);
        }
        Request::Copy { from, to } => files::copy(&from, &to)?,
        Request::Remove { path } => files::remove(&path)?,
        Request::PowerOff if !connections.is_last() => bail!("the lab is in use by others"),
        Request::PowerOff => {
            send(stream, &Reply::Done, &[])?;
            host::power_off();
        }
    }
    Ok(send(stream, &Reply::Done, &[])?)
}
