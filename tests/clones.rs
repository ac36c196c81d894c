//! What restored machines have in common with their parent, and what not: real guests, several of one snapshot.
//!
//! The library runs them in this process, since most of what is looked at has to happen between two of its calls.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use harness::{Kernel, Needs, Place, binaries};
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm_core::event::What;
use vmm_core::snapshot::{ClockMode, Persona, Snapshot};
use vmm_core::{Milestone, SnapshotKind, Vm, VmBuilder, VmConfig};

/// Only ends a hang.
const DEADLINE: Duration = Duration::from_secs(60);
/// By how much a guest's clock may be wrong, in nanoseconds.
const TOLERANCE: u64 = 10_000_000;

/// A directory with what guests need.
struct Setup {
    dir: TempDir,
}

impl Setup {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let initrd = harness::initramfs_with(&[("peer", &binaries::stream_peer()?)])?;
        std::fs::write(dir.path().join("initrd"), initrd)?;
        Ok(Self { dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A machine with these kernel parameters and devices.
    fn config(&self, append: &str, devices: Value) -> Result<VmConfig> {
        let place = Place::choose(Needs::AnyKvm)?;
        let kernel = Kernel::Default.at(&place);
        harness::report::boots(&kernel.describe(), &place)?;
        Ok(serde_json::from_value(json!({
            "kernel": kernel.file()?,
            "initrd": self.path("initrd"),
            "memory": "128M",
            "append": append,
            "devices": devices,
        }))?)
    }

    fn start(&self, append: &str, devices: Value) -> Result<Guest> {
        let guest = Guest::over(Vm::builder(self.config(append, devices)?).build()?)?;
        guest.vm.start()?;
        Ok(guest)
    }

    /// Saves a machine that may go on; its console is as it was.
    fn save(&self, guest: &Guest) -> Result<()> {
        guest.vm.snapshot(&self.path("snapshot"), SnapshotKind::Full)?;
        Ok(())
    }

    fn snapshot(&self) -> Result<Snapshot> {
        Ok(Snapshot::open(&self.path("snapshot"))?)
    }

    /// A machine that goes on from the snapshot.
    fn clone_with(&self, change: impl FnOnce(VmBuilder) -> VmBuilder) -> Result<Guest> {
        let guest = Guest::over(change(Vm::restore(self.snapshot()?)).build()?)?;
        guest.vm.resume()?;
        Ok(guest)
    }
}

/// A machine and what it has printed.
struct Guest {
    vm: Vm,
    said: Arc<(Mutex<String>, Condvar)>,
    read: usize,
}

impl Guest {
    fn over(vm: Vm) -> Result<Self> {
        let mut console = vm.take_console().context("the console is taken once")?;
        let said: Arc<(Mutex<String>, Condvar)> = Arc::default();
        let guest = Self { vm, said: said.clone(), read: 0 };
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = console.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..count]).replace('\r', "");
                if let Ok(mut said) = said.0.lock() {
                    said.push_str(&text);
                }
                said.1.notify_all();
            }
        });
        Ok(guest)
    }

    /// Waits for `text` after what was waited for before; returns what came before it.
    fn expect(&mut self, text: &str) -> Result<String> {
        let lacks = |said: &mut String| !said[self.read..].contains(text);
        let said = self.said.0.lock().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
        let (said, _) = self
            .said
            .1
            .wait_timeout_while(said, DEADLINE, lacks)
            .map_err(|_| anyhow::anyhow!("the reader panicked"))?;
        let Some(at) = said[self.read..].find(text) else {
            bail!("'{text}' does not come: {}", *said);
        };
        let before = said[self.read..self.read + at].to_owned();
        self.read += at + text.len();
        Ok(before)
    }

    /// What it has printed until now; what is waited for comes after it.
    fn skip(&mut self) -> Result<String> {
        let said = self.said.0.lock().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
        self.read = said.len();
        Ok(said.clone())
    }

    fn send(&self, line: &str) -> Result<()> {
        Ok(writeln!(self.vm.console_input(), "{line}")?)
    }

    /// Runs a line of shell in a guest that runs [`SHELL`].
    fn shell(&mut self, line: &str) -> Result<String> {
        self.send(line)?;
        self.expect("<<")?;
        Ok(self.expect(">>")?.trim().to_owned())
    }

    /// Asks until the answer is `want`.
    fn until(&mut self, line: &str, want: &str) -> Result<()> {
        let began = Instant::now();
        loop {
            let answer = self.shell(line)?;
            if answer == want {
                return Ok(());
            }
            ensure!(began.elapsed() < DEADLINE, "'{line}' says '{answer}', and not '{want}'");
        }
    }
}

