//! The host descriptors of a device with many of them, behind a single one: an epoll instance with a listener, a
//! descriptor for each connection, a timer, and an event that the device signals to itself.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Result;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

/// Events that one look takes.
const EVENTS: usize = 128;

const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
const WAKE: u64 = u64::MAX - 2;

/// What became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// Somebody wants to connect.
    Listener,
    /// The timer went off, or the device woke itself.
    Again,
    /// The socket of the connection in this slot.
    Socket {
        /// Slot of the connection.
        slot: usize,
        /// There may be bytes, or the end of them.
        readable: bool,
        /// There may be room.
        writable: bool,
        /// The other side is gone for good.
        hung_up: bool,
    },
}

/// An epoll instance, itself a descriptor that the device's owner watches.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
    timer: OwnedFd,
    wake: OwnedFd,
    /// When the timer goes off.
    armed: Option<Instant>,
}

impl Poller {
    /// Watches `listener`, if there is one, and nothing else yet. Everything is edge triggered.
    pub fn new(listener: Option<BorrowedFd<'_>>) -> Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let own = [(timer.as_fd(), TIMER), (wake.as_fd(), WAKE)];
        for (fd, data) in listener.map(|fd| (fd, LISTENER)).into_iter().chain(own) {
            epoll::add(&epoll, fd, EventData::new_u64(data), EventFlags::IN | EventFlags::ET)?;
        }
        Ok(Self { epoll, timer, wake, armed: None })
    }

    /// The descriptor that stands for all.
    pub fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Another descriptor that stands for all.
    #[cfg(test)]
    pub fn duplicate(&self) -> OwnedFd {
        self.epoll.try_clone().expect("a descriptor")
    }

    /// Watches the socket of the connection in `slot`, until it is closed.
    pub fn add(&self, socket: BorrowedFd<'_>, slot: usize) -> Result<()> {
        epoll::add(&self.epoll, socket, EventData::new_u64(slot as u64), interest(false))
    }

    /// Whether to look for room in a socket too. It is not worth an event while nothing waits for it.
    pub fn watch_room(&self, socket: BorrowedFd<'_>, slot: usize, watch: bool) -> Result<()> {
        epoll::modify(&self.epoll, socket, EventData::new_u64(slot as u64), interest(watch))
    }

    /// Has the device called again soon.
    pub fn wake(&self) {
        // It can only fail when the counter is full, and then the event is pending anyway.
        _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Has the device called at `when`.
    pub fn call_at(&mut self, when: Option<Instant>) {
        if when == self.armed {
            return;
        }
        // Zero would switch it off.
        let left = when.map(|at| at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1)));
        let left = left.unwrap_or_default();
        let spec = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) },
        };
        if rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec).is_ok() {
            self.armed = when;
        }
    }

    /// What became ready since the last look, and whether there may be more.
    pub fn look(&mut self) -> (Vec<Ready>, bool) {
        let mut events = [MaybeUninit::<Event>::uninit(); EVENTS];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut events[..], Some(&now)) else {
            return (Vec::new(), false);
        };
        let more = events.len() == EVENTS;
        let mut ready = Vec::with_capacity(events.len());
        for event in events.iter() {
            let flags = event.flags;
            ready.push(match event.data.u64() {
                LISTENER => Ready::Listener,
                TIMER => {
                    self.armed = None;
                    drain(&self.timer);
                    Ready::Again
                }
                WAKE => {
                    drain(&self.wake);
                    Ready::Again
                }
                slot => Ready::Socket {
                    slot: slot as usize,
                    readable: flags
                        .intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR),
                    writable: flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR),
                    hung_up: flags.intersects(EventFlags::HUP | EventFlags::ERR),
                },
            });
        }
        (ready, more)
    }
}

fn interest(room: bool) -> EventFlags {
    let base = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
    if room { base | EventFlags::OUT } else { base }
}

/// Takes the count out of a timer or an event.
fn drain(fd: &OwnedFd) {
    _ = rustix::io::read(fd, &mut [0; 8]);
}
