//! Servers of images for kernel NBD, whoever keeps them running.

use std::fmt;
use std::path::{Path, PathBuf};

use berth_core::ids::Uid;
use berth_core::units::Bytes;
use berth_device::files::FileError;
use berth_device::nbd::ServedFormat;
use berth_device::qemu::SourceDriver;
use berth_image::ImageFormat;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::stores::{HydrationOrder, StoreServerSpec, StoreStatus};

/// Whoever keeps servers running.
pub trait Servers: fmt::Debug + Send + Sync {
    /// Serves an image from now on, through deaths of the server and of whoever runs it, until [`Self::stop`]. Returns
    /// where it answers, once it does. The same again changes nothing; under one id nothing else may be served.
    fn serve(&self, server: &ServerSpec) -> Result<PathBuf, ServeError>;

    /// Serves an image of an image store from now on, in the same way. Told how to reach the same image in another way, it is
    /// reached so from then on.
    ///
    /// # Errors
    /// [`ServeError::TooOld`] if whoever runs servers knows of no such thing.
    fn serve_store(&self, server: &StoreServerSpec) -> Result<PathBuf, ServeError>;

    /// Has a server of an image store make a template local, or leave that. One that is not there need not be told to leave it.
    fn order(&self, id: &Uid, order: Option<&HydrationOrder>) -> Result<(), ServeError>;

    /// Whether images of image stores are served at all.
    ///
    /// # Errors
    /// [`ServeError::TooOld`], [`ServeError::Unavailable`].
    fn serves_stores(&self) -> Result<(), ServeError>;

    /// Serves it no longer. One that is not there is no error.
    ///
    /// # Errors
    /// [`ServeError::InUse`] while a device is connected.
    fn stop(&self, id: &Uid) -> Result<(), ServeError>;

    /// What is served.
    fn list(&self) -> Result<Vec<ServerLine>, ServeError>;
}

/// The format of an image that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DiskFormat {
    /// Its bytes are the disk.
    Raw,
    /// QEMU's.
    Qcow2,
    /// `VMware`'s.
    Vmdk,
    /// Virtual PC's.
    Vhd,
    /// Hyper-V's.
    Vhdx,
}

impl DiskFormat {
    /// How it is served.
    pub fn served(self) -> ServedFormat {
        match self {
            Self::Raw => ServedFormat::Raw,
            Self::Qcow2 => ServedFormat::Image(SourceDriver::Qcow2),
            Self::Vmdk => ServedFormat::Image(SourceDriver::Vmdk),
            Self::Vhd => ServedFormat::Image(SourceDriver::Vpc),
            Self::Vhdx => ServedFormat::Image(SourceDriver::Vhdx),
        }
    }
}

impl From<ImageFormat> for DiskFormat {
    fn from(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Raw => Self::Raw,
            ImageFormat::Qcow2 => Self::Qcow2,
            ImageFormat::Vmdk => Self::Vmdk,
            ImageFormat::Vhd => Self::Vhd,
            ImageFormat::Vhdx => Self::Vhdx,
        }
    }
}

/// What is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServerSpec {
    /// Whose device reads from it: the UID in the identifier of that device.
    pub id: Uid,
    /// The image, by its absolute path.
    pub image: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// The size that it must have as a disk.
    pub size: Bytes,
}

impl ServerSpec {
    /// The path must lead to the same file whoever opens it.
    pub fn check(&self) -> Result<(), ServeError> {
        let why = if !self.image.is_absolute() {
            "the path of the image is not absolute"
        } else if self.size == Bytes::ZERO || !self.size.0.is_multiple_of(512) {
            "the size is not a positive multiple of 512 bytes"
        } else if berth_device::nbd::BackendId::new(&self.id).is_err() {
            "the id is not a UUID of lower-case digits"
        } else {
            return Ok(());
        };
        Err(ServeError::Refused { id: self.id.clone(), why: why.to_owned() })
    }
}

/// A server, as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerLine {
    /// Whose device reads from it.
    pub id: Uid,
    /// The image.
    pub image: PathBuf,
    /// True if it runs.
    pub running: bool,
    /// How often it was started anew since the one who runs it was.
    pub restarts: u32,
    /// Why it does not run.
    pub message: Option<String>,
    /// What the server of an image store says of itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreStatus>,
}

/// Why an image is not served, or goes on being served.
#[derive(Debug, Error)]
pub enum ServeError {
    /// It is not to be served so.
    #[error("server {id} is refused: {why}")]
    Refused {
        /// Whose.
        id: Uid,
        /// What is wrong.
        why: String,
    },
    /// The image cannot be served, at this moment at least.
    #[error("failed to serve {} for {id}: {why}", image.display())]
    Cannot {
        /// Whose.
        id: Uid,
        /// The image.
        image: PathBuf,
        /// Why.
        why: String,
    },
    /// A device reads from it.
    #[error("server {id} is in use: {users}")]
    InUse {
        /// Whose.
        id: Uid,
        /// By what.
        users: String,
    },
    /// What is served could not be written down, or read.
    #[error("failed to keep the list of servers")]
    State(#[from] StateError),
    /// The process that runs servers does not answer. What it was asked for it may have done.
    #[error("the supervisor at {} does not answer: {why}", socket.display())]
    Unavailable {
        /// Its socket.
        socket: PathBuf,
        /// What came of asking.
        why: String,
    },
    /// The process that runs servers is of an earlier version.
    #[error("the supervisor at {} is too old to serve image stores: upgrade it", socket.display())]
    TooOld {
        /// Its socket.
        socket: PathBuf,
    },
    /// The process that runs servers says that it failed.
    #[error("the supervisor failed for server {id}: {why}")]
    Elsewhere {
        /// Whose.
        id: Uid,
        /// What it says.
        why: String,
    },
}

/// Why the list of servers could not be read or written.
#[derive(Debug, Error)]
pub enum StateError {
    /// Another process runs the servers of this folder.
    #[error("another process runs the servers of {}", folder.display())]
    Locked {
        /// The folder.
        folder: PathBuf,
    },
    /// It is there and not understood. It stays so, for a person.
    #[error("{} is not understood: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The file system refused.
    #[error("failed to use {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It could not be written.
    #[error("failed to write the list")]
    Write(#[from] FileError),
}

impl StateError {
    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}
