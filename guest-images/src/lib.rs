//! What runs inside a guest: kernels, the init, root file systems, initramfs archives.
//!
//! Everything that takes time is cached under [`cache::directory`] by the hash of its recipe, which is part of
//! this library: an installed `vmm` can build its images anywhere, without root and without mounts.

pub mod cache;
mod ext4;
pub mod initramfs;
pub mod kernel;
mod packages;
pub mod progress;
pub mod rootfs;

pub use packages::PackageError;
pub use progress::Progress;

/// The guest's init (package `guest-init`): a static ELF program of some 25 KiB.
pub const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest-init"));

#[cfg(test)]
mod tests {
    use super::INIT;

    /// `e_type` and the program headers' `p_type` of a 64-bit ELF file (System V ABI, chapter 4 and 5).
    fn elf_types(file: &[u8]) -> (u16, Vec<u32>) {
        let half = |at: usize| u16::from_le_bytes(file[at..at + 2].try_into().unwrap());
        let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
        let headers = usize::try_from(u64::from_le_bytes(file[32..40].try_into().unwrap())).unwrap();
        (half(16), (0..half(56)).map(|index| word(headers + usize::from(index * half(54)))).collect())
    }

    #[test]
    fn the_init_is_a_small_static_program() {
        const ET_EXEC: u16 = 2;
        const PT_DYNAMIC: u32 = 2;
        const PT_INTERP: u32 = 3;
        let (kind, headers) = elf_types(INIT);
        assert_eq!(kind, ET_EXEC);
        assert!(!headers.contains(&PT_INTERP) && !headers.contains(&PT_DYNAMIC), "{headers:?}");
        assert!(INIT.len() < 64 << 10, "{} bytes", INIT.len());
    }
}
