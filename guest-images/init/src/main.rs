//! Process 1 of a guest: mounts what programs expect, tells the VMM that user space was reached, runs one
//! command (or a shell), tells how that ended, and switches the machine off.
//!
//! The command is what follows ` -- ` on the kernel command line. Two port writes go to the VMM; a VMM that
//! knows nothing of them ignores them, and the same facts stand on the console. When the machine goes on from a snapshot,
//! it makes itself what the VMM wants this clone to be.
//!
//! It is in every boot benchmark and inside every `vmm` binary, so it is small and quick: no libc, no heap, few
//! system calls, no sleeps. The image builder compiles it with `panic=abort`, and that is what makes it
//! free-standing; in an ordinary build (tests, lints) it is an ordinary program.

#![cfg_attr(all(panic = "abort", not(test)), no_std, no_main)]

mod clone;
mod command;
mod console;
#[cfg(all(panic = "abort", not(test)))]
mod freestanding;
mod machine;
mod mounts;
mod signals;
mod sys;

use core::ffi::CStr;

use clone::Clones;
use machine::PowerAction;
use signals::{Event, Signals};

/// Port written once, as soon as process 1 runs.
const PORT_PROGRESS: u16 = 0x610;
/// What is written there: user space runs, and reads the notes for clones.
const USER_SPACE_REACHED: u8 = 1 | 2;
/// Port written once, with the command's exit status.
const PORT_EXIT_STATUS: u16 = 0x611;

/// The ordinary build of the same program, which only tests and lints use.
#[cfg(not(all(panic = "abort", not(test))))]
fn main() {
    if std::process::id() != 1 {
        eprintln!("vmm-init: this is the init of a guest and only runs as process 1");
        return;
    }
    run(&[], core::iter::empty())
}

/// The life of process 1. `arguments` and `environment` are what the kernel passed, without a final null.
fn run<'a>(arguments: &'a [*const u8], environment: impl Iterator<Item = &'a CStr> + Clone) -> ! {
    // Blocked before the VMM or a child can be the cause of one, so none can be missed.
    let signals = Signals::block();
    sys::write_port(PORT_PROGRESS, USER_SPACE_REACHED);
    say!("user space reached");
    mounts::mount_all();
    machine::set_hostname();
    machine::loopback_up();
    machine::take_ctrl_alt_del();

    let command = command::of_kernel_command_line(arguments);
    let action = match command::spawn(command, environment, signals) {
        Ok(child) => supervise(signals, child),
        Err(error) => {
            say!("cannot start a process: {error}");
            PowerAction::Off
        }
    };
    signals.stop_processes();
    mounts::release_all();
    machine::finish(action)
}

/// Reaps every orphan until the command ends or somebody asks for a shutdown.
fn supervise(signals: Signals, command: rustix_core::process::Pid) -> PowerAction {
    let mut clones = Clones::watch();
    loop {
        match signals.next(clones.ask_after) {
            Event::ChildrenChanged => {
                while let Some((pid, status)) = signals::reap() {
                    if pid == command {
                        say!("exit status {status}");
                        sys::write_port(PORT_EXIT_STATUS, status);
                        return PowerAction::Off;
                    }
                }
            }
            Event::PowerButton if clones.were_announced() => {}
            Event::PowerButton => return PowerAction::Off,
            Event::Shutdown(action) => return action,
            Event::Nothing => clones.look(),
        }
    }
}
