//! What process 1 does when its machine goes on from a snapshot: it reads the note that the VMM has for this clone, and
//! makes the machine what the note says.
//!
//! The VMM counts how often the machine has gone on, and presses the power button for a guest that said that it reads
//! notes. A kernel that does not pass the button on leaves nothing but to ask now and then.

use core::ffi::CStr;
use core::time::Duration;

use rustix_core::fs::{Access, Mode, OFlags, access, open};
use rustix_core::io::{Errno, write};
use rustix_core::mount::mount_bind;
use rustix_core::net::{AddressFamily, SocketType, socket};
use rustix_core::system::sethostname;

use crate::{say, sys};

/// The port with the machine's generation; its other side is that of process 1's progress.
const PORT_GENERATION: u16 = 0x610;
/// What a port reads as that nobody answers.
const NOBODY: u8 = 0xff;
/// The port that tells whether somebody wants the machine to end.
const PORT_PRESSED: u16 = 0x611;
/// The port with the note.
const PORT_NOTE: u16 = 0x614;
/// Room for a note: a seed, two names and a line for each network interface.
const NOTE_BYTES: usize = 4096;

/// The kernel's driver that turns the power button into a signal.
const BUTTON: &CStr = c"/sys/bus/acpi/drivers/tiny-power-button";
/// How often process 1 asks where there is no button.
const ASK: Duration = Duration::from_secs(1);

/// A wall clock is right if it is behind by no more than this, in nanoseconds.
const CLOCK_TOLERANCE: u64 = 1_000_000;
/// A wall clock that is ahead by this is set back.
const CLOCK_STEP: u64 = 1_000_000_000;

/// Notices that the machine is another one than before.
pub struct Clones {
    generation: u8,
    /// How long to wait before the VMM is asked, where it cannot tell.
    pub ask_after: Option<Duration>,
}

impl Clones {
    /// Begins to watch. A machine that was saved before this is a clone already.
    pub fn watch() -> Self {
        let mut clones = Self { generation: 0, ask_after: None };
        clones.look();
        if sys::read_port::<u8>(PORT_GENERATION).is_some_and(|found| found != NOBODY)
            && access(BUTTON, Access::EXISTS).is_err()
        {
            clones.ask_after = Some(ASK);
        }
        clones
    }

    /// After a press of the power button: looks whether the machine is another one. Returns whether that was all: nobody
    /// wants it to end.
    pub fn were_announced(&mut self) -> bool {
        self.look();
        sys::read_port::<u8>(PORT_PRESSED) == Some(0)
    }

    /// Becomes another machine if this is one.
    pub fn look(&mut self) {
        let found = sys::read_port::<u8>(PORT_GENERATION).filter(|found| *found != NOBODY);
        match found {
            Some(found) if found != self.generation => self.generation = found,
            _ => return,
        }
        let mut buffer = [0; NOTE_BYTES];
        let asked = sys::monotonic_time();
        sys::write_port(PORT_NOTE, 0);
        for line in read_note(&mut buffer).split(|byte| *byte == b'\n') {
            if let Err((what, error)) = obey(line, asked) {
                say!("cannot {what} of a clone: {error}");
            }
        }
    }
}

/// The note up to its end.
fn read_note(buffer: &mut [u8; NOTE_BYTES]) -> &[u8] {
    let (words, _) = buffer.as_chunks_mut::<4>();
    for word in words {
        *word = sys::read_port::<u32>(PORT_NOTE).unwrap_or(0).to_le_bytes();
        if word[3] == 0 {
            break;
        }
    }
    let end = buffer.iter().position(|byte| *byte == 0).unwrap_or(buffer.len());
    &buffer[..end]
}

/// Does what one line says. `asked`: the monotonic time at which the note was asked for.
fn obey(line: &[u8], asked: u64) -> Result<(), (&'static str, Errno)> {
    let Some(at) = line.iter().position(|byte| *byte == b'=') else { return Ok(()) };
    let (key, value) = (&line[..at], &line[at + 1..]);
    match key {
        b"seed" => seed(value).map_err(|error| ("seed the random pool", error)),
        b"time" => set_clock(value, asked).map_err(|error| ("set the clock", error)),
        b"hostname" => sethostname(value).map_err(|error| ("set the host name", error)),
        b"machine-id" => set_machine_id(value).map_err(|error| ("set the machine id", error)),
        b"mac" => set_mac(value).map_err(|error| ("set a MAC address", error)),
        // Of a newer VMM.
        _ => Ok(()),
    }
}

