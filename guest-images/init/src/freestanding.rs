//! What a program without libc has to bring along: the entry point, the four memory functions that the
//! compiler calls, and what happens on a panic.
#![allow(unsafe_code, reason = "entry point and memory functions, below anything safe")]

use core::arch::{asm, global_asm};
use core::ffi::CStr;
use core::panic::PanicInfo;

// The kernel starts a program with rsp at argc (System V ABI, AMD64 supplement, 3.4.1).
global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {start}",
    "ud2",
    start = sym start,
);

/// Splits the initial stack (argc, arguments, null, environment, null) and lives process 1's life.
unsafe extern "C" fn start(stack: *const usize) -> ! {
    // SAFETY: `stack` is the initial stack, which nobody changes: argc words of arguments follow argc.
    let arguments = unsafe { core::slice::from_raw_parts(stack.add(1).cast::<*const u8>(), *stack) };
    // SAFETY: the environment follows the arguments' null.
    let environment = unsafe { stack.add(1 + arguments.len() + 1) }.cast::<*const i8>();
    let environment = (0..)
        // SAFETY: nobody looks past the null, because take_while stops there.
        .map(move |index| unsafe { *environment.add(index) })
        .take_while(|entry| !entry.is_null())
        // SAFETY: the kernel's strings end in zero and stay for ever.
        .map(|entry| unsafe { CStr::from_ptr(entry) });
    if rustix_core::process::getpid() != rustix_core::process::Pid::INIT {
        crate::say!("this is the init of a guest and only runs as process 1");
        crate::sys::exit(1);
    }
    crate::run(arguments, environment)
}

/// A bug in this program: say where, and stop the machine.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    crate::say!("{info}");
    crate::machine::finish(crate::machine::PowerAction::Restart)
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise; the direction flag is clear (ABI).
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags))
    };
    to
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.cast_const() <= from {
        // SAFETY: copying upwards does not overwrite what is still to be read.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller's promise; downwards, and the direction flag is cleared again.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") count => _, inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _,
             inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _, options(nostack));
    }
    to
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise; the direction flag is clear (ABI).
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") byte as u8, options(nostack, preserves_flags))
    };
    to
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    for index in 0..count {
        // SAFETY: the caller's promise: both have `count` bytes. Volatile, lest the loop becomes a call of itself.
        let (left, right) = unsafe { (left.add(index).read_volatile(), right.add(index).read_volatile()) };
        if left != right {
            return i32::from(left) - i32::from(right);
        }
    }
    0
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(left, right, count) }
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut length = 0;
    // SAFETY: the caller's promise: there is a zero.
    while unsafe { text.add(length).read_volatile() } != 0 {
        length += 1;
    }
    length
}
