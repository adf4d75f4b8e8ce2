//! Volumes that are promised more than is there, by policy: what their promises count for, and how large their kernel pool
//! may become.
//!
//! **Guarantee.** Whatever volumes write, what images are promised stays theirs. Only a pool of kernel pools has this: there
//! the kernel pool `volumes` attains what the ledger leaves to it, and nothing more.
//!
//! The percentage of a ledger follows the pool's policy. A lower one counts promises for more, so it sinks only as promises
//! are given back, never under them ([`LedgerCapacity::covering`]). A higher one counts them for less, but a node that has not
//! seen it yet may still make its kernel pool as large as they counted before: that much stays with volumes
//! ([`Overcommit::attain`]).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::budget::{Area, Sums};
use crate::ledger::Promise;
use crate::units::Bytes;
use crate::view::{LedgerCapacity, LedgerView};

/// How far volumes are promised beyond what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overcommit {
    /// Bytes that are promised to volumes count for a hundred of this many.
    pub percent: Percent,
    /// The kernel pool of volumes may become so large, although its promises count for less: volumes have written nearly all
    /// that it had.
    pub attain: Bytes,
}

/// A percentage from 100 to [`Percent::MOST`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "u32", into = "u32")]
pub struct Percent(u32);

impl Percent {
    /// Not overcommitted.
    pub const WHOLE: Self = Self(100);
    /// The most: beyond it nobody could say any more what a volume is worth.
    pub const MOST: u32 = 1000;

    /// `None` outside of 100 to 1000.
    pub const fn new(percent: u32) -> Option<Self> {
        if percent < Self::WHOLE.0 || percent > Self::MOST { None } else { Some(Self(percent)) }
    }

    /// The nearest that there is.
    pub fn clamped(percent: u128) -> Self {
        let most = u128::from(Self::MOST);
        Self(u32::try_from(percent.min(most)).unwrap_or(Self::MOST).max(Self::WHOLE.0))
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// What this much promised to volumes counts for; rounded up.
    pub fn charged(self, promised: u128) -> u128 {
        let (whole, percent) = (u128::from(Self::WHOLE.0), u128::from(self.0));
        promised.saturating_mul(whole).div_ceil(percent)
    }

    /// The most that counts for no more than `bound`.
    pub fn promisable(self, bound: Bytes) -> u128 {
        u128::from(bound.0) * u128::from(self.0) / u128::from(Self::WHOLE.0)
    }

    /// The least by which this much counts for no more than `bound`; the most where none does.
    fn least(promised: u128, bound: Bytes) -> Self {
        let hundredfold = promised.saturating_mul(u128::from(Self::WHOLE.0));
        match bound {
            Bytes::ZERO if promised > 0 => Self(Self::MOST),
            Bytes::ZERO => Self::WHOLE,
            Bytes(bound) => Self::clamped(hundredfold.div_ceil(u128::from(bound))),
        }
    }
}

impl From<u32> for Percent {
    fn from(percent: u32) -> Self {
        Self::clamped(u128::from(percent))
    }
}

impl From<Percent> for u32 {
    fn from(percent: Percent) -> Self {
        percent.0
    }
}

impl Default for Percent {
    fn default() -> Self {
        Self::WHOLE
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", self.0)
    }
}

impl Default for Overcommit {
    fn default() -> Self {
        Self::NONE
    }
}

impl Overcommit {
    /// What is promised is there.
    pub const NONE: Self = Self { percent: Percent::WHOLE, attain: Bytes::ZERO };

    /// True if volumes are promised more than is there.
    pub fn is_over(&self) -> bool {
        self.percent > Percent::WHOLE
    }

    /// How large the kernel pool of volumes may become where they are promised this much.
    pub fn target(&self, promised: Bytes) -> Bytes {
        let charged = Bytes(u64::try_from(self.percent.charged(u128::from(promised.0))).unwrap_or(u64::MAX));
        if self.is_over() { charged.max(self.attain) } else { charged }
    }
}

impl LedgerCapacity {
    /// This, as the capacity of a ledger with these promises that is overcommitted `before`, nowhere below what is promised: a
    /// capacity shrinks as promises are given back, never under them. `self` has the bounds that are wanted, the percentage of
    /// the policy, and how large the kernel pool of volumes has to become.
    ///
    /// While volumes count for too much by that percentage, the least stays by which they do not, and nothing more is promised
    /// to anybody. What the kernel pool of volumes may have become already is not left to images.
    #[must_use]
    pub fn covering<'p>(&self, before: Overcommit, promises: impl IntoIterator<Item = &'p Promise>) -> Self {
        let sums = Sums::of(promises);
        let percent = self.percent_for(before, &sums);
        let mut bounds = Self { overcommit: Overcommit { percent, attain: Bytes::ZERO }, ..*self };
        if percent > self.overcommit.percent {
            bounds.volumes.data = bounds.volumes.data.min(sums.data(Area::Volumes, percent));
            bounds.total.data = bounds.total.data.min(sums.data(Area::Total, percent));
        }
        if before.is_over() || bounds.overcommit.is_over() {
            let attain = self.attain_for(before, percent, &sums);
            bounds.images.data = bounds.images.data.min(self.total.data.saturating_sub(attain));
            bounds.overcommit.attain = if bounds.overcommit.is_over() { attain } else { Bytes::ZERO };
        }
        bounds.raised_to(&sums)
    }

    /// The policy's percentage; where promises do not fit by that, one between it and what the ledger has.
    fn percent_for(&self, before: Overcommit, sums: &Sums) -> Percent {
        let (promised, images) = (sums.promised_to_volumes(), sums.data(Area::Images, Percent::WHOLE));
        let bound = self.volumes.data.min(self.total.data.saturating_sub(images));
        let least = Percent::least(promised, bound);
        least.min(before.percent).max(self.overcommit.percent)
    }

    /// How large the kernel pool of volumes may become from now on, or may have become by what the ledger said before.
    fn attain_for(&self, before: Overcommit, percent: Percent, sums: &Sums) -> Bytes {
        let images = sums.data(Area::Images, Percent::WHOLE);
        let wanted = self.overcommit.attain.min(self.total.data.saturating_sub(images));
        let counted =
            if before.percent < percent { sums.data(Area::Volumes, before.percent) } else { Bytes::ZERO };
        wanted.max(before.attain).max(counted)
    }
}

impl LedgerView {
    /// How large the kernel pool of volumes may become at most beside what images are promised now.
    pub fn attainable_by_volumes(&self) -> Bytes {
        let images = Sums::of(self.promises.values()).data(Area::Images, Percent::WHOLE);
        self.capacity.volumes.data.min(self.capacity.total.data.saturating_sub(images))
    }
}

#[cfg(test)]
#[path = "overcommit_tests.rs"]
mod tests;
