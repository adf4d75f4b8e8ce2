//! The area of a `dmThin` pool: a volume group with the pool's record and two kernel pools, `images` and `volumes`.
//!
//! Staged images and work directories are thin devices in `images`; a directory has a file system on its own. A volume is a
//! thin device in `volumes`; one of an image reads what it has not written from the image's device, which is read-only.
//! An image may be shown before all of it is here; volumes then start from a device over its own ([`lazy`]).
//! Each device is named after the UID of the reservation, or after the first 128 bits of an image's digest, so what is
//! there is known again after a crash. The kernel zeroes what a device gets and does not write whole.

mod check;
mod devices;
mod group;
mod lazy;
mod maps;
mod shown;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use berth_core::ids::{Digest, Uid};
use berth_core::ledger::{Charge, Class};
use berth_core::thin::{PoolMode, PoolState, StopReason, ThinState, Usage, copy_metadata, volume_charge};
use berth_core::units::Bytes;
use berth_device::filesystem;
use berth_device::loop_device::{self, LoopOptions};
use berth_device::mounts::{self, FsType, MountOptions};
use berth_device::partition::Extent;
use berth_device::thin::{DeviceName, Suspender, ThinDevice, VolumeGroupError, list_ours};
use berth_device::users::users;
use berth_device::{files, thin};
use berth_record::{ChangeError, PoolRecord, VolumeOrigin, tables};
use serde::{Deserialize, Serialize};

use self::group::{Group, KernelPools};
use super::error::{AreaError, io_error};
use super::{Area, BoundedDir, Copy, Place, Reading, has_directories, make_directories, template_device};
use crate::operation::Finding;
use crate::supervisor::DataPlane;

/// What a `dmThin` pool is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ThinSpec {
    /// Where it lies.
    pub group: ThinGroup,
    /// The unit in which space is handed out.
    pub block: Bytes,
}

/// Where a `dmThin` pool lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ThinGroup {
    /// In a volume group of its own.
    Exclusive {
        /// On these devices.
        devices: Vec<PathBuf>,
        /// Whether what they hold may be destroyed.
        wipe: bool,
    },
    /// In a volume group that is there.
    Shared {
        /// Its name.
        name: String,
        /// How much of it the pool takes.
        size: Bytes,
    },
}

/// An open area.
pub struct Thin {
    pool: Uid,
    root: PathBuf,
    group: Group,
    kernel: OnceLock<KernelPools>,
    suspender: Arc<dyn Suspender>,
    data_plane: DataPlane,
    /// Images that somebody shows or makes local at this moment: nobody else does.
    occupied: Mutex<BTreeSet<Digest>>,
    /// Held while a kernel pool is told something.
    alone: Mutex<()>,
    /// The size that the kernel pool of volumes was last seen to have.
    volumes_have: AtomicU64,
}

impl Thin {
    /// Makes or opens the area, as far as its record. Blocks.
    pub fn open(place: &Place, spec: &ThinSpec) -> Result<Self, AreaError> {
        let group = Group::open(&place.area, spec, place.known)?;
        group.mount_record(&place.mount_point)?;
        Ok(Self::with(place, group))
    }

    fn with(place: &Place, group: Group) -> Self {
        let (pool, root) = (place.area.clone(), place.mount_point.clone());
        let suspender = place.data_plane.suspender();
        let (kernel, alone, data_plane) = (OnceLock::new(), Mutex::default(), place.data_plane.clone());
        let (occupied, volumes_have) = (Mutex::default(), AtomicU64::new(0));
        Self { pool, root, group, kernel, suspender, data_plane, occupied, alone, volumes_have }
    }

    /// Ends a deletion that was cut off.
    pub fn destroy_rest(place: &Place, spec: &ThinSpec) -> Result<(), AreaError> {
        match Group::open(&place.area, spec, true) {
            Err(AreaError::Group(VolumeGroupError::NoGroup { .. })) => Ok(()),
            group => Box::new(Self::with(place, group?)).destroy(),
        }
    }

    fn kernel(&self) -> Result<&KernelPools, AreaError> {
        self.kernel.get().ok_or_else(|| AreaError::NotStarted { root: self.root.clone() })
    }

    fn mount_directory(&self, record: &PoolRecord, uid: &Uid) -> Result<(), AreaError> {
        let Some(entry) = Self::made(record, uid)? else { return Ok(()) };
        let device = self.show(uid, &entry, None, false)?;
        let path = self.work_dir(uid);
        let options = MountOptions { no_access_times: true, no_exec: true, ..MountOptions::default() };
        mounts::mount_device(&device, &path, FsType::Ext4, options)?;
        match fs::remove_dir(path.join("lost+found")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done.map_err(io_error("empty", &path)),
        }
    }

