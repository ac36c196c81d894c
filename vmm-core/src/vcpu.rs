//! One thread per vCPU: runs the guest and takes its exits to the buses.

use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use tracing::{Span, warn};

use crate::bus::Bus;
use crate::event::Journal;
use crate::exits::ExitLog;
use crate::hypervisor::{Exit, HvError, Kick, Vcpu, VcpuFailure};
use crate::machine::Milestone;

/// The address spaces of a machine.
#[derive(Default)]
pub struct Buses {
    /// I/O ports.
    pub pio: Bus,
    /// Physical addresses that are not RAM.
    pub mmio: Bus,
}

/// Where a vCPU writes down what it does.
pub struct Watch {
    /// The machine's.
    pub journal: Arc<Journal>,
    /// The vCPU's own.
    pub exits: Arc<ExitLog>,
    /// Of the vCPU's thread.
    pub span: Span,
}

/// Why a vCPU's thread ended.
#[derive(Debug)]
pub enum VcpuEnd {
    /// It was told to.
    Told,
    /// Triple fault.
    Shutdown,
    /// The guest cannot go on.
    Failed(VcpuFailure),
    /// A call of the hypervisor failed.
    Hypervisor(HvError),
    /// A bug: the thread panicked.
    Panicked,
}

/// What a vCPU is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Run,
    Pause,
    Stop,
}

struct GateState {
    want: Want,
    /// The thread waits at the gate, or has ended.
    parked: bool,
    /// Lies here while the thread waits, for whoever wants to look at it.
    vcpu: Option<Box<dyn Vcpu>>,
    /// The thread has ended, and another may have its number.
    ended: bool,
}

/// How often a vCPU is kicked that does not stand still yet.
const KICK_INTERVAL: Duration = Duration::from_millis(1);
/// How often in a row a vCPU that is to stand still is let run on to come to a better place. What has none is no guest of
/// ours: it stays behind one instruction for ever.
const MOST_TRIES: u32 = 100;

/// Where a vCPU's thread waits while its machine is paused.
///
/// The thread looks at the gate only when a kick has interrupted it: then KVM has completed the last exit, so
/// the vCPU's registers are whole. If something else is under way ([`Vcpu::is_whole`]), it runs on until the next kick.
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits as long as it is told to pause, unless it is not `whole`. Returns the vCPU if it is to go on.
    fn pass(&self, vcpu: Box<dyn Vcpu>, whole: bool) -> Option<Box<dyn Vcpu>> {
        let mut state = self.lock();
        if state.want == Want::Pause && !whole {
            return Some(vcpu);
        }
        state.vcpu = Some(vcpu);
        while state.want == Want::Pause {
            if !state.parked {
                state.parked = true;
                self.changed.notify_all();
            }
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        state.parked = false;
        state.vcpu.take().filter(|_| state.want == Want::Run)
    }

    fn set(&self, want: Want) {
        self.lock().want = want;
        self.changed.notify_all();
    }

    /// Sets what is wanted and makes the vCPU look at it.
    fn interrupt(&self, want: Want, kick: &dyn Kick) {
        let mut state = self.lock();
        state.want = want;
        // Under the lock, so the thread is still the one that is meant.
        if !state.ended {
            kick.kick();
        }
        self.changed.notify_all();
    }

    fn end(&self) {
        let mut state = self.lock();
        (state.parked, state.ended) = (true, true);
        self.changed.notify_all();
    }
}

/// A vCPU on its thread.
pub struct VcpuThread {
    gate: Arc<Gate>,
    kick: Arc<dyn Kick>,
    thread: Option<JoinHandle<()>>,
    /// The kernel's number of the thread.
    tid: i32,
}

