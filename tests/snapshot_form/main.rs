//! The form of snapshots stays, and what is not of that form is refused. Most of it without KVM.

mod forms;
mod golden;
mod host;
mod hostile;

/// What forms are compared with, and snapshots of released versions.
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
