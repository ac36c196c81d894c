//! Images in the qcow2 format, read and written through the imago crate.
//!
//! Nothing is guessed: the operator says that a disk is qcow2, and a backing file is opened only when the operator
//! allows it and the image names its format. (imago would look into a backing file without one, and a guest that
//! once had that file as its raw disk could have put a header there.) Every file of the chain is locked.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::file::File;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, FormatCreateBuilder, Mapping, ShallowMapping, StorageOpenOptions};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::config::Format;
use super::disk::open_locked;
use super::job::PUNCH;
use crate::model::OpenError;
use crate::storage;

/// Most backing files under one another; a chain may name itself.
const MAX_DEPTH: usize = 16;

/// Bytes of an image that has nothing in it yet: header and tables, a cluster each.
const BEGINNING: u64 = 4 * (64 << 10);

/// An open image. Calls block.
#[derive(Debug)]
pub struct Image {
    /// Discards move what other accesses may be looking at, so they are alone.
    access: RwLock<FormatAccess<File>>,
    /// The image's file.
    fd: OwnedFd,
    /// What it was laid over.
    below: Option<Below>,
}

/// What an image of ours lies over.
#[derive(Debug)]
enum Below {
    /// The disk, byte for byte.
    Raw(fs::File),
    /// Another image.
    Image,
}

impl Image {
    /// Opens what is in the locked file `fd`, which is at `path`.
    pub fn open(
        fd: &OwnedFd,
        path: &Path,
        read_only: bool,
        direct: bool,
        backing: bool,
    ) -> Result<Self, OpenError> {
        let opener = Opener { direct, backing };
        let access = opener.qcow2(fd, path, read_only, 0)?;
        let copy = fd.try_clone().map_err(|e| OpenError::file("disk", path)(&e.to_string(), "try again"))?;
        Ok(Self { access: RwLock::new(access), fd: copy, below: None })
    }

