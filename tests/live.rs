//! Devices that change while a real guest uses them: what the operator asks for reaches the guest, and the guest's work goes on.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use harness::{Live, Needs, NetNs, Place, RunningLive, smaps};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const RAM: u64 = 512 * MIB;
/// Only ends a hang.
const DEADLINE: Duration = Duration::from_secs(60);

/// Asks again and again until `holds` says so; the error shows the last answer.
fn until<T: std::fmt::Debug>(mut ask: impl FnMut() -> Result<T>, holds: impl Fn(&T) -> bool) -> Result<T> {
    let began = Instant::now();
    loop {
        let answer = ask()?;
        if holds(&answer) {
            return Ok(answer);
        }
        ensure!(began.elapsed() < DEADLINE, "it stays so: {answer:?}");
        sleep(Duration::from_millis(50));
    }
}

/// Waits until a counter of a device is what it should be.
fn until_counter(
    guest: &mut RunningLive,
    device: &str,
    name: &str,
    holds: impl Fn(u64) -> bool,
) -> Result<u64> {
    until(|| guest.counter(device, name), |value| holds(*value))
}

/// Bytes of guest RAM that are resident on the host.
fn resident(guest: &RunningLive) -> Result<u64> {
    Ok(smaps::ram(&guest.process().smaps()?, RAM)?.iter().map(|mapping| mapping.rss).sum())
}

/// A line of the guest's /proc/meminfo in bytes, as it says now.
fn meminfo(guest: &mut RunningLive, name: &str) -> Result<u64> {
    guest.send(name)?;
    guest.expect(&format!("{name}: "))?;
    let line = guest.expect("kB")?;
    Ok(line.trim().parse::<u64>()? << 10)
}

/// Tells lines of /proc/meminfo by name until it is told `go`.
const TELL_MEMORY: &str = "echo up; while read x && test $x != go; do grep -w $x /proc/meminfo; done";

fn with_balloon(options: Value, line: &str) -> Result<RunningLive> {
    let mut device = json!({"kind": "balloon"});
    if let (Some(device), Value::Object(options)) = (device.as_object_mut(), options) {
        device.extend(options);
    }
    let mut guest = Live::new()?.memory("512M").device(device).start(line)?;
    guest.expect("up\r\n")?;
    Ok(guest)
}

#[test]
fn a_balloon_takes_memory_from_the_guest_and_gives_it_back() -> Result<()> {
    // All of it was touched once, and nothing reports it free.
    let fill = "dd if=/dev/zero of=/dev/null bs=400M count=1 2>/dev/null";
    let line = format!("{fill}; {TELL_MEMORY}; {fill} && echo filled; read x");
    let mut guest = with_balloon(json!({"reporting": false}), &line)?;
    let (full, free) = (resident(&guest)?, meminfo(&mut guest, "MemFree")?);
    ensure!(full > 400 * MIB, "{full} bytes are resident");

    guest.update("balloon0", &json!({"size": "256M"}))?;
    until_counter(&mut guest, "balloon0", "actual_bytes", |bytes| bytes == 256 * MIB)?;
    let (less, less_free) = (resident(&guest)?, meminfo(&mut guest, "MemFree")?);
    ensure!(less + 240 * MIB < full, "{full} bytes were resident, and {less} are");
    // Some of what it took was the guest's cache.
    ensure!(less_free + 128 * MIB < free, "{free} bytes were free in the guest, and {less_free} are");

    guest.update("balloon0", &json!({"size": 0}))?;
    until_counter(&mut guest, "balloon0", "actual_bytes", |bytes| bytes == 0)?;
    let again = meminfo(&mut guest, "MemFree")?;
    ensure!(again + 16 * MIB > free, "{free} bytes were free in the guest, and {again} are");
    let counters = guest.counters("balloon0")?;
    assert_eq!([counters["inflated_bytes"], counters["deflated_bytes"]], [256 * MIB; 2], "{counters:?}");
    assert_eq!(counters["guest_mistakes"], 0);
    guest.send("go")?;
    guest.expect("filled")?;
    ensure!(resident(&guest)? > less + 100 * MIB, "what came back is not used");
    guest.send("")?;
    guest.wait()?.ok()?;
    Ok(())
}

