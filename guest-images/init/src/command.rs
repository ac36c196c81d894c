//! Starting the one command (or the shell) that the guest exists for.
#![allow(unsafe_code, reason = "a program is started from null-terminated arrays of strings")]

use core::ffi::CStr;
use core::ptr::null;

use rustix_core::fd::OwnedFd;
use rustix_core::fs::{Mode, OFlags, open};
use rustix_core::io::Errno;
use rustix_core::process::{Pid, chdir, getpid, ioctl_tiocsctty, setpgid, setsid};
use rustix_core::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix_core::termios::{Winsize, tcsetpgrp, tcsetwinsize};

use crate::mounts::read_file;
use crate::signals::Signals;
use crate::{say, sys};

/// The kernel passes at most 32 arguments and 32 variables (CONFIG_INIT_ENV_ARG_LIMIT) and panics on more.
const LIMIT: usize = 64;
/// Signal 22, as a set.
const SIGTTOU: u64 = 1 << 21;
const SHELL: [*const u8; 2] = [c"/bin/sh".as_ptr().cast(), c"-l".as_ptr().cast()];
const SEARCH_PATH: [&CStr; 6] =
    [c"/usr/local/sbin/", c"/usr/local/bin/", c"/usr/sbin/", c"/usr/bin/", c"/sbin/", c"/bin/"];
const PATH_VARIABLE: &CStr = c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const HOME_VARIABLE: &CStr = c"HOME=/root";
/// Exit statuses of a command that cannot be run, as shells give them.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;
/// The kernel's longest command line is 2048 bytes on x86.
const COMMAND_LINE_BYTES: usize = 4096;

/// The words after ` -- `, or a shell. The kernel has split and unquoted them into our arguments, but has put
/// words that it did not understand itself in front of them; /proc/cmdline tells how many are ours.
pub fn of_kernel_command_line(arguments: &[*const u8]) -> &[*const u8] {
    let mut buffer = [0; COMMAND_LINE_BYTES];
    let ours = words_after_dashes(read_file(c"/proc/cmdline", &mut buffer));
    let given = arguments.get(1..).unwrap_or_default();
    let words = &given[given.len().saturating_sub(ours)..];
    if words.is_empty() { &SHELL } else { words }
}

/// How many words follow the first ` -- ` of a kernel command line, split as the kernel does it: at blanks that
/// are not between double quotes.
fn words_after_dashes(line: &[u8]) -> usize {
    words(line).skip_while(|word| *word != b"--").skip(1).count()
}

fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut quoted = false;
    let split = line.split(move |byte| {
        quoted ^= *byte == b'"';
        !quoted && byte.is_ascii_whitespace()
    });
    split.filter(|word| !word.is_empty())
}

/// Starts `words` in the foreground of the console; returns its process id.
///
/// The console's session is led by process 1 itself, so that it outlives the command: the end of a session's
/// leader hangs its terminal up, and what the command has written but the line has not sent would be lost.
pub fn spawn<'a>(
    words: &[*const u8],
    environment: impl Iterator<Item = &'a CStr> + Clone,
    signals: Signals,
) -> Result<Pid, Errno> {
    let _ = setsid();
    // Process 1 stays in the background of its own session, where this signal keeps a process from waiting for
    // its output, and a child from taking the foreground.
    sys::block_signals(SIGTTOU);
    let console = open_console();
    if let Some(console) = &console {
        let _ = ioctl_tiocsctty(console);
        set_window_size(console, environment.clone());
    }
    if let Some(child) = sys::fork()? {
        return Ok(child);
    }
    if let Some(console) = console {
        take_foreground(&console);
        for standard in [dup2_stdin, dup2_stdout, dup2_stderr] {
            let _ = standard(&console);
        }
    }
    sys::unblock_signals(SIGTTOU);
    signals.unblock();
    // An image without /root: stay in /.
    let _ = chdir(c"/root");
    become_program(words, environment)
}

/// Makes this process a process group of its own, which gets what is typed on the console, Ctrl-C included.
fn take_foreground(console: &OwnedFd) {
    let _ = setpgid(None, None);
    let _ = tcsetpgrp(console, getpid());
}

