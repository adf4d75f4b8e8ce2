//! Importing an image: source → reservation → chunks in an image store, verified and published.
//!
//! Everything here works without Kubernetes; the agent and `berth-node template import` call the same functions.
//!
//! **Memory**: one window of the uploader (8 MiB at 256 KiB chunks), the image reader's (about 10 MiB), and 16 pieces of
//! the source's stream; nothing grows with the image. Pages of the files are let go of after every window.
//!
//! **Stopping**: by the token. Everything stays, and the next start goes on from the last checkpoint. When [`import`] has
//! returned, no thread of it is at work any more; whoever drops its future instead must not start it again in the same
//! process before those threads have ended.

pub mod error;
pub mod fetch;
pub mod job;
pub mod journal;
mod name;
mod pages;
pub mod probe;
pub mod run;
pub mod upload;

use std::sync::Arc;
use std::time::Duration;

use berth_core::retry::{Retry, after};
use berth_objectstore::ObjectStore;
use berth_objectstore::chunks::store::ChunkStore;
use tokio_util::sync::CancellationToken;

pub use error::ImportError;
pub use fetch::Origin;
pub use job::{Durable, ImportJob, Limits, Probed, Reporter, Snapshot};
pub use journal::Journal;
pub use probe::probe_source;
use run::Attempt;

/// Deliberate defects, which the safety commands must notice; see [`crate::sabotage`].
pub const SABOTAGES: &[&str] = &[
    "ready-before-verified", // success is told before anything is in the store
    "no-checkpoint",         // nothing is recorded, so every kill costs everything
    "skip-verify",           // what was sent is taken to be there
    "keep-session",          // the session stays in the store
    "keep-files",            // the reservation's files stay
    "no-generation-check",   // whoever comes late goes on regardless
    "stale-hash",            // after a resume, the sum covers the rest only
];

/// Who is told of the attempts of an import.
pub trait Observer: Send + Sync {
    /// An attempt begins; 1 is the first since this program started.
    fn attempt(&self, number: u32);
    /// It failed and is tried again after a pause.
    fn retrying(&self, error: &ImportError, pause: Duration);
}

/// Imports, trying again whatever may pass, until it is durable or cannot be.
///
/// # Errors
/// The one that ended it; [`ImportError::Cancelled`] if `cancel` did: then everything stays for the next start.
pub async fn import<S: ObjectStore>(
    job: &ImportJob,
    origin: &Origin,
    chunks: &ChunkStore<S>,
    journal: &Journal,
    reporter: &Arc<dyn Reporter>,
    observer: &dyn Observer,
    cancel: &CancellationToken,
) -> Result<Durable, ImportError> {
    let mut failures = 0;
    let mut attempts = 0;
    loop {
        attempts += 1;
        observer.attempt(attempts);
        let before = journal.reached();
        let attempt = Attempt { job, origin, chunks, journal, reporter };
        let outcome = cancel.run_until_cancelled(attempt.run()).await;
        journal.idle().await;
        let error = match outcome {
            None => return Err(ImportError::Cancelled),
            Some(Ok(durable)) => return Ok(durable),
            Some(Err(error)) if !error.is_transient() || error.is_superseded() => return Err(error),
            Some(Err(error)) => error,
        };
        // Whatever came nearer to the end than ever before is a reason to hope.
        failures = if journal.reached() > before { 1 } else { failures + 1 };
        let Retry::After(millis) = after(failures, job.limits.retries) else {
            return Err(ImportError::Exhausted { attempts, source: Box::new(error) });
        };
        let pause = Duration::from_millis(millis);
        tracing::warn!(error = error.chain(), ?pause, failures, "the import is tried again");
        observer.retrying(&error, pause);
        if cancel.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return Err(ImportError::Cancelled);
        }
    }
}

/// Takes back what a failed or abandoned import has left: its session, its files, its place in the record.
/// With `published`, also the name that it gave its image.
pub async fn abandon<S: ObjectStore>(
    job: &ImportJob,
    chunks: &ChunkStore<S>,
    journal: &Journal,
    published: bool,
) -> Result<(), ImportError> {
    // First: one that is cut off here and run again after all must begin anew, not look for the session that it had.
    journal.forget().await?;
    run::end_session(chunks, job).await?;
    if published {
        chunks.forget(&job.name, &job.uid).await?;
    }
    run::remove_files(job, journal).await
}
