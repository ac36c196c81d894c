//! What the API controls: a machine in the making, then the machine.

use std::collections::HashMap;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::watch;
use vmm_core::config::{SerialConfig, Transport};
use vmm_core::console::ConsoleInput;
use vmm_core::devices::registry::Patch;
use vmm_core::{Vm, VmBuilder, VmState};

use super::firecracker::types::{FullConfiguration, Logger, MmdsContents};
use super::http::{MAX_BODY, Refusal};
use super::metrics::MetricsFile;
use crate::attach::{Client, Clients};
use crate::logging::Logging;

/// What the API asks of the thread that owns the session.
pub enum Order {
    /// To build a machine, start it and run it to its end.
    Launch {
        /// The machine.
        builder: Box<VmBuilder>,
        /// It waits, paused, for somebody to let it go on; only what comes from a snapshot can.
        stays_paused: bool,
        /// Takes the running machine, or a sentence.
        reply: Sender<Result<Arc<Vm>, String>>,
    },
    /// To end the program with this sentence.
    End(String),
}

/// What the calls of the API work on.
pub struct Control {
    /// The machine's name.
    pub id: String,
    transport: Transport,
    /// Held by whoever changes something, from beginning to end, so that of two changes none is lost. It may take long:
    /// machines are built meanwhile, and devices stand still for snapshots.
    turn: Mutex<()>,
    /// Never held for long, so that who only asks is answered.
    state: Mutex<State>,
    orders: Sender<Order>,
    logging: Arc<Logging>,
    metrics: MetricsFile,
    /// Most bytes of metadata.
    metadata_limit: usize,
    /// Who is attached to the console.
    clients: Arc<Clients>,
    /// For those who wait for the start.
    launched: watch::Sender<Option<Arc<Vm>>>,
}

struct State {
    configuration: FullConfiguration,
    /// What guests can ask for, once there is something.
    metadata: Option<MmdsContents>,
    started: Option<Started>,
}

#[derive(Clone)]
struct Started {
    vm: Arc<Vm>,
    /// By what the API calls a device, its name in the machine.
    devices: HashMap<String, String>,
}

impl Control {
    /// Controls a machine that is still to be configured: it is named `id`, reaches its devices by `transport`, and has
    /// at most `metadata_limit` bytes of metadata.
    pub fn empty(
        id: &str,
        transport: Transport,
        metadata_limit: usize,
        orders: Sender<Order>,
        logging: Arc<Logging>,
    ) -> Self {
        let state = State { configuration: FullConfiguration::default(), metadata: None, started: None };
        let (state, metrics) = (Mutex::new(state), MetricsFile::default());
        let (clients, launched) = (Arc::default(), watch::Sender::new(None));
        let (id, turn) = (id.into(), Mutex::default());
        Self { id, transport, turn, state, orders, logging, metrics, metadata_limit, clients, launched }
    }

    /// Controls a machine that is there already.
    pub fn of(name: &str, vm: Arc<Vm>, logging: Arc<Logging>, clients: Arc<Clients>) -> Self {
        let config = vm.config();
        let (configuration, transport) =
            (FullConfiguration::of(&config).called(vm.aliases()), config.transport);
        let launched = watch::Sender::new(Some(vm.clone()));
        let (metadata, started) = (MmdsContents::of(&config), Started::of(vm));
        let state = Mutex::new(State { configuration, metadata, started: Some(started) });
        // Not used: what it takes is done before the start.
        let (orders, _) = std::sync::mpsc::channel();
        let (metrics, metadata_limit) = (MetricsFile::default(), MAX_BODY);
        Self {
            id: name.into(),
            transport,
            turn: Mutex::default(),
            state,
            orders,
            logging,
            metrics,
            metadata_limit,
            clients,
            launched,
        }
    }

    /// Who is attached to the console of the machine, now or once there is one.
    pub fn clients(&self) -> &Arc<Clients> {
        &self.clients
    }

