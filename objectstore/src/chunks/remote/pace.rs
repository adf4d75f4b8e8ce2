//! How fast the background may go. Pure.

use std::time::Duration;

use berth_core::units::Bytes as Size;
use tokio::time::Instant;

/// A rate that holds on average: what was spent is waited for before the next begins.
#[derive(Debug)]
pub(super) struct Pace {
    rate: Option<Size>,
    free_at: Instant,
}

impl Pace {
    /// Without a limit.
    pub(super) fn new(now: Instant) -> Self {
        Self { rate: None, free_at: now }
    }

    /// Sets the limit, in bytes per second; nothing is none, and zero counts as one byte. What was spent before is forgiven.
    pub(super) fn set(&mut self, rate: Option<Size>, now: Instant) {
        (self.rate, self.free_at) = (rate, now);
    }

    /// Takes note of bytes that were fetched.
    pub(super) fn spend(&mut self, bytes: Size, now: Instant) {
        if let Some(rate) = self.rate {
            let took = Duration::from_secs_f64(precise(bytes) / precise(rate).max(1.0));
            self.free_at = self.free_at.max(now) + took.min(Duration::from_secs(3600));
        }
    }

    /// When the next may begin.
    pub(super) fn free_at(&self) -> Instant {
        self.free_at
    }
}

#[allow(clippy::cast_precision_loss)] // sizes of chunks and rates are far below 2^53
fn precise(bytes: Size) -> f64 {
    bytes.0 as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_holds_and_idle_time_is_not_saved_up() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        pace.spend(Size::gib(1), start);
        assert_eq!(pace.free_at(), start, "no limit");
        pace.set(Some(Size::mib(1)), start);
        pace.spend(Size::mib(2), start);
        pace.spend(Size::mib(1), start);
        assert_eq!(pace.free_at(), start + Duration::from_secs(3));
        let later = start + Duration::from_secs(100);
        pace.spend(Size::mib(1), later);
        assert_eq!(pace.free_at(), later + Duration::from_secs(1));
    }
}
