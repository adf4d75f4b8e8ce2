//! A transfer's record on the node: how far it is, so that a kill at any instruction costs one checkpoint window.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use berth_core::ids::{Digest, Uid};
use berth_core::stages::Shape;
use berth_core::units::{Bytes, Generation, Timestamp};
use berth_record::{ChangeError, JobEntry, NodeRecord, tables};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::error::TransferError;
use super::job::{Durable, SentObject};
use super::object::Sending;

/// The kind of a transfer's entry among the node's jobs.
pub const KIND: &str = "transfer";

/// How far a transfer is. Each state carries what is true in it, and nothing else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "phase")]
pub enum Phase {
    /// Nothing is done.
    #[default]
    Begun,
    /// `offset` bytes of the source are on the disk, synced.
    Fetching {
        /// What its head told.
        shape: Shape,
        /// The version that is read.
        version: String,
        /// How much is there.
        offset: Bytes,
        /// The state of the running SHA-256 over those bytes.
        hash: Vec<u8>,
    },
    /// The source is read where it lies. The upload's own checkpoint lies in its session.
    Reading {
        /// What is known of it.
        shape: Shape,
        /// The version that is read, or the digest of the image that it is.
        version: String,
        /// True if it is in a format that is read by ranges, and not front to back.
        #[serde(default)]
        by_ranges: bool,
    },
    /// All of the source is on the disk, synced and checked.
    Fetched {
        /// The sum of its bytes.
        source_digest: Digest,
        /// What is to be done with it.
        shape: Shape,
    },
    /// `offset` bytes of the raw image are on the disk, synced.
    Converting {
        /// The sum of the source's bytes.
        source_digest: Digest,
        /// What is to be done with it.
        shape: Shape,
        /// How much is there.
        offset: Bytes,
    },
    /// The raw image is on the disk, synced. The upload's own checkpoint lies in its session.
    Converted {
        /// The sum of the source's bytes.
        source_digest: Digest,
        /// What is to be done with it.
        shape: Shape,
    },
    /// An upload is to be begun: one that is not among these and has no part may be ours, whose answer was lost.
    Beginning {
        /// Where the image is: one of the three before.
        ready: Box<Phase>,
        /// The uploads to the same key that there were.
        known: Vec<String>,
    },
    /// Parts of an object are in its store.
    Sending {
        /// Where the image is: one of the three before.
        ready: Box<Phase>,
        /// How far its upload is.
        sending: Sending,
    },
    /// The object is durable; files may still be there.
    Sent {
        /// What became of it.
        object: SentObject,
    },
    /// The image is durable and published; files and session may still be there.
    Published {
        /// What was published.
        durable: Durable,
    },
}

/// The journal of one transfer, and the threads that work for it.
#[derive(Clone)]
pub struct Journal {
    record: Arc<NodeRecord>,
    uid: Uid,
    generation: Generation,
    workers: TaskTracker,
    reached: Arc<[AtomicU64; 2]>,
}

/// What a transfer comes nearer to its end by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// Bytes of the source that are here.
    Fetched,
    /// Bytes of the image that are in the store.
    Uploaded,
}

impl Journal {
    /// The journal of this generation of a transfer.
    pub fn new(record: Arc<NodeRecord>, uid: Uid, generation: Generation) -> Self {
        let workers = TaskTracker::new();
        workers.close();
        Self { record, uid, generation, workers, reached: Arc::default() }
    }

    /// How far it was when it was last written; [`Phase::Begun`] if never, or by an earlier generation, whose files are
    /// not ours.
    ///
    /// # Errors
    /// One that [`TransferError::is_superseded`] if a later generation has written.
    pub async fn load(&self) -> Result<Phase, TransferError> {
        let (record, uid) = (Arc::clone(&self.record), self.uid.clone());
        match self.work(move || record.job(&uid)).await?? {
            Some(entry)
                if entry.generation > self.generation && !crate::sabotage::active("no-generation-check") =>
            {
                Err(ChangeError::StaleGeneration {
                    table: tables::JOBS.name(),
                    key: self.uid.to_string(),
                    recorded: entry.generation,
                    given: self.generation,
                }
                .into())
            }
            Some(entry) if entry.generation == self.generation && entry.kind == KIND => {
                // From the start is always right, only slower.
                Ok(serde_json::from_value(entry.payload).unwrap_or_default())
            }
            _ => Ok(Phase::Begun),
        }
    }

    /// Writes how far it is. Durable when it returns.
    pub async fn save(&self, phase: Phase) -> Result<(), TransferError> {
        let this = self.clone();
        self.work(move || this.save_now(&phase)).await?
    }

    /// As [`Journal::save`]. Blocking.
    pub(crate) fn save_now(&self, phase: &Phase) -> Result<(), TransferError> {
        if crate::sabotage::active("no-checkpoint") && !matches!(phase, Phase::Published { .. }) {
            return Ok(());
        }
        let entry = JobEntry {
            generation: self.generation,
            kind: KIND.to_owned(),
            stage: phase.name().to_owned(),
            payload: serde_json::to_value(phase).map_err(TransferError::RecordCorrupt)?,
            updated: now(),
        };
        Ok(self.record.checkpoint(&self.uid, &entry)?)
    }

    /// Runs blocking work that [`Journal::idle`] waits for, whether or not anybody waits for its answer.
    pub(crate) fn work<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        self.workers.spawn_blocking(work)
    }

    /// Runs a request to its end, also if nobody waits for its answer any more: [`Journal::idle`] does, so that what it does in
    /// a store is done before anybody looks there.
    pub(crate) async fn to_the_end<T: Send + 'static>(
        &self,
        request: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, TransferError> {
        Ok(self.workers.spawn(request).await?)
    }

    /// Returns when no thread of an attempt is at work any more. An attempt that was dropped leaves threads behind, which
    /// end within one window; nothing else may touch its files or its place in the record before.
    pub(crate) async fn idle(&self) {
        self.workers.wait().await;
    }

    /// Takes note that so many bytes are done, durably.
    pub(crate) fn mark(&self, mark: Mark, bytes: Bytes) {
        self.reached[mark as usize].fetch_max(bytes.0, Ordering::Relaxed);
    }

    /// Rises when the transfer has come nearer to its end than ever before in this process. What is done again, however
    /// often, does not count.
    pub(crate) fn reached(&self) -> u64 {
        self.reached.iter().map(|bytes| bytes.load(Ordering::Relaxed)).fold(0, u64::saturating_add)
    }

    /// Forgets the transfer.
    pub async fn forget(&self) -> Result<(), TransferError> {
        let (record, uid) = (Arc::clone(&self.record), self.uid.clone());
        self.work(move || record.forget_job(&uid)).await??;
        Ok(())
    }
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Self::Begun => "Begun",
            Self::Fetching { .. } => "Fetching",
            Self::Reading { .. } => "Reading",
            Self::Fetched { .. } => "Fetched",
            Self::Converting { .. } => "Converting",
            Self::Converted { .. } => "Converted",
            Self::Beginning { .. } => "Beginning",
            Self::Sending { .. } => "Sending",
            Self::Sent { .. } => "Sent",
            Self::Published { .. } => "Published",
        }
    }
}

/// The wall clock, for people.
pub(crate) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or_default())
}
