//! Guest memory: the only place that maps it.
#![allow(unsafe_code, reason = "advice on a mapping is given by address")]

use std::io;

use devices::GuestMemory;
use rustix::mm::{Advice, madvise};
use tracing::debug;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::x86_64::layout;

/// The guest's RAM, mapped anonymously and populated as the guest touches it.
#[derive(Clone, Debug)]
pub struct GuestRam {
    memory: GuestMemory,
}

/// One contiguous piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest physical address.
    pub guest_addr: u64,
    /// Bytes.
    pub len: u64,
    /// Address of the mapping in this process.
    pub host_addr: u64,
}

/// Guest memory could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The kernel refused the mapping.
    #[error("cannot map {mib} MiB of guest memory: {source}; lower --memory")]
    Map {
        /// Size asked for, in MiB.
        mib: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

impl GuestRam {
    /// `size` bytes of zeroes, laid out as the architecture wants it.
    pub fn new(size: u64) -> Result<Self, RamError> {
        let error = |source| RamError::Map { mib: size >> 20, source };
        let regions = layout::ram_ranges(size)
            .into_iter()
            .map(|(base, len)| {
                let mapping: MmapRegion<_> = MmapRegionBuilder::new_with_bitmap(len as usize, None)
                    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                    .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
                    .build()
                    .map_err(|e| error(io::Error::other(e)))?;
                GuestRegionMmap::new(mapping, GuestAddress(base))
                    .ok_or_else(|| error(io::ErrorKind::InvalidInput.into()))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let memory = GuestMemory::from_regions(regions).map_err(|e| error(io::Error::other(e)))?;
        Ok(Self { memory })
    }

    /// Asks the host for huge pages in the first `len` bytes: for what is going to be filled wholly and at once.
    pub fn prefer_huge_pages(&self, len: u64) {
        let Some(region) = self.regions().next() else { return };
        let len = len.min(region.len) as usize;
        // SAFETY: the range lies in a mapping of ours, and the advice changes nothing that can be seen in it.
        let advised = unsafe { madvise(region.host_addr as *mut _, len, Advice::LinuxHugepage) };
        if let Err(error) = advised {
            debug!(%error, "no huge pages for the kernel");
        }
    }

    /// The memory as devices and loaders use it.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Its pieces, from the lowest address up.
    pub fn regions(&self) -> impl Iterator<Item = RamRegion> + '_ {
        self.memory.iter().map(|region| RamRegion {
            guest_addr: region.start_addr().raw_value(),
            len: region.len(),
            host_addr: region.get_mmap().as_ptr() as u64,
        })
    }

    /// Total size in bytes.
    pub fn size(&self) -> u64 {
        self.regions().map(|region| region.len).sum()
    }
}
