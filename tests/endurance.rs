//! Machines with a name under stress: hundreds of them, fifty at once, processes that are killed wherever they are, and
//! disks without room. Whatever happens, every command works afterwards, and what has gone leaves nothing.
//! On this machine's /dev/kvm.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, ensure};
use harness::{Api, Machines, SmallHost};
use rustix::process::{Pid, Signal, kill_process};

/// Only ends a hang.
const DEADLINE: Duration = Duration::from_secs(120);

fn machines() -> Result<Machines> {
    Machines::new(env!("CARGO_BIN_EXE_vmm"))
}

/// Names of what is in directories that are everybody's.
fn shared_places() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for dir in ["/dev/shm", "/sys/class/net"] {
        for entry in std::fs::read_dir(dir)? {
            names.push(entry?.path().display().to_string());
        }
    }
    names.sort();
    Ok(names)
}

/// Does `work` for each number on some threads at once.
fn at_once(numbers: u32, threads: u32, work: impl Fn(u32) -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let lane = |first| (first..numbers).step_by(threads as usize).try_for_each(&work);
        let lanes: Vec<_> = (0..threads).map(|first| scope.spawn(move || lane(first))).collect();
        lanes.into_iter().try_for_each(|lane| lane.join().map_err(|_| anyhow!("a thread panicked"))?)
    })
}

