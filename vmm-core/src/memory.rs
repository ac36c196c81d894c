//! Guest memory: the only place that maps it, but for the files of devices (`window.rs`).
#![allow(unsafe_code, reason = "advice on a mapping is given by address")]

use std::fs::{self, File};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use devices::GuestMemory;
use devices::model::Window;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{Advice, madvise};
use serde::{Deserialize, Serialize};
use tracing::debug;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::snapshot::memory_file::{MemoryImage, MemoryMode, PAGE, Pages};
pub use crate::uffd::FaultsError;
use crate::uffd::{Faults, Filler, Handler, TouchedFile};
use crate::window::{MappedWindow, WindowError};
use crate::x86_64::layout;

/// Bytes of a huge page, the only size that is used.
pub const HUGE_PAGE: u64 = 2 << 20;
/// Where the kernel says how many of them there are.
const HUGE_PAGE_COUNTS: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// What a bit of the bitmap of dirty pages stands for.
const DIRTY_PAGE: NonZeroUsize = NonZeroUsize::new(PAGE as usize).expect("a page has a size");

/// How much memory is asked about at once: the answer is a byte a page.
const RESIDENT_STEP: u64 = 64 << 20;

/// Which pages of the host's guest memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Small ones, and what the host makes of them by itself.
    #[default]
    No,
    /// The host is asked for transparent huge pages, and gives what it can.
    Transparent,
    /// All from the host's reserve of 2 MiB pages (vm.nr_hugepages), or the machine is not built.
    Reserved,
}

/// How guest memory is kept on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backing {
    /// Which pages.
    pub huge_pages: HugePages,
    /// In a memfd, mapped shared, so that it can be handed to another process.
    pub shared: bool,
}

/// The guest's RAM, populated as the guest touches it.
#[derive(Clone, Debug)]
pub struct GuestRam {
    memory: GuestMemory,
    windows: Vec<Arc<MappedWindow>>,
    /// What is below pages that were not written, if they are no zeroes.
    image: Option<Arc<MemoryImage>>,
    /// The file that it is in, if others may map that, too.
    shared: Option<Arc<File>>,
    /// Who brings it in when it is asked for.
    faults: Option<Faults>,
}

/// One contiguous piece of memory in the guest's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest physical address.
    pub guest_addr: u64,
    /// Bytes.
    pub len: u64,
    /// Address of the mapping in this process.
    pub host_addr: u64,
    /// The guest can only read it.
    pub read_only: bool,
}

