//! A small host agent: keeps the guests of a list running, tells how they are, and takes them down in good order.
//!
//! `cargo run -p vmm-core --example host-agent -- CONFIG`, where CONFIG is JSON:
//!
//! ```json
//! {"metrics": "agent.prom", "drain_seconds": 10, "guests": {"web": {"kernel": "vmlinux", "initrd": "initrd"}}}
//! ```
//!
//! A guest that switches itself off is done. One that fails, panics or reboots is started again, each time after a
//! longer while, until it has lived for some time. SIGTERM and SIGINT press everybody's power button and end the agent when
//! all have ended. Metrics are written every second, as a file that Prometheus' node exporter collects.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use serde::Deserialize;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmm_core::{StopReason, Vm, VmConfig, VmState};

const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);
/// A guest that has lived for so long is started again as if for the first time.
const STABLE: Duration = Duration::from_secs(60);
const METRICS_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    metrics: Option<PathBuf>,
    #[serde(default = "default_drain")]
    drain_seconds: u64,
    guests: BTreeMap<String, VmConfig>,
}

fn default_drain() -> u64 {
    10
}

/// One guest of the list.
struct Guest {
    name: String,
    config: VmConfig,
    starts: AtomicU64,
    /// The machine, while there is one.
    vm: Mutex<Option<Arc<Vm>>>,
}

/// Tells everybody at once that the agent is ending.
#[derive(Default)]
struct Drain {
    begun: Mutex<bool>,
    changed: Condvar,
}

impl Drain {
    fn begin(&self) {
        *self.begun.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits for `time`, or less when the agent is ending. Returns whether it is.
    fn wait(&self, time: Duration) -> bool {
        let begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(begun, time, |begun| !*begun);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Guest {
    fn vm(&self) -> Option<Arc<Vm>> {
        self.vm.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_vm(&self, vm: Option<Arc<Vm>>) {
        *self.vm.lock().unwrap_or_else(PoisonError::into_inner) = vm;
    }

    /// Keeps the guest running until it is done or the agent is ending.
    fn supervise(&self, drain: &Drain) {
        let mut backoff = FIRST_BACKOFF;
        loop {
            let began = Instant::now();
            let why = match self.run(drain) {
                Ok(StopReason::GuestPowerOff) => return eprintln!("{}: done", self.name),
                Ok(reason) => reason.to_string(),
                Err(error) => error.to_string(),
            };
            if began.elapsed() >= STABLE {
                backoff = FIRST_BACKOFF;
            }
            if drain.wait(Duration::ZERO) {
                return eprintln!("{}: {why}", self.name);
            }
            eprintln!("{}: {why}; starts again in {backoff:?}", self.name);
            if drain.wait(backoff) {
                return;
            }
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
    }

    /// Runs the guest once, to its end.
    fn run(&self, drain: &Drain) -> Result<StopReason, Box<dyn Error>> {
        self.starts.fetch_add(1, Ordering::Relaxed);
        let vm = Arc::new(Vm::builder(self.config.clone()).name(&self.name).build()?);
        // Somebody has to read it, or the oldest of it is lost; here, all of it may be.
        if let Some(mut console) = vm.take_console() {
            thread::spawn(move || while let Ok(1..) = console.read(&mut [0; 4096]) {});
        }
        self.set_vm(Some(vm.clone()));
        // Who drains has looked for machines before it saw this one, or will see it.
        let reason = match drain.wait(Duration::ZERO) {
            true => StopReason::Requested,
            false => {
                vm.start()?;
                vm.wait()
            }
        };
        self.set_vm(None);
        Ok(reason)
    }
}

/// The metrics of all guests, as Prometheus reads them.
fn metrics(guests: &[Arc<Guest>]) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    for guest in guests {
        let (name, starts) = (&guest.name, guest.starts.load(Ordering::Relaxed));
        let vm = guest.vm();
        let running = vm.as_ref().is_some_and(|vm| vm.state() == VmState::Running);
        _ = writeln!(text, "agent_guest_starts_total{{guest=\"{name}\"}} {starts}");
        _ = writeln!(text, "agent_guest_running{{guest=\"{name}\"}} {}", u8::from(running));
        let Some(vm) = vm else { continue };
        if let Ok(usage) = vm.usage() {
            let cpu = (usage.vcpus.iter().sum::<Duration>() + usage.devices).as_secs_f64();
            _ = writeln!(text, "agent_guest_cpu_seconds_total{{guest=\"{name}\"}} {cpu}");
            _ = writeln!(text, "agent_guest_memory_resident_bytes{{guest=\"{name}\"}} {}", usage.memory);
        }
        for device in vm.devices() {
            for (counter, value) in device.counters.all() {
                let device = &device.name;
                _ = writeln!(text, "agent_device_{counter}{{guest=\"{name}\",device=\"{device}\"}} {value}");
            }
        }
    }
    text
}

/// Writes the file whole or not at all, as a collector may read at any time.
fn write_metrics(path: &Path, guests: &[Arc<Guest>]) {
    let draft = path.with_extension("new");
    if let Err(error) = fs::write(&draft, metrics(guests)).and_then(|()| fs::rename(&draft, path)) {
        eprintln!("cannot write metrics to '{}': {error}", path.display());
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = env::args().nth(1).ok_or("usage: host-agent CONFIG")?;
    let config: Config = serde_json::from_slice(&fs::read(path)?)?;
    let (drain, mut signals) = (Arc::new(Drain::default()), Signals::new([SIGTERM, SIGINT])?);
    let guests: Vec<Arc<Guest>> = config
        .guests
        .into_iter()
        .map(|(name, config)| {
            Arc::new(Guest { name, config, starts: AtomicU64::new(0), vm: Mutex::default() })
        })
        .collect();

    let deadline = Duration::from_secs(config.drain_seconds);
    thread::spawn({
        let (drain, guests) = (drain.clone(), guests.clone());
        move || {
            for _ in signals.forever() {
                drain.begin();
                for vm in guests.iter().filter_map(|guest| guest.vm()) {
                    // All at the same time.
                    thread::spawn(move || vm.stop(deadline));
                }
            }
        }
    });
    let supervisors: Vec<_> = guests
        .iter()
        .map(|guest| {
            let (guest, drain) = (guest.clone(), drain.clone());
            thread::spawn(move || guest.supervise(&drain))
        })
        .collect();
    while supervisors.iter().any(|supervisor| !supervisor.is_finished()) {
        if let Some(path) = &config.metrics {
            write_metrics(path, &guests);
        }
        thread::sleep(METRICS_INTERVAL);
    }
    if let Some(path) = &config.metrics {
        write_metrics(path, &guests);
    }
    Ok(())
}
