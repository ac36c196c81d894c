//! Machines with a name, in the background: every command for them, with real guests, and what is left when something is
//! killed. On this machine's /dev/kvm: what is tested here are the commands and not the guest.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use harness::micro::Micro;
use harness::{Api, Machines};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;
use vmm::Milestone;

fn state() -> Result<Machines> {
    Machines::new(env!("CARGO_BIN_EXE_vmm"))
}

#[test]
fn a_guest_in_the_background_has_a_whole_life() -> Result<()> {
    let state = state()?;
    assert_eq!(state.ok("run -q --name web --detach")?, "web\n");
    state.expect_log("web", "leaving this shell")?;
    let follower = state.start("logs -f we")?;

    let mut attached = state.command("attach w").stdin(Stdio::piped()).spawn()?;
    let mut keys = attached.stdin.take().context("a pipe")?;
    keys.write_all(b"echo $((6 * 7)) > /tmp/answer; cat /tmp/answer\n")?;
    state.expect_log("web", "\n42\r\n")?;
    attached.kill()?;
    let mut seen = String::new();
    attached.stdout.take().context("a pipe")?.read_to_string(&mut seen)?;
    assert!(seen.contains("42"), "{seen}");
    attached.wait()?;

    state.ok("pause web")?;
    assert_eq!(state.ps()?[0]["state"], "paused");
    state.ok("resume web")?;
    assert!(!state.ok("logs --vmm web")?.contains("balloon0"), "nobody wants to know");
    state.ok("log-level web warn,vmm_core=info")?;
    state.ok("update web balloon0 size=32M")?;
    let said = state.ok("logs --vmm web")?;
    assert!(said.contains("vm{id=web}:thread{id=control}: vmm_core::event: balloon0 was changed"), "{said}");
    assert!(state.refused("log-level web loud", 2)?.contains("MODULE=LEVEL"));
    let inspection: Value = serde_json::from_str(&state.ok("inspect web")?)?;
    assert_eq!(inspection["log"], "vmm_core=info,warn");
    let balloon = inspection["config"]["devices"]
        .as_array()
        .and_then(|all| all.iter().find(|one| one["kind"] == "balloon"));
    assert_eq!(balloon.map(|one| &one["size"]), Some(&"32M".into()));
    let milestones = &inspection["milestones"];
    assert_eq!(milestones["process_started"], 0);
    assert!(milestones["console_output"].is_u64());
    // A quiet kernel leaves the first byte to the init, which may say that it runs before or after.
    let others = Milestone::ALL.into_iter().filter(|milestone| *milestone != Milestone::ConsoleOutput);
    let micros: Vec<u64> = others.filter_map(|milestone| milestones[milestone.name()].as_u64()).collect();
    assert!(micros.len() == Milestone::ALL.len() - 1 && micros.is_sorted(), "{milestones}");
    let said = state.refused("update web disk9 size=1M", 1)?;
    assert!(said.contains("no device 'disk9'"), "{said}");
    let table = state.ok("stats --once web")?;
    assert!(table.starts_with("NAME") && table.contains("\nweb "), "{table}");
    let stats: Value = serde_json::from_str(&state.ok("stats --format json")?)?;
    assert_eq!(stats[0]["name"], "web");
    assert!(stats[0]["memory_resident_bytes"].as_u64() > Some(4 << 20), "{stats}");
    assert!(stats[0]["disk_read_bytes_per_second"].is_u64() && stats[0]["cpus"].is_f64(), "{stats}");
    assert!(state.refused("rm web", 1)?.contains("vmm stop web"));

    let waiter = state.start("wait web")?;
    state.ok("stop --time 30 web")?;
    assert_eq!(waiter.wait_with_output()?.status.code(), Some(0));
    let followed = String::from_utf8(follower.wait_with_output()?.stdout)?;
    assert!(followed.contains("leaving this shell") && followed.contains("42"), "{followed}");
    let row = &state.ps()?[0];
    assert_eq!((&row["state"], &row["reason"]), (&"ended".into(), &"the guest powered off".into()), "{row}");
    state.ok("logs web")?;
    state.ok("stop web")?;
    state.ok("rm web")?;
    assert!(state.ps()?.is_empty());
    Ok(())
}

#[test]
fn who_leaves_the_console_of_a_quiet_guest_makes_room() -> Result<()> {
    let state = state()?;
    state.ok("run --detach --name quiet IDLE")?;
    state.expect_log("quiet", "up")?;
    let api = Api::at(&state.state().join("quiet/api.sock"));
    // More than can be attached at a time, one after the other.
    for number in 0..40 {
        let mut console = api.console()?;
        console.shutdown(Shutdown::Write)?;
        let mut said = String::new();
        console.read_to_string(&mut said)?;
        ensure!(said.is_empty(), "{number}: {said}");
    }
    Ok(())
}

