//! The virtual machine's state machine.

use std::fmt;

/// Where a machine is in its life.
///
/// ```text
///            start            pause
///  Created ────────► Running ◄──────► Paused
///     │                 │     resume     │
///     │ stop            │ stop, or the   │ stop
///     │                 ▼ guest ends     │
///     └────────────► Stopping ◄──────────┘
///                       │ threads have ended
///                       ▼
///                 Stopped(reason)
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmState {
    /// Built; no guest instruction has run.
    Created,
    /// The guest runs.
    Running,
    /// vCPUs and devices stand still.
    Paused,
    /// The machine is being taken down.
    Stopping,
    /// Nothing runs any more.
    Stopped(StopReason),
}

/// Why a machine ended.
///
/// ```no_run
/// use std::time::Duration;
/// use vmm_core::StopReason;
///
/// # fn stop(vm: &vmm_core::Vm) {
/// match vm.stop(Duration::from_secs(10)) {
///     StopReason::GuestPowerOff => println!("it took the time to shut down"),
///     reason => println!("{reason} ({})", reason.name()),
/// }
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The guest asked for a reset, or triple faulted, which is how a PC resets itself.
    GuestReset,
    /// The guest switched itself off.
    GuestPowerOff,
    /// The guest's kernel panicked.
    GuestPanic,
    /// [`crate::Vm::kill`] or [`crate::Vm::stop`] was called, or the handle was dropped.
    Requested,
    /// The machine could not go on: a sentence for the operator.
    Failed(String),
}

impl StopReason {
    /// A name that stays, for programs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::GuestReset => "guest_reset",
            Self::GuestPowerOff => "guest_power_off",
            Self::GuestPanic => "guest_panic",
            Self::Requested => "requested",
            Self::Failed(_) => "failed",
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GuestReset => f.write_str("the guest rebooted"),
            Self::GuestPowerOff => f.write_str("the guest powered off"),
            Self::GuestPanic => f.write_str("the guest's kernel panicked"),
            Self::Requested => f.write_str("stopped on request"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

/// A transition that the diagram of [`VmState`] does not have.
///
/// ```no_run
/// use vmm_core::VmError;
///
/// # fn pause(vm: &vmm_core::Vm) -> Result<(), VmError> {
/// match vm.pause() {
///     Err(VmError::State(refused)) => println!("it is {} already", refused.from.name()),
///     other => return other,
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a machine that is {} cannot become {}", from.name(), to.name())]
pub struct IllegalTransition {
    /// State it is in.
    pub from: VmState,
    /// State asked for.
    pub to: VmState,
}

impl VmState {
    /// One lower case word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped(_) => "stopped",
        }
    }

    /// Goes to `to`, if the diagram has that arrow.
    pub fn transition(&mut self, to: VmState) -> Result<(), IllegalTransition> {
        use VmState::{Created, Paused, Running, Stopped, Stopping};
        match (&*self, &to) {
            (Created, Running | Stopping)
            | (Running, Paused | Stopping)
            | (Paused, Running | Stopping)
            | (Stopping, Stopped(_)) => {
                *self = to;
                Ok(())
            }
            _ => Err(IllegalTransition { from: self.clone(), to }),
        }
    }

    /// Whether it is in `from`, from where it is to go to `to`.
    pub fn expect(&self, from: &VmState, to: VmState) -> Result<(), IllegalTransition> {
        match self == from {
            true => Ok(()),
            false => Err(IllegalTransition { from: self.clone(), to }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_arrows_of_the_diagram_exist() {
        use VmState::{Created, Paused, Running, Stopped, Stopping};
        let stopped = || Stopped(StopReason::Requested);
        let all = [Created, Running, Paused, Stopping, stopped()];
        let arrows = [
            (Created, Running),
            (Created, Stopping),
            (Running, Paused),
            (Running, Stopping),
            (Paused, Running),
            (Paused, Stopping),
            (Stopping, stopped()),
        ];
        for from in &all {
            for to in &all {
                let mut state = from.clone();
                let legal = arrows.contains(&(from.clone(), to.clone()));
                assert_eq!(state.transition(to.clone()).is_ok(), legal, "{from:?} -> {to:?}");
                assert_eq!(&state, if legal { to } else { from });
            }
        }
    }
}
