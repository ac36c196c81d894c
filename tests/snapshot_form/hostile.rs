//! Files that somebody has changed: a sentence each time, or a machine that works.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::Value;
use vmm_core::hypervisor::fake::{FakeHypervisor, Step};
use vmm_core::{Snapshot, SnapshotKind, StopReason, Vm};

use crate::host::{Host, TRANSPORTS};

/// Bytes before the first section, and of a section before its name.
const HEADER: usize = 12;
const SECTION: usize = 8;

/// A saved machine whose state file is changed.
struct Saved {
    host: Host,
    state: Vec<u8>,
    manifest: Value,
}

/// A section as it is in the file.
#[derive(Clone)]
struct Section {
    name: Vec<u8>,
    version: u16,
    data: Vec<u8>,
}

impl Section {
    fn bytes(&self) -> Vec<u8> {
        self.bytes_that_say(self.name.len() as u16, self.data.len() as u32)
    }

    /// With lengths that may not be true, and a checksum that is.
    fn bytes_that_say(&self, name: u16, data: u32) -> Vec<u8> {
        let header = [&name.to_le_bytes()[..], &self.version.to_le_bytes(), &data.to_le_bytes()].concat();
        let mut bytes = [&header[..], &self.name, &self.data].concat();
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }
}

/// What became of a changed snapshot.
#[derive(Debug, PartialEq)]
enum Outcome {
    Refused(String),
    WentOn,
}

impl Saved {
    fn new(transport: &str) -> Result<Self> {
        let host = Host::new()?;
        host.machine(transport)?.snapshot_without_disks(&host.path("saved"), SnapshotKind::Full)?;
        let state = fs::read(host.path("saved/state"))?;
        let manifest = serde_json::from_slice(&fs::read(host.path("saved/manifest.json"))?)?;
        Ok(Self { host, state, manifest })
    }

    fn sections(&self) -> Vec<Section> {
        let mut rest = &self.state[HEADER..];
        let mut sections = Vec::new();
        while !rest.is_empty() {
            let number = |at: usize, len: usize| {
                rest[at..at + len].iter().rev().fold(0, |sum, &byte| sum << 8 | usize::from(byte))
            };
            let (name, data) = (number(0, 2), number(4, 4));
            let version = number(2, 2) as u16;
            let body = &rest[SECTION..SECTION + name + data];
            sections.push(Section { name: body[..name].into(), version, data: body[name..].into() });
            rest = &rest[SECTION + name + data + 4..];
        }
        sections
    }

    /// A state file of these sections.
    fn file(&self, sections: &[Section]) -> Vec<u8> {
        [&self.state[..HEADER], &sections.iter().flat_map(Section::bytes).collect::<Vec<_>>()].concat()
    }

    /// Opens, builds and runs a machine with this state file; the manifest says what the file is, if `honest`.
    fn with(&self, state: &[u8], honest: bool) -> Result<Outcome> {
        let dir = self.host.path("saved");
        let mut manifest = self.manifest.clone();
        if honest {
            manifest["state_bytes"] = state.len().into();
            manifest["state_crc32"] = crc32fast::hash(state).into();
        }
        fs::write(dir.join("manifest.json"), serde_json::to_vec(&manifest)?)?;
        fs::write(dir.join("state"), state)?;
        let end = catch_unwind(AssertUnwindSafe(|| go_on(&dir)));
        let end = end.unwrap_or_else(|_| Err("it panicked\n".into()));
        match end {
            Ok(()) => Ok(Outcome::WentOn),
            Err(said) => {
                ensure!(said.len() < 600 && !said.contains('\n'), "no sentence: {said}");
                Ok(Outcome::Refused(said))
            }
        }
    }

    fn refused(&self, what: &str, state: &[u8], honest: bool) -> Result<String> {
        match self.with(state, honest)? {
            Outcome::Refused(said) => Ok(said),
            Outcome::WentOn => anyhow::bail!("{what}: a guest went on"),
        }
    }
}

/// Lets the guest in `dir` go on, as far as a triple fault.
fn go_on(dir: &Path) -> Result<(), String> {
    let snapshot = Snapshot::open(dir).map_err(|error| error.to_string())?;
    let hypervisor = FakeHypervisor::new(vec![Step::In(0x3fd, 1), Step::TripleFault]);
    let vm = Vm::restore(snapshot).hypervisor(Box::new(hypervisor)).build();
    let vm = vm.map_err(|error| error.to_string())?;
    vm.resume().map_err(|error| error.to_string())?;
    match vm.wait() {
        StopReason::GuestReset => Ok(()),
        reason => Err(format!("it ended, which no guest saw\n{reason:?}")),
    }
}

