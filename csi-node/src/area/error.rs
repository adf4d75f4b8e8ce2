//! Everything that can go wrong in a pool's area.

use std::io;
use std::path::{Path, PathBuf};

use berth_core::extents::Disorder;
use berth_core::hydration::{self, Stop};
use berth_core::ids::{Digest, Uid};
use berth_core::reason::Reason;
use berth_core::thin::GeometryError;
use berth_core::units::Bytes;
use berth_device::files::FileError;
use berth_device::filesystem::FilesystemError;
use berth_device::loop_device::LoopError;
use berth_device::mounts::MountError;
use berth_device::nbd::AttachError;
use berth_device::pool_area::ClaimError;
use berth_device::thin::{
    DeviceName, KernelPoolError, MappingError, NameError, TemplateError, ThinDeviceError, VolumeGroupError,
};
use berth_device::users::UsersError;
use berth_record::ChangeError;
use thiserror::Error;

use super::templates::serve_reason;
use crate::supervisor::servers::ServeError;

/// Why something in a pool's area was not opened, made, shown or removed.
#[derive(Debug, Error)]
pub enum AreaError {
    /// The pool's own image and its claim.
    #[error("failed to open or leave the pool's file system")]
    Claim(#[from] ClaimError),
    /// A file.
    #[error("a file operation failed")]
    File(#[from] FileError),
    /// A loop device.
    #[error("a loop device failed")]
    Loop(#[from] LoopError),
    /// A mount.
    #[error("a mount failed")]
    Mount(#[from] MountError),
    /// A file system.
    #[error("a file system failed")]
    Filesystem(#[from] FilesystemError),
    /// The pool's record.
    #[error("the record refuses")]
    Record(#[from] ChangeError),
    /// Thin provisioning lacks something here.
    #[error("no kernel pools can be used here: {0}")]
    Missing(String),
    /// Nothing can be named after the pool or a holder.
    #[error("no device can be named")]
    Name(#[from] NameError),
    /// The volume group.
    #[error("the pool's volume group fails")]
    Group(#[from] VolumeGroupError),
    /// A kernel pool.
    #[error("a kernel pool fails")]
    Kernel(#[from] KernelPoolError),
    /// A thin device.
    #[error("a thin device fails")]
    Device(#[from] ThinDeviceError),
    /// The pool cannot be divided.
    #[error("the pool's space cannot be divided")]
    Geometry(#[from] GeometryError),
    /// It was open on this node before. Made anew it would be empty, and promises that were obeyed would be obeyed again.
    #[error("{what} was there before and is gone: is its disk attached and mounted?")]
    Gone {
        /// What of the pool.
        what: String,
    },
    /// There are volumes of data and none with the record: what lies in them is not known, so nothing is done with them.
    #[error("the volume group holds data of the pool, but not the volume {volume} with its record")]
    RecordVolumeGone {
        /// Its name.
        volume: String,
    },
    /// A kernel pool that is not as the record says: one of the two was restored, or exchanged.
    #[error("{pool} is at transaction {found}, its record at {recorded}: one of them is not of this time")]
    Transaction {
        /// The kernel pool.
        pool: DeviceName,
        /// What the record says.
        recorded: u64,
        /// What the kernel pool says.
        found: u64,
    },
    /// A kernel pool that the kernel has given up.
    #[error("{pool} has failed")]
    PoolFailed {
        /// The kernel pool.
        pool: DeviceName,
    },
    /// A kernel pool would become larger than everything that may be promised.
    #[error("{pool} needs {needed}, which makes {both} with the other one, more than {most}")]
    Bound {
        /// The kernel pool.
        pool: DeviceName,
        /// What is promised in it.
        needed: Bytes,
        /// With what the other one has grown to.
        both: Bytes,
        /// What both may have.
        most: Bytes,
    },
    /// A number that no thin device has.
    #[error("{id} is not the number of a thin device")]
    ThinId {
        /// The number.
        id: u32,
    },
    /// A device that should be there is not.
    #[error("{} is not there", device.display())]
    Vanished {
        /// The device.
        device: PathBuf,
    },
    /// A volume reads from an image that is to be removed.
    #[error("volume {volume} still reads from image {digest}")]
    ImageInUse {
        /// The image.
        digest: Digest,
        /// The volume.
        volume: Uid,
    },
    /// A volume of it is in use.
    #[error("{device} is in use: {users}")]
    InUse {
        /// What is in use.
        device: String,
        /// By whom.
        users: String,
    },
    /// The template that a volume starts from has no device.
    #[error("template {template} is not attached")]
    NoTemplate {
        /// Which.
        template: Uid,
    },
    /// The devices of templates.
    #[error("failed to look for a template's device")]
    Nbd(#[from] AttachError),
    /// The device of an image that is shown before all of it is here.
    #[error("a template fails")]
    Template(#[source] Box<TemplateError>),
    /// The server of an image store.
    #[error("the image is not served")]
    Serve(#[from] ServeError),
    /// What is recorded of an image cannot be divided so.
    #[error("an image cannot be divided into regions")]
    Regions(#[from] hydration::GeometryError),
    /// An image that is not recorded, or not as one that is shown.
    #[error("image {digest} is not recorded as one that is shown before all of it is here")]
    NotShown {
        /// Which.
        digest: Digest,
    },
    /// An image that somebody else works on at this moment.
    #[error("somebody else works on image {digest}")]
    Occupied {
        /// Which.
        digest: Digest,
    },
    /// An image of which a part is in its image store only.
    #[error("image {digest} is not all here, and waits for its image store")]
    SourceNeeded {
        /// Which.
        digest: Digest,
    },
    /// An image that cannot become local by itself.
    #[error("image {digest} cannot become local: {}", stop_told(*stop))]
    Stopped {
        /// Which.
        digest: Digest,
        /// Why.
        stop: Stop,
    },
    /// One step after the other, and never an end: a defect.
    #[error("image {digest} does not come to rest")]
    Restless {
        /// Which.
        digest: Digest,
    },
    /// What a volume has blocks for.
    #[error("failed to read what a volume has blocks for")]
    Mapping(#[from] MappingError),
    /// What was told of a volume is not in order.
    #[error("what a volume has blocks for is not told in order")]
    Disorder(#[from] Disorder),
    /// The reader of an origin's parts ended for no reason that is known.
    #[error("the reader of what an image has blocks for broke off")]
    ReaderGone,
    /// Volumes that have different origins: where neither has blocks they may differ all the same.
    #[error(
        "{new} did not start from what {old} started from: what differs is not known without reading both"
    )]
    NotRelated {
        /// What is compared with.
        old: Uid,
        /// What is compared.
        new: Uid,
    },
    /// A volume that is compared with and may be written meanwhile.
    #[error(
        "{volume} is attached for writing, and its blocks may become another file's: compare with a snapshot of it"
    )]
    Changing {
        /// The volume.
        volume: Uid,
    },
    /// The record has no such volume.
    #[error("no volume {volume} is recorded")]
    NoVolume {
        /// Which.
        volume: Uid,
    },
    /// It is not known who uses a device.
    #[error("failed to find out who uses a device")]
    Users(#[from] UsersError),
    /// Files share blocks here or are copied, and a copy of one that is written meanwhile would be of no moment.
    #[error("{} is in use, and its file system cannot copy it at one moment", path.display())]
    NoInstantCopy {
        /// The file.
        path: PathBuf,
    },
    /// A pool of files has no kernel pools.
    #[error("the pool at {} is made of files and has no kernel pools", root.display())]
    NoKernelPools {
        /// Its directory.
        root: PathBuf,
    },
    /// The area is open as far as its record only.
    #[error("the area at {} is not open yet", root.display())]
    NotStarted {
        /// Its directory.
        root: PathBuf,
    },
    /// An image does not fit into what was promised to the volume that is to start from it.
    #[error("image {} has {found}, the volume is promised {promised}", path.display())]
    ImageTooLarge {
        /// The image.
        path: PathBuf,
        /// What it has.
        found: Bytes,
        /// What is promised.
        promised: Bytes,
    },
    /// A file, directory or device.
    #[error("failed to {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl AreaError {
    /// The machine-readable reason why a pool is not usable.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Claim(
                ClaimError::InUseByPool { .. }
                | ClaimError::InUseByNode { .. }
                | ClaimError::ForeignImage { .. },
            ) => Reason::InUseByPool,
            Self::Claim(ClaimError::TooSmall { .. } | ClaimError::MountedOver { .. })
            | Self::Geometry(_)
            | Self::Name(_)
            | Self::NoKernelPools { .. }
            | Self::ImageTooLarge { .. } => Reason::InvalidSpec,
            Self::Claim(ClaimError::ImageLost { .. }) | Self::Gone { .. } | Self::RecordVolumeGone { .. } => {
                Reason::PoolAreaGone
            }
            Self::Missing(_) => Reason::PreflightFailed,
            Self::Bound { .. } | Self::Group(VolumeGroupError::NoSpace { .. }) => Reason::CapacityRefused,
            Self::Group(source) => source.reason(),
            Self::Device(source) => source.reason(),
            Self::Nbd(source) => source.reason(),
            Self::Template(source) => source.reason(),
            Self::Serve(source) => serve_reason(source),
            Self::Stopped { stop, .. } => stop_reason(*stop),
            Self::InUse { .. }
            | Self::ImageInUse { .. }
            | Self::Occupied { .. }
            | Self::NoInstantCopy { .. }
            | Self::Changing { .. }
            | Self::Kernel(KernelPoolError::SnapshotHeld { .. })
            | Self::Loop(LoopError::InUse { .. })
            | Self::Mount(MountError::Busy { .. })
            | Self::Claim(ClaimError::Mount(MountError::Busy { .. }) | ClaimError::Locked { .. }) => {
                Reason::InUse
            }
            Self::Kernel(source) => source.reason(),
            Self::NoTemplate { .. } | Self::NoVolume { .. } => Reason::VolumeNotFound,
            Self::NotRelated { .. } => Reason::NotRelated,
            _ => Reason::PoolAreaFailed,
        }
    }
}

/// Why an image cannot become local by itself.
fn stop_told(stop: Stop) -> &'static str {
    match stop {
        Stop::DestinationLost => "the thin device with what was local is lost",
        Stop::DestinationSize => "its thin device has another size",
        Stop::SourceSize => "its source has another size",
        Stop::ForeignMetadata => "what should say which regions are local is something else's",
        Stop::MetadataReadOnly => "the kernel could not write which regions are local; volumes go on reading",
        Stop::MetadataFailed => {
            "the kernel cannot read which regions are local, and volumes get errors where they read the image"
        }
        Stop::DifferentDevice => "its device is something else",
    }
}

fn stop_reason(stop: Stop) -> Reason {
    match stop {
        Stop::MetadataReadOnly | Stop::MetadataFailed => Reason::NeedsCheck,
        Stop::DestinationLost => Reason::PoolAreaFailed,
        Stop::DestinationSize | Stop::SourceSize | Stop::ForeignMetadata | Stop::DifferentDevice => {
            Reason::AlreadyDifferent
        }
    }
}

pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> AreaError {
    let path = path.to_owned();
    move |source| AreaError::Io { action, path, source }
}
