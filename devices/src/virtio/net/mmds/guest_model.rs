//! A guest with a TCP of its own, for tests.

use std::collections::VecDeque;
use std::net::Ipv4Addr;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{HardwareAddress, IpCidr};

/// IPv4 packets to and from the guest.
#[derive(Default)]
pub struct Packets {
    pub incoming: VecDeque<Vec<u8>>,
    pub outgoing: VecDeque<Vec<u8>>,
}

pub struct Rx(Vec<u8>);

pub struct Tx<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.0.push_back(vec![0; len]);
        f(self.0.back_mut().expect("just pushed"))
    }
}

impl Device for Packets {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
        Some((Rx(self.incoming.pop_front()?), Tx(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        Some(Tx(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 1500;
        capabilities
    }
}

/// The guest. Its time passes whenever it is polled.
pub struct Guest {
    pub packets: Packets,
    interface: Interface,
    sockets: SocketSet<'static>,
    now: Instant,
    port: u16,
}

impl Guest {
    pub fn new(seed: u64) -> Self {
        let mut packets = Packets::default();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut packets, Instant::ZERO);
        let own = IpCidr::new(Ipv4Addr::new(172, 16, 0, 2).into(), 0);
        interface.update_ip_addrs(|addresses| addresses.push(own).expect("room"));
        Self { packets, interface, sockets: SocketSet::new(Vec::new()), now: Instant::ZERO, port: 20_000 }
    }

    /// Begins a connection to the web server at `address`.
    pub fn connect(&mut self, address: Ipv4Addr) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 32 << 10]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        self.port += 1;
        socket.connect(self.interface.context(), (address, 80), self.port).expect("a good address");
        self.sockets.add(socket)
    }

    pub fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn poll(&mut self) {
        self.now += Duration::from_millis(50);
        self.interface.poll(self.now, &mut self.packets, &mut self.sockets);
    }

    /// What has come on a connection.
    pub fn read(&mut self, handle: SocketHandle) -> String {
        let socket = self.socket(handle);
        let mut bytes = vec![0; socket.recv_queue()];
        let len = socket.recv_slice(&mut bytes).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    }
}
