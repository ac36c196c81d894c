//! What is to be known of a device: failed requests, and the fact that it tells by itself.
//!
//! A guest can make both as often as it likes, so that they are told now and then. The last news are told always.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use devices::model::Counters;

/// How often news of a device are told at most.
const INTERVAL: Duration = Duration::from_secs(1);

/// News of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// So many of its requests have failed on the host's side.
    Errors(u64),
    /// The fact of this name has this value.
    Fact(&'static str, u64),
}

/// Called with them on the runner's thread.
pub type TellNews = Box<dyn Fn(News) + Send>;

/// Looks whether there are news.
pub struct NewsWatch {
    /// What has been told.
    errors: u64,
    fact: Option<(&'static str, u64)>,
    /// When that was.
    at: Option<Instant>,
    tell: TellNews,
}

impl NewsWatch {
    /// What `counters` say by now is no news.
    pub fn new(counters: &Counters, tell: TellNews) -> Self {
        Self { errors: 0, fact: counters.news(), at: None, tell }
    }

    /// Tells what is new, or when it is to be asked for that again.
    pub fn look(&mut self, counters: &Counters, now: Instant) -> Option<Instant> {
        let (errors, fact) = (counters.host_errors.load(Ordering::Relaxed), counters.news());
        let (more, other) = (errors > self.errors, fact != self.fact);
        if !more && !other {
            return None;
        }
        if let Some(next) = self.at.map(|at| at + INTERVAL).filter(|next| *next > now) {
            return Some(next);
        }
        (self.errors, self.fact, self.at) = (errors, fact, Some(now));
        if more {
            (self.tell)(News::Errors(errors));
        }
        if let (true, Some((name, value))) = (other, fact) {
            (self.tell)(News::Fact(name, value));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::sync::{Arc, mpsc};

    use devices::model::Facts;

    use super::*;

    #[derive(Debug, Default)]
    struct Size(AtomicU64);

    impl Facts for Size {
        fn facts(&self) -> Vec<(&'static str, u64)> {
            self.news().into_iter().collect()
        }

        fn news(&self) -> Option<(&'static str, u64)> {
            Some(("size", self.0.load(Ordering::Relaxed)))
        }
    }

    #[test]
    fn a_flood_is_told_once_a_second_and_its_end_always() {
        let size = Arc::new(Size::default());
        let counters = Counters { own: Some(size.clone()), ..Counters::default() };
        let (sender, told) = mpsc::channel();
        let mut watch = NewsWatch::new(&counters, Box::new(move |news| _ = sender.send(news)));
        let start = Instant::now();
        assert_eq!(watch.look(&counters, start), None);
        for i in 1..=2500 {
            size.0.store(i, Ordering::Relaxed);
            let next = watch.look(&counters, start + Duration::from_millis(i));
            assert_eq!(next.is_some(), ![1, 1001, 2001].contains(&i), "{i}");
        }
        let next = start + Duration::from_millis(3001);
        assert_eq!(watch.look(&counters, next - Duration::from_millis(1)), Some(next));
        assert_eq!(watch.look(&counters, next), None);
        let told: Vec<News> = told.try_iter().collect();
        assert_eq!(told, [1, 1001, 2001, 2500].map(|value| News::Fact("size", value)));
    }

    #[test]
    fn errors_and_a_fact_are_told_together() {
        let size = Arc::new(Size::default());
        let counters = Counters { own: Some(size.clone()), ..Counters::default() };
        let (sender, told) = mpsc::channel();
        let mut watch = NewsWatch::new(&counters, Box::new(move |news| _ = sender.send(news)));
        size.0.store(7, Ordering::Relaxed);
        Counters::add(&counters.host_errors, 3);
        let start = Instant::now();
        assert_eq!(watch.look(&counters, start), None);
        assert_eq!(watch.look(&counters, start + INTERVAL), None, "nothing is new");
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [News::Errors(3), News::Fact("size", 7)]);
    }
}
