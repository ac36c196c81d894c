//! The smallest program with a guest in it: `cargo run -p vmm-core --example hello -- KERNEL INITRD`.

use std::error::Error;
use std::io;

use vmm_core::{Vm, VmConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(kernel), Some(initrd)) = (args.next(), args.next()) else {
        return Err("usage: hello KERNEL INITRD".into());
    };
    let config = VmConfig {
        kernel: Some(kernel.into()),
        initrd: Some(initrd.into()),
        append: Some("-- cat /proc/version".into()),
        ..VmConfig::default()
    };
    let vm = Vm::builder(config).name("hello").build()?;
    vm.start()?;
    if let Some(mut console) = vm.take_console() {
        // To the end of the guest.
        io::copy(&mut console, &mut io::stdout())?;
    }
    println!("{}", vm.wait());
    Ok(())
}
