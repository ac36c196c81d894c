//! The state file: named, versioned sections with a checksum each.
//!
//! All numbers are little-endian. After `MAGIC` and `FORMAT` follow sections: length of the name (u16), version
//! (u16), length of the data (u32), name, data, and the CRC-32 of all of these. The data is CBOR. A section named
//! `END`, without data, is the last: a file that is cut off lacks it.

use ciborium::Value;
use devices::snapshot::{Saved, SnapshotError};

/// First bytes of the file.
const MAGIC: [u8; 8] = *b"vmmstate";
/// Version of the form of the file; sections have versions of their own.
const FORMAT: u32 = 1;
/// Name of the last section.
const END: &str = "end";

/// Most bytes of a state file, but for texts. The largest real ones, of machines with 32 vCPUs and devices, have less than
/// 1 MiB. A value of one byte takes some 32 of them in memory, so that this bounds what a hostile file can take.
pub const MAX_BYTES: usize = 8 << 20;
/// Most sections.
const MAX_SECTIONS: usize = 1024;
/// How deep values may be nested: far more than any state is, and far less than a stack is.
const MAX_DEPTH: usize = 64;

/// A section of the state file.
#[derive(Clone, Debug, PartialEq)]
pub struct Section {
    /// Name of the part of the machine: `vcpu0`, `irqchip`, `device/disk0`.
    pub name: String,
    /// Its state.
    pub saved: Saved,
}

/// The sections of a state, in the order of the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sections(Vec<Section>);

impl Sections {
    /// Adds a section.
    pub fn push(&mut self, name: impl Into<String>, saved: Saved) {
        self.0.push(Section { name: name.into(), saved });
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Section> {
        self.0.iter()
    }

    /// The section of this name.
    pub fn get(&self, name: &str) -> Result<&Saved, SectionError> {
        let found = self.0.iter().find(|section| section.name == name);
        found.map(|section| &section.saved).ok_or_else(|| SectionError::Missing { name: name.into() })
    }

    /// Takes the section of this name out.
    pub(crate) fn take(&mut self, name: &str) -> Result<Saved, SectionError> {
        let found = self.0.iter().position(|section| section.name == name);
        let at = found.ok_or_else(|| SectionError::Missing { name: name.into() })?;
        Ok(self.0.remove(at).saved)
    }

    /// The state in the section of this name.
    pub fn state<S: devices::snapshot::State>(&self, name: &str) -> Result<S, SectionError> {
        self.get(name)?.get().map_err(SectionError::of(name))
    }

    /// As [`Self::state`], for one whose byte strings are structures of the hypervisor: none may be shorter or longer than its
    /// structure, which a reader would fill up or cut.
    pub fn whole_state<S: devices::snapshot::State>(&self, name: &str) -> Result<S, SectionError> {
        let (saved, state) = (self.get(name)?, self.state(name)?);
        let again = Saved::of(&state).map_err(SectionError::of(name))?;
        match same_lengths(&saved.value, &again.value) {
            true => Ok(state),
            false => Err(SectionError::of(name)(SnapshotError::impossible("length of a structure"))),
        }
    }

    /// The file's bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, SectionError> {
        let mut bytes = [&MAGIC[..], &FORMAT.to_le_bytes()].concat();
        for Section { name, saved } in &self.0 {
            let mut data = Vec::new();
            ciborium::into_writer(&saved.value, &mut data)
                .map_err(|error| SectionError::of(name)(SnapshotError::Malformed(error.to_string())))?;
            put(&mut bytes, name, saved.version, &data);
        }
        put(&mut bytes, END, 0, &[]);
        Ok(bytes)
    }

