//! The machine: guest memory, vCPUs, boot protocols, buses, interrupts, event loops and the virtual machine's
//! state, over KVM.
//!
//! A program that runs guests needs three names: [`VmConfig`] says what the machine is, [`Vm::builder`] makes
//! it, and [`Vm`] is the handle to it. Several can live in one process. Nothing here prints, exits, installs a
//! logger or a signal handler, or reads the environment.

#![deny(missing_docs)]

#[cfg(not(target_arch = "x86_64"))]
compile_error!("vmm-core has no other architecture than x86_64 yet; see vmm-core/src/x86_64");

pub mod config;
pub mod console;
pub mod diagnosis;
pub mod event;
pub mod exits;
pub mod hypervisor;
pub mod memory;
pub mod snapshot;
pub mod x86_64;

mod builder;
mod bus;
mod capture;
mod control;
mod machine;
mod news;
mod runner;
mod spans;
mod state;
mod uffd;
mod vcpu;
mod vm;
mod window;

pub use builder::{BuildError, VmBuilder};
pub use config::VmConfig;
pub use devices;
pub use event::{Event, Events};
pub use machine::{Milestone, Milestones, Usage};
pub use snapshot::{Snapshot, SnapshotKind, SnapshotReport};
pub use state::{IllegalTransition, StopReason, VmState};
pub use vm::{DeviceStatus, Vm, VmError};
