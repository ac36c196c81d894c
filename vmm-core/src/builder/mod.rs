//! From a configuration to a machine.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use devices::log_file::LogFileError;
use devices::model::OpenError;
use tracing::Span;

use crate::bus::Overlap;
use crate::config::{ConfigError, VmConfig};
use crate::console::{self, WhenFull};
use crate::control::Message;
use crate::event::Journal;
use crate::exits::ExitLog;
use crate::hypervisor::kvm::KvmHypervisor;
use crate::hypervisor::{HvError, Hypervisor};
use crate::machine::{Asleep, Inbox, Machine, Milestone};
use crate::memory::{GuestRam, RamError};
use crate::runner::RunnerError;
use crate::snapshot::memory_file::MemoryMode;
use crate::snapshot::state_file::SectionError;
use crate::snapshot::{ClockMode, Persona, Snapshot, random};
use crate::spans;
use crate::vcpu::Buses;
use crate::vm::Vm;
use crate::window::WindowError;
use crate::x86_64::kernel::{self, KernelError};
use crate::x86_64::{Slots, layout};
use origin::{Origin, command_line, device_parameters, has_features, saved_vcpus};
use parts::{Legacy, Parts, open_devices, open_serial, open_serial_file, place_windows};

mod origin;
mod parts;

/// A machine that could not be built: a sentence for the operator. Nothing is left behind.
///
/// ```
/// use vmm_core::{BuildError, Vm, VmConfig};
///
/// match Vm::builder(VmConfig::default()).build() {
///     Err(BuildError::Config(error)) => println!("the configuration is to be changed: {error}"),
///     Err(error) => println!("this host cannot: {error}"),
///     Ok(_) => unreachable!("without a kernel"),
/// }
/// ```
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
    /// The host lacks features of the machine's [`crate::config::CpuProfile`].
    #[error(
        "the machine's cpu profile has features that this host cannot give a guest: {missing}; choose a lower level, or another host"
    )]
    Profile {
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
    page_fault_handler: Option<PathBuf>,
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
            page_fault_handler: None,
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

    /// Another process brings the memory of a snapshot in, as Firecracker's handlers do: it listens at the unix socket
    /// `socket`, and is sent a userfaultfd and where memory is. If it ends before the machine, the guest hangs.
    pub fn page_fault_handler(mut self, socket: PathBuf) -> Self {
        self.page_fault_handler = Some(socket);
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

        let handler = self.page_fault_handler.as_deref();
        let mut ram = origin::memory(&config, self.snapshot.as_ref(), self.memory_mode, handler)?;
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
        let Legacy { console_input, boot_port, keyboard } =
            parts.add_legacy(open_serial(&config.serial, output)?, &console_output)?;
        let asleep = match &origin {
            Origin::Boot(_) => None,
            Origin::Snapshot(snapshot, state) => {
                units.iter().try_for_each(|(_, unit)| unit.set_paused(true))?;
                let (clock, hears_generation) = parts.restore(&config, &snapshot.sections, state)?;
                Some(Asleep {
                    clock,
                    hears_generation,
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
        watch_memory(&ram, &control)?;
        let machine = Machine {
            idle,
            running: Vec::new(),
            units,
            runners,
            buses: Arc::new(buses),
            power_button,
            keyboard,
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

/// Ends the machine when its memory cannot be had any more; fails if that is so already.
fn watch_memory(ram: &GuestRam, control: &mpsc::Sender<Message>) -> Result<(), RamError> {
    let Some(faults) = ram.faults() else { return Ok(()) };
    let control = control.clone();
    let tell = move |reason| {
        // It fails only when the machine has ended.
        _ = control.send(Message::MemoryLost(reason));
    };
    Ok(faults.watch(Box::new(tell))?)
}
