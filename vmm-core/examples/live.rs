//! A guest whose devices change while it runs.
//!
//! `cargo run -p vmm-core --example live -- CONFIG`: the machine is in a JSON file. Standard input is the guest's
//! console, except for lines that begin with `!`:
//!
//! ```text
//! !disk0 {"size": "2G", "bandwidth": null}     changes a device
//! !disk0                                       asks for its counters
//! ```
//!
//! Each is answered on a line that begins with `!`: with the counters, or with what is wrong.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::{env, fs, io, thread};

use vmm_core::{Vm, VmConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let path = env::args().nth(1).ok_or("usage: live CONFIG")?;
    let config: VmConfig = serde_json::from_slice(&fs::read(path)?)?;
    let vm = Arc::new(Vm::builder(config).build()?);
    let mut console = vm.take_console().ok_or("the console is taken once")?;
    let output = thread::spawn(move || io::copy(&mut console, &mut io::stdout()));
    vm.start()?;
    thread::spawn({
        let vm = vm.clone();
        move || io::stdin().lock().lines().map_while(Result::ok).for_each(|line| serve(&vm, &line))
    });
    let reason = vm.wait();
    output.join().map_err(|_| "the console's reader panicked")??;
    println!("!{reason}");
    Ok(())
}

fn serve(vm: &Vm, line: &str) {
    match line.strip_prefix('!') {
        // It fails when the machine has stopped.
        None => _ = writeln!(vm.console_input(), "{line}"),
        Some(command) => {
            let answer = answer(vm, command).unwrap_or_else(|error| error.to_string());
            // The guest may be in the middle of a line.
            _ = writeln!(io::stdout(), "\n!{answer}");
        }
    }
}

fn answer(vm: &Vm, command: &str) -> Result<String, Box<dyn Error>> {
    let (name, patch) = command.split_once(' ').unwrap_or((command, "{}"));
    vm.update(name, serde_json::from_str(patch)?)?;
    let device = vm.devices().iter().find(|device| device.name == name).ok_or("no such device")?;
    let counters: BTreeMap<_, _> = device.counters.all().into_iter().collect();
    Ok(serde_json::to_string(&counters)?)
}