impl VcpuThread {
    /// Starts the thread of vCPU `id`, which runs the guest at once. `on_end` is called on that thread.
    pub fn start(
        id: u8,
        mut vcpu: Box<dyn Vcpu>,
        buses: Arc<Buses>,
        watch: Watch,
        on_end: impl FnOnce(VcpuEnd) + Send + 'static,
    ) -> Result<Self, HvError> {
        let gate = Arc::new(Gate {
            state: Mutex::new(GateState { want: Want::Run, parked: false, vcpu: None, ended: false }),
            changed: Condvar::new(),
        });
        let (attached, attachment) = mpsc::channel();
        let thread = std::thread::Builder::new().name(format!("vcpu{id}")).spawn({
            let gate = gate.clone();
            move || {
                let _entered = watch.span.clone().entered();
                let run = std::panic::AssertUnwindSafe(|| match vcpu.attach() {
                    Ok(kick) => {
                        _ = attached.send(Ok((kick, rustix::thread::gettid())));
                        run(vcpu, &gate, &buses, &watch)
                    }
                    Err(error) => {
                        _ = attached.send(Err(error));
                        VcpuEnd::Told
                    }
                });
                let end = std::panic::catch_unwind(run).unwrap_or(VcpuEnd::Panicked);
                gate.end();
                on_end(end);
            }
        });
        let thread = thread.map_err(|source| HvError::Call { call: "clone", source })?;
        let died = || HvError::Call { call: "clone", source: std::io::ErrorKind::BrokenPipe.into() };
        match attachment.recv().unwrap_or_else(|_| Err(died())) {
            Ok((kick, tid)) => Ok(Self { gate, kick, thread: Some(thread), tid: tid.as_raw_nonzero().get() }),
            Err(error) => {
                _ = thread.join();
                Err(error)
            }
        }
    }

    /// Tells the vCPU to stand still; [`Self::wait_parked`] waits until it does.
    pub fn pause(&self) {
        self.gate.interrupt(Want::Pause, &*self.kick);
    }

    /// Waits until the vCPU stands still or has ended.
    pub fn wait_parked(&self) {
        let mut state = self.gate.lock();
        while !state.parked {
            let waited = self.gate.changed.wait_timeout(state, KICK_INTERVAL);
            state = waited.unwrap_or_else(|e| e.into_inner()).0;
            if !state.parked {
                self.kick.kick();
            }
        }
    }

    /// Time that the thread has run, in the guest and for it.
    pub fn cpu_time(&self) -> Duration {
        thread_time(self.tid)
    }

    /// Looks at a vCPU that stands still; `None` if it has ended.
    pub fn with_parked<T>(&self, look: impl FnOnce(&dyn Vcpu) -> T) -> Option<T> {
        self.gate.lock().vcpu.as_ref().map(|vcpu| look(&**vcpu))
    }

    /// Lets a paused vCPU go on.
    pub fn resume(&self) {
        self.gate.set(Want::Run);
    }

    /// Tells the vCPU to end; dropping it waits for that.
    pub fn stop(&self) {
        self.gate.interrupt(Want::Stop, &*self.kick);
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }
}

fn run(mut vcpu: Box<dyn Vcpu>, gate: &Gate, buses: &Buses, watch: &Watch) -> VcpuEnd {
    let (mut first, mut tries) = (true, 0);
    loop {
        let exit = match vcpu.run() {
            Ok(exit) => exit,
            Err(error) => return VcpuEnd::Hypervisor(error),
        };
        if std::mem::take(&mut first) {
            watch.journal.reach(Milestone::FirstExit);
        }
        watch.exits.count(&exit);
        // An item of a string instruction is an access of its own.
        match exit {
            Exit::IoIn { port, width, data } => {
                data.chunks_mut(width).for_each(|item| _ = buses.pio.read(port.into(), item));
            }
            Exit::IoOut { port, width, data } => {
                data.chunks(width).for_each(|item| _ = buses.pio.write(port.into(), item));
            }
            Exit::MmioRead { addr, data } => _ = buses.mmio.read(addr, data),
            Exit::MmioWrite { addr, data } => _ = buses.mmio.write(addr, data),
            Exit::Interrupted => {
                let whole = match vcpu.is_whole() {
                    Ok(whole) => whole,
                    Err(error) => return VcpuEnd::Hypervisor(error),
                };
                tries = if whole { 0 } else { tries + 1 };
                if tries == MOST_TRIES {
                    warn!("the guest stays behind a breakpoint; if it is saved there, that may be lost");
                }
                match gate.pass(vcpu, whole || tries >= MOST_TRIES) {
                    Some(again) => vcpu = again,
                    None => return VcpuEnd::Told,
                }
            }
            Exit::Shutdown => return VcpuEnd::Shutdown,
            Exit::Failed(failure) => return VcpuEnd::Failed(failure),
        }
    }
}

/// Time that a thread of this process has run; zero when it has ended, or the kernel does not tell.
pub fn thread_time(tid: i32) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/self/task/{tid}/schedstat")).unwrap_or_default();
    let nanos = text.split_whitespace().next().and_then(|number| number.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}
