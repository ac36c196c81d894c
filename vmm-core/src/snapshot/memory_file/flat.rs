//! A memory of one or more files as one, without a machine: to merge it, to pack it, to look at it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::copy_file_range;
use rustix::io::Errno;

use super::{
    MAX_WRITE, MemoryFileError, MemoryImage, PAGE, Pages, Run, check_pages, data_ranges, is_zero, open,
};

/// A memory as parts of files, from the lowest up, which do not overlap. What is in none of them is zero.
#[derive(Debug)]
pub struct Flat<'a> {
    bytes: u64,
    parts: Vec<(&'a File, Run)>,
}

/// What is in a memory.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// Pages that are not zero, from the lowest up.
    pub runs: Vec<Run>,
    hasher: crc32fast::Hasher,
}

impl Contents {
    /// Adds pages that are behind all others.
    fn add(&mut self, offset: u64, pages: &[u8]) {
        self.hasher.update(pages);
        match self.runs.last_mut() {
            Some((start, bytes)) if *start + *bytes == offset => *bytes += pages.len() as u64,
            _ => self.runs.push((offset, pages.len() as u64)),
        }
    }

    /// How many bytes there are.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|(_, bytes)| bytes).sum()
    }

    /// CRC-32 of these.
    pub fn crc32(&self) -> u32 {
        self.hasher.clone().finalize()
    }
}

impl MemoryImage {
    /// The memory as one.
    pub fn flat(&self) -> io::Result<Flat<'_>> {
        let mut covered = Pages::none(self.bytes);
        let mut parts: Vec<(&File, Run)> = Vec::new();
        for (file, runs) in self.over.iter().rev() {
            let mut listed = Pages::none(self.bytes);
            runs.iter().for_each(|&(offset, bytes)| listed.add_range(offset, bytes));
            parts.extend(uncovered(file, Some(&listed), &covered, self.bytes)?);
            let both = covered.bits.iter_mut().zip(&listed.bits);
            both.for_each(|(covered, listed)| *covered |= listed);
        }
        parts.extend(uncovered(&self.base, None, &covered, self.bytes)?);
        parts.sort_unstable_by_key(|(_, (offset, _))| *offset);
        Ok(Flat { bytes: self.bytes, parts })
    }
}

/// Pages of a file that are no holes, that are listed if there is a list, and that nothing lies over.
fn uncovered<'a>(
    file: &'a File,
    listed: Option<&Pages>,
    covered: &Pages,
    bytes: u64,
) -> io::Result<Vec<(&'a File, Run)>> {
    let mut own = Pages::none(bytes);
    data_ranges(file, bytes)?.into_iter().for_each(|(start, end)| own.add_range(start, end - start));
    for (i, word) in own.bits.iter_mut().enumerate() {
        *word &= !covered.bits[i] & listed.map_or(u64::MAX, |listed| listed.bits[i]);
    }
    Ok(own.runs(0, bytes).map(|run| (file, run)).collect())
}

impl Flat<'_> {
    /// Adds the pages that may be other than zero.
    pub fn add_to(&self, pages: &mut Pages) {
        self.parts.iter().for_each(|&(_, (offset, bytes))| pages.add_range(offset, bytes));
    }

    /// Reads what is at `offset`.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        let end = offset + buffer.len() as u64;
        let first = self.parts.partition_point(|(_, (start, bytes))| start + bytes <= offset);
        for &(file, (start, bytes)) in self.parts[first..].iter().take_while(|(_, (start, _))| *start < end) {
            let (from, to) = (start.max(offset), (start + bytes).min(end));
            file.read_exact_at(&mut buffer[(from - offset) as usize..(to - offset) as usize], from)?;
        }
        Ok(())
    }

    /// Calls `each` with all pages that are not zero, from the lowest up, in runs of at most 1 MiB: the file that has them,
    /// where they are in it and in the memory, and what they are.
    fn each_run(&self, mut each: impl FnMut(&File, u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut buffer = vec![0; MAX_WRITE as usize];
        for &(file, (start, bytes)) in &self.parts {
            for at in (0..bytes).step_by(MAX_WRITE as usize) {
                let part = &mut buffer[..(bytes - at).min(MAX_WRITE) as usize];
                file.read_exact_at(part, start + at)?;
                for (from, to) in not_zero(part) {
                    each(file, start + at + from as u64, &part[from..to])?;
                }
            }
        }
        Ok(())
    }

    /// Reads all of it.
    pub fn contents(&self) -> io::Result<Contents> {
        let mut contents = Contents::default();
        self.each_run(|_, offset, pages| {
            contents.add(offset, pages);
            Ok(())
        })?;
        Ok(contents)
    }

    /// Makes an empty file of it, with holes for zeroes. File systems that can share pieces between files do so.
    pub fn copy_to(&self, to: &File) -> io::Result<Contents> {
        to.set_len(self.bytes)?;
        let mut contents = Contents::default();
        self.each_run(|from, offset, pages| {
            contents.add(offset, pages);
            copy(from, to, offset, pages)
        })?;
        Ok(contents)
    }
}

