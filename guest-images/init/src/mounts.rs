//! The file systems that programs expect, and letting go of disks at the end.

use core::ffi::CStr;

use rustix_core::fs::{Mode, OFlags, mkdir, open, sync};
use rustix_core::io::{Errno, read};
use rustix_core::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

use crate::say;

struct Entry {
    kind: &'static CStr,
    target: &'static CStr,
    flags: MountFlags,
    data: &'static CStr,
}

const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const STRICT: MountFlags = PLAIN.union(MountFlags::NOEXEC);
const DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);

/// In the order of mounting: later ones lie inside earlier ones.
#[rustfmt::skip]
const TABLE: &[Entry] = &[
    Entry { kind: c"proc", target: c"/proc", flags: STRICT, data: c"" },
    Entry { kind: c"sysfs", target: c"/sys", flags: STRICT, data: c"" },
    Entry { kind: c"devtmpfs", target: c"/dev", flags: DEVICES, data: c"mode=755" },
    Entry { kind: c"devpts", target: c"/dev/pts", flags: DEVICES, data: c"mode=620,ptmxmode=666,gid=5" },
    Entry { kind: c"tmpfs", target: c"/dev/shm", flags: PLAIN, data: c"mode=1777" },
    Entry { kind: c"tmpfs", target: c"/run", flags: PLAIN, data: c"mode=755" },
    Entry { kind: c"tmpfs", target: c"/tmp", flags: PLAIN, data: c"mode=1777" },
    Entry { kind: c"cgroup2", target: c"/sys/fs/cgroup", flags: STRICT, data: c"" },
];

/// Mounts all of [`TABLE`]; what cannot be mounted is named on the console and left out.
pub fn mount_all() {
    for entry in TABLE {
        let attempt = || mount(entry.kind, entry.target, entry.kind, entry.flags, entry.data);
        let result = match attempt() {
            // In an initramfs, or on a file system that was mounted a moment ago, the directory is missing.
            Err(Errno::NOENT) => mkdir(entry.target, Mode::from_raw_mode(0o755)).and_then(|()| attempt()),
            other => other,
        };
        match result {
            // Busy: the kernel has mounted /dev itself.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => say!("cannot mount {:?}: {error}", entry.target),
        }
    }
}

/// Enough for a few hundred mounts; those beyond stay mounted, but are written out.
const MOUNTS_BYTES: usize = 16 << 10;

/// Writes everything out, unmounts every disk but the root, and makes the root read-only, so that the disks are
/// clean when the machine stops.
pub fn release_all() {
    let mut buffer = [0; MOUNTS_BYTES];
    let mounts = read_file(c"/proc/self/mounts", &mut buffer);
    for target in disk_mounts(mounts) {
        if let Err(error) = unmount(target, UnmountFlags::DETACH) {
            say!("cannot unmount {}: {error}", target.escape_ascii());
        }
    }
    sync();
    // A root that cannot become read-only (something is still open for writing) has at least been written out.
    let _ = mount_remount(c"/", MountFlags::RDONLY, c"");
}

/// Where block devices are mounted, last mounted first, without the root.
fn disk_mounts(mounts: &[u8]) -> impl Iterator<Item = &[u8]> {
    mounts.rsplit(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let (source, target) = (fields.next()?, fields.next()?);
        (source.starts_with(b"/dev/") && target != b"/").then_some(target)
    })
}

/// As much of a file as fits; nothing when it cannot be read.
pub fn read_file<'a>(path: &CStr, buffer: &'a mut [u8]) -> &'a [u8] {
    let mut used = 0;
    if let Ok(file) = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        while let Ok(count @ 1..) = read(&file, &mut buffer[used..]) {
            used += count;
        }
    }
    &buffer[..used]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_disks_are_unmounted_and_inner_ones_first() {
        let mounts = b"/dev/root / ext4 rw 0 0\nproc /proc proc rw 0 0\n\
                       /dev/vdb /mnt ext4 rw 0 0\n/dev/vdc /mnt/in ext4 rw 0 0\n";
        assert!(disk_mounts(mounts).eq([b"/mnt/in".as_slice(), b"/mnt"]));
    }
}
