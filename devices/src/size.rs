//! Amounts of memory and disk as people write them.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};

/// A number of bytes. Text form: a number, with the binary suffix `K`, `M`, `G` or `T` where it fits; `KiB` to `TiB` are
/// read as well.
///
/// ```
/// use devices::size::ByteSize;
///
/// assert_eq!("512M".parse(), Ok(ByteSize(512 << 20)));
/// assert_eq!("512MiB".parse(), Ok(ByteSize(512 << 20)));
/// assert_eq!(ByteSize(3 << 30).to_string(), "3G");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// Suffixes, smallest first; each is 1024 times the one before.
const SUFFIXES: [char; 4] = ['K', 'M', 'G', 'T'];

/// Why a text is not a size.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizeError {
    /// No number, or an unknown suffix.
    #[error("'{0}' is not a size; write a number of bytes, or one with K, M, G or T, such as 256M")]
    Syntax(String),
    /// More than 64 bits hold.
    #[error("'{0}' is too large; the largest size is below 16777216T")]
    TooLarge(String),
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let syntax = || SizeError::Syntax(text.into());
        let (short, long) = match text.len().checked_sub(2).and_then(|at| text.split_at_checked(at)) {
            Some((short, end)) if end.eq_ignore_ascii_case("iB") => (short, true),
            _ => (text, false),
        };
        let last = short.chars().next_back().ok_or_else(syntax)?.to_ascii_uppercase();
        let (digits, shift) = match SUFFIXES.iter().position(|&suffix| suffix == last) {
            // A suffix is one ASCII byte.
            Some(i) => (&short[..short.len() - 1], 10 * (i + 1)),
            None if long => return Err(syntax()),
            None => (text, 0),
        };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(syntax());
        }
        // All that can be wrong with digits is their number.
        let number: Option<u64> = digits.parse().ok();
        let bytes = number.and_then(|n| n.checked_mul(1 << shift));
        bytes.map(Self).ok_or_else(|| SizeError::TooLarge(text.into()))
    }
}

impl fmt::Display for ByteSize {
    /// The shortest form that is exact: `256M`, and `1536M` rather than 1.5G.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steps = match self.0 {
            0 => 0,
            n => (n.trailing_zeros() as usize / 10).min(SUFFIXES.len()),
        };
        write!(f, "{}", self.0 >> (10 * steps))?;
        match steps {
            0 => Ok(()),
            _ => write!(f, "{}", SUFFIXES[steps - 1]),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SizeVisitor)
    }
}

struct SizeVisitor;

impl Visitor<'_> for SizeVisitor {
    type Value = ByteSize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size such as \"256M\", or a number of bytes")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
        Ok(ByteSize(bytes))
    }

    fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
        u64::try_from(bytes).map(ByteSize).map_err(|_| E::invalid_value(de::Unexpected::Signed(bytes), &self))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1", 1),
            ("4096", 4096),
            ("1k", 1 << 10),
            ("256M", 256 << 20),
            ("2g", 2 << 30),
            ("512MiB", 512 << 20),
            ("1kib", 1 << 10),
            ("16777215T", 16_777_215 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_says_so() {
        for text in
            ["", "M", "x", "-1", "+1", "1.5G", "1MB", "1 M", "1iB", "iB", "MiB", "1iKiB", "é", "1é", "0x10"]
        {
            assert_eq!(text.parse::<ByteSize>(), Err(SizeError::Syntax(text.into())), "{text}");
        }
        for text in ["16777216T", "18446744073709551616", "99999999999999999999999K"] {
            assert_eq!(text.parse::<ByteSize>(), Err(SizeError::TooLarge(text.into())), "{text}");
        }
    }

    #[test]
    fn display_is_the_shortest_exact_form() {
        for (bytes, text) in [
            (0, "0"),
            (1023, "1023"),
            (1024, "1K"),
            (1536 << 20, "1536M"),
            (1 << 50, "1024T"),
            (1025, "1025"),
        ] {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }

    #[test]
    fn in_json_it_is_text_or_a_number() {
        let size: ByteSize = serde_json::from_str("\"256M\"").expect("text");
        assert_eq!(size, ByteSize(256 << 20));
        assert_eq!(serde_json::to_string(&size).expect("json"), "\"256M\"");
        assert_eq!(serde_json::from_str::<ByteSize>("4096").expect("number"), ByteSize(4096));
        assert!(serde_json::from_str::<ByteSize>("-1").is_err());
        assert!(serde_json::from_str::<ByteSize>("true").is_err());
    }

    proptest! {
        #[test]
        fn any_size_survives_the_way_through_text(bytes: u64) {
            prop_assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }

        #[test]
        fn no_text_panics(text in "\\PC*") {
            _ = text.parse::<ByteSize>();
        }
    }
}
