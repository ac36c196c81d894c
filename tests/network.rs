//! Network interfaces: on taps and through passt, in network namespaces that the tests make. Nothing reaches outside.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::{Guest, Needs, NetNs, Place, Signal};

fn namespace() -> Result<NetNs> {
    NetNs::new(&Place::choose(Needs::AnyKvm)?)
}

#[test]
fn ping_works_both_ways_on_mmio() -> Result<()> {
    ping_works_both_ways("mmio")
}

#[test]
fn ping_works_both_ways_on_pci() -> Result<()> {
    ping_works_both_ways("pci")
}

fn ping_works_both_ways(transport: &str) -> Result<()> {
    let net = namespace()?;
    let mut guest = Guest::new()
        .transport(transport)
        .net(&net)
        .shell("ping -c 3 -W 5 10.77.0.1 && echo pinged; read x")
        .start()?;
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
    let output = listener.wait(Duration::from_secs(60))?;
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

/// A host with addresses and routes of both protocols, and with the address of its name server.
fn internet() -> Result<NetNs> {
    let net = namespace()?;
    net.shell(
        "ip link add world type bridge && ip addr add 192.0.2.1/24 dev world && \
         ip -6 addr add 2001:db8::1/64 dev world nodad && ip link set world up && \
         ip route add default via 192.0.2.254 && ip -6 route add default via 2001:db8::fe && \
         for a in $(sed -n 's/^nameserver //p' /etc/resolv.conf); do ip addr add $a dev lo || true; done; \
         echo 0 2147483647 > /proc/sys/net/ipv4/ping_group_range || echo 0 0 > /proc/sys/net/ipv4/ping_group_range",
    )?;
    Ok(net)
}

/// Answers every question for an address with 192.0.2.77.
const NAME_SERVER: &str = r#"perl -MIO::Socket::INET -e '
    $s = IO::Socket::INET->new(LocalPort => 53, Proto => "udp") or die; print "ready\n"; $| = 1;
    while (defined $s->recv($d, 512)) {
        $s->send(substr($d, 0, 2) . "\x81\x80\0\1\0\1\0\0\0\0" . substr($d, 12)
            . "\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\x4d") }'"#;

#[test]
fn an_ordinary_account_has_tcp_udp_and_icmp_over_both_protocols() -> Result<()> {
    let net = internet()?;
    let _four = net.start("echo hello four | busybox nc -l -p 7000")?;
    let _six = net.start("echo hello six | busybox nc -l -p 7001")?;
    let _names = net.start(NAME_SERVER)?;
    // Addresses of IPv6 come by router advertisement, after a while.
    let run = Guest::new()
        .within(&net)
        .unprivileged()
        .arg("--net")
        .arg("user")
        .shell(
            "ip -4 -o addr show eth0; cat /sys/class/net/eth0/mtu; ping -c 1 -W 9 192.0.2.1 && echo ping4; \
             nc -w 9 192.0.2.1 7000; nslookup foo.example; \
             for i in 1 2 3 4 5 6 7 8 9; do ping -6 -c 1 -W 1 2001:db8::1 && break; sleep 1; done && echo ping6; \
             nc -w 9 2001:db8::1 7001; udhcpc -q -n -i eth0 -s /bin/true 2>&1",
        )
        .run()?;
    run.ok()?;
    for want in [
        "10.0.2.15/24",
        "65520",
        "ping4",
        "hello four",
        "192.0.2.77",
        "ping6",
        "hello six",
        "lease of 10.0.2.15 obtained",
    ] {
        ensure!(run.console.contains(want), "no '{want}' in:\n{}\n{}", run.console, run.stderr);
    }
    Ok(())
}

#[test]
fn the_hosts_own_loopback_stays_its_own() -> Result<()> {
    let net = internet()?;
    let _secret = net.start("echo secret | busybox nc -l -p 7002")?;
    let run = Guest::new()
        .within(&net)
        .arg("--net")
        .arg("user")
        .shell("for a in 10.0.2.2 10.0.2.3 127.0.0.1; do nc -w 2 $a 7002; done; echo asked")
        .run()?;
    run.ok()?.expect_line("asked")?;
    ensure!(!run.console.contains("secret"), "{}", run.console);
    assert_eq!(net.shell("busybox nc -w 5 127.0.0.1 7002 < /dev/null")?.trim(), "secret", "it was there");
    Ok(())
}

#[test]
fn published_ports_reach_the_guest() -> Result<()> {
    let net = internet()?;
    let mut guest = Guest::new()
        .within(&net)
        .unprivileged()
        .arg("--net")
        .arg("user,publish=8080:80,publish=127.0.0.1:5353:53/udp")
        .shell(
            "grep Udp: /proc/net/snmp; echo up; for i in 1 2; do echo served | nc -l -p 80; done; \
             for i in 1 2 3 4 5 6 7 8 9; do sleep 1; grep -q '^Udp: [0-9]* [1-9]' /proc/net/snmp && break; done && \
             echo datagram",
        )
        .start()?;
    guest.expect("up")?;
    for address in ["127.0.0.1", "192.0.2.1"] {
        let ask = format!(
            "for i in 1 2 3 4 5 6 7 8 9; do busybox nc -w 5 {address} 8080 < /dev/null | grep . && break; sleep 1; done"
        );
        assert_eq!(net.shell(&ask)?.trim(), "served", "{address}");
    }
    // No program of the guest listens there, which its kernel counts.
    net.shell("exec 3>/dev/null; for i in 1 2 3; do perl -MIO::Socket::INET -e 'IO::Socket::INET->new(PeerAddr => \"127.0.0.1:5353\", Proto => \"udp\")->send(\"x\")'; done")?;
    guest.wait()?.ok()?.expect_line("datagram")?;
    Ok(())
}

#[test]
fn passt_ends_with_the_machine_however_that_ends() -> Result<()> {
    for (port, signal) in [(18181, Signal::TERM), (18182, Signal::KILL)] {
        let net = internet()?;
        let publish = format!("user,publish={port}:80");
        let mut guest =
            Guest::new().within(&net).arg("--net").arg(&publish).shell("echo up; sleep 1000").start()?;
        guest.expect("up")?;
        let listens = format!("ss -Hltn 'sport = :{port}' | wc -l");
        assert_eq!(net.shell(&listens)?.trim(), "1");
        guest.signal(signal)?;
        guest.wait()?;
        let gone =
            format!("for i in $(seq 100); do [ $({listens}) = 0 ] && break; sleep 0.1; done; {listens}");
        assert_eq!(net.shell(&gone)?.trim(), "0");
    }
    Ok(())
}

#[test]
fn a_new_tap_has_addresses_and_is_gone_in_the_end() -> Result<()> {
    for signal in [None, Some(Signal::KILL)] {
        let net = namespace()?;
        let mut guest = Guest::new()
            .within(&net)
            .arg("--net")
            .arg("tap,mtu=9000")
            .shell(
                "host=$(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'); ping -c 1 -W 9 $host && echo pinged; \
                 cat /sys/class/net/eth0/mtu; read x",
            )
            .start()?;
        guest.expect("pinged")?;
        guest.expect("9000")?;
        assert_eq!(net.shell("ip -o -4 addr show | grep -c 'vmm0.*10.177'")?.trim(), "1");
        match signal {
            None => guest.send("\n")?,
            Some(signal) => guest.signal(signal)?,
        }
        guest.wait()?;
        let links = net.shell("ip -o link")?;
        ensure!(!links.contains("vmm"), "{links}");
    }
    Ok(())
}

/// Runs the rest with a tap, and metadata from a file with this content.
const WITH_METADATA: &str = r#"file=$(mktemp) && printf %s "$1" > $file && shift && "$@" --net tap=tap0,metadata=$file; status=$?; rm $file; exit $status"#;

#[test]
fn a_guest_asks_for_metadata_at_an_address_that_is_nowhere_else() -> Result<()> {
    let net = namespace()?;
    let long = "0123456789".repeat(10_000);
    let data = format!(r#"{{"latest": {{"meta-data": {{"name": "web", "long": "{long}"}}}}}}"#);
    let run = Guest::new()
        .within(&net)
        .through(&["sh", "-c", WITH_METADATA, "sh", &data])
        .append("ip=10.77.0.2::10.77.0.1:255.255.255.0::eth0:off")
        .shell(
            "u=http://169.254.169.254/latest; get() { wget -qO- $@; echo; }; \
             get $u/meta-data/name; ip route add 169.254.169.254 dev eth0; get $u/meta-data/; \
             get --header Accept:application/json $u/meta-data/name; get $u/meta-data/long | wc -c; \
             get $u/nothing 2>&1; ping -c 1 -W 9 10.77.0.1 && echo pinged",
        )
        .run()?;
    let run = run.ok()?;
    for line in ["web", "long", "name", "\"web\"", "100001", "pinged"] {
        run.expect_line(line)?;
    }
    ensure!(run.console.contains("404 Not Found"), "{}", run.console);
    Ok(())
}

/// Opens tap0 as descriptor 9, and runs the rest.
const WITH_TAP: &str = r#"open F, "+<", "/dev/net/tun" or die; $r = pack "Z16 s x22", "tap0", 0x5002; ioctl F, 0x400454ca, $r or die;
    use POSIX; POSIX::dup2(fileno F, 9) or die; exec @ARGV or die"#;

#[test]
fn an_inherited_tap_works() -> Result<()> {
    let net = namespace()?;
    let run = Guest::new()
        .within(&net)
        .through(&["perl", "-e", WITH_TAP, "--"])
        .arg("--net")
        .arg("fd=9")
        .append("ip=10.77.0.2::10.77.0.1:255.255.255.0::eth0:off")
        .shell("ping -c 3 -W 9 10.77.0.1 && echo pinged")
        .run()?;
    run.ok()?.expect_line("pinged")?;
    Ok(())
}

#[test]
fn a_foreign_mac_address_gets_through_only_without_the_check() -> Result<()> {
    for (options, want) in [("", "reached"), (",mac_check", "dropped")] {
        let net = namespace()?;
        let run = Guest::new()
            .within(&net)
            .arg("--net")
            .arg(&format!("tap=tap0{options}"))
            .append("ip=10.77.0.2::10.77.0.1:255.255.255.0::eth0:off")
            .shell(
                "ping -c 1 -W 9 10.77.0.1 && echo own; ip link set eth0 down; \
                 ip link set eth0 address 02:00:00:00:00:99; ip link set eth0 up; \
                 ping -c 2 -W 3 10.77.0.1 && echo reached || echo dropped",
            )
            .run()?;
        run.ok()?.expect_line("own")?.expect_line(want)?;
    }
    Ok(())
}

mod hardware {
    use super::*;

    #[test]
    fn two_queue_pairs_of_a_tap_carry_bytes_unchanged() -> Result<()> {
        let net = NetNs::new(&Place::choose(Needs::Hardware)?)?;
        net.shell(
            "ip tuntap add dev tap1 mode tap multi_queue && ip addr add 10.78.0.1/24 dev tap1 && ip link set tap1 up",
        )?;
        let listener = net.start("busybox nc -l -p 5001 | sha256sum")?;
        let run = Guest::new()
            .cpus(2)
            .within(&net)
            .arg("--net")
            .arg("tap=tap1,queues=2")
            .append("ip=10.78.0.2::10.78.0.1:255.255.255.0::eth0:off")
            .shell(
                "ls -d /sys/class/net/eth0/queues/tx-1; dd if=/dev/urandom of=/tmp/x bs=1M count=4 2>/dev/null; \
                 sha256sum < /tmp/x; \
                 for i in 1 2 3 4 5 6 7 8 9; do nc -w 9 10.78.0.1 5001 < /tmp/x && break; sleep 1; done",
            )
            .run()?;
        let sum = listener.wait(Duration::from_secs(600))?.ok()?;
        run.ok()?.expect_line(sum.trim())?.expect_line("/sys/class/net/eth0/queues/tx-1")?;
        Ok(())
    }
}
