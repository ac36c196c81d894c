//! Memory at known guest physical addresses, and registers: what a driver in user space stands on.
#![allow(unsafe_code, reason = "mapped registers, and memory that a device writes")]

use std::arch::asm;
use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::mm::{MapFlags, MlockFlags, ProtFlags, mlock_with, mmap, mmap_anonymous};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Pages for rings and buffers. Each has its own physical address: they need not be adjacent for the device.
pub struct Pages {
    at: *mut u8,
    physical: Vec<u64>,
}

impl Pages {
    /// Takes `count` pages from Linux, for ever.
    pub fn take(count: usize) -> Result<Self> {
        let bytes = count * PAGE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        }
        .context("memory for rings and buffers")?
        .cast::<u8>();
        // SAFETY: the mapping above.
        unsafe {
            at.write_bytes(1, bytes);
            mlock_with(at.cast(), bytes, MlockFlags::empty()).context("lock memory")?;
        }
        let pagemap = File::open("/proc/self/pagemap").context("/proc/self/pagemap")?;
        let physical = (0..count).map(|page| {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, (at as u64 / PAGE as u64 + page as u64) * 8)?;
            let entry = u64::from_le_bytes(entry);
            let frame = entry & ((1 << 55) - 1);
            ensure!(entry >> 63 == 1 && frame != 0, "Linux does not say where page {page} is");
            Ok(frame * PAGE as u64)
        });
        Ok(Self { at, physical: physical.collect::<Result<_>>()? })
    }

    /// Number of pages.
    pub fn count(&self) -> usize {
        self.physical.len()
    }

    /// Guest physical address of `page`.
    pub fn physical(&self, page: usize) -> u64 {
        self.physical[page]
    }

    fn pointer(&self, page: usize, offset: usize, len: usize) -> *mut u8 {
        assert!(page < self.physical.len() && offset + len <= PAGE, "page {page} offset {offset} + {len}");
        // SAFETY: within the mapping, as was checked.
        unsafe { self.at.add(page * PAGE + offset) }
    }

    /// Writes `bytes` at `offset` in `page`.
    pub fn write(&self, page: usize, offset: usize, bytes: &[u8]) {
        let to = self.pointer(page, offset, bytes.len());
        for (i, &byte) in bytes.iter().enumerate() {
            // SAFETY: `pointer` checked the range; volatile because the device looks at it.
            unsafe { to.add(i).write_volatile(byte) };
        }
    }

    /// Writes the whole page with `byte`.
    pub fn fill(&self, page: usize, byte: u8) {
        self.write(page, 0, &[byte; PAGE]);
    }

    /// Reads `len` bytes at `offset` in `page`.
    pub fn read(&self, page: usize, offset: usize, len: usize) -> Vec<u8> {
        let from = self.pointer(page, offset, len);
        // SAFETY: `pointer` checked the range; volatile because the device changes it.
        (0..len).map(|i| unsafe { from.add(i).read_volatile() }).collect()
    }

    /// A 16 bit number of a ring, which the device writes in one piece.
    pub fn u16(&self, page: usize, offset: usize) -> u16 {
        let from = self.pointer(page, offset, 2).cast::<u16>();
        assert!(from.is_aligned(), "rings are aligned");
        // SAFETY: `pointer` checked the range, and the alignment was checked.
        u16::from_le(unsafe { from.read_volatile() })
    }
}

/// Device registers.
pub struct Mapping {
    at: *mut u8,
    len: usize,
}

impl Mapping {
    /// Maps `len` bytes at `offset` of `file`: physical memory, or a BAR.
    pub fn of(file: &Path, offset: u64, len: usize) -> Result<Self> {
        let device = OpenOptions::new().read(true).write(true).open(file);
        let device = device.with_context(|| file.display().to_string())?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe {
            mmap(std::ptr::null_mut::<c_void>(), len, protection, MapFlags::SHARED, &device, offset)
        }
        .with_context(|| format!("map {len:#x} bytes of {} at {offset:#x}", file.display()))?;
        Ok(Self { at: at.cast(), len })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    fn pointer(&self, offset: usize, width: usize) -> *mut u8 {
        assert!(offset + width <= self.len, "register {offset:#x}");
        // SAFETY: within the mapping, as was checked.
        unsafe { self.at.add(offset) }
    }

    /// Reads 1, 2, 4 or 8 bytes by one instruction, aligned or not.
    pub fn read(&self, offset: usize, width: usize) -> u64 {
        let from = self.pointer(offset, width);
        let value: u64;
        // SAFETY: `pointer` checked the range. What is read there are registers, not memory of this program.
        unsafe {
            match width {
                1 => asm!("movzx {0:e}, byte ptr [{1}]", out(reg) value, in(reg) from, options(nostack)),
                2 => asm!("movzx {0:e}, word ptr [{1}]", out(reg) value, in(reg) from, options(nostack)),
                4 => asm!("mov {0:e}, dword ptr [{1}]", out(reg) value, in(reg) from, options(nostack)),
                8 => asm!("mov {0}, qword ptr [{1}]", out(reg) value, in(reg) from, options(nostack)),
                _ => unreachable!("widths of one instruction"),
            }
        }
        value
    }

    /// Writes 1, 2, 4 or 8 bytes by one instruction, aligned or not.
    pub fn write(&self, offset: usize, width: usize, value: u64) {
        let to = self.pointer(offset, width);
        // SAFETY: `pointer` checked the range. What is written there are registers, not memory of this program; what a
        // device does then is what this program is for.
        unsafe {
            match width {
                1 => asm!("mov byte ptr [{0}], {1}", in(reg) to, in(reg_byte) value as u8, options(nostack)),
                2 => asm!("mov word ptr [{0}], {1:x}", in(reg) to, in(reg) value, options(nostack)),
                4 => asm!("mov dword ptr [{0}], {1:e}", in(reg) to, in(reg) value, options(nostack)),
                8 => asm!("mov qword ptr [{0}], {1}", in(reg) to, in(reg) value, options(nostack)),
                _ => unreachable!("widths of one instruction"),
            }
        }
    }
}
