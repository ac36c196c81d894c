//! What differs between two snapshots.

use std::collections::BTreeMap;

use ciborium::Value as Cbor;
use serde::Serialize;
use serde_json::{Map, Value};

use super::manifest::MemoryRange;
use super::memory_file::flat::Flat;
use super::memory_file::{PAGE, Pages};
use super::{Snapshot, SnapshotFailed};
use crate::config::VmConfig;

/// What is read at a time.
const PIECE: u64 = 1 << 20;

/// What differs between two snapshots, `from` and `to`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Difference {
    /// Keys of the configuration.
    pub config: Vec<Change>,
    /// Sections of the state.
    pub sections: Vec<SectionChange>,
    /// The guest's memory.
    pub memory: MemoryChange,
}

/// A key of the configuration with another value.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// The key, with the name of its device before it.
    pub key: String,
    /// Its value in the first snapshot, if it has one there.
    pub from: Option<Value>,
    /// Its value in the second one.
    pub to: Option<Value>,
}

/// A section of the state that is another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SectionChange {
    /// Its name.
    pub name: String,
    /// Its version in the first snapshot, if it is there.
    pub from: Option<u16>,
    /// Its version in the second one.
    pub to: Option<u16>,
    /// Fields that differ, if both have it.
    pub fields: Vec<String>,
}

/// Pages that differ.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemoryChange {
    /// How many.
    pub pages: u64,
    /// Bytes of these pages.
    pub bytes: u64,
    /// Where they are in the guest's address space, from the lowest up.
    pub ranges: Vec<MemoryRange>,
}

impl Difference {
    /// Whether the snapshots are of one machine at one moment.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Compares two snapshots; all of their memory is read.
    pub fn between(from: &Snapshot, to: &Snapshot) -> Result<Self, SnapshotFailed> {
        Ok(Self {
            config: configs(&from.manifest.config, &to.manifest.config),
            sections: sections(from, to),
            memory: memories(from, to)?,
        })
    }
}

/// Keys of two configurations that differ.
fn configs(from: &VmConfig, to: &VmConfig) -> Vec<Change> {
    let mut changes = Vec::new();
    values("", Some(&by_name(from)), Some(&by_name(to)), &mut changes);
    changes
}

/// A configuration whose devices are under their names.
fn by_name(config: &VmConfig) -> Value {
    let mut keys = match serde_json::to_value(config) {
        Ok(Value::Object(keys)) => keys,
        _ => Map::new(),
    };
    if let Some(Value::Array(devices)) = keys.remove("devices") {
        keys.extend(config.device_names().into_iter().zip(devices));
    }
    Value::Object(keys)
}

fn values(key: &str, from: Option<&Value>, to: Option<&Value>, changes: &mut Vec<Change>) {
    if let (Some(Value::Object(from)), Some(Value::Object(to))) = (from, to) {
        let mut keys: Vec<&String> = from.keys().chain(to.keys()).collect();
        keys.sort();
        keys.dedup();
        for name in keys {
            values(&below(key, name), from.get(name), to.get(name), changes);
        }
    } else if from != to {
        changes.push(Change { key: key.into(), from: from.cloned(), to: to.cloned() });
    }
}

/// The name of what is called `name` within `key`.
fn below(key: &str, name: &str) -> String {
    if key.is_empty() { name.into() } else { format!("{key}.{name}") }
}

/// Sections of two states that differ, in the order of their names.
fn sections(from: &Snapshot, to: &Snapshot) -> Vec<SectionChange> {
    let all = |snapshot: &Snapshot| -> BTreeMap<_, _> {
        let sections = snapshot.sections.iter();
        sections.map(|section| (section.name.clone(), section.saved.clone())).collect()
    };
    let (from, to) = (all(from), all(to));
    let names = from.keys().chain(to.keys().filter(|name| !from.contains_key(*name)));
    let change = |name: &String| {
        let (from, to) = (from.get(name), to.get(name));
        let mut fields = Vec::new();
        if let (Some(from), Some(to)) = (from, to) {
            states("", &from.value, &to.value, &mut fields);
        }
        let versions = (from.map(|saved| saved.version), to.map(|saved| saved.version));
        let differs = versions.0 != versions.1 || !fields.is_empty();
        differs.then(|| SectionChange { name: name.clone(), from: versions.0, to: versions.1, fields })
    };
    let mut changes: Vec<_> = names.filter_map(change).collect();
    changes.sort_by(|a, b| a.name.cmp(&b.name));
    changes
}

