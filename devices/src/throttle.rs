//! Token buckets: how much of a device its guest may use.
//!
//! Parameters and meaning are those of Firecracker's rate limiter: a bucket of `size` tokens that fills up within
//! `refill_time`, and `one_time_burst` tokens on top that are there once. What is taken may exceed what is left: the
//! bucket then owes, and nothing more is taken before the debt is paid off. So a request larger than the bucket is
//! served, and in the long run the rate is right.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::size::ByteSize;

/// A bucket's parameters. Text form: `SIZE/TIME[+BURST]`, such as `100M/1s+500M` or `1000/100ms`.
///
/// ```
/// use devices::throttle::TokenBucket;
///
/// let bucket: TokenBucket = "100/1s+50".parse()?;
/// assert_eq!(bucket, TokenBucket { size: 100, refill_time: 1000, one_time_burst: 50 });
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenBucket {
    /// Tokens that it holds: bytes or operations. Not 0.
    pub size: u64,
    /// Milliseconds in which an empty bucket fills. Not 0.
    pub refill_time: u64,
    /// Tokens that are there at the start and do not come back.
    pub one_time_burst: u64,
}

/// What may flow through one lane of a device: a disk has one, a network interface one for each direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// In bytes.
    pub bandwidth: Option<TokenBucket>,
    /// In operations: requests or packets.
    pub ops: Option<TokenBucket>,
}

/// Whether `key` of a device's configuration is one of its limits, by the names that all kinds give them.
pub fn is_limit(key: &str) -> bool {
    ["bandwidth", "ops"]
        .iter()
        .any(|name| key.strip_suffix(name).is_some_and(|prefix| prefix.is_empty() || prefix.ends_with('_')))
}

/// Why a text is not a [`TokenBucket`].
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is not a limit; write SIZE/TIME[+BURST], such as 100M/1s or 1000/100ms+5000")]
pub struct LimitError(String);

impl FromStr for TokenBucket {
    type Err = LimitError;

    fn from_str(text: &str) -> Result<Self, LimitError> {
        let number = |text: &str| text.parse::<ByteSize>().ok().map(|size| size.0);
        let parse = || {
            let (rate, burst) =
                text.split_once('+').map_or((text, None), |(rate, burst)| (rate, Some(burst)));
            let (size, time) = rate.split_once('/')?;
            let (count, unit) = time.split_at(time.find(|c: char| !c.is_ascii_digit())?);
            let count = if count.is_empty() { 1 } else { count.parse::<u64>().ok()? };
            let refill_time = match unit {
                "ms" => Some(count),
                "s" => count.checked_mul(1000),
                _ => None,
            }?;
            let bucket =
                Self { size: number(size)?, refill_time, one_time_burst: burst.map_or(Some(0), number)? };
            (bucket.size > 0 && bucket.refill_time > 0).then_some(bucket)
        };
        parse().ok_or_else(|| LimitError(text.into()))
    }
}

impl fmt::Display for TokenBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/", ByteSize(self.size))?;
        match self.refill_time.is_multiple_of(1000) {
            true => write!(f, "{}s", self.refill_time / 1000)?,
            false => write!(f, "{}ms", self.refill_time)?,
        }
        match self.one_time_burst {
            0 => Ok(()),
            burst => write!(f, "+{}", ByteSize(burst)),
        }
    }
}

impl Serialize for TokenBucket {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TokenBucket {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A bucket in use.
#[derive(Clone, Debug)]
pub struct Bucket {
    parameters: TokenBucket,
    burst: u64,
    /// Below 0: what is owed.
    balance: i64,
    /// The moment up to which the balance is true.
    at: Instant,
}

impl Bucket {
    /// A full bucket.
    pub fn new(parameters: TokenBucket, now: Instant) -> Self {
        let balance = i64::try_from(parameters.size).unwrap_or(i64::MAX);
        Self { parameters, burst: parameters.one_time_burst, balance, at: now }
    }

    /// Adds what flowed in until `now`. What is less than a token stays on the way.
    pub fn refill(&mut self, now: Instant) {
        let TokenBucket { size, refill_time, .. } = self.parameters;
        let (size, refill) = (u128::from(size), u128::from(refill_time) * 1_000_000);
        let tokens = now.saturating_duration_since(self.at).as_nanos().saturating_mul(size) / refill;
        let room = (i128::from(self.parameters.size) - i128::from(self.balance)).max(0) as u128;
        if tokens >= room {
            (self.balance, self.at) = (i64::try_from(self.parameters.size).unwrap_or(i64::MAX), now);
        } else if tokens > 0 {
            // Less than the room, which fits.
            self.balance = self.balance.saturating_add(i64::try_from(tokens).unwrap_or(i64::MAX));
            self.at += nanos(tokens * refill / size);
        }
    }

