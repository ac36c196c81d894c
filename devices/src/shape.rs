//! The form of saved states as text, for tests that fail when it changes: names of fields and types, and no values.

use std::path::Path;

use ciborium::Value;

use crate::snapshot::Saved;

/// In the environment of a test, it lets texts be written anew where that is right: `cargo xtask golden`.
pub const WRITE: &str = "VMM_GOLDEN";

/// The forms of some states. Each begins with a line of its own, `NAME, version N: TYPE`.
#[derive(Debug, Default)]
pub struct Shapes(Vec<String>);

impl Shapes {
    /// Adds the form of a state.
    pub fn add(&mut self, name: &str, saved: &Saved) {
        lines(&saved.value, &format!("{name}, version {}", saved.version), 0, &mut self.0);
    }

    /// Panics unless the forms are those that are kept at `path`. With [`WRITE`] in the environment they are kept from now on,
    /// if no state of an unchanged version lost or changed anything that a reader may look for.
    pub fn assert_kept(&self, path: &Path) {
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        let now = self.0.join("\n") + "\n";
        if kept == now {
            return;
        }
        let (before, after) = (states(&kept), states(&now));
        for (name, form) in &before {
            let new = after.iter().find(|(other, _)| other == name);
            let lost = new.and_then(|(_, new)| first_lost(form, new));
            assert!(
                lost.is_none(),
                "the saved form of '{name}' changed without its version: '{}' is not as it was; raise its State::VERSION \
                 and let its reader take the older one, too, or leave the field as it was and make new ones optional",
                lost.unwrap_or_default().trim()
            );
        }
        if std::env::var_os(WRITE).is_some() {
            std::fs::write(path, now).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            return;
        }
        panic!(
            "the saved form of a state is not that of {}; raise its version, or make the new field optional \
             (#[serde(default)]), and then run 'cargo xtask golden'. It is now:\n{now}",
            path.display()
        );
    }
}

/// The states of a text, by their first lines.
fn states(text: &str) -> Vec<(&str, Vec<&str>)> {
    let mut states: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in text.lines() {
        match states.last_mut() {
            Some((_, lines)) if line.starts_with(' ') => lines.push(line),
            _ => states.push((line, Vec::new())),
        }
    }
    states
}

/// The first line that is not in the new form, in its order.
fn first_lost<'a>(old: &[&'a str], new: &[&str]) -> Option<&'a str> {
    let mut new = new.iter();
    old.iter().find(|line| !new.any(|other| other == *line)).copied()
}

/// A line for the value `name`, and for each that is in it.
fn lines(value: &Value, name: &str, indent: usize, all: &mut Vec<String>) {
    let mut line = |what: &str| all.push(format!("{:indent$}{name}: {what}", ""));
    match value {
        Value::Map(entries) => {
            line("map");
            for (key, value) in entries {
                lines(value, key.as_text().unwrap_or("?"), indent + 2, all);
            }
        }
        Value::Array(items) => {
            line("array");
            let mut kinds = Vec::new();
            for item in items {
                let mut inner = Vec::new();
                lines(item, "each", indent + 2, &mut inner);
                if !kinds.contains(&inner) {
                    all.extend(inner.clone());
                    kinds.push(inner);
                }
            }
        }
        Value::Integer(_) => line("integer"),
        Value::Bytes(bytes) => line(&format!("{} bytes", bytes.len())),
        Value::Text(_) => line("text"),
        Value::Bool(_) => line("bool"),
        Value::Null => line("null"),
        other => line(&format!("{other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shapes(version: u16, fields: &[(&str, Value)]) -> Shapes {
        let entries = fields.iter().map(|(name, value)| (Value::from(*name), value.clone()));
        let mut shapes = Shapes::default();
        shapes.add("part", &Saved { version, value: Value::Map(entries.collect()) });
        shapes
    }

    /// What is said of a change.
    fn said(before: &Shapes, after: &Shapes) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), before.0.join("\n") + "\n").unwrap();
        before.assert_kept(file.path());
        let refused = std::panic::catch_unwind(|| after.assert_kept(file.path())).unwrap_err();
        refused.downcast_ref::<String>().unwrap().clone()
    }

    #[test]
    fn a_change_is_told_from_an_addition() {
        let (number, text) = (Value::from(1), Value::from("x"));
        let before = shapes(1, &[("a", number.clone()), ("b", Value::Bytes(vec![0; 8]))]);
        let longer = shapes(1, &[("a", number.clone()), ("b", Value::Bytes(vec![0; 9]))]);
        assert!(said(&before, &longer).contains("'b: 8 bytes' is not as it was"));
        assert!(said(&before, &shapes(1, &[("a", number.clone())])).contains("changed without its version"));
        assert!(said(&before, &shapes(1, &[("a", text.clone())])).contains("'a: integer'"));
        let more = shapes(1, &[("a", number.clone()), ("b", Value::Bytes(vec![0; 8])), ("c", text)]);
        assert!(said(&before, &more).contains("make the new field optional"));
        assert!(said(&before, &shapes(2, &[("a", number)])).contains("raise its version"));
    }
}
