//! System calls and instructions that have no safe wrapper; all that is unsafe about them stays here.
#![allow(unsafe_code, reason = "system calls without a safe wrapper, and port output")]

use core::arch::asm;
use core::time::Duration;

use rustix_core::fd::BorrowedFd;
use rustix_core::io::Errno;
use rustix_core::process::Pid;

// Numbers: arch/x86/entry/syscalls/syscall_64.tbl.
const RT_SIGPROCMASK: usize = 14;
const FORK: usize = 57;
const EXECVE: usize = 59;
const EXIT_GROUP: usize = 231;
const KILL: usize = 62;
const RT_SIGTIMEDWAIT: usize = 128;
const IOPERM: usize = 173;

const SIG_BLOCK: usize = 0;
const SIG_UNBLOCK: usize = 1;
/// The kernel's signal sets are one 64-bit word.
const SIGSET_BYTES: usize = size_of::<u64>();

/// A system call with up to four arguments.
///
/// # Safety
/// What the arguments point to must be what the call expects, for as long as it runs.
unsafe fn syscall(number: usize, arguments: [usize; 4]) -> Result<usize, Errno> {
    let result: isize;
    let [first, second, third, fourth] = arguments;
    // SAFETY: the kernel clobbers rax, rcx and r11 only; the caller answers for the arguments.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") first, in("rsi") second, in("rdx") third,
             in("r10") fourth, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    match usize::try_from(result) {
        Ok(value) => Ok(value),
        // An error number is between 1 and 4095.
        Err(_) => Err(Errno::from_raw_os_error(result.wrapping_neg() as i32)),
    }
}

/// Standard output, which the kernel opens on the console for process 1.
fn console() -> BorrowedFd<'static> {
    // SAFETY: nothing in this program closes descriptor 1.
    unsafe { BorrowedFd::borrow_raw(1) }
}

/// Writes to the console. One that takes no output leaves nobody to tell.
pub fn write_console(line: &[u8]) {
    let _ = rustix_core::io::write(console(), line);
}

/// Waits until the console has sent what was written to it.
pub fn drain_console() {
    let _ = rustix_core::termios::tcdrain(console());
}

/// Writes `value` to an I/O port; does nothing where the kernel does not let us (no ioperm, no privilege).
pub fn write_port(port: u16, value: u8) {
    // SAFETY: ioperm takes numbers and only changes which ports this process may touch.
    if unsafe { syscall(IOPERM, [port.into(), 1, 1, 0]) }.is_err() {
        return;
    }
    // SAFETY: the port was opened above and belongs to the VMM (or to nothing); no memory is touched.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Blocks a set of signals (bit n-1 stands for signal n).
pub fn block_signals(set: u64) {
    // SAFETY: the set lives through the call; the old one is not asked for. Cannot fail with these arguments.
    let _ = unsafe { syscall(RT_SIGPROCMASK, [SIG_BLOCK, &raw const set as usize, 0, SIGSET_BYTES]) };
}

/// Unblocks a set of signals.
pub fn unblock_signals(set: u64) {
    // SAFETY: as above.
    let _ = unsafe { syscall(RT_SIGPROCMASK, [SIG_UNBLOCK, &raw const set as usize, 0, SIGSET_BYTES]) };
}

/// Waits for one of a set of blocked signals, for ever without `timeout`.
pub fn wait_for_signal(set: u64, timeout: Option<Duration>) -> Result<usize, Errno> {
    let timeout = timeout.map(|time| [time.as_secs(), u64::from(time.subsec_nanos())]);
    let pointer = timeout.as_ref().map_or(0, |timespec| timespec.as_ptr() as usize);
    // SAFETY: set and timespec (two 64-bit words) live through the call; no siginfo is asked for.
    unsafe { syscall(RT_SIGTIMEDWAIT, [&raw const set as usize, 0, pointer, SIGSET_BYTES]) }
}

/// Signals every process but this one; false when there is none. Only process 1 may call this.
pub fn signal_everyone(signal: usize) -> bool {
    // SAFETY: kill takes two numbers.
    unsafe { syscall(KILL, [usize::MAX, signal, 0, 0]) }.is_ok()
}

/// Forks; `None` in the child, whose memory is its own copy.
pub fn fork() -> Result<Option<Pid>, Errno> {
    // SAFETY: there is one thread, and no lock or buffer that a copy would share.
    let pid = unsafe { syscall(FORK, [0; 4]) }?;
    Ok(Pid::from_raw(pid as i32))
}

/// Becomes another program; returns only when that fails.
///
/// # Safety
/// `path` must be a string ending in zero, `arguments` and `environment` arrays of such strings ending in null.
pub unsafe fn exec(path: *const u8, arguments: *const *const u8, environment: *const *const u8) -> Errno {
    // SAFETY: the caller's promise is all that execve asks for.
    match unsafe { syscall(EXECVE, [path as usize, arguments as usize, environment as usize, 0]) } {
        Ok(_) => Errno::INVAL,
        Err(error) => error,
    }
}

/// Ends this process.
pub fn exit(status: u8) -> ! {
    loop {
        // SAFETY: exit_group takes a number and does not return.
        let _ = unsafe { syscall(EXIT_GROUP, [status.into(), 0, 0, 0]) };
    }
}
