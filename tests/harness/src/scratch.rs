//! A directory of a test's own, where the VMM runs.

use anyhow::Result;

use crate::place::Place;
use crate::process::Output;

/// The directory; it is gone with this.
pub struct Scratch {
    place: Place,
    dir: String,
    /// What to do before it is removed.
    last: Vec<String>,
}

impl Scratch {
    /// Makes one at `place`.
    pub fn new(place: &Place) -> Result<Self> {
        // Not in memory, where direct I/O and holes are other than on a disk.
        let dir = match place {
            Place::Lab(_) => "/scratch".into(),
            _ => std::env::temp_dir().display().to_string(),
        };
        let dir = place.shell(&format!("mktemp -d -p {dir}"))?.ok()?.trim().to_owned();
        Ok(Self { place: place.clone(), dir, last: Vec::new() })
    }

    /// Where it is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The path of `name` in it.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.dir)
    }

    /// Has a line of shell run in it before it is removed.
    pub fn at_end(&mut self, line: String) {
        self.last.push(line);
    }

    /// Runs a line of shell in it, to its end.
    pub fn run(&self, line: &str) -> Result<Output> {
        self.place.shell(&format!("cd {} && {{ {line}; }}", self.dir))
    }

    /// Runs a line of shell in it, which has to end with status 0, and returns what it printed.
    pub fn shell(&self, line: &str) -> Result<String> {
        self.run(line)?.ok()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for line in &self.last {
            _ = self.shell(line);
        }
        _ = self.place.shell(&format!("rm -r {}", self.dir));
    }
}
