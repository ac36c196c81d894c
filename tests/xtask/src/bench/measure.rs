//! Runs a program to its end and takes the kernel's own account of it.
#![allow(unsafe_code, reason = "wait4 is the only call that returns one child's resource usage")]

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// One run of a program.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// From before the process is made to after it is reaped.
    pub wall: Duration,
    /// User and system time.
    pub cpu: Duration,
}

/// A program that is to be measured: its name in tables, and its command line.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Name in tables.
    pub name: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Exit status of a good run.
    pub status: i32,
}

impl Subject {
    /// A program with arguments separated by white space, after those of `program`.
    pub fn new(name: &str, program: &str, arguments: &str) -> Self {
        let argv = [program].into_iter().chain(arguments.split_whitespace()).map(str::to_owned).collect();
        Self { name: name.into(), argv, status: 0 }
    }

    /// One more argument, as it is.
    pub fn arg(mut self, argument: impl Into<String>) -> Self {
        self.argv.push(argument.into());
        self
    }

    /// The exit status of a good run is not 0 but this.
    pub fn ending_with(self, status: i32) -> Self {
        Self { status, ..self }
    }

    /// Not started yet; standard streams lead nowhere.
    pub fn command(&self) -> Command {
        let mut command = Command::new(PathBuf::from(&self.argv[0]));
        command.args(&self.argv[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Runs it to its end, which has to be a good one.
    pub fn run(&self) -> Result<Cost> {
        let began = Instant::now();
        let child = self.command().spawn().with_context(|| format!("cannot run {}", self.argv[0]))?;
        let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
        // SAFETY: the process is our child and nobody else waits for it; both results are plain data that the
        // call fills in.
        let pid = unsafe { libc::wait4(child.id() as i32, &mut status, 0, usage.as_mut_ptr()) };
        let wall = began.elapsed();
        if pid < 0 || !libc::WIFEXITED(status) || libc::WEXITSTATUS(status) != self.status {
            bail!("{} ended with wait status {status:#x}: {}", self.name, self.argv.join(" "));
        }
        // SAFETY: zeroes are valid, and wait4 has filled it in.
        let usage = unsafe { usage.assume_init() };
        let time = |t: libc::timeval| {
            Duration::from_secs(t.tv_sec.unsigned_abs()) + Duration::from_micros(t.tv_usec.unsigned_abs())
        };
        Ok(Cost { wall, cpu: time(usage.ru_utime) + time(usage.ru_stime) })
    }
}

/// Runs all subjects in turn, `runs` times after one round that does not count. One list of costs a subject.
pub fn interleave(subjects: &[Subject], runs: usize) -> Result<Vec<Vec<Cost>>> {
    let mut costs = vec![Vec::with_capacity(runs); subjects.len()];
    for round in 0..=runs {
        for (subject, costs) in subjects.iter().zip(&mut costs) {
            let cost = subject.run()?;
            if round > 0 {
                costs.push(cost);
            }
        }
    }
    Ok(costs)
}

/// The middle of some values; of two middle ones, the lower.
pub fn median<T: Ord + Copy>(values: impl IntoIterator<Item = T>) -> Option<T> {
    let mut values: Vec<T> = values.into_iter().collect();
    values.sort_unstable();
    values.get(values.len().saturating_sub(1) / 2).copied()
}

/// The medians of several runs, each of them a list of values in the same order.
pub fn median_of(runs: &[Vec<f64>]) -> Vec<f64> {
    quantile_of(runs, 50)
}

/// As [`median_of`], the values that 95 % of the runs do not exceed.
pub fn p95_of(runs: &[Vec<f64>]) -> Vec<f64> {
    quantile_of(runs, 95)
}

fn quantile_of(runs: &[Vec<f64>], percent: usize) -> Vec<f64> {
    let columns = runs.first().map_or(0, Vec::len);
    let at = |column: usize| {
        let mut values: Vec<f64> = runs.iter().map(|run| run[column]).collect();
        values.sort_by(f64::total_cmp);
        values[((values.len() * percent).div_ceil(100)).saturating_sub(1)]
    };
    (0..columns).map(at).collect()
}
