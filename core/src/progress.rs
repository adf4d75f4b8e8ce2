//! When progress is worth a write to the API server: never more often than every 2 s, only for a percent or a new stage,
//! and never below what was said before.

use serde::{Deserialize, Serialize};

use crate::stages::Stage;
use crate::units::Timestamp;

/// The shortest pause between two writes, in milliseconds.
const PAUSE_MILLIS: u64 = 2_000;

/// What was said last. Kept across restarts, so that progress never falls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Said {
    /// Percent of the whole.
    pub percent: u8,
    /// The stage.
    pub stage: Option<Stage>,
    /// When it was said; unknown after a restart.
    #[serde(skip)]
    pub at: Option<Timestamp>,
}

impl Said {
    /// What to say now, or `None` if it is too early or nothing new. A lower percent than before is said as before.
    #[must_use]
    pub fn next(self, percent: u8, stage: Stage, now: Timestamp) -> Option<Self> {
        let percent = percent.max(self.percent);
        let too_early = self.at.is_some_and(|at| now.millis_since(at) < PAUSE_MILLIS);
        let new_stage = self.stage.is_none_or(|said| said < stage);
        if too_early || (percent == self.percent && !new_stage) {
            return None;
        }
        let stage = self.stage.map_or(stage, |said| said.max(stage));
        Some(Self { percent, stage: Some(stage), at: Some(now) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_a_percent_or_a_stage_and_waits_between() {
        let said = Said::default().next(0, Stage::Fetch, Timestamp(0)).expect("the first stage is news");
        assert_eq!(said.next(50, Stage::Fetch, Timestamp(1_999)), None, "too early");
        assert_eq!(said.next(0, Stage::Fetch, Timestamp(9_000)), None, "nothing new");
        let said = said.next(1, Stage::Fetch, Timestamp(2_000)).expect("a percent");
        assert_eq!(said.percent, 1);
        assert!(said.next(1, Stage::Upload, Timestamp(4_000)).is_some(), "a new stage");
    }

    #[test]
    fn never_falls_also_after_a_resume() {
        let said = Said { percent: 70, stage: Some(Stage::Upload), at: None };
        assert_eq!(said.next(3, Stage::Fetch, Timestamp(0)), None);
        let later = said.next(71, Stage::Fetch, Timestamp(0)).expect("more than before");
        assert_eq!((later.percent, later.stage), (71, Some(Stage::Upload)));
    }
}
