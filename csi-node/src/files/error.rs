//! What fetching or sending a file may fail with.

use std::io;

use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_objectstore::StoreError;
use berth_objectstore::source::SourceError;
use berth_record::{ChangeError, ReadError};
use thiserror::Error;

use crate::transfer::{source_reason, store_reason};

/// Why an attempt ended.
#[derive(Debug, Error)]
pub enum FileError {
    /// Nothing is recorded of the file.
    #[error("there is no file of reservation {0}")]
    NoFile(String),
    /// The object does not fit.
    #[error("the object has {found}, more than the {room} that the directory of {promised} has room for")]
    TooLarge {
        /// What it has.
        found: Bytes,
        /// What there is room for beside the directory's own file system.
        room: Bytes,
        /// What is promised.
        promised: Bytes,
    },
    /// The file is longer than anything that was promised: it has holes.
    #[error("file `{name}` is {found} long, more than the {promised} that are promised")]
    TooLong {
        /// The file.
        name: String,
        /// How long it is.
        found: Bytes,
        /// What is promised.
        promised: Bytes,
    },
    /// The object does not say how large it is.
    #[error("the object does not say how many bytes it has")]
    NoSize,
    /// The object ended early.
    #[error("the object ended after {found} of {expected}")]
    Short {
        /// What came.
        found: Bytes,
        /// What was to come.
        expected: Bytes,
    },
    /// The object cannot be read.
    #[error("failed to read the object")]
    Source(#[from] SourceError),
    /// There is no regular file of the name.
    #[error("the directory has no regular file `{name}` to be sent")]
    Missing {
        /// The name.
        name: String,
    },
    /// Somebody changes the file while it is sent.
    #[error("file `{name}` changes while it is sent")]
    Changing {
        /// The name.
        name: String,
    },
    /// The object store.
    #[error("the object store failed")]
    Store(#[from] StoreError),
    /// What the store has is not what was sent.
    #[error("{place} is not what was sent: {problem}")]
    Verify {
        /// The object.
        place: String,
        /// In what it differs.
        problem: String,
    },
    /// A file of the directory.
    #[error("failed to {action} file `{name}`")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file's name.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// The record cannot be read.
    #[error("the record cannot be read")]
    Read(#[from] ReadError),
    /// The record refuses.
    #[error("the record refuses")]
    Change(#[from] ChangeError),
    /// The work was told to stop.
    #[error("stopped")]
    Cancelled,
    /// A worker is gone: the program is shutting down, or it panicked.
    #[error("a worker is gone")]
    Worker(#[from] tokio::task::JoinError),
}

impl FileError {
    pub(super) fn io(action: &'static str, name: &str) -> impl FnOnce(io::Error) -> Self {
        let name = name.to_owned();
        move |source| Self::Io { action, name, source }
    }

    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::TooLarge { .. } | Self::TooLong { .. } => Reason::SourceTooLarge,
            Self::NoSize => Reason::SourceUnusable,
            Self::Short { .. } => Reason::SourceUnavailable,
            Self::Source(error) => source_reason(error),
            Self::Missing { .. } => Reason::FileMissing,
            Self::Store(error) => store_reason(error),
            Self::Verify { .. } => Reason::VerificationFailed,
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Reason::PromiseBroken,
                _ => Reason::Retrying,
            },
            Self::Change(ChangeError::StaleGeneration { .. }) => Reason::Superseded,
            Self::NoFile(_)
            | Self::Changing { .. }
            | Self::Read(_)
            | Self::Change(_)
            | Self::Cancelled
            | Self::Worker(_) => Reason::Retrying,
        }
    }
}