/// Adds the fields of two states that differ.
fn states(field: &str, from: &Cbor, to: &Cbor, fields: &mut Vec<String>) {
    if from == to {
        return;
    }
    let before = fields.len();
    match (from, to) {
        (Cbor::Map(from), Cbor::Map(to)) => {
            let (from, to) = (named(from), named(to));
            for (name, value) in &from {
                match to.get(name) {
                    Some(other) => states(&below(field, name), value, other, fields),
                    None => fields.push(below(field, name)),
                }
            }
            fields.extend(to.keys().filter(|name| !from.contains_key(*name)).map(|name| below(field, name)));
        }
        // Bytes and registers are one field.
        (Cbor::Array(from), Cbor::Array(to)) if from.len() == to.len() && from.iter().any(has_parts) => {
            for (i, (from, to)) in from.iter().zip(to).enumerate() {
                states(&format!("{field}[{i}]"), from, to, fields);
            }
        }
        _ => {}
    }
    // What has no parts, or is no map of names as states are.
    if fields.len() == before {
        fields.push(field.into());
    }
}

/// The entries of a map that have a name.
fn named(map: &[(Cbor, Cbor)]) -> BTreeMap<&str, &Cbor> {
    map.iter().filter_map(|(key, value)| Some((key.as_text()?, value))).collect()
}

fn has_parts(value: &Cbor) -> bool {
    matches!(value, Cbor::Map(_) | Cbor::Array(_))
}

/// Pages of two memories that differ.
fn memories(from: &Snapshot, to: &Snapshot) -> Result<MemoryChange, SnapshotFailed> {
    fn flat(snapshot: &Snapshot) -> Result<Flat<'_>, SnapshotFailed> {
        snapshot.memory_image()?.flat().map_err(SnapshotFailed::io("read", &snapshot.place.memory()))
    }
    let bytes = |snapshot: &Snapshot| snapshot.manifest.memory.bytes;
    let larger = if bytes(from) > bytes(to) { from } else { to };
    let pages = pages(&flat(from)?, &flat(to)?, bytes(larger));
    let pages = pages.map_err(SnapshotFailed::io("read", &larger.place.memory()))?;
    let (mut ranges, mut start) = (Vec::new(), 0);
    for range in &larger.manifest.memory.ranges {
        let runs = pages.runs(start, start + range.bytes);
        ranges.extend(runs.map(|(at, bytes)| MemoryRange { address: range.address + (at - start), bytes }));
        start += range.bytes;
    }
    Ok(MemoryChange { pages: pages.count(), bytes: pages.count() * PAGE, ranges })
}

fn pages(from: &Flat<'_>, to: &Flat<'_>, bytes: u64) -> std::io::Result<Pages> {
    let mut differ = Pages::none(bytes);
    let mut buffers = [vec![0; PIECE as usize], vec![0; PIECE as usize]];
    let mut candidates = Pages::none(bytes);
    [from, to].iter().for_each(|flat| flat.add_to(&mut candidates));
    for (start, len) in candidates.runs(0, bytes) {
        for at in (0..len).step_by(PIECE as usize) {
            let piece = (len - at).min(PIECE) as usize;
            let [a, b] = &mut buffers;
            from.read_at(start + at, &mut a[..piece])?;
            to.read_at(start + at, &mut b[..piece])?;
            let pairs = a[..piece].chunks(PAGE as usize).zip(b[..piece].chunks(PAGE as usize));
            for (i, _) in pairs.enumerate().filter(|(_, (a, b))| a != b) {
                differ.add(start + at + i as u64 * PAGE);
            }
        }
    }
    Ok(differ)
}