    /// Makes an image in the empty file `fd`, which begins as what is in the locked file `below`, which is at `path`.
    pub fn over(
        fd: &OwnedFd,
        below: OwnedFd,
        path: &Path,
        format: Format,
        backing: bool,
    ) -> Result<Self, OpenError> {
        let opener = Opener { direct: false, backing };
        let failed = |e: io::Error| {
            let reason = format!("no image can be laid over it ({e})");
            OpenError::file("disk", path)(&reason, "make room beside it")
        };
        let beginning = match format {
            Format::Raw => opener.raw(&below, path)?,
            Format::Qcow2 => opener.qcow2(&below, path, true, 0)?,
        };
        let make = || {
            // Room for what it begins with, so that making it fails here or not at all.
            let reserved = rustix::fs::fallocate(fd, FallocateFlags::KEEP_SIZE, 0, BEGINNING);
            if let Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::IO)) = reserved {
                return Err(error.into());
            }
            let file = opener.storage(fd, path, false)?;
            Qcow2::<File>::create_builder(file).size(beginning.size()).create()?;
            let mut image = Qcow2::<File>::open_image(opener.storage(fd, path, false)?, true)?;
            image.set_data_file(None);
            Ok((image, fd.try_clone()?))
        };
        let (mut image, fd) = make().map_err(failed)?;
        image.set_backing(Some(beginning));
        let below = match format {
            Format::Raw => Below::Raw(below.into()),
            Format::Qcow2 => Below::Image,
        };
        Ok(Self { access: RwLock::new(FormatAccess::new(image)), fd, below: Some(below) })
    }

    /// Whether it is nothing without a file that it was laid over.
    pub fn is_over(&self) -> bool {
        self.below.is_some()
    }

    /// Writes all of it to the empty file `to`: the image as it is, which is at `path`, or if it lies over a file, the disk
    /// byte for byte.
    pub fn save(&self, path: &Path, to: &fs::File) -> io::Result<()> {
        // Alone, so that nothing is on its way.
        let access = self.alone();
        access.flush()?;
        let Some(below) = &self.below else {
            storage::copy(self.fd.as_fd(), to)?;
            return name_backing_absolutely(path, to);
        };
        let (mut at, end) = (0, access.size());
        to.set_len(end)?;
        while at < end {
            let (mapping, bytes) = access.get_shallow_mapping(at, end - at)?;
            let bytes = bytes.clamp(1, end - at);
            match (mapping, below) {
                (ShallowMapping::Zero { .. } | ShallowMapping::Eof { .. }, _) => {}
                (ShallowMapping::Indirect { .. }, Below::Raw(file)) => {
                    // What is longer than the file below is zero there.
                    let length = file.metadata()?.len();
                    storage::copy_data(file, to, at, (at + bytes).min(length))?;
                }
                (ShallowMapping::Indirect { .. }, Below::Image) => {
                    // Step by step: most of it may be nowhere.
                    let (mapping, bytes) = access.get_mapping(at, bytes)?;
                    let end = at + bytes.clamp(1, end - at);
                    if !matches!(mapping, Mapping::Zero { .. } | Mapping::Eof { .. }) {
                        storage::copy_read(|part, at| access.read(part, at), to, at, end)?;
                    }
                    at = end;
                    continue;
                }
                _ => storage::copy_read(|part, at| access.read(part, at), to, at, at + bytes)?,
            }
            at += bytes;
        }
        Ok(())
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<File>> {
        self.access.read().unwrap_or_else(|e| e.into_inner())
    }

    fn alone(&self) -> RwLockWriteGuard<'_, FormatAccess<File>> {
        self.access.write().unwrap_or_else(|e| e.into_inner())
    }

    /// Bytes of the disk.
    pub fn bytes(&self) -> u64 {
        self.shared().size()
    }

    /// Makes it larger.
    pub fn extend(&self, bytes: u64) -> io::Result<()> {
        self.alone().resize_grow(bytes, PreallocateMode::None)
    }

    /// Fills `room` from `offset`.
    pub fn read(&self, room: &mut [u8], offset: u64) -> io::Result<usize> {
        self.shared().read(&mut *room, offset).map(|()| room.len())
    }

    /// Stores `data` at `offset`.
    pub fn write(&self, data: &[u8], offset: u64, durable: bool) -> io::Result<usize> {
        let access = self.shared();
        access.write(data, offset)?;
        if durable {
            access.flush()?;
            access.sync()?;
        }
        Ok(data.len())
    }

    /// Makes zeros of a range, and gives its clusters back if `unmap`.
    pub fn clear(&self, offset: u64, len: u64, unmap: bool) -> io::Result<usize> {
        if !unmap {
            return self.shared().write_zeroes(offset, len).map(|()| 0);
        }
        let mut access = self.alone();
        let freed = owned_ranges(&access, offset, len)?;
        access.discard_to_zero(offset, len)?;
        // imago keeps freed clusters for what is written next; until then their blocks are the host's again. Nobody
        // can have written there yet. What cannot be punched is no worse off.
        for (at, bytes) in freed {
            _ = rustix::fs::fallocate(&self.fd, PUNCH, at, bytes);
        }
        Ok(0)
    }

    /// Makes what was written durable.
    pub fn sync(&self) -> io::Result<usize> {
        let access = self.shared();
        access.flush()?;
        access.sync().map(|()| 0)
    }
}

/// Has the copy `to` of the image at `path` name the same backing file from wherever it is.
fn name_backing_absolutely(path: &Path, to: &fs::File) -> io::Result<()> {
    // The header (QEMU's docs/interop/qcow2.rst), big-endian: where the name is, how long it is, and the size of a cluster,
    // of which the first has the header and the name.
    const NAME_AT: u64 = 8;
    let mut header = [0; 24];
    to.read_exact_at(&mut header, 0)?;
    let number = |at: usize| header[at..at + 4].iter().fold(0u64, |all, byte| all << 8 | u64::from(*byte));
    let (at, length, cluster) = (number(8) << 32 | number(12), number(16), 1u64 << number(20).min(21));
    if at == 0 || length > 1023 || at.checked_add(length).is_none_or(|end| end >= cluster) {
        return Ok(());
    }
    let mut name = vec![0; length as usize];
    to.read_exact_at(&mut name, at)?;
    let directory = std::path::absolute(path)?.parent().map(Path::to_owned).unwrap_or_default();
    let name = directory.join(std::ffi::OsStr::from_bytes(&name));
    let name = name.as_os_str().as_bytes();
    // Where nothing but the name can be: header and extensions are in front of it.
    let room = cluster - at - 1;
    if name.len() as u64 > room.min(1023) {
        return Err(io::Error::other(
            "the name of its backing file is too long; give the backing file a shorter path",
        ));
    }
    // imago wants a byte behind it.
    let at = cluster - name.len() as u64 - 1;
    to.write_all_at(name, at)?;
    let place = [&at.to_be_bytes()[..], &(name.len() as u32).to_be_bytes()].concat();
    to.write_all_at(&place, NAME_AT)
}

