//! Snapshots are true: what is saved again is the same, byte for byte, but for a list of clocks and ids.
//! On this machine's /dev/kvm.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use harness::micro::{LOAD, Micro};
use harness::{Kernel, local_kvm};
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm_core::devices::snapshot::Saved;
use vmm_core::hypervisor::saved::{IrqchipState, VcpuState};
use vmm_core::snapshot::state_file::Section;
use vmm_core::{Snapshot, SnapshotKind, Vm, VmConfig, VmState};

/// Where each machine has its generation id, in its own page.
const GENERATION_PAGE: usize = 0xff;

/// A directory with snapshots of one machine.
struct Setup(TempDir);

impl Setup {
    fn new() -> Result<Self> {
        ensure!(local_kvm().is_some(), "this needs a /dev/kvm on this machine");
        Ok(Self(tempfile::tempdir()?))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A machine that has printed `up`.
    fn start(&self, config: Value) -> Result<Vm> {
        let config: VmConfig = serde_json::from_value(config)?;
        let vm = Vm::builder(config).build()?;
        let mut console = vm.take_console().context("it has a console")?;
        vm.start()?;
        let mut said = Vec::new();
        while !said.windows(3).any(|word| word == b"up\n" || word == b"up\r") {
            let mut byte = [0];
            ensure!(console.read(&mut byte)? == 1, "{}", String::from_utf8_lossy(&said));
            said.extend(byte);
        }
        Ok(vm)
    }

    fn save(&self, vm: &Vm, name: &str) -> Result<()> {
        vm.snapshot(&self.path(name), SnapshotKind::Full)?;
        Ok(())
    }

    /// The machine of a snapshot, which does not run.
    fn restore(&self, name: &str) -> Result<Vm> {
        let vm = Vm::restore(Snapshot::open(&self.path(name))?).build()?;
        ensure!(vm.state() == VmState::Paused, "{:?}", vm.state());
        Ok(vm)
    }

    /// Names of sections and numbers of pages that differ.
    fn differences(&self, one: &str, other: &str) -> Result<(Vec<String>, Vec<usize>)> {
        let [first, second] = [one, other].map(|name| Snapshot::open(&self.path(name)));
        let (first, second) = (first?, second?);
        let names = |snapshot: &Snapshot| -> Vec<String> {
            snapshot.sections().iter().map(|section| section.name.clone()).collect()
        };
        ensure!(names(&first) == names(&second), "the sections are others");
        let mut sections = Vec::new();
        for (one, other) in first.sections().iter().zip(second.sections().iter()) {
            if without_clocks(one)? != without_clocks(other)? {
                sections.push(one.name.clone());
            }
        }
        let (one, other) =
            (fs::read(self.path(one).join("memory"))?, fs::read(self.path(other).join("memory"))?);
        ensure!(one.len() == other.len(), "the memory is larger or smaller");
        let pages = one.chunks(4096).zip(other.chunks(4096)).enumerate();
        Ok((sections, pages.filter(|(_, (one, other))| one != other).map(|(page, _)| page).collect()))
    }
}

/// A section without a reading of the host's clock: when a counter of the i8254 was loaded, which a restore does anew.
fn without_clocks(section: &Section) -> Result<Saved> {
    if section.name != "irqchip" {
        return Ok(section.saved.clone());
    }
    let mut irqchip: IrqchipState = section.saved.get()?;
    for channel in irqchip.pit.iter_mut().flat_map(|pit| &mut pit.channels) {
        channel.count_load_time = 0;
    }
    Ok(Saved::of(&irqchip)?)
}

/// Everything but `id` and `made_at` of a manifest.
fn manifest(dir: &Path) -> Result<Value> {
    let mut manifest: Value = serde_json::from_slice(&fs::read(dir.join("manifest.json"))?)?;
    for key in ["id", "made_at"] {
        manifest.as_object_mut().and_then(|fields| fields.remove(key)).context("it is there")?;
    }
    Ok(manifest)
}

/// A guest that prints `up` and halts for ever, with interrupts off.
fn halted() -> Micro {
    Micro::new().print("up\n").raw(&[0xf4, 0xeb, 0xfd])
}

/// MSR_KVM_WALL_CLOCK_NEW, MSR_KVM_SYSTEM_TIME_NEW and MSR_KVM_STEAL_TIME.
const CLOCK_MSRS: [u32; 3] = [0x4b56_4d00, 0x4b56_4d01, 0x4b56_4d03];

/// The pages that a saved guest has given to KVM, which writes its clocks there when a vCPU is restored.
fn clock_pages(dir: &Path) -> Result<Vec<usize>> {
    let snapshot = Snapshot::open(dir)?;
    let mut vcpus = snapshot.sections().iter().filter(|section| section.name.starts_with("vcpu"));
    let vcpu: VcpuState = vcpus.next().context("it has a vCPU")?.saved.get()?;
    let clocks = vcpu.msrs.into_iter().filter(|(index, value)| CLOCK_MSRS.contains(index) && *value != 0);
    Ok(clocks.map(|(_, address)| (address / 4096) as usize).collect())
}

/// A chain of snapshots of machines that are restored and do not run.
fn stays_the_same(setup: &Setup) -> Result<()> {
    for (from, to) in [("0", "1"), ("1", "2")] {
        let vm = setup.restore(from)?;
        setup.save(&vm, to)?;
        drop(vm);
        let (sections, pages) = setup.differences(from, to)?;
        let clocks = clock_pages(&setup.path(from))?;
        let others: Vec<_> = pages.iter().filter(|page| !clocks.contains(page)).collect();
        ensure!(
            sections.is_empty() && others.is_empty(),
            "{sections:?} {others:?}, and clocks in {clocks:?}"
        );
        let [mut before, mut after] = [manifest(&setup.path(from))?, manifest(&setup.path(to))?];
        if !pages.is_empty() {
            // Checksums are of clocks, too.
            for manifest in [&mut before, &mut after] {
                manifest["memory"]["crc32"] = Value::Null;
                manifest["state_crc32"] = Value::Null;
            }
        }
        ensure!(before == after, "the manifest is another: {before} {after}");
    }
    Ok(())
}

#[test]
fn a_micro_guest_that_does_not_go_on_is_saved_as_it_was() -> Result<()> {
    let setup = Setup::new()?;
    halted().write(&setup.path("kernel"))?;
    let vm = setup.start(json!({"kernel": setup.path("kernel"), "memory": "16M", "devices": []}))?;
    setup.save(&vm, "0")?;
    drop(vm);
    stays_the_same(&setup)
}

#[test]
fn an_idle_linux_guest_is_saved_as_it_was() -> Result<()> {
    let setup = Setup::new()?;
    let acceleration = local_kvm().context("this needs a /dev/kvm on this machine")?;
    fs::write(setup.path("initrd"), harness::initramfs_with(&[])?)?;
    fs::write(setup.path("disk"), [0; 1 << 20])?;
    for transport in ["mmio", "pci"] {
        let vm = setup.start(json!({
            "kernel": Kernel::ours(acceleration).file()?,
            "initrd": setup.path("initrd"),
            "memory": "128M",
            "transport": transport,
            "append": "-- sh -c \"echo up; exec sleep 1000\"",
            "devices": [
                {"kind": "disk", "path": setup.path("disk"), "ro": true},
                {"kind": "balloon", "size": "8M"},
                {"kind": "vsock", "path": setup.path("vsock")},
                {"kind": "rng"},
            ],
        }))?;
        setup.save(&vm, "0")?;
        drop(vm);
        stays_the_same(&setup).with_context(|| transport.to_owned())?;
        ["0", "1", "2"].into_iter().try_for_each(|name| fs::remove_dir_all(setup.path(name)))?;
    }
    Ok(())
}

#[test]
fn a_halted_guest_that_goes_on_differs_in_clocks_and_ids_and_in_nothing_else() -> Result<()> {
    let setup = Setup::new()?;
    halted().write(&setup.path("kernel"))?;
    let vm = setup
        .start(json!({"kernel": setup.path("kernel"), "memory": "16M", "devices": [{"kind": "rng"}]}))?;
    setup.save(&vm, "0")?;
    drop(vm);
    for (from, to, allowed) in [
        // The interrupt that tells of the new generation id waits, since the guest takes none.
        ("0", "1", &["clock", "irqchip", "boot"][..]),
        ("1", "2", &["clock", "boot"]),
        ("2", "3", &["clock", "boot"]),
    ] {
        let vm = setup.restore(from)?;
        vm.resume()?;
        vm.pause()?;
        setup.save(&vm, to)?;
        drop(vm);
        let (sections, pages) = setup.differences(from, to)?;
        ensure!(sections.iter().all(|name| allowed.contains(&&**name)), "{from} to {to}: {sections:?}");
        ensure!(pages == [GENERATION_PAGE], "{from} to {to}: pages {pages:?}");
    }
    Ok(())
}

/// A guest that prints `up`, and then traps for ever: a program at privilege level 3 counts what it does, the handler what
/// comes. Each 256th is a `.`, and one that did not come an `x`.
fn traps() -> Micro {
    const TABLES: u32 = 0x18_0000;
    const GDT: u32 = TABLES + 0x3000;
    const IDT: u32 = TABLES + 0x4000;
    const TSS: u32 = TABLES + 0x5000;
    const STACK: u32 = TABLES + 0x8000;
    const MADE: u32 = TABLES + 0x8000;
    const CAME: u32 = TABLES + 0x8008;
    const PROGRAM: usize = 0x600;
    const HANDLER: usize = 0x700;
    let [program, handler] = [PROGRAM, HANDLER].map(|offset| LOAD + offset as u32);
    // An instruction, and the address that is its last part.
    let on = |code: &[u8], addr: u32| [code, &addr.to_le_bytes()].concat();

    // The first 2 MiB are anybody's. Then what the processor wants: code and data of both levels, a TSS, one gate.
    let tables = [
        (TABLES, u64::from(TABLES) + 0x1007),
        (TABLES + 0x1000, u64::from(TABLES) + 0x2007),
        (TABLES + 0x2000, 0x87),
        (GDT + 0x08, 0x00af_9b00_0000_ffff),
        (GDT + 0x10, 0x00cf_9300_0000_ffff),
        (GDT + 0x18, 0x00af_fb00_0000_ffff),
        (GDT + 0x20, 0x00cf_f300_0000_ffff),
        (GDT + 0x28, 0x8900_0000_0067 | u64::from(TSS) << 16),
        (TSS + 4, STACK.into()),
        (
            IDT + 3 * 16,
            u64::from(handler & 0xffff_0000) << 32 | 0xee00_0008_0000 | u64::from(handler & 0xffff),
        ),
        // What LGDT and LIDT read.
        (TABLES + 0x6000, u64::from(GDT) << 16 | 0x37),
        (TABLES + 0x6010, u64::from(IDT) << 16 | 0xfff),
    ];
    let code = Micro::new().linux_entry().print("up\n");
    tables
        .into_iter()
        .fold(code, |code, (addr, value)| code.write64(addr, value))
        .eax(TABLES)
        .raw(&[0x0f, 0x22, 0xd8]) // mov cr3, rax
        .raw(&on(&[0x0f, 0x01, 0x14, 0x25], TABLES + 0x6000)) // lgdt [..]
        .raw(&on(&[0x0f, 0x01, 0x1c, 0x25], TABLES + 0x6010)) // lidt [..]
        .raw(&[0x66, 0xb8, 0x28, 0x00, 0x0f, 0x00, 0xd8]) // mov ax, 0x28; ltr ax
        .raw(&on(&[0xbc], STACK)) // mov esp, STACK
        .raw(&[0x6a, 0x23, 0x54, 0x6a, 0x02, 0x6a, 0x1b]) // push 0x23; push rsp; push 2; push 0x1b
        .raw(&on(&[0x68], program)) // push program
        .raw(&[0x48, 0xcf]) // iretq
        .at(PROGRAM)
        .raw(&on(&[0x48, 0xff, 0x04, 0x25], MADE)) // inc qword [MADE]
        .raw(&[0xcc, 0xeb, 0xf5]) // int3; jmp program
        .at(HANDLER)
        .raw(&on(&[0x48, 0xff, 0x04, 0x25], CAME)) // inc qword [CAME]
        .raw(&on(&[0x48, 0x8b, 0x04, 0x25], MADE)) // mov rax, [MADE]
        .raw(&on(&[0x48, 0x3b, 0x04, 0x25], CAME)) // cmp rax, [CAME]
        .raw(&[0x74, 0x0c]) // je right
        .raw(&on(&[0x48, 0x89, 0x04, 0x25], CAME)) // mov [CAME], rax
        .raw(&[0xb0, b'x', 0xeb, 0x06]) // mov al, 'x'; jmp print
        .raw(&[0x84, 0xc0, 0x75, 0x07, 0xb0, b'.']) // right: test al, al; jnz done; mov al, '.'
        .print_al() // print: mov dx, 0x3f8; out dx, al
        .raw(&[0x48, 0xcf]) // done: iretq
}

#[test]
fn a_trap_that_is_on_its_way_comes_in_the_restored_machine() -> Result<()> {
    let setup = Setup::new()?;
    traps().write(&setup.path("kernel"))?;
    let mut vm = setup.start(json!({"kernel": setup.path("kernel"), "memory": "16M", "devices": []}))?;
    for number in 0..50 {
        setup.save(&vm, "0")?;
        drop(vm);
        vm = setup.restore("0")?;
        let mut console = vm.take_console().context("it has a console")?;
        vm.resume()?;
        let mut byte = [0];
        ensure!(console.read(&mut byte)? == 1, "it has ended");
        ensure!(byte == *b".", "one did not come in machine {number}");
    }
    Ok(())
}
