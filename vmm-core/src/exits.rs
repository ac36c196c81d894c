//! What made a vCPU leave the guest, counted: the cost of a guest's habits.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::hypervisor::Exit;

/// Most addresses that one vCPU's trace tells apart. A guest chooses the addresses.
const TRACED_ADDRESSES: usize = 4096;

/// Why a vCPU left the guest for this process. What KVM handles by itself (ioeventfd, HLT) is not among it.
///
/// ```no_run
/// use vmm_core::exits::ExitCause;
///
/// # fn writes(vm: &vmm_core::Vm) -> u64 {
/// let exits = vm.exits().into_iter().flatten();
/// exits.filter(|exit| exit.cause == ExitCause::PortWrite).map(|exit| exit.count).sum()
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExitCause {
    /// A read of an I/O port.
    PortRead,
    /// A write to an I/O port.
    PortWrite,
    /// A read of an address that is not memory.
    MemoryRead,
    /// A write to an address that is not memory.
    MemoryWrite,
    /// A kick, or a signal of the host's.
    Interruption,
    /// The end: a triple fault or a failure.
    End,
}

impl ExitCause {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::PortRead, Self::PortWrite, Self::MemoryRead, Self::MemoryWrite, Self::Interruption, Self::End];

    /// A name that stays, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::PortRead => "port_read",
            Self::PortWrite => "port_write",
            Self::MemoryRead => "memory_read",
            Self::MemoryWrite => "memory_write",
            Self::Interruption => "interruption",
            Self::End => "end",
        }
    }

    fn of(exit: &Exit<'_>) -> (Self, u64) {
        match exit {
            Exit::IoIn { port, .. } => (Self::PortRead, u64::from(*port)),
            Exit::IoOut { port, .. } => (Self::PortWrite, u64::from(*port)),
            Exit::MmioRead { addr, .. } => (Self::MemoryRead, *addr),
            Exit::MmioWrite { addr, .. } => (Self::MemoryWrite, *addr),
            Exit::Interrupted => (Self::Interruption, 0),
            Exit::Shutdown | Exit::Failed(_) => (Self::End, 0),
        }
    }
}

impl fmt::Display for ExitCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PortRead => "port read",
            Self::PortWrite => "port write",
            Self::MemoryRead => "memory read",
            Self::MemoryWrite => "memory write",
            Self::Interruption => "interruption",
            Self::End => "end",
        })
    }
}

/// How often exits of one cause were made, at one address or (without a trace) at all.
///
/// ```no_run
/// # fn tell(vm: &vmm_core::Vm) {
/// for (vcpu, exits) in vm.exits().iter().enumerate() {
///     for exit in exits {
///         println!("vCPU {vcpu}: {} times {} {:x?}", exit.count, exit.cause, exit.address);
///     }
/// }
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitCount {
    /// The cause.
    pub cause: ExitCause,
    /// Port or guest physical address; `None` for causes without one, and for all that were not told apart.
    pub address: Option<u64>,
    /// How often.
    pub count: u64,
}

/// Counts the exits of one vCPU.
#[derive(Debug, Default)]
pub(crate) struct ExitLog {
    counts: [AtomicU64; ExitCause::ALL.len()],
    /// By cause and address, when asked for. Only the vCPU's own thread takes it, until somebody reads.
    trace: Option<Mutex<BTreeMap<(ExitCause, u64), u64>>>,
}

impl ExitLog {
    pub fn new(trace: bool) -> Self {
        Self { trace: trace.then(Mutex::default), ..Self::default() }
    }

    pub fn count(&self, exit: &Exit<'_>) {
        let (cause, address) = ExitCause::of(exit);
        self.counts[cause as usize].fetch_add(1, Ordering::Relaxed);
        let Some(trace) = &self.trace else { return };
        let mut trace = trace.lock().unwrap_or_else(|e| e.into_inner());
        let room = trace.len() < TRACED_ADDRESSES;
        match trace.get_mut(&(cause, address)) {
            Some(count) => *count += 1,
            None if room => _ = trace.insert((cause, address), 1),
            None => {}
        }
    }

    /// One entry for each cause that there was.
    pub fn totals(&self) -> Vec<ExitCount> {
        let count = |cause: ExitCause| self.counts[cause as usize].load(Ordering::Relaxed);
        let all = ExitCause::ALL.map(|cause| ExitCount { cause, address: None, count: count(cause) });
        all.into_iter().filter(|entry| entry.count > 0).collect()
    }

    /// What the trace has told apart, and of each cause what it has not. Without a trace, as [`Self::totals`].
    pub fn entries(&self) -> Vec<ExitCount> {
        let Some(trace) = &self.trace else { return self.totals() };
        // The totals last, so that they are not behind.
        let trace = trace.lock().unwrap_or_else(|e| e.into_inner());
        let rest = self.totals().into_iter().filter_map(|total| {
            let traced = trace.iter().filter(|((cause, _), _)| *cause == total.cause);
            let traced: u64 = traced.map(|(_, count)| count).sum();
            let count = total.count.saturating_sub(traced);
            (count > 0).then_some(ExitCount { count, ..total })
        });
        let has_address = |cause| !matches!(cause, ExitCause::Interruption | ExitCause::End);
        let told = trace.iter().map(|(&(cause, address), &count)| ExitCount {
            cause,
            address: has_address(cause).then_some(address),
            count,
        });
        told.chain(rest).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_tells_addresses_apart_and_loses_none() {
        let log = ExitLog::new(true);
        for addr in 0..TRACED_ADDRESSES as u64 + 10 {
            log.count(&Exit::MmioWrite { addr, data: &[0] });
        }
        log.count(&Exit::MmioWrite { addr: 3, data: &[0] });
        log.count(&Exit::Interrupted);
        let entries = log.entries();
        let count = |address| {
            let at = |entry: &&ExitCount| entry.cause == ExitCause::MemoryWrite && entry.address == address;
            entries.iter().find(at).map(|entry| entry.count)
        };
        assert_eq!((count(Some(3)), count(Some(4)), count(None)), (Some(2), Some(1), Some(10)));
        let total: u64 = log.totals().iter().map(|entry| entry.count).sum();
        assert_eq!(entries.iter().map(|entry| entry.count).sum::<u64>(), total);
    }
}
