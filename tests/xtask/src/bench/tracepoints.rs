//! How often a thread has passed some of the kernel's tracepoints: perf's counters, without perf.
#![allow(unsafe_code, reason = "perf_event_open has no wrapper in libc")]

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::FromRawFd;

use anyhow::{Context, Result};

/// Where the numbers of tracepoints are: tracefs as it is mounted today, and as debugfs mounts it when it is looked at.
const EVENTS: [&str; 2] = ["/sys/kernel/tracing/events", "/sys/kernel/debug/tracing/events"];
/// `PERF_TYPE_TRACEPOINT` (linux/perf_event.h).
const TRACEPOINT: u32 = 2;
/// `PERF_FLAG_FD_CLOEXEC`.
const CLOSE_ON_EXEC: libc::c_ulong = 8;
/// `struct perf_event_attr` in its first version, as 64-bit words: type and size, number, all else zero.
const ATTRIBUTES: usize = 8;

/// One tracepoint, counted for one thread since this was made.
#[derive(Debug)]
pub struct Counter(File);

impl Counter {
    /// Begins to count `event`, a name such as `kvm/kvm_exit`, for a thread of any process. Needs root, and tracefs.
    pub fn of_thread(thread: i32, event: &str) -> Result<Self> {
        let text = EVENTS.iter().find_map(|dir| fs::read_to_string(format!("{dir}/{event}/id")).ok());
        let id: u64 = text
            .with_context(|| format!("there is no tracepoint {event} in {}", EVENTS[0]))?
            .trim()
            .parse()?;
        let size = (ATTRIBUTES * size_of::<u64>()) as u64;
        let mut attributes = [0_u64; ATTRIBUTES];
        attributes[0] = u64::from(TRACEPOINT) | size << 32;
        attributes[1] = id;
        let (any_cpu, no_group) = (-1, -1);
        // SAFETY: the kernel reads as many bytes as the attributes say that there are, and keeps no pointer to them.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                attributes.as_ptr(),
                thread,
                any_cpu,
                no_group,
                CLOSE_ON_EXEC,
            )
        };
        let fd = i32::try_from(fd)?;
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("perf_event_open");
        }
        // SAFETY: the kernel has just opened it for us alone.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// How often so far.
    pub fn read(&self) -> Result<u64> {
        let mut bytes = [0; 8];
        (&self.0).read_exact(&mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }
}
