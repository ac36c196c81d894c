//! Snapshots and forks that come to nothing: processes that are killed wherever they are, and disks that are full. The
//! snapshot of before is there or the new one, and the machine goes on unless it is who was killed.
//! On this machine's /dev/kvm.

use std::fs;
use std::path::Path;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use harness::{Machines, SmallHost};
use rustix::process::{Pid, Signal, kill_process};
use vmm_core::Snapshot;

fn machines() -> Result<Machines> {
    Machines::new(env!("CARGO_BIN_EXE_vmm"))
}

/// Names in a directory, in order.
fn names(dir: &Path) -> Result<Vec<String>> {
    let all = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names: Vec<String> = all.collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

/// Moments within some time, none like another; `VMM_TEST_SEED` repeats them.
struct Moments(u64);

impl Moments {
    fn new() -> Self {
        let given = std::env::var("VMM_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(|| {
            SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| u64::from(time.subsec_nanos()))
        });
        println!("VMM_TEST_SEED={seed}");
        Self(seed | 1)
    }

    fn below(&mut self, most: u64) -> u64 {
        // Xorshift.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % most.max(1)
    }

    /// Waits for a part of `whole`; sleeps are how a test gets to a moment that nobody announces.
    fn wait_within(&mut self, whole: Duration) {
        thread::sleep(Duration::from_micros(self.below(whole.as_micros() as u64)));
    }
}

fn kill(pid: Pid) {
    // It may have ended by itself.
    _ = kill_process(pid, Signal::KILL);
}

/// How long a command takes.
fn time(machines: &Machines, words: &str) -> Result<Duration> {
    let began = Instant::now();
    machines.ok(words)?;
    Ok(began.elapsed())
}

/// The command ends, and says at most a sentence.
fn ends(child: Child) -> Result<bool> {
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.lines().count() <= 1 && !said.contains("panicked"), "{said}");
    Ok(output.status.success())
}

#[test]
fn a_vmm_that_is_killed_in_a_snapshot_leaves_the_old_one_or_the_new_one() -> Result<()> {
    let (machines, mut moments) = (machines()?, Moments::new());
    let start = || machines.ok("run --detach --name web IDLE").map(drop);
    let saved = machines.dir().join("saved");
    start()?;
    machines.ok("snapshot web --to saved")?;
    let whole = time(&machines, "snapshot web --to saved")? * 5 / 4;
    let (mut old, mut new) = (0, 0);
    for round in 0..24 {
        // Every fourth time there is none before.
        let before = match round % 4 {
            0 => {
                fs::remove_dir_all(&saved).ok();
                None
            }
            _ => Snapshot::open(&saved).ok().map(|snapshot| snapshot.manifest().id.clone()),
        };
        let pid = machines.pid("web")?;
        let command = machines.start("snapshot web --to saved")?;
        moments.wait_within(whole);
        kill(pid);
        let done = ends(command)?;
        machines.ok("rm --force web")?;
        let after = match saved.exists() {
            false => None,
            // Whatever is there is whole.
            true => {
                let snapshot = Snapshot::open(&saved).with_context(|| format!("round {round}"))?;
                Some(snapshot.manifest().id.clone())
            }
        };
        ensure!(!done || after != before, "round {round}: it said that it was done");
        ensure!(before.is_none() || after.is_some(), "round {round}: the old one is gone");
        if after == before {
            old += 1
        } else {
            new += 1
        }
        if after.is_some() {
            machines.ok("restore saved --detach --name again")?;
            machines.ok("rm --force again")?;
        }
        start()?;
        machines.ok("snapshot web --to saved")?;
        let here = names(machines.dir())?;
        ensure!(here == ["idle", "saved", "short", "state", "tmp"], "round {round}: {here:?}");
        ensure!(names(&saved)?.len() >= 3, "{:?}", names(&saved)?);
    }
    println!("{old} times the old one, {new} times a new one");
    machines.ok("rm --force web")?;
    fs::remove_dir_all(saved)?;
    machines.expect_nothing_left()
}

