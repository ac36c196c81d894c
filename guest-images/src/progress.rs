//! How long work tells what it is doing.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Receives what a build is doing.
pub trait Progress {
    /// A step begins, e.g. "compiling the ring3 kernel"; `total` is an estimate of its items.
    fn step(&mut self, what: &str, total: Option<u64>);
    /// `done` items of the step are done, the last of them `item`.
    fn advance(&mut self, done: u64, item: &str);
    /// All is done, or given up.
    fn finish(&mut self);
}

/// Tells nobody.
impl Progress for () {
    fn step(&mut self, _: &str, _: Option<u64>) {}
    fn advance(&mut self, _: u64, _: &str) {}
    fn finish(&mut self) {}
}

/// Between two lines about the same step where there is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Tells on standard error: a bar on a terminal, else a line now and then.
#[derive(Default)]
pub struct Console {
    bar: Option<ProgressBar>,
    step: String,
    total: Option<u64>,
    last_line: Option<Instant>,
}

impl Console {
    /// Shows nothing until the first step begins.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn line(&mut self, text: &str) {
        self.last_line = Some(Instant::now());
        // Nobody to tell when standard error is gone.
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

impl Progress for Console {
    fn step(&mut self, what: &str, total: Option<u64>) {
        self.finish();
        what.clone_into(&mut self.step);
        self.total = total;
        if !std::io::stderr().is_terminal() {
            return self.line(what);
        }
        let (bar, template) = match total {
            Some(total) => {
                (ProgressBar::new(total), "{msg} [{bar:24}] {percent:>3} % · {elapsed} {prefix:.dim}")
            }
            None => (ProgressBar::new_spinner(), "{spinner} {msg} · {elapsed} {prefix:.dim}"),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━━ "));
        }
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        self.bar = Some(bar);
    }

    fn advance(&mut self, done: u64, item: &str) {
        if let Some(bar) = &self.bar {
            // The total is an estimate: stay below "all of it" until the step ends.
            bar.set_position(self.total.map_or(done, |total| done.min(total.saturating_sub(1))));
            bar.set_prefix(item.to_owned());
        } else if self.last_line.is_none_or(|last| last.elapsed() >= PLAIN_INTERVAL) {
            let of = self.total.map_or(String::new(), |total| format!(" of about {total}"));
            let text = format!("{}: {done}{of}", self.step);
            self.line(&text);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