    /// The node of what a volume starts from.
    fn origin(&self, record: &PoolRecord, origin: &VolumeOrigin) -> Result<PathBuf, AreaError> {
        match origin {
            VolumeOrigin::Image(digest) => self.shown_image(record, digest),
            VolumeOrigin::Template { template } => template_device(template),
        }
    }

    /// The node of what a volume is to start from, which must be there, and no larger than the volume.
    fn new_origin(
        &self,
        record: &PoolRecord,
        origin: &VolumeOrigin,
        size: Bytes,
    ) -> Result<PathBuf, AreaError> {
        let path = self.origin(record, origin)?;
        let found = match origin {
            VolumeOrigin::Image(digest) => {
                let image = record.record().get(tables::IMAGES, digest).map_err(ChangeError::from)?;
                image.map(|image| image.virtual_size)
            }
            VolumeOrigin::Template { template } => {
                let found = record.record().get(tables::TEMPLATES, template).map_err(ChangeError::from)?;
                found.map(|template| template.virtual_size)
            }
        };
        let found = found.unwrap_or_default();
        if found > size {
            return Err(AreaError::ImageTooLarge { path, found, promised: size });
        }
        if !path.exists() {
            return Err(AreaError::Vanished { device: path });
        }
        Ok(path)
    }

    /// The node of a thin device; for what has no UID as its name, a place where there is never anything.
    fn node(&self, class: Class, uid: &Uid) -> PathBuf {
        let name = DeviceName::thin(&self.pool, class, uid);
        name.map_or_else(|_| self.root.join("nothing"), |name| name.path())
    }

    fn writable(&self, record: &PoolRecord, uid: &Uid) -> Result<Option<File>, AreaError> {
        let Some(entry) = Self::made(record, uid)? else { return Ok(None) };
        self.hide(Class::Images, uid)?; // it may be shown read-only
        let path = self.show(uid, &entry, None, false)?;
        let file = OpenOptions::new().read(true).write(true).open(&path);
        file.map(Some).map_err(io_error("open", &path))
    }
}

/// What the device of an image is named after: the first 128 bits of its digest, written as a UUID.
fn image_uid(digest: &Digest) -> Uid {
    let hex = digest.hex();
    Uid::from([&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..32]].join("-"))
}

/// True if the kernel refuses writes to a device.
fn refuses_writes(device: &Path) -> Result<bool, AreaError> {
    let number = thin::DeviceNumber::of(device).map_err(io_error("examine", device))?;
    let flag = PathBuf::from(format!("/sys/dev/block/{number}/ro"));
    Ok(fs::read_to_string(&flag).map_err(io_error("read", &flag))?.trim() == "1")
}

/// Waits until what was written to a device is on stable storage.
fn flush(device: &Path) -> Result<(), AreaError> {
    File::open(device).and_then(|file| file.sync_all()).map_err(io_error("flush", device))
}

const FAILED: PoolState = PoolState {
    mode: PoolMode::Failed,
    needs_check: true,
    data: Usage { used: Bytes::ZERO, total: Bytes::ZERO },
    metadata: Usage { used: Bytes::ZERO, total: Bytes::ZERO },
};

impl Area for Thin {
    fn root(&self) -> &Path {
        &self.root
    }

    fn holds_data(&self) -> Result<bool, AreaError> {
        Ok(has_directories(&self.root))
    }

    fn start(&self, record: &PoolRecord) -> Result<(), AreaError> {
        make_directories(&self.root)?; // before the kernel pools: where these are, a record has to be
        if self.kernel.get().is_none() {
            let opened = self.group.open_kernel_pools()?;
            self.kernel.get_or_init(|| opened);
        }
        let alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        [Class::Images, Class::Volumes].into_iter().try_for_each(|class| self.reconcile(record, class))?;
        drop(alone);
        self.release_left_behind();
        self.restore(record)
    }

    fn advisory(&self) -> Option<String> {
        None
    }

    fn total(&self) -> Bytes {
        self.group.total()
    }

    fn used(&self) -> Bytes {
        let state = self.kernel_pools();
        state.map(|state| state.images.data.used.saturating_add(state.volumes.data.used)).unwrap_or_default()
    }

    fn kernel_pools(&self) -> Option<ThinState> {
        let kernel = self.kernel.get()?;
        let state = |class| {
            kernel.of(class).state().unwrap_or_else(|error| {
                tracing::warn!(pool = %kernel.of(class).name(), error = crate::telemetry::chain(&error), "no state");
                FAILED
            })
        };
        Some(ThinState { images: state(Class::Images), volumes: state(Class::Volumes) })
    }

    fn volumes_lack(&self, size: Bytes) -> Option<Bytes> {
        if size <= Bytes(self.volumes_have.load(Ordering::Relaxed)) {
            return None; // none ever shrinks
        }
        let state = self.kernel.get()?.of(Class::Volumes).state().ok()?;
        self.volumes_have.store(state.data.total.0, Ordering::Relaxed);
        let works = matches!(state.unwritable(), None | Some(StopReason::Data));
        (works && state.data.total < size).then_some(size)
    }

