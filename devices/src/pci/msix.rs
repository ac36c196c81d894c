//! MSI-X: a table of messages that stand for interrupts (PCI Local Bus 3.0, 6.8.2).

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use crate::model::MsiSender;
use crate::snapshot::SnapshotError;

/// Capability ID.
pub const CAPABILITY: u8 = 0x11;
/// Bytes of a table entry.
pub const ENTRY: usize = 16;
/// Message control: MSI-X is on.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Message control: the bits that the guest writes.
pub const CONTROL_WRITABLE: u16 = ENABLE | FUNCTION_MASK;
/// Vector control: the vector is masked.
const MASKED: u32 = 1;

/// An entry of the table: message address, data, vector control.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry([u32; 4]);

/// The state of the vectors, as it is in a snapshot too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    table: Vec<Entry>,
    /// Interrupts that wait until their vector is unmasked.
    pending: Vec<bool>,
    control: u16,
}

/// A function's vectors.
pub struct Msix {
    state: Mutex<MsixState>,
    sender: Arc<dyn MsiSender>,
}

impl Msix {
    /// `vectors` (1 to 2048) masked vectors, and MSI-X off. Messages go to `sender`.
    pub fn new(vectors: u16, sender: Arc<dyn MsiSender>) -> Self {
        let table = vec![Entry([0, 0, 0, MASKED]); vectors.into()];
        let state = MsixState { pending: vec![false; table.len()], table, control: 0 };
        Self { state: Mutex::new(state), sender }
    }

    fn state(&self) -> MutexGuard<'_, MsixState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Message control, as far as the guest writes it.
    pub fn control(&self) -> u16 {
        self.state().control
    }

    /// The state for a snapshot.
    pub fn save(&self) -> MsixState {
        self.state().clone()
    }

    /// Takes over a saved state.
    pub fn restore(&self, saved: &MsixState) -> Result<(), SnapshotError> {
        let mut state = self.state();
        SnapshotError::unless_same("MSI-X vectors", saved.table.len(), state.table.len())?;
        if saved.pending.len() != saved.table.len() {
            return Err(SnapshotError::impossible("number of pending bits"));
        }
        let open = saved.control & CONTROL_WRITABLE == ENABLE;
        let is_possible = |(&Entry([low, .., control]), &pending): (&Entry, &bool)| {
            // What is pending is masked, or it would have been sent.
            low & 3 == 0 && control & !MASKED == 0 && !(pending && open && control == 0)
        };
        if saved.control & !CONTROL_WRITABLE != 0 || !saved.table.iter().zip(&saved.pending).all(is_possible)
        {
            return Err(SnapshotError::impossible("MSI-X table"));
        }
        state.clone_from(saved);
        Ok(())
    }

    /// What follows the link of the capability, for a table and a PBA in BAR 0 at these offsets.
    pub fn capability(&self, table: u32, pba: u32) -> [u8; 10] {
        let mut body = [0; 10];
        let last = self.state().table.len() - 1;
        body[..2].copy_from_slice(&(last as u16).to_le_bytes());
        body[2..6].copy_from_slice(&table.to_le_bytes());
        body[6..].copy_from_slice(&pba.to_le_bytes());
        body
    }

    /// The guest wrote message control.
    pub fn set_control(&self, control: u16) {
        let mut state = self.state();
        state.control = control & CONTROL_WRITABLE;
        (0..state.table.len()).for_each(|vector| self.deliver(&mut state, vector));
    }

    /// Interrupts by `vector`, now or when it is unmasked. Nothing happens while MSI-X is off, or if there is no such
    /// vector.
    pub fn send(&self, vector: u16) {
        let (mut state, vector) = (self.state(), usize::from(vector));
        if state.control & ENABLE != 0 && vector < state.table.len() {
            state.pending[vector] = true;
            self.deliver(&mut state, vector);
        }
    }

    /// Sends what is pending on `vector`, unless it is masked.
    fn deliver(&self, state: &mut MsixState, vector: usize) {
        let Entry([low, high, data, control]) = state.table[vector];
        let open = state.control & CONTROL_WRITABLE == ENABLE && control & MASKED == 0;
        if open && std::mem::take(&mut state.pending[vector]) {
            self.sender.send(u64::from(high) << 32 | u64::from(low), data);
        }
    }

    /// The guest reads the table. Accesses are 4 or 8 bytes wide and aligned, the others read as 0.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        let Some((vector, word)) = place(offset, data.len(), state.table.len()) else { return };
        let words = &state.table[vector].0[word..];
        data.chunks_mut(4).zip(words).for_each(|(to, word)| to.copy_from_slice(&word.to_le_bytes()));
    }

    /// The guest writes the table; the widths are those of [`Self::read_table`].
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        let Some((vector, word)) = place(offset, data.len(), state.table.len()) else { return };
        let entry = &mut state.table[vector].0;
        for (to, from) in entry[word..].iter_mut().zip(data.chunks(4)) {
            *to = from.try_into().map_or(0, u32::from_le_bytes);
        }
        // The low two address bits and all of vector control but the mask are reserved, and 0.
        entry[0] &= !3;
        entry[3] &= MASKED;
        self.deliver(&mut state, vector);
    }

    /// The guest reads the pending bits, in any width. They are not the guest's to write.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = state.pending.chunks(8).skip(start);
        let byte = |bits: &[bool]| bits.iter().rev().fold(0, |byte, &bit| byte << 1 | u8::from(bit));
        data.iter_mut().zip(bytes).for_each(|(to, bits)| *to = byte(bits));
    }
}

