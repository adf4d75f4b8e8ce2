//! Everything that can go wrong with a pool as a whole.

use std::path::PathBuf;

use berth_core::ids::{PoolName, Uid};
use berth_core::reason::Reason;
use berth_device::files::FileError;
use berth_record::{AdoptError, CreateError, OpenError, ReadError};
use thiserror::Error;

use super::known::PoolSpec;
use crate::area::AreaError;
use crate::area::templates::TemplateError;

/// Why a pool's area cannot be used.
#[derive(Debug, Error)]
pub enum PoolError {
    /// The area itself.
    #[error("the area of pool {pool} cannot be used")]
    Area {
        /// The pool.
        pool: PoolName,
        /// Why.
        source: Box<AreaError>,
    },
    /// Its record.
    #[error("the record of pool {pool} cannot be opened")]
    Record {
        /// The pool.
        pool: PoolName,
        /// Why.
        source: OpenError,
    },
    /// Its record could not be made.
    #[error("the record of pool {pool} cannot be made")]
    NewRecord {
        /// The pool.
        pool: PoolName,
        /// Why.
        source: CreateError,
    },
    /// The area holds data and no record: what lies there is not known, so nothing is done with it.
    #[error("the area of pool {pool} holds data but its record {path} is gone")]
    RecordGone {
        /// The pool.
        pool: PoolName,
        /// The record.
        path: PathBuf,
    },
    /// A template of it cannot be let go.
    #[error("a template of pool {pool} stays")]
    Template {
        /// The pool.
        pool: PoolName,
        /// Why.
        source: Box<TemplateError>,
    },
    /// Its record could not be taken over.
    #[error("the record of pool {pool} cannot be taken over")]
    Adopt {
        /// The pool.
        pool: PoolName,
        /// Why.
        source: AdoptError,
    },
    /// Its record cannot be read.
    #[error("the record of pool {pool} cannot be read")]
    Read {
        /// The pool.
        pool: PoolName,
        /// Why.
        source: ReadError,
    },
    /// There is no pool of this name.
    #[error("there is no pool {pool} on this node")]
    NoPool {
        /// The name.
        pool: PoolName,
    },
    /// There is a pool of this name already, and not this one.
    #[error("pool {pool} is there already, {}", found.told())]
    Different {
        /// The pool.
        pool: PoolName,
        /// What it is.
        found: Box<PoolSpec>,
    },
    /// The area is another pool's here.
    #[error("area {area} is pool {other} here already, so it cannot be {pool}")]
    AreaTaken {
        /// The pool that it was to be.
        pool: PoolName,
        /// The area.
        area: Uid,
        /// The pool that it is.
        other: PoolName,
    },
    /// What lies there is another area than was asked for.
    #[error("what lies there is area {found}, and not {area}")]
    OtherArea {
        /// What was asked for.
        area: Uid,
        /// What was found.
        found: Uid,
    },
    /// It holds something, and nobody consented to losing it.
    #[error("pool {pool} holds {contents}, which would be destroyed with it")]
    NotEmpty {
        /// The pool.
        pool: PoolName,
        /// What it holds.
        contents: String,
    },
    /// It cannot be opened, so it is not known what would be destroyed.
    #[error("pool {pool} is not open, so what it holds is not known: {why}")]
    NotOpen {
        /// The pool.
        pool: PoolName,
        /// Why.
        why: String,
    },
    /// Its deletion began: it can only be ended.
    #[error("pool {pool} is being destroyed")]
    BeingDestroyed {
        /// The pool.
        pool: PoolName,
    },
    /// Somebody or something still uses it.
    #[error("pool {pool} is in use by {users}")]
    InUse {
        /// The pool.
        pool: PoolName,
        /// By whom.
        users: String,
    },
    /// The list of known pools.
    #[error("the list of pools cannot be written")]
    Known(#[from] FileError),
    /// The list of known pools.
    #[error("the list of pools {path} cannot be read: {reason}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl PoolError {
    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Area { source, .. } => source.reason(),
            Self::Template { source, .. } => source.reason(),
            Self::Record { source: OpenError::WrongOwner { .. } | OpenError::Locked { .. }, .. }
            | Self::Adopt { source: AdoptError::Open(OpenError::Locked { .. }), .. }
            | Self::AreaTaken { .. } => Reason::InUseByPool,
            Self::NoPool { .. } => Reason::PoolNotFound,
            Self::Different { .. } | Self::OtherArea { .. } => Reason::AlreadyDifferent,
            Self::NotEmpty { .. } | Self::InUse { .. } | Self::BeingDestroyed { .. } => Reason::InUse,
            Self::RecordGone { .. } => Reason::PoolAreaGone,
            _ => Reason::PoolAreaFailed,
        }
    }
}
