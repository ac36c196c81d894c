//! Packed snapshots that are almost right: entries with other names, kinds, sizes and contents, in another order, twice, or
//! left out; and what is compressed is cut off, or something follows it.

use std::path::Path;
use std::sync::LazyLock;
use std::{fs, io};

use arbitrary::{Arbitrary, Unstructured};
use serde_json::json;
use vmm_core::hypervisor::fake::FakeHypervisor;
use vmm_core::{Snapshot, SnapshotKind, Vm, VmConfig};

use crate::micro::Micro;

/// Bytes of a block of an archive.
const BLOCK: usize = 512;
/// Most changes.
const MAX_CHANGES: usize = 16;
/// Where the header of an entry has its fields (tar(5), old-style and GNU).
const NAME: usize = 0;
const SIZE: usize = 124;
const CHECKSUM: usize = 148;
const KIND: usize = 156;
/// Bytes of the size.
const SIZE_LEN: usize = 12;

/// One run.
#[derive(Arbitrary, Debug)]
struct Input {
    changes: Vec<Change>,
    /// What is compressed ends after so many bytes.
    cut: Option<u16>,
    /// This follows it.
    rest: Vec<u8>,
}

/// What is done to an archive.
#[derive(Arbitrary, Debug)]
enum Change {
    Content {
        entry: u8,
        at: u16,
        bytes: Vec<u8>,
    },
    Text {
        entry: u8,
        from: u8,
        to: u8,
    },
    Cut {
        entry: u8,
        len: u16,
    },
    Longer {
        entry: u8,
        by: u16,
    },
    Name {
        entry: u8,
        name: Vec<u8>,
    },
    Kind {
        entry: u8,
        kind: u8,
    },
    /// It says so, whatever it has.
    Size {
        entry: u8,
        size: [u8; SIZE_LEN],
    },
    Swap(u8, u8),
    Twice(u8),
    Without(u8),
}

/// One file of an archive.
#[derive(Clone, Debug)]
struct Entry {
    header: Vec<u8>,
    content: Vec<u8>,
    /// Its header says what it likes.
    size_lies: bool,
}

/// The entries of a good one.
static GOOD: LazyLock<Vec<Entry>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    fs::write(at("kernel"), Micro::new().reset().elf()).expect("room");
    let disk = [vec![7; 5000], vec![0; (1 << 20) - 5000]].concat();
    fs::write(at("disk"), disk).expect("room");
    let config: VmConfig = serde_json::from_value(json!({
        "kernel": at("kernel"),
        "memory": 4 << 20,
        "serial": "null",
        "devices": [{"kind": "disk", "path": at("disk"), "engine": "threads"}, {"kind": "rng"}],
    }))
    .expect("a configuration");
    let hypervisor = FakeHypervisor::new(Vec::new());
    let vm = Vm::builder(config).hypervisor(Box::new(hypervisor)).build().expect("a machine");
    vm.start().expect("it starts");
    vm.snapshot(&at("saved"), SnapshotKind::Full).expect("a snapshot");
    drop(vm);
    let mut packed = Vec::new();
    let snapshot = Snapshot::open(&at("saved")).expect("a good snapshot");
    snapshot.pack(&mut packed, &mut |_, _| ()).expect("it is packed");
    let archive = zstd::decode_all(&packed[..]).expect("it is compressed");
    assert!(unpacked(&packed, dir.path()).is_some(), "what was packed is unpacked");
    entries(&archive)
});

fn entries(mut archive: &[u8]) -> Vec<Entry> {
    let mut entries = Vec::new();
    while archive.first().is_some_and(|byte| *byte != 0) {
        let (header, rest) = archive.split_at(BLOCK);
        let digits = header[SIZE..SIZE + SIZE_LEN].iter().take_while(|byte| byte.is_ascii_digit());
        let size = digits.fold(0, |size, digit| size * 8 + usize::from(digit - b'0'));
        let (content, rest) = rest.split_at(size.next_multiple_of(BLOCK));
        entries.push(Entry { header: header.into(), content: content[..size].into(), size_lies: false });
        archive = rest;
    }
    assert!(entries.len() > 4, "manifest, state, memory, a disk, and where those have something");
    entries
}

