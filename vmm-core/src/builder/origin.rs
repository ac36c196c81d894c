//! What a machine begins with: a kernel, or a snapshot. The only place where boot and restore differ.

use std::path::Path;

use devices::model::VirtioDevice;
use kvm_bindings::CpuId;

use super::BuildError;
use crate::config::{ConfigError, VmConfig, split_command_line};
use crate::hypervisor::saved::VcpuState;
use crate::hypervisor::{HvError, Hypervisor};
use crate::machine::{MachineState, PciAccess};
use crate::memory::{GuestRam, HUGE_PAGE, HugePages, RamError};
use crate::snapshot::Snapshot;
use crate::snapshot::memory_file::{MemoryMode, PAGE};
use crate::snapshot::state_file::Sections;
use crate::x86_64::kernel::{self, Kernel};
use crate::x86_64::{MmioSlot, Slots, cpuid, features, layout};

/// What a machine begins with.
pub(super) enum Origin {
    Boot(Boot),
    Snapshot(Box<Snapshot>, MachineState),
}

/// A kernel in memory, and what it is to know.
pub(super) struct Boot {
    pub kernel: Kernel,
    pub initrd: Option<kernel::Initrd>,
    pub cmdline: String,
    pub pci: PciAccess,
}

impl Origin {
    /// Loads the kernel of `config`.
    pub fn boot(
        config: &VmConfig,
        ram: &GuestRam,
        slots: &Slots,
        devices: &[Box<dyn VirtioDevice>],
    ) -> Result<Self, BuildError> {
        let path = config.kernel.as_deref().ok_or(ConfigError::NoKernel)?;
        // The image, and as much again, which a kernel fills while it boots. An error is the loader's to tell.
        let image = std::fs::metadata(path).map_or(0, |meta| meta.len());
        ram.prefer_huge_pages(layout::HIGH_RAM.saturating_add(image.saturating_mul(2)));
        let kernel = kernel::load(ram.memory(), path, config.boot_protocol)?;
        let initrd = config.initrd.as_deref();
        let initrd = initrd.map(|path| kernel::load_initrd(ram.memory(), path, &kernel)).transpose()?;
        let cmdline = command_line(config, &kernel, slots, device_parameters(config, devices))?;
        let pci = PciAccess::of(&kernel, slots, &cmdline);
        Ok(Self::Boot(Boot { kernel, initrd, cmdline, pci }))
    }

    pub fn snapshot(snapshot: Snapshot) -> Result<Self, BuildError> {
        let state = snapshot.sections.state("machine").map_err(BuildError::State)?;
        Ok(Self::Snapshot(Box::new(snapshot), state))
    }

    /// A kernel with ACPI believes that there is no i8254, one without may calibrate its clocks with it.
    pub fn pit(&self) -> bool {
        match self {
            Self::Boot(boot) => !boot.kernel.has_acpi,
            Self::Snapshot(_, state) => state.pit,
        }
    }

    pub fn pci(&self) -> PciAccess {
        match self {
            Self::Boot(boot) => boot.pci,
            Self::Snapshot(_, state) => state.pci,
        }
    }
}

/// The RAM of a machine, with what it begins with: zeroes, or the memory of a snapshot.
pub(super) fn memory(
    config: &VmConfig,
    snapshot: Option<&Snapshot>,
    mode: MemoryMode,
    handler: Option<&Path>,
) -> Result<GuestRam, RamError> {
    let (size, backing) = (config.memory.0, config.backing());
    let reserved = backing.huge_pages == HugePages::Reserved;
    let image = snapshot.and_then(|snapshot| snapshot.image.clone());
    match (image, handler) {
        (_, Some(socket)) => {
            let mut ram = GuestRam::new(size, backing, None)?;
            ram.hand_faults_to(socket, if reserved { HUGE_PAGE } else { PAGE })?;
            Ok(ram)
        }
        (Some(image), None) if mode == MemoryMode::Uffd && !backing.shared && !reserved => {
            let mut ram = GuestRam::new(size, backing, None)?;
            ram.fill_on_demand(image, snapshot.and_then(Snapshot::touched))?;
            Ok(ram)
        }
        (image, None) => GuestRam::new(size, backing, image.map(|image| (image, mode))),
    }
}

