//! Everything that can go wrong with an area.

use std::io;
use std::path::PathBuf;

use berth_core::ids::{NodeName, PoolName, Uid};
use berth_core::units::Bytes;
use thiserror::Error;

use super::MIN_SIZE;
use crate::files::FileError;
use crate::loop_device::LoopError;
use crate::mounts::MountError;
use crate::program::RunError;

/// Why an area could not be claimed, made, mounted, left or deleted.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// The directory is another pool's.
    #[error("{dir} belongs to pool {name} (uid {pool})", dir = dir.display())]
    InUseByPool {
        /// The directory.
        dir: PathBuf,
        /// The UID of that pool.
        pool: Uid,
        /// Its name.
        name: PoolName,
    },
    /// The directory is the same pool's on another node, so it is shared storage.
    #[error("{dir} belongs to node {node}", dir = dir.display())]
    InUseByNode {
        /// The directory.
        dir: PathBuf,
        /// That node.
        node: NodeName,
    },
    /// Another process is opening or leaving it.
    #[error("{dir} is being opened by another process", dir = dir.display())]
    Locked {
        /// The directory.
        dir: PathBuf,
    },
    /// The claim cannot be read.
    #[error("claim {path} is damaged", path = path.display())]
    Corrupt {
        /// The claim.
        path: PathBuf,
        /// How.
        source: serde_json::Error,
    },
    /// The claim was written by a newer program.
    #[error("claim {path} has format {found}, newer than this program knows", path = path.display())]
    NewerFormat {
        /// The claim.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// No file system fits in there.
    #[error("a pool of {size} is smaller than the minimum of {MIN_SIZE}")]
    TooSmall {
        /// The size asked for.
        size: Bytes,
    },
    /// The image was there once and is gone. It is not made anew: what was stored in it is lost, and someone must
    /// say so by deleting the claim.
    #[error("pool image {path} is gone", path = path.display())]
    ImageLost {
        /// The image.
        path: PathBuf,
    },
    /// There is no area in the directory.
    #[error("there is no pool area in {dir}", dir = dir.display())]
    NoArea {
        /// The directory.
        dir: PathBuf,
    },
    /// The image is not the file system that was made for this pool.
    #[error("{path} is not the file system of this pool", path = path.display())]
    ForeignImage {
        /// The image.
        path: PathBuf,
    },
    /// The area would be mounted over the directory that it lies in, and hide it from the next start.
    #[error("{path} lies in {mount_point}, where the pool is mounted: give it another path", path = path.display(), mount_point = mount_point.display())]
    MountedOver {
        /// The directory.
        path: PathBuf,
        /// Where the area is mounted.
        mount_point: PathBuf,
    },
    /// The image exists and cannot be mounted here, for what is missing.
    #[error("pool image {path} cannot be mounted: {}", missing.join("; "))]
    Unmountable {
        /// The image.
        path: PathBuf,
        /// What is missing.
        missing: Vec<String>,
    },
    /// The file system could not be made.
    #[error("failed to make pool image {path}", path = path.display())]
    Make {
        /// The image.
        path: PathBuf,
        /// Why.
        source: RunError,
    },
    /// The directory or what lies in it could not be read or written.
    #[error("failed to use {path}", path = path.display())]
    Directory {
        /// What.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// A loop device failed.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// A mount failed.
    #[error(transparent)]
    Mount(#[from] MountError),
}