    /// Attaches somebody to the console of the running machine; what he types goes to the second.
    pub fn attach(&self) -> Result<(Client, ConsoleInput), Refusal> {
        let vm = self.vm()?;
        if vm.config().serial != SerialConfig::Stdio {
            return Err(Refusal("The machine has its console in a file of its own, or none.".into()));
        }
        Ok((self.clients.join()?, vm.console_input()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Fails once the machine has been started.
    fn is_not_started(&self) -> Result<(), Refusal> {
        match self.lock().started {
            Some(_) => Err("The requested operation is not supported after starting the microVM.".into()),
            None => Ok(()),
        }
    }

    /// Everything that is configured.
    pub fn configuration(&self) -> FullConfiguration {
        self.lock().configuration.clone()
    }

    /// Changes the configuration of a machine that has not been started. After an error it is as it was.
    pub fn configure(
        &self,
        change: impl FnOnce(&mut FullConfiguration) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let _turn = self.turn();
        self.is_not_started()?;
        let mut changed = self.configuration();
        change(&mut changed)?;
        self.lock().configuration = changed;
        Ok(())
    }

    /// The machine, once it has been started. While it is, whoever asks for it waits; not for those whose turn it is.
    pub fn vm(&self) -> Result<Arc<Vm>, Refusal> {
        Ok(self.started_by_now()?.vm)
    }

    fn started_by_now(&self) -> Result<Started, Refusal> {
        self.started().or_else(|_| {
            drop(self.turn());
            self.started()
        })
    }

    /// The machine, if it has been started.
    pub fn vm_if_started(&self) -> Option<Arc<Vm>> {
        self.lock().started.as_ref().map(|started| started.vm.clone())
    }

    /// The machine, as soon as it has been started.
    pub async fn when_started(&self) -> Arc<Vm> {
        let mut launched = self.launched.subscribe();
        match launched.wait_for(Option::is_some).await.map(|vm| vm.clone()) {
            Ok(Some(vm)) => vm,
            // The sender lives as long as `self`.
            _ => std::future::pending().await,
        }
    }

    fn started(&self) -> Result<Started, Refusal> {
        let refused =
            || Refusal("The requested operation is not supported before starting the microVM.".into());
        self.lock().started.clone().ok_or_else(refused)
    }

    /// In Firecracker's words, where the machine is in its life.
    pub fn state_name(&self) -> &'static str {
        match self.lock().started.as_ref().map(|started| started.vm.state()) {
            None | Some(VmState::Created | VmState::Stopped(_)) => "Not started",
            Some(VmState::Paused) => "Paused",
            Some(VmState::Running | VmState::Stopping) => "Running",
        }
    }

    /// Builds and starts the machine as it is configured.
    pub fn start(&self) -> Result<(), Refusal> {
        let _turn = self.turn();
        self.start_now()
    }

    /// As [`Self::start`], for those whose turn it is.
    fn start_now(&self) -> Result<(), Refusal> {
        self.is_not_started()?;
        let contents = self.metadata().unwrap_or_default();
        let machine = self.configuration().machine(self.transport, &contents).map_err(Refusal)?;
        let names = machine.config.device_names();
        let aliases = names.into_iter().zip(machine.ids).filter_map(|(name, id)| Some((name, id?)));
        let vm = self.launch(Vm::builder(machine.config).aliases(aliases.collect()), false)?;
        self.lock().started = Some(Started::of(vm.clone()));
        self.launched.send_replace(Some(vm));
        Ok(())
    }

    /// Builds the machine that was saved, which `machine` makes with the metadata that is there, in place of a start.
    /// `resume`: it goes on at once.
    pub fn restore(
        &self,
        resume: bool,
        machine: impl FnOnce(Option<&MmdsContents>) -> Result<VmBuilder, Refusal>,
    ) -> Result<(), Refusal> {
        let _turn = self.turn();
        self.is_not_started()?;
        let FullConfiguration { logger, metrics, .. } = match self.configuration() {
            configured if configured.has_machine() => {
                return Err(
                    "A snapshot has all of its machine; load it before anything else is configured.".into()
                );
            }
            configured => configured,
        };
        let vm = self.launch(machine(self.metadata().as_ref())?, !resume)?;
        let config = vm.config();
        let configuration = FullConfiguration::of(&config).called(vm.aliases());
        let mut state = self.lock();
        state.configuration = FullConfiguration { logger, metrics, ..configuration };
        state.metadata = MmdsContents::of(&config).or(state.metadata.take());
        state.started = Some(Started::of(vm.clone()));
        drop(state);
        self.launched.send_replace(Some(vm));
        Ok(())
    }

    fn launch(&self, builder: VmBuilder, stays_paused: bool) -> Result<Arc<Vm>, Refusal> {
        let (reply, answer) = mpsc::channel();
        let ended = |_| Refusal("The program is ending.".into());
        let order = Order::Launch { builder: builder.into(), stays_paused, reply };
        self.orders.send(order).map_err(|_| ended(()))?;
        answer.recv().map_err(|_| ended(()))?.map_err(Refusal)
    }

    /// Starts a machine of this configuration; if that fails, the program ends.
    pub fn start_or_end(&self, configuration: FullConfiguration) {
        let _turn = self.turn();
        self.lock().configuration = configuration;
        if let Err(Refusal(sentence)) = self.start_now() {
            // It fails only when the program is ending.
            _ = self.orders.send(Order::End(sentence));
        }
    }

    /// Changes the device that the API calls `id`, a `what`, while the machine runs.
    pub fn update(&self, what: &str, id: &str, patch: Patch) -> Result<(), Refusal> {
        let started = self.started_by_now()?;
        let name = started.devices.get(id).ok_or_else(|| Refusal(format!("There is no {what} '{id}'.")))?;
        self.update_device(name, patch)
    }

    /// Changes the device `name` of the running machine; the configuration says so as well.
    pub fn update_device(&self, name: &str, patch: Patch) -> Result<(), Refusal> {
        let _turn = self.turn();
        let Started { vm, devices } = self.started()?;
        vm.update(name, patch)?;
        let config = vm.config();
        let mut state = self.lock();
        state.configuration.take_over(&FullConfiguration::of(&config), &devices);
        if let Some(contents) = MmdsContents::of(&config) {
            state.metadata = Some(contents);
        }
        Ok(())
    }

    /// What guests can ask for, if anything was said.
    pub fn metadata(&self) -> Option<MmdsContents> {
        self.lock().metadata.clone()
    }

    /// Changes what guests can ask for. After an error it is as it was.
    pub fn set_metadata(
        &self,
        change: impl FnOnce(Option<MmdsContents>) -> Result<MmdsContents, Refusal>,
    ) -> Result<(), Refusal> {
        let _turn = self.turn();
        let contents = change(self.metadata())?;
        let (len, limit) = (serde_json::to_vec(&contents)?.len(), self.metadata_limit);
        if len > limit {
            return Err(Refusal(format!("The metadata would have {len} bytes; {limit} is the limit.")));
        }
        if let Some(vm) = self.vm_if_started() {
            for (name, patch) in contents.patches(&vm.config()) {
                vm.update(&name, patch)?;
            }
        }
        self.lock().metadata = Some(contents);
        Ok(())
    }

    /// What the program logs.
    pub fn logging(&self) -> &Logging {
        &self.logging
    }

    /// Changes what is logged, and where.
    pub fn log(&self, logger: Logger) -> Result<(), Refusal> {
        self.configure(|configuration| {
            self.logging.set(&logger).map_err(Refusal)?;
            configuration.logger = Some(logger);
            Ok(())
        })
    }

    /// The file that metrics are written to.
    pub fn metrics(&self) -> &MetricsFile {
        &self.metrics
    }
}

impl Started {
    /// A machine whose devices have in the API the names that whoever has built it gave them, or their own.
    fn of(vm: Arc<Vm>) -> Self {
        let alias = |name: &String| vm.aliases().get(name).unwrap_or(name).clone();
        let devices = vm.devices().iter().map(|device| (alias(&device.name), device.name.clone())).collect();
        Self { vm, devices }
    }
}
