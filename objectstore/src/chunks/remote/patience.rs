//! Asking a store again and again, for a time.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::counters::{Counters, add};
use super::health::Observed;
use crate::StoreError;

/// The pauses between attempts, with some chance in them: many servers may have met the same failure.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Why there is no answer.
pub(super) enum GivenUp {
    /// The store says that asking again does not help.
    Final(StoreError),
    /// The time is over. What the store said last.
    Late(String),
}

/// How long a store is asked, and who is told.
pub(super) struct Patience<'a> {
    /// When it ends.
    pub until: Instant,
    /// How long one attempt may take, all of the answer included.
    pub attempt: Duration,
    /// Told of failures and of their end.
    pub observed: &'a Observed,
    /// Told of attempts that are repeated.
    pub counters: &'a Counters,
}

impl Patience<'_> {
    /// Asks until there is an answer, or until nothing is to be expected.
    pub(super) async fn ask<T, F>(&self, mut attempt: impl FnMut() -> F) -> Result<T, GivenUp>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let pauses = ExponentialBuilder::new()
            .with_min_delay(FIRST_PAUSE)
            .with_max_delay(LONGEST_PAUSE)
            .with_jitter()
            .without_max_times();
        let mut pauses = pauses.build();
        loop {
            let limit = self.until.min(Instant::now() + self.attempt);
            let said = match timeout_at(limit, attempt()).await {
                Ok(Ok(answer)) => {
                    self.observed.answered();
                    return Ok(answer);
                }
                Ok(Err(error)) if is_final(&error) => {
                    self.observed.answered();
                    return Err(GivenUp::Final(error));
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no answer within {} s", self.attempt.as_secs_f32()),
            };
            self.observed.stalled(&said);
            let next = Instant::now() + pauses.next().unwrap_or(LONGEST_PAUSE);
            if next >= self.until {
                return Err(GivenUp::Late(said));
            }
            sleep_until(next).await;
            add(&self.counters.retries, 1);
        }
    }
}

/// True if asking again does not help. Access may be granted again, and a bucket come back, while guests wait.
fn is_final(error: &StoreError) -> bool {
    match error {
        StoreError::NotFound { .. }
        | StoreError::TooLarge { .. }
        | StoreError::InvalidRequest { .. }
        | StoreError::Unsupported { .. } => true,
        StoreError::NoSuchBucket { .. }
        | StoreError::AccessDenied { .. }
        | StoreError::Full { .. }
        | StoreError::PreconditionFailed { .. }
        | StoreError::BadDigest { .. }
        | StoreError::Unavailable { .. }
        | StoreError::LocalFile { .. } => false,
    }
}
