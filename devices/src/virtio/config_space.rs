//! A device's configuration space (virtio 1.3 §2.5), readable by vCPUs while the device works elsewhere.

use std::ops::Range;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

/// The bytes of a configuration space, with the generation count that lets a driver read it consistently.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: RwLock<Box<[u8]>>,
    generation: AtomicU32,
    writable: Range<usize>,
}

/// The state of a configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    bytes: Vec<u8>,
    generation: u32,
}

impl ConfigState {
    /// What is in the space.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl ConfigSpace {
    /// A space of these bytes that the driver may only read.
    pub fn read_only(bytes: &[u8]) -> Self {
        Self::with_writable(bytes, 0..0)
    }

    /// A space of these bytes of which the driver may write the range `writable`.
    pub fn with_writable(bytes: &[u8], writable: Range<usize>) -> Self {
        Self { bytes: RwLock::new(bytes.into()), generation: AtomicU32::new(0), writable }
    }

    /// Copies the bytes at `offset` into `data`; what lies past the end reads as 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let bytes = self.bytes.read().unwrap_or_else(|e| e.into_inner());
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let n = data.len().min(bytes.len() - start);
        data[..n].copy_from_slice(&bytes[start..start + n]);
    }

    /// What of it the driver may write.
    pub fn writable(&self) -> Range<usize> {
        self.writable.clone()
    }

    /// The driver writes `data` at `offset`. Returns whether all of it is writable; otherwise nothing changes.
    pub fn driver_write(&self, offset: u64, data: &[u8]) -> bool {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let Some(end) = start.checked_add(data.len()) else { return false };
        if start < self.writable.start || end > self.writable.end {
            return false;
        }
        let mut bytes = self.bytes.write().unwrap_or_else(|e| e.into_inner());
        bytes[start..end].copy_from_slice(data);
        true
    }

    /// The device changes its space; the generation moves so that the driver notices a torn read.
    pub fn update(&self, change: impl FnOnce(&mut [u8])) {
        let mut bytes = self.bytes.write().unwrap_or_else(|e| e.into_inner());
        change(&mut bytes);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// The state for a snapshot.
    pub fn save(&self) -> ConfigState {
        let bytes = self.bytes.read().unwrap_or_else(|e| e.into_inner()).to_vec();
        ConfigState { bytes, generation: self.generation() }
    }

    /// Calls `check` with the bytes of a saved state and those of now.
    pub fn compare<T>(&self, saved: &ConfigState, check: impl FnOnce(&[u8], &[u8]) -> T) -> T {
        check(&saved.bytes, &self.bytes.read().unwrap_or_else(|e| e.into_inner()))
    }

    /// Takes over what the driver wrote. What only the device writes is what it is now: another size or MAC address than
    /// in the snapshot moves the generation. Returns whether there is such a difference.
    pub fn restore(&self, saved: &ConfigState) -> bool {
        let mut bytes = self.bytes.write().unwrap_or_else(|e| e.into_inner());
        let writable = self.writable();
        if let (Some(to), Some(from)) = (bytes.get_mut(writable.clone()), saved.bytes.get(writable)) {
            to.copy_from_slice(from);
        }
        let differs = **bytes != *saved.bytes;
        self.generation.store(saved.generation.wrapping_add(differs.into()), Ordering::Release);
        differs
    }

    /// ConfigGeneration, virtio 1.3 §2.5.2.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_past_the_end_are_zero() {
        let space = ConfigSpace::read_only(&[1, 2, 3, 4]);
        for (offset, len, want) in
            [(0, 4, vec![1, 2, 3, 4]), (2, 4, vec![3, 4, 0, 0]), (4, 1, vec![0]), (u64::MAX, 2, vec![0, 0])]
        {
            let mut data = vec![0xaa; len];
            space.read(offset, &mut data);
            assert_eq!(data, want, "offset {offset}");
        }
    }

    #[test]
    fn the_driver_writes_only_what_it_may() {
        let space = ConfigSpace::with_writable(&[0; 8], 4..6);
        assert!(space.driver_write(4, &[7, 8]));
        for (offset, data) in [(3, vec![1, 1]), (5, vec![1, 1]), (0, vec![1]), (u64::MAX, vec![1])] {
            assert!(!space.driver_write(offset, &data), "offset {offset}");
        }
        let mut all = [0; 8];
        space.read(0, &mut all);
        assert_eq!(all, [0, 0, 0, 0, 7, 8, 0, 0]);
        assert_eq!(space.generation(), 0);
        space.update(|b| b[0] = 9);
        assert_eq!(space.generation(), 1);
    }
}