/// Runs lines of shell one by one, and marks what they print.
const SHELL: &str = "sh -c \"busybox mkdir /etc; busybox stty -echo; echo up; while read l; do echo '<<'; eval $l; echo '>>'; done\"";

/// What `peer clock` says.
struct Clock {
    wall: u64,
    monotonic: u64,
    backwards: u64,
    random: String,
    /// Nanoseconds since 1970 of the host's before and after.
    host: [u64; 2],
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

impl Clock {
    fn ask(guest: &mut Guest) -> Result<Self> {
        let before = now();
        guest.send("")?;
        guest.expect("clock: ")?;
        let line = guest.expect("\n")?;
        let host = [before, now()];
        let mut words = line.split(' ');
        let mut number = || words.next().context("a number")?.parse::<u64>().context("a number");
        let (wall, monotonic, backwards) = (number()?, number()?, number()?);
        Ok(Self { wall, monotonic, backwards, random: words.next().context("random bytes")?.into(), host })
    }

    /// It was read at some moment between the two of the host's.
    fn is_right(&self) -> bool {
        (self.host[0] - TOLERANCE..=self.host[1] + TOLERANCE).contains(&self.wall)
    }

    /// The least and the most that the wall clock can be behind the host's.
    fn behind(&self) -> [i128; 2] {
        self.host.map(|host| i128::from(host) - i128::from(self.wall))
    }

    /// The wall clock is as right as it was at `before`, if it is not just right.
    fn is_no_less_right_than(&self, before: &Self) -> Result<()> {
        let ([least, most], [was_least, was_most]) = (self.behind(), before.behind());
        let tolerance = i128::from(TOLERANCE);
        let same = least <= was_most + tolerance && most + tolerance >= was_least;
        let (now, was) = (self.behind(), before.behind());
        ensure!(same || self.is_right(), "the wall clock is {now:?} ns behind, and it was {was:?}");
        Ok(())
    }

    /// Asks until the wall clock is right.
    fn until_right(guest: &mut Guest) -> Result<Self> {
        let began = Instant::now();
        loop {
            let clock = Self::ask(guest)?;
            if clock.is_right() {
                return Ok(clock);
            }
            ensure!(began.elapsed() < DEADLINE, "the wall clock stays {:?} ns behind", clock.behind());
        }
    }

