//! Where a pool's bytes lie on this node. Each backend is one implementation of [`Area`], chosen in [`open`]; nothing else
//! asks which it is.
//!
//! An area only carries out. What is promised, begun or done is written to the pool's record by the caller, before and
//! after; everything here may be repeated after a crash.

mod error;
mod filesystem;
pub mod lazy;
pub mod templates;
mod thin;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_core::extents::MapLine;
use berth_core::ids::{Digest, NodeName, PoolName, Uid};
use berth_core::ledger::{Charge, Class};
use berth_core::reason::Reason;
use berth_core::thin::ThinState;
use berth_core::units::Bytes;
use berth_device::nbd::{AttachError, Attachment, BackendId, Nbd};
use berth_device::partition::Extent;
use berth_device::thin::LeftBehind;
use berth_record::{ChangeError, PoolRecord, VolumeEntry, VolumeOrigin, tables};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

pub use self::error::AreaError;
use self::error::io_error;
use self::filesystem::Filesystem;
use self::lazy::Lazy;
use self::thin::Thin;
pub use self::thin::{ThinGroup, ThinSpec};
use crate::operation::Finding;
use crate::supervisor::DataPlane;
use crate::telemetry::chain;

/// What a pool is made of on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Backend {
    /// A directory with one image in it.
    Filesystem {
        /// The directory on this node.
        path: PathBuf,
        /// The size of the image, if it has to be made.
        size: Bytes,
    },
    /// Two kernel pools of the device mapper.
    Thin(ThinSpec),
}

impl Backend {
    /// Where it lies, for people.
    pub fn told(&self) -> String {
        match self {
            Self::Filesystem { path, .. } => format!("the directory {}", path.display()),
            Self::Thin(ThinSpec { group: ThinGroup::Shared { name, size }, .. }) => {
                format!("{size} of volume group {name}")
            }
            Self::Thin(ThinSpec { group: ThinGroup::Exclusive { devices, .. }, .. }) => {
                let devices: Vec<_> = devices.iter().map(|device| device.display().to_string()).collect();
                format!("the devices {}", devices.join(", "))
            }
        }
    }
}

/// Whose area it is, and where its file system is mounted.
#[derive(Clone, Debug)]
pub struct Place {
    /// The UID of the pool that it was made for: what lies on the disk is named after it, whoever's it is by now.
    pub area: Uid,
    /// The pool's name.
    pub name: PoolName,
    /// This node.
    pub node: NodeName,
    /// Where the area's file system is mounted.
    pub mount_point: PathBuf,
    /// True if it was open on this node before: then it is never made anew.
    pub known: bool,
    /// By whom devices are suspended and images served.
    pub data_plane: DataPlane,
}

/// What is there of a directory that nothing in it can outgrow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoundedDir {
    /// All of it, at its place.
    Shown,
    /// What it lies in, but it is not at its place: making it again shows it.
    Hidden,
    /// Nothing.
    Gone,
}

/// An open area. Dropping it leaves it as it is.
pub trait Area: Send + Sync {
    /// The directory of the pool's own files, its record among them.
    fn root(&self) -> &Path;

    /// True if it was used before, so that a record must be there.
    fn holds_data(&self) -> Result<bool, AreaError>;

    /// Makes everything usable that the record says is there. Called once the record is open, before anything below.
    fn start(&self, record: &PoolRecord) -> Result<(), AreaError>;

    /// Why nothing bounds it, if so.
    fn advisory(&self) -> Option<String>;

    /// How many bytes may be promised in it.
    fn total(&self) -> Bytes;

    /// How many bytes are in use at this moment.
    fn used(&self) -> Bytes;

    /// The state of its kernel pools; `None` for a backend that has none.
    fn kernel_pools(&self) -> Option<ThinState> {
        None
    }

    /// `size`, if the kernel pool of volumes works and is smaller than that.
    fn volumes_lack(&self, _size: Bytes) -> Option<Bytes> {
        None
    }

    /// The directory that a transfer may work in.
    fn work_dir(&self, reservation: &Uid) -> PathBuf {
        self.root().join(DIRECTORIES.staging).join(reservation.as_str())
    }

    /// True if it is there.
    fn has_work_dir(&self, reservation: &Uid) -> bool;

    /// Makes it, for `bytes` of files.
    fn make_work_dir(&self, record: &PoolRecord, reservation: &Uid, bytes: Bytes) -> Result<(), AreaError>;

    /// Makes it so that whoever writes in it cannot take more than `bytes`, which its file system is a part of where it has
    /// one of its own. It is removed like any other.
    fn make_bounded_dir(
        &self,
        record: &PoolRecord,
        reservation: &Uid,
        bytes: Bytes,
    ) -> Result<(), AreaError> {
        self.make_work_dir(record, reservation, bytes)
    }

    /// What is there of it.
    fn bounded_dir(&self, record: &PoolRecord, reservation: &Uid) -> Result<BoundedDir, AreaError>;

    /// Removes it with all it holds.
    fn remove_work_dir(&self, record: &PoolRecord, reservation: &Uid) -> Result<(), AreaError>;

