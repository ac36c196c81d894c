//! What tests stand on: places to run guests in, the lab, Debian guests, disks and networks.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use harness::{Guest, Kernel};
//!
//! let run = Guest::new().memory("512M").shell("grep MemTotal /proc/meminfo").run()?;
//! run.ok()?.expect_line("vmm-init: exit status 0")?;
//! # Ok(())
//! # }
//! ```
//!
//! docs/testing.md says how a test is written and where it runs.

use std::path::PathBuf;

use anyhow::Result;

pub mod binaries;
pub mod cache;
pub mod command;
pub mod debian;
pub mod lab;
pub mod micro;
pub mod net;
pub mod packages;
pub mod pager;
pub mod process;
pub mod report;
pub mod schemathesis;
pub mod smaps;

mod disk;
mod guest;
mod http;
mod initramfs;
mod kernel;
mod live;
mod machines;
mod peer;
mod place;
mod placed;
mod scratch;
mod small_host;
mod tools;

pub use disk::Disk;
pub use guest::{Guest, Run, Running};
pub use http::{Answer, Api};
pub use initramfs::{demo as initramfs, with_programs as initramfs_with};
pub use kernel::Kernel;
pub use live::{Counters, Live, RunningLive};
pub use machines::Machines;
pub use net::NetNs;
pub use peer::StreamPeer;
pub use place::{Acceleration, Needs, Place, local_kvm};
pub use placed::PlacedMachines;
pub use process::{Exit, Output, Process, Program, Signal};
pub use scratch::Scratch;
pub use small_host::SmallHost;
pub use tools::{image as tools_image, losses, netload};

/// The project's demo root file system, an ext4 image: busybox and our init. Shared: mount it read-only.
pub fn demo_image() -> Result<PathBuf> {
    Ok(guest_images::rootfs::demo(&mut guest_images::progress::Console::new())?)
}
