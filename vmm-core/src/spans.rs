//! Where a log line comes from: its machine, thread and device, as spans.
//!
//! They are at the level of errors, so that whoever wants any line has its place as well. A span is entered once a
//! thread, and once a turn of a device; without a subscriber that costs a comparison.

use tracing::{Span, error_span};

/// The span of the machine that its owner calls `id`.
pub fn vm(id: &str) -> Span {
    error_span!("vm", %id)
}

/// The span of the thread `id` of a machine.
pub fn thread(vm: &Span, id: &str) -> Span {
    error_span!(parent: vm, "thread", %id)
}

/// The span of the device `id`, on a thread or as part of a machine.
pub fn device(parent: &Span, id: &str) -> Span {
    error_span!(parent: parent, "device", %id)
}
