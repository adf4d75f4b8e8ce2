//! Why operations are not done, and what is said of it.

use std::path::PathBuf;

use berth_core::ids::{Digest, PoolName, Uid};
use berth_core::local::Refused;
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_record::{ChangeError, ReadError};
use thiserror::Error;

use super::{Refusal, VolumeKind};
use crate::agent::pools::PoolError;
use crate::agent::volumes::VolumeError;
use crate::area::AreaError;
use crate::area::templates::TemplateError;
use crate::telemetry::chain;

/// Why an operation was not done.
#[derive(Debug, Error)]
pub enum OperationError {
    /// There is no such pool.
    #[error("there is no pool {0} on this node")]
    NoPool(PoolName),
    /// The pool is there and cannot be used.
    #[error("pool {pool} is not open: {message}")]
    NotOpen {
        /// The pool.
        pool: PoolName,
        /// Why, in a word.
        reason: Reason,
        /// Why.
        message: String,
    },
    /// There is no such volume.
    #[error("pool {pool} has no volume, snapshot or template {uid}")]
    NoVolume {
        /// The pool.
        pool: PoolName,
        /// The volume.
        uid: Uid,
    },
    /// It is being made, or being deleted: what began it has to be repeated.
    #[error("volume {uid} is half {half}: repeat what began that")]
    HalfDone {
        /// The volume.
        uid: Uid,
        /// `made` or `deleted`.
        half: &'static str,
    },
    /// It was there, and its file or device is gone.
    #[error("{} of volume {uid} is gone", path.display())]
    Lost {
        /// The volume.
        uid: Uid,
        /// Its file or device.
        path: PathBuf,
    },
    /// The image is not staged.
    #[error("image {digest} is not staged in pool {pool}")]
    NoImage {
        /// The pool.
        pool: PoolName,
        /// The image.
        digest: Digest,
    },
    /// The name is another thing's.
    #[error("{uid} is there already, as a {} of {size}{}", word(*kind), of.as_ref().map(|of| format!(" made from {of}")).unwrap_or_default())]
    Different {
        /// The name.
        uid: Uid,
        /// What it is.
        kind: VolumeKind,
        /// Its size.
        size: Bytes,
        /// What it was made from.
        of: Option<String>,
    },
    /// A template is only read.
    #[error("{uid} is a template, which cannot be {action}")]
    IsTemplate {
        /// The template.
        uid: Uid,
        /// What was asked for.
        action: &'static str,
    },
    /// A snapshot is never written.
    #[error("{uid} is a snapshot, which cannot be {action}")]
    IsSnapshot {
        /// The snapshot.
        uid: Uid,
        /// What was asked for.
        action: &'static str,
    },
    /// It is in use.
    #[error("{what} is in use by {by}")]
    InUse {
        /// What.
        what: String,
        /// By whom.
        by: String,
    },
    /// A size that the volume cannot have.
    #[error("volume {uid} cannot have {size}: {why}")]
    Size {
        /// The volume.
        uid: Uid,
        /// The size.
        size: Bytes,
        /// Why.
        why: String,
    },
    /// A name that nothing can have.
    #[error("`{0}` is not a UUID of lower-case hexadecimal digits")]
    Name(Uid),
    /// The space for it is not promised, and is not to be.
    #[error(transparent)]
    Space(#[from] Refused),
    /// More than may be had ahead of need.
    #[error("the kernel pool for {class} of pool {pool} cannot have {size} ahead of need: at most {most}, {} bytes less", size.0.saturating_sub(most.0))]
    Ahead {
        /// The pool.
        pool: PoolName,
        /// `images` or `volumes`.
        class: &'static str,
        /// What was asked for.
        size: Bytes,
        /// What is possible.
        most: Bytes,
        /// Whether a ledger bounds it.
        has_ledger: bool,
    },
    /// A template.
    #[error("a template is not attached or detached")]
    Template(#[from] TemplateError),
    /// The pool as a whole.
    #[error("the pool refuses")]
    Pool(#[from] PoolError),
    /// The volume.
    #[error("the volume was not made or removed")]
    Volume(#[from] VolumeError),
    /// The area.
    #[error("the pool's area fails")]
    Area(#[from] AreaError),
    /// The record does not allow it.
    #[error("the record refuses")]
    Change(#[from] ChangeError),
    /// The record cannot be read.
    #[error("the record cannot be read")]
    Read(#[from] ReadError),
}

const fn word(kind: VolumeKind) -> &'static str {
    match kind {
        VolumeKind::Volume => "volume",
        VolumeKind::Snapshot => "snapshot",
        VolumeKind::Template => "template",
    }
}

impl OperationError {
    /// The machine-readable reason: the one place where failures become words.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NoPool(_) => Reason::PoolNotFound,
            Self::NotOpen { reason, .. } => *reason,
            Self::NoVolume { .. } | Self::NoImage { .. } => Reason::VolumeNotFound,
            Self::HalfDone { .. } | Self::InUse { .. } => Reason::InUse,
            Self::Different { .. } => Reason::AlreadyDifferent,
            Self::IsTemplate { .. } => Reason::IsTemplate,
            Self::IsSnapshot { .. } => Reason::IsSnapshot,
            Self::Size { .. } | Self::Name(_) => Reason::InvalidSpec,
            Self::Space(refused) => refused.reason(),
            Self::Ahead { has_ledger: true, .. } => Reason::NotPromised,
            Self::Ahead { has_ledger: false, .. } => Reason::CapacityRefused,
            Self::Template(error) => error.reason(),
            Self::Pool(error) => error.reason(),
            Self::Lost { .. } | Self::Volume(VolumeError::Lost { .. }) => Reason::VolumeLost,
            Self::Volume(VolumeError::Area(error)) | Self::Area(error) => area_reason(error),
            Self::Volume(VolumeError::Record(error)) | Self::Change(error) => change_reason(error),
            Self::Read(_) => Reason::PoolAreaFailed,
        }
    }
}

fn area_reason(error: &AreaError) -> Reason {
    match error {
        AreaError::Record(error) => change_reason(error),
        error => error.reason(),
    }
}

/// What keeps a change from being recorded is what is recorded already.
fn change_reason(error: &ChangeError) -> Reason {
    match error {
        ChangeError::State { .. } => Reason::InUse,
        ChangeError::Missing { .. } => Reason::VolumeNotFound,
        ChangeError::StaleGeneration { .. } => Reason::Superseded,
        ChangeError::Read(_) | ChangeError::Write { .. } | ChangeError::Commit { .. } => {
            Reason::PoolAreaFailed
        }
    }
}

impl From<OperationError> for Refusal {
    fn from(error: OperationError) -> Self {
        Self { reason: error.reason(), message: chain(&error) }
    }
}