    fn has_work_dir(&self, reservation: &Uid) -> bool {
        mounts::is_mounted(&self.work_dir(reservation)).is_ok_and(|mount| mount.is_some())
    }

    fn make_work_dir(&self, record: &PoolRecord, reservation: &Uid, bytes: Bytes) -> Result<(), AreaError> {
        if Self::made(record, reservation)?.is_none() {
            let entry = self.make(record, reservation, Class::Images, bytes)?;
            let device = self.show(reservation, &entry, None, false)?;
            filesystem::mkfs_directory(&device, entry.size)?;
            flush(&device)?;
            record.thin_made(reservation)?;
        }
        self.mount_directory(record, reservation)
    }

    fn bounded_dir(&self, record: &PoolRecord, reservation: &Uid) -> Result<BoundedDir, AreaError> {
        Ok(match Self::made(record, reservation)? {
            _ if self.has_work_dir(reservation) => BoundedDir::Shown,
            Some(_) => BoundedDir::Hidden,
            None => BoundedDir::Gone,
        })
    }

    fn remove_work_dir(&self, record: &PoolRecord, reservation: &Uid) -> Result<(), AreaError> {
        let path = self.work_dir(reservation);
        mounts::unmount(&path)?;
        self.remove(record, reservation)?;
        match fs::remove_dir(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done.map_err(io_error("remove", &path)),
        }
    }

    fn image(&self, digest: &Digest) -> PathBuf {
        self.node(Class::Images, &image_uid(digest))
    }

    fn lazy(&self) -> Option<&dyn super::lazy::Lazy> {
        Some(self)
    }

    fn reopen_image(
        &self,
        record: &PoolRecord,
        digest: &Digest,
        size: Bytes,
    ) -> Result<Option<File>, AreaError> {
        let uid = image_uid(digest);
        let same = Self::made(record, &uid)?
            .is_some_and(|entry| entry.size == size.round_up(self.group.block().bytes()));
        if same { self.writable(record, &uid) } else { Ok(None) }
    }

    fn new_image(&self, record: &PoolRecord, digest: &Digest, size: Bytes) -> Result<File, AreaError> {
        let uid = image_uid(digest);
        self.remove_shown(record, digest)?;
        self.make(record, &uid, Class::Images, size)?;
        record.thin_made(&uid)?;
        let path = self.image(digest);
        self.writable(record, &uid)?.ok_or_else(|| AreaError::Vanished { device: path })
    }

    fn seal_image(&self, record: &PoolRecord, digest: &Digest, file: Arc<File>) -> Result<(), AreaError> {
        let path = self.image(digest);
        file.sync_all().map_err(io_error("write out", &path))?;
        drop(file);
        let uid = image_uid(digest);
        let entry = Self::made(record, &uid)?.ok_or_else(|| AreaError::Vanished { device: path })?;
        self.hide(Class::Images, &uid)?;
        self.show(&uid, &entry, None, true).map(drop)
    }

    /// A volume reads what it has not written from its image.
    fn require_unused(&self, record: &PoolRecord, digest: &Digest) -> Result<(), AreaError> {
        let volumes = record.record().entries(tables::VOLUMES).map_err(ChangeError::from)?;
        match volumes.into_iter().find(|(_, volume)| volume.origin == Some(VolumeOrigin::Image(*digest))) {
            Some((volume, _)) => Err(AreaError::ImageInUse { digest: *digest, volume }),
            None => Ok(()),
        }
    }

    fn remove_image(&self, record: &PoolRecord, digest: &Digest) -> Result<(), AreaError> {
        self.remove_shown(record, digest)?;
        self.remove(record, &image_uid(digest))
    }

    fn volume(&self, reservation: &Uid) -> PathBuf {
        self.node(Class::Volumes, reservation)
    }

    fn recorded_path(&self, reservation: &Uid) -> PathBuf {
        self.volume(reservation)
    }

    fn make_volume(
        &self,
        record: &PoolRecord,
        reservation: &Uid,
        size: Bytes,
        origin: Option<&VolumeOrigin>,
    ) -> Result<(), AreaError> {
        let origin = origin.map(|origin| self.new_origin(record, origin, size)).transpose()?;
        let entry = self.make(record, reservation, Class::Volumes, size)?;
        self.show(reservation, &entry, origin.as_deref(), false)?;
        Ok(record.thin_made(reservation)?)
    }

    fn volume_charge(&self, size: Bytes) -> Charge {
        volume_charge(size, self.group.block())
    }

    fn copy_metadata(&self, size: Bytes) -> Bytes {
        copy_metadata(size, self.group.block())
    }