/// The vCPUs of a snapshot.
pub(super) fn saved_vcpus(config: &VmConfig, saved: &Sections) -> Result<Vec<VcpuState>, BuildError> {
    (0..config.cpus).map(|id| saved.whole_state(&format!("vcpu{id}")).map_err(BuildError::State)).collect()
}

/// Fails if this host lacks a feature of the processor that the guest of a snapshot has seen.
pub(super) fn has_features(
    hypervisor: &dyn Hypervisor,
    config: &VmConfig,
    saved: &[VcpuState],
) -> Result<(), BuildError> {
    let Some(first) = saved.first() else { return Ok(()) };
    let offered = cpuid_of(hypervisor, 0, config.cpus)?;
    match &features::missing(&first.cpuid, offered.as_slice())[..] {
        [] => Ok(()),
        missing => Err(BuildError::Features { missing: missing.join(", ") }),
    }
}

/// The CPUID leaves that vCPU `id` gets here.
fn cpuid_of(hypervisor: &dyn Hypervisor, id: u8, cpus: u8) -> Result<CpuId, HvError> {
    let supported = hypervisor.supported_cpuid()?;
    cpuid::for_vcpu(&supported, id, cpus).map_err(|_| HvError::call("KVM_SET_CPUID2", libc::E2BIG))
}

impl PciAccess {
    /// A kernel takes the ports where there are any, and each access then takes two exits instead of one. So they are
    /// left out when the kernel finds the way through memory, which ACPI tells it.
    fn of(kernel: &Kernel, slots: &Slots, cmdline: &str) -> Self {
        const NOT_BY_ACPI: [&str; 5] = ["acpi=off", "acpi=ht", "pci=noacpi", "pci=nommconf", "pci=conf1"];
        let memory = matches!(slots, Slots::Pci(_));
        let by_acpi = kernel.has_acpi && !cmdline.split(' ').any(|word| NOT_BY_ACPI.contains(&word));
        Self { ports: !(memory && by_acpi), memory }
    }
}

/// Whether a kernel that knows ACPI is told not to look at it. The last word about it counts.
fn without_acpi(cmdline: &str) -> bool {
    let (parameters, _) = split_command_line(cmdline);
    let mut words = parameters.split_ascii_whitespace().filter(|word| word.starts_with("acpi="));
    words.next_back() == Some("acpi=off")
}

/// The kernel command line of a machine with its devices in these places.
/// `devices`: what they say about themselves.
pub(super) fn command_line(
    config: &VmConfig,
    kernel: &Kernel,
    slots: &Slots,
    devices: Vec<String>,
) -> Result<String, ConfigError> {
    let device = |slot: &MmioSlot| format!("virtio_mmio.device={}@{:#x}:{}", slot.len, slot.addr, slot.irq);
    let machine: Vec<String> = match slots {
        // Some 230 port accesses in search of quirky chipsets, for a bus with nothing on it.
        Slots::Mmio(_) if kernel.has_acpi && !without_acpi(&config.kernel_command_line(&[])?) => {
            vec!["pci=noearly".into()]
        }
        Slots::Mmio(slots) => slots.iter().map(device).collect(),
        Slots::Pci(_) => Vec::new(),
    };
    config.kernel_command_line(&[devices, machine].concat())
}

/// What the open `devices` of `config` want the guest's kernel to know.
pub(super) fn device_parameters(config: &VmConfig, devices: &[Box<dyn VirtioDevice>]) -> Vec<String> {
    devices.iter().enumerate().filter_map(|(i, device)| device.kernel_parameters(config.nth(i))).collect()
}
