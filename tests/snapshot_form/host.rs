//! Machines with a device of each kind, on the fake hypervisor.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;

use anyhow::Result;
use harness::micro::Micro;
use serde_json::json;
use tempfile::TempDir;
use vmm_core::hypervisor::fake::{FakeHypervisor, Step};
use vmm_core::{Vm, VmConfig};

pub const TRANSPORTS: [&str; 2] = ["mmio", "pci"];

/// A directory with what machines of these tests have of the host.
pub struct Host(TempDir);

impl Host {
    pub fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        for name in ["disk", "pmem"] {
            File::create(dir.path().join(name))?.set_len(2 << 20)?;
        }
        echo().write(&dir.path().join("kernel"))?;
        Ok(Self(dir))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A machine with a device of each kind that needs no network.
    pub fn config(&self, transport: &str) -> Result<VmConfig> {
        Ok(serde_json::from_value(json!({
            "kernel": self.path("kernel"),
            "memory": "4M",
            "serial": "null",
            "transport": transport,
            "track_dirty": true,
            "devices": [
                {"kind": "disk", "path": self.path("disk"), "bandwidth": "1G/1s"},
                {"kind": "pmem", "path": self.path("pmem")},
                {"kind": "rng"},
                {"kind": "balloon"},
                {"kind": "console", "null": true},
                {"kind": "vsock", "path": self.path("vsock")},
            ],
        }))?)
    }

    /// That machine on the fake hypervisor, after its guest has reported an exit status.
    pub fn machine(&self, transport: &str) -> Result<Vm> {
        let script = vec![Step::Out(0x611, vec![7]), Step::Out(0x70, vec![4]), Step::Out(0xcf8, vec![0; 4])];
        let hypervisor = FakeHypervisor::new(script);
        let aliases = BTreeMap::from([("disk0".to_owned(), "root".to_owned())]);
        let builder = Vm::builder(self.config(transport)?).aliases(aliases);
        let vm = builder.hypervisor(Box::new(hypervisor.clone())).build()?;
        vm.start()?;
        while hypervisor.steps_done() < 3 {
            std::thread::yield_now();
        }
        Ok(vm)
    }
}

/// A guest that answers each byte of input with how many there were, once as memory has it and once as a register.
fn echo() -> Micro {
    Micro::new()
        .out8(0x3fc, 8)
        .out8(0x3f9, 1)
        .print("up\n")
        .write32(0x20_0000, 0)
        .raw(&[0x31, 0xdb, 0xbe, 0, 0, 0x20, 0]) // xor ebx, ebx; mov esi, 0x200000
        // again: mov dx, 0x3fd; in al, dx; test al, 1; jz again
        .raw(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7])
        // mov dx, 0x3f8; in al, dx; inc dword [esi]; inc ebx
        .raw(&[0x66, 0xba, 0xf8, 0x03, 0xec, 0xff, 0x06, 0xff, 0xc3])
        // mov al, [esi]; out dx, al; mov al, bl; out dx, al; jmp again
        .raw(&[0x8a, 0x06, 0xee, 0x88, 0xd8, 0xee, 0xeb, 0xe6])
}
