//! PCI: configuration spaces, MSI-X, and the two ways by which a guest reaches the functions of bus 0.
//!
//! There is one bus, every device on it has one function, and addresses are given out before the guest starts.

pub mod config;
pub mod msix;
pub mod root;

/// A function of a PCI device, by its configuration space.
///
/// Accesses are 1, 2 or 4 bytes wide and aligned to their width; [`root`] turns the others away.
pub trait Function: Send + Sync {
    /// Fills `data` with what is at `register`, below [`config::SIZE`].
    fn read_config(&self, register: usize, data: &mut [u8]);

    /// Takes what the guest writes at `register`, below [`config::SIZE`].
    fn write_config(&self, register: usize, data: &[u8]);
}
