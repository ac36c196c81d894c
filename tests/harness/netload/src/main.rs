//! `netload`: loads a network and measures at the receiving end.
//!
//! `netload serve PORT` answers on one machine; `netload ADDRESS:PORT LOAD SECONDS [BYTES]` on another says what to do,
//! and prints the figures. Every run has one TCP connection for control: the client names the load, the server prepares
//! itself and answers with a line, both work, and the server sends what it has counted.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result, bail, ensure};

mod load;

use load::{Counted, Load, Spec};

const USAGE: &str = "netload serve PORT | netload ADDRESS:PORT LOAD SECONDS [BYTES]; LOAD is tcp-out, tcp-in, udp-out, \
                     udp-in or ping; out is from the client to the server";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["serve", port] => serve(port.parse().context(USAGE)?),
        [server, ref spec @ ..] if !spec.is_empty() => client(server, &spec.join(" ").parse()?),
        _ => bail!(USAGE),
    }
}

/// Serves one client after the other, for ever.
fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    println!("ready");
    for control in listener.incoming() {
        // A client that fails is its own matter; it says so at its end.
        if let Err(error) = control.map_err(Into::into).and_then(answer) {
            eprintln!("netload: {error:#}");
        }
    }
    Ok(())
}

fn answer(mut control: TcpStream) -> Result<()> {
    let spec: Spec = line(&control)?.parse()?;
    let end = load::End::listen(&spec, control.local_addr()?.ip())?;
    writeln!(control, "{}", end.port())?;
    let counted = end.serve(&spec, control.peer_addr()?.ip())?;
    writeln!(control, "{counted}")?;
    Ok(())
}

/// Runs one load against a server. `@begin` and `@end` frame the time in which it runs.
fn client(server: &str, spec: &Spec) -> Result<()> {
    let server: SocketAddr = server.parse().with_context(|| format!("'{server}' is no ADDRESS:PORT"))?;
    let mut control = TcpStream::connect(server).with_context(|| format!("connect to {server}"))?;
    writeln!(control, "{spec}")?;
    let port = line(&control)?.trim().parse().context("the server names a port")?;
    println!("@begin");
    let mine = load::run(spec, SocketAddr::new(server.ip(), port))?;
    println!("@end");
    let theirs: Counted = line(&control)?.parse()?;
    // What counts is what has arrived.
    let counted = if matches!(spec.load, Load::TcpOut | Load::UdpOut) { theirs } else { mine };
    ensure!(counted.packets > 0, "nothing arrived");
    println!("{counted}");
    Ok(())
}

/// One line from the other end; nothing else is on the connection after it until we write.
fn line(from: &TcpStream) -> Result<String> {
    let mut text = String::new();
    BufReader::with_capacity(256, from).read_line(&mut text)?;
    ensure!(text.ends_with('\n'), "the other end has gone");
    Ok(text)
}