#[test]
fn a_machine_in_the_foreground_can_be_attached_to_and_has_both_its_sockets() -> Result<()> {
    let state = state()?;
    let mut guest = state.command("run -q --name here --api-sock own.sock --");
    let line = "until read -t 1 go; do echo ready; done; cat";
    let mut guest = guest.args(["sh", "-c", line]).stdin(Stdio::piped()).spawn()?;
    let own = Api::when_ready(&state.dir().join("own.sock"))?;
    while state.ps()?[0]["state"] != "running" {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(own.get_json("/vmm/v1/inspect")?["name"], "here");
    let mut first = own.console()?;
    expect(&mut first, "ready")?;
    first.write_all(b"go\n")?;
    let mut attached = state.command("attach here").stdin(Stdio::piped()).spawn()?;
    // Each types, and all see it: once as it is typed and once from the program.
    attached.stdin.as_mut().context("a pipe")?.write_all(b"from-second\n")?;
    expect(&mut first, "from-second\r\nfrom-second\r\n")?;
    first.write_all(b"from-first\n")?;
    expect(&mut first, "from-first\r\nfrom-first\r\n")?;
    state.ok("stop --time 60 here")?;
    let mut rest = String::new();
    first.read_to_string(&mut rest)?;
    assert!(!rest.contains("from"), "{rest}");
    // Who has not gone sees the end, and all before it.
    let seen = String::from_utf8(attached.wait_with_output()?.stdout)?;
    assert!(seen.contains("from-first\r\nfrom-first\r\n"), "{seen}");
    drop(guest.stdin.take());
    let said = String::from_utf8(guest.wait_with_output()?.stdout)?;
    assert!(said.contains("from-second\r\nfrom-second\r\n") && said.contains("from-first"), "{said}");
    assert!(!state.dir().join("own.sock").exists());
    Ok(())
}

#[test]
fn who_is_attached_and_does_not_read_makes_no_guest_wait() -> Result<()> {
    let state = state()?;
    // again: in al, 0x3fd; test al, 1; jz again
    let listen = [0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb];
    // mov ecx, 0x60000; mov dx, 0x3f8; mov al, 'x'; again: out dx, al; loop again
    let flood = [0xb9, 0, 0, 6, 0, 0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xe2, 0xfd];
    let kernel =
        Micro::new().out8(0x3f9, 1).out8(0x3fc, 8).print("up\n").raw(&listen).raw(&flood).print("\ndone\n");
    kernel.raw(&[0xf4, 0xeb, 0xfd]).write(&state.dir().join("flood"))?;
    state.ok("run --detach --name flood -q --no-rootfs --memory 16M --kernel flood")?;
    state.expect_log("flood", "up")?;
    let api = Api::at(&state.state().join("flood/api.sock"));
    let (mut dead, mut reader) = (api.console()?, api.console()?);
    let reader = std::thread::spawn(move || expect(&mut reader, "xxx\ndone\n"));
    dead.write_all(b"!")?;
    state.expect_log("flood", "done")?;
    reader.join().expect("no panic")?;
    std::fs::remove_file(state.dir().join("flood"))?;
    Ok(())
}

/// Reads until there is `text`.
fn expect(stream: &mut impl Read, text: &str) -> Result<()> {
    let (mut seen, mut buf) = (String::new(), [0; 4096]);
    while !seen.contains(text) {
        let n = stream.read(&mut buf)?;
        ensure!(n > 0, "{text:?} is not in {seen:?}");
        seen += &String::from_utf8_lossy(&buf[..n]);
    }
    Ok(())
}

#[test]
fn a_console_that_is_elsewhere_or_asked_for_in_another_way_is_refused() -> Result<()> {
    let state = state()?;
    state.ok("run --detach --name file --serial file=out IDLE")?;
    assert!(state.refused("attach file", 1)?.contains("in a file of its own"));
    state.ok("run --detach --name quiet IDLE")?;
    let api = Api::at(&state.state().join("quiet/api.sock"));
    assert!(api.get("/vmm/v1/console")?.fault()?.contains("Upgrade: vmm-console"));
    let all: Vec<_> = (0..16).map(|_| api.console()).collect::<Result<_>>()?;
    assert!(state.refused("attach quiet", 1)?.contains("16 are attached already"));
    drop(all);
    std::fs::remove_file(state.dir().join("out"))?;
    Ok(())
}

#[test]
fn exit_statuses_pass_on_and_nothing_stays_that_shall_not() -> Result<()> {
    let state = state()?;
    let mut command = state.command("run -q --detach --rm --name job");
    let started = command.args(["--", "sh", "-c", "sleep 1; exit 7"]).output()?;
    ensure!(started.status.success(), "{started:?}");
    assert_eq!(state.output("wait job")?.status.code(), Some(7));
    assert!(state.refused("run --detach --name nowhere --no-rootfs --kernel none", 1)?.contains("'none'"));
    assert!(state.refused("run --detach --name a/b IDLE", 2)?.contains("letters, digits"));
    assert!(state.refused("attach nobody", 1)?.contains("vmm ps"));
    assert!(state.output("ps")?.status.success());
    // In the foreground, too.
    assert!(state.ok("run --name here SHORT")?.contains("up"));
    assert!(state.refused("logs here", 1)?.contains("no log"));
    assert_eq!(state.output("wait here")?.status.code(), Some(0));
    state.ok("rm here")?;
    let left: Vec<_> = std::fs::read_dir(state.state())?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<_, _>>()?;
    assert_eq!(left, [".lock"]);
    Ok(())
}

#[test]
fn who_does_not_listen_to_the_power_button_is_killed_when_the_time_is_over() -> Result<()> {
    let state = state()?;
    let mut deaf = state.command("run -q --detach --name deaf");
    let line = "trap '' TERM; echo ready; while :; do sleep 1; done";
    ensure!(deaf.args(["--", "sh", "-c", line]).output()?.status.success(), "it starts");
    state.expect_log("deaf", "ready")?;
    state.ok("stop --time 1 deaf")?;
    let row = &state.ps()?[0];
    assert_eq!((&row["state"], &row["reason"]), (&"ended".into(), &"stopped on request".into()), "{row}");
    Ok(())
}

#[test]
fn a_guest_that_boots_does_not_hear_the_power_button_and_is_asked_again() -> Result<()> {
    let state = state()?;
    state.ok("run -q --detach --name young")?;
    state.ok("stop --time 60 young")?;
    let row = &state.ps()?[0];
    assert_eq!(row["reason"], "the guest powered off", "{row}");
    Ok(())
}

#[test]
fn a_name_is_free_again_when_its_machine_is_removed_and_not_before() -> Result<()> {
    let state = state()?;
    for _ in 0..3 {
        state.ok("run --detach --rm --name x IDLE")?;
        assert!(state.refused("run --detach --name x IDLE", 1)?.contains("'x' runs already"));
        assert!(state.refused("run --name x SHORT", 1)?.contains("'x' runs already"));
        state.ok("kill x")?;
    }
    state.ok("run --name x SHORT")?;
    for _ in 0..2 {
        assert!(state.refused("run --detach --name x IDLE", 1)?.contains("say 'vmm rm x'"));
        state.ok("rm x")?;
        state.ok("run --detach --rm --name x IDLE")?;
        // Nobody is left who could remove it.
        kill_process(state.pid("x")?, Signal::KILL)?;
        assert!(state.refused("wait x", 1)?.contains("was killed"));
    }
    state.ok("rm --force x")?;
    state.expect_nothing_left()
}

#[test]
fn a_name_is_one_machines_however_many_want_it() -> Result<()> {
    let state = state()?;
    let attempts: Vec<Child> =
        (0..8).map(|_| state.start("run --detach --name one IDLE")).collect::<Result<_>>()?;
    let outputs: Vec<Output> =
        attempts.into_iter().map(|child| Ok(child.wait_with_output()?)).collect::<Result<_>>()?;
    let (won, lost): (Vec<&Output>, Vec<&Output>) =
        outputs.iter().partition(|output| output.status.success());
    assert_eq!(won.len(), 1, "{outputs:?}");
    for output in lost {
        assert!(String::from_utf8_lossy(&output.stderr).contains("runs already"), "{output:?}");
    }
    assert_eq!(state.ps()?.len(), 1);
    Ok(())
}

#[test]
fn what_is_killed_is_known_to_be_dead_and_can_be_removed() -> Result<()> {
    let state = state()?;
    for name in ["a", "b", "c"] {
        state.ok(&format!("run --detach --name {name} IDLE"))?;
    }
    let pid = state.pid("b")?;
    kill_process(pid, Signal::KILL)?;
    assert!(state.refused("wait b", 1)?.contains("was killed"));
    let states: Vec<_> = state.ps()?.iter().map(|row| row["state"].clone()).collect();
    assert_eq!(states, ["running", "killed", "running"]);
    assert!(state.refused("pause b", 1)?.contains("'b' has ended"));
    state.ok("kill b c")?;
    assert_eq!(state.output("wait c")?.status.code(), Some(1), "it was killed");
    state.ok("rm b c")?;
    state.ok("run --detach --name b IDLE")?;

    // One that does not answer is killed all the same.
    let pid = state.pid("a")?;
    kill_process(pid, Signal::STOP)?;
    let states: Vec<_> = state.ps()?.iter().map(|row| row["state"].clone()).collect();
    assert_eq!(states, ["unresponsive", "running"]);
    let killer = state.start("kill a")?;
    let killed = killer.wait_with_output()?;
    ensure!(killed.status.success(), "{killed:?}");
    assert!(test_kill_process(pid).is_err() || !state.ps()?[0]["state"].eq("running"));
    Ok(())
}

#[test]
fn a_terminal_that_closes_does_not_end_what_runs_in_the_background() -> Result<()> {
    let state = state()?;
    let mut shell = Command::new("setsid");
    let vmm = env!("CARGO_BIN_EXE_vmm");
    let line = format!(
        "{vmm} run --state-dir {} --detach --name bg -q --no-rootfs --memory 16M --kernel idle; kill -HUP -$$",
        state.state().display()
    );
    let status =
        shell.args(["--wait", "sh", "-c", &line]).current_dir(state.dir()).stdout(Stdio::null()).status()?;
    assert_eq!(status.signal(), Some(1), "{status:?}");
    assert_eq!(state.ps()?[0]["state"], "running");
    Ok(())
}

#[test]
fn a_wrong_name_is_told_and_nothing_else_is_meant_by_it() -> Result<()> {
    let state = state()?;
    for name in ["web", "web-2"] {
        state.ok(&format!("run --detach --name {name} IDLE"))?;
    }
    for command in ["stop", "kill", "pause", "resume", "rm", "rm --force", "inspect", "stats --once", "wait"]
    {
        let said = state.refused(&format!("{command} wbe"), 1)?;
        assert!(said.contains("no machine 'wbe'; did you mean 'web'?"), "{command}: {said}");
        let said = state.refused(&format!("{command} we"), 1)?;
        assert!(said.contains("could be any of web, web-2"), "{command}: {said}");
        // An empty variable of a script is not the only machine.
        let output = state.command(command).arg("").output()?;
        assert_eq!(output.status.code(), Some(1), "{command}: {output:?}");
    }
    for device in ["a/b", "a b", "", "../x", "%"] {
        let output = state.command("update web").args([device, "size=1M"]).output()?;
        let said = String::from_utf8(output.stderr)?;
        assert!(output.status.code() == Some(1) && said.contains("no name of a device"), "{said}");
    }
    // The others are served all the same, and each mistake is told.
    let output = state.output("kill nobody web anybody web-2")?;
    let said = String::from_utf8(output.stderr)?;
    assert!(said.contains("'nobody'") && said.contains("'anybody'"), "{said}");
    assert!(state.ps()?.iter().all(|row| row["state"] == "ended"));
    for command in ["attach", "pause", "stats --once"] {
        assert!(state.refused(&format!("{command} web"), 1)?.contains("'web' has ended"), "{command}");
    }
    Ok(())
}

#[test]
fn who_does_not_read_any_more_ends_the_command_of_a_quiet_machine() -> Result<()> {
    let state = state()?;
    state.ok("run --detach --name quiet IDLE")?;
    state.expect_log("quiet", "up")?;
    for command in ["logs -f quiet", "stats quiet", "attach quiet"] {
        let mut child = state.start(command)?;
        drop(child.stdout.take());
        assert_eq!(child.wait()?.code(), Some(141), "{command}");
    }
    for command in ["logs quiet", "logs -f quiet", "stats quiet", "ps", "inspect quiet"] {
        let full = std::fs::File::options().write(true).open("/dev/full")?;
        let output = state.command(command).stdout(full).output()?;
        assert_eq!(output.status.code(), Some(1), "{command}: {output:?}");
    }
    // Keys that are pressed end nothing but the command.
    for command in ["logs -f quiet", "stats quiet", "attach quiet", "wait quiet"] {
        let mut child = state.start(command)?;
        kill_process(Pid::from_child(&child), Signal::INT)?;
        assert_eq!(child.wait()?.signal(), Some(2), "{command}");
    }
    assert_eq!(state.ps()?[0]["state"], "running");
    Ok(())
}
