//! struct virtio_net_hdr (virtio 1.3 §5.1.6), as it stands before each frame.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// Bytes of the header, num_buffers included: its size with VIRTIO_F_VERSION_1.
pub const HEADER_BYTES: usize = 12;

/// Offset of num_buffers.
pub const NUM_BUFFERS: usize = 10;

/// Which unfinished frames the driver may send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Without a checksum (VIRTIO_NET_F_CSUM).
    pub csum: bool,
    /// Long segments of TCP over IPv4 (VIRTIO_NET_F_HOST_TSO4).
    pub tso4: bool,
    /// Long segments of TCP over IPv6 (VIRTIO_NET_F_HOST_TSO6).
    pub tso6: bool,
}

/// The header of a frame that the driver sends, checked against what was negotiated and against the frame's
/// length, and with all that means nothing here cleared. `None`: the driver must not send this.
pub fn check(header: [u8; HEADER_BYTES], frame_len: usize, allowed: Offloads) -> Option<[u8; HEADER_BYTES]> {
    let field = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let (flags, gso_type) = (u32::from(header[0]), u32::from(header[1]));
    let (hdr_len, gso_size, csum_start, csum_offset) = (field(2), field(4), field(6), field(8));
    let needs_csum = flags & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    let mut checked = [0; HEADER_BYTES];
    if needs_csum {
        let end = usize::from(csum_start) + usize::from(csum_offset) + 2;
        if !allowed.csum || end > frame_len {
            return None;
        }
        checked[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
        checked[6..10].copy_from_slice(&header[6..10]);
    }
    match gso_type {
        VIRTIO_NET_HDR_GSO_NONE => return Some(checked),
        VIRTIO_NET_HDR_GSO_TCPV4 if allowed.tso4 => {}
        VIRTIO_NET_HDR_GSO_TCPV6 if allowed.tso6 => {}
        _ => return None,
    }
    if !needs_csum || gso_size == 0 || usize::from(hdr_len) > frame_len {
        return None;
    }
    checked[1..6].copy_from_slice(&header[1..6]);
    Some(checked)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: Offloads = Offloads { csum: true, tso4: true, tso6: true };
    const NONE: Offloads = Offloads { csum: false, tso4: false, tso6: false };

    /// A header with these flags, type, hdr_len, gso_size, csum_start and csum_offset.
    fn header(flags: u8, gso: u8, fields: [u16; 4]) -> [u8; HEADER_BYTES] {
        let mut bytes = [flags, gso, 0, 0, 0, 0, 0, 0, 0, 0, 0xaa, 0xbb];
        for (i, field) in fields.into_iter().enumerate() {
            bytes[2 + 2 * i..4 + 2 * i].copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_plain_frame_has_a_header_of_zeros_whatever_the_driver_left_in_it() {
        for flags in [0, 2, 4, 0xfe] {
            let sent = header(flags, 0, [9, 9, 9, 9]);
            assert_eq!(check(sent, 60, NONE), Some([0; HEADER_BYTES]), "flags {flags:#x}");
        }
    }

    #[test]
    fn a_checksum_lies_within_the_frame_and_was_negotiated() {
        let sent = header(1, 0, [0, 0, 34, 16]);
        assert_eq!(check(sent, 52, ALL), Some([1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]));
        assert_eq!(check(sent, 51, ALL), None, "ends after the frame");
        assert_eq!(check(sent, 52, NONE), None, "not negotiated");
        assert_eq!(check(header(1, 0, [0, 0, 0xffff, 0xffff]), 65535, ALL), None);
    }

    #[test]
    fn segments_have_a_size_a_checksum_and_a_header_within_the_frame() {
        let fields = [54, 1448, 34, 16];
        for (gso, without) in [(1, Offloads { tso4: false, ..ALL }), (4, Offloads { tso6: false, ..ALL })] {
            let checked = check(header(1, gso, fields), 9000, ALL).expect("good");
            assert_eq!(checked[..10], header(1, gso, fields)[..10]);
            assert_eq!(check(header(1, gso, fields), 9000, without), None, "not negotiated");
            assert_eq!(check(header(0, gso, fields), 9000, ALL), None, "without a checksum");
            assert_eq!(check(header(1, gso, [54, 0, 34, 16]), 9000, ALL), None, "size 0");
            assert_eq!(check(header(1, gso, [9001, 1, 34, 16]), 9000, ALL), None, "header past the frame");
        }
        for gso in [2, 3, 5, 0x80, 0x81, 0x84, 0xff] {
            assert_eq!(check(header(1, gso, fields), 9000, ALL), None, "type {gso:#x} is not on offer");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_refused_or_fits(sent: [u8; HEADER_BYTES], frame_len in 0usize..70_000) {
            if let Some(checked) = check(sent, frame_len, ALL) {
                prop_assert_eq!(check(checked, frame_len, ALL), Some(checked));
                let end = u16::from_le_bytes([checked[6], checked[7]]) as usize;
                prop_assert!(end <= frame_len);
            }
        }
    }
}
