//! Lines on the console: process 1's only way to say something to people.

use core::fmt::{self, Write};

use crate::sys;

/// Prints one line, `vmm-init: ` in front.
#[macro_export]
macro_rules! say {
    ($($part:tt)*) => { $crate::console::line(format_args!($($part)*)) };
}

/// Longer lines are cut.
const LONGEST: usize = 200;

struct Line {
    bytes: [u8; LONGEST + 1],
    used: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let text = &text.as_bytes()[..text.len().min(LONGEST - self.used)];
        self.bytes[self.used..self.used + text.len()].copy_from_slice(text);
        self.used += text.len();
        Ok(())
    }
}

/// Prints one line in one system call, so that lines of other processes do not get into it.
pub fn line(text: fmt::Arguments<'_>) {
    let mut line = Line { bytes: [0; LONGEST + 1], used: 0 };
    // `Line` never fails.
    let _ = write!(line, "vmm-init: {text}");
    line.bytes[line.used] = b'\n';
    sys::write_console(&line.bytes[..=line.used]);
}