impl Entry {
    fn write(&self, archive: &mut Vec<u8>) {
        let mut header = self.header.clone();
        if !self.size_lies {
            let size = format!("{:011o}\0", self.content.len());
            header[SIZE..SIZE + SIZE_LEN].copy_from_slice(size.as_bytes());
        }
        header[CHECKSUM..CHECKSUM + 8].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[CHECKSUM..CHECKSUM + 8].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        archive.extend(&header);
        archive.extend(&self.content);
        archive.resize(archive.len().next_multiple_of(BLOCK), 0);
    }
}

impl Change {
    fn apply(&self, entries: &mut Vec<Entry>) {
        let count = entries.len();
        let at = |nth: u8| usize::from(nth) % count;
        match self {
            Self::Content { entry, at: offset, bytes } => {
                let content = &mut entries[at(*entry)].content;
                let offset = usize::from(*offset) % (content.len() + 1);
                let end = (offset + bytes.len()).min(content.len());
                content[offset..end].copy_from_slice(&bytes[..end - offset]);
            }
            Self::Text { entry, from, to } => {
                let content = entries[at(*entry)].content.iter_mut();
                content.filter(|byte| **byte == *from).for_each(|byte| *byte = *to);
            }
            Self::Cut { entry, len } => entries[at(*entry)].content.truncate((*len).into()),
            Self::Longer { entry, by } => {
                let content = &mut entries[at(*entry)].content;
                content.resize(content.len() + usize::from(*by), b'1');
            }
            Self::Name { entry, name } => {
                let len = name.len().min(SIZE);
                entries[at(*entry)].header[NAME..len].copy_from_slice(&name[..len]);
            }
            Self::Kind { entry, kind } => entries[at(*entry)].header[KIND] = *kind,
            Self::Size { entry, size } => {
                let entry = &mut entries[at(*entry)];
                entry.header[SIZE..SIZE + SIZE_LEN].copy_from_slice(size);
                entry.size_lies = true;
            }
            Self::Swap(one, other) => entries.swap(at(*one), at(*other)),
            Self::Twice(entry) => entries.push(entries[at(*entry)].clone()),
            Self::Without(entry) if count > 1 => _ = entries.remove(at(*entry)),
            Self::Without(_) => {}
        }
    }
}

/// What a packed snapshot has become in a directory of its own, of which nothing is left if it is none.
fn unpacked(packed: &[u8], base: &Path) -> Option<Snapshot> {
    let dir = tempfile::tempdir_in(base).expect("a directory");
    let made = Snapshot::unpack(packed, &dir.path().join("made"), &mut |_, _| ());
    let names: io::Result<Vec<_>> =
        fs::read_dir(dir.path()).expect("it is there").map(|entry| Ok(entry?.file_name())).collect();
    match made {
        Ok(id) => {
            assert_eq!(names.expect("names"), ["made"]);
            let snapshot = Snapshot::open(&dir.path().join("made")).expect("what was unpacked can be opened");
            assert_eq!(snapshot.manifest().id, id);
            Some(snapshot)
        }
        Err(error) => {
            assert!(names.expect("names").is_empty(), "something is left after: {error}");
            None
        }
    }
}

/// Unpacks what `input` makes of a packed snapshot.
pub fn unpack(input: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(input)) else { return };
    let mut entries = GOOD.clone();
    input.changes.iter().take(MAX_CHANGES).for_each(|change| change.apply(&mut entries));
    let mut archive = Vec::new();
    entries.iter().for_each(|entry| entry.write(&mut archive));
    archive.resize(archive.len() + 2 * BLOCK, 0);
    let mut packed = zstd::encode_all(&archive[..], 1).expect("memory");
    if let Some(cut) = input.cut {
        packed.truncate(cut.into());
    }
    packed.extend(&input.rest);
    _ = unpacked(&packed, Path::new("/dev/shm"));
}
