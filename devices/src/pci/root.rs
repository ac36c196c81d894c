//! Bus 0 and the two ways to it: configuration mechanism #1 on ports (PCI Local Bus 3.0, 3.2.2.3.2), and enhanced
//! configuration access in memory (ECAM, PCI Express 5.0, 7.2.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use super::Function;
use super::config::{self, Config, Id};
use crate::model::BusDevice;
use crate::snapshot::{Saved, Snapshot, SnapshotError, State};

/// Most functions besides the host bridge: a bus has 32 devices.
pub const MAX_FUNCTIONS: usize = 31;

/// First port of mechanism #1: the address register, with the data register behind it.
pub const PORT: u16 = 0xcf8;
/// Number of ports.
pub const PORTS: u16 = 8;
/// Bytes of address space of ECAM for one bus.
pub const ECAM_SIZE: u64 = 1 << 20;

/// Vendor 1b36 (Red Hat, Inc.) and device 0008, a generic host bridge.
const HOST_BRIDGE: Id = Id { vendor: 0x1b36, device: 0x0008, class: 0x06_0000, revision: 0 };

/// What is on bus 0: a host bridge as device 0, then the functions that it was made with.
///
/// Without functions it is still of use: Linux's ACPI needs a kernel with PCI, and such a kernel complains, after
/// some 250 accesses, when there is no PCI at all. One bridge makes it content after a dozen.
pub struct Root {
    bridge: Config,
    functions: Vec<Arc<dyn Function>>,
}

impl Root {
    /// A bus with these functions, at most [`MAX_FUNCTIONS`], as devices 1 and so on.
    pub fn new(functions: Vec<Arc<dyn Function>>) -> Arc<Self> {
        Arc::new(Self { bridge: Config::new(HOST_BRIDGE, None), functions })
    }

    /// Reads from the function with this number (device and function, 8 bits). What is not there reads as ones.
    fn read(&self, function: usize, register: usize, data: &mut [u8]) {
        data.fill(0xff);
        if !aligned(register, data.len()) {
            return;
        }
        match (function, self.function(function)) {
            // Behind the 256 bytes there are no extended capabilities.
            (0, _) | (_, Some(_)) if register >= config::SIZE => data.fill(0),
            (0, _) => self.bridge.read(register, data),
            (_, Some(function)) => function.read_config(register, data),
            (_, None) => {}
        }
    }

    /// Writes to the function with this number. Nothing of the bridge can be written.
    fn write(&self, function: usize, register: usize, data: &[u8]) {
        if let (Some(function), true) = (self.function(function), aligned(register, data.len()))
            && register < config::SIZE
        {
            function.write_config(register, data);
        }
    }

    fn function(&self, number: usize) -> Option<&dyn Function> {
        let index = (number / 8).checked_sub(1).filter(|_| number.is_multiple_of(8))?;
        self.functions.get(index).map(|function| &**function)
    }
}

/// Accesses are aligned to their width, which a processor's instruction gives them.
fn aligned(register: usize, width: usize) -> bool {
    matches!(width, 1 | 2 | 4) && register.is_multiple_of(width)
}

/// Mechanism #1: an address port and a window to what it points to.
pub struct Ports {
    root: Arc<Root>,
    address: AtomicU32,
}

const ADDRESS: u64 = 0;
const DATA: u64 = 4;
const END: u64 = PORTS as u64;
/// The address register's bit that makes the data register a window on configuration space.
const ENABLE: u32 = 1 << 31;
/// The bits of an address that are kept: enable, bus, device, function and register.
const ADDRESS_BITS: u32 = ENABLE | 0x00ff_fffc;

impl Ports {
    /// The ports as after a reset.
    pub fn new(root: Arc<Root>) -> Self {
        Self { root, address: AtomicU32::new(0) }
    }

    /// Function and register that the byte at `offset` of the window is; only bus 0 is there.
    fn target(&self, offset: u64) -> Option<(usize, usize)> {
        let address = self.address.load(Ordering::Relaxed);
        let bus = address >> 16 & 0xff;
        let register = (address & 0xff) as usize + (offset - DATA) as usize;
        (address & ENABLE != 0 && bus == 0).then_some(((address >> 8 & 0xff) as usize, register))
    }
}

/// An access of `width` bytes at `offset` stays within the window.
fn in_window(offset: u64, width: usize) -> bool {
    (DATA..END).contains(&offset) && offset + width as u64 <= END
}

/// The state of the ports for a snapshot.
#[derive(Serialize, Deserialize)]
struct PortsState {
    address: u32,
}

impl State for PortsState {
    const VERSION: u16 = 1;
}

impl Snapshot for Ports {
    fn save(&self) -> Result<Saved, SnapshotError> {
        Saved::of(&PortsState { address: self.address.load(Ordering::Relaxed) })
    }

    fn restore(&self, saved: &Saved) -> Result<(), SnapshotError> {
        let PortsState { address } = saved.get()?;
        self.address.store(address & ADDRESS_BITS, Ordering::Relaxed);
        Ok(())
    }
}

impl BusDevice for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset == ADDRESS && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
        } else if in_window(offset, data.len())
            && let Some((function, register)) = self.target(offset)
        {
            self.root.read(function, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (ADDRESS, Ok(bytes)) = (offset, data.try_into()) {
            self.address.store(u32::from_le_bytes(bytes) & ADDRESS_BITS, Ordering::Relaxed);
        } else if in_window(offset, data.len())
            && let Some((function, register)) = self.target(offset)
        {
            self.root.write(function, register, data);
        }
    }
}