#[test]
fn statistics_are_what_the_guest_says_of_itself_when_it_is_asked() -> Result<()> {
    let line = format!("{TELL_MEMORY}; dd if=/dev/zero of=/tmp/x bs=1M count=64 2>/dev/null; {TELL_MEMORY}");
    let mut guest = with_balloon(json!({}), &line)?;
    let first = until(|| guest.counters("balloon0"), |told| told.contains_key("guest_free_bytes"))?;
    guest.send("go")?;
    guest.expect("up\r\n")?;
    let [total, free, available] =
        ["MemTotal", "MemFree", "MemAvailable"].map(|name| meminfo(&mut guest, name));
    let (total, free, available) = (total?, free?, available?);
    let near = |a: u64, b: u64| a.abs_diff(b) < 16 * MIB;
    let now = guest.counters("balloon0")?;
    ensure!(!near(now["guest_free_bytes"], free), "{free} of {now:?}");
    assert_eq!(now["guest_free_bytes"], first["guest_free_bytes"], "nobody asked");

    guest.update("balloon0", &json!({"stats": 1}))?;
    let told = until(|| guest.counters("balloon0"), |told| near(told["guest_free_bytes"], free))?;
    assert_eq!(told["guest_total_bytes"], total);
    ensure!(near(told["guest_available_bytes"], available), "{available} of {told:?}");
    ensure!(
        told["guest_disk_cache_bytes"] >= first["guest_disk_cache_bytes"] + 64 * MIB,
        "{first:?}, {told:?}"
    );
    guest.send("go")?;
    guest.wait()?.ok()?;
    Ok(())
}

/// Inflates the balloon until 112 MiB are left, then wants 250 MiB.
fn short_of_memory(deflate_on_oom: bool) -> Result<(RunningLive, String)> {
    let line = "echo up; read x; dd if=/dev/zero of=/dev/null bs=250M count=1 2>/dev/null && echo it lives || echo it died; \
                echo then; read x";
    let mut guest = with_balloon(json!({"deflate_on_oom": deflate_on_oom}), line)?;
    guest.update("balloon0", &json!({"size": "400M"}))?;
    until_counter(&mut guest, "balloon0", "actual_bytes", |bytes| bytes > 380 * MIB)?;
    guest.send("")?;
    let said = guest.expect("then\r\n")?;
    Ok((guest, said))
}

#[test]
fn a_guest_out_of_memory_takes_it_back_from_the_balloon() -> Result<()> {
    let (mut guest, said) = short_of_memory(true)?;
    ensure!(said.contains("it lives"), "{said}");
    ensure!(guest.counter("balloon0", "deflated_bytes")? > 100 * MIB);
    guest.send("")?;
    guest.wait()?.ok()?;
    Ok(())
}

#[test]
fn a_balloon_that_must_stay_lets_a_program_of_the_guest_die() -> Result<()> {
    let (mut guest, said) = short_of_memory(false)?;
    ensure!(said.contains("it died"), "{said}");
    assert_eq!(guest.counter("balloon0", "deflated_bytes")?, 0);
    guest.send("")?;
    guest.wait()?.ok()?;
    Ok(())
}

/// A guest with a second disk of 64 MiB at `a`.
fn with_disk(line: &str, transport: &str) -> Result<RunningLive> {
    let live = Live::new()?.transport(transport);
    live.on_host(
        "truncate -s 64M a b; printf first | dd of=a conv=notrunc; printf second | dd of=b conv=notrunc",
    )?;
    let device = json!({"kind": "disk", "path": live.path("a")});
    let mut guest = live.device(device).start(line)?;
    guest.expect("up\r\n")?;
    Ok(guest)
}

