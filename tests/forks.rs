//! `vmm fork` with real guests: what clones have of their own, how they end, and what is left when a fork is cut short. On
//! this machine's /dev/kvm.

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, ensure};
use harness::{Api, Machines};
use rustix::process::{Pid, Signal, kill_process};

/// Only ends a hang.
const DEADLINE: Duration = Duration::from_secs(60);

/// Says who it is for each line that is typed.
const WHO: &str = "stty -echo; echo ready; while read l; do echo @$(cat /proc/sys/kernel/hostname) id=$(cat /etc/machine-id) \
     $(head -c 16 /dev/urandom | md5sum | cut -c1-32) $(date +%s)@; done";

fn machines() -> Result<Machines> {
    Machines::new(env!("CARGO_BIN_EXE_vmm"))
}

/// Starts a guest in the background that runs a line of shell, and waits until it is ready.
fn start(state: &Machines, words: &str, line: &str) -> Result<()> {
    state.shell_read_only(words, line)?;
    state.expect_log("web", "ready")
}

/// Types a line on a machine's console.
fn send(state: &Machines, name: &str, line: &str) -> Result<UnixStream> {
    let mut console = Api::at(&state.state().join(name).join("api.sock")).console()?;
    console.set_read_timeout(Some(DEADLINE))?;
    writeln!(console, "{line}")?;
    Ok(console)
}

/// What a guest says of itself.
#[derive(Debug)]
struct Who {
    hostname: String,
    machine_id: String,
    random: String,
    /// Seconds since 1970.
    time: u64,
}

fn ask(state: &Machines, name: &str) -> Result<Who> {
    let mut console = send(state, name, "who")?;
    let (mut said, mut chunk) = (Vec::new(), [0; 256]);
    while said.iter().filter(|byte| **byte == b'@').count() < 2 {
        let count = console.read(&mut chunk).with_context(|| format!("{name} says {said:?}"))?;
        ensure!(count > 0, "{name} has ended");
        said.extend(&chunk[..count]);
    }
    let said = String::from_utf8(said)?;
    let line = said.split('@').nth(1).context("an answer")?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let [hostname, machine_id, random, time] = words[..] else { return Err(anyhow!("{name}: {line}")) };
    let [hostname, machine_id, random] =
        [hostname, machine_id.trim_start_matches("id="), random].map(str::to_owned);
    Ok(Who { hostname, machine_id, random, time: time.parse()? })
}

fn now() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs())
}

/// Asks until the guest has become what its note says; returns its first answer's random number, and its last answer.
fn ask_until_named(state: &Machines, name: &str, hostname: &str) -> Result<(String, Who)> {
    let began = Instant::now();
    let first = ask(state, name)?.random;
    loop {
        let before = now();
        let who = ask(state, name)?;
        if who.hostname == hostname {
            ensure!((before - 1..=now() + 1).contains(&who.time), "{who:?} at {before}");
            return Ok((first, who));
        }
        ensure!(began.elapsed() < DEADLINE, "{name} stays {who:?}");
    }
}

#[test]
fn clones_with_a_socket_device_have_a_socket_each() -> Result<()> {
    let state = machines()?;
    let root = format!("{},ro", harness::tools_image()?.display());
    state.shell(
        &format!("run -q --detach --name web --rootfs {root} --vsock v"),
        "echo up; stream-peer serve vsock:5000",
    )?;
    state.expect_log("web", "up")?;
    state.ok("fork web -n 2")?;
    for socket in ["v", "state/web-1/vsock.sock", "state/web-2/vsock.sock"].map(|path| state.dir().join(path))
    {
        // Who calls before the guest knows that its connections are gone is cut off.
        // And not for long.
        for attempt in 0.. {
            ensure!(attempt < 10, "nobody answers at {}", socket.display());
            let mut stream = UnixStream::connect(&socket)?;
            stream.set_read_timeout(Some(Duration::from_millis(500)))?;
            stream.write_all(b"CONNECT 5000\ne!")?;
            let mut answer = Vec::new();
            let mut bytes = [0; 64];
            while let Ok(count @ 1..) = stream.read(&mut bytes) {
                answer.extend_from_slice(&bytes[..count]);
                if answer.ends_with(b"\n!") {
                    break;
                }
            }
            if answer.starts_with(b"OK ") && answer.ends_with(b"\n!") {
                break;
            }
        }
    }
    Ok(())
}

#[test]
fn a_hundred_clones_are_a_hundred_machines() -> Result<()> {
    let state = machines()?;
    start(&state, "run -q --detach --name web --memory 64M", WHO)?;
    let parent = ask(&state, "web")?;
    let names = state.ok("fork web -n 100 --hostname node{}.example --machine-ids")?;
    let names: Vec<&str> = names.lines().collect();
    assert_eq!(names.len(), 100);
    let lane = |lane: usize| -> Result<Vec<(String, Who)>> {
        let clones = names.iter().enumerate().skip(lane).step_by(4);
        clones
            .map(|(at, name)| {
                assert_eq!(*name, format!("web-{}", at + 1));
                ask_until_named(&state, name, &format!("node{}.example", at + 1))
            })
            .collect()
    };
    let answers = thread::scope(|scope| {
        let lanes: Vec<_> = (0..4).map(|number| scope.spawn(move || lane(number))).collect();
        let joined = lanes.into_iter().map(|lane| lane.join().map_err(|_| anyhow!("a thread panicked"))?);
        joined.collect::<Result<Vec<_>>>()
    })?;
    let answers: Vec<(String, Who)> = answers.into_iter().flatten().collect();
    let alive = state.ps()?.iter().filter(|row| row["state"] == "running").count();
    assert_eq!((answers.len(), alive), (100, 101), "all of them at once");
    let again = ask(&state, "web")?;
    assert_eq!((&again.hostname, &again.machine_id), (&parent.hostname, &parent.machine_id));
    let randoms = answers.iter().flat_map(|(first, who)| [first, &who.random]);
    let randoms: HashSet<&String> = randoms.chain([&parent.random, &again.random]).collect();
    assert_eq!(randoms.len(), 202, "a random number that two have");
    let ids: HashSet<&String> = answers.iter().map(|(_, who)| &who.machine_id).collect();
    assert_eq!(ids.len(), 100);
    assert!(ids.iter().all(|id| id.len() == 32 && **id != parent.machine_id), "{ids:?}");
    Ok(())
}

