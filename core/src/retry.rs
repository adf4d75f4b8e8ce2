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
    let doublings = failures.saturating_sub(1).min(20);
    Retry::After((FIRST_MILLIS << doublings).min(LONGEST_MILLIS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_longest_and_ends() {
        assert_eq!(after(1, 10), Retry::After(1_000));
        assert_eq!(after(4, 10), Retry::After(8_000));
        assert_eq!(after(10, 10), Retry::After(300_000));
        assert_eq!(after(11, 10), Retry::Exhausted);
        assert_eq!(after(1, 0), Retry::Exhausted);
        assert_eq!(after(u32::MAX, u32::MAX), Retry::After(300_000));
    }
}
