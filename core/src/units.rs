//! Quantities that are never bare integers.

use std::fmt;
use std::iter::Sum;

use serde::{Deserialize, Serialize};

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// No bytes.
    pub const ZERO: Self = Self(0);

    /// `n` KiB. Saturates.
    pub const fn kib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 10))
    }

    /// `n` MiB. Saturates.
    pub const fn mib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 20))
    }

    /// `n` GiB. Saturates.
    pub const fn gib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 30))
    }

    /// The sum, or `None` if it does not fit in 64 bits.
    pub const fn checked_add(self, other: Self) -> Option<Self> {
        match self.0.checked_add(other.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// The sum, or the largest number there is.
    #[must_use]
    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The difference, or zero.
    #[must_use]
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// Rounded up to a multiple of `unit`. Saturates. A zero `unit` changes nothing.
    #[must_use]
    pub const fn round_up(self, unit: Self) -> Self {
        if unit.0 == 0 {
            return self;
        }
        Self(self.0.div_ceil(unit.0).saturating_mul(unit.0))
    }

    /// `percent` hundredths of this, rounded down. Exact for every value.
    #[must_use]
    pub const fn percent(self, percent: u64) -> Self {
        Self(
            (self.0 / 100)
                .saturating_mul(percent)
                .saturating_add((self.0 % 100).saturating_mul(percent) / 100),
        )
    }

    /// As a signed number, for Kubernetes status fields. Clamped to `i64::MAX`.
    pub const fn as_i64(self) -> i64 {
        if self.0 > i64::MAX.unsigned_abs() { i64::MAX } else { self.0.cast_signed() }
    }

    /// From a status field; negative numbers count as zero.
    pub const fn from_i64(value: i64) -> Self {
        if value < 0 { Self::ZERO } else { Self(value.unsigned_abs()) }
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, Self::saturating_add)
    }
}

impl fmt::Display for Bytes {
    /// For people: exact where it is a whole number of binary units, otherwise with one decimal (rounded down).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in [("TiB", 40_u32), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
            let whole = self.0 >> shift;
            if whole == 0 {
                continue;
            }
            let tenths = ((u128::from(self.0) * 10) >> shift) % 10;
            return if tenths == 0 {
                write!(f, "{whole} {unit}")
            } else {
                write!(f, "{whole}.{tenths} {unit}")
            };
        }
        write!(f, "{} bytes", self.0)
    }
}

/// How many times a placement or a target has been given out; an older one is refused everywhere. Starts at 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The first one.
    pub const FIRST: Self = Self(1);

    /// The one after this.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A point in time, in milliseconds since 1970 UTC. Given to decisions, never read by them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// Milliseconds from `earlier` to this; zero if `earlier` is later.
    pub const fn millis_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(Bytes(0).to_string(), "0 bytes");
        assert_eq!(Bytes(1023).to_string(), "1023 bytes");
        assert_eq!(Bytes::mib(3).to_string(), "3 MiB");
        assert_eq!(Bytes(1536 << 20).to_string(), "1.5 GiB");
        assert_eq!(Bytes(u64::MAX).to_string(), "16777215.9 TiB");
    }

    #[test]
    fn percent_is_exact_and_does_not_overflow() {
        assert_eq!(Bytes(1001).percent(95), Bytes(950));
        assert_eq!(Bytes(u64::MAX).percent(100), Bytes(u64::MAX));
        assert_eq!(Bytes(199).percent(50), Bytes(99));
    }

    #[test]
    fn rounding_up() {
        assert_eq!(Bytes(1).round_up(Bytes(4096)), Bytes(4096));
        assert_eq!(Bytes(4096).round_up(Bytes(4096)), Bytes(4096));
        assert_eq!(Bytes(5).round_up(Bytes(0)), Bytes(5));
    }
}
