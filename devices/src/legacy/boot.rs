//! The boot port: how a guest's init says that user space runs and how its command ended, and how it learns that its
//! machine is a clone.
//!
//! Our own device, so that "booted" is one exit with a time stamp and not a text to look for on a console.
//!
//! | offset | read | write |
//! |--------|------|-------|
//! | 0 | how often the machine has gone on from a snapshot, modulo 255 | bit 0: user space runs; bit 1: the guest reads notes |
//! | 1 | 1 once somebody has pressed the power button since the guest said that it reads notes, else 0 | the exit status |
//! | 4 to 7 | the next bytes of the note, then zeros | anything: the note from its start, with the time of this moment |
//!
//! A port that nobody answers reads as 255, which is no count. The note is lines of `key=value`, each ended by a line
//! feed; keys that a reader does not know are not for it.

use std::sync::Arc;
use std::sync::{Mutex, MutexGuard};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::{answer, byte};
use crate::model::{BusDevice, MachineEvent, MachineEvents};
use crate::snapshot::{Saved, Snapshot, SnapshotError, State};

/// First I/O port.
pub const PORT: u16 = 0x610;
/// Number of ports.
pub const PORTS: u16 = 8;

/// Offset of the port of a guest's progress, and of its machine's generation.
const PROGRESS: u64 = 0;
/// Offset of the port at which a guest reports an exit status.
const EXIT_STATUS: u64 = 1;
/// Offset of the port that tells whether a press of the power button was meant as one.
const PRESSED: u64 = 1;
/// Offset of the port with the note.
const NOTE: u64 = 4;

/// Bit written to the progress port: init runs.
const USER_SPACE: u8 = 1;
/// Bit written to the progress port: the guest reads a note when the power button is pressed and the generation is another.
const READS_NOTES: u8 = 2;
/// Generations count up to this and begin again.
const GENERATIONS: u8 = 255;

/// The boot port.
pub struct BootPort {
    events: Arc<dyn MachineEvents>,
    state: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    saved: BootState,
    note: Option<Note>,
    /// The note as it is being read, and how much of it has been.
    text: Vec<u8>,
    read: usize,
}

/// What a snapshot keeps of the boot port. A note is for one clone, and is not kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct BootState {
    generation: u8,
    reads_notes: bool,
    #[serde(default)]
    pressed: bool,
}

impl State for BootState {
    const VERSION: u16 = 1;
}

/// What a clone is told of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Note {
    /// Lines for the guest.
    pub lines: String,
    /// Adds a line `time=`, the host's nanoseconds since 1970.
    pub time: bool,
}

impl Note {
    fn text(&self) -> Vec<u8> {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok().filter(|_| self.time);
        let time = since.map_or_else(String::new, |since| format!("time={}\n", since.as_nanos()));
        (time + &self.lines).into_bytes()
    }
}

impl BootPort {
    /// A boot port that tells `events`.
    pub fn new(events: Arc<dyn MachineEvents>) -> Self {
        Self { events, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Somebody presses the power button, to end the machine.
    pub fn press(&self) {
        self.lock().saved.pressed = true;
    }

    /// The machine goes on from a snapshot, with this for its guest to read. Returns whether the guest wants to be told by
    /// its power button.
    pub fn go_on(&self, note: Note) -> bool {
        let mut inner = self.lock();
        inner.saved.generation = (inner.saved.generation + 1) % GENERATIONS;
        (inner.note, inner.read) = (Some(note), 0);
        inner.text.clear();
        inner.saved.reads_notes
    }
}

impl BusDevice for BootPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut inner = self.lock();
        match offset {
            PROGRESS => answer(data, inner.saved.generation),
            PRESSED => answer(data, inner.saved.pressed.into()),
            NOTE => {
                let left = &inner.text[inner.read..];
                let count = left.len().min(data.len());
                data[..count].copy_from_slice(&left[..count]);
                inner.read += count;
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, byte(data)) {
            (PROGRESS, Some(bits)) if bits & !(USER_SPACE | READS_NOTES) == 0 => {
                if bits & READS_NOTES != 0 {
                    let saved = &mut self.lock().saved;
                    // Nobody has taken earlier presses.
                    (saved.reads_notes, saved.pressed) = (true, false);
                }
                if bits & USER_SPACE != 0 {
                    self.events.raise(MachineEvent::UserSpaceReached);
                }
            }
            (EXIT_STATUS, Some(status)) => self.events.raise(MachineEvent::ExitStatus(status)),
            (NOTE, _) => {
                let mut inner = self.lock();
                inner.text = inner.note.as_ref().map_or_else(Vec::new, Note::text);
                inner.read = 0;
            }
            _ => {}
        }
    }
}

impl Snapshot for BootPort {
    fn save(&self) -> Result<Saved, SnapshotError> {
        Saved::of(&self.lock().saved)
    }