/// Random bytes now come from a pool that has the VMM's in it.
fn seed(value: &[u8]) -> Result<(), Errno> {
    let mut entropy = sys::Entropy { bits: 256, bytes: 32, seed: [0; 32] };
    let (pairs, _) = value.as_chunks::<2>();
    for (byte, pair) in entropy.seed.iter_mut().zip(pairs) {
        *byte = hex(pair)?;
    }
    let random = open(c"/dev/urandom", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    sys::control(&random, &sys::ADD_ENTROPY, &mut entropy)?;
    sys::control(&random, &sys::RESEED, &mut ())
}

fn hex(text: &[u8]) -> Result<u8, Errno> {
    let text = str::from_utf8(text).map_err(|_| Errno::INVAL)?;
    u8::from_str_radix(text, 16).map_err(|_| Errno::INVAL)
}

/// `value` was the time when the note was asked for.
fn set_clock(value: &[u8], asked: u64) -> Result<(), Errno> {
    let then: u64 = str::from_utf8(value).ok().and_then(|text| text.parse().ok()).ok_or(Errno::INVAL)?;
    let now = then + sys::monotonic_time().saturating_sub(asked);
    let clock = sys::wall_clock();
    match clock.saturating_sub(now) {
        // Programs take it badly when a clock goes backwards, so one that is a little fast runs slower for a while.
        ahead @ 1..CLOCK_STEP => sys::slow_wall_clock(ahead),
        _ if clock.abs_diff(now) > CLOCK_TOLERANCE => sys::set_wall_clock(now),
        _ => Ok(()),
    }
}

const MACHINE_ID: &CStr = c"/etc/machine-id";
const OWN_MACHINE_ID: &CStr = c"/run/machine-id";

/// Writes the id down, over the file of a root file system that is not to be written if need be.
fn set_machine_id(id: &[u8]) -> Result<(), Errno> {
    match write_id(MACHINE_ID, id) {
        Err(Errno::ROFS) => {
            write_id(OWN_MACHINE_ID, id)?;
            mount_bind(OWN_MACHINE_ID, MACHINE_ID)
        }
        result => result,
    }
}

fn write_id(path: &CStr, id: &[u8]) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::from_raw_mode(0o444))?;
    let mut line = [b'\n'; 33];
    let length = id.len().min(32);
    line[..length].copy_from_slice(&id[..length]);
    write(&file, &line[..=length]).map(drop)
}

/// ARPHRD_ETHER (include/uapi/linux/if_arp.h).
const ETHERNET: u16 = 1;
/// Indices at which interfaces are looked for: those of devices come first.
const INTERFACES: core::ops::Range<u32> = 1..64;

/// Two addresses: the interface that has the first gets the second.
fn set_mac(value: &[u8]) -> Result<(), Errno> {
    let mut addresses = value.split(|byte| *byte == b' ').map(mac);
    let (Some(old), Some(new)) = (addresses.next(), addresses.next()) else { return Err(Errno::INVAL) };
    let (old, new) = (old?, new?);
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    for index in INTERFACES {
        let mut request = sys::InterfaceRequest::default();
        request.data[..4].copy_from_slice(&index.to_ne_bytes());
        let has_it = sys::control(&socket, &sys::INTERFACE_AT_INDEX, &mut request).is_ok()
            && sys::control(&socket, &sys::HARDWARE_ADDRESS, &mut request).is_ok()
            && request.data[..2] == ETHERNET.to_ne_bytes()
            && request.data[2..8] == old;
        if has_it {
            request.data[2..8].copy_from_slice(&new);
            return sys::control(&socket, &sys::SET_HARDWARE_ADDRESS, &mut request);
        }
    }
    Err(Errno::NODEV)
}

fn mac(text: &[u8]) -> Result<[u8; 6], Errno> {
    let mut address = [0; 6];
    let mut parts = text.split(|byte| *byte == b':');
    for byte in &mut address {
        *byte = hex(parts.next().ok_or(Errno::INVAL)?)?;
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_bytes_are_read() {
        assert_eq!(mac(b"02:00:00:00:0a:ff"), Ok([2, 0, 0, 0, 10, 255]));
        for text in [&b""[..], b"02:00:00:00:00", b"02:00:00:00:00:0g", b"02:00:00:00:00:\xff"] {
            assert!(mac(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_and_what_is_not_known_is_left() {
        for line in [&b""[..], b"time", b"colour=blue"] {
            assert_eq!(obey(line, 0), Ok(()), "{line:?}");
        }
        for line in [&b"time=soon"[..], b"seed=xy", b"mac=1", b"mac=02:00:00:00:00:01"] {
            assert!(obey(line, 0).is_err(), "{line:?}");
        }
    }
}