    fn copy_volume(&self, record: &PoolRecord, source: &Uid, copy: &Copy<'_>) -> Result<(), AreaError> {
        let origin = copy.origin.map(|origin| self.origin(record, origin)).transpose()?;
        let entry = self.snapshot(record, copy.uid, source, copy.size)?;
        self.show(copy.uid, &entry, origin.as_deref(), copy.read_only)?;
        Ok(record.thin_made(copy.uid)?)
    }

    fn resize_volume(&self, record: &PoolRecord, reservation: &Uid, size: Bytes) -> Result<(), AreaError> {
        self.resize(record, reservation, size)?;
        for part in loop_device::find(&self.volume(reservation))? {
            part.refresh_size()?;
        }
        Ok(())
    }

    fn map(&self, record: &PoolRecord, reservation: &Uid) -> Result<Reading<'_>, AreaError> {
        self.keep_map(record, reservation)
    }

    fn delta(&self, record: &PoolRecord, old: &Uid, new: &Uid) -> Result<Reading<'_>, AreaError> {
        self.keep_delta(record, old, new)
    }

    fn occupied(&self, reservation: &Uid) -> Option<Bytes> {
        let device = ThinDevice::find(self.kernel().ok()?.of(Class::Volumes), reservation).ok()??;
        device.mapped().ok()?
    }

    fn users(&self, reservation: &Uid) -> Result<Vec<String>, AreaError> {
        let device = self.volume(reservation);
        let parts = loop_device::find(&device)?;
        let mut found = users(&device)?;
        for part in &parts {
            found.extend(users(&part.path)?);
        }
        let shown = list_ours().map_err(thin::ThinDeviceError::from)?;
        let info = shown.into_iter().find(|info| info.device().is_some_and(|name| name.path() == device));
        if found.is_empty() && info.is_some_and(|info| info.open_count as usize > parts.len()) {
            found.push("somebody who is not seen from here".to_owned());
        }
        Ok(found)
    }

    fn grow(&self, class: Class, size: Bytes) -> Result<(), AreaError> {
        let _alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        self.group.grow(self.kernel()?, class, size, &*self.suspender)
    }

    fn remove_volume(&self, record: &PoolRecord, reservation: &Uid) -> Result<(), AreaError> {
        self.remove(record, reservation)?;
        let mark = self.format_mark(reservation);
        files::remove_if_there(&mark)?;
        Ok(files::sync_parent(&mark)?)
    }

    /// The device itself; a part of it, or one that refuses writes, by a loop device over it.
    fn attach(
        &self,
        reservation: &Uid,
        extent: Option<Extent>,
        read_only: bool,
    ) -> Result<PathBuf, AreaError> {
        let device = self.volume(reservation);
        if extent.is_none() && (!read_only || refuses_writes(&device)?) {
            return Ok(device);
        }
        let options = LoopOptions { direct_io: true, extent, read_only, ..LoopOptions::default() };
        Ok(loop_device::attach(&device, options)?.path)
    }

    fn attached(&self, reservation: &Uid) -> Result<Vec<PathBuf>, AreaError> {
        let device = self.volume(reservation);
        let parts: Vec<_> = loop_device::find(&device)?.into_iter().map(|part| part.path).collect();
        Ok(device.exists().then_some(device).into_iter().chain(parts).collect())
    }

    fn detach(&self, reservation: &Uid) -> Result<(), AreaError> {
        for part in loop_device::find(&self.volume(reservation))? {
            loop_device::detach(&part)?;
        }
        Ok(())
    }

    fn check(&self, record: &PoolRecord) -> Result<Vec<Finding>, AreaError> {
        self.findings(record)
    }

    fn close(&self) -> Result<(), AreaError> {
        self.require_idle()?;
        self.hide_all()?;
        self.group.close_kernel_pools()?;
        self.group.unmount_record(&self.root)
    }

    fn leave(&self, attached: Option<&BTreeSet<Uid>>) -> Result<(), AreaError> {
        if !self.hide_unused(|uid| attached.is_none_or(|attached| attached.contains(uid)))? {
            return Ok(());
        }
        self.group.close_kernel_pools()?;
        self.group.unmount_record(&self.root)
    }

    fn destroy(self: Box<Self>) -> Result<(), AreaError> {
        self.close()?;
        self.group.destroy()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_of_an_image_is_named_after_its_digest() {
        let text = format!("sha256:{}", "0123456789abcdef".repeat(4));
        let uid = image_uid(&text.parse().expect("a digest"));
        assert_eq!(uid.as_str(), "01234567-89ab-cdef-0123-456789abcdef");
        let pool = Uid::from("0f3c9a1e-5b7d-4c2a-9e10-00a1b2c3d4e5");
        assert!(DeviceName::thin(&pool, Class::Images, &uid).is_ok(), "device mapper takes it");
    }
}
