//! Snapshots are true: what is saved again is the same, byte for byte, but for a list of clocks and ids.
//! On this machine's /dev/kvm.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use harness::local_kvm;
use harness::micro::Micro;
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm_core::devices::snapshot::Saved;
use vmm_core::hypervisor::saved::IrqchipState;
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

/// A chain of snapshots of machines that are restored and do not run.
fn stays_the_same(setup: &Setup) -> Result<()> {
    for (from, to) in [("0", "1"), ("1", "2")] {
        let vm = setup.restore(from)?;
        setup.save(&vm, to)?;
        drop(vm);
        let (sections, pages) = setup.differences(from, to)?;
        ensure!(sections.is_empty() && pages.is_empty(), "{sections:?} {pages:?}");
        ensure!(manifest(&setup.path(from))? == manifest(&setup.path(to))?, "the manifest is another");
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
