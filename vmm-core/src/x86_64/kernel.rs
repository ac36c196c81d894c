//! Loading a kernel and telling it what it needs to know: Linux's boot protocol and PVH, over linux-loader.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use devices::GuestMemory;
use devices::pci::root::ECAM_SIZE;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::layout;

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Documentation/arch/x86/boot.rst, the 64-bit entry point.
    Linux,
    /// The PVH entry point of an ELF note, in 32-bit mode.
    Pvh,
}

/// Which way to enter a kernel that offers more than one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootProtocol {
    /// PVH when an ELF kernel has the note, else Linux's.
    #[default]
    Auto,
    /// Linux's 64-bit entry point.
    Linux,
    /// PVH.
    Pvh,
}

/// Where and how the boot processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest physical address of the first instruction.
    pub address: u64,
    /// State that the kernel expects there.
    pub protocol: Protocol,
}

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// Where it starts.
    pub entry: Entry,
    /// First address after it.
    pub end: u64,
    /// The kernel has ACPI and finds devices by it; otherwise it is told on its command line.
    pub has_acpi: bool,
    setup_header: Option<setup_header>,
}

/// Why a kernel or an initrd could not be loaded: a sentence for the operator.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It could not be opened or read.
    #[error("cannot open {what} '{path}': {reason}; name another file", path = path.display())]
    Open {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Its path as given.
        path: PathBuf,
        /// What is wrong, in a few words.
        reason: String,
    },
    /// The file is no kernel.
    #[error("'{path}' is no kernel: {reason}", path = path.display())]
    Format {
        /// Its path as given.
        path: PathBuf,
        /// What it is, or what is missing, and what to do.
        reason: String,
    },
    /// PVH was asked for, and the kernel has no such entry.
    #[error("kernel '{path}' has no PVH entry point; build it with CONFIG_PVH, or leave the boot protocol out", path = path.display())]
    NoPvh {
        /// Its path as given.
        path: PathBuf,
    },
    /// Kernel and initrd need more memory.
    #[error("{what} '{path}' does not fit in {mib} MiB of guest memory; give the guest more", path = path.display())]
    TooLarge {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Its path as given.
        path: PathBuf,
        /// RAM in MiB.
        mib: u64,
    },
    /// Boot structures could not be written; the layout makes sure that they can.
    #[error("cannot write boot structures to guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Opens a regular file for reading. `what` is for the error.
fn open(path: &Path, what: &'static str) -> Result<File, KernelError> {
    let error = |reason: String| KernelError::Open { what, path: path.into(), reason };
    // Without waiting for the other end of what turns out to be a FIFO.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(|e| {
        error(match e.kind() {
            io::ErrorKind::NotFound => "no such file".into(),
            io::ErrorKind::PermissionDenied => "permission denied".into(),
            _ => e.to_string(),
        })
    })?;
    let meta = file.metadata().map_err(|e| error(e.to_string()))?;
    match meta.is_file() {
        true => Ok(file),
        false => Err(error("not a regular file".into())),
    }
}

/// What a file is, by its first bytes.
enum Format {
    Elf,
    BzImage,
}

/// Tells the format of a kernel image by its content.
fn detect(path: &Path, file: &mut File) -> Result<Format, KernelError> {
    let no = |reason: &str| KernelError::Format { path: path.into(), reason: reason.into() };
    let mut head = Vec::new();
    let read = file.rewind().and_then(|()| file.take(0x210).read_to_end(&mut head));
    read.map_err(|e| no(&e.to_string()))?;
    if head.starts_with(b"\x7fELF") {
        const CLASS64: u8 = 2;
        const X86_64: [u8; 2] = [62, 0];
        return match head.get(4) == Some(&CLASS64) && head.get(18..20) == Some(&X86_64) {
            true => Ok(Format::Elf),
            false => Err(no("it is an ELF file, but not for x86-64; build vmlinux for x86-64")),
        };
    }
    if head.get(0x202..0x206) == Some(b"HdrS") {
        return Ok(Format::BzImage);
    }
    let compressed = [(&b"\x1f\x8b"[..], "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zXZ", "xz")];
    match compressed.iter().find(|(magic, _)| head.starts_with(magic)) {
        Some((_, name)) => Err(no(&format!("it is {name} data; decompress it first"))),
        None => Err(no("it is neither an ELF vmlinux nor a bzImage")),
    }
}