#[test]
fn what_was_cut_flipped_or_added_is_refused() -> Result<()> {
    for transport in TRANSPORTS {
        let saved = Saved::new(transport)?;
        ensure!(saved.with(&saved.state, true)? == Outcome::WentOn, "it is in order");
        let mut at = HEADER;
        for section in saved.sections() {
            let (name, len) = (String::from_utf8_lossy(&section.name).into_owned(), section.bytes().len());
            let (begin, end) = (at, at + len);
            at = end;
            for cut in [begin, begin + 1, begin + SECTION, begin + len / 2, end - 1] {
                saved.refused(&name, &saved.state[..cut], false)?;
                // Somebody who counts again is told by the section's own checksum.
                saved.refused(&name, &saved.state[..cut], true)?;
            }
            for byte in (begin..end).step_by(len.div_ceil(24)) {
                let mut state = saved.state.clone();
                state[byte] ^= 1 << (byte % 8);
                saved.refused(&name, &state, false)?;
                saved.refused(&name, &state, true)?;
            }
            let longer = [&saved.state[..end], &[0; 7], &saved.state[end..]].concat();
            saved.refused(&name, &longer, true)?;
        }
    }
    Ok(())
}

#[test]
fn sections_that_are_twice_missing_unknown_or_of_another_version_are_refused_and_their_order_is_free()
-> Result<()> {
    for transport in TRANSPORTS {
        let saved = Saved::new(transport)?;
        let all = saved.sections();
        let (end, parts) = all.split_last().expect("there are sections");
        let with = |parts: Vec<Section>| saved.file(&[parts, vec![end.clone()]].concat());
        let reversed = with(parts.iter().rev().cloned().collect());
        ensure!(saved.with(&reversed, true)? == Outcome::WentOn, "the order is free");
        saved.refused("the end is first", &saved.file(&[&[end.clone()][..], parts].concat()), true)?;
        for (nth, part) in parts.iter().enumerate() {
            let name = String::from_utf8_lossy(&part.name).into_owned();
            let changed = |change: &dyn Fn(&mut Section)| {
                let mut parts = parts.to_vec();
                change(&mut parts[nth]);
                with(parts)
            };
            saved.refused(&name, &with([parts, std::slice::from_ref(part)].concat()), true)?;
            let mut without = parts.to_vec();
            without.remove(nth);
            if name == "i8042" {
                // Machines that were saved before it had a state have none.
                ensure!(saved.with(&with(without), true)? == Outcome::WentOn);
            } else {
                let said = saved.refused(&name, &with(without), true)?;
                ensure!(said.contains(&name), "{name}: {said}");
            }
            let said = saved.refused(&name, &changed(&|part| part.name.push(b'x')), true)?;
            ensure!(said.contains(&name), "{name}: {said}");
            for version in [part.version + 1, u16::MAX] {
                let said = saved.refused(&name, &changed(&|part| part.version = version), true)?;
                ensure!(said.contains(&format!("version {version}")), "{name}: {said}");
            }
            saved.refused(&name, &changed(&|part| part.version = 0), true)?;
            for other in parts.iter().filter(|other| other.name != part.name) {
                let state = changed(&|part| part.data.clone_from(&other.data));
                // Two empty devices of one kind may be alike.
                if saved.with(&state, true)? == Outcome::WentOn {
                    ensure!(part.data == other.data, "{name} is taken from another");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn counts_that_cannot_be_and_values_of_any_kind_are_refused_or_do_no_harm() -> Result<()> {
    for transport in TRANSPORTS {
        let saved = Saved::new(transport)?;
        let all = saved.sections();
        for (nth, part) in all.iter().enumerate() {
            let name = String::from_utf8_lossy(&part.name).into_owned();
            let with = |bytes: &[u8]| {
                let (before, after) = (&all[..nth], &all[nth + 1..]);
                [saved.file(before), bytes.to_vec(), saved.file(after)[HEADER..].to_vec()].concat()
            };
            let (own_name, own_data) = (part.name.len() as u16, part.data.len() as u32);
            for (name_len, data_len) in [
                (u16::MAX, own_data),
                (own_name, u32::MAX),
                (own_name, own_data + 1),
                (0, own_data),
                (own_name + 1, own_data),
            ] {
                saved.refused(&name, &with(&part.bytes_that_say(name_len, data_len)), true)?;
            }
            if part.data.is_empty() {
                continue;
            }
            // An array, a map, bytes and a text of 2^63 parts, arrays in arrays, tags in tags, and nothing.
            for start in [0x9b, 0xbb, 0x5b, 0x7b] {
                let data = [&[start, 0x7f][..], &[0xff; 7], &part.data].concat();
                saved.refused(&name, &with(&Section { data, ..part.clone() }.bytes()), true)?;
            }
            for data in [vec![0x81; 5000], vec![0xc1; 5000], vec![0xf6], vec![0xa0], vec![0x80], vec![]] {
                saved.refused(&name, &with(&Section { data, ..part.clone() }.bytes()), true)?;
            }
            // With checksums that are right, a flipped bit is a value like any other: it is refused, or the guest has it.
            for byte in (0..part.data.len()).step_by(part.data.len().div_ceil(48)) {
                let mut changed = part.clone();
                changed.data[byte] ^= 1 << (byte % 8);
                saved.with(&with(&changed.bytes()), true)?;
            }
        }
    }
    Ok(())
}
