//! `vmm snapshot inspect`: what a snapshot is.

use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use vmm_core::Snapshot;
use vmm_core::devices::registry::DeviceConfig;
use vmm_core::snapshot::ChainLink;

use super::plain;
use crate::cli::machines::{Format, columns, mib, print_json};
use crate::cli::{print, say};
use crate::exit::ExitStatus;

/// The latest time that has a date with four digits of a year.
const LAST_SECOND: u64 = 253_402_300_799;
/// How wide a line of names is.
const WIDTH: usize = 100;

/// Runs the subcommand.
pub fn run(dir: &Path, format: Format, verify: bool) -> anyhow::Result<ExitStatus> {
    if verify {
        let wrong = Snapshot::verify(dir);
        wrong.iter().for_each(|error| say(&error.to_string()));
        if !wrong.is_empty() {
            return Ok(ExitStatus::Failure);
        }
    }
    let snapshot = Snapshot::open(dir)?;
    let chain = snapshot.chain()?;
    match format {
        Format::Json => print_json(&as_json(&snapshot, &chain)),
        Format::Table => {
            let mut text = explain(&snapshot, &chain);
            if verify {
                text += "\nMemory and state were read, and are what was saved.\n";
            }
            print(text.as_bytes())
        }
    }
}

fn as_json(snapshot: &Snapshot, chain: &[ChainLink]) -> Value {
    let sections = snapshot.sections().iter();
    let sections: Vec<_> =
        sections.map(|section| json!({ "name": section.name, "version": section.saved.version })).collect();
    json!({
        "manifest": snapshot.manifest(),
        "state": sections,
        "cpu_features": snapshot.cpu_features(),
        "chain": chain,
    })
}

/// All about a snapshot, for people.
fn explain(snapshot: &Snapshot, chain: &[ChainLink]) -> String {
    let devices = devices(snapshot);
    let sections = snapshot.sections().iter().map(|section| match section.saved.version {
        1 => plain(&section.name),
        version => format!("{} (version {version})", plain(&section.name)),
    });
    let features = snapshot.cpu_features().into_iter().map(str::to_owned);
    let mut text = columns(&facts(snapshot, chain));
    if !devices.is_empty() {
        let head = ["DEVICE", "KIND", "ADDRESS", "CONFIGURATION"].map(String::from);
        text += &format!("\n{}", columns(&[vec![head], devices].concat()));
    }
    let disks = &snapshot.manifest().disks;
    if !disks.is_empty() {
        let head = ["DISK", "FILE", "FORMAT", "SIZE"].map(String::from);
        let rows = disks
            .iter()
            .map(|disk| [plain(&disk.device), plain(&disk.file), plain(&disk.format), mib(disk.bytes)]);
        text += &format!("\n{}", columns(&[head].into_iter().chain(rows).collect::<Vec<_>>()));
    }
    if chain.len() > 1 {
        text += &format!("\n{}", columns(&links(chain)));
    }
    text += &format!("\nSTATE\n{}", lines(sections));
    text += &format!("\nFEATURES OF THE PROCESSOR\n{}", lines(features));
    text
}

/// What, when and by whom.
fn facts(snapshot: &Snapshot, chain: &[ChainLink]) -> Vec<[String; 2]> {
    let (manifest, config) = (snapshot.manifest(), snapshot.config());
    let on_disk = chain.first().map_or(0, |link| link.on_disk_bytes);
    let mut memory = format!("{}, of which {} are on disk", mib(manifest.memory.bytes), mib(on_disk));
    if let Some(diff) = &manifest.memory.diff {
        let bytes: u64 = diff.pages.iter().map(|(_, bytes)| bytes).sum();
        memory = format!("{}, a difference of {} to {}", mib(manifest.memory.bytes), mib(bytes), diff.parent);
    }
    let optional = |path: &Option<std::path::PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let rows = [
        ("ID", Some(manifest.id.clone())),
        ("MADE", Some(format!("{}, by {}", date(manifest.made_at), manifest.made_by))),
        (
            "MACHINE",
            Some(
                format!("{} vCPU{}", config.cpus, if config.cpus == 1 { "" } else { "s" })
                    + &format!(", devices on {}", json!(config.transport).as_str().unwrap_or_default()),
            ),
        ),
        ("MEMORY", Some(memory)),
        ("KERNEL", optional(&config.kernel)),
        ("INITRD", optional(&config.initrd)),
        ("CONSOLE", Some(config.serial.to_string())),
    ];
    let rows = rows.into_iter().filter_map(|(name, value)| Some([name.to_owned(), plain(&value?)]));
    rows.collect()
}

/// A row for each device.
fn devices(snapshot: &Snapshot) -> Vec<[String; 4]> {
    let configs = snapshot.manifest().devices.iter().zip(&snapshot.manifest().config.devices);
    configs
        .map(|(place, config)| {
            [plain(&place.name), place.kind.clone(), format!("{:#x}", place.address), keys(config)]
        })
        .collect()
}

/// A device's configuration as a flag has it, as far as it is not the default's.
fn keys(config: &DeviceConfig) -> String {
    let Ok(Value::Object(keys)) = serde_json::to_value(config) else { return String::new() };
    let said = keys.iter().filter(|(key, value)| *key != "kind" && **value != json!(false));
    let texts = said.map(|(key, value)| match value {
        Value::Bool(_) => key.clone(),
        Value::String(text) => format!("{key}={text}"),
        value => format!("{key}={value}"),
    });
    plain(&texts.collect::<Vec<_>>().join(","))
}

/// A row for each link of a chain.
fn links(chain: &[ChainLink]) -> Vec<[String; 4]> {
    let rows = chain.iter().map(|link| {
        let path = plain(&link.path.display().to_string());
        [link.id.clone(), date(link.made_at), mib(link.on_disk_bytes), path]
    });
    [["CHAIN", "MADE", "ON DISK", "PLACE"].map(String::from)].into_iter().chain(rows).collect()
}

fn date(seconds: u64) -> String {
    match seconds <= LAST_SECOND {
        true => httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)),
        false => "at no time".into(),
    }
}

/// Words in lines of a modest width.
fn lines(words: impl Iterator<Item = String>) -> String {
    let mut lines: Vec<String> = Vec::new();
    for word in words {
        match lines.last_mut() {
            Some(line) if line.len() + word.len() < WIDTH => *line += &format!(" {word}"),
            _ => lines.push(format!("  {word}")),
        }
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}