    /// Reads a file's bytes, which may be anything.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SectionError> {
        let mut input = Input(bytes);
        if input.array()? != MAGIC {
            return Err(SectionError::Foreign);
        }
        match u32::from_le_bytes(input.array()?) {
            FORMAT => {}
            found => return Err(SectionError::Format { found }),
        }
        let mut sections = Self::default();
        let mut room = MAX_BYTES;
        loop {
            let (name, version, data) = input.section()?;
            if name == END {
                let whole = version == 0 && data.is_empty() && input.0.is_empty();
                return if whole { Ok(sections) } else { Err(SectionError::Damaged) };
            }
            if sections.get(name).is_ok() || sections.0.len() == MAX_SECTIONS {
                return Err(SectionError::Damaged);
            }
            if !is_text(data) {
                room = room.checked_sub(data.len()).ok_or(SectionError::TooLarge)?;
            }
            let mut rest = data;
            let value = ciborium::de::from_reader_with_recursion_limit(&mut rest, MAX_DEPTH)
                .map_err(|error| SectionError::of(name)(SnapshotError::Malformed(error.to_string())))?;
            if !rest.is_empty() {
                return Err(SectionError::Damaged);
            }
            sections.push(name, Saved { version, value });
        }
    }
}

/// Whether this is a CBOR text, which takes as many bytes in memory as it has.
fn is_text(data: &[u8]) -> bool {
    data.first().is_some_and(|first| first >> 5 == 3)
}

/// Whether every byte string of `read` is as long in `saved`.
fn same_lengths(saved: &Value, read: &Value) -> bool {
    match (saved, read) {
        (Value::Bytes(saved), Value::Bytes(read)) => saved.len() == read.len(),
        (_, Value::Bytes(_)) => false,
        (Value::Array(saved), Value::Array(read)) => {
            saved.iter().zip(read).all(|(saved, read)| same_lengths(saved, read))
        }
        (Value::Map(saved), Value::Map(read)) => saved.iter().all(|(key, saved)| {
            let read = read.iter().find(|(other, _)| other == key);
            read.is_none_or(|(_, read)| same_lengths(saved, read))
        }),
        _ => true,
    }
}

fn put(bytes: &mut Vec<u8>, name: &str, version: u16, data: &[u8]) {
    let start = bytes.len();
    bytes.extend((name.len() as u16).to_le_bytes());
    bytes.extend(version.to_le_bytes());
    bytes.extend((data.len() as u32).to_le_bytes());
    bytes.extend(name.as_bytes());
    bytes.extend(data);
    bytes.extend(crc32fast::hash(&bytes[start..]).to_le_bytes());
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], SectionError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(SectionError::Damaged)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], SectionError> {
        Ok(std::array::from_fn({
            let bytes = self.take(N)?;
            move |i| bytes[i]
        }))
    }

    fn section(&mut self) -> Result<(&'a str, u16, &'a [u8]), SectionError> {
        let start = self.0;
        let name_len = u16::from_le_bytes(self.array()?);
        let version = u16::from_le_bytes(self.array()?);
        let data_len = u32::from_le_bytes(self.array()?);
        let name = self.take(name_len.into())?;
        let data = self.take(data_len as usize)?;
        let covered = &start[..start.len() - self.0.len()];
        if u32::from_le_bytes(self.array()?) != crc32fast::hash(covered) {
            return Err(SectionError::Damaged);
        }
        let name = std::str::from_utf8(name).map_err(|_| SectionError::Damaged)?;
        Ok((name, version, data))
    }
}

/// A state file is of no use.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum SectionError {
    /// It does not begin as a state file does.
    #[error("it is no state file of a snapshot")]
    Foreign,
    /// Its form is newer than this program.
    #[error(
        "it has form {found} of the file, and this program reads {FORMAT}; use the program that made the snapshot"
    )]
    Format {
        /// The form's number.
        found: u32,
    },
    /// Bytes were changed, or are missing.
    #[error("it is damaged: a checksum does not match, or its end is missing")]
    Damaged,
    /// More than any machine has.
    #[error("it has more than {MAX_BYTES} bytes, which no machine's state has; it is damaged")]
    TooLarge,
    /// A section is not there.
    #[error("it has no section '{name}'")]
    Missing {
        /// The section's name.
        name: String,
    },
    /// A section that no part of the machine reads.
    #[error("it has a section '{name}', and this machine has no such part")]
    Unknown {
        /// The section's name.
        name: String,
    },
    /// The state in a section is of no use.
    #[error("its section '{name}': {source}")]
    State {
        /// The section's name.
        name: String,
        /// What is wrong.
        source: SnapshotError,
    },
}