    /// The monotonic clock went on since `before` as the host's did, less what it stood still.
    fn went_on_since(&self, before: &Self, still: u64) -> Result<()> {
        let least = (self.host[0] - before.host[1]).saturating_sub(still + TOLERANCE);
        let most = (self.host[1] - before.host[0]).saturating_sub(still) + TOLERANCE;
        let passed = self.monotonic.checked_sub(before.monotonic).context("it went backwards")?;
        ensure!((least..=most).contains(&passed), "{passed} ns passed, and it should be {least} to {most}");
        ensure!(self.backwards == 0, "{} steps backwards", self.backwards);
        Ok(())
    }
}

#[test]
fn clones_have_random_numbers_of_their_own_whatever_their_init_is() -> Result<()> {
    let setup = Setup::new()?;
    // No init of ours: the kernel alone is told.
    let mut parent = setup.start("rdinit=/bin/peer -- clock", json!([]))?;
    parent.expect("ticking")?;
    Clock::ask(&mut parent)?;
    setup.save(&parent)?;
    let mut random = vec![Clock::ask(&mut parent)?.random];
    let clones = (0..4).map(|_| setup.clone_with(|vm| vm)).collect::<Result<Vec<_>>>()?;
    for mut clone in clones {
        random.push(Clock::ask(&mut clone)?.random);
    }
    for (i, bytes) in random.iter().enumerate() {
        ensure!(bytes.len() == 32 && !random[..i].contains(bytes), "{random:?}");
    }
    Ok(())
}

/// How clones hear of themselves: with ACPI by an interrupt, without by asking.
fn becomes_what_its_note_says(acpi: bool) -> Result<()> {
    let setup = Setup::new()?;
    let net = |mac: &str| json!([{"kind": "net", "user": true, "mac": mac}]);
    let parameters = if acpi { "" } else { "acpi=off" };
    let mut parent = setup.start(&format!("{parameters} -- {SHELL}"), net("02:00:00:00:00:01"))?;
    parent.expect("up\n")?;
    let old = parent.shell("cat /proc/sys/kernel/hostname")?;
    setup.save(&parent)?;

    for number in 1..=2u8 {
        let mut snapshot = setup.snapshot()?;
        let mac = format!("02:00:00:00:01:0{number}");
        let mut config = snapshot.config().clone();
        config.devices = serde_json::from_value(net(&mac))?;
        snapshot.set_config(config)?;
        let id = format!("{number:032x}");
        let persona = Persona {
            hostname: Some(format!("clone-{number}").parse().map_err(anyhow::Error::msg)?),
            machine_id: Some(id.parse().map_err(anyhow::Error::msg)?),
            ..Persona::default()
        };
        let mut clone = Guest::over(Vm::restore(snapshot).persona(persona).build()?)?;
        clone.vm.resume()?;
        clone.until("cat /proc/sys/kernel/hostname", &format!("clone-{number}"))?;
        clone.until("cat /etc/machine-id", &id)?;
        clone.until("cat /sys/class/net/eth0/address", &mac)?;
        if acpi {
            // What told it was no press of the button. This is one.
            clone.vm.press_power_button()?;
            ensure!(clone.vm.wait_timeout(DEADLINE).is_some(), "the power button does nothing any more");
        }
    }
    ensure!(parent.shell("cat /proc/sys/kernel/hostname")? == old, "the parent is another");
    Ok(())
}

#[test]
fn a_clone_becomes_what_its_note_says() -> Result<()> {
    becomes_what_its_note_says(true)
}

#[test]
fn a_clone_without_acpi_becomes_what_its_note_says() -> Result<()> {
    becomes_what_its_note_says(false)
}

/// The interrupt that tells of a note may come long before its init looks for one, and twice.
#[test]
fn a_machine_that_was_saved_before_its_init_looks_for_notes_makes_clones() -> Result<()> {
    let setup = Setup::new()?;
    let parent = Guest::over(Vm::builder(setup.config(&format!("-- {SHELL}"), json!([]))?).build()?)?;
    let mut events = parent.vm.events();
    parent.vm.start()?;
    let ready = What::Milestone(Milestone::UserSpaceReached);
    ensure!(events.any(|event| event.what == ready), "it ended before");
    // It would come to its shell while its memory is written.
    parent.vm.pause()?;
    setup.save(&parent)?;
    drop(parent);
    for name in ["a", "b"] {
        let persona =
            Persona { hostname: Some(name.parse().map_err(anyhow::Error::msg)?), ..Persona::default() };
        let mut clone = setup.clone_with(|vm| vm.persona(persona))?;
        // One of it, before it has got any further.
        clone.vm.pause()?;
        setup.save(&clone)?;
        clone.vm.resume()?;
        // Where all this was slow, it was up before, and says so no more.
        clone.until("cat /proc/sys/kernel/hostname", name)?;
        clone.vm.press_power_button()?;
        ensure!(clone.vm.wait_timeout(DEADLINE).is_some(), "the power button does nothing any more");
    }
    Ok(())
}

#[test]
fn a_machine_that_was_saved_anywhere_in_its_boot_makes_clones() -> Result<()> {
    let setup = Setup::new()?;
    let mut parent = setup.start(&format!("earlyprintk=ttyS0 loglevel=7 -- {SHELL}"), json!([]))?;
    let mut saved = 0;
    loop {
        for _ in 0..8 {
            parent.expect("\n")?;
        }
        parent.vm.pause()?;
        // It was faster than who reads.
        if parent.skip()?.contains("up\n") {
            break;
        }
        setup.save(&parent)?;
        let mut clone = setup.clone_with(|vm| vm)?;
        clone.expect("up\n")?;
        saved += 1;
        parent.vm.resume()?;
    }
    ensure!(saved > 3, "saved {saved} times on its way");
    Ok(())
}

#[test]
fn a_snapshot_of_a_clone_makes_clones() -> Result<()> {
    let setup = Setup::new()?;
    let mut parent = setup.start(&format!("-- {SHELL}"), json!([]))?;
    parent.expect("up\n")?;
    setup.save(&parent)?;
    for name in ["a", "b", "c"] {
        let persona =
            Persona { hostname: Some(name.parse().map_err(anyhow::Error::msg)?), ..Persona::default() };
        let mut clone = setup.clone_with(|vm| vm.persona(persona))?;
        clone.until("cat /proc/sys/kernel/hostname", name)?;
        setup.save(&clone)?;
    }
    Ok(())
}

fn clocks_are_right(parameters: &str) -> Result<()> {
    let setup = Setup::new()?;
    let mut parent = setup.start(&format!("{parameters} -- peer clock"), json!([]))?;
    parent.expect("ticking")?;
    // A guest that boots while others do may have its time late, as the host's CPUs are not its own.
    let before = Clock::ask(&mut parent)?;
    setup.save(&parent)?;
    let after = Clock::ask(&mut parent)?;
    after.is_no_less_right_than(&before)?;
    // A snapshot is a time in which the guest was not scheduled.
    after.went_on_since(&before, 0)?;
    drop(parent);

    for sleep in [Duration::ZERO, Duration::from_secs(3)] {
        thread::sleep(sleep);
        let mut clone = setup.clone_with(|vm| vm)?;
        let first = Clock::ask(&mut clone)?;
        first.is_no_less_right_than(&before)?;
        first.went_on_since(&before, 0)?;
        // What is left of an error, its init takes away.
        let right = Clock::until_right(&mut clone)?;
        right.went_on_since(&first, 0)?;
    }
    Ok(())
}

#[test]
fn clocks_of_a_clone_are_right_whenever_it_goes_on() -> Result<()> {
    clocks_are_right("")
}

#[test]
fn clocks_of_a_clone_on_kvm_clock_are_right_whenever_it_goes_on() -> Result<()> {
    clocks_are_right("clocksource=kvm-clock")
}

#[test]
fn a_clone_whose_time_stood_still_knows_what_time_it_is() -> Result<()> {
    let setup = Setup::new()?;
    // A KVM that does not virtualise the time stamp counter can let none stand still, so this is no guest of that.
    let mut parent = setup.start("clocksource=kvm-clock -- peer clock", json!([]))?;
    parent.expect("ticking")?;
    setup.save(&parent)?;
    let before = Clock::ask(&mut parent)?;
    drop(parent);
    let stood = Instant::now();
    thread::sleep(Duration::from_secs(2));
    let mut clone = Guest::over(Vm::restore(setup.snapshot()?).clock_mode(ClockMode::Freeze).build()?)?;
    let stood = stood.elapsed().as_nanos() as u64;
    clone.vm.resume()?;
    // Its init hears of the time a moment after it goes on.
    let clock = Clock::until_right(&mut clone)?;
    // What the parent lived after the snapshot is not in the clone's past.
    let passed = clock.monotonic.saturating_sub(before.monotonic);
    let most = clock.host[1] - before.host[0] - stood + TOLERANCE;
    ensure!(passed <= most, "{passed} ns passed, and it should be {most} at most");
    ensure!(clock.backwards == 0, "{} steps backwards", clock.backwards);
    Ok(())
}

/// Connects to port 5000 of the guest through the socket, and has a word come back.
fn echo(socket: &std::path::Path) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(b"CONNECT 5000\n")?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).context("the guest does not answer")?;
        answer.extend(byte);
    }
    ensure!(answer.starts_with(b"OK "), "{}", String::from_utf8_lossy(&answer));
    stream.write_all(b"eword")?;
    let mut word = [0; 4];
    stream.read_exact(&mut word)?;
    ensure!(&word == b"word");
    Ok(stream)
}

