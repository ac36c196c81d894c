//! All connections of a device: found by slot and by ports, served in turn, called at their deadlines, and
//! promised together no more memory than there is for them.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::time::Instant;

use super::connection::{Connection, Phase};
use super::packet::Ports;

/// Most connections at a time, in all phases.
pub const MAX_CONNECTIONS: usize = 4096;
/// What a connection is promised at most: as much as Linux promises us.
const MAX_PROMISE: usize = 256 << 10;
/// What the last of many connections is promised still.
const MIN_PROMISE: usize = 16 << 10;
/// What is promised to all connections, but for the least that each has.
const POOL: usize = 64 << 20;

/// The connections.
#[derive(Debug, Default)]
pub struct Table {
    slots: Vec<Slot>,
    free: Vec<usize>,
    by_ports: HashMap<Ports, usize>,
    /// Slots whose connections may have a packet for the guest, each once.
    ready: VecDeque<usize>,
    /// The deadlines of all slots.
    deadlines: BTreeSet<(Instant, usize)>,
    /// Bytes that all connections are promised.
    promised: usize,
}

#[derive(Debug, Default)]
struct Slot {
    connection: Option<Connection>,
    /// It is among the ready ones. It stays there when its connection goes, so that connections which come and
    /// go do not fill the queue.
    is_ready: bool,
    /// When something has to have happened, or is to be tried again.
    deadline: Option<Instant>,
}

impl Table {
    /// Adds a connection and returns its slot. `None`: there are as many as there may be.
    pub fn insert(&mut self, socket: OwnedFd, phase: Phase, ports: Ports) -> Option<usize> {
        if self.len() == MAX_CONNECTIONS {
            // Nobody but a slow reader on the host waits for one that lingers.
            let lingers = |slot: &Slot| matches!(&slot.connection, Some(c) if c.phase() == Phase::Lingering);
            let oldest = self.slots.iter().position(lingers)?;
            self.remove(oldest);
        }
        let left = POOL.saturating_sub(self.promised);
        let promise = (left / 8).clamp(MIN_PROMISE, MAX_PROMISE);
        self.promised += promise;
        let connection = Connection::new(socket, phase, ports, promise as u32);
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        self.slots[slot].connection = Some(connection);
        if phase != Phase::Greeting {
            self.by_ports.insert(ports, slot);
        }
        Some(slot)
    }

    /// Removes a connection and closes its socket.
    pub fn remove(&mut self, slot: usize) -> Option<Connection> {
        let connection = self.slots.get_mut(slot)?.connection.take()?;
        self.promised -= connection.buf_alloc() as usize;
        self.free.push(slot);
        self.set_deadline(slot, None);
        self.forget_ports(connection.ports(), slot);
        Some(connection)
    }

    fn forget_ports(&mut self, ports: Ports, slot: usize) {
        if self.by_ports.get(&ports) == Some(&slot) {
            self.by_ports.remove(&ports);
        }
    }

    /// Removes all connections.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Bytes that wait for room in the host's sockets, and bytes that are promised, for all connections.
    #[cfg(test)]
    pub fn memory(&self) -> (usize, usize) {
        let connections = self.slots.iter().filter_map(|slot| slot.connection.as_ref());
        (connections.map(Connection::backlog).sum(), self.promised)
    }

    /// The connection in `slot`.
    pub fn get(&mut self, slot: usize) -> Option<&mut Connection> {
        self.slots.get_mut(slot)?.connection.as_mut()
    }

    /// The slot of the connection with these ports.
    pub fn find(&self, ports: Ports) -> Option<usize> {
        self.by_ports.get(&ports).copied()
    }

    /// The greeting in `slot` becomes a call to these ports, which are nobody else's.
    pub fn request(&mut self, slot: usize, ports: Ports) {
        if let Some(connection) = self.get(slot) {
            connection.request(ports);
            self.by_ports.insert(ports, slot);
        }
    }

    /// The connection in `slot` lingers; its ports may be used again.
    pub fn linger(&mut self, slot: usize) {
        self.set_deadline(slot, None);
        if let Some(connection) = self.get(slot) {
            connection.linger();
            let ports = connection.ports();
            self.forget_ports(ports, slot);
        }
    }