#[test]
fn a_disk_grows_under_the_guest_which_is_told() -> Result<()> {
    for transport in ["mmio", "pci"] {
        // Nothing asks the disk again: the guest's kernel is told by the configuration's interrupt.
        let line = "cd /sys/block/vdb; cat size; echo up; while test $(cat size) = 131072; do sleep 0.1; done; cat size; \
                    printf beyond | dd of=/dev/vdb bs=1M seek=100 conv=fsync 2>/dev/null && echo written";
        let mut guest = with_disk(line, transport)?;
        guest.update("disk1", &json!({"size": "128M"}))?;
        guest.expect("262144\r\n")?;
        guest.expect("written")?;
        let beyond = guest.on_host("dd if=a bs=1M skip=100 count=1 2>/dev/null | head -c 6")?;
        assert_eq!(beyond, "beyond");
        guest.wait()?.ok()?;
    }
    Ok(())
}

#[test]
fn another_file_takes_the_place_of_a_disk() -> Result<()> {
    let line = "echo up; while read x; do dd if=/dev/vdb iflag=direct bs=4k count=1 2>/dev/null | head -c 6; echo; \
                cat /sys/block/vdb/size; done";
    let mut guest = with_disk(line, "mmio")?;
    guest.send("")?;
    guest.expect("first")?;
    guest.expect("131072")?;
    guest.on_host("truncate -s 96M b")?;
    let other = json!({"path": guest.path("b")});
    guest.update("disk1", &other)?;
    guest.send("")?;
    guest.expect("second")?;
    until(
        || {
            guest.send("")?;
            guest.expect("second")?;
            guest.expect("\r\n")?;
            guest.expect("\r\n")
        },
        |size| size.trim() == "196608",
    )?;
    // What cannot be opened leaves the disk as it is.
    let nowhere = json!({"path": guest.path("nowhere")});
    let error = guest.update("disk1", &nowhere).expect_err("there is no such file").to_string();
    ensure!(error.contains("nowhere"), "{error}");
    guest.send("")?;
    guest.expect("second")?;
    Ok(())
}

/// Writes `x` into all of the first 32 MiB.
const FILL: &str = "dd if=/dev/zero bs=1M count=32 2>/dev/null | tr '\\0' x > /tmp/x; echo up; read x; \
                    dd if=/tmp/x of=/dev/vdb bs=64k oflag=direct 2>/dev/null && echo all written; read x";

#[test]
fn a_disk_is_replaced_in_the_middle_of_writes_and_each_is_in_one_of_the_files() -> Result<()> {
    let mut guest = with_disk(FILL, "mmio")?;
    guest.update("disk1", &json!({"bandwidth": "4M/1s"}))?;
    let before = guest.counter("disk1", "bytes_from_guest")?;
    guest.send("")?;
    until_counter(&mut guest, "disk1", "bytes_from_guest", |bytes| bytes >= before + MIB)?;
    let other = json!({"path": guest.path("b"), "bandwidth": null});
    let counters = guest.update("disk1", &other)?;
    let moved = counters["bytes_from_guest"] - before;
    ensure!(moved < 32 * MIB, "it was not in the middle: {moved} bytes");
    guest.expect("all written")?;
    // Each byte was written once: to the first file up to some place, and to the second from there.
    let count = |guest: &RunningLive, file: &str| -> Result<u64> {
        Ok(guest.on_host(&format!("tr -cd x < {file} | wc -c"))?.trim().parse()?)
    };
    let (first, second) = (count(&guest, "a")?, count(&guest, "b")?);
    assert_eq!(first + second, 32 * MIB, "{first} and {second} bytes");
    ensure!(first >= MIB && second > 0, "{first} and {second} bytes");
    let all_first = guest.on_host(&format!("head -c {first} a | tr -cd x | wc -c"))?.trim().parse::<u64>()?;
    assert_eq!(all_first, first, "what is in the first file is its beginning");
    guest.send("")?;
    guest.wait()?.ok()?;
    Ok(())
}