#[test]
fn a_clones_sockets_are_new_and_its_listeners_stay() -> Result<()> {
    let setup = Setup::new()?;
    let device = |name: &str, cid: u32| json!([{"kind": "vsock", "path": setup.path(name), "cid": cid}]);
    let listen = |name: &str| UnixListener::bind(setup.path(&format!("{name}_7")));
    let host = listen("parent")?;
    let shell = "sh -c \"peer serve vsock:5000 & peer wait-for-end vsock:2:7; echo again; peer wait-for-end vsock:2:7\"";
    let mut parent = setup.start(&format!("-- {shell}"), device("parent", 3))?;
    parent.expect("serving")?;
    let (mut call, _) = host.accept()?;
    call.read_exact(&mut [0; 2])?;
    call.write_all(b"x")?;
    parent.expect("connected")?;
    let mut held = echo(&setup.path("parent"))?;
    setup.save(&parent)?;
    held.write_all(b"more")?;
    held.read_exact(&mut [0; 4]).context("the parent's connections go on")?;

    for (name, cid) in [("first", 9), ("second", 3)] {
        let mut snapshot = setup.snapshot()?;
        let mut config = snapshot.config().clone();
        config.devices = serde_json::from_value(device(name, cid))?;
        snapshot.set_config(config)?;
        let host = listen(name)?;
        let mut clone = Guest::over(Vm::restore(snapshot).build()?)?;
        clone.vm.resume()?;
        // The connection of its parent's ends; the next one has the new CID, or the device would not take it.
        clone.expect("ended\nagain\n")?;
        let (mut call, _) = host.accept()?;
        call.read_exact(&mut [0; 2])?;
        call.write_all(b"x")?;
        clone.expect("connected")?;
        echo(&setup.path(name))?;
    }
    held.write_all(b"more")?;
    held.read_exact(&mut [0; 4]).context("the parent's connections still go on")?;
    Ok(())
}