    /// Queues the connection if there is something for the guest.
    pub fn queue(&mut self, slot: usize) {
        let Some(Slot { connection: Some(connection), is_ready, .. }) = self.slots.get_mut(slot) else {
            return;
        };
        if connection.has_packet() && !*is_ready {
            *is_ready = true;
            self.ready.push_back(slot);
        }
    }

    /// Whether something may be there for the guest.
    pub fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The next connection in turn.
    pub fn next_ready(&mut self) -> Option<usize> {
        let slot = self.ready.pop_front()?;
        self.slots[slot].is_ready = false;
        Some(slot)
    }

    /// When the connection is to be looked at.
    pub fn set_deadline(&mut self, slot: usize, deadline: Option<Instant>) {
        let Some(holder) = self.slots.get_mut(slot) else { return };
        if let Some(before) = std::mem::replace(&mut holder.deadline, deadline) {
            self.deadlines.remove(&(before, slot));
        }
        self.deadlines.extend(deadline.map(|at| (at, slot)));
    }

    /// The first deadline.
    pub fn first_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|&(at, _)| at)
    }

    /// A connection whose deadline has passed; it has none any more.
    pub fn next_due(&mut self, now: Instant) -> Option<usize> {
        let (_, slot) = self.deadlines.first().copied().filter(|&(at, _)| at <= now)?;
        self.set_deadline(slot, None);
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::unix_listener::new_socket;

    fn filled(table: &mut Table) {
        for guest in 0..MAX_CONNECTIONS as u32 {
            let socket = new_socket().expect("a socket");
            assert!(table.insert(socket, Phase::Calling, Ports { host: 1, guest }).is_some(), "{guest}");
        }
    }

    #[test]
    fn there_is_an_end_to_connections_and_to_what_they_are_promised() {
        raise_file_limit();
        let mut table = Table::default();
        filled(&mut table);
        let socket = || new_socket().expect("a socket");
        let more = Ports { host: 2, guest: 2 };
        assert_eq!(table.insert(socket(), Phase::Calling, more), None);
        assert!(table.memory().1 <= POOL + MAX_CONNECTIONS * MIN_PROMISE);
        let first = table.find(Ports { host: 1, guest: 0 }).expect("the first");
        assert_eq!(table.get(first).map(|c| c.buf_alloc() as usize), Some(MAX_PROMISE));
        // One that lingers makes room.
        table.linger(first);
        assert!(table.insert(socket(), Phase::Calling, more).is_some());
        assert_eq!(table.len(), MAX_CONNECTIONS);
        for slot in 0..MAX_CONNECTIONS {
            assert!(table.remove(slot).is_some());
        }
        assert_eq!((table.len(), table.memory()), (0, (0, 0)));
        assert!(table.by_ports.is_empty());
    }

    #[test]
    fn a_deadline_is_its_connections_and_no_later_ones() {
        let mut table = Table::default();
        let now = Instant::now();
        for guest in 0..10 {
            let socket = new_socket().expect("a socket");
            let slot = table.insert(socket, Phase::Calling, Ports { host: 1, guest }).expect("room");
            table.set_deadline(slot, Some(now));
            match guest % 3 {
                0 => _ = table.remove(slot),
                1 => table.set_deadline(slot, None),
                _ => assert_eq!((table.next_due(now), table.next_due(now)), (Some(slot), None)),
            }
            assert_eq!((table.first_deadline(), table.next_due(now)), (None, None), "{guest}");
            table.remove(slot);
        }
    }

    #[test]
    fn connections_that_come_and_go_do_not_fill_the_queue() {
        let mut table = Table::default();
        for guest in 0..1000 {
            let socket = new_socket().expect("a socket");
            let slot = table.insert(socket, Phase::Calling, Ports { host: 1, guest }).expect("room");
            table.get(slot).expect("it is there").accept();
            table.queue(slot);
            table.remove(slot);
        }
        assert_eq!(table.ready.len(), 1);
    }

    /// The tests above need as many descriptors as there may be connections.
    fn raise_file_limit() {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).expect("up to the maximum");
    }
}
