//! A VM as small, as fast and as pleasant as a container, with a kernel of its own.
//!
//! There are three ways to use it:
//!
//! - **The command** `vmm run` boots a guest on the terminal. All of it is in [`cli`].
//! - **A configuration**: the same [`VmConfig`] is what flags, a JSON or TOML file (`vmm run --config FILE`) and
//!   programs describe a machine with. `vmm run --dry-run` prints it.
//! - **A library**: [`Vm::builder`] boots the same machine from a program, several in one process if need be.
//!   It never prints, exits, or installs a logger or a signal handler.
//!
//! ```no_run
//! use vmm::{StopReason, Vm, VmConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = VmConfig { kernel: Some("vmlinux".into()), cpus: 2, ..VmConfig::default() };
//! let guest = Vm::builder(config).build()?;
//! guest.start()?;
//! assert_eq!(guest.wait(), StopReason::GuestPowerOff);
//! # Ok(())
//! # }
//! ```

pub use vmm_core::config::{BootProtocol, ConfigError, SerialConfig};
pub use vmm_core::console::{ConsoleInput, ConsoleReader, WhenFull};
pub use vmm_core::devices::registry::DeviceConfig;
pub use vmm_core::devices::size::ByteSize;
pub use vmm_core::{
    BuildError, Milestone, Milestones, StopReason, Vm, VmBuilder, VmConfig, VmError, VmState,
};

pub mod api;
pub mod cli;

mod attach;
mod config_file;
mod exit;
mod images;
mod logging;
mod machines;
mod session;
mod signals;
mod terminal;