impl SectionError {
    /// What is wrong with the state in the section `name`.
    pub fn of(name: &str) -> impl Fn(SnapshotError) -> Self {
        let name = name.to_owned();
        move |source| Self::State { name: name.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sections() -> Sections {
        let mut sections = Sections::default();
        sections.push("clock", Saved { version: 1, value: Value::from(7) });
        sections.push("vcpu0", Saved { version: 3, value: Value::Bytes(vec![1; 300]) });
        sections
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = sections().to_bytes().unwrap();
        assert_eq!(Sections::from_bytes(&bytes), Ok(sections()));
        assert_eq!(Sections::default().get("a"), Err(SectionError::Missing { name: "a".into() }));
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_noticed() {
        let bytes = sections().to_bytes().unwrap();
        for len in 0..bytes.len() {
            assert!(Sections::from_bytes(&bytes[..len]).is_err(), "{len} bytes");
        }
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(Sections::from_bytes(&changed).is_err(), "bit {bit}");
        }
        assert_eq!(Sections::from_bytes(&[&bytes[..], &[0]].concat()), Err(SectionError::Damaged));
    }

    #[test]
    fn a_section_twice_deep_values_and_huge_counts_are_refused() {
        let mut twice = sections();
        twice.push("clock", Saved { version: 1, value: Value::Null });
        assert_eq!(Sections::from_bytes(&twice.to_bytes().unwrap()), Err(SectionError::Damaged));
        for data in [[0x81; 10_000].as_slice(), &[0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]] {
            let mut bytes = [&MAGIC[..], &FORMAT.to_le_bytes()].concat();
            put(&mut bytes, "a", 1, data);
            put(&mut bytes, END, 0, &[]);
            assert!(matches!(Sections::from_bytes(&bytes), Err(SectionError::State { .. })));
        }
    }

    #[test]
    fn values_have_a_limit_and_a_text_has_none() {
        let file = |data: &[u8]| {
            let mut bytes = [&MAGIC[..], &FORMAT.to_le_bytes()].concat();
            put(&mut bytes, "a", 1, data);
            put(&mut bytes, END, 0, &[]);
            Sections::from_bytes(&bytes)
        };
        // An array of so many nulls, and as many bytes of text.
        let count = (MAX_BYTES as u32).to_be_bytes();
        let nulls = [&[0x9a][..], &count, &vec![0xf6; MAX_BYTES]].concat();
        assert_eq!(file(&nulls), Err(SectionError::TooLarge));
        let text = [&[0x7a][..], &count, &vec![b'x'; MAX_BYTES]].concat();
        assert!(file(&text).is_ok());
    }

    #[test]
    fn a_structure_is_as_long_as_it_is() {
        use crate::hypervisor::saved::IrqchipState;
        let state = IrqchipState { chips: vec![Default::default()], pit: Some(Default::default()) };
        let saved = Saved::of(&state).unwrap();
        let read = |saved: Saved| {
            let mut sections = Sections::default();
            sections.push("irqchip", saved);
            sections.whole_state::<IrqchipState>("irqchip").map(|_| ())
        };
        assert_eq!(read(saved.clone()), Ok(()));
        let changes: [fn(&mut Vec<u8>); 3] = [Vec::clear, |bytes| bytes.push(0), |bytes| _ = bytes.pop()];
        for change in changes {
            for part in ["chips", "pit"] {
                let mut saved = saved.clone();
                let Value::Map(entries) = &mut saved.value else { panic!("it is a map") };
                let (_, value) = entries.iter_mut().find(|(key, _)| key.as_text() == Some(part)).unwrap();
                match value {
                    Value::Array(chips) => change(chips[0].as_bytes_mut().unwrap()),
                    pit => change(pit.as_bytes_mut().unwrap()),
                }
                assert!(matches!(read(saved), Err(SectionError::State { .. })), "{part}");
            }
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_odd(data in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = [&MAGIC[..], &FORMAT.to_le_bytes()].concat();
            put(&mut bytes, "a", 1, &data);
            put(&mut bytes, END, 0, &[]);
            _ = Sections::from_bytes(&bytes);
            _ = Sections::from_bytes(&data);
        }
    }
}
