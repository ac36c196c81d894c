//! The entropy device (virtio 1.3 §5.4): random bytes from the host's kernel.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::buffers::Buffers;
use super::config_space::ConfigSpace;
use super::queue::Queues;
use crate::model::{Counters, DeviceKind, OpenError, Progress, VirtioDevice};

/// Most bytes that one request gets, however much room it has.
const MAX_REQUEST: usize = 64 << 10;
/// Bytes after which other devices get a turn.
const MAX_PER_CALL: usize = 1 << 20;

/// Configuration: there is nothing to choose.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {}

impl DeviceKind for Config {
    const NAME: &'static str = "rng";
    const SYNTAX: &'static str = "";
    const HELP: &'static str = "Random numbers from the host";

    fn open(&self) -> Result<Box<dyn VirtioDevice>, OpenError> {
        Ok(Box::new(Rng::new()))
    }

    #[cfg(any(test, feature = "specimen"))]
    fn specimen() -> Box<dyn VirtioDevice> {
        Box::new(Rng::new())
    }
}

/// The entropy device.
struct Rng {
    config: Arc<ConfigSpace>,
    counters: Arc<Counters>,
}

impl Rng {
    fn new() -> Self {
        Self { config: Arc::new(ConfigSpace::read_only(&[])), counters: Arc::default() }
    }

    /// Fills `room` up to the limit of one request. Returns the count of bytes written.
    fn fill(&self, mut room: Buffers<'_>) -> usize {
        room.truncate(MAX_REQUEST);
        let mut done = 0;
        let mut chunk = [0; 4096];
        while !room.is_empty() {
            let want = room.len().min(chunk.len());
            match rustix::rand::getrandom(&mut chunk[..want], rustix::rand::GetRandomFlags::empty()) {
                Ok(n) => done += room.write(&chunk[..n]),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => {
                    Counters::add(&self.counters.host_errors, 1);
                    break;
                }
            }
        }
        done
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256]
    }

    fn config_space(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn activate(&mut self, _features: u64) {}

    fn process(&mut self, queues: &mut Queues<'_>, queue: u16) -> Progress {
        let mut queue = queues.get(queue);
        let mut total = 0;
        while total < MAX_PER_CALL {
            let Some(chain) = queue.pop() else {
                return if queue.exhausted() { Progress::More } else { Progress::Done };
            };
            if !chain.readable.is_empty() || chain.writable.is_empty() {
                queue.count_mistake();
            }
            let written = self.fill(chain.writable);
            total += written;
            Counters::add(&self.counters.requests, 1);
            Counters::add(&self.counters.bytes_to_guest, written as u64);
            queue.push(chain.head, written as u32);
        }
        Progress::More
    }

    fn reset(&mut self) {}
}
