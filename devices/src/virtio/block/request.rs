//! One block request (virtio 1.3 §5.2.6): from a chain, and back to it.

use std::collections::VecDeque;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::job::{Clear, Range};
use super::space::{MAX_CLEAR_SECTORS, MAX_CLEAR_SEGMENTS};
use super::{MAX_REQUEST, SECTOR};
use crate::virtio::buffers::{Buffers, Held};
use crate::virtio::queue::{Chain, Head};

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill the buffers that the device may write.
    Read {
        /// First sector.
        sector: u64,
    },
    /// Store the buffers that the device may read.
    Write {
        /// First sector.
        sector: u64,
    },
    /// Make all writes that were completed durable.
    Flush,
    /// Tell the disk's identity string.
    GetId,
    /// Ranges need not be kept.
    Discard,
    /// Ranges are to read as zeros.
    WriteZeroes,
    /// Something that the device does not do.
    Unsupported,
    /// Something with more than [`MAX_REQUEST`] bytes of data.
    TooLarge,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// Failed, by the driver's fault or the host's.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// Not a type of request that the device knows.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// A request that the device holds.
#[derive(Debug)]
pub struct Request<'m> {
    /// What to do.
    pub operation: Operation,
    /// Data of a write.
    pub from_guest: Buffers<'m>,
    /// Room for the data of a read.
    pub to_guest: Buffers<'m>,
    status: Buffers<'m>,
    head: Head,
    /// Bytes that the device may write in all, the status included.
    writable: u32,
}

/// What is left of a request while its data is on its way: where the answer goes.
#[derive(Debug)]
pub struct Ticket {
    /// The queue it came from.
    pub queue: u16,
    /// Bytes of data that it moves.
    pub bytes: usize,
    status: Held,
    head: Head,
    writable: u32,
}

impl<'m> Request<'m> {
    /// Reads a request from its chain: a header of 16 bytes at the front of what is readable, and a status at
    /// the end of what is writable, wherever descriptors begin and end (§2.7.4.2). A chain without either is no
    /// request, and only its head is left of it.
    pub fn parse(chain: Chain<'m>) -> Result<Self, Head> {
        let Chain { head, readable: mut from_guest, writable: mut to_guest, .. } = chain;
        let mut header = [0; 16];
        let writable = u32::try_from(to_guest.len()).unwrap_or(u32::MAX);
        if from_guest.read(&mut header) < header.len() || to_guest.is_empty() {
            return Err(head);
        }
        let status = to_guest.split_off(to_guest.len() - 1);
        let [kind @ .., _, _, _, _, _, _, _, _, _, _, _, _] = header;
        let [_, _, _, _, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let operation = match u32::from_le_bytes(kind) {
            _ if from_guest.len().saturating_add(to_guest.len()) > MAX_REQUEST => Operation::TooLarge,
            VIRTIO_BLK_T_IN => Operation::Read { sector },
            VIRTIO_BLK_T_OUT => Operation::Write { sector },
            VIRTIO_BLK_T_FLUSH => Operation::Flush,
            VIRTIO_BLK_T_GET_ID => Operation::GetId,
            VIRTIO_BLK_T_DISCARD => Operation::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Operation::WriteZeroes,
            _ => Operation::Unsupported,
        };
        Ok(Self { operation, from_guest, to_guest, status, head, writable })
    }

    /// Bytes of data to be moved, [`MAX_REQUEST`] at most.
    pub fn bytes(&self) -> usize {
        match self.operation {
            Operation::TooLarge => 0,
            _ => self.from_guest.len() + self.to_guest.len(),
        }
    }

    /// The ranges of a request to discard or zero (§5.2.6), on a disk of `sectors` sectors in blocks of `block`
    /// bytes. All of them are checked before the first is touched.
    pub fn ranges(&mut self, sectors: u64, block: u32) -> Result<VecDeque<Range>, Status> {
        let (count, rest) = (self.from_guest.len() / SEGMENT, self.from_guest.len() % SEGMENT);
        if rest != 0 || !(1..=MAX_CLEAR_SEGMENTS as usize).contains(&count) {
            return Err(Status::IoError);
        }
        let mut ranges = VecDeque::with_capacity(count);
        while let Some(segment) = self.from_guest.read_obj::<[u32; 4]>() {
            let [sector_low, sector_high, count, flags] = segment.map(u32::from_le);
            let sector = u64::from(sector_low) | u64::from(sector_high) << 32;
            let how = match (self.operation, flags) {
                (Operation::Discard, 0) => Clear::Discard,
                (Operation::WriteZeroes, 0) => Clear::Zero,
                (Operation::WriteZeroes, UNMAP) => Clear::Unmap,
                _ => return Err(Status::Unsupported),
            };
            let end = sector.checked_add(count.into()).filter(|&end| end <= sectors);
            let (offset, len) = (sector.wrapping_mul(SECTOR), u64::from(count) * SECTOR);
            let whole = (offset | len).is_multiple_of(block.into());
            if end.is_none() || !whole || !(1..=MAX_CLEAR_SECTORS).contains(&count) {
                return Err(Status::IoError);
            }
            ranges.push_back(Range { offset, len, how });
        }
        Ok(ranges)
    }

    /// Splits it into the data to move, and what is needed to complete it later.
    pub fn hold(mut self, queue: u16) -> (Held, Ticket) {
        let bytes = self.bytes();
        let data = match self.operation {
            Operation::Read { .. } => self.to_guest,
            // Nothing will be written there, and the answer counts it all the same, see `complete`.
            _ => {
                self.to_guest.zero();
                self.from_guest
            }
        };
        let Self { status, head, writable, .. } = self;
        (data.hold(), Ticket { queue, bytes, status: status.hold(), head, writable })
    }

    /// Writes the status. What is left of the data is zeroed: the status is the last byte, so the length that
    /// reports it reports all bytes before it as well (§2.7.8.2). Of too large a request only the status is
    /// written, and reported if no data is in front of it.
    pub fn complete(mut self, status: Status) -> (Head, u32) {
        let untouched = self.operation == Operation::TooLarge && !self.to_guest.is_empty();
        if !untouched {
            self.to_guest.zero();
        }
        self.status.write(&[status as u8]);
        (self.head, if untouched { 0 } else { self.writable })
    }
}

impl Ticket {
    /// Writes the status; the data was moved or zeroed.
    pub fn complete(mut self, status: Status) -> (Head, u32) {
        self.status.write(&[status as u8]);
        (self.head, self.writable)
    }
}

/// Bytes of struct virtio_blk_discard_write_zeroes.
const SEGMENT: usize = 16;
/// The range may be given back to the host.
const UNMAP: u32 = 1;
