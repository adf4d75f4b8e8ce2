//! Importing an image: source → reservation → chunks in an image store, verified and published.
//!
//! Everything here works without Kubernetes; the agent and `berth-node template import` make the same attempts, each in a loop of its own.
//!
//! **Memory**: one window of the uploader (8 MiB at 256 KiB chunks), the image reader's (about 10 MiB) and 8 pieces that it
//! is ahead, and 16 pieces of the source's stream; nothing grows with the image. Pages of the files are let go of after every window.
//!
//! **Stopping**: by the token. Everything stays, and the next start goes on from the last checkpoint. When [`import`] or
//! [`attempt`] has returned, no thread of it is at work any more; whoever drops its future instead must not start it again
//! in the same process before those threads have ended.

mod content;
mod direct;
pub mod error;
pub mod fetch;
pub mod job;
pub mod journal;
mod name;
mod object;
mod pages;
pub mod probe;
mod ranges;
pub mod run;
mod stage;
pub mod upload;

use std::sync::Arc;
use std::time::Duration;

use berth_core::retry::{Failures, Next};
use berth_objectstore::ObjectStore;
use berth_objectstore::chunks::store::ChunkStore;
use tokio_util::sync::CancellationToken;

pub use direct::{Direct, Source, unpin};
pub use error::{TransferError, source_reason, store_reason};
pub use fetch::Origin;
pub use job::{CONVERSION_WINDOW, Durable, Limits, Probed, Reporter, SentObject, Snapshot, TransferJob};
pub use journal::Journal;
pub use object::{Claim, ObjectAttempt, ObjectTarget, abandon_object, send};
pub(crate) use pages::release;
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
    "keep-upload",           // the upload of an object stays in the store
];

/// Who is told of the attempts of an import.
pub trait Observer: Send + Sync {
    /// An attempt begins; 1 is the first since this program started.
    fn attempt(&self, number: u32);
    /// It failed and is tried again after a pause.
    fn retrying(&self, error: &TransferError, pause: Duration);
}

/// Imports, trying again whatever may pass, until it is durable or cannot be: for an image store that is away without
/// end, for everything else as often as the job allows.
///
/// # Errors
/// The one that ended it; [`TransferError::Cancelled`] if `cancel` did: then everything stays for the next start.
pub async fn import<S: ObjectStore>(
    job: &TransferJob,
    source: &Source,
    chunks: &ChunkStore<S>,
    journal: &Journal,
    reporter: &Arc<dyn Reporter>,
    observer: &dyn Observer,
    cancel: &CancellationToken,
) -> Result<Durable, TransferError> {
    let retries = job.limits.retries;
    again(journal, retries, observer, cancel, || attempt(job, source, chunks, journal, reporter, cancel))
        .await
}

/// Makes attempts until one succeeds, or what it fails on does not pass: for an image store that is away without end, for
/// everything else `retries` times in a row without coming nearer to the end.
///
/// # Errors
/// As [`import`].
pub async fn again<T, F: Future<Output = Result<T, TransferError>>>(
    journal: &Journal,
    retries: u32,
    observer: &dyn Observer,
    cancel: &CancellationToken,
    mut attempt: impl FnMut() -> F,
) -> Result<T, TransferError> {
    let mut failures = Failures::default();
    let mut attempts = 0;
    loop {
        attempts += 1;
        observer.attempt(attempts);
        let before = journal.reached();
        let error = match attempt().await {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        let millis = match failures.note(error.fault(), journal.reached() > before, retries) {
            Next::Again(millis) => millis,
            Next::Exhausted => return Err(TransferError::Exhausted { attempts, source: Box::new(error) }),
            Next::Ended => return Err(error),
        };
        let pause = Duration::from_millis(millis);
        tracing::warn!(error = error.chain(), ?pause, attempts, "tried again");
        observer.retrying(&error, pause);
        if cancel.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return Err(TransferError::Cancelled);
        }
    }
}

/// Tries once, from wherever the journal says it is.
///
/// # Errors
/// What it failed on; [`TransferError::fault`] says how it goes on. [`TransferError::Cancelled`] if `cancel` ended it: then
/// everything stays for the next start.
pub async fn attempt<S: ObjectStore>(
    job: &TransferJob,
    source: &Source,
    chunks: &ChunkStore<S>,
    journal: &Journal,
    reporter: &Arc<dyn Reporter>,
    cancel: &CancellationToken,
) -> Result<Durable, TransferError> {
    let attempt = Attempt { job, source, chunks, journal, reporter };
    let outcome = cancel.run_until_cancelled(attempt.run()).await;
    journal.idle().await;
    outcome.unwrap_or(Err(TransferError::Cancelled))
}

/// Takes back what a failed or abandoned import has left: its session, its files, its place in the record.
/// With `published`, also the name that it gave its image.
pub async fn abandon<S: ObjectStore>(
    job: &TransferJob,
    chunks: &ChunkStore<S>,
    journal: &Journal,
    published: bool,
) -> Result<(), TransferError> {
    // First: one that is cut off here and run again after all must begin anew, not look for the session that it had.
    journal.forget().await?;
    run::end_session(chunks, job).await?;
    if published {
        chunks.forget(&job.name, &job.uid).await?;
    }
    run::remove_files(job, journal).await
}
