//! Two guests in one process: reads both consoles, stops one guest, waits for the other.
//!
//! `cargo run -p vmm-core --example embed -- KERNEL INITRD '-- echo hello'`: the guest has to end by itself, as ours
//! does after its command.

use std::error::Error;
use std::io::Read;
use std::thread;

use vmm_core::{Vm, VmConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initrd, append] = &args[..] else { return Err("usage: embed KERNEL INITRD APPEND".into()) };
    let config = VmConfig {
        kernel: Some(kernel.into()),
        initrd: Some(initrd.into()),
        append: Some(append.clone()),
        ..VmConfig::default()
    };

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
    first.kill();
    println!("guest 0: {}", first.wait());
    println!("guest 1: {}", second.wait());
    for reader in readers {
        let (i, text) = reader.join().map_err(|_| "a console reader panicked")??;
        println!("guest {i} wrote {} lines", text.lines().count());
    }
    Ok(())
}