#[test]
fn whoever_is_killed_in_a_fork_the_others_go_on_and_nothing_is_left() -> Result<()> {
    let (machines, mut moments) = (machines()?, Moments::new());
    machines.ok("run --detach --name web IDLE")?;
    let whole = time(&machines, "fork web -n 2")?;
    let rm_all = || -> Result<()> {
        for row in machines.ps()? {
            machines.ok(&format!("rm --force {}", row["name"].as_str().unwrap_or_default()))?;
        }
        machines.expect_no_process()
    };
    rm_all()?;
    for round in 0..16 {
        machines.ok("run --detach --name web IDLE")?;
        let parent = machines.pid("web")?;
        let command = machines.start("fork web -n 2")?;
        moments.wait_within(whole);
        // The parent, the command, or whoever is there: clones and their starters.
        let all = machines.processes()?;
        let victim = match round % 4 {
            0 => Some(parent),
            1 => Pid::from_raw(command.id() as i32),
            _ => all.get(moments.below(all.len() as u64) as usize).and_then(|&pid| Pid::from_raw(pid)),
        };
        victim.into_iter().for_each(kill);
        ends(command)?;
        if victim != Some(parent) {
            // What was asked for by a command that was killed is done to its end.
            let row = loop {
                let row =
                    machines.ps()?.into_iter().find(|row| row["name"] == "web").context("it is there")?;
                if row["state"] != "saving" {
                    break row;
                }
            };
            ensure!(row["state"] == "running", "round {round}: {row}");
            machines.ok("pause web")?;
            machines.ok("resume web")?;
        }
        // A clone whose starter was killed may still be on its way.
        machines.rm_all()?;
    }
    machines.ok("run --detach --name web IDLE")?;
    machines.ok("rm --force web")?;
    machines.expect_nothing_left()
}

#[test]
fn a_snapshot_on_a_full_disk_is_refused_and_the_machine_and_the_old_one_stay() -> Result<()> {
    let machines = machines()?;
    machines.ok("run --detach --name web IDLE")?;
    let (mut refused, mut made) = (0, 0);
    // From no room for a directory to room for all of it, and for a second one beside it.
    let sizes = (1..10)
        .map(|kib| format!("size={}k", kib * 8))
        .chain([96, 128, 192].map(|kib| format!("size={kib}k")));
    let inodes = (1..6).map(|inodes| format!("nr_inodes={inodes}"));
    for options in sizes.chain(inodes) {
        let host = SmallHost::new(&options)?;
        let to = host.path("saved");
        let mut kept = None;
        for _ in 0..2 {
            let output = machines.output(&format!("snapshot web --to {}", to.display()))?;
            let said = String::from_utf8(output.stderr)?;
            if output.status.success() {
                made += 1;
                kept = Some(Snapshot::open(&to)?.manifest().id.clone());
            } else {
                refused += 1;
                ensure!(output.status.code() == Some(1) && said.lines().count() == 1, "{options}: {said}");
                ensure!(said.contains("No space left on device"), "{options}: {said}");
            }
            let want: &[&str] = if kept.is_some() { &["saved"] } else { &[] };
            ensure!(names(&host.path(""))? == want, "{options}: {:?}", names(&host.path(""))?);
            let now = kept.is_some().then(|| Snapshot::open(&to)).transpose()?;
            ensure!(now.map(|snapshot| snapshot.manifest().id.clone()) == kept, "{options}: it is another");
            ensure!(machines.ps()?[0]["state"] == "running", "{options}: {:?}", machines.ps()?);
        }
    }
    ensure!(refused > 4 && made > 2, "{refused} refused, {made} made");
    machines.ok("pause web")?;
    machines.ok("resume web")?;
    machines.ok("rm --force web")?;
    machines.expect_nothing_left()
}
