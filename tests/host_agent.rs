//! The library's largest example: a host agent with twenty real guests in one process. On this machine's /dev/kvm.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::{Kernel, binaries, local_kvm};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Only ends a hang.
const DEADLINE: Duration = Duration::from_secs(120);
const GUESTS: usize = 20;

#[test]
fn an_agent_keeps_twenty_guests_running_and_takes_them_down() -> Result<()> {
    let acceleration = local_kvm().context("this needs a /dev/kvm on this machine")?;
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("initrd"), harness::initramfs()?)?;
    let kernel = Kernel::ours(acceleration).file()?;
    let guest = |append: &str| json!({"kernel": &kernel, "initrd": path("initrd"), "append": append, "memory": "96M"});
    // They work until they are told to end; one ends by itself at once, and one fails whenever it is started.
    let mut guests: BTreeMap<String, Value> =
        (0..GUESTS - 2).map(|i| (format!("guest{i}"), guest("-- cat"))).collect();
    guests.insert("brief".into(), guest("-- ls"));
    guests.insert("broken".into(), guest("rdinit=/nowhere root=/dev/none"));
    let config = json!({"metrics": path("metrics"), "drain_seconds": 60, "guests": guests});
    std::fs::write(path("config"), config.to_string())?;

    let agent = binaries::build(&["--package", "vmm-core", "--example", "host-agent"])?;
    let mut child = Command::new(agent).arg(path("config")).stderr(Stdio::piped()).spawn()?;
    let metric = |line: &str| {
        let text = std::fs::read_to_string(path("metrics")).unwrap_or_default();
        let value = text.lines().find_map(|other| other.strip_prefix(line)?.trim().parse::<f64>().ok());
        value.unwrap_or(-1.0)
    };
    let running = |name: &str| metric(&format!("agent_guest_running{{guest=\"{name}\"}}"));
    let all_run = || (0..GUESTS - 2).all(|i| running(&format!("guest{i}")) == 1.0);
    let starts = |name: &str| metric(&format!("agent_guest_starts_total{{guest=\"{name}\"}}"));
    let began = Instant::now();
    while !(all_run() && running("brief") == 0.0 && starts("broken") >= 3.0) {
        ensure!(began.elapsed() < DEADLINE, "{:?}", std::fs::read_to_string(path("metrics")));
        ensure!(child.try_wait()?.is_none(), "the agent has ended");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!((starts("brief"), starts("guest0")), (1.0, 1.0));
    assert!(metric("agent_guest_memory_resident_bytes{guest=\"guest0\"}") > 4e6);

    kill_process(Pid::from_child(&child), Signal::TERM)?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8(output.stderr)?;
    assert!(output.status.success(), "{said}");
    for i in 0..GUESTS - 2 {
        assert!(
            said.contains(&format!("guest{i}: done\n")),
            "guest{i} was not given the time to end: {said}"
        );
        assert_eq!(running(&format!("guest{i}")), 0.0);
    }
    Ok(())
}
