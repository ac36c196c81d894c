//! `registers`: two processes that keep values in vector registers while the kernel switches between them, and tell
//! whether they have kept them. Without AVX-512 or AVX, it is less that they look at.
#![allow(unsafe_code, reason = "only assembly keeps a value in a register for as long as one wants")]

use std::arch::asm;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// How often each process is to be put aside for the other.
const SWITCHES: u64 = 25;
/// Turns of the loop that holds the registers: some milliseconds.
const HOLD: u64 = 5_000_000;

fn main() -> Result<()> {
    match std::env::args().nth(1) {
        Some(seed) => keep(seed.parse()?),
        None => {
            let me = std::env::current_exe()?;
            let start = |seed: &str| Command::new(&me).arg(seed).spawn();
            let children = [start("1")?, start("2")?];
            for mut child in children {
                ensure!(child.wait()?.success(), "a process lost its registers");
            }
            println!("registers kept");
            Ok(())
        }
    }
}

fn keep(seed: u64) -> Result<()> {
    let value = [seed.wrapping_mul(0x0101_0101_0101_0101); 8];
    let hold = if is_x86_feature_detected!("avx512bw") {
        hold_avx512
    } else if is_x86_feature_detected!("avx") {
        hold_avx
    } else {
        hold_sse
    };
    while switches()? < SWITCHES {
        // SAFETY: the processor has the feature, and the function touches nothing but registers and its argument.
        let after = unsafe { hold(value) };
        ensure!(after == value, "{value:x?} became {after:x?}");
    }
    Ok(())
}

/// How often this process was put aside though it would have gone on.
fn switches() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("nonvoluntary_ctxt_switches:"));
    Ok(line.context("the kernel counts no context switches")?.trim().parse()?)
}

/// 512 bits, in a register that only AVX-512 has, and part of the value in a mask register.
#[target_feature(enable = "avx512f,avx512bw")]
fn hold_avx512(mut value: [u64; 8]) -> [u64; 8] {
    let mut mask = value[0];
    // SAFETY: reads and writes `value` only.
    unsafe {
        asm!(
            "vmovdqu64 zmm17, [{at}]", "kmovq k2, {mask}", "2: dec {turns}", "jnz 2b",
            "vmovdqu64 [{at}], zmm17", "kmovq {mask}, k2",
            at = in(reg) value.as_mut_ptr(), mask = inout(reg) mask, turns = inout(reg) HOLD => _,
            out("zmm17") _, out("k2") _, options(nostack)
        );
    }
    value[0] = mask;
    value
}

/// 256 bits, twice.
#[target_feature(enable = "avx")]
fn hold_avx(mut value: [u64; 8]) -> [u64; 8] {
    // SAFETY: reads and writes `value` only.
    unsafe {
        asm!(
            "vmovdqu ymm3, [{at}]", "vmovdqu ymm4, [{at} + 32]", "2: dec {turns}", "jnz 2b",
            "vmovdqu [{at}], ymm3", "vmovdqu [{at} + 32], ymm4",
            at = in(reg) value.as_mut_ptr(), turns = inout(reg) HOLD => _,
            out("ymm3") _, out("ymm4") _, options(nostack)
        );
    }
    value
}

/// 128 bits, which every processor has.
#[target_feature(enable = "sse2")]
fn hold_sse(mut value: [u64; 8]) -> [u64; 8] {
    // SAFETY: reads and writes `value` only.
    unsafe {
        asm!(
            "movdqu xmm3, [{at}]", "2: dec {turns}", "jnz 2b", "movdqu [{at}], xmm3",
            at = in(reg) value.as_mut_ptr(), turns = inout(reg) HOLD => _,
            out("xmm3") _, options(nostack)
        );
    }
    value
}
