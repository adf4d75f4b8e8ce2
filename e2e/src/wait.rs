//! Bounded waiting: every wait of a test has a limit and says what it last saw.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

/// Time between two looks. Unit: milliseconds.
const PAUSE: Duration = Duration::from_millis(50);

/// What one look at an awaited thing says.
#[derive(Debug)]
pub enum Look<T, E> {
    /// It has come about.
    Done(T),
    /// Not yet; in words what was seen instead.
    NotYet(String),
    /// It can never come about.
    Failed(E),
}

/// Why an awaited thing did not come about.
#[derive(Debug, thiserror::Error)]
pub enum WaitError<E> {
    /// The limit passed; `last` is what the last look saw.
    #[error("waited {limit:?} for {what}; last seen: {last}")]
    TimedOut {
        /// The awaited thing.
        what: String,
        /// How long it was waited for.
        limit: Duration,
        /// What the last look saw.
        last: String,
    },
    /// A look found that it can never come about.
    #[error("gave up waiting for {what}")]
    Failed {
        /// The awaited thing.
        what: String,
        /// Why it cannot come about.
        source: E,
    },
}

/// Looks every 50 ms until `look` says [`Look::Done`], for `limit` at most; a look that hangs is cut off there too.
///
/// # Errors
/// [`WaitError::TimedOut`] at the limit, [`WaitError::Failed`] as soon as a look says so.
pub async fn until<T, E, F, Fut>(what: &str, limit: Duration, mut look: F) -> Result<T, WaitError<E>>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Look<T, E>>,
{
    let deadline = Instant::now() + limit;
    let mut last = "nothing".to_owned();
    while let Ok(seen) = timeout_at(deadline, look()).await {
        match seen {
            Look::Done(value) => return Ok(value),
            Look::Failed(source) => return Err(WaitError::Failed { what: what.to_owned(), source }),
            Look::NotYet(words) => last = words,
        }
        if Instant::now() >= deadline {
            break;
        }
        sleep(PAUSE).await;
    }
    Err(WaitError::TimedOut { what: what.to_owned(), limit, last })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_look_that_hangs_is_cut_off_at_the_limit() {
        let started = Instant::now();
        let waited =
            until::<(), std::fmt::Error, _, _>("a pending future", Duration::from_millis(80), || {
                std::future::pending()
            })
            .await;
        assert!(matches!(waited, Err(WaitError::TimedOut { .. })));
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[tokio::test]
    async fn the_last_sight_is_told() {
        let mut looks = 0;
        let waited = until::<(), std::fmt::Error, _, _>("nothing ever", Duration::from_millis(120), || {
            looks += 1;
            std::future::ready(Look::NotYet(format!("look {looks}")))
        })
        .await;
        let message = waited.unwrap_err().to_string();
        assert!(looks >= 2 && message.ends_with(&format!("look {looks}")), "{message}");
    }
}
