//! The control queue (virtio 1.3 §5.1.6.5): how many queue pairs the driver uses.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use crate::model::{Counters, Progress};
use crate::virtio::buffers::Buffers;
use crate::virtio::queue::VirtQueue;

/// Answers all commands. `set_pairs` is told how many queue pairs the driver wants, and says whether it has them.
pub fn serve(
    queue: &mut VirtQueue<'_>,
    counters: &Counters,
    mut set_pairs: impl FnMut(u16) -> bool,
) -> Progress {
    while let Some(mut chain) = queue.pop() {
        if chain.writable.is_empty() {
            queue.count_mistake();
            queue.push(chain.head, 0);
            continue;
        }
        let done = pairs(chain.readable).is_some_and(&mut set_pairs);
        match done {
            true => Counters::add(&counters.requests, 1),
            false => queue.count_mistake(),
        }
        let ack = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        chain.writable.write(&[ack as u8]);
        queue.push(chain.head, 1);
    }
    if queue.exhausted() { Progress::More } else { Progress::Done }
}

/// The number in VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET; `None` for anything else.
fn pairs(mut command: Buffers<'_>) -> Option<u16> {
    let mut bytes = [0; 4];
    if command.len() != bytes.len() || command.read(&mut bytes) != bytes.len() {
        return None;
    }
    let [class, code, low, high] = bytes;
    let known = u32::from(class) == VIRTIO_NET_CTRL_MQ && u32::from(code) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    let range = VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN..=VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX;
    let count = u16::from_le_bytes([low, high]);
    (known && range.contains(&count.into())).then_some(count)
}