/// ECAM: every function's configuration space at an address of its own.
pub struct Ecam(Arc<Root>);

impl Ecam {
    /// The configuration spaces of `root`.
    pub fn new(root: Arc<Root>) -> Self {
        Self(root)
    }
}

/// Function and register at `offset` of a bus's region.
fn ecam_target(offset: u64) -> Option<(usize, usize)> {
    (offset < ECAM_SIZE).then_some(((offset >> 12) as usize, (offset & 0xfff) as usize))
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match ecam_target(offset) {
            Some((function, register)) => self.0.read(function, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = ecam_target(offset) {
            self.0.write(function, register, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    /// A function of nothing but a configuration space.
    struct Plain(Mutex<Config>);

    impl Function for Plain {
        fn read_config(&self, register: usize, data: &mut [u8]) {
            self.0.lock().unwrap().read(register, data);
        }

        fn write_config(&self, register: usize, data: &[u8]) {
            self.0.lock().unwrap().write(register, data);
        }
    }

    fn root() -> Arc<Root> {
        let id = Id { vendor: 0x1af4, device: 0x1042, class: 0x01_8000, revision: 1 };
        let bar = config::Bar { addr: 0xd800_0000, size: 0x8000 };
        Root::new(vec![Arc::new(Plain(Mutex::new(Config::new(id, Some(bar)))))])
    }

    fn read(device: &dyn BusDevice, offset: u64, width: usize) -> u32 {
        let mut data = vec![0; width];
        device.read(offset, &mut data);
        data.resize(4, 0);
        u32::from_le_bytes(data.try_into().unwrap())
    }

    fn by_ports(ports: &Ports, address: u32, offset: u64, width: usize) -> u32 {
        ports.write(ADDRESS, &address.to_le_bytes());
        read(ports, DATA + offset, width)
    }

    #[test]
    fn the_bridge_is_found_both_ways_and_nothing_that_is_not_there() {
        let root = Root::new(Vec::new());
        let (ports, ecam) = (Ports::new(root.clone()), Ecam::new(root));
        assert_eq!(by_ports(&ports, ENABLE, 0, 4), 0x0008_1b36);
        assert_eq!(by_ports(&ports, ENABLE, 2, 2), 0x0008);
        assert_eq!(by_ports(&ports, ENABLE | 8, 2, 2), 0x0600, "a host bridge by its class");
        assert_eq!(by_ports(&ports, ENABLE | 0xfc, 0, 4), 0);
        assert_eq!(read(&ecam, 0, 4), 0x0008_1b36);
        assert_eq!(read(&ecam, 0x100, 4), 0, "no extended capability");
        for absent in [0, ENABLE | 1 << 8, ENABLE | 1 << 11, ENABLE | 1 << 16] {
            assert_eq!(by_ports(&ports, absent, 0, 4), u32::MAX, "{absent:#x}");
        }
        for absent in [0x1000, 0x8000, 0xf_f000, 0x8100, ECAM_SIZE, u64::MAX - 3] {
            assert_eq!(read(&ecam, absent, 4), u32::MAX, "{absent:#x}");
        }
    }

    #[test]
    fn both_ways_reach_the_same_function() {
        let root = root();
        let (ports, ecam) = (Ports::new(root.clone()), Ecam::new(root));
        assert_eq!(read(&ecam, 0x8000, 4), 0x1042_1af4);
        assert_eq!(by_ports(&ports, ENABLE | 1 << 11, 0, 4), 0x1042_1af4);
        ecam.write(0x8004, &[0xff, 0xff]);
        assert_eq!(by_ports(&ports, ENABLE | 1 << 11 | 4, 0, 2), 0x0406);
        ports.write(DATA, &[0, 0]);
        assert_eq!(read(&ecam, 0x8004, 4), 0);
        assert_eq!(by_ports(&ports, ENABLE | 1 << 11 | 1 << 8, 0, 4), u32::MAX, "function 1 of it");
        assert_eq!(read(&ecam, 0x9000, 4), u32::MAX);
    }

    #[test]
    fn the_address_register_keeps_what_it_has_and_odd_accesses_do_nothing() {
        let ports = Ports::new(root());
        ports.write(ADDRESS, &u32::MAX.to_le_bytes());
        assert_eq!(read(&ports, ADDRESS, 4), ADDRESS_BITS);
        for (offset, width) in
            [(0, 1), (1, 4), (2, 2), (3, 1), (5, 4), (7, 8), (0, 0), (8, 1), (1 << 60, 4), (u64::MAX, 8)]
        {
            ports.write(offset, &vec![0; width]);
            ports.read(offset, &mut vec![0; width]);
        }
        assert_eq!(read(&ports, ADDRESS, 4), ADDRESS_BITS);
    }

    proptest! {
        #[test]
        fn identity_stays_whatever_is_written(
            accesses in prop::collection::vec(
                (prop_oneof![4 => 0x8000..0x8120u64, 1 => any::<u64>()], any::<[u8; 8]>(), 0..9usize), 0..100),
        ) {
            let ecam = Ecam::new(root());
            let identity = |ecam: &Ecam| [0u64, 8, 0x2c, 0x34].map(|at| read(ecam, 0x8000 + at, 4));
            let before = identity(&ecam);
            for (offset, bytes, width) in accesses {
                ecam.write(offset, &bytes[..width]);
                ecam.read(offset, &mut vec![0; width]);
            }
            prop_assert_eq!(identity(&ecam), before);
            let bar = read(&ecam, 0x8010, 4);
            prop_assert!(bar == 0xd800_0000 || bar == 0xffff_8000);
        }
    }
}
