//! `vmm snapshot diff`: what differs between two snapshots.

use std::path::Path;

use serde_json::Value;
use vmm_core::Snapshot;
use vmm_core::snapshot::difference::{Difference, SectionChange};

use super::plain;
use crate::cli::machines::{Format, columns, mib, print_json};
use crate::cli::print;
use crate::exit::ExitStatus;

/// How many ranges and fields of one part a person wants to see.
const SHOWN: usize = 8;

/// Runs the subcommand.
pub fn run(from: &Path, to: &Path, format: Format) -> anyhow::Result<ExitStatus> {
    let difference = Difference::between(&Snapshot::open(from)?, &Snapshot::open(to)?)?;
    match format {
        Format::Json => print_json(&difference),
        Format::Table => print(explain(&difference).as_bytes()),
    }
}

fn explain(difference: &Difference) -> String {
    if difference.is_empty() {
        return "Nothing differs.\n".into();
    }
    let mut parts = Vec::new();
    if !difference.config.is_empty() {
        let shown = |value: &Option<Value>| match value {
            None => "-".into(),
            Some(Value::String(text)) => plain(text),
            Some(value) => plain(&value.to_string()),
        };
        let rows = difference.config.iter();
        let rows = rows.map(|change| [plain(&change.key), shown(&change.from), shown(&change.to)]);
        let head = ["CONFIGURATION", "FROM", "TO"].map(String::from);
        parts.push(columns(&[head].into_iter().chain(rows).collect::<Vec<_>>()));
    }
    if !difference.sections.is_empty() {
        let head = ["STATE", "FIELDS"].map(String::from);
        parts.push(columns(
            &[head].into_iter().chain(difference.sections.iter().map(section)).collect::<Vec<_>>(),
        ));
    }
    let memory = &difference.memory;
    if memory.pages > 0 {
        let ranges = memory.ranges.iter();
        let ranges: Vec<_> = ranges.map(|range| format!("{:#x}+{:#x}", range.address, range.bytes)).collect();
        parts.push(format!(
            "MEMORY  {} pages ({}) differ: {}\n",
            memory.pages,
            mib(memory.bytes),
            first(&ranges)
        ));
    }
    parts.join("\n")
}

fn section(change: &SectionChange) -> [String; 2] {
    let what = match (change.from, change.to) {
        (Some(_), None) => "only in the first".into(),
        (None, Some(_)) => "only in the second".into(),
        (Some(from), Some(to)) if from != to => format!("version {from} and {to}: {}", first(&change.fields)),
        _ => first(&change.fields),
    };
    [plain(&change.name), plain(&what)]
}

/// The first of some things, and how many more there are.
fn first(all: &[String]) -> String {
    let shown = all[..all.len().min(SHOWN)].join(", ");
    match all.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