impl Drop for Image {
    /// A guest that was killed has not flushed, and what it has written is to be found as far as the host knows it.
    fn drop(&mut self) {
        _ = self.alone().flush();
    }
}

/// Where a range's data is in the image's own file (offsets and lengths in bytes), as far as nothing else, such as a
/// snapshot, has a share in it.
fn owned_ranges(access: &FormatAccess<File>, offset: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
    let (mut ranges, mut at) = (Vec::new(), offset);
    while at < offset + len {
        let (mapping, bytes) = access.get_shallow_mapping(at, offset + len - at)?;
        if let ShallowMapping::Raw { offset, writable: true, .. } = mapping {
            ranges.push((offset, bytes));
        }
        if bytes == 0 {
            break;
        }
        at += bytes;
    }
    Ok(ranges)
}

/// How the files of a chain are opened.
#[derive(Clone, Copy)]
struct Opener {
    direct: bool,
    backing: bool,
}

impl Opener {
    fn qcow2(
        self,
        fd: &OwnedFd,
        path: &Path,
        read_only: bool,
        depth: usize,
    ) -> Result<FormatAccess<File>, OpenError> {
        let error = OpenError::file(if depth == 0 { "disk" } else { "backing file" }, path);
        let broken =
            |e: io::Error| error(&format!("it is no qcow2 image ({e})"), "name its format with format=");
        let file = self.storage(fd, path, read_only).map_err(broken)?;
        let mut image = Qcow2::<File>::open_image(file, !read_only).map_err(broken)?;
        if image.requires_external_data_file() {
            return Err(error("its data is in another file", "convert it with 'qemu-img convert'"));
        }
        image.set_data_file(None);
        let backing = match image.implicit_backing_file().cloned() {
            None => None,
            Some(name) if !self.backing => {
                let reason = format!("it needs the backing file '{name}'");
                return Err(error(&reason, "add ',backing=on' to allow that, if you trust the image"));
            }
            Some(_) if depth == MAX_DEPTH => {
                return Err(error("too many backing files", "merge them with 'qemu-img convert'"));
            }
            Some(name) => {
                let base = path.parent().unwrap_or(Path::new(".")).join(name);
                let format = image.implicit_backing_format().cloned();
                Some(self.backing_file(&base, format.as_deref(), depth + 1)?)
            }
        };
        image.set_backing(backing);
        Ok(FormatAccess::new(image))
    }

    /// Opens a backing file, for reading only.
    fn backing_file(
        self,
        path: &Path,
        format: Option<&str>,
        depth: usize,
    ) -> Result<FormatAccess<File>, OpenError> {
        let error = OpenError::file("backing file", path);
        let fd = open_locked("backing file", path, true, self.direct)?;
        match format {
            Some("qcow2") => self.qcow2(&fd, path, true, depth),
            Some("raw") => self.raw(&fd, path),
            Some(other) => Err(error(
                &format!("its format '{other}' is not known here"),
                "convert it with 'qemu-img convert'",
            )),
            None => Err(error(
                "the image does not say which format it has",
                "say so in the image with 'qemu-img rebase -u -F FORMAT -b FILE IMAGE'",
            )),
        }
    }

    /// The disk, byte for byte, for reading only.
    fn raw(self, fd: &OwnedFd, path: &Path) -> Result<FormatAccess<File>, OpenError> {
        let failed = |e: io::Error| OpenError::file("backing file", path)(&e.to_string(), "check the file");
        let file = self.storage(fd, path, true).map_err(failed)?;
        Raw::open_image(file, false).map(FormatAccess::new).map_err(failed)
    }

    /// The file for imago: the same open file, and so the same lock.
    fn storage(self, fd: &OwnedFd, path: &Path, read_only: bool) -> io::Result<File> {
        let options = StorageOpenOptions::new().filename(path).write(!read_only).direct(self.direct);
        File::from_open_file(fd.try_clone()?.into(), options)
    }
}