#[test]
fn what_a_guest_has_seen_cannot_be_another() -> Result<()> {
    let setup = Setup::new()?;
    let image = |name: &str, bytes: u64| -> Result<()> {
        let file = std::fs::File::create(setup.path(name))?;
        Ok(file.set_len(bytes)?)
    };
    image("disk", 4 << 20)?;
    image("larger", 8 << 20)?;
    image("smaller", 2 << 20)?;
    let disk = |name: &str| json!([{"kind": "disk", "path": setup.path(name)}]);
    let mut parent = setup.start(&format!("-- {SHELL}"), disk("disk"))?;
    parent.expect("up\n")?;
    setup.save(&parent)?;
    drop(parent);

    let mut snapshot = setup.snapshot()?;
    let config = snapshot.config().clone();
    let refused = snapshot.set_config(VmConfig { cpus: 2, ..config.clone() }).err().map(|e| e.to_string());
    ensure!(refused.as_deref().is_some_and(|text| text.contains("vCPUs: 1")), "{refused:?}");

    let with = |name: &str| -> Result<_> {
        let mut snapshot = setup.snapshot()?;
        let devices = serde_json::from_value(disk(name))?;
        snapshot.set_config(VmConfig { devices, ..config.clone() })?;
        Ok(Vm::restore(snapshot).build())
    };
    let refused = with("smaller")?.err().map(|error| error.to_string());
    let want = "a disk of this many bytes: 4194304, and this one 2097152";
    ensure!(refused.as_deref().is_some_and(|text| text.contains(want)), "{refused:?}");
    let mut clone = Guest::over(with("larger")??)?;
    clone.vm.resume()?;
    clone.until("cat /sys/block/vda/size", "16384")
}
