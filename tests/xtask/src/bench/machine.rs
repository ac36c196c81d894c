//! A guest at its shell that is told what to run, while the host looks at what its VMM uses.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::{NetNs, Process, Program, Signal};

use super::measure::Subject;
use super::usage::{Usage, Watched};

/// Only there to end a hang.
const DEADLINE: Duration = Duration::from_secs(120);

/// A guest whose shell waits for commands.
pub struct Machine {
    process: Process,
    watched: Watched,
}

/// What a command printed, and what the VMM used between its lines `@begin` and `@end`.
pub struct Window {
    /// All that it printed after `@end`.
    pub output: String,
    /// What was used meanwhile.
    pub usage: Usage,
    /// Interrupts of virtio devices that the guest has seen, those around the marks included.
    pub interrupts: u64,
}

impl Window {
    /// For each of `units`, the values of [`usage::columns`](super::usage::columns).
    pub fn per(&self, units: f64) -> Vec<f64> {
        let interrupts = self.interrupts as f64 / units;
        [interrupts].into_iter().chain(self.usage.per(units)).collect()
    }
}

impl Machine {
    /// Boots, in a network namespace when one is given. The command line ends with the guest's shell, whose console is on
    /// the VMM's standard input and output.
    pub fn boot(subject: &Subject, within: Option<&NetNs>) -> Result<Self> {
        let program = Program::new(subject.argv.clone());
        let program = within.map_or_else(|| program.clone(), |net| net.within(&program));
        let mut process = Process::start_local(&program)?;
        let started = process.expect("# ", DEADLINE).and_then(|_| {
            // Not in one word: the echo of what is typed does not count.
            process.send("stty -echo; PS1=; cd /tmp; echo @rea''dy\n")?;
            process.expect("@ready", DEADLINE)
        });
        started.with_context(|| format!("boot {}", subject.argv.join(" ")))?;
        let watched = Watched::new(process.local_pid().context("it runs here")?)?;
        Ok(Self { process, watched })
    }

    /// Runs a line of shell, which has to succeed, and returns what it printed.
    pub fn shell(&mut self, line: &str) -> Result<String> {
        self.process.send(format!("{line}; echo @do''ne $?.\n"))?;
        self.finish(line)
    }

    /// Runs a line of shell that prints `@begin` and `@end` around what is to be measured.
    pub fn window(&mut self, line: &str) -> Result<Window> {
        let interrupts = self.interrupts()?;
        self.process.send(format!("{line}; echo @do''ne $?.\n"))?;
        self.process.expect("@begin", DEADLINE)?;
        let before = self.watched.usage()?;
        self.process.expect("@end", DEADLINE)?;
        let usage = self.watched.usage()?.since(&before);
        let output = self.finish(line)?;
        let after = self.interrupts()?;
        let counted = || format!("interrupts were counted back, from {interrupts} to {after}");
        let interrupts = after.checked_sub(interrupts).with_context(counted)?;
        Ok(Window { output, usage, interrupts })
    }

    /// What its VMM has used so far.
    pub fn usage(&self) -> Result<Usage> {
        self.watched.usage()
    }

    /// Bytes of its VMM that are resident.
    pub fn resident(&self) -> Result<u64> {
        self.watched.resident()
    }

    /// Interrupts of virtio devices that the guest has seen.
    fn interrupts(&mut self) -> Result<u64> {
        let lines = self.shell("grep virtio /proc/interrupts || true")?;
        if std::env::var_os("IRQS").is_some() {
            eprintln!("{lines}");
        }
        // `NUMBER: COUNT... CHIP NAME`, a count for each CPU.
        let counts = lines
            .lines()
            .flat_map(|line| line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()));
        Ok(counts.sum())
    }

    /// Ends it, as fast as can be: nothing in it is to be kept.
    pub fn end(self) -> Result<()> {
        self.process.signal(Signal::KILL)?;
        self.process.wait(DEADLINE).map(drop)
    }

    fn finish(&mut self, line: &str) -> Result<String> {
        let output = self.process.expect("@done ", DEADLINE)?.replace('\r', "");
        let status = self.process.expect(".", DEADLINE)?;
        ensure!(status == "0", "`{line}` ended with {status} in the guest:\n{output}");
        Ok(output)
    }
}
