//! The tap: frames both ways, in a network namespace that the test makes.

use anyhow::Result;
use harness::{Guest, Needs, NetNs, Place};

fn namespace() -> Result<NetNs> {
    NetNs::new(&Place::choose(Needs::AnyKvm)?)
}

#[test]
fn ping_works_both_ways() -> Result<()> {
    let net = namespace()?;
    let mut guest =
        Guest::new().net(&net).shell("ping -c 3 -W 5 10.77.0.1 && echo pinged; read x").start()?;
    guest.expect("pinged")?;
    let answer = net.shell("busybox ping -c 3 -W 5 10.77.0.2")?;
    assert!(answer.contains(" 0% packet loss"), "{answer}");
    guest.send("\n")?;
    guest.wait()?.ok()?;
    Ok(())
}

#[test]
fn tcp_carries_bytes_into_the_guest_unchanged() -> Result<()> {
    let net = namespace()?;
    let mut guest = Guest::new().net(&net).shell("echo up; nc -l -p 5000 | sha256sum").start()?;
    guest.expect("up")?;
    // The listener may not be there at once.
    let send = "cd /tmp; f=$(mktemp); dd if=/dev/urandom of=$f bs=1M count=16 2>/dev/null; sha256sum < $f; \
                for i in 1 2 3 4 5 6 7 8 9; do nc -w 5 10.77.0.2 5000 < $f && break; sleep 1; done; rm $f";
    let sum = net.shell(&send.replace("nc ", "busybox nc "))?;
    guest.wait()?.ok()?.expect_line(sum.trim())?;
    Ok(())
}

#[test]
fn tcp_carries_bytes_out_of_the_guest_unchanged() -> Result<()> {
    let net = namespace()?;
    let listener = net.start("busybox nc -l -p 5001 | sha256sum")?;
    let send = "dd if=/dev/urandom of=/tmp/x bs=1M count=16 2>/dev/null; sha256sum < /tmp/x; \
                for i in 1 2 3 4 5 6 7 8 9; do nc -w 5 10.77.0.1 5001 < /tmp/x && break; sleep 1; done";
    let run = Guest::new().net(&net).shell(send).run()?;
    let output = listener.wait(std::time::Duration::from_secs(60))?;
    let sum = output.ok()?;
    run.ok()?.expect_line(sum.trim())?;
    Ok(())
}

#[test]
fn the_mac_address_is_the_given_one() -> Result<()> {
    let net = namespace()?;
    let run = Guest::new()
        .arg("--net")
        .arg("tap=tap0,mac=02:11:22:33:44:55")
        .within(&net)
        .command("cat /sys/class/net/eth0/address")
        .run()?;
    run.ok()?.expect_line("02:11:22:33:44:55")?;
    Ok(())
}
