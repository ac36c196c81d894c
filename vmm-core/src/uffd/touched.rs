//! What of a snapshot's memory a guest touched first, kept beside it: the next one finds that there before it asks.
//!
//! It is advice. Whatever is in the file, the memory is the snapshot's; and whatever goes wrong, there is none.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat, renameat, unlinkat};
use tracing::debug;

use crate::snapshot::random;

/// Bytes of a block, the unit of what is kept. Smaller ones make more faults while it is found out, larger ones bring in more
/// that nobody asks for.
pub const BLOCK: u64 = 16 << 10;
/// Its name in the directory of the snapshot.
pub const NAME: &str = "memory.touched";
/// Most blocks of a file: those of 4 GiB.
pub const MAX_BLOCKS: usize = 1 << 18;

const MAGIC: &[u8; 8] = b"vmmtouch";
const FORM: u32 = 2;
/// The guest lived long enough for all that it touched first.
const WHOLE: u32 = 1;
/// Digits of a snapshot's id.
const ID: usize = 32;
/// Bytes before the blocks.
const HEAD: usize = MAGIC.len() + 4 + ID + 4 + 4;

/// What such a file has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Blocks, in the order in which they were touched.
    pub blocks: Vec<u32>,
    /// If not, the guest ended so early that there may be more, which the next one adds.
    pub whole: bool,
}

/// The place of such a file.
#[derive(Debug)]
pub struct TouchedFile {
    /// The snapshot's directory, as it was when it was opened: what is at its path later may be another.
    dir: OwnedFd,
    /// Whose memory it is about.
    id: String,
}

impl TouchedFile {
    /// In the directory `dir` of the snapshot `id`.
    pub fn in_dir(dir: &Path, id: &str) -> Option<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = openat(CWD, dir, flags, Mode::empty()).ok()?;
        (id.len() == ID).then(|| Self { dir, id: id.into() })
    }

    /// What was touched of a memory of so many bytes; `None` if there is no file that is of use.
    pub fn read(&self, memory: u64) -> Option<Touched> {
        // No link leads out of the directory, and no pipe is waited for.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file: File = openat(&self.dir, NAME, flags, Mode::empty()).ok()?.into();
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        let limit = HEAD + 4 * MAX_BLOCKS + 4;
        let mut bytes = Vec::new();
        file.take(limit as u64 + 1).read_to_end(&mut bytes).ok()?;
        let touched = parse(&bytes, &self.id, memory);
        if touched.is_none() {
            debug!("{NAME} is of no use");
        }
        touched
    }

    /// Replaces the file, if that is possible.
    pub fn write(&self, touched: &Touched) {
        let name = format!(".{NAME}.{:08x}", random::<4>().map_or(0, u32::from_le_bytes));
        let write = || {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut file: File = openat(&self.dir, &*name, flags, Mode::RUSR | Mode::WUSR)?.into();
            file.write_all(&to_bytes(touched, &self.id))?;
            renameat(&self.dir, &*name, &self.dir, NAME)?;
            std::io::Result::Ok(())
        };
        if let Err(error) = write() {
            _ = unlinkat(&self.dir, &*name, AtFlags::empty());
            debug!(%error, "{NAME} is not written");
        }
    }
}

fn head(id: &str, whole: bool, blocks: u32) -> Vec<u8> {
    let flags = if whole { WHOLE } else { 0 };
    [MAGIC, &FORM.to_le_bytes()[..], id.as_bytes(), &flags.to_le_bytes(), &blocks.to_le_bytes()].concat()
}

fn to_bytes(touched: &Touched, id: &str) -> Vec<u8> {
    let Touched { blocks, whole } = touched;
    let mut bytes = head(id, *whole, blocks.len() as u32);
    blocks.iter().for_each(|block| bytes.extend(block.to_le_bytes()));
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

fn parse(bytes: &[u8], id: &str, memory: u64) -> Option<Touched> {
    let (content, crc) = bytes.split_last_chunk::<4>()?;
    let (begins, blocks) = content.split_at_checked(HEAD)?;
    let count = u32::try_from(blocks.len() / 4).ok()?;
    let whole = [true, false].into_iter().find(|&whole| begins == head(id, whole, count))?;
    let blocks = blocks.chunks_exact(4).map(|block| block.try_into().map(u32::from_le_bytes));
    let blocks = blocks.collect::<Result<Vec<_>, _>>().ok()?;
    let right = content.len() == HEAD + 4 * blocks.len()
        && blocks.len() <= MAX_BLOCKS
        && crc32fast::hash(content).to_le_bytes() == *crc
        && blocks.iter().all(|&block| u64::from(block) < memory.div_ceil(BLOCK));
    right.then_some(Touched { blocks, whole })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef";
    const MEMORY: u64 = 1 << 20;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let file = TouchedFile::in_dir(dir.path(), ID).unwrap();
        assert_eq!(file.read(MEMORY), None);
        let touched = |blocks: &[u32], whole| Touched { blocks: blocks.into(), whole };
        file.write(&touched(&[9], true));
        for touched in [touched(&[], false), touched(&[3, 15, 0], true), touched(&[3, 15, 0], false)] {
            file.write(&touched);
            assert_eq!(file.read(MEMORY), Some(touched));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no draft is left");
        assert_eq!(file.read(15 * BLOCK), None, "a block outside of the memory");
        let other = TouchedFile::in_dir(dir.path(), &ID.replace('0', "1")).unwrap();
        assert_eq!(other.read(MEMORY), None, "of another snapshot");
        let path = dir.path().join(NAME);
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0x40;
            fs::write(&path, &bytes).unwrap();
            assert_eq!(file.read(MEMORY), None, "byte {at}");
            fs::write(&path, &good[..at]).unwrap();
            assert_eq!(file.read(MEMORY), None, "{at} bytes");
        }
        fs::write(&path, vec![0; HEAD + 4 * MAX_BLOCKS + 100]).unwrap();
        assert_eq!(file.read(MEMORY), None, "too long");
    }

    #[test]
    fn it_is_neither_read_nor_written_through_a_link() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let touched = Touched { blocks: vec![1], whole: true };
        TouchedFile::in_dir(outside.path(), ID).unwrap().write(&touched);
        let target = outside.path().join(NAME);
        let was = fs::read(&target).unwrap();
        symlink(&target, dir.path().join(NAME)).unwrap();
        let file = TouchedFile::in_dir(dir.path(), ID).unwrap();
        assert_eq!(file.read(MEMORY), None);
        let other = Touched { blocks: vec![2], whole: true };
        file.write(&other);
        assert_eq!(fs::read(&target).unwrap(), was);
        assert_eq!(file.read(MEMORY), Some(other), "the link is gone");
        assert!(
            TouchedFile::in_dir(dir.path(), "../..").is_none() && TouchedFile::in_dir(&target, ID).is_none()
        );
    }

    #[test]
    fn where_it_cannot_be_written_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let file = TouchedFile::in_dir(dir.path(), ID).unwrap();
        fs::create_dir(dir.path().join(NAME)).unwrap();
        file.write(&Touched::default());
        assert_eq!(file.read(MEMORY), None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no draft is left");
    }
}