/// Guest memory could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The kernel refused the mapping.
    #[error("cannot map {mib} MiB of guest memory: {source}; give the guest less")]
    Map {
        /// Size asked for, in MiB.
        mib: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host's reserve of huge pages is too small.
    #[error(
        "cannot map {mib} MiB of guest memory in huge pages: {needed} of 2 MiB are needed, and {free} of the \
         {total} that the host keeps are free; run 'sysctl vm.nr_hugepages={want}' as root, or say --hugepages=transparent"
    )]
    HugePages {
        /// Size asked for, in MiB.
        mib: u64,
        /// Huge pages needed.
        needed: u64,
        /// Huge pages that nobody uses or has reserved.
        free: u64,
        /// Huge pages of the host.
        total: u64,
        /// How many huge pages the host should have.
        want: u64,
    },
    /// A snapshot's memory could not be taken over.
    #[error("cannot read the snapshot's memory: {0}")]
    Image(io::Error),
    /// A snapshot's memory cannot be brought in when it is asked for.
    #[error(transparent)]
    Faults(#[from] FaultsError),
    /// There is not as much memory as asked for.
    #[error(
        "cannot fill {mib} MiB of guest memory: {source}; give the guest less, or do not take it in advance"
    )]
    Prealloc {
        /// Size asked for, in MiB.
        mib: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

impl GuestRam {
    /// `size` bytes, laid out as the architecture wants it: zeroes, or the memory of a snapshot, which has as many.
    pub fn new(
        size: u64,
        backing: Backing,
        image: Option<(Arc<MemoryImage>, MemoryMode)>,
    ) -> Result<Self, RamError> {
        let reserved = backing.huge_pages == HugePages::Reserved;
        let error = |source: io::Error| match source.raw_os_error() {
            Some(libc::ENOMEM) if reserved => huge_page_shortage(size),
            _ => RamError::Map { mib: size >> 20, source },
        };
        // What is shared with another process or in huge pages cannot be shared with a file.
        let mapped =
            image.as_ref().filter(|(_, mode)| *mode == MemoryMode::Map && !backing.shared && !reserved);
        let source = match (&mapped, backing.shared) {
            (Some((image, _)), _) => Source::Private(image.base().clone()),
            (None, true) => Source::Shared(memory_file(size, reserved).map_err(error)?),
            (None, false) => Source::Zeroes,
        };
        let mut offset = 0;
        let mut regions = Vec::new();
        for (base, len) in layout::ram_ranges(size) {
            let mapping = map(len, &source, offset, reserved).map_err(error)?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(base));
            regions.push(region.ok_or_else(|| error(io::ErrorKind::InvalidInput.into()))?);
            offset += len;
        }
        let memory = GuestMemory::from_regions(regions).map_err(|e| error(io::Error::other(e)))?;
        let shared = match source {
            Source::Shared(file) => Some(file),
            Source::Private(_) | Source::Zeroes => None,
        };
        let mut ram = Self { memory, windows: Vec::new(), image: None, shared, faults: None };
        if let Some((image, _)) = &image {
            let is_mapped = mapped.is_some();
            ram.fill(image, is_mapped).map_err(RamError::Image)?;
            ram.image = is_mapped.then(|| image.clone());
        }
        if backing.huge_pages == HugePages::Transparent {
            ram.prefer_huge_pages(size);
        }
        Ok(ram)
    }

    /// Takes over what is in `image`, whose base is mapped already or not.
    fn fill(&self, image: &MemoryImage, mapped: bool) -> io::Result<()> {
        let mut offset = 0;
        for region in self.regions() {
            match mapped {
                true => image.lay_over(region, offset)?,
                false => image.read_into(region, offset)?,
            }
            offset += region.len;
        }
        Ok(())
    }

    /// What is below pages that were not written, if they are no zeroes.
    pub fn image(&self) -> Option<&MemoryImage> {
        self.image.as_deref()
    }

    /// Brings `image` into memory that nobody has touched, when it is asked for.
    pub(crate) fn fill_on_demand(
        &mut self,
        image: Arc<MemoryImage>,
        touched: Option<TouchedFile>,
    ) -> Result<(), FaultsError> {
        self.faults = Some(Faults::Filler(Filler::start(self, image, touched)?.into()));
        Ok(())
    }

    /// Lets another process, which listens at `socket`, bring memory in that nobody has touched. It is made of pages of so
    /// many bytes.
    pub(crate) fn hand_faults_to(&mut self, socket: &Path, page: u64) -> Result<(), FaultsError> {
        self.faults = Some(Faults::Handler(Handler::connect(self, page, socket)?.into()));
        Ok(())
    }

    /// Who brings memory in when it is asked for.
    pub(crate) fn faults(&self) -> Option<&Faults> {
        self.faults.as_ref()
    }

    /// The file that it is in, if others may map that, too.
    pub fn shared_file(&self) -> Option<&File> {
        self.shared.as_deref()
    }

    /// Adds the pages that the VMM itself wrote since the last call, by their place in all of the RAM.
    pub fn take_dirty_pages(&self, pages: &mut Pages) {
        let mut start = 0;
        for region in self.memory.iter() {
            if let Some(bitmap) = region.get_mmap().bitmap() {
                pages.add_bits(start, bitmap.get_and_reset());
            }
            start += region.len();
        }
    }

    /// Takes all of the memory from the host now, not when the guest first touches it.
    pub fn populate(&self) -> Result<(), RamError> {
        self.regions().try_for_each(|region| {
            // SAFETY: the range is a mapping of ours. Populating it changes nothing that can be seen in it.
            unsafe { madvise(region.host_addr as *mut _, region.len as usize, Advice::LinuxPopulateWrite) }
                .map_err(|errno| RamError::Prealloc { mib: self.size() >> 20, source: errno.into() })
        })
    }

    /// Asks the host for huge pages in the first `len` bytes: for what is going to be filled wholly and at once.
    pub fn prefer_huge_pages(&self, len: u64) {
        let mut left = len;
        for region in self.regions() {
            let part = left.min(region.len);
            left -= part;
            // SAFETY: the range lies in a mapping of ours, and the advice changes nothing that can be seen in it.
            let advised =
                unsafe { madvise(region.host_addr as *mut _, part as usize, Advice::LinuxHugepage) };
            if let Err(error) = advised {
                debug!(%error, "no transparent huge pages");
            }
        }
    }

    /// The memory as devices and loaders use it.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Pieces of RAM, from the lowest address up.
    pub fn regions(&self) -> impl Iterator<Item = RamRegion> + '_ {
        self.memory.iter().map(|region| RamRegion {
            guest_addr: region.start_addr().raw_value(),
            len: region.len(),
            host_addr: region.get_mmap().as_ptr() as u64,
            read_only: false,
        })
    }

    /// Maps a device's file beside the RAM, and returns where the guest finds it. It is no part of [`Self::memory`], so
    /// that no descriptor can name it: a file may lose its end, and a device must not meet that.
    pub fn add_window(&mut self, window: Window<'_>) -> Result<u64, WindowError> {
        let end = self.slots().map(|slot| slot.guest_addr + slot.len).max().unwrap_or(0);
        let window = MappedWindow::new(layout::next_window(end), window)?;
        let guest_addr = window.region().guest_addr;
        self.windows.push(Arc::new(window));
        Ok(guest_addr)
    }

    /// All that the guest can reach without an exit: RAM and windows.
    pub fn slots(&self) -> impl Iterator<Item = RamRegion> + '_ {
        self.regions().chain(self.windows.iter().map(|window| window.region()))
    }

    /// Bytes of the RAM that are in the host's memory: of a snapshot's file what was touched, of shared memory also what
    /// others have.
    pub fn resident(&self) -> u64 {
        let regions = self.regions().map(|region| match self.shared {
            Some(_) => Ok(cached(region)),
            None => {
                let mut resident = 0;
                // The page of zeroes that all processes read is neither a file's nor one mapping's own.
                let is_memory = |entry| entry & PRESENT != 0 && entry & (OF_FILE | EXCLUSIVE) != 0;
                page_table(region, |_, entry| resident += if is_memory(entry) { PAGE } else { 0 })
                    .map(|()| resident)
            }
        });
        regions.sum::<io::Result<u64>>().unwrap_or_else(|error| {
            debug!(%error, "nobody knows what is resident");
            0
        })
    }

    /// Size of the RAM in bytes.
    pub fn size(&self) -> u64 {
        self.regions().map(|region| region.len).sum()
    }
}

