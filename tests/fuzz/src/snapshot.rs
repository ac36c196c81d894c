//! Snapshots that are almost right: files of any content, and machines on the fake hypervisor that are restored from states
//! which somebody has changed.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use arbitrary::{Arbitrary, Unstructured};
use ciborium::Value;
use devices::snapshot::Saved;
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;
use vmm_core::hypervisor::fake::{FakeHypervisor, Step};
use vmm_core::snapshot::state_file::Sections;
use vmm_core::x86_64::layout;
use vmm_core::{Snapshot, SnapshotKind, Vm, VmConfig};

use crate::edit::Edit;
use crate::micro::Micro;

const RAM: u64 = 4 << 20;
/// Where rings are, and how much room a queue's have.
const RINGS: u64 = 0x20_0000;
const ROOM: u64 = 0x4000;
/// Queues of each device that are set up.
const QUEUES: u64 = 3;
/// Most things that a restored guest does.
const MAX_POKES: usize = 32;
/// The section of a state file that the manifest is in.
const MANIFEST: &str = "manifest";

/// One run.
#[derive(Arbitrary, Debug)]
enum Input<'a> {
    /// A state file.
    State(&'a [u8]),
    /// The text of a manifest.
    Manifest(&'a str),
    /// A manifest with changes.
    Edited { pci: bool, diff: bool, edits: Vec<Edit> },
    /// Pages of a diff, in units of so many bytes.
    Pages { odd: bool, pages: Vec<(u16, u16)> },
    /// A section with changes, and what the guest does that goes on with it.
    Machine { pci: bool, section: u8, edits: Vec<Edit>, pokes: Vec<Poke> },
    /// Sections in another order, twice, or left out.
    Order { pci: bool, swaps: Vec<(u8, u8)>, twice: Option<u8>, without: Option<u8> },
}

/// One thing that a guest does.
#[derive(Arbitrary, Debug)]
enum Poke {
    Kick { device: u8, queue: u8 },
    Read { device: u8, offset: u16, width: u8 },
    Write { device: u8, offset: u16, bytes: [u8; 4] },
    Ring { offset: u16, bytes: [u8; 8] },
    In { port: u16 },
    Out { port: u16, byte: u8 },
}

/// A file in memory, and a path to it.
struct InMemory {
    file: File,
    path: PathBuf,
}

impl InMemory {
    fn new(bytes: &[u8]) -> Self {
        let file = memfd_create("snapshot", MemfdFlags::CLOEXEC).expect("memory for a file");
        let mut file = File::from(file);
        file.write_all(bytes).expect("memory for a file");
        Self::over(file)
    }

    fn over(file: File) -> Self {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        Self { file, path }
    }
}

/// A machine with one device of every kind that needs nothing of the host's, saved while its guest used them.
struct Parent {
    pci: bool,
    state: InMemory,
    memory: InMemory,
    /// Without the manifest.
    sections: Sections,
    manifest: Value,
    /// Where the devices are.
    devices: Vec<u64>,
    _files: [InMemory; 3],
}

static PARENTS: LazyLock<[Parent; 2]> = LazyLock::new(|| [Parent::new(false), Parent::new(true)]);

impl Parent {
    fn new(pci: bool) -> Self {
        let kernel = InMemory::new(&Micro::new().reset().elf());
        let image = || {
            let image = InMemory::new(&[]);
            image.file.set_len(2 << 20).expect("memory for a file");
            image
        };
        let files = [kernel, image(), image()];
        let dir = tempfile::tempdir().expect("a directory");
        let config: VmConfig = serde_json::from_value(json!({
            "kernel": files[0].path,
            "memory": RAM,
            "serial": "null",
            "transport": if pci { "pci" } else { "mmio" },
            "devices": [
                {"kind": "disk", "path": files[1].path, "ro": true, "engine": "threads"},
                {"kind": "pmem", "path": files[2].path, "ro": true},
                {"kind": "rng"},
                {"kind": "balloon"},
                {"kind": "console", "null": true},
                {"kind": "vsock", "path": socket_dir(dir.path())},
            ],
        }))
        .expect("a configuration");
        let (count, step) = (config.devices.len() as u64, if pci { 0x8000 } else { 0x1000 });
        let base = if pci { layout::PCI_WINDOW } else { layout::VIRTIO_MMIO };
        let devices: Vec<u64> = (0..count).map(|device| base + device * step).collect();
        let script: Vec<Step> = (0..count).flat_map(|nth| start(pci, nth, devices[nth as usize])).collect();
        let steps = script.len() as u64;
        let hypervisor = FakeHypervisor::new(script);
        let vm = Vm::builder(config).hypervisor(Box::new(hypervisor.clone())).build().expect("a machine");
        vm.start().expect("it starts");
        while hypervisor.steps_done() < steps {
            std::thread::yield_now();
        }
        let [state, memory] = ["state", "memory"].map(|name| dir.path().join(name));
        vm.snapshot_to_files(&state, &memory, SnapshotKind::Full).expect("a snapshot");
        drop(vm);
        let snapshot = Snapshot::open_files(&state, &memory).expect("a good snapshot");
        let places = snapshot.manifest().devices.iter().map(|device| device.address);
        assert!(places.eq(devices.iter().copied()), "devices are where they are thought to be");
        let open = |path| InMemory::over(File::open(path).expect("a file of the snapshot"));
        Self {
            pci,
            state: open(&state),
            memory: open(&memory),
            sections: snapshot.sections().clone(),
            manifest: Value::serialized(snapshot.manifest()).expect("a value"),
            devices,
            _files: files,
        }
    }

    /// A snapshot of these sections and this manifest.
    fn with(&self, sections: &Sections, manifest: &Value) -> Option<(Snapshot, InMemory)> {
        let text = serde_json::to_string(&manifest.deserialized::<serde_json::Value>().ok()?).ok()?;
        let state = state_file(sections.clone(), text)?;
        let snapshot = Snapshot::open_files(&state.path, &self.memory.path).ok()?;
        Some((snapshot, state))
    }

    /// The manifest of a diff to this one.
    fn diff(&self, pages: &[(u64, u64)]) -> Value {
        let mut manifest: serde_json::Value = self.manifest.deserialized().expect("a manifest");
        manifest["memory"]["diff"] = json!({
            "parent": manifest["id"],
            "path": self.state.path,
            "memory": self.memory.path,
            "pages": pages,
        });
        Value::serialized(&manifest).expect("a value")
    }
}

/// A state file with a manifest.
fn state_file(mut sections: Sections, manifest: String) -> Option<InMemory> {
    sections.push(MANIFEST, Saved { version: 1, value: Value::Text(manifest) });
    Some(InMemory::new(&sections.to_bytes().ok()?))
}

/// Where the socket device's socket is, in a directory that is there only as long as a machine.
fn socket_dir(dir: &Path) -> PathBuf {
    dir.join("vsock")
}

/// What starts a device and gives it a request on each queue.
fn start(pci: bool, nth: u64, at: u64) -> Vec<Step> {
    let word = |offset: u64, value: u32| Step::Write(at + offset, value.to_le_bytes().to_vec());
    let half = |offset: u64, value: u16| Step::Write(at + offset, value.to_le_bytes().to_vec());
    let byte = |offset: u64, value: u8| Step::Write(at + offset, vec![value]);
    let rings = |queue: u64| RINGS + (nth * QUEUES + queue) * ROOM;
    let requests = (0..QUEUES).flat_map(move |queue| {
        let desc = [&(rings(queue) + 0x3000).to_le_bytes()[..], &[64, 0, 0, 0, 2, 0, 0, 0]].concat();
        [Step::Poke(rings(queue), desc), Step::Poke(rings(queue) + 0x1002, vec![1, 0])]
    });
    let mut script: Vec<Step> = requests.collect();
    if pci {
        script.push(Step::Write(layout::PCI_ECAM + ((nth + 1) << 15) + 4, vec![6, 0]));
        script.extend([byte(20, 0), byte(20, 3), word(8, 1), word(12, 1), byte(20, 11)]);
        for queue in 0..QUEUES {
            script.extend([half(22, queue as u16), half(24, 8)]);
            let places = [(32, 0), (40, 0x1000), (48, 0x2000)];
            script.extend(places.map(|(offset, more)| word(offset, (rings(queue) + more) as u32)));
            script.push(half(28, 1));
        }
        script.push(byte(20, 15));
        script.extend((0..QUEUES).map(|queue| half(0x3000 + 4 * queue, queue as u16)));
    } else {
        script.extend([word(0x70, 0), word(0x70, 3), word(0x24, 1), word(0x20, 1), word(0x70, 11)]);
        for queue in 0..QUEUES {
            script.extend([word(0x30, queue as u32), word(0x38, 8)]);
            let places = [(0x80, 0), (0x90, 0x1000), (0xa0, 0x2000)];
            script.extend(places.map(|(offset, more)| word(offset, (rings(queue) + more) as u32)));
            script.push(word(0x44, 1));
        }
        script.push(word(0x70, 15));
        script.extend((0..QUEUES).map(|queue| word(0x50, queue as u32)));
    }
    script
}

impl Poke {
    fn step(&self, parent: &Parent) -> Step {
        let at = |device: u8| parent.devices[usize::from(device) % parent.devices.len()];
        match *self {
            Self::Kick { device, queue } => {
                let offset = if parent.pci { 0x3000 + 4 * u64::from(queue) } else { 0x50 };
                Step::Write(at(device) + offset, u32::from(queue).to_le_bytes().into())
            }
            Self::Read { device, offset, width } => {
                Step::Read(at(device) + u64::from(offset), usize::from(width % 8) + 1)
            }
            Self::Write { device, offset, bytes } => {
                Step::Write(at(device) + u64::from(offset), bytes.into())
            }
            Self::Ring { offset, bytes } => Step::Poke(RINGS + u64::from(offset), bytes.into()),
            Self::In { port } => Step::In(port, 1),
            Self::Out { port, byte } => Step::Out(port, vec![byte]),
        }
    }
}

/// Does what `input` says: an error each time, or a machine that goes on.
pub fn load(input: &[u8]) {
    if let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(input)) {
        run(&input);
    }
}