    /// What holds a staged image.
    fn image(&self, digest: &Digest) -> PathBuf;

    /// True if it is there.
    fn has_image(&self, digest: &Digest) -> bool {
        self.image(digest).exists()
    }

    /// Images that are shown before all of them is here; `None` for a backend that shows none.
    fn lazy(&self) -> Option<&dyn Lazy> {
        None
    }

    /// Opens an image that is filled in part, for more; `None` if it is not there, or not of this size.
    fn reopen_image(
        &self,
        record: &PoolRecord,
        digest: &Digest,
        size: Bytes,
    ) -> Result<Option<File>, AreaError>;

    /// Makes an image of zeros, to be filled, in place of what may be there.
    fn new_image(&self, record: &PoolRecord, digest: &Digest, size: Bytes) -> Result<File, AreaError>;

    /// Makes a filled image durable and read-only.
    fn seal_image(&self, record: &PoolRecord, digest: &Digest, file: Arc<File>) -> Result<(), AreaError>;

    /// Refuses if something still needs the image, so that it cannot be removed.
    fn require_unused(&self, record: &PoolRecord, digest: &Digest) -> Result<(), AreaError>;

    /// Removes an image.
    fn remove_image(&self, record: &PoolRecord, digest: &Digest) -> Result<(), AreaError>;

    /// What holds a volume: a file or a device.
    fn volume(&self, reservation: &Uid) -> PathBuf;

    /// The same as it is recorded, for people.
    fn recorded_path(&self, reservation: &Uid) -> PathBuf;

    /// True if it is there.
    fn has_volume(&self, reservation: &Uid) -> bool {
        self.volume(reservation).exists()
    }

    /// What a volume of this size may come to occupy.
    fn volume_charge(&self, size: Bytes) -> Charge;

    /// The metadata that a copy of a volume may need beside that.
    fn copy_metadata(&self, _size: Bytes) -> Bytes {
        Bytes::ZERO
    }

    /// Makes a volume of zeros, or with the content of its origin and zeros after it, in place of what may be there.
    fn make_volume(
        &self,
        record: &PoolRecord,
        reservation: &Uid,
        size: Bytes,
        origin: Option<&VolumeOrigin>,
    ) -> Result<(), AreaError>;

    /// Makes a volume or a snapshot of what another one is at this moment, and zeros after it, in place of what may be there.
    /// The other one may be in use.
    fn copy_volume(&self, record: &PoolRecord, source: &Uid, copy: &Copy<'_>) -> Result<(), AreaError>;

    /// Makes a volume, attached or not, as large as it is recorded. One that is that large already stays.
    fn resize_volume(&self, record: &PoolRecord, reservation: &Uid, size: Bytes) -> Result<(), AreaError>;

    /// What each part of a volume or snapshot reads. From what is returned on, the volume may be changed or removed: where
    /// the backend can keep it, it is read as it is now.
    fn map(&self, record: &PoolRecord, reservation: &Uid) -> Result<Reading<'_>, AreaError>;

    /// The same of `new`, with what is not different from `old` as such: a restore of `old` needs the rest and nothing else.
    ///
    /// # Errors
    /// [`AreaError::NotRelated`], and [`AreaError::Changing`] where `old` cannot be kept.
    fn delta(&self, record: &PoolRecord, old: &Uid, new: &Uid) -> Result<Reading<'_>, AreaError>;

    /// How many bytes a volume has blocks for; `None` if that is not known.
    fn occupied(&self, reservation: &Uid) -> Option<Bytes>;

    /// Who uses the devices of a volume, as one phrase each.
    fn users(&self, reservation: &Uid) -> Result<Vec<String>, AreaError>;

    /// Makes the kernel pool of a class at least so large.
    ///
    /// # Errors
    /// [`AreaError::NoKernelPools`].
    fn grow(&self, class: Class, size: Bytes) -> Result<(), AreaError>;

    /// Removes a volume that is not attached.
    fn remove_volume(&self, record: &PoolRecord, reservation: &Uid) -> Result<(), AreaError>;

    /// The block device that shows a volume, or a part of it; made if need be.
    fn attach(
        &self,
        reservation: &Uid,
        extent: Option<Extent>,
        read_only: bool,
    ) -> Result<PathBuf, AreaError>;

    /// The block devices that show a volume at this moment.
    fn attached(&self, reservation: &Uid) -> Result<Vec<PathBuf>, AreaError>;

    /// Takes back what [`Self::attach`] has made.
    fn detach(&self, reservation: &Uid) -> Result<(), AreaError>;

    /// The file that says that formatting of a volume began and has not ended.
    fn format_mark(&self, reservation: &Uid) -> PathBuf {
        self.root().join(DIRECTORIES.volumes).join(format!("{reservation}.formatting"))
    }

    /// Everything about which the record and what is there do not agree.
    fn check(&self, record: &PoolRecord) -> Result<Vec<Finding>, AreaError>;

    /// Lets everything go. What lies on the disk stays.
    ///
    /// # Errors
    /// While anything in it is in use; it then stays as far as it is in use.
    fn close(&self) -> Result<(), AreaError>;

    /// Lets go what nobody uses, after the area could not be opened as a whole. Volumes in `attached` stay as they are; all
    /// that are shown do if that is not known.
    fn leave(&self, attached: Option<&BTreeSet<Uid>>) -> Result<(), AreaError>;

    /// Lets everything go, and deletes the area with all it holds.
    fn destroy(self: Box<Self>) -> Result<(), AreaError>;
}

/// Reads what was kept of a volume. Its parts are ascending, without gaps or overlaps, and together the whole volume; what was
/// told before an error is worth nothing. Blocks, for minutes where there are millions of parts, of which a few are held.
pub type Reading<'a> = Box<dyn FnOnce(&mut dyn FnMut(MapLine)) -> Result<(), AreaError> + Send + 'a>;

fn volume_entry(record: &PoolRecord, volume: &Uid) -> Result<VolumeEntry, AreaError> {
    let entry = record.record().get(tables::VOLUMES, volume).map_err(ChangeError::from)?;
    entry.ok_or_else(|| AreaError::NoVolume { volume: volume.clone() })
}

/// A copy of a volume that is to be made.
#[derive(Clone, Debug)]
pub struct Copy<'a> {
    /// Its name.
    pub uid: &'a Uid,
    /// Its size, at least its source's.
    pub size: Bytes,
    /// What it reads where neither it nor its source have anything of their own: the same as its source.
    pub origin: Option<&'a VolumeOrigin>,
    /// It is never written.
    pub read_only: bool,
}