#[test]
fn a_clone_ends_with_the_status_of_its_command() -> Result<()> {
    let state = machines()?;
    start(&state, "run -q --detach --name web", "echo ready; read status; exit $status")?;
    state.ok("snapshot web --to saved")?;
    state.ok("fork web -n 2")?;
    send(&state, "web-1", "7")?;
    assert_eq!(state.output("wait web-1")?.status.code(), Some(7));
    state.ok("kill web-2")?;
    assert_eq!(state.output("wait web-2")?.status.code(), Some(1), "it was killed");
    state.ok("rm web-1 web-2")?;
    state.ok("fork web --rm")?;
    state.ok("kill web-1")?;
    let mut child = state.command("restore saved").stdin(Stdio::piped()).spawn()?;
    child.stdin.take().context("a pipe")?.write_all(b"9\n")?;
    assert_eq!(child.wait_with_output()?.status.code(), Some(9));
    send(&state, "web", "5")?;
    assert_eq!(state.output("wait web")?.status.code(), Some(5));
    assert_eq!(state.ps()?.len(), 1, "with --rm nothing stays of the clones");
    Ok(())
}

#[test]
fn forks_at_the_same_time_take_names_of_their_own() -> Result<()> {
    let state = machines()?;
    state.ok("run --detach --name web IDLE")?;
    state.ok("run --detach --name web-2 IDLE")?;
    let forks = [0; 3].map(|_| state.start("fork web -n 5"));
    let mut names = HashSet::new();
    for fork in forks {
        let output = fork?.wait_with_output()?;
        ensure!(output.status.success(), "{output:?}");
        names.extend(String::from_utf8(output.stdout)?.lines().map(str::to_owned));
    }
    let want: HashSet<String> =
        (1..=16).filter(|number| *number != 2).map(|number| format!("web-{number}")).collect();
    assert_eq!(names, want);
    assert!(state.ps()?.iter().all(|row| row["state"] == "running" && row["pid"].is_number()));
    Ok(())
}

#[test]
fn a_fork_that_is_cut_short_leaves_nothing() -> Result<()> {
    let state = machines()?;
    state.ok("run --detach --name web IDLE --vsock v")?;
    for (signal, number) in [(Signal::INT, 2), (Signal::TERM, 15)] {
        for wait_for in ["web", "web-1", "web-20"] {
            let fork = state.start("fork web -n 100 --set vsock0.path=w{}")?;
            while !state.state().join(wait_for).exists() {
                thread::sleep(Duration::from_millis(1));
            }
            kill_process(Pid::from_child(&fork), signal)?;
            assert_eq!(fork.wait_with_output()?.status.signal(), Some(number), "{wait_for}");
            let names: Vec<_> = state.ps()?.iter().map(|row| row["name"].clone()).collect();
            assert_eq!(names, ["web"], "{wait_for}");
            let sockets = fs::read_dir(state.dir())?.flatten();
            assert_eq!(sockets.filter(|entry| entry.file_name().as_encoded_bytes()[0] == b'w').count(), 0);
        }
    }
    // What one that was killed has left goes with the next one.
    let left = state.state().join("web/fork-999999999");
    fs::create_dir(&left)?;
    fs::write(left.join("memory"), "secret")?;
    state.ok("fork web --rm --set vsock0.path=w{}")?;
    let of_forks = fs::read_dir(state.state().join("web"))?.flatten();
    let of_forks: Vec<_> = of_forks.map(|entry| entry.file_name()).collect();
    assert!(
        !of_forks.iter().any(|name| name.as_encoded_bytes().contains(&b'-') && name != "vmm-log"),
        "{of_forks:?}"
    );
    assert_eq!(state.processes()?.len(), 2);
    Ok(())
}

#[test]
fn mistakes_are_one_sentence_and_start_nothing() -> Result<()> {
    let state = machines()?;
    let long = "x".repeat(31);
    state.ok("run --detach --name web IDLE --vsock v")?;
    state.ok(&format!("run --detach --name {long} IDLE"))?;
    for (words, status, want) in [
        (
            "fork web --set vsock0.path=v",
            1,
            "1 of 1 clones did not start; web-1: cannot open vsock socket 'v'",
        ),
        ("fork web -n 3 --set vsock0.path=no/w{}", 1, "3 of 3 clones did not start"),
        ("fork web --set vsock1.path=w", 2, "no device 'vsock1'"),
        ("fork web --set vsock0.nonsense=w", 1, "nonsense"),
        ("fork web --hostname a_{}", 2, "no host name"),
        ("fork web --hostname=-{}", 2, "no host name"),
        ("fork web -n 0", 2, "from 1 to 1000"),
        (&format!("fork {long}"), 1, "32 letters"),
    ] {
        let said = state.refused(words, status)?;
        assert!(said.contains(want), "{words}: {said}");
    }
    assert_eq!(state.ps()?.len(), 2);
    assert_eq!(state.processes()?.len(), 2);
    Ok(())
}