/// The vector and the first word that an access of `width` bytes at `offset` is to, in a table of so many vectors.
fn place(offset: u64, width: usize, vectors: usize) -> Option<(usize, usize)> {
    let offset = usize::try_from(offset).ok()?;
    let fits = matches!(width, 4 | 8) && offset.is_multiple_of(width) && offset / ENTRY < vectors;
    fits.then_some((offset / ENTRY, offset % ENTRY / 4))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Sent(Mutex<Vec<(u64, u32)>>);

    impl MsiSender for Sent {
        fn send(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }

    impl Sent {
        fn take(&self) -> Vec<(u64, u32)> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    fn msix(vectors: u16) -> (Msix, Arc<Sent>) {
        let sent = Arc::<Sent>::default();
        let msix = Msix::new(vectors, sent.clone());
        for vector in 0..u64::from(vectors) {
            msix.write_table(vector * 16, &(0xfee0_0000u64 | vector << 12).to_le_bytes());
            msix.write_table(vector * 16 + 8, &(vector as u32 + 0x40).to_le_bytes());
        }
        (msix, sent)
    }

    fn pba(msix: &Msix) -> u64 {
        let mut data = [0; 8];
        msix.read_pba(0, &mut data);
        u64::from_le_bytes(data)
    }

    fn mask(msix: &Msix, vector: u64, masked: u32) {
        msix.write_table(vector * 16 + 12, &masked.to_le_bytes());
    }

    #[test]
    fn a_masked_vector_waits_and_an_unmasked_one_is_sent() {
        let (msix, sent) = msix(3);
        msix.send(1);
        assert_eq!((sent.take(), pba(&msix)), (vec![], 0), "MSI-X is off");
        msix.set_control(ENABLE);
        msix.send(1);
        msix.send(1);
        assert_eq!((sent.take(), pba(&msix)), (vec![], 2), "vectors start masked");
        mask(&msix, 0, 0);
        assert_eq!((sent.take(), pba(&msix)), (vec![], 2));
        mask(&msix, 1, 0);
        assert_eq!((sent.take(), pba(&msix)), (vec![(0xfee0_1000, 0x41)], 0));
        msix.send(1);
        msix.send(0);
        assert_eq!(sent.take(), [(0xfee0_1000, 0x41), (0xfee0_0000, 0x40)]);
        for vector in [3, 4, 0xffff] {
            msix.send(vector);
        }
        assert_eq!((sent.take(), pba(&msix)), (vec![], 0), "there is no such vector");
    }

    #[test]
    fn the_function_mask_holds_all_back() {
        let (msix, sent) = msix(2);
        msix.set_control(ENABLE | FUNCTION_MASK);
        (0..2).for_each(|vector| mask(&msix, vector, 0));
        msix.send(0);
        msix.send(1);
        assert_eq!((sent.take(), pba(&msix)), (vec![], 3));
        mask(&msix, 1, 1);
        msix.set_control(ENABLE);
        assert_eq!((sent.take(), pba(&msix)), (vec![(0xfee0_0000, 0x40)], 2));
        msix.set_control(0);
        mask(&msix, 1, 0);
        assert_eq!((sent.take(), pba(&msix)), (vec![], 2), "what is pending waits while MSI-X is off");
        msix.set_control(!FUNCTION_MASK);
        assert_eq!(sent.take().len(), 1);
    }

    #[test]
    fn reserved_bits_stay_0_and_the_message_is_what_was_written() {
        let (msix, _) = msix(1);
        for offset in [0, 4, 8, 12] {
            msix.write_table(offset, &[0xff; 4]);
        }
        let mut entry = [0; 16];
        let (low, high) = entry.split_at_mut(8);
        msix.read_table(0, low);
        msix.read_table(8, high);
        let mut want = [0xff; 16];
        want[0] = 0xfc;
        want[12..].copy_from_slice(&[1, 0, 0, 0]);
        assert_eq!(entry, want);
    }

    #[test]
    fn the_capability_tells_how_many() {
        let (msix, _) = msix(66);
        assert_eq!(msix.capability(0x4000, 0x5000), [65, 0, 0, 0x40, 0, 0, 0, 0x50, 0, 0]);
        msix.set_control(ENABLE);
        msix.send(65);
        let mut data = [0; 16];
        msix.read_pba(0, &mut data);
        assert_eq!(data[8..], [2, 0, 0, 0, 0, 0, 0, 0]);
        let mut one = [0];
        msix.read_pba(8, &mut one);
        assert_eq!(one, [2]);
    }

    proptest! {
        #[test]
        fn accesses_that_straddle_do_nothing(
            offset in prop_oneof![0..80u64, any::<u64>()],
            width in 0..20usize,
        ) {
            let (msix, _) = msix(4);
            let words = || {
                let mut table = [0; 64];
                (0..).step_by(4).zip(table.chunks_mut(4)).for_each(|(at, to)| msix.read_table(at, to));
                table
            };
            let before = words();
            let mut data = vec![0; width];
            msix.read_table(offset, &mut data);
            let good = matches!(width, 4 | 8) && offset.is_multiple_of(width as u64) && offset < 64;
            if good {
                prop_assert_eq!(&data[..], &before[offset as usize..][..width]);
            } else {
                prop_assert!(data.iter().all(|&byte| byte == 0));
                msix.write_table(offset, &vec![0x55; width]);
                prop_assert_eq!(words(), before);
            }
            msix.read_pba(offset, &mut data);
        }
    }
}