/// Types a question on a machine's console until it is answered.
fn ask(machines: &Machines, name: &str, question: &str, answer: &str) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    let mut text = Vec::new();
    while Instant::now() < end {
        let mut console = Api::at(&machines.state().join(name).join("api.sock")).console()?;
        console.set_read_timeout(Some(Duration::from_secs(2)))?;
        console.write_all(format!("{question}\n").as_bytes())?;
        let mut buf = [0; 4096];
        loop {
            match console.read(&mut buf) {
                // Who does not read in time is cut off, and comes again.
                Ok(0) => break,
                Ok(n) => text.extend_from_slice(&buf[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
            if text.windows(answer.len()).any(|window| window == answer.as_bytes()) {
                return Ok(());
            }
        }
        text.drain(..text.len().saturating_sub(answer.len()));
    }
    Err(anyhow!("{name} does not answer"))
}

#[test]
fn two_hundred_starts_and_stops_leave_nothing() -> Result<()> {
    let machines = machines()?;
    let before = shared_places()?;
    let tap = if rustix::process::geteuid().is_root() { "--net tap" } else { "" };
    at_once(200, 2, |i| {
        let name = format!("m{}", i % 2);
        machines.ok(&format!("run --detach --name {name} IDLE --vsock v{}.sock {tap}", i % 2))?;
        for command in match i / 2 % 4 {
            0 => ["stop --time 0", "rm"],
            1 => ["kill", "rm"],
            2 => ["pause", "rm --force"],
            _ => ["resume", "rm --force"],
        } {
            machines.ok(&format!("{command} {name}")).with_context(|| format!("machine {i}"))?;
        }
        Ok(())
    })?;
    machines.expect_nothing_left()?;
    assert_eq!(shared_places()?, before);
    Ok(())
}

#[test]
fn fifty_guests_at_once_all_answer_and_all_go() -> Result<()> {
    let machines = machines()?;
    let name = |i: u32| format!("vm{i:02}");
    at_once(50, 50, |i| machines.ok(&format!("run -q --detach --name {} --memory 64M", name(i))).map(drop))?;
    let all = machines.ps()?;
    assert_eq!(all.iter().filter(|row| row["state"] == "running").count(), 50, "{all:?}");
    at_once(50, 10, |i| {
        ask(&machines, &name(i), &format!("echo $(({i} + 1000))."), &format!("\n{}.", i + 1000))
    })?;
    // Our init listens to the power button.
    at_once(50, 10, |i| machines.ok(&format!("stop --time 60 {}", name(i))).map(drop))?;
    let all = machines.ps()?;
    assert!(all.iter().all(|row| row["reason"] == "the guest powered off"), "{all:?}");
    machines.ok(&format!("rm {}", (0..50).map(name).collect::<Vec<_>>().join(" ")))?;
    machines.expect_nothing_left()
}

/// Numbers that look random, and are the same for the same seed (SplitMix64).
struct Random(u64);

impl Random {
    /// By `VMM_TEST_SEED`, or by the clock; printed, so that it can be repeated as far as timing allows.
    fn new() -> Self {
        let given = std::env::var("VMM_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos() as u64);
        let seed = given.unwrap_or_else(clock);
        println!("VMM_TEST_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    fn of<'a>(&mut self, all: &[&'a str]) -> &'a str {
        all[self.below(all.len() as u64) as usize]
    }
}

/// Waits for a command that may have been killed; whatever it met, it ends, and says so in a sentence if at all.
fn check_end(words: &str, mut child: Child) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    while child.try_wait()?.is_none() {
        ensure!(Instant::now() < end, "vmm {words} hangs");
        thread::sleep(Duration::from_millis(1));
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let status = output.status;
    ensure!(matches!(status.code(), Some(0 | 1)) || status.signal() == Some(9), "vmm {words}: {output:?}");
    ensure!(
        said.lines().all(|line| line.starts_with("vmm: ") && !line.contains("panicked")),
        "vmm {words}: {said}"
    );
    Ok(())
}

#[test]
fn whoever_is_killed_wherever_it_is_every_command_works() -> Result<()> {
    const COMMANDS: [&str; 10] = [
        "run --detach IDLE --name",
        "run --detach IDLE --name",
        "run --detach --rm IDLE --name",
        "stop --time 0",
        "kill",
        "rm",
        "rm --force",
        "pause",
        "inspect",
        "ps --format json",
    ];
    let (machines, mut random) = (machines()?, Random::new());
    for round in 0..150 {
        let mut both = Vec::new();
        for _ in 0..2 {
            let (command, name) = (random.of(&COMMANDS), random.of(&["a", "b", "c"]));
            let words = if command.starts_with("ps") { command.into() } else { format!("{command} {name}") };
            both.push((machines.start(&words)?, words));
        }
        thread::sleep(Duration::from_micros(random.below(30_000)));
        let all = machines.processes()?;
        // Machines, those that are being started, and the two commands, which are waited for below.
        if let Some(victim) = all.get(random.below(all.len() as u64 + 1) as usize) {
            _ = Pid::from_raw(*victim).map(|pid| kill_process(pid, Signal::KILL));
        }
        for (child, words) in both {
            check_end(&words, child).with_context(|| format!("round {round}"))?;
        }
        for row in machines.ps()? {
            let state = row["state"].as_str().unwrap_or_default();
            let known =
                ["created", "running", "paused", "stopping", "stopped", "ended", "killed", "unresponsive"];
            ensure!(known.contains(&state), "round {round}: {row}");
        }
    }
    // Starts whose command was killed may still be on their way.
    machines.rm_all()?;
    // And the next one removes what is left of those that were killed in between.
    machines.ok("run --detach --name last IDLE")?;
    machines.ok("rm --force last")?;
    machines.expect_nothing_left()
}

#[test]
fn a_start_without_room_for_its_state_is_refused_and_leaves_nothing() -> Result<()> {
    let (mut refused, mut started) = (0, 0);
    // One more file each time, from not even a directory on.
    for options in
        (2..10).map(|files| format!("nr_inodes={files}")).chain(["size=4k".into(), "size=8k".into()])
    {
        let host = SmallHost::new(&options)?;
        let machines = machines()?.state_at(host.path("state"));
        if options.starts_with("size") {
            // What room there is has been taken.
            _ = std::fs::write(host.path("else"), [1; 8192]);
        }
        let output = machines.output("run --detach --name full IDLE")?;
        let said = String::from_utf8(output.stderr)?;
        if output.status.success() {
            started += 1;
            machines.expect_log("full", "up")?;
            machines.ok("stop --time 0 full")?;
            assert_eq!(machines.ps()?[0]["state"], "ended");
            machines.ok("rm full")?;
        } else {
            refused += 1;
            ensure!(output.status.code() == Some(1) && said.lines().count() == 1, "{options}: {said}");
            ensure!(said.contains("No space left on device"), "{options}: {said}");
            let left = std::fs::read_dir(machines.state()).into_iter().flatten();
            let left: Vec<_> = left.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
            ensure!(left.iter().all(|name| name == ".lock"), "{options}: {left:?}");
            ensure!(machines.ps()?.is_empty(), "{options}");
        }
        machines.expect_no_process()?;
    }
    assert!(refused > 2 && started > 0, "{refused} refused, {started} started");
    Ok(())
}

#[test]
fn a_full_log_does_not_stop_the_guest() -> Result<()> {
    let host = SmallHost::new("size=32k")?;
    let machines = machines()?.state_at(host.path("state"));
    machines.ok("run -q --detach --name chatty")?;
    ask(&machines, "chatty", "yes | head -c 30000; echo $((6 * 7)).", "\n42.")?;
    assert_eq!(rustix::fs::statvfs(host.path("state").as_path())?.f_bfree, 0, "the disk is full");
    ask(&machines, "chatty", "echo $((7 * 7)).", "\n49.")?;
    ensure!(machines.ok("logs chatty")?.len() > 20_000, "what had room is there");
    machines.ok("stop --time 60 chatty")?;
    // There is room for that from the beginning.
    let row = &machines.ps()?[0];
    assert_eq!((&row["state"], &row["reason"]), (&"ended".into(), &"the guest powered off".into()), "{row}");
    machines.ok("rm chatty")?;
    Ok(())
}
