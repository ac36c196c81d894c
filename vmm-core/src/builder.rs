//! From a configuration to a machine.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::time::Instant;

use devices::legacy::boot::{self, BootPort};
use devices::legacy::cmos::{self, Cmos};
use devices::legacy::i8042::{self, I8042};
use devices::legacy::power::{self, PowerRegisters};
use devices::legacy::pvpanic::{self, PvPanic};
use devices::legacy::serial::{self, SerialPort};
use devices::log_file::{self, LogFileError};
use devices::model::{Identity, MachineEvent, MachineEvents, MachineShape, OpenError, VirtioDevice};
use devices::pci::Function;
use devices::pci::root::{self, Ecam, Ports, Root};
use devices::snapshot::{self, SnapshotError};
use devices::virtio::mmio::{self, MmioNotifier, MmioTransport};
use devices::virtio::pci::{self, PciNotifier, PciTransport};
use kvm_bindings::CpuId;
use tracing::Span;

use crate::bus::Overlap;
use crate::config::{ConfigError, SerialConfig, VmConfig};
use crate::console::{self, ConsoleFile, ConsoleInput, ConsolePort, OutputControl, WhenFull};
use crate::event::{Journal, What};
use crate::exits::ExitLog;
use crate::hypervisor::kvm::KvmHypervisor;
use crate::hypervisor::saved::{ClockState, IrqchipState, VcpuState};
use crate::hypervisor::{HvError, HvVm, Hypervisor, Vcpu};
use crate::machine::{Asleep, Inbox, Machine, MachineState, Milestone, PciAccess, Tracking};
use crate::memory::{GuestRam, HugePages, RamError};
use crate::runner::{NewUnit, Runner, RunnerError, TellErrors, TellOutput, UnitHandle};
use crate::snapshot::memory_file::{MemoryMode, Pages};
use crate::snapshot::state_file::{SectionError, Sections};
use crate::snapshot::{ClockMode, GenerationId, Persona, Snapshot, random};
use crate::spans;
use crate::vcpu::Buses;
use crate::vm::{Message, Vm};
use crate::window::WindowError;
use crate::x86_64::kernel::{self, Kernel, KernelError};
use crate::x86_64::{MmioSlot, Slots, acpi, cpu, cpuid, features, layout, mptable};