/// Copies `pages`, which are at `offset` of `from`, to the same place of `to`.
fn copy(from: &File, to: &File, offset: u64, pages: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < pages.len() {
        let (mut at, mut to_at) = (offset + done as u64, offset + done as u64);
        match copy_file_range(from, Some(&mut at), to, Some(&mut to_at), pages.len() - done) {
            // A file that was cut meanwhile; what was read counts.
            Ok(0) => return to.write_all_at(&pages[done..], to_at),
            Ok(copied) => done += copied,
            // Between file systems, or on one that cannot.
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                return to.write_all_at(&pages[done..], offset + done as u64);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Runs of pages that are not zero, as start and end. The last page may be shorter.
pub(in crate::snapshot) fn not_zero(pages: &[u8]) -> impl Iterator<Item = (usize, usize)> + '_ {
    let page = PAGE as usize;
    let zero = move |at: usize| is_zero(&pages[at..pages.len().min(at + page)]);
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = (at..pages.len()).step_by(page).find(|&at| !zero(at))?;
        at = (first..pages.len()).step_by(page).find(|&at| zero(at)).unwrap_or(pages.len());
        Some((first, at))
    })
}

/// Pages of a file of so many bytes that are not zero, from the lowest up. The last one may be shorter.
pub(in crate::snapshot) fn runs(file: &File, bytes: u64) -> io::Result<Vec<Run>> {
    let mut contents = Contents::default();
    let mut buffer = vec![0; MAX_WRITE as usize];
    for (start, end) in data_ranges(file, bytes)? {
        for at in (start..end.min(bytes)).step_by(MAX_WRITE as usize) {
            let part = &mut buffer[..(end.min(bytes) - at).min(MAX_WRITE) as usize];
            file.read_exact_at(part, at)?;
            not_zero(part).for_each(|(from, to)| contents.add(at + from as u64, &part[from..to]));
        }
    }
    Ok(contents.runs)
}

/// CRC-32 of the pages that are not zero in the memory file at `path`: of those that are listed, if there is a list.
pub fn crc32(path: &Path, bytes: u64, listed: Option<&[Run]>) -> Result<u32, MemoryFileError> {
    check_pages(listed.unwrap_or_default(), bytes)?;
    let file = open(path, bytes)?;
    let error = |source| MemoryFileError::Io { path: path.display().to_string(), source };
    let listed = listed.map(|runs| {
        let mut pages = Pages::none(bytes);
        runs.iter().for_each(|&(offset, bytes)| pages.add_range(offset, bytes));
        pages
    });
    let parts = uncovered(&file, listed.as_ref(), &Pages::none(bytes), bytes).map_err(error)?;
    Ok(Flat { bytes, parts }.contents().map_err(error)?.crc32())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 80;
    const SIZE: u64 = PAGES * PAGE;

    /// A file in which these pages have these bytes.
    fn file(dir: &Path, name: usize, pages: &[(u64, u8)]) -> std::path::PathBuf {
        let path = dir.join(name.to_string());
        let file = File::create_new(&path).unwrap();
        file.set_len(SIZE).unwrap();
        for &(page, byte) in pages {
            file.write_all_at(&[byte; PAGE as usize], page * PAGE).unwrap();
        }
        path
    }

    fn layer() -> impl Strategy<Value = Vec<(u64, u8)>> {
        prop::collection::vec((0..PAGES, 0..3u8), 0..40)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn layers_are_one_memory(layers in prop::collection::vec(layer(), 1..5)) {
            let dir = tempfile::tempdir().unwrap();
            let mut want = vec![0; SIZE as usize];
            let mut image = None;
            for (i, layer) in layers.iter().enumerate() {
                let path = file(dir.path(), i, layer);
                let mut pages = Pages::none(SIZE);
                for &(page, byte) in layer {
                    want[(page * PAGE) as usize..][..PAGE as usize].fill(byte);
                    pages.add(page * PAGE);
                }
                let runs: Vec<_> = pages.runs(0, SIZE).collect();
                match &mut image {
                    None => image = Some(MemoryImage::open(&path, SIZE).unwrap()),
                    Some(image) => image.add_diff(&path, &runs).unwrap(),
                }
            }
            let image = image.unwrap();
            let flat = image.flat().unwrap();
            let merged = dir.path().join("merged");
            let copied = flat.copy_to(&File::create_new(&merged).unwrap()).unwrap();
            prop_assert!(std::fs::read(&merged).unwrap() == want);
            let contents = flat.contents().unwrap();
            prop_assert_eq!(&contents.runs, &copied.runs);
            let mut bytes = Vec::new();
            for &(offset, len) in &contents.runs {
                let pages = &want[offset as usize..(offset + len) as usize];
                prop_assert!(pages.chunks(PAGE as usize).all(|page| page.iter().any(|byte| *byte != 0)));
                bytes.extend_from_slice(pages);
            }
            prop_assert_eq!(contents.bytes(), bytes.len() as u64);
            prop_assert_eq!(contents.crc32(), crc32fast::hash(&bytes));
            prop_assert_eq!(crc32(&merged, SIZE, None).unwrap(), contents.crc32());
            let mut read = vec![1; 9 * PAGE as usize];
            for offset in (0..=SIZE - read.len() as u64).step_by(1000) {
                flat.read_at(offset, &mut read).unwrap();
                prop_assert!(read == want[offset as usize..][..read.len()], "at {}", offset);
            }
        }
    }

    #[test]
    fn zeroes_that_are_there_count_as_little_as_holes() {
        let dir = tempfile::tempdir().unwrap();
        let [with, without] = [&[(1, 7), (2, 0), (5, 8)][..], &[(1, 7), (5, 8)]]
            .map(|pages| file(dir.path(), pages.len(), pages));
        let sum = |path: &Path, listed: Option<&[Run]>| crc32(path, SIZE, listed).unwrap();
        assert_eq!(sum(&with, None), sum(&without, None));
        let listed = [(PAGE, 2 * PAGE)];
        assert_eq!(sum(&with, Some(&listed)), sum(&file(dir.path(), 9, &[(1, 7)]), None));
        assert!(crc32(&with, SIZE, Some(&[(SIZE, PAGE)])).is_err());
    }
}
