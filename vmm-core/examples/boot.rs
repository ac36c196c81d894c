//! Throw-away timing example.
use std::io::Read;
use vmm_core::{Milestone, Vm, VmConfig};
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let t0 = std::time::Instant::now();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let config: VmConfig = serde_json::from_str(&args[0])?;
    let vm = Vm::builder(config).build()?;
    let mut c = vm.take_console().unwrap();
    let h = std::thread::spawn(move || {
        let mut s = Vec::new();
        c.read_to_end(&mut s).unwrap();
        s
    });
    vm.start()?;
    let r = vm.wait();
    let out = h.join().unwrap();
    println!("{}", String::from_utf8_lossy(&out));
    println!("{r}; status {:?}", vm.exit_status());
    for m in Milestone::ALL {
        println!("{:20} {:?}", m.name(), vm.milestones().get(m));
    }
    drop(vm);
    println!("end {:?}", t0.elapsed());
    Ok(())
}