#[test]
fn limits_of_a_disk_come_and_go_while_it_is_written() -> Result<()> {
    let mut guest = with_disk(FILL, "mmio")?;
    assert_eq!(guest.counter("disk1", "throttled")?, 0, "there was no limit");
    guest.update("disk1", &json!({"ops": "20/1s", "bandwidth": "8M/1s"}))?;
    guest.send("")?;
    let some = until_counter(&mut guest, "disk1", "throttled", |count| count > 0)?;
    until_counter(&mut guest, "disk1", "throttled", |count| count > some)?;
    let counters = guest.update("disk1", &json!({"ops": null, "bandwidth": null}))?;
    ensure!(counters["bytes_from_guest"] < 32 * MIB, "it was not in the middle: {counters:?}");
    guest.expect("all written")?;
    let after = guest.counters("disk1")?;
    assert_eq!(after["throttled"], counters["throttled"], "nothing waits without a limit");
    ensure!(after["bytes_from_guest"] >= 32 * MIB, "{after:?}");
    assert_eq!([after["host_errors"], after["guest_mistakes"]], [0; 2]);
    guest.send("")?;
    guest.wait()?.ok()?;
    Ok(())
}

#[test]
fn limits_of_a_network_come_and_go_while_it_carries_bytes() -> Result<()> {
    let net = NetNs::new(&Place::choose(Needs::AnyKvm)?)?;
    let listener = net.start("busybox nc -l -p 5001 | sha256sum")?;
    let line = "dd if=/dev/urandom of=/tmp/x bs=1M count=16 2>/dev/null; sha256sum < /tmp/x; echo up; read x; \
                nc -w 20 10.77.0.1 5001 < /tmp/x; echo sent; read x";
    let mut guest = Live::within(&net)?.start(line)?;
    let before = guest.expect("up\r\n")?;
    let sum = before.lines().find(|line| line.trim().ends_with(" -")).unwrap_or_default().trim().to_owned();
    guest.update("net0", &json!({"tx_bandwidth": "2M/1s", "rx_ops": "100/1s"}))?;
    guest.send("")?;
    let some = until_counter(&mut guest, "net0", "throttled", |count| count > 0)?;
    until_counter(&mut guest, "net0", "throttled", |count| count > some + 1)?;
    let counters = guest.update("net0", &json!({"tx_bandwidth": null, "rx_ops": null}))?;
    ensure!(counters["bytes_from_guest"] < 16 * MIB, "it was not in the middle: {counters:?}");
    guest.expect("sent")?;
    assert_eq!(listener.wait(DEADLINE)?.ok()?.trim(), sum);
    let after = guest.counters("net0")?;
    assert_eq!(after["throttled"], counters["throttled"], "nothing waits without a limit");
    ensure!(after["bytes_from_guest"] >= 16 * MIB, "{after:?}");
    guest.send("")?;
    guest.wait()?.ok()?;
    Ok(())
}

#[test]
fn limits_of_random_numbers_come_and_go() -> Result<()> {
    let line = "echo up; read x; dd if=/dev/hwrng bs=4k count=64 2>/dev/null | wc -c; echo done; read x";
    let mut guest = Live::new()?.device(json!({"kind": "rng"})).start(line)?;
    guest.expect("up\r\n")?;
    guest.update("rng0", &json!({"bandwidth": "4K/1s"}))?;
    let before = guest.counters("rng0")?;
    guest.send("")?;
    until_counter(&mut guest, "rng0", "throttled", |count| count > before["throttled"])?;
    let counters = guest.update("rng0", &json!({"bandwidth": null}))?;
    guest.expect("262144\r\n")?;
    let after = guest.counters("rng0")?;
    assert_eq!(after["throttled"], counters["throttled"], "nothing waits without a limit");
    ensure!(after["bytes_to_guest"] >= before["bytes_to_guest"] + (256 << 10), "{after:?}");
    guest.send("")?;
    guest.wait()?.ok()?;
    Ok(())
}