/// Loads the kernel at `path` into guest memory.
pub fn load(mem: &GuestMemory, path: &Path, protocol: BootProtocol) -> Result<Kernel, KernelError> {
    let mut file = open(path, "kernel")?;
    let format = detect(path, &mut file)?;
    let too_large = || KernelError::TooLarge { what: "kernel", path: path.into(), mib: ram_mib(mem) };
    let start = Some(GuestAddress(layout::HIGH_RAM));
    let kernel = match format {
        Format::Elf => load_elf(mem, path, protocol, &mut file)?,
        Format::BzImage => {
            const XLF_KERNEL_64: u16 = 1;
            const ENTRY_64: u64 = 0x200;
            let loaded = BzImage::load(mem, None, &mut file, start).map_err(|e| load_error(e, path, mem))?;
            let header = loaded.setup_header.unwrap_or_default();
            if { header.xloadflags } & XLF_KERNEL_64 == 0 {
                let reason = "it has no 64-bit entry point; build it for x86-64".into();
                return Err(KernelError::Format { path: path.into(), reason });
            }
            if protocol == BootProtocol::Pvh {
                return Err(KernelError::NoPvh { path: path.into() });
            }
            // The kernel unpacks itself there and needs `init_size` bytes, which may be more than the file.
            let unpacked = { header.pref_address }.saturating_add({ header.init_size }.into());
            let entry = Entry { address: loaded.kernel_load.0 + ENTRY_64, protocol: Protocol::Linux };
            Kernel {
                entry,
                end: loaded.kernel_end.max(unpacked),
                // It is compressed, so nobody can tell; what distributions ship as bzImage has ACPI.
                has_acpi: true,
                setup_header: Some(header),
            }
        }
    };
    if kernel.end <= layout::HIGH_RAM {
        let reason = "it has nothing to load above 1 MiB; build vmlinux for x86-64".into();
        return Err(KernelError::Format { path: path.into(), reason });
    }
    match kernel.end <= low_ram_end(mem) {
        true => Ok(kernel),
        false => Err(too_large()),
    }
}

fn load_elf(
    mem: &GuestMemory,
    path: &Path,
    protocol: BootProtocol,
    file: &mut File,
) -> Result<Kernel, KernelError> {
    let start = Some(GuestAddress(layout::HIGH_RAM));
    check_elf(path, file)?;
    let loaded = Elf::load(mem, None, file, start).map_err(|e| load_error(e, path, mem))?;
    let linux = Entry { address: loaded.kernel_load.0, protocol: Protocol::Linux };
    let entry = match (protocol, loaded.pvh_boot_cap) {
        (BootProtocol::Auto | BootProtocol::Pvh, PvhBootCapability::PvhEntryPresent(address)) => {
            Entry { address: address.0, protocol: Protocol::Pvh }
        }
        (BootProtocol::Pvh, _) => return Err(KernelError::NoPvh { path: path.into() }),
        _ => linux,
    };
    let has_acpi = contains(mem, layout::HIGH_RAM..loaded.kernel_end, VIRTIO_MMIO_ACPI_ID);
    Ok(Kernel { entry, end: loaded.kernel_end, has_acpi, setup_header: None })
}

