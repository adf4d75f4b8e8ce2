//! Pseudo-random numbers that a seed determines, so that a run can be repeated.

use std::time::Duration;

/// The splitmix64 generator.
#[derive(Debug, Clone)]
pub struct Seeded(u64);

impl Seeded {
    /// A generator; equal seeds give equal numbers.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A generator for part `part` of what this seed determines, independent of how many numbers others drew.
    pub fn part(seed: u64, part: u64) -> Self {
        let mut mixer = Self(seed ^ part.wrapping_mul(0xd6e8_feb8_6659_fd93));
        Self(mixer.draw())
    }

    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.draw() % (high - low + 1)
    }

    /// A time from `low` to `high` milliseconds, both included.
    pub fn millis(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_millis(self.between(low, high))
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.draw() % 100 < percent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_give_equal_numbers_within_their_bounds() {
        let (mut one, mut two) = (Seeded::part(7, 3), Seeded::part(7, 3));
        for _ in 0..1000 {
            let number = one.between(5, 9);
            assert!((5..=9).contains(&number));
            assert_eq!(number, two.between(5, 9));
        }
        assert_ne!(Seeded::part(7, 3).draw(), Seeded::part(7, 4).draw());
    }
}
