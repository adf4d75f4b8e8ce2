//! What can go wrong with a record: one enum per operation.

use std::io;
use std::path::PathBuf;

use berth_core::units::Generation;
use thiserror::Error;

use crate::schema::{FORMAT_VERSION, Owner};

/// Why a record could not be opened. Only [`NotFound`](Self::NotFound) means that making a new one is safe.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is no such file.
    #[error("record {path} does not exist")]
    NotFound {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The file is there and cannot be trusted. It stays so, for recovery by a person: no later opening succeeds.
    #[error("record {path} is damaged: {reason}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A newer program has written it.
    #[error("record {path} has format version {found}, newer than {FORMAT_VERSION}")]
    NewerVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// It belongs to another pool or node.
    #[error("record {path} belongs to {found}, not to {expected}")]
    WrongOwner {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: Owner,
        /// Who asked for it.
        expected: Owner,
    },
    /// Another process, or another part of this one, has it open.
    #[error("record {path} is in use by another process")]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("failed to open record {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
}

/// Why a record could not be made.
#[derive(Debug, Error)]
pub enum CreateError {
    /// There is one already; it was not touched.
    #[error("record {path} exists already")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Another process is making it.
    #[error("record {path} is being made by another process")]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("failed to make record {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
    /// The store refused.
    #[error("failed to write new record {path}")]
    Store {
        /// The file.
        path: PathBuf,
        /// Its answer.
        source: Box<redb::Error>,
    },
}

/// Why a record was not taken over. It is still its old owner's, except after [`ChangeError::Commit`].
#[derive(Debug, Error)]
pub enum AdoptError {
    /// It could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The new owner could not be written.
    #[error("failed to write the new owner of a record")]
    Change(#[from] ChangeError),
}

/// Why something could not be read from an open record.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The store refused.
    #[error("failed to read table {table}")]
    Store {
        /// The table.
        table: &'static str,
        /// Its answer.
        source: Box<redb::Error>,
    },
    /// An entry is there and is not what it should be.
    #[error("entry {key} of table {table} cannot be decoded: {reason}")]
    Decode {
        /// The table.
        table: &'static str,
        /// The entry's key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Why a record was not changed. Nothing of the refused transaction is there afterwards, except after
/// [`Commit`](Self::Commit), after which the record must be opened again to know.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// What had to be read first could not be.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The store refused the change.
    #[error("failed to write entry {key} of table {table}")]
    Write {
        /// The table.
        table: &'static str,
        /// The entry's key.
        key: String,
        /// Its answer.
        source: Box<redb::Error>,
    },
    /// The transaction did not reach the disk for certain.
    #[error("failed to commit to record {path}")]
    Commit {
        /// The file.
        path: PathBuf,
        /// The store's answer.
        source: Box<redb::Error>,
    },
    /// The record knows a later generation than the one that asked.
    #[error("generation {given} of {table} entry {key} is older than {recorded}, which is recorded")]
    StaleGeneration {
        /// The table.
        table: &'static str,
        /// The entry's key.
        key: String,
        /// What the record holds.
        recorded: Generation,
        /// What was asked for.
        given: Generation,
    },
    /// There is no such entry.
    #[error("table {table} has no entry {key}")]
    Missing {
        /// The table.
        table: &'static str,
        /// The key.
        key: String,
    },
    /// The entry is in a state that does not allow the change.
    #[error("entry {key} of table {table} cannot become {wanted}: it is {state}")]
    State {
        /// The table.
        table: &'static str,
        /// The entry's key.
        key: String,
        /// The state it is in.
        state: String,
        /// The state it was to get.
        wanted: &'static str,
    },
}