/// Bounds what the loader is going to read, by the program headers (ELF-64 Object File Format, figures 2 and 6): it
/// believes what they say.
fn check_elf(path: &Path, file: &File) -> Result<(), KernelError> {
    const MAX_SEGMENTS: usize = 64;
    const MAX_NOTES: u64 = 64 << 10;
    const PT_LOAD: u32 = 1;
    const PT_NOTE: u32 = 4;
    const SEGMENT: usize = 56;
    let no = |reason: &str| KernelError::Format { path: path.into(), reason: reason.into() };
    let damaged = || no("its program headers are damaged; build or copy it again");
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).map_err(|_| damaged())?;
    let offset = u64::from_le_bytes(std::array::from_fn(|i| header[0x20 + i]));
    let count = usize::from(u16::from_le_bytes([header[0x38], header[0x39]]));
    if count > MAX_SEGMENTS {
        return Err(damaged());
    }
    let mut segments = vec![0; count * SEGMENT];
    file.read_exact_at(&mut segments, offset).map_err(|_| damaged())?;
    let file_len = file.metadata().map_err(|e| no(&e.to_string()))?.len();
    let mut left = file_len;
    for segment in segments.chunks_exact(SEGMENT) {
        let kind = u32::from_le_bytes(std::array::from_fn(|i| segment[i]));
        let len = u64::from_le_bytes(std::array::from_fn(|i| segment[0x20 + i]));
        match kind {
            PT_LOAD => left = left.checked_sub(len).ok_or_else(damaged)?,
            PT_NOTE if len > MAX_NOTES => return Err(damaged()),
            _ => {}
        }
    }
    Ok(())
}

/// The ACPI ID of virtio-mmio devices. A kernel that has it built in was built with both.
const VIRTIO_MMIO_ACPI_ID: &[u8] = b"LNRO0005";

/// Whether `needle` is in the guest memory of `range`.
fn contains(mem: &GuestMemory, range: std::ops::Range<u64>, needle: &[u8]) -> bool {
    const CHUNK: usize = 128 << 10;
    let finder = memchr::memmem::Finder::new(needle);
    let mut buf = vec![0; CHUNK + needle.len()];
    let mut at = range.start;
    while at < range.end {
        let want = (range.end - at).min(buf.len() as u64) as usize;
        let Ok(n) = mem.read(&mut buf[..want], GuestAddress(at)) else { return false };
        if finder.find(&buf[..n]).is_some() {
            return true;
        }
        at += CHUNK as u64;
    }
    false
}

fn load_error(error: linux_loader::loader::Error, path: &Path, mem: &GuestMemory) -> KernelError {
    use linux_loader::loader::{Error, bzimage, elf};
    match error {
        Error::Elf(elf::Error::ReadKernelImage)
        | Error::Bzimage(bzimage::Error::ReadBzImageCompressedKernel)
        | Error::MemoryOverflow => {
            KernelError::TooLarge { what: "kernel", path: path.into(), mib: ram_mib(mem) }
        }
        other => KernelError::Format { path: path.into(), reason: other.to_string() },
    }
}

fn ram_mib(mem: &GuestMemory) -> u64 {
    mem.iter().map(vm_memory::GuestMemoryRegion::len).sum::<u64>() >> 20
}

/// First address after the RAM below the MMIO gap.
fn low_ram_end(mem: &GuestMemory) -> u64 {
    mem.iter().next().map_or(0, vm_memory::GuestMemoryRegion::len)
}

/// An initrd in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
}

/// Loads the initrd at `path` as high as the kernel allows, below the MMIO gap.
pub fn load_initrd(mem: &GuestMemory, path: &Path, kernel: &Kernel) -> Result<Initrd, KernelError> {
    /// Where initrds end for kernels that do not say (the boot protocol's value for old ones).
    const ADDR_MAX: u64 = 0x37ff_ffff;
    let (mut file, len) = open_initrd(path)?;
    let max = kernel.setup_header.map_or(ADDR_MAX, |h| { h.initrd_addr_max }.into());
    let end = low_ram_end(mem).min(max.saturating_add(1));
    let addr = end.checked_sub(len).map(|addr| addr & !0xfff).filter(|&addr| addr >= kernel.end);
    let Some(addr) = addr else {
        return Err(KernelError::TooLarge { what: "initrd", path: path.into(), mib: ram_mib(mem) });
    };
    mem.read_exact_volatile_from(GuestAddress(addr), &mut file, len as usize)
        .map_err(|e| initrd_error(path, e.to_string()))?;
    Ok(Initrd { addr, len })
}

