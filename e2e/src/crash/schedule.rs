//! Whose turn it is: every kind is cut equally often, in every way.

use std::collections::BTreeMap;

use super::bed::Cut;
use super::step::Kind;
use crate::seeded::Seeded;

/// How long a step takes until it was measured. Unit: milliseconds.
const UNKNOWN: u64 = 800;

/// What is left to do, for all histories together.
#[derive(Debug)]
pub struct Schedule {
    left: u64,
    kinds: Vec<Kind>,
    ways: Vec<Cut>,
    given: BTreeMap<Kind, u64>,
    usual: BTreeMap<Kind, u64>,
}

impl Schedule {
    /// So many cuts, of these kinds and in these ways.
    pub fn new(cuts: u64, kinds: &[Kind], ways: &[Cut]) -> Self {
        let (given, usual) = (BTreeMap::new(), BTreeMap::new());
        Self { left: cuts, kinds: kinds.to_vec(), ways: ways.to_vec(), given, usual }
    }

    /// The next cut: of a kind that is `ready` if any is, and was cut least. `None` when all were given.
    pub fn next(&mut self, seeded: &mut Seeded, ready: impl Fn(Kind) -> bool) -> Option<(Kind, Cut)> {
        self.left = self.left.checked_sub(1)?;
        let given = |kind: Kind| self.given.get(&kind).copied().unwrap_or_default();
        let any = self.kinds.iter().any(|kind| ready(*kind) && given(*kind) <= self.least());
        let fitting = self.kinds.iter().copied().filter(|kind| given(*kind) == self.least());
        let fitting: Vec<Kind> = fitting.filter(|kind| !any || ready(*kind)).collect();
        let kind = fitting[index(seeded, fitting.len())];
        *self.given.entry(kind).or_default() += 1;
        Some((kind, self.ways[index(seeded, self.ways.len())]))
    }

    /// Nothing more is to be done.
    pub fn stop(&mut self) {
        self.left = 0;
    }

    /// Whether all were given.
    pub const fn is_done(&self) -> bool {
        self.left == 0
    }

    /// How long a step of this kind takes. Unit: milliseconds.
    pub fn usual(&self, kind: Kind) -> u64 {
        self.usual.get(&kind).copied().unwrap_or(UNKNOWN)
    }

    /// Takes in how long one took.
    pub fn took(&mut self, kind: Kind, millis: u64) {
        let usual = self.usual.entry(kind).or_insert(millis);
        *usual = (3 * *usual + millis) / 4;
    }

    fn least(&self) -> u64 {
        self.kinds
            .iter()
            .map(|kind| self.given.get(kind).copied().unwrap_or_default())
            .min()
            .unwrap_or_default()
    }
}

fn index(seeded: &mut Seeded, length: usize) -> usize {
    usize::try_from(seeded.between(0, length as u64 - 1)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_turn_equally_often() {
        let mut schedule = Schedule::new(80, &Kind::ALL, &Cut::ALL);
        let mut seeded = Seeded::new(1);
        while let Some((kind, _)) = schedule.next(&mut seeded, |kind| kind != Kind::Write) {
            assert!(Kind::ALL.contains(&kind));
        }
        assert!(schedule.is_done());
        assert!(schedule.given.values().all(|given| *given == 5), "{:?}", schedule.given);
        schedule.took(Kind::Write, 100);
        schedule.took(Kind::Write, 200);
        assert_eq!((schedule.usual(Kind::Write), schedule.usual(Kind::Start)), (125, UNKNOWN));
    }
}
