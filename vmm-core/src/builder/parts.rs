//! A machine in the making: devices, buses, tables and vCPUs, put together one by one.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use devices::legacy::boot::{self, BootPort};
use devices::legacy::cmos::{self, Cmos};
use devices::legacy::i8042::{self, I8042};
use devices::legacy::power::{self, PowerRegisters};
use devices::legacy::pvpanic::{self, PvPanic};
use devices::legacy::serial::{self, SerialPort};
use devices::log_file;
use devices::model::{Identity, MachineEvent, MachineEvents, MachineShape, OpenError, VirtioDevice};
use devices::pci::Function;
use devices::pci::root::{self, Ecam, Ports, Root};
use devices::snapshot::{self, SnapshotError};
use devices::virtio::mmio::{self, MmioNotifier, MmioTransport};
use devices::virtio::pci::{self, PciNotifier, PciTransport};
use tracing::Span;

use super::BuildError;
use super::origin::{Boot, Origin};
use crate::config::{SerialConfig, VmConfig};
use crate::console::{self, ConsoleFile, ConsoleInput, ConsolePort, OutputControl};
use crate::control::Message;
use crate::event::{Journal, What};
use crate::hypervisor::saved::{ClockState, IrqchipState, VcpuState};
use crate::hypervisor::{HvError, HvVm, Hypervisor, Vcpu};
use crate::machine::{Inbox, MachineState, PciAccess, Tracking};
use crate::memory::{GuestRam, HugePages};
use crate::runner::{NewUnit, News, Runner, RunnerError, TellNews, TellOutput, UnitHandle};
use crate::snapshot::memory_file::Pages;
use crate::snapshot::state_file::{SectionError, Sections};
use crate::snapshot::{GenerationId, random};
use crate::spans;
use crate::vcpu::Buses;
use crate::x86_64::kernel::{self, Kernel, KernelError};
use crate::x86_64::{MmioSlot, Slots, acpi, cpu, cpuid, layout, mptable};

pub(super) fn open_devices(config: &VmConfig) -> Result<Vec<Box<dyn VirtioDevice>>, OpenError> {
    let memory_stays = config.mem_prealloc || config.hugepages == HugePages::Reserved;
    let shape = MachineShape { cpus: config.cpus, memory: config.memory.0, memory_stays };
    let named = config.devices.iter().zip(config.device_names());
    named
        .map(|(device, name)| spans::device(&Span::current(), &name).in_scope(|| device.open(&shape)))
        .collect()
}

/// Maps the files that devices want in the guest's address space.
pub(super) fn place_windows(
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
pub(super) fn open_serial(
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
pub(super) fn open_serial_file(config: &SerialConfig) -> Result<Option<(ConsoleFile, &Path)>, BuildError> {
    let SerialConfig::File(path) = config else { return Ok(None) };
    match ConsoleFile::open(path, log_file::MAX) {
        Ok(file) => Ok(Some((file, path))),
        Err(source) => Err(BuildError::Console { path: path.clone(), source }),
    }
}
/// A machine in the making.
pub(super) struct Parts {
    pub vm: Arc<dyn HvVm>,
    pub ram: GuestRam,
    pub control: Sender<Message>,
    pub inbox: Arc<Inbox>,
    pub buses: Buses,
    pub journal: Arc<Journal>,
    /// The machine's.
    pub span: Span,
    /// What has a state of its own, by the names of sections.
    pub saved: Vec<(String, Arc<dyn snapshot::Snapshot>)>,
}

impl Parts {
    /// Puts the few pieces of a PC on the port bus.
    pub fn add_legacy(
        &mut self,
        output: Box<dyn Write + Send>,
        control: &OutputControl,
    ) -> Result<Legacy, BuildError> {
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
        let keyboard = Arc::new(I8042::new(self.vm.irq_line(i8042::IRQ)?, events.clone()));
        self.saved.push((KEYBOARD.into(), keyboard.clone()));
        pio.insert(i8042::PORT.into(), i8042::PORTS.into(), keyboard.clone())?;
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
        Ok(Legacy { console_input: input, boot_port: boot, keyboard })
    }

    /// Puts virtio devices on runners and on their transport.
    pub fn add_virtio(
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
                tell_news: self.tell_news(&name),
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

    fn tell_news(&self, device: &str) -> TellNews {
        let (journal, device) = (self.journal.clone(), device.to_owned());
        Box::new(move |news| {
            let device = device.clone();
            journal.record(match news {
                News::Errors(total) => What::DeviceErrors { device, total },
                News::Fact(name, value) => What::Fact { device, name, value },
            });
        })
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
    pub fn describe(&self, config: &VmConfig, boot: &Boot, slots: &Slots) -> Result<(), BuildError> {
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
    pub fn restore_vcpus(&self, saved: &[VcpuState]) -> Result<Vec<Box<dyn Vcpu>>, BuildError> {
        let restore = |(id, saved)| {
            let mut vcpu = self.vm.create_vcpu(id)?;
            vcpu.restore(saved)?;
            Ok(vcpu)
        };
        (0..).zip(saved).map(restore).collect()
    }

    /// Everything else as it was. Returns the clocks, which are set when the machine goes on, and whether the guest takes
    /// the interrupt for a new generation id.
    pub fn restore(
        &self,
        config: &VmConfig,
        saved: &Sections,
        machine: &MachineState,
    ) -> Result<(ClockState, bool), BuildError> {
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
        // Machines of before it had a state go on with one that no driver has seen.
        let saved_parts = self.saved.iter().filter(|(name, _)| name != KEYBOARD || saved.get(name).is_ok());
        for (name, part) in saved_parts {
            let restore = || part.restore(saved.get(name)?).map_err(SectionError::of(name));
            restore().map_err(BuildError::State)?;
        }
        let clock: ClockState = saved.state("clock").map_err(BuildError::State)?;
        match clock.vcpus.len() == usize::from(cpus) {
            true => Ok((clock, irqchip.takes(layout::GENERATION_IRQ))),
            false => {
                let wrong = SnapshotError::impossible("number of clocks");
                Err(BuildError::State(SectionError::of("clock")(wrong)))
            }
        }
    }

    /// Begins to log what is written, if the configuration says so.
    pub fn track(&self, config: &VmConfig, origin: &Origin) -> Result<Option<Tracking>, BuildError> {
        if !config.track_dirty {
            return Ok(None);
        }
        self.vm.log_dirty_pages(true)?;
        let base = match origin {
            Origin::Boot(_) => None,
            Origin::Snapshot(snapshot, _) => snapshot.as_base(),
        };
        Ok(Some(Tracking { base, pending: Pages::none(config.memory.0) }))
    }

    pub fn create_vcpus(
        &self,
        hypervisor: &dyn Hypervisor,
        config: &VmConfig,
        kernel: &Kernel,
    ) -> Result<Vec<Box<dyn Vcpu>>, BuildError> {
        let supported = config
            .cpu_profile
            .cut(&hypervisor.supported_cpuid()?)
            .map_err(|missing| BuildError::Profile { missing: missing.join(", ") })?;
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
/// Pieces of a PC that the machine has to do with itself.
pub(super) struct Legacy {
    pub console_input: ConsoleInput,
    pub boot_port: Arc<BootPort>,
    pub keyboard: Arc<I8042>,
}

/// The section of the keyboard's state.
const KEYBOARD: &str = "i8042";

/// The section that a device's state is in.
fn section(device: &str) -> String {
    format!("device/{device}")
}

/// What [`Parts::add_virtio`] makes.
type Virtio = (Vec<Runner>, Vec<(String, Arc<UnitHandle>)>);
