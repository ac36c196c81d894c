//! Snapshots of released versions, which are kept as text, are restored and go on.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use harness::local_kvm;
use vmm_core::devices::shape;
use vmm_core::hypervisor::HvError;
use vmm_core::hypervisor::fake::{FakeHypervisor, Step};
use vmm_core::{BuildError, Snapshot, SnapshotKind, StopReason, Vm, VmConfig, VmState};

use crate::GOLDEN;
use crate::host::{Host, TRANSPORTS};

/// The bytes of a file as text: lines of where and what, without zeroes, and the file's length.
fn to_text(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (nth, line) in bytes.chunks(32).enumerate().filter(|(_, line)| line.iter().any(|&byte| byte != 0)) {
        _ = write!(text, "{:08x} ", nth * 32);
        line.iter().for_each(|byte| _ = write!(text, "{byte:02x}"));
        text.push('\n');
    }
    text + &format!("{:08x}\n", bytes.len())
}

/// Makes the file that `text` is of.
fn to_file(text: &str, path: &Path) -> Result<()> {
    let file = File::create_new(path)?;
    for line in text.lines() {
        let (at, hex) = line.split_once(' ').unwrap_or((line, ""));
        let at = u64::from_str_radix(at, 16)?;
        let bytes = (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16));
        file.write_all_at(&bytes.collect::<Result<Vec<_>, _>>()?, at)?;
        if hex.is_empty() {
            file.set_len(at)?;
        }
    }
    Ok(())
}

/// A snapshot in tests/golden.
struct Golden(PathBuf);

impl Golden {
    /// All of this name, one for each version; with [`shape::WRITE`] in the environment, this version's is made by `make`, a
    /// function that saves a machine to a directory, if it is not there.
    fn all(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<Vec<Self>> {
        let golden = Path::new(GOLDEN);
        let ours = golden.join(env!("CARGO_PKG_VERSION")).join(name);
        if !ours.exists() && std::env::var_os(shape::WRITE).is_some() {
            let dir = tempfile::tempdir()?;
            let from = dir.path().join("snapshot");
            make(&from)?;
            fs::create_dir_all(&ours)?;
            fs::copy(from.join("manifest.json"), ours.join("manifest.json"))?;
            for file in ["state", "memory"] {
                fs::write(ours.join(file).with_extension("txt"), to_text(&fs::read(from.join(file))?))?;
            }
        }
        let versions = fs::read_dir(golden)?.map(|entry| Ok(entry?.path().join(name)));
        let all: Vec<Self> = versions
            .filter(|path| path.as_ref().is_ok_and(|path| path.is_dir()))
            .map(|path| path.map(Self))
            .collect::<Result<_>>()?;
        ensure!(ours.exists(), "there is none of this version; run 'cargo xtask golden'");
        Ok(all)
    }

    /// The snapshot as it was, in a directory.
    fn unpack(&self, to: &Path) -> Result<Snapshot> {
        fs::create_dir(to)?;
        fs::copy(self.0.join("manifest.json"), to.join("manifest.json"))?;
        for file in ["state", "memory"] {
            to_file(&fs::read_to_string(self.0.join(file).with_extension("txt"))?, &to.join(file))?;
        }
        Snapshot::open(to).with_context(|| format!("{} is not opened any more", self.0.display()))
    }
}

#[test]
fn devices_of_every_released_version_are_restored() -> Result<()> {
    for transport in TRANSPORTS {
        let made = Host::new()?;
        let make = |to: &Path| {
            Ok(made.machine(transport)?.snapshot_without_disks(to, SnapshotKind::Full).map(drop)?)
        };
        for golden in Golden::all(&format!("devices-{transport}"), make)? {
            let host = Host::new()?;
            let mut snapshot = golden.unpack(&host.path("snapshot"))?;
            let mut config = snapshot.config().clone();
            config.devices = host.config(transport)?.devices;
            snapshot.set_config(config)?;
            // The interrupt of the first device is acknowledged: it is there and answers.
            let script = vec![Step::In(0x71, 1), Step::TripleFault];
            let hypervisor = FakeHypervisor::new(script);
            let vm = Vm::restore(snapshot).hypervisor(Box::new(hypervisor)).build();
            let vm = vm.with_context(|| format!("{} is not restored any more", golden.0.display()))?;
            ensure!((vm.state(), vm.exit_status()) == (VmState::Paused, Some(7)), "{:?}", vm.exit_status());
            ensure!(vm.aliases().get("disk0").is_some_and(|alias| alias == "root"));
            vm.resume()?;
            ensure!(vm.wait() == StopReason::GuestReset, "{:?}", vm.state());
        }
    }
    Ok(())
}

/// Types a byte, and reads the two bytes that the guest answers with.
fn ask(vm: &Vm, console: &mut impl Read) -> Result<[u8; 2]> {
    vm.console_input().write_all(b"x")?;
    let mut answer = [0; 2];
    console.read_exact(&mut answer)?;
    Ok(answer)
}

#[test]
fn a_guest_of_every_released_version_goes_on() -> Result<()> {
    let Some(kvm) = local_kvm() else {
        println!("there is no /dev/kvm: left out");
        return Ok(());
    };
    println!("on {kvm:?}");
    let make = |to: &Path| {
        let host = Host::new()?;
        let config = VmConfig { devices: Vec::new(), serial: Default::default(), ..host.config("mmio")? };
        let vm = Vm::builder(config).build()?;
        let mut console = vm.take_console().context("it has a console")?;
        vm.start()?;
        console.read_exact(&mut [0; 3])?;
        for count in 1..=3 {
            ensure!(ask(&vm, &mut console)? == [count; 2], "the guest counts");
        }
        vm.snapshot(to, SnapshotKind::Full)?;
        Ok(())
    };
    for golden in Golden::all("guest", make)? {
        let host = Host::new()?;
        let snapshot = golden.unpack(&host.path("snapshot"))?;
        let vm = match Vm::restore(snapshot).other_processor(true).build() {
            Err(BuildError::Hypervisor(error @ (HvError::Msr { .. } | HvError::Frequency { .. }))) => {
                println!("{} was made on a processor that this host has not: {error}", golden.0.display());
                continue;
            }
            built => built.with_context(|| format!("{} is not restored any more", golden.0.display()))?,
        };
        let mut console = vm.take_console().context("it has a console")?;
        vm.resume()?;
        ensure!(ask(&vm, &mut console)? == [4; 2], "{}: it counts on", golden.0.display());
    }
    Ok(())
}