/// A machine that could not be built: a sentence for the operator. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The configuration is not possible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The hypervisor is missing or failed.
    #[error(transparent)]
    Hypervisor(#[from] HvError),
    /// Guest memory could not be mapped.
    #[error(transparent)]
    Memory(#[from] RamError),
    /// A device's file could not be mapped.
    #[error("{name}: {source}")]
    Window {
        /// The device's name.
        name: String,
        /// What is wrong.
        source: WindowError,
    },
    /// Kernel or initrd could not be loaded.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The host's side of a device could not be opened.
    #[error(transparent)]
    Device(#[from] OpenError),
    /// The devices' event loop could not be started.
    #[error(transparent)]
    Runner(#[from] RunnerError),
    /// Two devices claim one address: a mistake in the layout.
    #[error(transparent)]
    Layout(#[from] Overlap),
    /// The console's file could not be made.
    #[error("cannot write the console to '{path}': {source}", path = path.display())]
    Console {
        /// Its path as given.
        path: PathBuf,
        /// What is wrong.
        source: LogFileError,
    },
    /// The guest of a snapshot has seen a better processor.
    #[error(
        "the snapshot's guest uses features of the processor that this host lacks: {missing}; restore it on a host that has \
         them, or force it"
    )]
    Features {
        /// Names of the features.
        missing: String,
    },
    /// The host has no random numbers.
    #[error("cannot read random numbers: {0}")]
    Random(io::Error),
    /// The state in a snapshot is not one that this machine can take over.
    #[error("the snapshot cannot be restored: {0}")]
    State(SectionError),
    /// The control thread could not be started.
    #[error("cannot start the control thread: {0}")]
    Thread(io::Error),
}

/// Builds a [`Vm`].
///
/// What can be checked without KVM is checked without it:
///
/// ```
/// use vmm_core::{Vm, VmConfig};
///
/// let config = VmConfig { cpus: 0, ..VmConfig::default() };
/// let refused = Vm::builder(config).name("web").check().unwrap_err();
/// assert!(refused.to_string().contains("vCPUs"), "{refused}");
/// ```
pub struct VmBuilder {
    config: VmConfig,
    hypervisor: Option<Box<dyn Hypervisor>>,
    when_full: WhenFull,
    trace_exits: bool,
    process_start: Option<Instant>,
    name: String,
    snapshot: Option<Snapshot>,
    memory_mode: MemoryMode,
    clock_mode: ClockMode,
    other_processor: bool,
    persona: Persona,
    aliases: BTreeMap<String, String>,
}

impl VmBuilder {
    pub(crate) fn new(config: VmConfig) -> Self {
        Self {
            config,
            hypervisor: None,
            when_full: WhenFull::default(),
            trace_exits: false,
            process_start: None,
            name: "vm".into(),
            snapshot: None,
            memory_mode: MemoryMode::default(),
            clock_mode: ClockMode::default(),
            other_processor: false,
            persona: Persona::default(),
            aliases: BTreeMap::new(),
        }
    }

    pub(crate) fn of_snapshot(snapshot: Snapshot) -> Self {
        let (config, aliases) = (snapshot.config().clone(), snapshot.manifest().aliases.clone());
        Self { snapshot: Some(snapshot), aliases, ..Self::new(config) }
    }

    /// What is going to be built.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// How a machine that comes from a snapshot gets its memory.
    pub fn memory_mode(mut self, mode: MemoryMode) -> Self {
        self.memory_mode = mode;
        self
    }

    /// Restores a snapshot even if this host lacks features of the processor that its guest saw. Programs in it may find
    /// out by an illegal instruction.
    pub fn other_processor(mut self, force: bool) -> Self {
        self.other_processor = force;
        self
    }

    /// What a guest that comes from a snapshot makes of the time that it slept.
    pub fn clock_mode(mut self, mode: ClockMode) -> Self {
        self.clock_mode = mode;
        self
    }

    /// What a machine that comes from a snapshot is to be, and its parent is not.
    pub fn persona(mut self, persona: Persona) -> Self {
        self.persona = persona;
        self
    }

    /// By what the program calls devices, by their names. Snapshots keep it, and it means nothing else.
    pub fn aliases(mut self, aliases: BTreeMap<String, String>) -> Self {
        self.aliases = aliases;
        self
    }

    /// Uses `hypervisor` in place of KVM.
    pub fn hypervisor(mut self, hypervisor: Box<dyn Hypervisor>) -> Self {
        self.hypervisor = Some(hypervisor);
        self
    }

    /// What happens when nobody reads the guest's console.
    pub fn console_when_full(mut self, when_full: WhenFull) -> Self {
        self.when_full = when_full;
        self
    }

    /// Tells exits apart by address, for [`Vm::exits`]. It costs each of them a look into a table.
    pub fn trace_exits(mut self, trace: bool) -> Self {
        self.trace_exits = trace;
        self
    }

    /// What log lines call the machine; `vm` without it.
    pub fn name(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }

    /// When the program began, which a library cannot know. Events and milestones count from there instead of from the
    /// begin of the build.
    pub fn process_start(mut self, start: Instant) -> Self {
        self.process_start = Some(start);
        self
    }

    /// Checks everything that [`Self::build`] does before it makes a machine: limits, files, devices, and whether
    /// kernel and initrd fit in memory. The hypervisor is not opened, and a kernel may be missing.
    pub fn check(&self) -> Result<(), BuildError> {
        let config = &self.config;
        match config.validate() {
            Ok(()) | Err(ConfigError::NoKernel) => {}
            Err(error) => return Err(error.into()),
        }
        // All at once, as in a machine: a disk that is there twice cannot be locked twice.
        let mut devices = open_devices(config)?;
        open_serial_file(&config.serial)?;
        let mut ram = GuestRam::new(config.memory.0, config.backing(), None)?;
        place_windows(&mut ram, config, &mut devices)?;
        let kernel = config.kernel.as_deref();
        let kernel = kernel.map(|path| kernel::load(ram.memory(), path, config.boot_protocol)).transpose()?;
        match (&config.initrd, &kernel) {
            (Some(path), Some(kernel)) => kernel::load_initrd(ram.memory(), path, kernel).map(drop)?,
            // Where it would go is the kernel's choice.
            (Some(path), None) => kernel::open_initrd(path).map(drop)?,
            (None, _) => {}
        }
        if let Some(kernel) = &kernel {
            let slots = Slots::new(config.transport, config.devices.len());
            command_line(config, kernel, &slots, device_parameters(config, &devices))?;
        }
        Ok(())
    }

    /// Opens everything that the configuration names and makes the machine. It is then [`crate::VmState::Created`], or
    /// [`crate::VmState::Paused`] if it comes from a snapshot.
    pub fn build(self) -> Result<Vm, BuildError> {
        let span = spans::vm(&self.name);
        span.clone().in_scope(|| self.build_in(span))
    }

    fn build_in(self, span: Span) -> Result<Vm, BuildError> {
        self.config.validate()?;
        let journal = Arc::new(Journal::begin(self.process_start));
        let (control, messages) = mpsc::channel();
        let inbox = Arc::new(Inbox::new(control.clone(), journal.clone()));
        let hypervisor = match self.hypervisor {
            Some(hypervisor) => hypervisor,
            None => Box::new(KvmHypervisor::open()?),
        };
        let config = self.config;
        let mut devices = open_devices(&config)?;

        let image = self.snapshot.as_ref().map(|snapshot| (snapshot.image.clone(), self.memory_mode));
        let mut ram = GuestRam::new(config.memory.0, config.backing(), image)?;
        place_windows(&mut ram, &config, &mut devices)?;
        if config.mem_prealloc {
            ram.populate()?;
        }
        journal.reach(Milestone::MemoryReady);
        let slots = Slots::new(config.transport, devices.len());
        let origin = match self.snapshot {
            None => {
                let boot = Origin::boot(&config, &ram, &slots, &devices)?;
                journal.reach(Milestone::KernelLoaded);
                boot
            }
            Some(snapshot) => Origin::snapshot(snapshot)?,
        };

        let vm = hypervisor.create_vm()?;
        vm.map_memory(&ram)?;
        let (pit, pci) = (origin.pit(), origin.pci());
        vm.create_irqchip(pit)?;
        journal.reach(Milestone::VmCreated);

        let mut parts =
            Parts { vm, ram, control, inbox, buses: Buses::default(), journal, saved: Vec::new(), span };
        let (runners, units) = parts.add_virtio(&config, devices, &slots, pci)?;
        let power_button = parts.vm.irq_line(layout::GED_IRQ)?;
        let generation_changed = parts.vm.irq_line(layout::GENERATION_IRQ)?;
        let idle = match &origin {
            Origin::Boot(boot) => {
                parts.describe(&config, boot, &slots)?;
                parts.create_vcpus(&*hypervisor, &config, &boot.kernel)?
            }
            Origin::Snapshot(snapshot, _) => {
                let vcpus = saved_vcpus(&config, &snapshot.sections)?;
                if !self.other_processor {
                    has_features(&*hypervisor, &config, &vcpus)?;
                }
                parts.restore_vcpus(&vcpus)?
            }
        };
        // Late, because it empties a file.
        let (output, console, console_output) = console::output(self.when_full);
        let (console_input, boot_port) =
            parts.add_legacy(open_serial(&config.serial, output)?, &console_output)?;
        let asleep = match &origin {
            Origin::Boot(_) => None,
            Origin::Snapshot(snapshot, state) => {
                units.iter().try_for_each(|(_, unit)| unit.set_paused(true))?;
                Some(Asleep {
                    clock: parts.restore(&config, &snapshot.sections, state)?,
                    generation: random().map_err(BuildError::Random)?,
                    note: self
                        .persona
                        .note(&snapshot.manifest.config, &config)
                        .map_err(BuildError::Random)?,
                })
            }
        };
        let tracking = parts.track(&config, &origin)?;
        let Parts { vm, ram, control, inbox, buses, journal, saved, span } = parts;
        let exits = (0..config.cpus).map(|_| Arc::new(ExitLog::new(self.trace_exits))).collect();
        let machine = Machine {
            idle,
            running: Vec::new(),
            units,
            runners,
            buses: Arc::new(buses),
            power_button,
            console_input,
            console_output,
            journal,
            exits,
            ram,
            control,
            span,
            vm,
            parts: saved,
            pit,
            pci,
            boot_port,
            generation_changed,
            asleep,
            clock_mode: self.clock_mode,
            tracking,
        };
        Vm::run((config, self.aliases), machine, console, inbox, messages).map_err(BuildError::Thread)
    }
}

/// What a machine begins with.
enum Origin {
    Boot(Boot),
    Snapshot(Box<Snapshot>, MachineState),
}

/// A kernel in memory, and what it is to know.
struct Boot {
    kernel: Kernel,
    initrd: Option<kernel::Initrd>,
    cmdline: String,
    pci: PciAccess,
}

impl Origin {
    /// Loads the kernel of `config`.
    fn boot(
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

    fn snapshot(snapshot: Snapshot) -> Result<Self, BuildError> {
        let state = snapshot.sections.state("machine").map_err(BuildError::State)?;
        Ok(Self::Snapshot(Box::new(snapshot), state))
    }

    /// A kernel with ACPI believes that there is no i8254, one without may calibrate its clocks with it.
    fn pit(&self) -> bool {
        match self {
            Self::Boot(boot) => !boot.kernel.has_acpi,
            Self::Snapshot(_, state) => state.pit,
        }
    }

    fn pci(&self) -> PciAccess {
        match self {
            Self::Boot(boot) => boot.pci,
            Self::Snapshot(_, state) => state.pci,
        }
    }
}

fn open_devices(config: &VmConfig) -> Result<Vec<Box<dyn VirtioDevice>>, OpenError> {
    let memory_stays = config.mem_prealloc || config.hugepages == HugePages::Reserved;
    let shape = MachineShape { cpus: config.cpus, memory: config.memory.0, memory_stays };
    let named = config.devices.iter().zip(config.device_names());
    named
        .map(|(device, name)| spans::device(&Span::current(), &name).in_scope(|| device.open(&shape)))
        .collect()
}

/// Maps the files that devices want in the guest's address space.
fn place_windows(
    ram: &mut GuestRam,
    config: &VmConfig,
    devices: &mut [Box<dyn VirtioDevice>],
) -> Result<(), BuildError> {
    for (device, name) in devices.iter_mut().zip(config.device_names()) {
        if let Some(window) = device.window() {
            let placed = ram.add_window(window);
            device.placed(placed.map_err(|source| BuildError::Window { name, source })?);
        }
    }
    Ok(())
}

/// Where the serial port writes.
fn open_serial(
    config: &SerialConfig,
    output: console::OutputWriter,
) -> Result<Box<dyn Write + Send>, BuildError> {
    Ok(match (open_serial_file(config)?, config) {
        (Some((mut file, path)), _) => {
            file.begin().map_err(|error| BuildError::Console { path: path.into(), source: error.into() })?;
            Box::new(file)
        }
        (None, SerialConfig::Stdio) => Box::new(output),
        (None, _) => Box::new(io::sink()),
    })
}

/// The serial port's file, as it is, if it has one.
fn open_serial_file(config: &SerialConfig) -> Result<Option<(ConsoleFile, &Path)>, BuildError> {
    let SerialConfig::File(path) = config else { return Ok(None) };
    match ConsoleFile::open(path, log_file::MAX) {
        Ok(file) => Ok(Some((file, path))),
        Err(source) => Err(BuildError::Console { path: path.clone(), source }),
    }
}

/// The vCPUs of a snapshot.
fn saved_vcpus(config: &VmConfig, saved: &Sections) -> Result<Vec<VcpuState>, BuildError> {
    (0..config.cpus).map(|id| saved.whole_state(&format!("vcpu{id}")).map_err(BuildError::State)).collect()
}

/// Fails if this host lacks a feature of the processor that the guest of a snapshot has seen.
fn has_features(
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

/// A machine in the making.
struct Parts {
    vm: Arc<dyn HvVm>,
    ram: GuestRam,
    control: Sender<Message>,
    inbox: Arc<Inbox>,
    buses: Buses,
    journal: Arc<Journal>,
    /// The machine's.
    span: Span,
    /// What has a state of its own, by the names of sections.
    saved: Vec<(String, Arc<dyn snapshot::Snapshot>)>,
}

impl Parts {
    /// Puts the few pieces of a PC on the port bus; returns the console's input and the boot port.
    fn add_legacy(
        &mut self,
        output: Box<dyn Write + Send>,
        control: &OutputControl,
    ) -> Result<(ConsoleInput, Arc<BootPort>), BuildError> {
        let input = ConsoleInput::default();
        let pump = {
            let input = input.clone();
            Box::new(move || input.pump())
        };
        let events: Arc<dyn MachineEvents> = self.inbox.clone();
        let line = self.vm.irq_line(serial::IRQ)?;
        let serial = Arc::new(SerialPort::new(line, events.clone(), output, pump));
        input.connect(&serial);
        let pio = &mut self.buses.pio;
        self.saved.push(("serial".into(), serial.clone()));
        let port = Arc::new(ConsolePort::new(serial, control));
        pio.insert(serial::PORT.into(), serial::PORTS.into(), port)?;
        let i8042 = Arc::new(I8042::new(events.clone()));
        pio.insert(i8042::PORT.into(), i8042::PORTS.into(), i8042)?;
        let cmos = Arc::new(Cmos::new());
        self.saved.push(("cmos".into(), cmos.clone()));
        pio.insert(cmos::PORT.into(), cmos::PORTS.into(), cmos)?;
        let pvpanic = Arc::new(PvPanic::new(events.clone()));
        pio.insert(pvpanic::PORT.into(), pvpanic::PORTS.into(), pvpanic)?;
        let power = Arc::new(PowerRegisters::new(events.clone()));
        pio.insert(layout::POWER_PORT.into(), power::SIZE, power)?;
        let boot = Arc::new(BootPort::new(events));
        self.saved.push(("boot".into(), boot.clone()));
        pio.insert(boot::PORT.into(), boot::PORTS.into(), boot.clone())?;
        Ok((input, boot))
    }

    /// Puts virtio devices on runners and on their transport.
    fn add_virtio(
        &mut self,
        config: &VmConfig,
        devices: Vec<Box<dyn VirtioDevice>>,
        slots: &Slots,
        access: PciAccess,
    ) -> Result<Virtio, BuildError> {
        let (mut shared, mut own, mut units) = (None, Vec::new(), Vec::new());
        let mut functions: Vec<Arc<dyn Function>> = Vec::new();
        let configs = config.device_names().into_iter().zip(&config.devices);
        for (i, (device, (name, config))) in devices.into_iter().zip(configs).enumerate() {
            let runner = match (config.own_runner(), &mut shared) {
                (true, _) => {
                    own.push(self.start_runner(&name)?);
                    &own[own.len() - 1]
                }
                (false, Some(runner)) => &*runner,
                (false, shared) => &*shared.insert(self.start_runner("virtio")?),
            };
            let new = NewUnit {
                device,
                name: name.clone(),
                limits: config.limits(),
                tell_errors: self.tell_errors(&name),
                tell_output: config.is_console().then(|| self.tell_output()),
            };
            let unit = match slots {
                Slots::Mmio(slots) => {
                    let (unit, transport) = self.add_mmio_device(runner, new, slots[i])?;
                    self.saved.push((section(&name), transport));
                    unit
                }
                Slots::Pci(bars) => {
                    let (unit, transport) = self.add_pci_device(runner, new, bars[i])?;
                    self.saved.push((section(&name), transport.clone()));
                    functions.push(transport);
                    unit
                }
            };
            units.push((name, unit));
        }
        self.add_pci(access, functions)?;
        Ok((shared.into_iter().chain(own).collect(), units))
    }

    fn tell_errors(&self, device: &str) -> TellErrors {
        let (journal, device) = (self.journal.clone(), device.to_owned());
        Box::new(move |total| journal.record(What::DeviceErrors { device: device.clone(), total }))
    }

    fn tell_output(&self) -> TellOutput {
        let events = self.inbox.clone();
        Box::new(move || events.raise(MachineEvent::ConsoleOutput))
    }

    fn start_runner(&self, name: &str) -> Result<Runner, RunnerError> {
        let (control, thread) = (self.control.clone(), name.to_owned());
        // The machine holds the runner, and a sender of the runner's would keep the machine's channel open.
        Runner::start(name, &self.span, move || {
            _ = control.send(Message::ThreadPanicked(thread));
        })
    }

    fn add_mmio_device(
        &mut self,
        runner: &Runner,
        new: NewUnit,
        slot: MmioSlot,
    ) -> Result<(Arc<UnitHandle>, Arc<MmioTransport>), BuildError> {
        let notifier = MmioNotifier::new(self.vm.irq_line(slot.irq)?);
        let identity = Identity::of(&*new.device);
        let unit = runner.add(new, notifier.clone(), self.ram.memory().clone())?;
        for (queue, event) in unit.kicks().iter().enumerate() {
            self.vm.signal_on_write(slot.addr + mmio::QUEUE_NOTIFY, Some(queue as u32), event)?;
        }
        let transport = Arc::new(MmioTransport::of(identity, notifier, unit.clone()));
        self.buses.mmio.insert(slot.addr, slot.len, transport.clone())?;
        Ok((unit, transport))
    }

    fn add_pci_device(
        &mut self,
        runner: &Runner,
        new: NewUnit,
        bar: u32,
    ) -> Result<(Arc<UnitHandle>, Arc<PciTransport>), BuildError> {
        let identity = Identity::of(&*new.device);
        let notifier = PciNotifier::over(identity.queue_sizes.len(), self.vm.clone().msi_sender());
        let unit = runner.add(new, notifier.clone(), self.ram.memory().clone())?;
        for (register, event) in
            (u64::from(bar) + pci::NOTIFY..).step_by(pci::NOTIFY_STEP as usize).zip(unit.kicks())
        {
            self.vm.signal_on_write(register, None, event)?;
        }
        let transport = Arc::new(PciTransport::of(identity, bar, notifier, unit.clone()));
        self.buses.mmio.insert(bar.into(), pci::SIZE, transport.clone())?;
        Ok((unit, transport))
    }

    /// Puts bus 0 with these functions on the ports or into memory: see [`PciAccess`].
    fn add_pci(&mut self, access: PciAccess, functions: Vec<Arc<dyn Function>>) -> Result<(), BuildError> {
        let root = Root::new(functions);
        if access.memory {
            let ecam = Arc::new(Ecam::new(root.clone()));
            self.buses.mmio.insert(layout::PCI_ECAM, root::ECAM_SIZE, ecam)?;
        }
        if access.ports {
            let ports = Arc::new(Ports::new(root));
            self.saved.push(("pci".into(), ports.clone()));
            self.buses.pio.insert(root::PORT.into(), root::PORTS.into(), ports)?;
        }
        Ok(())
    }

    /// Writes everything that tells the guest's kernel what machine it is on.
    fn describe(&self, config: &VmConfig, boot: &Boot, slots: &Slots) -> Result<(), BuildError> {
        let mem = self.ram.memory();
        let kernel = &boot.kernel;
        kernel::write_parameters(mem, kernel, boot.initrd, &boot.cmdline)?;
        kernel::write_table(mem, layout::MP_TABLE, &mptable::build(config.cpus))?;
        kernel::write_table(mem, layout::ACPI, &acpi::build(config.cpus, slots))?;
        let generation: GenerationId = random().map_err(BuildError::Random)?;
        kernel::write_table(mem, layout::GENERATION_ID, &generation)?;
        cpu::write_boot_structures(mem, kernel.entry.protocol).map_err(KernelError::Memory)?;
        Ok(())
    }

    /// vCPUs as they were.
    fn restore_vcpus(&self, saved: &[VcpuState]) -> Result<Vec<Box<dyn Vcpu>>, BuildError> {
        let restore = |(id, saved)| {
            let mut vcpu = self.vm.create_vcpu(id)?;
            vcpu.restore(saved)?;
            Ok(vcpu)
        };
        (0..).zip(saved).map(restore).collect()
    }

    /// Everything else as it was. Returns the clocks, which are set when the machine goes on.
    fn restore(
        &self,
        config: &VmConfig,
        saved: &Sections,
        machine: &MachineState,
    ) -> Result<ClockState, BuildError> {
        // A part that is missing here would go on as new, and the guest knows it as it was.
        let cpus = config.cpus;
        let known = |name: &str| {
            ["clock", "machine", "irqchip"].contains(&name)
                || (0..cpus).any(|id| name == format!("vcpu{id}"))
                || self.saved.iter().any(|(part, _)| part == name)
        };
        if let Some(unknown) = saved.iter().find(|section| !known(&section.name)) {
            return Err(BuildError::State(SectionError::Unknown { name: unknown.name.clone() }));
        }
        self.inbox.restore(machine.exit_status);
        let irqchip: IrqchipState = saved.whole_state("irqchip").map_err(BuildError::State)?;
        if irqchip.pit.is_some() != machine.pit {
            let wrong = SnapshotError::impossible("set of timers");
            return Err(BuildError::State(SectionError::of("irqchip")(wrong)));
        }
        self.vm.restore_irqchip(&irqchip)?;
        for (name, part) in &self.saved {
            let restore = || part.restore(saved.get(name)?).map_err(SectionError::of(name));
            restore().map_err(BuildError::State)?;
        }
        let clock: ClockState = saved.state("clock").map_err(BuildError::State)?;
        match clock.vcpus.len() == usize::from(cpus) {
            true => Ok(clock),
            false => {
                let wrong = SnapshotError::impossible("number of clocks");
                Err(BuildError::State(SectionError::of("clock")(wrong)))
            }
        }
    }

    /// Begins to log what is written, if the configuration says so.
    fn track(&self, config: &VmConfig, origin: &Origin) -> Result<Option<Tracking>, BuildError> {
        if !config.track_dirty {
            return Ok(None);
        }
        self.vm.log_dirty_pages(true)?;
        let base = match origin {
            Origin::Boot(_) => None,
            Origin::Snapshot(snapshot, _) => Some(snapshot.as_base()),
        };
        Ok(Some(Tracking { base, pending: Pages::none(config.memory.0) }))
    }

    fn create_vcpus(
        &self,
        hypervisor: &dyn Hypervisor,
        config: &VmConfig,
        kernel: &Kernel,
    ) -> Result<Vec<Box<dyn Vcpu>>, BuildError> {
        let supported = hypervisor.supported_cpuid()?;
        (0..config.cpus)
            .map(|id| {
                let mut vcpu = self.vm.create_vcpu(id)?;
                let entry = (id == 0).then_some(&kernel.entry);
                let cpuid = cpuid::for_vcpu(&supported, id, config.cpus)
                    .map_err(|_| HvError::call("KVM_SET_CPUID2", libc::E2BIG))?;
                cpu::setup(&mut *vcpu, &cpuid, entry)?;
                Ok(vcpu)
            })
            .collect()
    }
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

/// The kernel command line of a machine with its devices in these places.
/// `devices`: what they say about themselves.
fn command_line(
    config: &VmConfig,
    kernel: &Kernel,
    slots: &Slots,
    devices: Vec<String>,
) -> Result<String, ConfigError> {
    let device = |slot: &MmioSlot| format!("virtio_mmio.device={}@{:#x}:{}", slot.len, slot.addr, slot.irq);
    let machine: Vec<String> = match slots {
        // Some 230 port accesses in search of quirky chipsets, for a bus with nothing on it.
        Slots::Mmio(_) if kernel.has_acpi => vec!["pci=noearly".into()],
        Slots::Mmio(slots) => slots.iter().map(device).collect(),
        Slots::Pci(_) => Vec::new(),
    };
    config.kernel_command_line(&[devices, machine].concat())
}

/// What the open `devices` of `config` want the guest's kernel to know.
fn device_parameters(config: &VmConfig, devices: &[Box<dyn VirtioDevice>]) -> Vec<String> {
    devices.iter().enumerate().filter_map(|(i, device)| device.kernel_parameters(config.nth(i))).collect()
}

/// The section that a device's state is in.
fn section(device: &str) -> String {
    format!("device/{device}")
}

/// What [`Parts::add_virtio`] makes.
type Virtio = (Vec<Runner>, Vec<(String, Arc<UnitHandle>)>);