/// The child's last act: becomes the program, or says why not and ends as a shell would.
fn become_program<'a>(words: &[*const u8], environment: impl Iterator<Item = &'a CStr>) -> ! {
    let mut arguments = [null(); LIMIT + 1];
    let count = words.len().min(LIMIT);
    arguments[..count].copy_from_slice(&words[..count]);
    let mut variables = [null(); LIMIT + 1];
    let inherited = environment.filter(|entry| !is_ours(entry)).chain([PATH_VARIABLE, HOME_VARIABLE]);
    for (slot, entry) in variables[..LIMIT].iter_mut().zip(inherited) {
        *slot = entry.as_ptr().cast();
    }
    // SAFETY: the kernel's arguments end in zero, and a command has at least one word.
    let name = unsafe { CStr::from_ptr(words[0].cast()) };
    let mut error = Errno::NOENT;
    let mut path = [0; 256];
    for directory in if name.to_bytes().contains(&b'/') { &[c""][..] } else { &SEARCH_PATH } {
        let Some(path) = join(directory, name, &mut path) else { continue };
        // SAFETY: all three are as exec wants them: `path` is a C string, and both arrays end in the null that
        // their last element has always been.
        let result = unsafe { sys::exec(path.as_ptr().cast(), arguments.as_ptr(), variables.as_ptr()) };
        if result != Errno::NOENT {
            error = result;
            break;
        }
    }
    say!("cannot run {name:?}: {error}");
    sys::exit(if error == Errno::NOENT { NOT_FOUND } else { NOT_EXECUTABLE })
}

fn is_ours(variable: &CStr) -> bool {
    variable.to_bytes().starts_with(b"PATH=") || variable.to_bytes().starts_with(b"HOME=")
}

fn join<'a>(directory: &CStr, name: &CStr, buffer: &'a mut [u8]) -> Option<&'a CStr> {
    let directory = directory.to_bytes();
    let name = name.to_bytes_with_nul();
    buffer.get_mut(..directory.len())?.copy_from_slice(directory);
    buffer.get_mut(directory.len()..directory.len() + name.len())?.copy_from_slice(name);
    CStr::from_bytes_until_nul(buffer).ok()
}

/// The terminal behind /dev/console, which itself cannot be a controlling terminal: the last of the kernel's list.
fn open_console() -> Option<OwnedFd> {
    let mut list = [0; 128];
    let name = words(read_file(c"/sys/class/tty/console/active", &mut list)).last()?;
    let mut path = [0; 64];
    path[..5].copy_from_slice(b"/dev/");
    path.get_mut(5..5 + name.len())?.copy_from_slice(name);
    open(CStr::from_bytes_until_nul(&path).ok()?, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).ok()
}

/// A serial line does not know how large the terminal at its other end is: `COLUMNS=` and `LINES=` on the kernel
/// command line say so (the kernel hands them over as environment).
fn set_window_size<'a>(console: &OwnedFd, environment: impl Iterator<Item = &'a CStr> + Clone) {
    let number = |name: &[u8]| {
        let value = environment.clone().find_map(|entry| entry.to_bytes().strip_prefix(name))?;
        str::from_utf8(value).ok()?.parse().ok()
    };
    if let (Some(ws_col), Some(ws_row)) = (number(b"COLUMNS="), number(b"LINES=")) {
        let _ = tcsetwinsize(console, Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted_as_the_kernel_splits_them() {
        assert_eq!(words_after_dashes(b"quiet root=/dev/vda"), 0);
        assert_eq!(words_after_dashes(b"quiet unknown -- sh -c \"echo a b\"  x=\"y z\"\n"), 4);
        assert_eq!(words_after_dashes(b"a=\"x -- y\" -- reboot -f"), 2);
        assert_eq!(words_after_dashes(b"quiet --"), 0);
    }

    #[test]
    fn a_name_is_looked_for_in_a_directory() {
        let mut buffer = [0; 12];
        assert_eq!(join(c"/bin/", c"ls", &mut buffer), Some(c"/bin/ls"));
        assert_eq!(join(c"/usr/bin/", c"much-too-long", &mut buffer), None);
    }
}
