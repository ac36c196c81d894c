//! How long a machine takes that does nothing: process start, first instruction of the guest, process end.

use anyhow::Result;
use harness::binaries;
use harness::micro::Micro;

use super::measure::{Subject, interleave};
use super::qemu;
use super::table::Table;

/// A firmware of 64 KiB whose first instructions end QEMU through its debug exit device: its microvm has no keyboard
/// controller, and its own firmware would only make it slower.
fn firmware() -> Vec<u8> {
    // At the reset vector, in real mode: mov al, 0; out 0xf4, al; hlt; jmp $-1
    const CODE: [u8; 7] = [0xb0, 0, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd];
    const SIZE: usize = 64 << 10;
    const RESET_VECTOR: usize = SIZE - 16;
    let mut bytes = vec![0; SIZE];
    bytes[RESET_VECTOR..RESET_VECTOR + CODE.len()].copy_from_slice(&CODE);
    bytes
}

/// Measures `runs` starts of each program.
pub fn run(runs: usize) -> Result<Table> {
    let dir = tempfile::tempdir()?;
    let (kernel, bios) = (dir.path().join("micro.elf"), dir.path().join("micro.bin"));
    Micro::new().reset().write(&kernel)?;
    std::fs::write(&bios, firmware())?;
    let vmm = binaries::release()?.display().to_string();
    let subjects = [
        Subject::new(
            "vmm",
            &vmm,
            &format!("run --memory 128M --no-rootfs --no-rng --no-balloon -q --kernel {}", kernel.display()),
        ),
        // The device ends QEMU with status 2 * value + 1.
        qemu::microvm(
            "QEMU microvm",
            false,
            "",
            &format!("-device isa-debug-exit,iobase=0xf4 -bios {}", bios.display()),
        )?
        .ending_with(1),
        Subject::new("vmm --version (no guest)", &vmm, "--version"),
    ];
    let costs = interleave(&subjects, runs)?;
    let title =
        format!("start: process start, first instruction, process end; 1 vCPU, 128 MiB, medians of {runs}");
    let mut table = Table::of_processes(title, &subjects, &costs);
    table.notes.push(
        "vmm loads an ELF kernel of a few bytes, QEMU runs as few as its firmware; both end with their first write to a port".into(),
    );
    Ok(table)
}
