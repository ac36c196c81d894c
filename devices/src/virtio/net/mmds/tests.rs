//! The service within the network device: what reaches it, and what does not.

use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use serde_json::json;
use smoltcp::iface::SocketHandle;

use super::super::config::Config as NetConfig;
use super::super::{Link, MAX_FRAME, Net, Setup, tap};
use super::guest_model::Guest;
use super::*;
use crate::params;
use crate::virtio::test_driver::Driver;

const RX: u16 = 0;
const TX: u16 = 1;
/// The Ethernet addresses of the guest and of its gateway.
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// A driver, the host's end of its interface, and the guest's TCP.
struct Machine {
    driver: Driver,
    host: OwnedFd,
    guest: Guest,
    /// Where the buffer is that the driver has made available.
    posted: Option<u64>,
}

fn metadata(text: &str) -> Metadata {
    Metadata {
        data: serde_json::from_value(json!({ "name": text })).expect("an object"),
        ..Metadata::default()
    }
}

impl Machine {
    fn new() -> Self {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (device, host) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("pair");
        let setup = Setup { mac: MacAddr::from_name("test"), mtu: None, mac_check: false, boot: None };
        let net = Net::new(vec![Link::Tap(tap::Tap::from_socket(device))], setup, None);
        let mut driver = Driver::new(Box::new(net.with_metadata(Some(&metadata("web"))).expect("a timer")));
        driver.start(0);
        Self { driver, host, guest: Guest::new(1), posted: None }
    }

    fn send(&mut self, ethertype: [u8; 2], packet: &[u8]) {
        let frame = [&[0; HEADER_BYTES][..], &GATEWAY, &GUEST, &ethertype, packet].concat();
        assert_eq!(self.driver.request(TX, &[&frame], &[]).used, Some(0));
    }

    /// The frames for the guest.
    fn frames(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        loop {
            let at = *self.posted.get_or_insert_with(|| {
                let at = self.driver.post(RX, &[], &[2048]).1[0];
                self.driver.kick(RX);
                at
            });
            let [(_, len)] = self.driver.used(RX)[..] else { return frames };
            self.posted = None;
            frames.push(self.driver.read(at, len as usize).split_off(HEADER_BYTES));
        }
    }

    fn at_host(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; MAX_FRAME];
        let (len, _) = rustix::net::recv(&self.host, &mut bytes, RecvFlags::empty()).ok()?;
        bytes.truncate(len);
        Some(bytes)
    }

    fn exchange(&mut self) {
        loop {
            self.guest.poll();
            let sent: Vec<_> = self.guest.packets.outgoing.drain(..).collect();
            sent.iter().for_each(|packet| self.send([8, 0], packet));
            let frames = self.frames();
            if sent.is_empty() && frames.is_empty() {
                return;
            }
            for frame in frames {
                assert_eq!(frame[..6], GUEST);
                assert_eq!(frame[12..14], [8, 0]);
                self.guest.packets.incoming.push_back(frame[14..].to_vec());
            }
        }
    }

    fn connect(&mut self) -> SocketHandle {
        let connection = self.guest.connect(ADDRESS);
        self.exchange();
        connection
    }

    fn ask(&mut self, connection: SocketHandle) -> String {
        let request = b"GET /name HTTP/1.1\r\n\r\n";
        self.guest.socket(connection).send_slice(request).expect("an open connection");
        self.exchange();
        self.guest.read(connection).lines().last().unwrap_or_default().to_owned()
    }
}

#[test]
fn a_guest_asks_by_way_of_its_gateway_and_the_host_sees_nothing() {
    let mut machine = Machine::new();
    let connection = machine.connect();
    assert_eq!(machine.ask(connection), "web");
    assert_eq!(machine.at_host(), None);
    // Packets of other protocols to that address end here as well.
    machine.send(
        [8, 0],
        &[&[0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 2, 169, 254, 169, 254][..], &[0; 8]].concat(),
    );
    assert_eq!(machine.at_host(), None);
}

