//! The configuration space of a disk (virtio 1.3 §5.2.4), and the features that go with it.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::{MAX_REQUEST, QUEUE_SIZE};

/// Most buffers of data in one request: its chain also has a header and a status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes in one buffer.
const SIZE_MAX: u32 = 256 << 10;
/// A driver that keeps to the two never meets the limit.
const _: () = assert!(SEG_MAX as usize * SIZE_MAX as usize <= MAX_REQUEST);
/// Most ranges in one request to discard or zero.
pub const MAX_CLEAR_SEGMENTS: u32 = 32;
/// Most sectors in one of them: 1 GiB.
pub const MAX_CLEAR_SECTORS: u32 = 2 << 20;
/// Bytes of a page of the host: what it reads, writes and gives back best.
const PAGE: u32 = 4096;

/// Features on offer.
pub fn features(read_only: bool, queues: usize) -> u64 {
    let bit = |condition: bool, bit: u32| if condition { 1 << bit } else { 0 };
    1 << VIRTIO_BLK_F_FLUSH
        | 1 << VIRTIO_BLK_F_SIZE_MAX
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_TOPOLOGY
        | bit(queues > 1, VIRTIO_BLK_F_MQ)
        | bit(read_only, VIRTIO_BLK_F_RO)
        | bit(!read_only, VIRTIO_BLK_F_DISCARD)
        | bit(!read_only, VIRTIO_BLK_F_WRITE_ZEROES)
}

/// The bytes of struct virtio_blk_config for a disk of `sectors` sectors in blocks of `block` bytes.
pub fn bytes(sectors: u64, block: u32, queues: usize) -> [u8; 60] {
    let mut bytes = [0; 60];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, &sectors.to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &block.to_le_bytes());
    // Topology: blocks of the host's page, aligned, and nothing smaller is worth while.
    let blocks = PAGE / block;
    put(24, &[blocks.trailing_zeros() as u8, 0]);
    put(26, &(blocks as u16).to_le_bytes());
    put(34, &(queues as u16).to_le_bytes());
    put(36, &MAX_CLEAR_SECTORS.to_le_bytes());
    put(40, &MAX_CLEAR_SEGMENTS.to_le_bytes());
    put(44, &(PAGE / 512).to_le_bytes());
    put(48, &MAX_CLEAR_SECTORS.to_le_bytes());
    put(52, &MAX_CLEAR_SEGMENTS.to_le_bytes());
    put(56, &[1]);
    bytes
}