    fn restore(&self, saved: &Saved) -> Result<(), SnapshotError> {
        let saved: BootState = saved.get()?;
        if saved.generation == GENERATIONS {
            return Err(SnapshotError::impossible("generation"));
        }
        self.lock().saved = saved;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ciborium::Value;

    use super::super::test_events::Raised;
    use super::*;

    #[test]
    fn init_reports_and_the_rest_is_silent() {
        let events = Raised::new();
        let port = BootPort::new(events.clone());
        for (offset, data) in
            [(0, &[0][..]), (0, &[2]), (0, &[5]), (0, &[1, 0]), (1, &[]), (1, &[1, 2]), (2, &[1]), (4, &[1])]
        {
            port.write(offset, data);
            assert_eq!(events.take(), [], "{offset} {data:?}");
        }
        port.write(0, &[1]);
        port.write(1, &[0]);
        port.write(1, &[255]);
        assert_eq!(
            events.take(),
            [MachineEvent::UserSpaceReached, MachineEvent::ExitStatus(0), MachineEvent::ExitStatus(255)]
        );
    }

    fn read<const N: usize>(port: &BootPort, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        port.read(offset, &mut data);
        data
    }

    fn note(port: &BootPort) -> String {
        port.write(NOTE, &[0]);
        let mut text = Vec::new();
        loop {
            match read::<4>(port, NOTE) {
                [0, 0, 0, 0] => break,
                word => text.extend(word.into_iter().filter(|byte| *byte != 0)),
            }
        }
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn a_clone_reads_its_note_as_often_as_it_likes_and_each_has_its_own() {
        let parent = BootPort::new(Raised::new());
        assert_eq!((read(&parent, PROGRESS), note(&parent)), ([0], String::new()));
        let clone = |of: &BootPort, name: &str| {
            let clone = BootPort::new(Raised::new());
            clone.restore(&of.save().unwrap()).unwrap();
            assert_eq!(clone.save(), of.save(), "it has not gone on yet");
            let wants = clone.go_on(Note { lines: format!("hostname={name}\n"), time: false });
            (clone, wants)
        };
        let (first, wants) = clone(&parent, "a");
        assert_eq!((read(&first, PROGRESS), wants), ([1], false));
        assert_eq!([note(&first), note(&first)], ["hostname=a\n"; 2]);
        first.write(PROGRESS, &[READS_NOTES]);
        let (second, wants) = clone(&first, "b");
        assert_eq!((read(&second, PROGRESS), wants), ([2], true));
        assert_eq!([note(&first), note(&second)], ["hostname=a\n", "hostname=b\n"]);
        assert_eq!(read(&second, NOTE), [0; 8], "nothing comes after its end");
    }

    #[test]
    fn a_press_that_announces_a_note_is_none_to_end_the_machine() {
        let parent = BootPort::new(Raised::new());
        parent.press();
        assert_eq!(read(&parent, PRESSED), [1]);
        parent.write(PROGRESS, &[USER_SPACE | READS_NOTES]);
        assert_eq!(read(&parent, PRESSED), [0], "nobody was there");
        let clone = BootPort::new(Raised::new());
        clone.restore(&parent.save().unwrap()).unwrap();
        assert!(clone.go_on(Note::default()));
        assert_eq!(read(&clone, PRESSED), [0]);
        clone.press();
        let second = BootPort::new(Raised::new());
        second.restore(&clone.save().unwrap()).unwrap();
        second.go_on(Note::default());
        assert_eq!(read(&second, PRESSED), [1], "it was saved while it was ending");
        // Of a program that kept no account of presses.
        let older = Value::Map(vec![("generation".into(), 1.into()), ("reads_notes".into(), true.into())]);
        second.restore(&Saved { version: 1, value: older }).unwrap();
        assert_eq!(read(&second, PRESSED), [0]);
    }

    #[test]
    fn the_generation_is_never_that_of_a_port_that_nobody_answers() {
        let port = BootPort::new(Raised::new());
        for count in 1..=600u32 {
            port.go_on(Note::default());
            assert_eq!(u32::from(read::<1>(&port, PROGRESS)[0]), count % 255);
        }
        let saved = Saved::of(&BootState { generation: 255, ..BootState::default() }).unwrap();
        assert!(port.restore(&saved).is_err());
    }

    #[test]
    fn the_time_is_that_of_the_moment_when_it_was_asked_for() {
        let port = BootPort::new(Raised::new());
        port.go_on(Note { lines: "mac=x\n".into(), time: true });
        let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
        let before = now();
        let text = note(&port);
        let (time, rest) = text.split_once('\n').unwrap();
        let time: u128 = time.strip_prefix("time=").unwrap().parse().unwrap();
        assert!((before..=now()).contains(&time), "{text}");
        assert_eq!(rest, "mac=x\n");
    }
}
