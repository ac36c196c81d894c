//! One turn of a device: how its owner calls it so that no notification is lost and none is needless.
//!
//! A driver that is told not to kick while its queue is served anyway, or that suppresses kicks by event index,
//! announces nothing. So kicks are turned on again before a turn ends, and the queue is looked at once more.
//! This has no thread and no event loop, so tests and fuzz targets run what the machine runs.

use tracing::debug;

use super::queue::{QueueCore, Queues};
use crate::GuestMemory;
use crate::model::{Counters, Notifier, Progress, VirtioDevice};

/// How often a queue that fills as fast as it is served is served in one turn.
const ROUNDS: usize = 4;

/// Serves `queue` after its driver's kick. [`Progress::More`]: this is to be called again soon, and the driver
/// will not kick before that.
pub fn serve_queue(
    device: &mut dyn VirtioDevice,
    cores: &mut [QueueCore],
    mem: &GuestMemory,
    queue: u16,
) -> Progress {
    let at = usize::from(queue);
    cores[at].disable_kicks(mem);
    for _ in 0..ROUNDS {
        let before = cores[at].position();
        if device.process(&mut Queues::lend(cores, mem), queue) == Progress::More {
            return Progress::More;
        }
        // Chains that came in before kicks were on again are served now. Chains that the device saw and left
        // alone wait for the host, not for the driver.
        let left_alone = cores[at].position() == before && !cores[at].was_dry();
        if !cores[at].enable_kicks(mem) || left_alone {
            return Progress::Done;
        }
    }
    // Kicks are on, but for the chains that were just seen none may come.
    Progress::More
}

/// Serves the host's event `token`. [`Progress::More`]: this is to be called again soon. `again` is called with
/// queues for which [`serve_queue`] is to be called soon.
pub fn serve_source(
    device: &mut dyn VirtioDevice,
    cores: &mut [QueueCore],
    mem: &GuestMemory,
    token: u32,
    mut again: impl FnMut(u16),
) -> Progress {
    let before: Vec<u16> = cores.iter().map(QueueCore::position).collect();
    let progress = device.host_event(&mut Queues::lend(cores, mem), token);
    // With event index, a driver kicks only when it passes the position that it was last told. A device that
    // used up a queue's chains here waits for that kick.
    for (queue, before) in (0u16..).zip(before) {
        let core = &mut cores[usize::from(queue)];
        let more = core.position() != before && core.enable_kicks(mem);
        if more && serve_queue(device, cores, mem, queue) == Progress::More {
            again(queue);
        }
    }
    progress
}

/// After a turn: interrupts for what was used, the count of mistakes, and, once an activation (`broken` is to
/// be false at its start), DEVICE_NEEDS_RESET for a queue that the driver broke.
pub fn settle(
    cores: &mut [QueueCore],
    mem: &GuestMemory,
    counters: &Counters,
    notifier: &dyn Notifier,
    broken: &mut bool,
) {
    for (queue, core) in (0u16..).zip(cores) {
        if core.take_notification(mem) {
            notifier.queue_used(queue);
        }
        Counters::add(&counters.guest_mistakes, core.take_mistakes());
        if let (Some(fault), false) = (core.fault(), *broken) {
            debug!(queue, ?fault, "the driver broke a virtqueue; the device needs a reset");
            Counters::add(&counters.guest_mistakes, 1);
            *broken = true;
            notifier.needs_reset();
        }
    }
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