fn run(input: &Input<'_>) {
    let parent = |pci: bool| &PARENTS[usize::from(pci)];
    match input {
        Input::State(bytes) => {
            let Ok(sections) = Sections::from_bytes(bytes) else { return };
            let bytes = sections.to_bytes().expect("what was read is written");
            let again = Sections::from_bytes(&bytes).expect("what was written is read");
            assert_eq!(again.to_bytes().expect("and written"), bytes);
        }
        Input::Manifest(text) => {
            let Some(state) = state_file(Sections::default(), (*text).into()) else { return };
            _ = Snapshot::open_files(&state.path, &parent(false).memory.path);
        }
        Input::Edited { pci, diff, edits } => {
            let parent = parent(*pci);
            let mut manifest = if *diff { parent.diff(&[(0, 4096)]) } else { parent.manifest.clone() };
            edits.iter().for_each(|edit| edit.apply(&mut manifest));
            // It is not built: what a configuration names is opened, and emptied.
            _ = parent.with(&parent.sections, &manifest);
        }
        Input::Pages { odd, pages } => {
            let unit = if *odd { 1 } else { 4096 };
            let pages: Vec<_> =
                pages.iter().map(|&(start, len)| (u64::from(start) * unit, u64::from(len) * unit)).collect();
            let parent = parent(false);
            if let Some((snapshot, _state)) = parent.with(&parent.sections, &parent.diff(&pages)) {
                go_on(snapshot, parent, &[]);
            }
        }
        Input::Machine { pci, section, edits, pokes } => {
            let parent = parent(*pci);
            let at = usize::from(*section) % parent.sections.iter().count();
            let mut sections = Sections::default();
            for (nth, section) in parent.sections.iter().enumerate() {
                let mut saved = section.saved.clone();
                if nth == at {
                    edits.iter().for_each(|edit| edit.apply(&mut saved.value));
                }
                sections.push(section.name.as_str(), saved);
            }
            if let Some((snapshot, _state)) = parent.with(&sections, &parent.manifest) {
                go_on(snapshot, parent, pokes);
            }
        }
        Input::Order { pci, swaps, twice, without } => {
            let parent = parent(*pci);
            let mut all: Vec<_> = parent.sections.iter().cloned().collect();
            let count = all.len();
            let at = |nth: u8| usize::from(nth) % count;
            swaps.iter().for_each(|&(one, other)| all.swap(at(one), at(other)));
            if let Some(nth) = twice {
                all.push(all[at(*nth)].clone());
            }
            if let Some(nth) = without {
                all.remove(at(*nth));
            }
            // One that is twice may be the one that is left out.
            let names: BTreeSet<&str> = all.iter().map(|section| &*section.name).collect();
            let whole = (names.len(), all.len()) == (count, count);
            let mut sections = Sections::default();
            all.into_iter().for_each(|section| sections.push(section.name, section.saved));
            match parent.with(&sections, &parent.manifest) {
                Some((snapshot, _state)) => assert_eq!(go_on(snapshot, parent, &[]), whole),
                None => assert!(!whole, "the order of sections does not matter"),
            }
        }
    }
}

/// Lets a snapshot go on, if it can; returns whether it can.
fn go_on(mut snapshot: Snapshot, parent: &Parent, pokes: &[Poke]) -> bool {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = serde_json::to_value(snapshot.config()).expect("a configuration");
    config["devices"][5]["path"] = json!(socket_dir(dir.path()));
    let config = serde_json::from_value(config).expect("a configuration");
    snapshot.set_config(config).expect("a socket may be elsewhere");
    let mut script: Vec<Step> = pokes.iter().take(MAX_POKES).map(|poke| poke.step(parent)).collect();
    script.push(Step::TripleFault);
    let hypervisor = FakeHypervisor::new(script);
    let Ok(vm) = Vm::restore(snapshot).hypervisor(Box::new(hypervisor)).build() else { return false };
    vm.resume().expect("what was restored goes on");
    let reason = vm.wait();
    assert!(!matches!(reason, vmm_core::StopReason::Failed(_)), "{reason:?}");
    true
}
