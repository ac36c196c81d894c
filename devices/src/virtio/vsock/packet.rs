//! The header of every vsock packet (virtio 1.3 §5.10.6), struct virtio_vsock_hdr.

/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;
/// The host's CID (§5.10.4).
pub const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM, the one type of socket that we have.
pub const STREAM: u16 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: who says it receives no more.
pub const NO_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: who says it sends no more.
pub const NO_SEND: u32 = 2;
/// Both of them: the connection is to end.
pub const NEITHER: u32 = NO_RECEIVE | NO_SEND;

/// What a packet is for (§5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Opens a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// Refuses or ends one.
    Rst = 3,
    /// Ends one or both directions.
    Shutdown = 4,
    /// Carries bytes.
    Rw = 5,
    /// Says how much room there is.
    CreditUpdate = 6,
    /// Asks how much there is.
    CreditRequest = 7,
}

impl Op {
    /// The operation of this number, if there is one.
    pub fn from_number(number: u16) -> Option<Self> {
        use Op::*;
        [Request, Response, Rst, Shutdown, Rw, CreditUpdate, CreditRequest]
            .into_iter()
            .find(|&op| op as u16 == number)
    }
}

/// What tells a connection from others: the guest has one CID, and the host another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports {
    /// Port on the host's side.
    pub host: u32,
    /// Port on the guest's side.
    pub guest: u32,
}

/// A header, with its fields in the host's byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// CID of who sends.
    pub src_cid: u64,
    /// CID of who receives.
    pub dst_cid: u64,
    /// Port of who sends.
    pub src_port: u32,
    /// Port of who receives.
    pub dst_port: u32,
    /// Bytes that follow the header.
    pub len: u32,
    /// Type of socket.
    pub kind: u16,
    /// Number of the operation, see [`Op`].
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Bytes of room that who sends has for this connection, in all.
    pub buf_alloc: u32,
    /// Bytes that who sends has taken out of that room since the connection began, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            src_cid: u64::from_le_bytes(fields.take()),
            dst_cid: u64::from_le_bytes(fields.take()),
            src_port: u32::from_le_bytes(fields.take()),
            dst_port: u32::from_le_bytes(fields.take()),
            len: u32::from_le_bytes(fields.take()),
            kind: u16::from_le_bytes(fields.take()),
            op: u16::from_le_bytes(fields.take()),
            flags: u32::from_le_bytes(fields.take()),
            buf_alloc: u32::from_le_bytes(fields.take()),
            fwd_cnt: u32::from_le_bytes(fields.take()),
        }
    }

    /// As it is in memory.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet: the same connection and type, the other way.
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Rst as u16,
            ..Self::default()
        }
    }

    /// The connection that a packet of the guest belongs to.
    pub fn ports(&self) -> Ports {
        Ports { host: self.dst_port, guest: self.src_port }
    }
}

/// What is left of a header.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    /// The next field. The fields of a header are as long as a header, so there always is one.
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().unwrap_or((&[0; N], &[]));
        self.0 = rest;
        *field
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_where_the_specification_has_it() {
        let bytes: [u8; HEADER_BYTES] = std::array::from_fn(|i| i as u8);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.dst_cid, 0x0f0e_0d0c_0b0a_0908);
        assert_eq!((header.len, header.kind, header.op), (0x1b1a_1918, 0x1d1c, 0x1f1e));
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn operations_have_their_numbers_and_no_others() {
        for number in 1..=7 {
            assert_eq!(Op::from_number(number).map(|op| op as u16), Some(number));
        }
        assert_eq!([0, 8, 0xffff].map(Op::from_number), [None; 3]);
    }
}
