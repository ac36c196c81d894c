//! What is looked at. Every probe tries the thing itself where that leaves nothing behind.
#![allow(unsafe_code, reason = "io_uring_setup and unshare have no safe wrapper")]

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use vmm_core::diagnosis::has_hardware_virtualisation;
use vmm_core::hypervisor::kvm::{API_VERSION, Host};
use vmm_core::x86_64::layout::MAX_CPUS;

use super::report::{Item, Report};

/// Looks at everything.
pub fn all() -> Report {
    let mut items = kvm();
    items.push(acceleration());
    items.extend([huge_pages(), tap(), passt(), io_uring(), cgroups()]);
    // Last, because it moves this process into a namespace of its own.
    items.push(user_namespaces());
    Report::new(items)
}

fn item(name: &str, needed: bool, found: impl Into<String>) -> Item {
    Item { name: name.into(), ok: true, needed, found: found.into(), remedy: Vec::new() }
}

impl Item {
    fn missing(self, remedy: &[&str]) -> Self {
        Self { ok: false, remedy: remedy.iter().map(|line| (*line).to_owned()).collect(), ..self }
    }

    fn missing_unless(self, ok: bool, remedy: &[&str]) -> Self {
        if ok { self } else { self.missing(remedy) }
    }
}

fn kvm() -> Vec<Item> {
    let host = match Host::ask() {
        Ok(host) => host,
        Err(error) => return vec![item("/dev/kvm", true, "cannot be used").missing(&[&error.to_string()])],
    };
    let mut items = vec![
        item("/dev/kvm", true, "can be opened"),
        item("KVM API", true, format!("version {}", host.api_version))
            .missing_unless(host.api_version == API_VERSION, &["Version 12 is needed: use a newer Linux."]),
    ];
    items.extend(host.capabilities.iter().map(|&(name, there)| {
        item(name, true, if there { "yes" } else { "no" })
            .missing_unless(there, &["Every guest needs it: use Linux 4.14 or newer."])
    }));
    let most = host.max_vcpus.min(MAX_CPUS.into());
    items.push(
        item("vCPUs", false, format!("{most} for a guest (KVM: {}, vmm: {MAX_CPUS})", host.max_vcpus))
            .missing_unless(most > 0, &["KVM says that it makes none: use another host."]),
    );
    items
}

fn acceleration() -> Item {
    let name = "hardware acceleration";
    match has_hardware_virtualisation() {
        true => item(name, false, "VMX or SVM"),
        false => item(name, false, "the processors offer neither VMX nor SVM").missing(&[
            "KVM emulates what a guest's kernel does, so stock kernels are slow here or stop at an instruction that KVM does not know.",
            "Leave --kernel out: vmm then boots its ring-3 kernel, which runs natively here, with one vCPU and 64-bit programs only.",
        ]),
    }
}

fn huge_pages() -> Item {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field =
        |name: &str| meminfo.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()));
    let reserved = field("HugePages_Total:").unwrap_or_else(|| "0".into());
    let size = field("Hugepagesize:").unwrap_or_else(|| "unknown size".into());
    let transparent = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let mode = transparent.split(['[', ']']).nth(1).unwrap_or("never").to_owned();
    let found = format!("{reserved} reserved of {size}; transparent ones: {mode}");
    item("huge pages", false, found).missing_unless(
        reserved != "0" || mode != "never",
        &["Guests run without; with them they run a little faster: sysctl vm.nr_hugepages=N"],
    )
}

fn tap() -> Item {
    let name = "/dev/net/tun";
    match OpenOptions::new().read(true).write(true).open(name) {
        Ok(_) => item(name, false, "can be opened; --net works with a tap that is yours"),
        Err(error) => item(name, false, reason(&error)).missing(&[match error.kind() {
            io::ErrorKind::PermissionDenied => "Needed for --net: make it readable and writable for you.",
            _ => "Needed for --net: modprobe tun",
        }]),
    }
}

fn passt() -> Item {
    let name = "passt";
    match vmm_core::devices::virtio::net::passt::find() {
        Some(place) => item(name, false, format!("{place}; --net user works without root")),
        None => item(name, false, "not installed")
            .missing(&["Needed for --net user: install the package passt (apt-get install passt)."]),
    }
}

fn io_uring() -> Item {
    /// Bytes of struct io_uring_params.
    const PARAMS: usize = 120;
    const ENTRIES: libc::c_uint = 2;
    let name = "io_uring";
    let mut params = [0_u64; PARAMS / 8];
    // SAFETY: the call reads and fills in a struct io_uring_params, which is as large and aligned as `params`.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, ENTRIES, params.as_mut_ptr()) };
    if fd >= 0 {
        // SAFETY: the call has just made this descriptor for us; dropping it closes it.
        drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        return item(name, false, "can be set up");
    }
    let error = io::Error::last_os_error();
    item(name, false, reason(&error)).missing(&[match error.raw_os_error() {
        Some(libc::EPERM) => {
            "It is switched off (or a container forbids it): sysctl kernel.io_uring_disabled=0"
        }
        _ => "Use Linux 5.1 or newer, built with CONFIG_IO_URING.",
    }])
}

fn cgroups() -> Item {
    let name = "cgroups v2";
    match fs::read_to_string("/sys/fs/cgroup/cgroup.controllers") {
        Ok(controllers) => item(name, false, format!("controllers: {}", controllers.trim())),
        Err(_) => item(name, false, "not mounted at /sys/fs/cgroup")
            .missing(&["To limit what a VM may use: boot the host with systemd.unified_cgroup_hierarchy=1"]),
    }
}

fn user_namespaces() -> Item {
    let name = "user namespaces";
    // SAFETY: the flag gives this process other credentials and leaves descriptors and memory as they are.
    match unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWUSER) } {
        Ok(()) => item(name, false, "can be made"),
        Err(errno) => item(name, false, reason(&errno.into())).missing(&[
            "To confine a VM without root: sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000",
            "On Ubuntu also: sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        ]),
    }
}

/// What went wrong, in a few words without error numbers.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_lowercase()
}
