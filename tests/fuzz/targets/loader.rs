//! Kernel images and initrds of any content: a sentence or a kernel that lies in memory, and nothing else.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use vmm_core::memory::{Backing, GuestRam};
use vmm_core::x86_64::kernel::{self, BootProtocol};

const RAM: u64 = 4 << 20;

/// A file of these bytes, and its path.
fn file(bytes: &[u8]) -> (File, PathBuf) {
    let mut file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).expect("memory for a file"));
    file.write_all(bytes).expect("memory for a file");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    (file, path)
}

fuzz_target!(|input: (u8, &[u8], &[u8])| {
    let (protocol, image, initrd) = input;
    let protocol = [BootProtocol::Auto, BootProtocol::Linux, BootProtocol::Pvh][usize::from(protocol % 3)];
    let ram = GuestRam::new(RAM, Backing::default(), None).expect("a few MiB of memory");
    let (_image, path) = file(image);
    let Ok(kernel) = kernel::load(ram.memory(), &path, protocol) else { return };
    assert!(kernel.end <= RAM, "the kernel ends in memory");
    let (_initrd, path) = file(initrd);
    let initrd = kernel::load_initrd(ram.memory(), &path, &kernel).ok();
    if let Some(initrd) = initrd {
        assert!(
            initrd.addr >= kernel.end && initrd.addr + initrd.len <= RAM,
            "the initrd lies after the kernel"
        );
    }
    kernel::write_parameters(ram.memory(), &kernel, initrd, "console=ttyS0").expect("there is room");
});
