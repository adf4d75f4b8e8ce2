//! Why a file was not fetched or sent by a command.

use std::io;
use std::path::PathBuf;

use berth_core::ids::Digest;
use berth_device::files::FileError as DeviceFileError;
use berth_record::{ChangeError, CreateError, OpenError, ReadError};
use thiserror::Error;

use crate::commands::object_store::StoreArgsError;
use crate::files::FileError;

/// Why it was not, or not wholly.
#[derive(Debug, Error)]
pub enum FileCommandError {
    /// The flags name no store.
    #[error(transparent)]
    Store(#[from] StoreArgsError),
    /// The path names no file.
    #[error("{} names no file", path.display())]
    NoName {
        /// The path.
        path: PathBuf,
    },
    /// A file or directory.
    #[error("failed to {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file cannot be put in its place.
    #[error("the file cannot be put in its place")]
    Place(#[source] DeviceFileError),
    /// The record of the work cannot be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The record of the work cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The record of the work cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The record of the work refuses.
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// The work itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// What has arrived is not what was to come.
    #[error("what came for {} has {found}, not {expected}", file.display())]
    Checksum {
        /// The file that it was for.
        file: PathBuf,
        /// What it has.
        found: Digest,
        /// What it was to have.
        expected: String,
    },
    /// The result cannot be printed.
    #[error("failed to print the result")]
    Print(#[source] io::Error),
    /// A worker is gone.
    #[error("a worker is gone")]
    Worker(#[from] tokio::task::JoinError),
}

impl FileCommandError {
    pub(super) fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}