    /// Whether anything may be taken.
    pub fn permits(&self) -> bool {
        self.burst > 0 || self.balance > 0
    }

    /// Takes `tokens`, whether or not there are as many.
    pub fn take(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        let rest = i64::try_from(tokens - from_burst).unwrap_or(i64::MAX);
        self.balance = self.balance.saturating_sub(rest);
    }

    fn level(&self) -> Level {
        Level { balance: self.balance, burst: self.burst }
    }

    /// Takes over what was in a bucket, as far as this one has room, and what was owed, as far as a request can be large.
    /// Nothing flows in while a machine sleeps.
    fn set_level(&mut self, level: Level) {
        self.balance = self.balance.min(level.balance.max(-i64::from(u32::MAX)));
        self.burst = self.burst.min(level.burst);
    }

    /// When something may be taken again.
    pub fn permits_at(&self) -> Instant {
        if self.permits() {
            return self.at;
        }
        let missing = 1 + self.balance.unsigned_abs();
        let refill = u128::from(self.parameters.refill_time) * 1_000_000;
        self.at + nanos((u128::from(missing) * refill).div_ceil(u128::from(self.parameters.size)))
    }
}

/// A duration of so many nanoseconds, or about a century.
fn nanos(nanos: u128) -> Duration {
    const CENTURY: u64 = 3_155_760_000_000_000_000;
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(CENTURY).min(CENTURY))
}

/// What is in the buckets of one lane, for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottleState {
    bandwidth: Option<Level>,
    ops: Option<Level>,
}

/// What is in a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Level {
    balance: i64,
    burst: u64,
}

/// The buckets of one lane.
#[derive(Clone, Debug, Default)]
pub struct Throttle {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
}

impl Throttle {
    /// Full buckets for these limits.
    pub fn new(limits: &Limits) -> Self {
        let now = Instant::now();
        let bucket = |parameters: Option<TokenBucket>| parameters.map(|p| Bucket::new(p, now));
        Self { bandwidth: bucket(limits.bandwidth), ops: bucket(limits.ops) }
    }

    fn buckets(&self) -> impl Iterator<Item = &Bucket> {
        self.bandwidth.iter().chain(&self.ops)
    }

    /// Whether there is any limit.
    pub fn is_limited(&self) -> bool {
        self.buckets().next().is_some()
    }

    /// Adds what flowed into the buckets until `now`.
    pub fn refill(&mut self, now: Instant) {
        self.bandwidth.iter_mut().chain(&mut self.ops).for_each(|bucket| bucket.refill(now));
    }

    /// The state for a snapshot.
    pub fn save(&self) -> ThrottleState {
        let level = |bucket: &Option<Bucket>| bucket.as_ref().map(Bucket::level);
        ThrottleState { bandwidth: level(&self.bandwidth), ops: level(&self.ops) }
    }

    /// Takes over a saved state. A limit that was not there then is as new.
    pub fn restore(&mut self, saved: &ThrottleState) {
        for (bucket, level) in [(&mut self.bandwidth, saved.bandwidth), (&mut self.ops, saved.ops)] {
            if let (Some(bucket), Some(level)) = (bucket, level) {
                bucket.set_level(level);
            }
        }
    }

    /// Whether one more operation may begin.
    pub fn permits(&self) -> bool {
        self.buckets().all(Bucket::permits)
    }

    /// Takes one operation of so many bytes.
    pub fn charge(&mut self, bytes: u64) {
        self.bandwidth.iter_mut().for_each(|bucket| bucket.take(bytes));
        self.ops.iter_mut().for_each(|bucket| bucket.take(1));
    }

    /// When one more operation may begin; `None`: at any time.
    pub fn permits_at(&self) -> Option<Instant> {
        self.buckets().map(Bucket::permits_at).max()
    }
}

/// Log lines that a guest can cause, limited: a few at once, and one every ten seconds afterwards.
#[derive(Debug)]
pub struct LogLimit(std::sync::Mutex<Bucket>);

impl LogLimit {
    /// Lines that may come at once.
    const LINES: TokenBucket = TokenBucket { size: 5, refill_time: 50_000, one_time_burst: 0 };

    /// Whether one more line may be written.
    pub fn permits(&self) -> bool {
        let mut bucket = self.0.lock().unwrap_or_else(|e| e.into_inner());
        bucket.refill(Instant::now());
        let permits = bucket.permits();
        if permits {
            bucket.take(1);
        }
        permits
    }
}

