//! Two guests in one process: reads both consoles, stops one guest, waits for the other.
//!
//! `cargo run -p vmm-core --example embed -- KERNEL [INITRD]`: the guest is expected to end by itself.

use std::error::Error;
use std::io::Read;
use std::path::PathBuf;
use std::thread;

use vmm_core::{Vm, VmConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let kernel = args.next().ok_or("usage: embed KERNEL [INITRD]")?;
    let config = VmConfig { kernel: Some(kernel), initrd: args.next(), ..VmConfig::default() };

    let guests = [Vm::builder(config.clone()).build()?, Vm::builder(config).build()?];
    let mut readers = Vec::new();
    for (i, guest) in guests.iter().enumerate() {
        let mut console = guest.take_console().ok_or("the console is taken once")?;
        readers.push(thread::spawn(move || {
            let mut text = String::new();
            console.read_to_string(&mut text).map(|_| (i, text))
        }));
        guest.start()?;
    }

    let [first, second] = guests;
    first.stop();
    println!("guest 0: {}", first.wait());
    println!("guest 1: {}", second.wait());
    for reader in readers {
        let (i, text) = reader.join().map_err(|_| "a console reader panicked")??;
        println!("guest {i} wrote {} bytes", text.len());
    }
    Ok(())
}
