//! The lab itself: a host with KVM, programs and files, many at once.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use anyhow::Result;
use harness::lab::Lab;
use harness::process::{Exit, Program, Signal};
use harness::{NetNs, Place};

/// Only there to end a hang.
const DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn has_hardware_kvm_and_tun() -> Result<()> {
    let lab = Lab::shared()?;
    let seen = lab
        .shell(
            "ls /dev/kvm /dev/net/tun; grep -c -w svm /proc/cpuinfo; cat /sys/module/kvm_amd/parameters/npt",
        )?
        .ok()?;
    assert_eq!(seen, "/dev/kvm\n/dev/net/tun\n1\nY\n");
    Ok(())
}

#[test]
fn passes_output_and_exit_on() -> Result<()> {
    let lab = Lab::shared()?;
    let output = lab.shell("echo out; echo err >&2; exit 7")?;
    assert_eq!(
        (output.exit, &output.stdout[..], &output.stderr[..]),
        (Exit::Status(7), &b"out\n"[..], &b"err\n"[..])
    );
    let output = lab.shell("kill -9 $$")?;
    assert_eq!(output.exit, Exit::Signal(9));
    let missing = lab.spawn(&Program::new(["no-such-program"]))?.wait(DEADLINE).unwrap_err().to_string();
    assert!(missing.contains("no-such-program"), "{missing}");
    Ok(())
}

#[test]
fn passes_environment_directory_input_and_signals_on() -> Result<()> {
    let lab = Lab::shared()?;
    let mut program = Program::shell(
        "pwd; echo $COLOUR; trap 'echo caught; exit 3' USR1; while read line; do echo got $line; done; sleep 60 & wait",
    );
    program.env.push(("COLOUR".into(), "blue".into()));
    program.cwd = Some("/scratch".into());
    let mut process = lab.spawn(&program)?;
    process.expect("/scratch\nblue\n", DEADLINE)?;
    process.send("one\ntwo\n")?;
    process.expect("got two\n", DEADLINE)?;
    process.close_stdin();
    process.signal(Signal::USR1)?;
    let output = process.wait(DEADLINE)?;
    assert_eq!(output.exit, Exit::Status(3));
    assert!(output.stdout.ends_with(b"caught\n"));
    Ok(())
}

#[test]
fn ends_what_takes_too_long_and_leaves_nothing() -> Result<()> {
    let lab = Lab::shared()?;
    let mark = "sleep 1234";
    let mut process = lab.spawn(&Program::shell("echo started; sleep 1234 & sleep 1234"))?;
    process.expect("started", DEADLINE)?;
    let error = process.wait(Duration::from_millis(200)).unwrap_err().to_string();
    assert!(error.contains("started"), "{error}");
    let gone = lab.shell(&format!("while pgrep -f '^{mark}$' >/dev/null; do usleep 10000; done"))?;
    assert_eq!(gone.exit, Exit::Status(0));
    Ok(())
}

#[test]
fn files_come_back_as_they_went_with_their_holes() -> Result<()> {
    let lab = Lab::shared()?;
    let dir = tempfile::tempdir()?;
    let (there, back) = (dir.path().join("there"), dir.path().join("back"));
    let file = File::create(&there)?;
    file.set_len(3 << 30)?;
    let data: Vec<u8> = (0..3_000_000u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    file.write_all_at(&data, 5 << 20)?;
    file.write_all_at(b"end", (3 << 30) - 3)?;
    lab.put(&there, "/scratch/test-files/a")?;
    lab.copy("/scratch/test-files/a", "/scratch/test-files/b")?;
    lab.get("/scratch/test-files/b", &back)?;
    let blocks = lab.shell("stat -c %b /scratch/test-files/b; rm -r /scratch/test-files")?.ok()?;
    assert!(blocks.trim().parse::<u64>()? * 512 < 4 << 20, "{blocks} blocks");
    assert!(fs::metadata(&back)?.blocks() * 512 < 4 << 20);
    let mut same = vec![0; data.len()];
    File::open(&back)?.read_exact_at(&mut same, 5 << 20)?;
    assert!(same == data);
    assert_eq!(fs::metadata(&back)?.len(), 3 << 30);
    let mut end = [0; 4];
    File::open(&back)?.read_exact_at(&mut end, (3 << 30) - 4)?;
    assert_eq!(&end, b"\0end");
    Ok(())
}

#[test]
fn what_was_provided_once_is_found_again() -> Result<()> {
    let lab = Lab::shared()?;
    let dir = tempfile::tempdir()?;
    let (one, other) = (dir.path().join("one"), dir.path().join("other"));
    fs::write(&one, "the same")?;
    fs::write(&other, "the same")?;
    let path = lab.provide(&one)?;
    lab.shell(&format!("echo changed > {path}"))?.ok()?;
    assert_eq!(lab.provide(&other)?, path);
    assert_eq!(lab.shell(&format!("cat {path}; rm {path}"))?.ok()?, "changed\n");
    Ok(())
}

#[test]
fn two_clients_at_once() -> Result<()> {
    let lab = Lab::shared()?;
    // Each waits for what the other writes.
    let meet = |mine: &str, other: &str| {
        Program::shell(&format!(
            "echo x > /run/{mine}; while [ ! -e /run/{other} ]; do usleep 10000; done; echo met; "
        ))
    };
    let (first, second) = (lab.spawn(&meet("a", "b"))?, lab.spawn(&meet("b", "a"))?);
    assert_eq!(first.wait(DEADLINE)?.ok()?, "met\n");
    assert_eq!(second.wait(DEADLINE)?.ok()?, "met\n");
    lab.shell("rm /run/a /run/b")?.ok()?;
    Ok(())
}

#[test]
fn network_namespaces_work_there_too() -> Result<()> {
    let net = NetNs::new(&Place::Lab(Lab::shared()?))?;
    assert!(net.shell("ip addr show tap0")?.contains("10.77.0.1/24"));
    assert!(Lab::shared()?.shell("ip link show tap0")?.ok().is_err());
    Ok(())
}