impl Default for LogLimit {
    fn default() -> Self {
        Self(std::sync::Mutex::new(Bucket::new(Self::LINES, Instant::now())))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket(text: &str, now: Instant) -> Bucket {
        Bucket::new(text.parse().unwrap(), now)
    }

    #[test]
    fn parameters_round_trip() {
        for (text, size, refill_time, one_time_burst) in [
            ("100M/1s+500M", 100 << 20, 1000, 500 << 20),
            ("1000/100ms", 1000, 100, 0),
            ("1/60s+1", 1, 60_000, 1),
        ] {
            let bucket: TokenBucket = text.parse().unwrap();
            assert_eq!(bucket, TokenBucket { size, refill_time, one_time_burst });
            assert_eq!(bucket.to_string(), text);
        }
        assert_eq!("5/s".parse::<TokenBucket>().unwrap().to_string(), "5/1s");
        for text in ["", "1", "1/", "/1s", "0/1s", "1/0s", "1/1", "1/1m", "1/1s+", "1/1s+x", "-1/1s", "1/1ss"]
        {
            let error = text.parse::<TokenBucket>().unwrap_err().to_string();
            assert!(error.contains("write SIZE/TIME[+BURST]"), "{text}: {error}");
        }
    }

    #[test]
    fn limits_are_known_by_their_keys() {
        for (key, want) in [
            ("bandwidth", true),
            ("ops", true),
            ("rx_ops", true),
            ("tx_bandwidth", true),
            ("path", false),
            ("laptops", false),
            ("ops_", false),
        ] {
            assert_eq!(is_limit(key), want, "{key}");
        }
    }

    #[test]
    fn a_burst_is_there_once_and_a_debt_is_paid_before_more_is_taken() {
        let start = Instant::now();
        let after = |ms: u64| start + Duration::from_millis(ms);
        let mut bucket = bucket("100/1s+50", start);
        bucket.take(150);
        assert!(!bucket.permits());
        assert_eq!(bucket.permits_at(), after(10));
        bucket.refill(after(10));
        assert!(bucket.permits());
        // Larger than the bucket: three seconds of debt, less the one token that was there.
        bucket.take(300);
        assert_eq!(bucket.permits_at(), after(10 + 3000));
        bucket.refill(after(3009));
        assert!(!bucket.permits());
        bucket.refill(after(3010));
        assert!(bucket.permits());
        bucket.refill(after(100_000));
        bucket.take(100);
        assert!(!bucket.permits(), "it holds no more than its size, and the burst is gone");
    }

    #[test]
    fn the_strictest_bucket_decides() {
        let limits = Limits { bandwidth: "1000/1s".parse().ok(), ops: "2/1s".parse().ok() };
        let mut throttle = Throttle::new(&limits);
        throttle.charge(10);
        assert!(throttle.permits());
        throttle.charge(10);
        assert!(!throttle.permits(), "two operations");
        let mut throttle = Throttle::new(&limits);
        throttle.charge(5000);
        assert!(!throttle.permits(), "5000 bytes");
        assert!(!Throttle::default().is_limited());
        assert_eq!(Throttle::default().permits_at(), None);
    }

    #[test]
    fn log_lines_run_out() {
        let limit = LogLimit::default();
        assert_eq!((0..100).filter(|_| limit.permits()).count(), 5);
    }

    proptest! {
        /// However requests come: never more than the bucket, its burst, what flowed in and the last request.
        #[test]
        fn the_rate_is_kept(
            size in 1u64..1 << 40, refill_time in 1u64..100_000, one_time_burst in 0u64..1 << 40,
            steps in prop::collection::vec((0u64..5_000, 0u64..1 << 36), 1..60),
        ) {
            let start = Instant::now();
            let mut bucket = Bucket::new(TokenBucket { size, refill_time, one_time_burst }, start);
            let (mut now, mut taken, mut largest) = (start, 0u128, 0);
            for (wait, tokens) in steps {
                now += Duration::from_millis(wait);
                bucket.refill(now);
                if bucket.permits() {
                    bucket.take(tokens);
                    taken += u128::from(tokens);
                    largest = largest.max(tokens);
                } else {
                    let at = bucket.permits_at();
                    prop_assert!(at > now);
                    bucket.refill(at);
                    prop_assert!(bucket.permits());
                    now = at;
                }
            }
            let flowed = (now - start).as_nanos() * u128::from(size) / (u128::from(refill_time) * 1_000_000);
            prop_assert!(taken <= u128::from(size) + u128::from(one_time_burst) + flowed + u128::from(largest));
        }
    }
}
