//! The parts of an image that were fetched last.

use std::ops::Range;

use bytes::Bytes as Buffer;

/// The most that is fetched at once beyond what is asked for. A request over a network takes some 20 ms before its first
/// byte comes, as long as 2 MiB take at 1 Gbit/s.
pub(super) const AHEAD: u64 = 4 << 20;
/// The widest gap that is fetched with its neighbours: a second request would take longer.
pub(super) const GAP: u64 = 256 << 10;
/// How much is kept of what was fetched before: some of it may have its turn later.
const KEPT: u64 = 2 << 20;

/// So many parts are held: writers of compressed images put what they cannot compress apart, so one reads in two places.
const WINDOWS: usize = 2;

/// What is held, the most recently used one last.
#[derive(Default)]
pub(super) struct Windows(Vec<Window>);

struct Window {
    start: u64,
    bytes: Buffer,
}

impl Windows {
    pub fn holds(&self, range: &Range<u64>) -> bool {
        self.0.iter().any(|window| window.holds(range))
    }

    /// The bytes of a range that they [`hold`](Self::holds); none of another one.
    pub fn get(&mut self, range: &Range<u64>) -> Buffer {
        let Some(number) = self.0.iter().position(|window| window.holds(range)) else {
            return Buffer::new();
        };
        self.0[number..].rotate_left(1);
        self.0.last().map(|window| window.get(range)).unwrap_or_default()
    }

    /// What one of them holds from `at` on.
    pub fn from(&mut self, at: u64) -> &[u8] {
        let Some(number) = self.0.iter().position(|window| !window.from(at).is_empty()) else { return &[] };
        self.0[number..].rotate_left(1);
        self.0.last().map(|window| window.from(at)).unwrap_or_default()
    }

    /// What must be fetched of a range that they do not hold: the rest, if it goes on from one of them.
    pub fn missing(&self, range: &Range<u64>) -> Range<u64> {
        match self.0.iter().find(|window| window.goes_on(range)) {
            Some(window) => window.end()..range.end,
            None => range.clone(),
        }
    }

    /// Takes what was [`missing`](Self::missing) of a range. What was used longest ago goes.
    pub fn put(&mut self, range: &Range<u64>, bytes: Buffer) {
        if let Some(number) = self.0.iter().position(|window| window.goes_on(range)) {
            let window = self.0.remove(number);
            self.0.push(window.moved(range, bytes));
            return;
        }
        if self.0.len() == WINDOWS {
            self.0.remove(0);
        }
        self.0.push(Window { start: range.start, bytes });
    }
}

impl Window {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn holds(&self, range: &Range<u64>) -> bool {
        range.start >= self.start && range.end <= self.end()
    }

    fn get(&self, range: &Range<u64>) -> Buffer {
        let within = |at: u64| usize::try_from(at - self.start).unwrap_or(usize::MAX);
        self.bytes.slice(within(range.start)..within(range.end))
    }

    fn from(&self, at: u64) -> &[u8] {
        let within = at.checked_sub(self.start).and_then(|within| usize::try_from(within).ok());
        within.and_then(|within| self.bytes.get(within..)).unwrap_or_default()
    }

    fn goes_on(&self, range: &Range<u64>) -> bool {
        (self.start..=self.end()).contains(&range.start) && range.end > self.end()
    }

    /// With what follows it, up to the end of a range that goes on from it.
    fn moved(&self, range: &Range<u64>, bytes: Buffer) -> Self {
        let start = range.start.min(self.end().saturating_sub(KEPT)).max(self.start);
        let kept = self.from(start);
        Self { start, bytes: if kept.is_empty() { bytes } else { [kept, &bytes].concat().into() } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Fetches a range of an image whose every byte is the MiB that it lies in; what is fetched.
    fn fetch(windows: &mut Windows, range: Range<u64>) -> Range<u64> {
        let missing = windows.missing(&range);
        let bytes: Vec<u8> = missing.clone().map(|at| (at / MIB).to_le_bytes()[0]).collect();
        windows.put(&range, bytes.into());
        for (byte, at) in windows.get(&range).iter().zip(range) {
            assert_eq!(u64::from(*byte), at / MIB);
        }
        missing
    }

    fn held(windows: &Windows) -> Vec<(u64, u64)> {
        windows.0.iter().map(|window| (window.start / MIB, window.end() / MIB)).collect()
    }

    #[test]
    fn what_goes_on_is_joined_and_what_was_used_last_stays() {
        let mut windows = Windows::default();
        assert!(windows.from(5).is_empty() && windows.get(&(0..5)).is_empty());
        assert_eq!(fetch(&mut windows, 5 * MIB..9 * MIB), 5 * MIB..9 * MIB);
        assert_eq!(fetch(&mut windows, 8 * MIB..12 * MIB), 9 * MIB..12 * MIB);
        assert_eq!(held(&windows), [(7, 12)]);
        assert_eq!(fetch(&mut windows, 12 * MIB..13 * MIB), 12 * MIB..13 * MIB);
        assert_eq!(fetch(&mut windows, 10 * MIB..14 * MIB), 13 * MIB..14 * MIB);
        assert_eq!(held(&windows), [(10, 14)]);
        assert_eq!(fetch(&mut windows, 30 * MIB..31 * MIB), 30 * MIB..31 * MIB);
        assert_eq!(fetch(&mut windows, 14 * MIB..15 * MIB), 14 * MIB..15 * MIB);
        assert_eq!(held(&windows), [(30, 31), (12, 15)]);
        assert_eq!(windows.from(30 * MIB + 1), &vec![30; (1 << 20) - 1]);
        // Before the other one, so none goes on.
        assert_eq!(fetch(&mut windows, 11 * MIB..13 * MIB), 11 * MIB..13 * MIB);
        assert_eq!(held(&windows), [(30, 31), (11, 13)]);
    }
}
