//! Settings of the machine itself: name, loopback interface, power.

use rustix_core::net::{AddressFamily, SocketType, socket};
use rustix_core::system::{RebootCommand, reboot, sethostname, uname};

use crate::mounts::read_file;
use crate::{say, sys};

/// What a kernel calls a machine that nobody has named.
const UNNAMED: &[u8] = b"(none)";
const DEFAULT_NAME: &[u8] = b"vmm";

/// How the machine is to end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum PowerAction {
    /// Power off where the machine can, else restart: a VMM ends in both cases.
    Off,
    /// Restart.
    Restart,
}

/// Names the machine from /etc/hostname, unless `hostname=` on the kernel command line did.
pub fn set_hostname() {
    if uname().nodename().to_bytes() != UNNAMED {
        return;
    }
    let mut buffer = [0; 64];
    let name = read_file(c"/etc/hostname", &mut buffer).trim_ascii();
    if let Err(error) = sethostname(if name.is_empty() { DEFAULT_NAME } else { name }) {
        say!("cannot set the host name: {error}");
    }
}

/// IFF_UP and IFF_RUNNING (include/uapi/linux/if.h).
const UP: u16 = 0x1 | 0x40;

/// Brings the loopback interface up; the kernel gives it its addresses. A kernel without network has none.
pub fn loopback_up() {
    let Ok(socket) = socket(AddressFamily::INET, SocketType::DGRAM, None) else { return };
    let mut request = sys::InterfaceRequest::default();
    request.name[..2].copy_from_slice(b"lo");
    request.data[..2].copy_from_slice(&UP.to_ne_bytes());
    if let Err(error) = sys::control(&socket, &sys::SET_INTERFACE_FLAGS, &mut request) {
        say!("cannot bring up lo: {error}");
    }
}

/// Makes Ctrl-Alt-Del reach this process as SIGINT instead of restarting the machine on the spot.
pub fn take_ctrl_alt_del() {
    if let Err(error) = reboot(RebootCommand::CadOff) {
        say!("cannot take over Ctrl-Alt-Del: {error}");
    }
}

/// Stops the machine.
pub fn finish(action: PowerAction) -> ! {
    // The last lines may still wait for their turn on a serial line.
    sys::drain_console();
    if action == PowerAction::Off && can_power_off() {
        let _ = reboot(RebootCommand::PowerOff);
    }
    loop {
        let _ = reboot(RebootCommand::Restart);
    }
}

/// Room for the DSDT of a machine with dozens of devices; a larger one is searched as far as it fits.
const DSDT_BYTES: usize = 64 << 10;

/// A kernel that has no way to switch the power off halts for ever when asked to, and does not come back to
/// try something else. ACPI's way is the sleep state S5, which the DSDT has to name.
fn can_power_off() -> bool {
    let mut buffer = [0; DSDT_BYTES];
    read_file(c"/sys/firmware/acpi/tables/DSDT", &mut buffer).windows(4).any(|name| name == b"_S5_")
}