/// The device of a template.
///
/// # Errors
/// [`AreaError::NoTemplate`] if it is not attached.
pub fn template_device(template: &Uid) -> Result<PathBuf, AreaError> {
    let id = BackendId::new(template).map_err(|_| AreaError::NoTemplate { template: template.clone() })?;
    let found = Nbd::open().map_err(AttachError::from).and_then(|mut nbd| Attachment::find(&mut nbd, &id))?;
    let found = found.ok_or_else(|| AreaError::NoTemplate { template: template.clone() })?;
    Ok(found.path())
}

/// Makes or opens an area, as far as is needed to open its record. Blocks.
pub fn open(place: &Place, backend: &Backend) -> Result<Box<dyn Area>, AreaError> {
    match backend {
        Backend::Filesystem { path, size } => Ok(Box::new(Filesystem::open(place, path, *size)?)),
        Backend::Thin(spec) => Ok(Box::new(Thin::open(place, spec)?)),
    }
}

/// Ends the deletion of an area that was cut off. Nothing left: nothing to do.
pub fn destroy_rest(place: &Place, backend: &Backend) -> Result<(), AreaError> {
    match backend {
        Backend::Filesystem { path, .. } => Filesystem::destroy_rest(place, path),
        Backend::Thin(spec) => Thin::destroy_rest(place, spec),
    }
}

/// Makes an area this node's, so that it can be opened: where the area itself says whose it is. What it holds stays.
pub fn take_over(place: &Place, backend: &Backend) -> Result<(), AreaError> {
    match backend {
        Backend::Filesystem { path, .. } => Filesystem::take_over(place, path),
        Backend::Thin(_) => Ok(()), // its record alone says it
    }
}

/// Resumes every device of ours that is suspended and that this process has not suspended itself: whatever uses one waits.
/// Before anything else at a start, and again and again, because a suspension may take effect after the end of the process
/// that asked for it. Only in the one process that suspends ([`DataPlane::resume_left_behind`]).
pub fn resume_suspended() {
    let control = File::options().read(true).write(true).open("/dev/mapper/control");
    if control.is_err_and(|error| error.kind() == io::ErrorKind::NotFound || is_no_device(&error)) {
        return; // the kernel has no device mapper
    }
    let found = berth_device::thin::resume_left_behind().unwrap_or_else(|error| {
        tracing::warn!(error = chain(&error), "suspended devices are not looked for");
        Vec::new()
    });
    let reason = Reason::DeviceSuspended;
    for LeftBehind { device, resumed } in found {
        match resumed {
            Ok(()) => tracing::warn!(%reason, device = device.name, "was left suspended, and is resumed"),
            Err(error) => {
                tracing::error!(%reason, device = device.name, error = chain(&error), "stays suspended");
            }
        }
    }
}

fn is_no_device(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENODEV | Errno::ENXIO))
}

/// Directories of an area's file system.
struct Directories {
    images: &'static str,
    staging: &'static str,
    volumes: &'static str,
}

const DIRECTORIES: Directories = Directories { images: "images", staging: "staging", volumes: "volumes" };

impl Directories {
    fn below(&self, root: &Path) -> [PathBuf; 3] {
        [self.images, self.staging, self.volumes].map(|name| root.join(name))
    }
}

fn has_directories(root: &Path) -> bool {
    DIRECTORIES.below(root).iter().any(|path| path.exists())
}

fn make_directories(root: &Path) -> Result<(), AreaError> {
    DIRECTORIES
        .below(root)
        .iter()
        .try_for_each(|path| fs::create_dir_all(path).map_err(io_error("make", path)))
}
