//! The terminal: raw while a guest owns it, and as it was before on every way out.
//!
//! There is one terminal a process, so its state is one static: the panic hook and the signal thread must be
//! able to restore it whatever else happens.

use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, Once};

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr};

/// The terminal at standard input.
struct State {
    /// A guest owns it: it may be made raw.
    owned: bool,
    /// What it was like before it became raw; `None` while it is not.
    before: Option<Termios>,
}

static STATE: Mutex<State> = Mutex::new(State { owned: false, before: None });

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(|e| e.into_inner())
}

/// Standard input as a terminal that a guest owns.
///
/// Dropping it restores the terminal for good, and a panic on any thread restores it.
pub struct Terminal(());

impl Terminal {
    /// Standard input, if it is a terminal. Becomes raw if this process is in the foreground.
    pub fn take() -> Option<Self> {
        static HOOK: Once = Once::new();
        if !isatty(stdin()) {
            return None;
        }
        HOOK.call_once(|| {
            let next = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                next(info);
            }));
        });
        state().owned = true;
        make_raw();
        Some(Self(()))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        release();
    }
}

/// Gives the terminal back as it was, for good.
pub fn release() {
    state().owned = false;
    restore();
}

/// Columns and lines of the terminal at standard input, if it is one that knows.
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(stdin()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Whether this process may read the terminal; `None` if the terminal is gone.
pub fn in_foreground() -> Option<bool> {
    tcgetpgrp(stdin()).ok().map(|group| group == rustix::process::getpgrp())
}

/// Makes a guest's terminal raw, unless it is already, or belongs to another process at the moment.
pub fn make_raw() {
    let mut state = state();
    if !state.owned || state.before.is_some() || in_foreground() != Some(true) {
        return;
    }
    let Ok(now) = tcgetattr(stdin()) else { return };
    let mut raw = now.clone();
    raw.make_raw();
    // A terminal that cannot be made raw still passes lines on.
    if tcsetattr(stdin(), OptionalActions::Now, &raw).is_ok() {
        state.before = Some(now);
    }
}

/// Gives the terminal back as it was, until the next [`make_raw`]. Does nothing if it is not raw.
pub fn restore() {
    if let Some(before) = state().before.take() {
        // It fails when the terminal is gone.
        _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}

/// Whether what is written to `output` may have colours: it is a terminal, and nobody has said NO_COLOR.
pub fn shows_colours(output: &impl io::IsTerminal) -> bool {
    output.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Standard error, unbuffered; on a raw terminal a line break returns to the left margin too.
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if state().before.is_none() {
            return io::stderr().write(data);
        }
        let mut lines = Vec::with_capacity(data.len() + 8);
        for &byte in data {
            lines.extend_from_slice(if byte == b'\n' { b"\r\n" } else { std::slice::from_ref(&byte) });
        }
        io::stderr().write_all(&lines).map(|()| data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What Ctrl-A h shows.
pub const KEYS_HELP: &str = "\n\
    vmm: Ctrl-A x       stops the guest\n\
    vmm: Ctrl-A h       shows this\n\
    vmm: Ctrl-A Ctrl-A  sends Ctrl-A to the guest\n";

/// What the operator wants of the command, and not of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyCommand {
    /// Stop the guest.
    Stop,
    /// Show the keys.
    Help,
    /// Leave a machine that goes on.
    Detach,
}

/// Finds the command's own keys in what is typed.
#[derive(Debug, Default)]
pub struct Keys {
    /// The last byte was a Ctrl-A, which is held back.
    after_prefix: bool,
    /// There is a machine that can be left, but not stopped like this.
    attached: bool,
}

const CTRL_A: u8 = 1;

impl Keys {
    /// Keys for a machine that runs elsewhere.
    pub fn attached() -> Self {
        Self { attached: true, ..Self::default() }
    }

    /// Takes bytes off the front of `typed` up to and with the first command. The guest's go to `guest`.
    pub fn next_command(&mut self, typed: &mut &[u8], guest: &mut Vec<u8>) -> Option<KeyCommand> {
        while let Some((&byte, rest)) = typed.split_first() {
            *typed = rest;
            if !std::mem::take(&mut self.after_prefix) {
                match byte {
                    CTRL_A => self.after_prefix = true,
                    byte => guest.push(byte),
                }
                continue;
            }
            match byte {
                b'x' | b'X' if !self.attached => return Some(KeyCommand::Stop),
                b'h' | b'H' | b'?' => return Some(KeyCommand::Help),
                b'd' | b'D' if self.attached => return Some(KeyCommand::Detach),
                CTRL_A => guest.push(CTRL_A),
                // Not ours, so it was meant for the guest: Ctrl-A goes to the start of a line in every shell.
                byte => guest.extend([CTRL_A, byte]),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `typed` in pieces of `size` bytes; returns the guest's bytes and the commands.
    fn feed(typed: &[u8], size: usize) -> (Vec<u8>, Vec<KeyCommand>) {
        let (mut keys, mut guest, mut commands) = (Keys::default(), Vec::new(), Vec::new());
        for mut piece in typed.chunks(size) {
            while let Some(command) = keys.next_command(&mut piece, &mut guest) {
                commands.push(command);
            }
            assert!(piece.is_empty());
        }
        (guest, commands)
    }

    #[test]
    fn keys_are_found_wherever_reads_end() {
        use KeyCommand::{Help, Stop};
        let cases: &[(&[u8], &[u8], &[KeyCommand])] = &[
            (b"ls\r", b"ls\r", &[]),
            (b"\x01x", b"", &[Stop]),
            (b"a\x01hb", b"ab", &[Help]),
            (b"\x01d", b"\x01d", &[]),
            (b"\x01\x01", b"\x01", &[]),
            (b"\x01\x01x", b"\x01x", &[]),
            (b"\x01\x01\x01x", b"\x01", &[Stop]),
            (b"\x01l\x01h\x01x", b"\x01l", &[Help, Stop]),
            (b"\x00\xff\x03", b"\x00\xff\x03", &[]),
            (b"held\x01", b"held", &[]),
        ];
        for (typed, guest, commands) in cases {
            for size in 1..=4 {
                assert_eq!(feed(typed, size), (guest.to_vec(), commands.to_vec()), "{typed:?} by {size}");
            }
        }
    }

    #[test]
    fn who_is_attached_can_leave_and_not_stop() {
        let (mut keys, mut guest) = (Keys::attached(), Vec::new());
        let mut typed = &b"a\x01xb\x01dc"[..];
        assert_eq!(keys.next_command(&mut typed, &mut guest), Some(KeyCommand::Detach));
        assert_eq!((&guest[..], typed), (&b"a\x01xb"[..], &b"c"[..]));
    }

    /// Set for the run of this test that panics, on a terminal of its own.
    const PANICS: &str = "VMM_TEST_PANICS";

    #[test]
    fn a_panic_restores_the_terminal() {
        use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
        use rustix::termios::LocalModes;
        use std::process::{Command, Stdio};

        let is_raw = |modes: LocalModes| !modes.intersects(LocalModes::ICANON | LocalModes::ECHO);
        if std::env::var_os(PANICS).is_some() {
            // Forgotten, so that only the hook is left to restore it.
            std::mem::forget(Terminal::take().expect("a terminal"));
            assert!(!is_raw(tcgetattr(stdin()).unwrap().local_modes), "it is raw, and this panics");
            return;
        }
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait"]).arg(std::env::current_exe().unwrap());
        command.args(["--exact", "terminal::tests::a_panic_restores_the_terminal"]).env(PANICS, "1");
        let output = command.stdin(Stdio::from(slave.try_clone().unwrap())).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success() && said.contains("it is raw, and this panics"), "{output:?}");
        assert!(!is_raw(tcgetattr(&slave).unwrap().local_modes));
    }
}
