//! A report on the host, for people and for programs.

use crate::terminal::shows_colours;
use std::fmt::Write;
use std::io::IsTerminal;

use serde::Serialize;

/// What was found out about the host.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Everything that a guest needs is there.
    pub guest_can_run: bool,
    /// The lines.
    pub items: Vec<Item>,
}

/// One thing that a host has or lacks.
#[derive(Debug, Serialize)]
pub struct Item {
    /// What it is.
    pub name: String,
    /// It is there.
    pub ok: bool,
    /// No guest runs without it.
    pub needed: bool,
    /// What was found, in a few words.
    pub found: String,
    /// What its absence means and what to do about it: lines of text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remedy: Vec<String>,
}

impl Report {
    /// The report that `items` make.
    pub fn new(items: Vec<Item>) -> Self {
        Self { guest_can_run: items.iter().all(|item| item.ok || !item.needed), items }
    }

    /// For programs.
    pub fn json(&self) -> serde_json::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// For people: a line for each item, and its remedy below where it is missing.
    pub fn text(&self, style: &Style) -> String {
        let width = self.items.iter().map(|item| item.name.chars().count()).max().unwrap_or_default();
        let mut text = String::new();
        for item in &self.items {
            let mark = style.mark(item.ok);
            _ = writeln!(text, "{mark} {:width$}  {}", item.name, item.found);
            for line in &item.remedy {
                _ = writeln!(text, "{:indent$}{line}", "", indent = style.mark_width() + 3);
            }
        }
        let verdict = match self.guest_can_run {
            true => "A guest can run here.",
            false => "No guest can run here before the missing things above are put right.",
        };
        _ = writeln!(text, "\n{verdict}");
        text
    }
}

/// How marks look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Signs in place of words.
    pub signs: bool,
    /// ANSI colours.
    pub colours: bool,
}

impl Style {
    /// What standard output can show.
    pub fn of_stdout() -> Self {
        let terminal = std::io::stdout().is_terminal();
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].iter().filter_map(|name| std::env::var(name).ok());
        let charset = locale.filter(|value| !value.is_empty()).map(|value| value.to_uppercase()).next();
        let utf8 = charset.is_some_and(|charset| charset.contains("UTF-8") || charset.contains("UTF8"));
        Self { signs: terminal && utf8, colours: shows_colours(&std::io::stdout()) }
    }

    fn mark(self, ok: bool) -> String {
        let mark = match (self.signs, ok) {
            (true, true) => "✓",
            (true, false) => "✗",
            (false, true) => "ok     ",
            (false, false) => "missing",
        };
        match (self.colours, ok) {
            (false, _) => mark.into(),
            (true, true) => format!("\x1b[32m{mark}\x1b[0m"),
            (true, false) => format!("\x1b[31m{mark}\x1b[0m"),
        }
    }

    fn mark_width(self) -> usize {
        if self.signs { 1 } else { "missing".len() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(name: &str, ok: bool, needed: bool) -> Item {
        let remedy = if ok { vec![] } else { vec!["do this".into()] };
        Item { name: name.into(), ok, needed, found: "found".into(), remedy }
    }

    #[test]
    fn only_what_is_needed_decides() {
        assert!(Report::new(vec![item("a", true, true), item("b", false, false)]).guest_can_run);
        assert!(!Report::new(vec![item("a", true, true), item("b", false, true)]).guest_can_run);
    }

    #[test]
    fn lines_are_aligned_and_marks_fit_the_terminal() {
        let report = Report::new(vec![item("a", true, true), item("long", false, true)]);
        let plain = report.text(&Style { signs: false, colours: false });
        assert!(
            plain.starts_with("ok      a     found\nmissing long  found\n          do this\n\nNo guest"),
            "{plain}"
        );
        let signs = report.text(&Style { signs: true, colours: false });
        assert!(signs.starts_with("✓ a     found\n✗ long  found\n    do this\n"), "{signs}");
        assert!(report.text(&Style { signs: true, colours: true }).contains("\x1b[31m✗\x1b[0m long"));
    }

    #[test]
    fn programs_get_json() {
        let json = Report::new(vec![item("a", false, true)]).json().unwrap();
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["guest_can_run"], false);
        assert_eq!(value["items"][0]["remedy"][0], "do this");
    }
}
