//! The guest's memory statistics (virtio 1.3 §5.5.6.3): what its driver tells, kept by name.

use crate::virtio::buffers::Buffers;

/// Names by tag. Tags up to 9 are the specification's, the others Linux'.
pub const NAMES: [&str; 16] = [
    "guest_swap_in_bytes",
    "guest_swap_out_bytes",
    "guest_major_faults",
    "guest_minor_faults",
    "guest_free_bytes",
    "guest_total_bytes",
    "guest_available_bytes",
    "guest_disk_cache_bytes",
    "guest_hugetlb_allocations",
    "guest_hugetlb_failures",
    "guest_oom_kills",
    "guest_allocation_stalls",
    "guest_async_scans",
    "guest_direct_scans",
    "guest_async_reclaims",
    "guest_direct_reclaims",
];

/// Most entries of one buffer; a driver that knows more tags than we do may send them.
const MAX_ENTRIES: usize = 64;

/// The latest value of each tag, if there was one.
pub type Stats = [Option<u64>; NAMES.len()];

/// Reads one buffer of statistics over `stats`. Returns whether it was well-formed.
pub fn read(buffer: &mut Buffers<'_>, stats: &mut Stats) -> bool {
    // struct virtio_balloon_stat: a tag of 16 bits and a value of 64, without padding.
    for _ in 0..MAX_ENTRIES {
        let mut entry = [0; 10];
        match buffer.read(&mut entry) {
            0 => return true,
            10 => {}
            _ => return false,
        }
        let [tag_low, tag_high, value @ ..] = entry;
        if let Some(slot) = stats.get_mut(usize::from(u16::from_le_bytes([tag_low, tag_high]))) {
            *slot = Some(u64::from_le_bytes(value));
        }
    }
    buffer.is_empty()
}