/// Opens the initrd at `path`; also returns its length in bytes.
pub(crate) fn open_initrd(path: &Path) -> Result<(File, u64), KernelError> {
    let mut file = open(path, "initrd")?;
    let len = file.seek(SeekFrom::End(0)).and_then(|len| file.rewind().map(|()| len));
    match len.map_err(|e| initrd_error(path, e.to_string()))? {
        0 => Err(initrd_error(path, "the file is empty".into())),
        len => Ok((file, len)),
    }
}

fn initrd_error(path: &Path, reason: String) -> KernelError {
    KernelError::Open { what: "initrd", path: path.into(), reason }
}

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// The memory map that the guest is told: address, bytes and type of each range.
fn memory_map(mem: &GuestMemory) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::MP_TABLE, E820_RAM),
        (layout::MP_TABLE, layout::HIGH_RAM - layout::MP_TABLE, E820_RESERVED),
        (layout::HIGH_RAM, low_ram_end(mem) - layout::HIGH_RAM, E820_RAM),
        (layout::PCI_ECAM, ECAM_SIZE, E820_RESERVED),
    ];
    map.extend(mem.iter().skip(1).map(|region| {
        use vm_memory::GuestMemoryRegion;
        (region.start_addr().0, region.len(), E820_RAM)
    }));
    map
}

/// Writes the command line and what the protocol puts beside it.
pub fn write_parameters(
    mem: &GuestMemory,
    kernel: &Kernel,
    initrd: Option<Initrd>,
    cmdline: &str,
) -> Result<(), KernelError> {
    mem.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    mem.write_obj(0u8, GuestAddress(layout::CMDLINE + cmdline.len() as u64))?;
    match kernel.entry.protocol {
        Protocol::Linux => {
            let params = zero_page(mem, kernel, initrd, cmdline);
            mem.write_obj(params, GuestAddress(layout::ZERO_PAGE))?;
        }
        Protocol::Pvh => write_pvh(mem, initrd)?,
    }
    Ok(())
}

fn zero_page(mem: &GuestMemory, kernel: &Kernel, initrd: Option<Initrd>, cmdline: &str) -> boot_params {
    const BOOT_FLAG: u16 = 0xaa55;
    const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"
    const LOADER_OTHER: u8 = 0xff;
    const KERNEL_ALIGNMENT: u32 = 0x100_0000;
    let mut params = boot_params {
        hdr: kernel.setup_header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: KERNEL_ALIGNMENT,
            ..Default::default()
        }),
        acpi_rsdp_addr: layout::ACPI,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_OTHER;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.addr as u32;
        params.hdr.ramdisk_size = initrd.len as u32;
    }
    let map = memory_map(mem);
    params.e820_entries = map.len() as u8;
    for (entry, (addr, size, r#type)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr, size, r#type: r#type as _ };
    }
    params
}

fn write_pvh(mem: &GuestMemory, initrd: Option<Initrd>) -> Result<(), GuestMemoryError> {
    const MAGIC: u32 = 0x336e_c578;
    let map = memory_map(mem);
    for (i, &(addr, size, type_)) in map.iter().enumerate() {
        let at = layout::PVH_MEMMAP + (i * size_of::<hvm_memmap_table_entry>()) as u64;
        mem.write_obj(hvm_memmap_table_entry { addr, size, type_, reserved: 0 }, GuestAddress(at))?;
    }
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.addr, size: initrd.len, ..Default::default() };
        mem.write_obj(module, GuestAddress(layout::PVH_MODULES))?;
    }
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: layout::PVH_MODULES,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI,
        memmap_paddr: layout::PVH_MEMMAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    mem.write_obj(info, GuestAddress(layout::PVH_INFO))
}

/// Writes a table that the guest's kernel looks for at `addr`.
pub fn write_table(mem: &GuestMemory, addr: u64, table: &[u8]) -> Result<(), KernelError> {
    Ok(mem.write_slice(table, GuestAddress(addr))?)
}