#[test]
fn what_is_for_others_goes_out_as_it_is() {
    let mut machine = Machine::new();
    let ip = [0x45, 0, 0, 20, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 2, 169, 254, 169, 253];
    let arp = [0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 10, 0, 0, 1];
    for (ethertype, packet) in
        [([8, 0], &ip[..]), ([8, 0], &ip[..19]), ([8, 6], &arp), ([0x86, 0xdd], &[0; 40]), ([8, 0], &[])]
    {
        machine.send(ethertype, packet);
        let out = machine.at_host().expect("a frame");
        assert_eq!(out[HEADER_BYTES + 14..], *packet);
    }
    // And the host's frames come in, also between the service's.
    let frame = [&[0; HEADER_BYTES][..], &GUEST, &GATEWAY, &[8, 0], &[7; 60]].concat();
    rustix::net::send(&machine.host, &frame, SendFlags::empty()).expect("room");
    machine.guest.connect(ADDRESS);
    machine.guest.poll();
    let syn = machine.guest.packets.outgoing.pop_front().expect("a first packet");
    machine.send([8, 0], &syn);
    let frames = machine.frames();
    assert_eq!(frames.len(), 2);
    assert!(frames.contains(&frame[HEADER_BYTES..].to_vec()));
}

#[test]
fn who_asks_for_the_services_ethernet_address_is_told() {
    let mut machine = Machine::new();
    let mut arp =
        [0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 169, 254, 169, 254];
    machine.send([8, 6], &arp);
    let [answer] = &machine.frames()[..] else { panic!("one answer") };
    let own = answer[6..12].to_vec();
    assert_eq!((&answer[..6], &answer[12..14], &answer[20..22]), (&GUEST[..], &[8, 6][..], &[0, 2][..]));
    assert_eq!(answer[22..], [&own[..], &[169, 254, 169, 254], &GUEST, &[10, 0, 0, 2]].concat());
    // No question.
    arp[7] = 2;
    machine.send([8, 6], &arp);
    assert_eq!(machine.frames(), Vec::<Vec<u8>>::new());
}

#[test]
fn metadata_changes_while_connections_stay() {
    let mut machine = Machine::new();
    let connection = machine.connect();
    let config = |metadata| NetConfig { metadata, ..NetConfig::on_tap("x") };
    machine.driver.update(&config(Some(metadata("db")))).expect("an update");
    assert_eq!(machine.ask(connection), "db");
    machine.driver.update(&config(None)).expect("an update");
    machine.guest.connect(ADDRESS);
    machine.exchange();
    assert!(machine.at_host().is_some(), "it is an address like any other");
    machine.driver.update(&config(Some(metadata("new")))).expect("an update");
    while machine.at_host().is_some() {}
    let connection = machine.connect();
    assert_eq!(machine.ask(connection), "new");
    machine.driver.start(0);
    machine.posted = None;
    let connection = machine.connect();
    assert_eq!(machine.ask(connection), "new", "after a reset");
}

#[test]
fn metadata_is_an_object_or_a_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("web.json");
    std::fs::write(&path, r#"{"name": "web"}"#).expect("a file");
    let flag = format!("tap=tap0,metadata={}", path.display());
    let config: NetConfig = params::from_str(&flag, None).expect("a good flag");
    assert_eq!(config.metadata, Some(metadata("web")));
    let written = serde_json::to_value(&config).expect("a configuration");
    assert_eq!(written, json!({"tap": "tap0", "metadata": {"data": {"name": "web"}}}));
    assert_eq!(serde_json::from_value::<NetConfig>(written).expect("the same"), config);

    let whole = json!({"data": {}, "version": "V2", "address": "169.254.170.2", "imds_compat": true});
    let read: Metadata = serde_json::from_value(whole.clone()).expect("all keys");
    assert_eq!(serde_json::to_value(&read).expect("all keys"), whole);
    std::fs::write(&path, "[1]").expect("a file");
    for (value, want) in [
        (json!({"address": "10.0.0.1"}), "'10.0.0.1' is no address for metadata"),
        (json!({"address": "169.254.0.1"}), "use one of 169.254.1.0 to 169.254.254.255"),
        (json!({"data": []}), "invalid type"),
        (json!({"nonsense": 1}), "unknown field `nonsense`"),
        (json!(true), "the path of a file with metadata, or an object"),
        (json!("/nowhere"), "cannot read metadata '/nowhere'"),
        (json!("/dev/zero"), "is no file"),
        (json!(path), "is no JSON object"),
    ] {
        let error = serde_json::from_value::<Metadata>(value).expect_err(want).to_string();
        assert!(error.contains(want), "{error}");
    }
}
