//! Micro guests: a few hundred bytes of machine code that poke a device and report on the serial port.
//!
//! Every instruction here has the same encoding in 32-bit and in 64-bit mode, so one program can be entered by
//! PVH and by Linux's boot protocol, and it runs on a KVM that emulates privilege level 0 (no instruction is
//! used that such an emulator lacks).

use std::path::Path;

use anyhow::{Context, Result};

const COM1: u16 = 0x3f8;
/// Where a program is in memory.
pub const LOAD: u32 = 0x10_0000;

/// A program in the making.
#[derive(Clone, Debug, Default)]
pub struct Micro {
    code: Vec<u8>,
    linux_only: bool,
}

impl Micro {
    /// An empty program.
    pub fn new() -> Self {
        Self::default()
    }

    /// Leaves the PVH note out, so that the kernel is entered by Linux's 64-bit protocol.
    pub fn linux_entry(mut self) -> Self {
        self.linux_only = true;
        self
    }

    /// Machine code as it is.
    pub fn raw(mut self, code: &[u8]) -> Self {
        self.code.extend_from_slice(code);
        self
    }

    /// What follows is `offset` bytes behind the entry, which is at [`LOAD`].
    pub fn at(mut self, offset: usize) -> Self {
        assert!(self.code.len() <= offset, "{} bytes do not end before {offset}", self.code.len());
        self.code.resize(offset, 0x90); // nop
        self
    }

    fn port(self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high]) // mov dx, port
    }

    /// Writes a byte to a port.
    pub fn out8(self, port: u16, value: u8) -> Self {
        self.port(port).raw(&[0xb0, value, 0xee]) // mov al, value; out dx, al
    }

    /// Writes 32 bits to a port.
    pub fn out32(self, port: u16, value: u32) -> Self {
        self.port(port).eax(value).raw(&[0xef]) // out dx, eax
    }

    /// Reads a byte from a port and prints it.
    pub fn print_in8(self, port: u16) -> Self {
        self.port(port).raw(&[0xec]).print_al() // in al, dx
    }

    /// Loads EAX.
    pub fn eax(self, value: u32) -> Self {
        self.raw(&[0xb8]).raw(&value.to_le_bytes())
    }

    /// Writes 32 bits to a physical address.
    pub fn write32(self, addr: u32, value: u32) -> Self {
        // mov edi, addr; mov dword [edi], value
        self.raw(&[0xbf]).raw(&addr.to_le_bytes()).raw(&[0xc7, 0x07]).raw(&value.to_le_bytes())
    }

    /// Writes 64 bits to a physical address.
    pub fn write64(self, addr: u32, value: u64) -> Self {
        self.write32(addr, value as u32).write32(addr + 4, (value >> 32) as u32)
    }

    /// Writes 16 bits to a physical address.
    pub fn write16(self, addr: u32, value: u16) -> Self {
        self.raw(&[0xbf]).raw(&addr.to_le_bytes()).raw(&[0x66, 0xc7, 0x07]).raw(&value.to_le_bytes())
    }

    /// Reads 32 bits from a physical address and prints them, lowest byte first.
    pub fn print_read32(self, addr: u32) -> Self {
        self.raw(&[0xbe]).raw(&addr.to_le_bytes()).raw(&[0x8b, 0x06]).print_eax() // mov esi, addr; mov eax, [esi]
    }

    /// Reads a byte from a physical address and prints it.
    pub fn print_read8(self, addr: u32) -> Self {
        self.raw(&[0xbe]).raw(&addr.to_le_bytes()).raw(&[0x8a, 0x06]).print_al() // mov al, [esi]
    }

    /// Prints AL as it is.
    pub fn print_al(self) -> Self {
        self.port(COM1).raw(&[0xee])
    }

    /// Prints EAX, lowest byte first.
    pub fn print_eax(self) -> Self {
        (0..4).fold(self.port(COM1), |code, _| code.raw(&[0xee, 0xc1, 0xe8, 0x08])) // out dx, al; shr eax, 8
    }

    /// Prints text.
    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out8(COM1, byte))
    }

    /// Waits until the 16 bits at a physical address have this value.
    pub fn wait16(self, addr: u32, value: u16) -> Self {
        // mov esi, addr; again: cmp word [esi], value; jne again
        let value = value.to_le_bytes();
        self.raw(&[0xbe]).raw(&addr.to_le_bytes()).raw(&[0x66, 0x81, 0x3e, value[0], value[1], 0x75, 0xf9])
    }

    /// Asks the keyboard controller for a reset and waits for it.
    pub fn reset(self) -> Self {
        self.out8(0x64, 0xfe).raw(&[0xf4, 0xeb, 0xfd]) // again: hlt; jmp again
    }

    /// Causes a triple fault: the interrupt table is empty.
    pub fn triple_fault(self) -> Self {
        self.raw(&[0x0f, 0x0b]) // ud2
    }

    /// The program as an ELF kernel.
    pub fn elf(&self) -> Vec<u8> {
        const HEADER: usize = 64;
        const SEGMENT: usize = 56;
        const NOTE: &[u8] = b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0";
        let note_at = HEADER + 2 * SEGMENT;
        let code_at = 0x100;
        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
        elf.extend(u64::from(LOAD).to_le_bytes());
        elf.extend((HEADER as u64).to_le_bytes());
        elf.extend([0; 12]);
        let segments: u16 = if self.linux_only { 1 } else { 2 };
        for value in [HEADER as u16, SEGMENT as u16, segments, 0, 0, 0] {
            elf.extend(value.to_le_bytes());
        }
        let mut segment = |kind: u32, at: usize, load: u32, len: usize| {
            elf.extend(kind.to_le_bytes());
            elf.extend(7u32.to_le_bytes());
            for value in [at as u64, load.into(), load.into(), len as u64, len as u64, 4] {
                elf.extend(value.to_le_bytes());
            }
        };
        segment(1, code_at, LOAD, self.code.len());
        segment(4, note_at, 0, NOTE.len() + 4);
        elf.extend(NOTE);
        elf.extend(LOAD.to_le_bytes());
        elf.resize(code_at, 0);
        elf.extend(&self.code);
        elf
    }

    /// Writes the ELF kernel to a file.
    pub fn write(&self, path: &Path) -> Result<()> {
        std::fs::write(path, self.elf()).with_context(|| format!("cannot write {}", path.display()))
    }
}
