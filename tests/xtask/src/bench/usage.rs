//! What a running VMM has used so far: processor time of its vCPUs and of the rest, and what KVM had to do.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::tracepoints::Counter;

/// Tracepoints of vCPU threads, in the order of [`Usage::counts`].
const EVENTS: [&str; 5] = [
    "kvm/kvm_userspace_exit",
    "kvm/kvm_exit",
    "kvm/kvm_mmio",
    "kvm/kvm_emulate_insn",
    "kvmmmu/kvm_mmu_pagetable_walk",
];
/// What they are, as columns of a table; `{}` is what they are divided by.
const COLUMNS: [&str; 5] = ["exits/{}", "KVM exits/{}", "accesses/{}", "emulated/{}", "walks/{}"];
/// What they are, for people.
pub const NOTE: &str = "of the vCPU: exits to the VMM; all exits (not told by kvm-pvm); accesses to \
                        registers, kicks that the kernel takes included; instructions that KVM emulated; \
                        walks of the guest's page tables, for faults and emulation";

/// A VMM to look at while it runs.
pub struct Watched {
    pid: u32,
    /// Threads that are vCPUs, with their counters.
    vcpus: Vec<(u32, Option<Vec<Counter>>)>,
}

/// What it has used, since its start or between two looks.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// Of all vCPU threads: guest and exits.
    pub vcpus: Duration,
    /// Of all other threads.
    pub others: Duration,
    /// How often vCPUs have passed the tracepoints; NaN where we may not count them.
    pub counts: [f64; EVENTS.len()],
}

impl Watched {
    /// The VMM with this process number; its vCPUs run.
    pub fn new(pid: u32) -> Result<Self> {
        let mut vcpus = Vec::new();
        for thread in threads(pid)? {
            let name = fs::read_to_string(format!("/proc/{pid}/task/{thread}/comm"))?;
            // Ours are vcpuN; QEMU's, with debug-threads=on, CPU N/KVM.
            if name.starts_with("vcpu") || name.trim_end().ends_with("/KVM") {
                let counters = EVENTS.map(|event| Counter::of_thread(thread.cast_signed(), event));
                vcpus.push((thread, counters.into_iter().collect::<Result<Vec<_>>>().ok()));
            }
        }
        Ok(Self { pid, vcpus })
    }

    /// Bytes of it that are resident.
    pub fn resident(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: u64 =
            line.and_then(|line| line.trim().strip_suffix(" kB")).context("VmRSS in kB")?.parse()?;
        Ok(kib << 10)
    }

    /// What it has used since its start; tracepoints count from `new` on.
    pub fn usage(&self) -> Result<Usage> {
        let mut usage = Usage::default();
        for thread in threads(self.pid)? {
            // A thread may end while we look.
            let Ok(spent) = fs::read_to_string(format!("/proc/{}/task/{thread}/schedstat", self.pid)) else {
                continue;
            };
            let nanos = spent.split_whitespace().next().and_then(|nanos| nanos.parse().ok());
            let spent = Duration::from_nanos(nanos.context("schedstat begins with nanoseconds")?);
            match self.vcpus.iter().any(|(vcpu, _)| *vcpu == thread) {
                true => usage.vcpus += spent,
                false => usage.others += spent,
            }
        }
        for (_, counters) in &self.vcpus {
            for (at, count) in usage.counts.iter_mut().enumerate() {
                *count += counters
                    .as_ref()
                    .map_or(Ok(f64::NAN), |counters| counters[at].read().map(|count| count as f64))?;
            }
        }
        Ok(usage)
    }
}

impl Usage {
    /// Seconds of processor time of all threads.
    pub fn seconds(&self) -> f64 {
        (self.vcpus + self.others).as_secs_f64()
    }

    /// What was used between `earlier` and this.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            vcpus: self.vcpus.saturating_sub(earlier.vcpus),
            others: self.others.saturating_sub(earlier.others),
            counts: std::array::from_fn(|at| self.counts[at] - earlier.counts[at]),
        }
    }

    /// For each of `units`: microseconds of processor time of the VMM's own threads and of vCPUs, and the counts.
    pub fn per(&self, units: f64) -> Vec<f64> {
        let times = [self.others, self.vcpus].map(|time| time.as_secs_f64() * 1e6 / units);
        times.into_iter().chain(self.counts.map(|count| count / units)).collect()
    }
}

/// Names of the columns that a measured window fills, interrupts first, for a unit such as "IO".
pub fn columns(unit: &str) -> Vec<String> {
    let others = ["irqs/{}", "VMM us/{}", "vCPU us/{}"];
    others.iter().chain(&COLUMNS).map(|column| column.replace("{}", unit)).collect()
}

fn threads(pid: u32) -> Result<Vec<u32>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().parse()?)).collect()
}
