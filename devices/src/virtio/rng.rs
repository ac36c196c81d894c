//! The entropy device (virtio 1.3 §5.4): random bytes from the host's kernel.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::buffers::Buffers;
use super::config_space::ConfigSpace;
use super::queue::Queues;
use crate::model::{Counters, DeviceKind, MachineShape, OpenError, Progress, VirtioDevice};
use crate::throttle::{Limits, TokenBucket};

/// Most bytes that one request gets, however much room it has.
const MAX_REQUEST: usize = 64 << 10;
/// Bytes after which other devices get a turn.
const MAX_PER_CALL: usize = 1 << 20;

/// Configuration.
///
/// ```
/// use devices::{params, virtio::rng::Config};
///
/// let config: Config = params::from_str("bandwidth=64K/1s", None)?;
/// assert!(config.bandwidth.is_some() && config.ops.is_none());
/// # Ok::<(), params::ParamError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Limit in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Limit in requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

impl DeviceKind for Config {
    const NAME: &'static str = "rng";
    const SYNTAX: &'static str = "[bandwidth=LIMIT][,ops=LIMIT]";
    const HELP: &'static str = "Random numbers from the host";
    const ON_BY_DEFAULT: bool = true;

    fn open(&self, _: &MachineShape) -> Result<Box<dyn VirtioDevice>, OpenError> {
        Ok(Box::new(Rng::new()))
    }

    fn limits(&self) -> Vec<Limits> {
        vec![Limits { bandwidth: self.bandwidth, ops: self.ops }]
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
            queue.charge(written);
            total += written;
            Counters::add(&self.counters.requests, 1);
            Counters::add(&self.counters.bytes_to_guest, written as u64);
            queue.push(chain.head, written as u32);
        }
        Progress::More
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::virtio::test_driver::Driver;

    fn driver() -> Driver {
        let mut driver = Driver::new(Config::specimen());
        driver.start(0);
        driver
    }

    #[test]
    fn fills_what_it_is_given_and_says_how_much() {
        let mut driver = driver();
        for parts in [&[1][..], &[64], &[4095], &[4097], &[1, 2, 3, 10_000]] {
            let reply = driver.request(0, &[], parts);
            assert_eq!(reply.used, Some(parts.iter().sum::<usize>() as u32), "{parts:?}");
            let last = reply.data.last().expect("a buffer");
            if last.len() >= 64 {
                assert!(last.iter().any(|&byte| byte != last[0]), "{parts:?} is not random");
            }
        }
        let [first, second] = [0, 1].map(|_| driver.request(0, &[], &[64]).data);
        assert_ne!(first, second);
    }

    #[test]
    fn one_request_gets_at_most_64_kib() {
        let mut driver = driver();
        let reply = driver.request(0, &[], &[100_000, 100_000]);
        assert_eq!(reply.used, Some(65536));
        assert!(
            reply.data[0][65536..].iter().chain(&reply.data[1]).all(|&byte| byte == 0xa5),
            "wrote past it"
        );
        assert_eq!(driver.counters.bytes_to_guest.load(Ordering::Relaxed), 65536);
    }

    #[test]
    fn a_readable_buffer_is_a_mistake_and_gets_nothing() {
        let mut driver = driver();
        assert_eq!(
            driver.request(0, &[&[7; 32]], &[]),
            crate::virtio::test_driver::Reply { used: Some(0), data: vec![] }
        );
        assert_eq!(driver.counters.guest_mistakes.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn requests_wait_for_their_limit_and_none_is_lost() {
        let limits = Limits { bandwidth: "64/10ms+64".parse().ok(), ops: None };
        let mut driver = Driver::limited(Config::specimen(), &[limits]);
        driver.start(0);
        for _ in 0..4 {
            driver.post(0, &[], &[64]);
        }
        driver.kick(0);
        assert_eq!(driver.used(0).len(), 2, "the bucket and its burst");
        assert_eq!(driver.counters.throttled.load(Ordering::Relaxed), 1);
        let mut rest = 0;
        while driver.wait_for_tokens() {
            rest += driver.used(0).len();
        }
        assert_eq!(rest, 2);
    }

    #[test]
    fn a_full_queue_of_large_requests_takes_several_turns_and_all_are_done() {
        let mut driver = driver();
        for _ in 0..256 {
            driver.post(0, &[], &[65536]);
        }
        driver.kick(0);
        let used = driver.used(0);
        assert_eq!(used.len(), 256);
        assert!(used.iter().all(|&(_, len)| len == 65536));
    }
}
