//! Everything that can go wrong with a kernel pool.

use std::io;
use std::path::PathBuf;

use berth_core::reason::Reason;
use berth_core::thin::{BlockSize, GeometryError, StopReason};
use berth_core::units::Bytes;
use thiserror::Error;

use super::dmsetup::DmError;
use super::group_error::{VolumeGroupError, is_absence};
use super::names::{DeviceName, NameError};
use super::suspender::SuspendError;
use super::table::ThinId;
use crate::program::RunError;

/// Why a kernel pool could not be opened, changed, asked or closed.
#[derive(Debug, Error)]
pub enum KernelPoolError {
    /// Nothing can be named after it.
    #[error("failed to name a kernel pool")]
    Name(#[from] NameError),
    /// Device mapper refused.
    #[error("failed to use device mapper")]
    Dm(#[from] DmError),
    /// Its logical volumes could not be had.
    #[error("failed to use the pool's volume group")]
    Group(#[from] VolumeGroupError),
    /// Its block size is none.
    #[error("failed to understand the pool's geometry")]
    Geometry(#[from] GeometryError),
    /// A device under it could not be read, written or found.
    #[error("failed to {action} {device}", device = device.display())]
    Device {
        /// What was tried.
        action: &'static str,
        /// The device.
        device: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The metadata of a pool that was in use is not there. Nothing was written.
    #[error("{device} holds no metadata of a thin pool, although the pool was in use: restore it", device = device.display())]
    MetadataLost {
        /// The metadata device.
        device: PathBuf,
    },
    /// The metadata is not consistent. Nothing was written.
    #[error(
        "thin_check is not content with {device}; look at it with `thin_check {device}`, and repair it with \
         `thin_repair -i {device} -o` a spare device",
        device = device.display()
    )]
    Damaged {
        /// The metadata device.
        device: PathBuf,
        /// What `thin_check` said.
        source: RunError,
    },
    /// A pool of this name is active on other devices.
    #[error("{pool} is active on other devices than its own")]
    OtherDevices {
        /// The pool.
        pool: DeviceName,
    },
    /// The block size of a pool never changes.
    #[error("{pool} has blocks of {found}, not of {wanted}")]
    BlockSize {
        /// The pool.
        pool: DeviceName,
        /// What it has.
        found: BlockSize,
        /// What was asked for.
        wanted: BlockSize,
    },
    /// It was made and is not there.
    #[error("{pool} was made and is not there")]
    Vanished {
        /// The pool.
        pool: DeviceName,
    },
    /// Its data device is smaller than it was.
    #[error("the data of {pool} shrank from {was} to {is}")]
    Shrunk {
        /// The pool.
        pool: DeviceName,
        /// The pool's size.
        was: Bytes,
        /// The device's size.
        is: Bytes,
    },
    /// The kernel writes no metadata for it at the moment.
    #[error("{pool} takes no changes: {}", unwritable(*why))]
    NotWritable {
        /// The pool.
        pool: DeviceName,
        /// Why.
        why: StopReason,
    },
    /// Something of it is still active.
    #[error("{pool} is in use by {devices}")]
    InUse {
        /// The pool.
        pool: DeviceName,
        /// By what.
        devices: String,
    },
    /// A thin device with this number exists.
    #[error("{pool} has a thin device {id} already")]
    IdTaken {
        /// The pool.
        pool: DeviceName,
        /// The number.
        id: ThinId,
    },
    /// There is no thin device with this number.
    #[error("{pool} has no thin device {id}")]
    NoSuchId {
        /// The pool.
        pool: DeviceName,
        /// The number.
        id: ThinId,
    },
    /// The device to take a snapshot of is active under a name that is not ours.
    #[error("thin device {id} of {pool} is active as {name}, which is not ours")]
    ForeignDevice {
        /// The pool.
        pool: DeviceName,
        /// Its number.
        id: ThinId,
        /// Its name.
        name: String,
    },
    /// What needs a suspended device was not done.
    #[error("failed to do what needs a suspended device")]
    Suspend(#[source] SuspendError),
    /// The pool has seen another of our transactions last.
    #[error("{pool} is at transaction {found}, not {expected}")]
    TransactionId {
        /// The pool.
        pool: DeviceName,
        /// What was expected.
        expected: u64,
        /// What it is at.
        found: u64,
    },
    /// Somebody else holds the pool's one metadata snapshot.
    #[error("{pool} has a metadata snapshot already")]
    SnapshotHeld {
        /// The pool.
        pool: DeviceName,
    },
}

impl From<SuspendError> for KernelPoolError {
    fn from(error: SuspendError) -> Self {
        match error {
            SuspendError::Dm(error) => Self::Dm(error),
            error => Self::Suspend(error),
        }
    }
}

fn unwritable(why: StopReason) -> &'static str {
    match why {
        StopReason::Failed => "it has failed",
        StopReason::NeedsCheck => "its metadata has to be checked offline",
        StopReason::ReadOnly => "it is read-only",
        StopReason::Metadata => "it has no metadata left",
        StopReason::Data => "it has no data left and has not grown yet",
    }
}

impl KernelPoolError {
    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Group(source) => source.reason(),
            Self::Geometry(_) => Reason::InvalidSpec,
            Self::Device { source, .. } if is_absence(source) => Reason::PoolAreaGone,
            Self::MetadataLost { .. } | Self::Damaged { .. } => Reason::NeedsCheck,
            Self::BlockSize { .. } => Reason::AlreadyDifferent,
            Self::NotWritable { why, .. } => why.reason(),
            Self::InUse { .. } => Reason::InUse,
            Self::ForeignDevice { .. } => Reason::ForeignVolume,
            Self::Suspend(source) => source.reason(),
            Self::Dm(source) => source.reason(),
            Self::NoSuchId { .. } => Reason::VolumeLost,
            _ => Reason::PoolAreaFailed,
        }
    }
}
