//! Files for pods: an object becomes a file in a reservation's directory, and what a pod has written goes back.
//!
//! How far both are lies in the record of the pool, beside the bytes: a kill at any instruction costs at most 32 MiB. What a
//! pod has written into the directory is hostile: names there are opened without following links, and only regular files
//! of a promised size are read.

mod error;
mod fetch;
mod local;
mod push;

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use berth_core::ids::Uid;
use berth_core::units::{Bytes, Generation};
use berth_record::PoolRecord;
use tokio_util::sync::CancellationToken;

pub use self::error::FileError;
pub use self::fetch::{fetch, sum};
pub use self::local::room;
pub use self::push::push;

/// Where work tells how far it is: bytes that are done, of how many. Called often; does not block.
pub type Progress = Arc<dyn Fn(Bytes, Bytes) + Send + Sync>;

/// A file that is worked on.
pub struct FileWork<R> {
    /// Its reservation.
    pub uid: Uid,
    /// The placement that it is worked on for.
    pub generation: Generation,
    /// The directory that it lies in.
    pub dir: PathBuf,
    /// The record in which it is.
    pub record: Arc<R>,
    /// Whom to tell.
    pub progress: Progress,
    /// Cancelled when it is to stop. It ends soon after, and no thread of it is at work any more when it has.
    pub cancel: CancellationToken,
}

impl<R> FileWork<R> {
    /// What comes of `wait`, unless the work is to stop. Only for what may be dropped at any moment.
    async fn stoppable<T>(&self, wait: impl Future<Output = T>) -> Result<T, FileError> {
        self.cancel.run_until_cancelled(wait).await.ok_or(FileError::Cancelled)
    }
}

impl<R> Clone for FileWork<R> {
    fn clone(&self) -> Self {
        Self {
            uid: self.uid.clone(),
            generation: self.generation,
            dir: self.dir.clone(),
            record: Arc::clone(&self.record),
            progress: Arc::clone(&self.progress),
            cancel: self.cancel.clone(),
        }
    }
}

/// What holds the record of a pool.
pub trait HasRecord: Send + Sync + 'static {
    /// The record.
    fn record(&self) -> &PoolRecord;
}

impl HasRecord for PoolRecord {
    fn record(&self) -> &PoolRecord {
        self
    }
}

/// The boot of this machine: what an earlier one has mounted is gone.
pub fn boot() -> &'static str {
    static BOOT: OnceLock<String> = OnceLock::new();
    BOOT.get_or_init(|| {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        // Without it every boot counts as the same: what is recorded as shown stays so until kubelet takes it back.
        id.map_or_else(|_| "unknown".to_owned(), |id| id.trim().to_owned())
    })
}
