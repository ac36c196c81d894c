//! Interrupts that can wait a little: one for several used buffers, or none at all.
//!
//! A driver that sends is not held up by buffers that it has not got back: Linux takes back what was transmitted when it
//! transmits next, or handles what was received. An interrupt for each transmission tells it nothing in time, and is the
//! dearest part of a small packet. So interrupts of queues that a device names
//! ([`VirtioDevice::can_wait`](crate::model::VirtioDevice::can_wait)) are held back until the driver has looked by
//! itself, half of the queue waits to be looked at, or some time has passed.
//!
//! A driver that does wait for its buffers loses by that. It is known by its silence: for the second half of the wait it
//! sends nothing, and then it still wants the interrupt. Such a wait is tried again less and less often. Nothing polls.

use std::time::{Duration, Instant};

/// How long an interrupt is held back at first; twice as long after each wait that paid.
const SHORTEST: Duration = Duration::from_micros(250);

/// How long an interrupt is held back at most. It is long because a wait that ends by itself wakes a thread, and one that pays
/// has ended long before.
const LONGEST: Duration = Duration::from_millis(4);

/// Most interrupts in a row that are sent at once, before one is held back again to see what comes of it.
const MOST_SENT: u32 = 255;

/// The memory of one queue.
#[derive(Debug)]
pub struct Patience {
    /// How long the next interrupt is held back.
    length: Duration,
    /// An interrupt is held back.
    wait: Option<Wait>,
    /// So many are sent at once.
    send: u32,
    /// And so many after the last wait in vain.
    sent: u32,
}

/// An interrupt that is held back.
#[derive(Debug)]
struct Wait {
    due: Instant,
    /// After this, the driver is no longer silent.
    half: Instant,
    /// How many buffers it is for, and when the last of them was used.
    used: u16,
    last: Instant,
}

impl Default for Patience {
    fn default() -> Self {
        Self { length: SHORTEST, wait: None, send: 0, sent: 0 }
    }
}

impl Patience {
    /// Until when an interrupt is held back, if one is.
    pub fn due(&self) -> Option<Instant> {
        self.wait.as_ref().map(|wait| wait.due)
    }

    /// The driver wants an interrupt for `used` buffers of a queue of this size. Whether it is held back.
    pub fn holds_back(&mut self, used: u16, size: u16) -> bool {
        if used > size / 2 {
            return false;
        }
        match &mut self.wait {
            None if self.send > 0 => {
                self.send -= 1;
                return false;
            }
            None => {
                let now = Instant::now();
                self.wait =
                    Some(Wait { due: now + self.length, half: now + self.length / 2, used, last: now });
            }
            Some(wait) if wait.used != used => (wait.used, wait.last) = (used, Instant::now()),
            Some(_) => {}
        }
        true
    }

    /// The wait, if there is one, has paid: the driver has looked by itself, or much has gathered.
    pub fn paid(&mut self) {
        if self.wait.take().is_some() {
            (self.length, self.sent) = ((2 * self.length).min(LONGEST), 0);
        }
    }

    /// The wait has ended by itself, and the interrupt is sent.
    pub fn ended(&mut self) {
        if self.wait.take().is_some_and(|wait| wait.last < wait.half) {
            (self.length, self.sent) = (SHORTEST, (2 * self.sent + 1).min(MOST_SENT));
            self.send = self.sent;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u16 = 16;

    /// How many interrupts are sent at once before one is held back.
    fn sent(patience: &mut Patience) -> usize {
        (0..).find(|_| patience.holds_back(1, SIZE)).expect("an end")
    }

    #[test]
    fn waiting_in_vain_is_tried_less_and_less_often() {
        let mut patience = Patience::default();
        let runs = [(); 10].map(|()| {
            let count = sent(&mut patience);
            patience.ended();
            count
        });
        assert_eq!(runs, [0, 1, 3, 7, 15, 31, 63, 127, 255, 255]);
        assert_eq!((sent(&mut patience), patience.length), (255, SHORTEST));
        patience.paid();
        assert_eq!(
            (sent(&mut patience), patience.length),
            (0, 2 * SHORTEST),
            "the driver has looked by itself"
        );
    }

    #[test]
    fn a_driver_that_goes_on_sending_is_not_held_up() {
        let mut patience = Patience::default();
        assert!(patience.holds_back(1, SIZE));
        assert!(patience.holds_back(2, SIZE));
        let wait = patience.wait.as_mut().expect("a wait");
        // As if it had begun long ago.
        wait.half = wait.last;
        patience.ended();
        assert_eq!(sent(&mut patience), 0);
    }

    #[test]
    fn what_gathers_pays_and_half_a_queue_is_enough() {
        let mut patience = Patience::default();
        for used in 1..=SIZE / 2 {
            assert!(patience.holds_back(used, SIZE));
        }
        assert!(!patience.holds_back(SIZE / 2 + 1, SIZE));
        patience.paid();
        assert_eq!((sent(&mut patience), patience.due().is_some()), (0, true));
    }
}
