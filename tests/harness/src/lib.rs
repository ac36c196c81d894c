//! What tests stand on: places to run guests in, the lab, Debian guests, disks and networks.
//!
//! See docs/testing.md for how a test is written.

pub mod binaries;
pub mod cache;
pub mod command;
pub mod debian_kernel;
pub mod lab;
pub mod packages;
pub mod process;