/// Bytes of a region of shared memory that are in the host's memory.
fn cached(region: RamRegion) -> u64 {
    let mut pages = vec![0_u8; (RESIDENT_STEP / PAGE) as usize];
    let mut cached = 0;
    for at in (0..region.len).step_by(RESIDENT_STEP as usize) {
        let len = (region.len - at).min(RESIDENT_STEP);
        let start = (region.host_addr + at) as *mut libc::c_void;
        // SAFETY: the range is a mapping of ours, and the vector has a byte for each of its pages.
        if unsafe { libc::mincore(start, len as usize, pages.as_mut_ptr()) } == 0 {
            cached += pages[..(len / PAGE) as usize].iter().filter(|&&page| page & 1 != 0).count() as u64;
        }
    }
    cached * PAGE
}

/// Bits of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
pub(crate) const PRESENT: u64 = 1 << 63;
pub(crate) const SWAPPED: u64 = 1 << 62;
pub(crate) const OF_FILE: u64 = 1 << 61;
const EXCLUSIVE: u64 = 1 << 56;

/// Calls `each` for each page of a region, with its place there and its entry in our page table.
pub(crate) fn page_table(region: RamRegion, mut each: impl FnMut(u64, u64)) -> io::Result<()> {
    let map = File::open("/proc/self/pagemap")?;
    let mut entries = vec![0; 64 << 10];
    let first = region.host_addr / PAGE * 8;
    let end = first + region.len / PAGE * 8;
    for at in (first..end).step_by(entries.len()) {
        let len = (end - at).min(entries.len() as u64) as usize;
        map.read_exact_at(&mut entries[..len], at)?;
        for (i, entry) in entries[..len].chunks_exact(8).enumerate() {
            let page = (at - first) / 8 + i as u64;
            each(page * PAGE, entry.try_into().map_or(0, u64::from_ne_bytes));
        }
    }
    Ok(())
}

/// The file that shared guest memory of `size` bytes is in. Its size is sealed: nobody who is given it can take
/// memory away under us.
fn memory_file(size: u64, huge_pages: bool) -> io::Result<Arc<File>> {
    let huge = if huge_pages { MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { MemfdFlags::empty() };
    let fd = memfd_create("guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | huge)?;
    ftruncate(&fd, size)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(Arc::new(fd.into()))
}

/// What memory begins with.
enum Source {
    Zeroes,
    /// A file that others map, too, and see what is written.
    Shared(Arc<File>),
    /// A file that stays as it is.
    Private(Arc<File>),
}

/// Maps `len` bytes of `source`, from `offset` on.
fn map(
    len: u64,
    source: &Source,
    offset: u64,
    huge_pages: bool,
) -> io::Result<MmapRegion<Option<AtomicBitmap>>> {
    // 32 KiB a GiB, for whatever the VMM writes: a snapshot may be made of any machine.
    let dirty = Some(AtomicBitmap::new(len as usize, DIRTY_PAGE));
    // Huge pages are reserved as a whole, so that the guest never meets the end of the reserve.
    let reserve = if huge_pages { 0 } else { libc::MAP_NORESERVE };
    let kind = match (source, huge_pages) {
        (Source::Shared(_), _) => libc::MAP_SHARED,
        (Source::Private(_), _) => libc::MAP_PRIVATE,
        (Source::Zeroes, false) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        (Source::Zeroes, true) => {
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB
        }
    };
    let builder = MmapRegionBuilder::new_with_bitmap(len as usize, dirty)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(kind | reserve)
        .with_hugetlbfs(huge_pages);
    let builder = match source {
        Source::Zeroes => builder,
        Source::Shared(file) | Source::Private(file) => {
            builder.with_file_offset(FileOffset::from_arc(file.clone(), offset))
        }
    };
    builder.build().map_err(|error| match error {
        vm_memory::mmap::MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
    })
}

/// Why there are not enough huge pages for `size` bytes.
fn huge_page_shortage(size: u64) -> RamError {
    let count = |name: &str| -> u64 {
        let text = fs::read_to_string(format!("{HUGE_PAGE_COUNTS}/{name}")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    let (total, needed) = (count("nr_hugepages"), size.div_ceil(HUGE_PAGE));
    let free = count("free_hugepages").saturating_sub(count("resv_hugepages"));
    let want = total + needed.saturating_sub(free);
    RamError::HugePages { mib: size >> 20, needed, free, total, want }
}
