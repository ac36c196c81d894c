//! The library, over and over: machines that come and go in one process leave nothing in it. On this machine's /dev/kvm.
//! The only test of its program: it counts what the process has.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::local_kvm;
use harness::micro::Micro;
use serde_json::json;
use vmm_core::{StopReason, Vm, VmConfig};

/// Only there to end a hang.
const DEADLINE: Duration = Duration::from_secs(60);

/// What the process has at this moment.
#[derive(Debug, PartialEq)]
struct Held {
    descriptors: usize,
    threads: usize,
    mappings: usize,
}

impl Held {
    fn now() -> Result<Self> {
        Ok(Self {
            descriptors: fs::read_dir("/proc/self/fd")?.count(),
            threads: fs::read_dir("/proc/self/task")?.flatten().filter(|task| !is_kvms(&task.path())).count(),
            mappings: fs::read_to_string("/proc/self/maps")?.lines().count(),
        })
    }
}

/// Whether a thread is one that KVM has for a VM, which may be there a moment longer than that.
fn is_kvms(task: &Path) -> bool {
    fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("kvm-"))
}

/// Resident memory in KiB.
fn resident() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Ends a machine in one of all the ways in which it can end.
fn one_life(config: &VmConfig, way: usize) -> Result<()> {
    let vm = Vm::builder(config.clone()).build()?;
    if way == 0 {
        // It has never run.
        return Ok(());
    }
    let mut console = vm.take_console().context("it is taken once")?;
    vm.start()?;
    let mut text = [0; 3];
    console.read_exact(&mut text)?;
    ensure!(&text == b"up\n");
    match way {
        1 => vm.kill(),
        2 => _ = vm.stop(Duration::ZERO),
        3 => {
            vm.pause()?;
            vm.kill();
        }
        4 => {
            vm.pause()?;
            vm.resume()?;
            vm.request_stop(Duration::from_millis(1));
        }
        // Dropped while it runs, with somebody who follows it.
        _ => {
            drop(vm.events());
            return Ok(());
        }
    }
    let reason = vm.wait();
    ensure!(reason == StopReason::Requested, "{reason:?}");
    Ok(())
}

#[test]
fn two_hundred_machines_in_one_process_leave_nothing_in_it() -> Result<()> {
    ensure!(local_kvm().is_some(), "this needs a /dev/kvm on this machine");
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    Micro::new().print("up\n").raw(&[0xf4, 0xeb, 0xfd]).write(&path("kernel"))?;
    fs::write(path("disk"), [0; 4096])?;
    let mut config: VmConfig = serde_json::from_value(json!({
        "kernel": path("kernel"),
        "memory": "32M",
        "devices": [
            {"kind": "disk", "path": path("disk")},
            {"kind": "rng"},
            {"kind": "balloon"},
            {"kind": "vsock", "path": path("v.sock")},
            {"kind": "console", "socket": path("hvc.sock")},
        ],
    }))?;
    if rustix::process::geteuid().is_root() {
        config.devices.push(serde_json::from_value(json!({"kind": "net", "tap": true}))?);
    }
    let interfaces = || fs::read_dir("/sys/class/net").map(Iterator::count);
    let before = interfaces()?;
    // What is made once is made by then: a thread's stack that the C library keeps, an arena for each thread at a time.
    (0..20).try_for_each(|i| one_life(&config, i % 6))?;
    let (held, memory) = (Held::now()?, resident()?);
    for i in 0..200 {
        one_life(&config, i % 6).with_context(|| format!("machine {i}"))?;
    }
    let now = Held::now()?;
    assert_eq!((held.descriptors, held.threads), (now.descriptors, now.threads));
    assert!(now.mappings <= held.mappings + 4, "{held:?} has become {now:?}");
    // A page for each machine would be 800.
    assert!(resident()? < memory + 600, "{memory} KiB have become {}", resident()?);
    // Those of other tests come and go.
    let end = Instant::now() + DEADLINE;
    while interfaces()? > before {
        ensure!(Instant::now() < end, "{} interfaces instead of {before}", interfaces()?);
        std::thread::sleep(Duration::from_millis(50));
    }
    let left: Vec<_> = fs::read_dir(dir.path())?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<_, _>>()?;
    assert_eq!(left.len(), 2, "{left:?}");
    Ok(())
}
