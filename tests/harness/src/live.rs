//! A guest whose devices change while it runs, through the library's example `live`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::guest::{DEADLINE, Run, Running};
use crate::kernel::Kernel;
use crate::net::{GUEST_ADDRESS, HOST_ADDRESS, NetNs, TAP};
use crate::place::{Needs, Place};
use crate::process::Program;
use crate::scratch::Scratch;
use crate::{binaries, report};

/// Counters of a device, by name.
pub type Counters = BTreeMap<String, u64>;

/// A machine that is described as the library knows it, and then runs. Its root file system is an image that it reads only.
pub struct Live<'a> {
    place: Place,
    within: Option<&'a NetNs>,
    config: Value,
    files: Scratch,
}

impl<'a> Live<'a> {
    /// A machine of 256 MiB with the demo's root file system.
    pub fn new() -> Result<Self> {
        Self::at(&Place::choose(Needs::AnyKvm)?)
    }

    /// As [`Self::new`], at this place.
    pub fn at(place: &Place) -> Result<Self> {
        let root =
            json!({"kind": "disk", "path": place.provide(&crate::demo_image()?)?, "ro": true, "root": true});
        let config = json!({"devices": [root]});
        Ok(Self { place: place.clone(), within: None, config, files: Scratch::new(place)? })
    }

    /// As [`Self::new`], with the VMM in this network namespace and its tap as the guest's network.
    pub fn within(net: &'a NetNs) -> Result<Self> {
        let mut live = Self::at(net.place())?.device(json!({"kind": "net", "tap": TAP}));
        live.within = Some(net);
        Ok(live)
    }

    /// Its RAM.
    pub fn memory(mut self, size: &str) -> Self {
        self.config["memory"] = size.into();
        self
    }

    /// How it reaches its devices: `mmio` or `pci`.
    pub fn transport(mut self, name: &str) -> Self {
        self.config["transport"] = name.into();
        self
    }

    /// One more device.
    pub fn device(mut self, config: Value) -> Self {
        if let Some(devices) = self.config["devices"].as_array_mut() {
            devices.push(config);
        }
        self
    }

    /// The path of a file of the test's own where the VMM runs.
    pub fn path(&self, name: &str) -> String {
        self.files.path(name)
    }

    /// Runs a line of shell where the VMM runs, among the test's own files.
    pub fn on_host(&self, line: &str) -> Result<String> {
        self.files.shell(line)
    }

    /// Runs a line of shell as well as [`Self::on_host`], when the machine has ended.
    pub fn at_the_end(&mut self, line: &str) {
        self.files.at_end(line.into());
    }

    /// Boots it; `line` is shell for the guest, without double quotes.
    pub fn start(mut self, line: &str) -> Result<RunningLive> {
        let kernel = Kernel::Default.at(&self.place);
        self.config["kernel"] = self.place.provide(&kernel.file()?)?.into();
        let ip = match self.within {
            Some(_) => format!("ip={GUEST_ADDRESS}::{HOST_ADDRESS}:255.255.255.0::eth0:off"),
            None => String::new(),
        };
        self.config["append"] = format!("{ip} -- sh -c \"{line}\"").into();
        report::boots(&kernel.describe(), &self.place)?;
        let config = tempfile::NamedTempFile::new()?;
        std::fs::write(config.path(), serde_json::to_vec(&self.config)?)?;
        let example = binaries::build(&["--package", "vmm-core", "--example", "live"])?;
        let program = Program::new([self.place.provide(&example)?, self.place.provide(config.path())?]);
        let program = self.within.map_or(program.clone(), |net| net.within(&program));
        let guest = Running::start(program, self.place, DEADLINE, Vec::new(), kernel)?;
        let mut guest = RunningLive { guest, files: self.files, answered: 0, _config: config };
        // The file was read when the machine runs.
        guest.counters("disk0")?;
        Ok(guest)
    }
}

/// A machine that runs.
pub struct RunningLive {
    guest: Running<'static>,
    files: Scratch,
    /// Bytes of its output up to the end of the last answer.
    answered: usize,
    _config: tempfile::NamedTempFile,
}

impl RunningLive {
    /// As [`Running::expect`]; answers of the machine are among what the guest prints.
    pub fn expect(&mut self, text: &str) -> Result<String> {
        self.guest.expect(text)
    }

    /// Types a line on the console.
    pub fn send(&mut self, line: &str) -> Result<()> {
        self.guest.send(format!("{line}\n"))
    }

    /// Changes a device, and returns its counters after that. The error is what the machine says.
    pub fn update(&mut self, device: &str, patch: &Value) -> Result<Counters> {
        self.send(&format!("!{device} {patch}"))?;
        let (_, from) = self.guest.expect_from(self.answered, "\n!")?;
        let (answer, end) = self.guest.expect_from(from, "\n")?;
        self.answered = end;
        if !answer.starts_with('{') {
            bail!("{answer}");
        }
        serde_json::from_str(&answer).with_context(|| answer.clone())
    }

    /// Counters of a device.
    pub fn counters(&mut self, device: &str) -> Result<Counters> {
        self.update(device, &json!({}))
    }

    /// One counter of a device; 0 when it does not have it yet.
    pub fn counter(&mut self, device: &str, name: &str) -> Result<u64> {
        Ok(self.counters(device)?.get(name).copied().unwrap_or(0))
    }

    /// Runs a line of shell where the VMM runs, among the test's own files.
    pub fn on_host(&self, line: &str) -> Result<String> {
        self.files.shell(line)
    }

    /// The path of a file of the test's own where the VMM runs.
    pub fn path(&self, name: &str) -> String {
        self.files.path(name)
    }

    /// The VMM's process.
    pub fn process(&self) -> &Running<'static> {
        &self.guest
    }

    /// Waits until the VMM has ended.
    pub fn wait(self) -> Result<Run> {
        self.guest.wait()
    }
}
