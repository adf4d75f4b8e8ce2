//! When a fault that passes is tried again.

/// The first pause, in milliseconds.
const FIRST_MILLIS: u64 = 1_000;
/// The longest pause, in milliseconds.
const LONGEST_MILLIS: u64 = 300_000;

/// What to do after a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Again, after this many milliseconds.
    After(u64),
    /// Not again.
    Exhausted,
}

/// After `failures` attempts in a row without progress (1 is the first) when `limit` retries are allowed: the pause
/// doubles from 1 s up to 5 min.
pub fn after(failures: u32, limit: u32) -> Retry {
    if failures > limit {
        return Retry::Exhausted;
    }
    Retry::After(pause(failures))
}

/// The pause after so many failures in a row, in milliseconds.
fn pause(failures: u32) -> u64 {
    let doublings = failures.saturating_sub(1).min(20);
    (FIRST_MILLIS << doublings).min(LONGEST_MILLIS)
}

/// What an attempt to bring an image into its store failed on, as far as it decides how it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The image store was not reached, or said that it cannot now. What has been done so far waits for it, however long.
    StoreAway,
    /// Something else that may pass by itself, as a source that does not answer. It gets as many retries as are allowed.
    Passing,
    /// Nothing that passes by itself.
    Lasting,
}

/// How it goes on after a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Again, after this many milliseconds.
    Again(u64),
    /// Not again: it was tried as often as allowed.
    Exhausted,
    /// Not again: it would fail the same way.
    Ended,
}

/// The failed attempts of one piece of work, as far as they count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Failures {
    /// For a reason of their own, since it last came nearer to its end.
    counted: u32,
    /// For an image store that was away, in a row.
    away: u32,
}

impl Failures {
    /// Takes note of a failed attempt, and says how it goes on. `progressed` if the attempt came nearer to the end than
    /// any before, which is a reason to hope: then it counts as the first. `limit` is how many retries are allowed in a
    /// row without progress; those for a store that is away are not among them, and neither use them up nor give them
    /// back.
    pub fn note(&mut self, fault: Fault, progressed: bool, limit: u32) -> Next {
        if progressed {
            *self = Self::default();
        }
        match fault {
            Fault::StoreAway => {
                self.away = self.away.saturating_add(1);
                Next::Again(pause(self.away))
            }
            Fault::Passing => {
                self.away = 0;
                self.counted = self.counted.saturating_add(1);
                match after(self.counted, limit) {
                    Retry::After(millis) => Next::Again(millis),
                    Retry::Exhausted => Next::Exhausted,
                }
            }
            Fault::Lasting => Next::Ended,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a49_doubles_up_to_the_longest_and_ends() {
        assert_eq!(after(1, 10), Retry::After(1_000));
        assert_eq!(after(4, 10), Retry::After(8_000));
        assert_eq!(after(10, 10), Retry::After(300_000));
        assert_eq!(after(11, 10), Retry::Exhausted);
        assert_eq!(after(1, 0), Retry::Exhausted);
        assert_eq!(after(u32::MAX, u32::MAX), Retry::After(300_000));
    }

    #[test]
    fn a50_a_store_that_is_away_is_waited_for_however_long() {
        let mut failures = Failures::default();
        for limit in [0, 2] {
            let pauses: Vec<_> = (0..1000).map(|_| failures.note(Fault::StoreAway, false, limit)).collect();
            assert!(pauses.iter().all(|next| matches!(next, Next::Again(1_000..=300_000))), "{pauses:?}");
            assert_eq!(pauses.last(), Some(&Next::Again(300_000)));
        }
        assert_eq!(failures.note(Fault::StoreAway, true, 0), Next::Again(1_000), "it was there in between");
        assert_eq!(failures.note(Fault::StoreAway, false, 0), Next::Again(2_000));
        failures.away = u32::MAX;
        assert_eq!(failures.note(Fault::StoreAway, false, 0), Next::Again(300_000));
    }

    #[test]
    fn other_faults_have_as_many_retries_as_are_allowed_in_a_row() {
        let mut failures = Failures::default();
        assert_eq!(failures.note(Fault::Passing, false, 2), Next::Again(1_000));
        assert_eq!(failures.note(Fault::Passing, false, 2), Next::Again(2_000));
        assert_eq!(failures.note(Fault::Passing, true, 2), Next::Again(1_000), "it came nearer to its end");
        assert_eq!(failures.note(Fault::Passing, false, 2), Next::Again(2_000));
        assert_eq!(failures.note(Fault::Passing, false, 2), Next::Exhausted);
        assert_eq!(Failures::default().note(Fault::Passing, false, 0), Next::Exhausted);
    }

    #[test]
    fn a_store_that_is_away_in_between_neither_uses_retries_up_nor_gives_them_back() {
        let mut failures = Failures::default();
        for counted in 1..=3 {
            for _ in 0..50 {
                assert!(matches!(failures.note(Fault::StoreAway, false, 3), Next::Again(_)));
            }
            assert_eq!(failures.note(Fault::Passing, false, 3), Next::Again(1_000 << (counted - 1)));
        }
        assert_eq!(failures.note(Fault::StoreAway, false, 3), Next::Again(1_000), "the first in a row again");
        assert_eq!(failures.note(Fault::Passing, false, 3), Next::Exhausted);
    }

    #[test]
    fn what_does_not_pass_ends_at_once() {
        let mut failures = Failures::default();
        failures.note(Fault::StoreAway, false, 9);
        for progressed in [false, true] {
            assert_eq!(failures.note(Fault::Lasting, progressed, u32::MAX), Next::Ended);
        }
    }
}
