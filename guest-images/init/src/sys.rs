//! System calls and instructions that have no safe wrapper; all that is unsafe about them stays here.
#![allow(unsafe_code, reason = "system calls without a safe wrapper, and port output")]

use core::arch::asm;
use core::marker::PhantomData;
use core::time::Duration;

use rustix_core::fd::{AsRawFd, BorrowedFd, OwnedFd};
use rustix_core::io::Errno;
use rustix_core::process::Pid;

// Numbers: arch/x86/entry/syscalls/syscall_64.tbl.
const RT_SIGPROCMASK: usize = 14;
const IOCTL: usize = 16;
const FORK: usize = 57;
const EXECVE: usize = 59;
const EXIT_GROUP: usize = 231;
const KILL: usize = 62;
const RT_SIGTIMEDWAIT: usize = 128;
const ADJTIMEX: usize = 159;
const IOPERM: usize = 173;
const CLOCK_SETTIME: usize = 227;
const CLOCK_GETTIME: usize = 228;

/// Clocks of include/uapi/linux/time.h.
const CLOCK_REALTIME: usize = 0;
const CLOCK_MONOTONIC: usize = 1;
/// Nanoseconds in a second.
const NANOS: u64 = 1_000_000_000;

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

/// Opens I/O ports for this process; false where the kernel does not let us (no ioperm, no privilege).
fn open_ports(first: u16, count: usize) -> bool {
    // SAFETY: ioperm takes numbers and only changes which ports this process may touch.
    unsafe { syscall(IOPERM, [first.into(), count, 1, 0]) }.is_ok()
}

/// Writes `value` to an I/O port, where the kernel lets us.
pub fn write_port(port: u16, value: u8) {
    if open_ports(port, 1) {
        // SAFETY: the port was opened above and belongs to the VMM (or to nothing); no memory is touched.
        unsafe {
            asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
        };
    }
}

/// A number that one port, or several in a row, can be read as.
pub trait PortValue: From<u8> {
    /// Reads it from a port that is open to this process and belongs to the VMM or to nothing.
    fn read(port: u16) -> Self;
}

impl PortValue for u8 {
    fn read(port: u16) -> Self {
        let value;
        // SAFETY: see the trait; no memory is touched.
        unsafe {
            asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
        };
        value
    }
}

impl PortValue for u32 {
    fn read(port: u16) -> Self {
        let value;
        // SAFETY: as above.
        unsafe {
            asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags))
        };
        value
    }
}

/// Reads an I/O port, where the kernel lets us.
pub fn read_port<T: PortValue>(port: u16) -> Option<T> {
    open_ports(port, size_of::<T>()).then(|| T::read(port))
}

/// A clock of the kernel's in nanoseconds.
fn clock(id: usize) -> u64 {
    let mut time = [0u64; 2];
    // SAFETY: the kernel writes two words; with a clock that there is, it cannot fail.
    let _ = unsafe { syscall(CLOCK_GETTIME, [id, &raw mut time as usize, 0, 0]) };
    time[0] * NANOS + time[1]
}

/// Nanoseconds since the machine was started.
pub fn monotonic_time() -> u64 {
    clock(CLOCK_MONOTONIC)
}

/// Nanoseconds since 1970.
pub fn wall_clock() -> u64 {
    clock(CLOCK_REALTIME)
}

/// Sets the wall clock to this many nanoseconds since 1970.
pub fn set_wall_clock(nanos: u64) -> Result<(), Errno> {
    let time = [nanos / NANOS, nanos % NANOS];
    // SAFETY: the kernel reads two words, which live through the call.
    unsafe { syscall(CLOCK_SETTIME, [CLOCK_REALTIME, &raw const time as usize, 0, 0]) }.map(drop)
}

/// `struct timex` (include/uapi/linux/timex.h), with what is not used of it in `rest`.
#[repr(C)]
struct Timex {
    modes: u32,
    /// Microseconds, with [`ADJ_OFFSET_SINGLESHOT`].
    offset: i64,
    rest: [u64; 24],
}

const _: () = assert!(size_of::<Timex>() == 208);

const ADJ_OFFSET_SINGLESHOT: u32 = 0x8001;

/// Takes these nanoseconds off the wall clock, half a millisecond in each second.
pub fn slow_wall_clock(nanos: u64) -> Result<(), Errno> {
    let offset = -i64::try_from(nanos / 1000).map_err(|_| Errno::INVAL)?;
    let mut timex = Timex { modes: ADJ_OFFSET_SINGLESHOT, offset, rest: [0; 24] };
    // SAFETY: the kernel reads and writes one `struct timex`, which lives through the call.
    unsafe { syscall(ADJTIMEX, [&raw mut timex as usize, 0, 0, 0]) }.map(drop)
}

/// A request to a device, whose argument is a `T`.
pub struct Control<T> {
    number: usize,
    argument: PhantomData<T>,
}

impl<T> Control<T> {
    const fn of(number: usize) -> Self {
        Self { number, argument: PhantomData }
    }
}

/// RNDADDENTROPY and RNDRESEEDCRNG (include/uapi/linux/random.h).
pub const ADD_ENTROPY: Control<Entropy> = Control::of(0x4008_5203);
pub const RESEED: Control<()> = Control::of(0x5207);
/// SIOCGIFNAME, SIOCSIFFLAGS, SIOCSIFHWADDR and SIOCGIFHWADDR (include/uapi/linux/sockios.h).
pub const INTERFACE_AT_INDEX: Control<InterfaceRequest> = Control::of(0x8910);
pub const SET_INTERFACE_FLAGS: Control<InterfaceRequest> = Control::of(0x8914);
pub const SET_HARDWARE_ADDRESS: Control<InterfaceRequest> = Control::of(0x8924);
pub const HARDWARE_ADDRESS: Control<InterfaceRequest> = Control::of(0x8927);

/// `struct rand_pool_info`, with what follows it.
#[repr(C)]
pub struct Entropy {
    pub bits: u32,
    pub bytes: u32,
    pub seed: [u8; 32],
}

/// `struct ifreq` with its union (include/uapi/linux/if.h).
#[repr(C, align(8))]
#[derive(Default)]
pub struct InterfaceRequest {
    pub name: [u8; 16],
    pub data: [u8; 24],
}

/// Makes a request to a device.
pub fn control<T>(file: &OwnedFd, request: &Control<T>, argument: &mut T) -> Result<(), Errno> {
    let pointer = &raw mut *argument as usize;
    // SAFETY: each request above reads and writes no more than its argument's type, which is plain bytes and lives
    // through the call.
    unsafe { syscall(IOCTL, [file.as_raw_fd() as usize, request.number, pointer, 0]) }.map(drop)
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
