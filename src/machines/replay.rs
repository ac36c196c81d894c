//! What was on a console, as it is shown on a terminal later: without what makes a terminal answer. The answer would be typed
//! into the shell of whoever reads a log.

use std::io::{self, Write};

/// Longest sequence that is kept until its end is seen; what is longer is left out.
const MAX: usize = 4096;

const ENQUIRY: u8 = 0x05;
const BELL: u8 = 0x07;
const ESCAPE: u8 = 0x1b;

/// Writes to `out` what does not make a terminal answer.
pub struct Replay<W> {
    out: W,
    /// The sequence that has begun.
    held: Vec<u8>,
    inside: Inside,
}

/// What has begun (ECMA-48 §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inside {
    Text,
    Escape,
    /// A control sequence.
    Control,
    /// A control string, whose end may have begun.
    String {
        ends: bool,
    },
}

impl<W: Write> Replay<W> {
    /// In front of `out`.
    pub fn to(out: W) -> Self {
        Self { out, held: Vec::new(), inside: Inside::Text }
    }

    fn take(&mut self, byte: u8, shown: &mut Vec<u8>) {
        if self.inside == Inside::Text && byte != ESCAPE {
            if byte != ENQUIRY {
                shown.push(byte);
            }
            return;
        }
        if self.inside == (Inside::String { ends: true }) && byte != b'\\' {
            // What was not ended is nothing.
            (self.held, self.inside) = (vec![ESCAPE], Inside::Escape);
        }
        if self.held.len() < MAX {
            self.held.push(byte);
        }
        self.inside = match (self.inside, byte) {
            (Inside::String { ends: false }, ESCAPE) => Inside::String { ends: true },
            (Inside::String { ends: true }, b'\\') | (Inside::String { .. }, BELL) => self.end(shown),
            (Inside::String { ends: false }, _) => Inside::String { ends: false },
            (Inside::Escape, b'[') => Inside::Control,
            (Inside::Escape, b']' | b'P' | b'X' | b'^' | b'_') => Inside::String { ends: false },
            (Inside::Control, 0x20..0x40) => Inside::Control,
            (_, ESCAPE) => {
                self.held = vec![ESCAPE];
                Inside::Escape
            }
            _ => self.end(shown),
        };
    }

    /// The sequence is whole.
    fn end(&mut self, shown: &mut Vec<u8>) -> Inside {
        if self.held.len() < MAX && !is_question(&self.held) {
            shown.extend(&self.held);
        }
        self.held.clear();
        Inside::Text
    }
}

/// Whether a terminal answers this sequence (ctlseqs of XTerm, and kitty's keyboard protocol).
fn is_question(sequence: &[u8]) -> bool {
    match sequence {
        // DECID, and strings that ask for settings; what else is in such strings is no text.
        [ESCAPE, b'Z' | b'P', ..] => true,
        [ESCAPE, b']', text @ ..] => text.contains(&b'?'),
        [ESCAPE, b'[', b'>', .., b'q'] | [ESCAPE, b'[', b'?', .., b'u' | b'S'] => true,
        [ESCAPE, b'[', .., b'$', b'p'] | [ESCAPE, b'[', .., b'*', b'y'] => true,
        [ESCAPE, b'[', .., b'c' | b'n' | b't' | b'x'] => true,
        _ => false,
    }
}

impl<W: Write> Write for Replay<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut shown = Vec::with_capacity(data.len());
        data.iter().for_each(|&byte| self.take(byte, &mut shown));
        self.out.write_all(&shown)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same, whatever pieces it comes in.
    fn shown(text: &str) -> String {
        let replay = |piece: usize| {
            let mut shown = Vec::new();
            let mut replay = Replay::to(&mut shown);
            text.as_bytes().chunks(piece).for_each(|part| replay.write_all(part).unwrap());
            String::from_utf8(shown).unwrap()
        };
        assert_eq!(replay(1), replay(MAX));
        replay(1)
    }

    #[test]
    fn questions_are_left_out() {
        for question in [
            "\x1b[6n",
            "\x1b[?6n",
            "\x1b[5n",
            "\x1b[c",
            "\x1b[0c",
            "\x1b[>c",
            "\x1b[18t",
            "\x1b[?2026$p",
            "\x1b[>0q",
            "\x1b[?u",
            "\x1bZ",
            "\x05",
            "\x1b]11;?\x07",
            "\x1b]4;1;?\x1b\\",
            "\x1bP+q544e\x1b\\",
            "\x1bP$qm\x1b\\",
            "\x1b[6\x1b[6n",
            "\x1b]11\x1b[6n",
        ] {
            assert_eq!(shown(&format!("a{question}b")), "ab", "{question:?}");
        }
    }

    #[test]
    fn text_and_colours_are_shown() {
        for text in [
            "ä\r\n\x08\x07",
            "\x1b[1;31mred\x1b[0m",
            "\x1b[2J\x1b[H",
            "\x1b[?25l",
            "\x1b]0;title\x07",
            "\x1b7\x1b8",
            "\x1b[u",
        ] {
            assert_eq!(shown(text), text, "{text:?}");
        }
        let endless = format!("\x1b]0;{}\x07after", "x".repeat(2 * MAX));
        assert_eq!(shown(&endless), "after");
    }
}
