//! Files with holes: reading only what is data, so that a disk image of gigabytes costs what is in it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// A run of zeros of this many bytes is treated as a hole, even where the file has it written out.
const GRAIN: usize = 64 << 10;
static ZEROS: [u8; GRAIN] = [0; GRAIN];

/// Calls `each` with offset and bytes of everything in `file` that is not zero, in order, at most `chunk` bytes at a time.
pub fn read(file: &File, chunk: usize, mut each: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut buffer = vec![0; chunk];
    let mut at = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?;
        at = start;
        while at < end {
            let want = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            let got = file.read_at(&mut buffer[..want], at)?;
            if got == 0 {
                return Ok(());
            }
            non_zero(&buffer[..got], |from, part| each(at + from as u64, part))?;
            at += got as u64;
        }
    }
}

/// Copies `from` to `to`, holes kept.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let metadata = source.metadata()?;
    let target = File::create(to)?;
    target.set_len(metadata.len())?;
    read(&source, 1 << 20, |offset, data| target.write_all_at(data, offset))?;
    fs::set_permissions(to, metadata.permissions())
}

/// Calls `each` with every stretch of `data` that is not made of whole grains of zeros.
fn non_zero(data: &[u8], mut each: impl FnMut(usize, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut start = None;
    for (index, grain) in data.chunks(GRAIN).enumerate() {
        let at = index * GRAIN;
        // A comparison of slices is one call of memcmp: in the lab, code that goes byte by byte is slow.
        match (grain == &ZEROS[..grain.len()], start) {
            (true, Some(from)) => {
                each(from, &data[from..at])?;
                start = None;
            }
            (false, None) => start = Some(at),
            _ => {}
        }
    }
    match start {
        Some(from) => each(from, &data[from..]),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_not_zero_is_visited() {
        let mut data = vec![0; 5 * GRAIN + 10];
        data[GRAIN + 3] = 1;
        data[2 * GRAIN] = 2;
        data[5 * GRAIN + 9] = 3;
        let mut seen = Vec::new();
        non_zero(&data, |at, part| {
            seen.push((at, part.len()));
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, [(GRAIN, 2 * GRAIN), (5 * GRAIN, 10)]);
    }
}
