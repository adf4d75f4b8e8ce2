//! The area of a `dmThin` pool: a volume group with the pool's record and two kernel pools, `images` and `volumes`.
//!
//! Staged images and work directories are thin devices in `images`; a directory has a file system on its own. A volume is a
//! thin device in `volumes`; one of an image reads what it has not written from the image's device, which is read-only.
//! Each device is named after the UID of the reservation, or after the first 128 bits of an image's digest, so what is
//! there is known again after a crash. The kernel zeroes what a device gets and does not write whole.

mod devices;
mod group;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use berth_core::ids::{Digest, Uid};
use berth_core::ledger::Class;
use berth_core::thin::{PoolMode, PoolState, ThinState, Usage};
use berth_core::units::Bytes;
use berth_device::filesystem;
use berth_device::loop_device::{self, LoopOptions};
use berth_device::mounts::{self, FsType, MountOptions};
use berth_device::partition::Extent;
use berth_device::thin::{DeviceName, Suspender, ThinDevice, list_ours};
use berth_device::{files, thin};
use berth_record::{ChangeError, ImageState, PoolRecord, VolumeState, tables};
use serde::{Deserialize, Serialize};

use self::group::{Group, KernelPools};
use super::error::{AreaError, io_error};
use super::{Area, DIRECTORIES, Place, has_directories, make_directories};

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
    /// Held while a kernel pool is told something.
    alone: Mutex<()>,
}

impl Thin {
    /// Makes or opens the area, as far as its record. Blocks.
    pub fn open(place: &Place, spec: &ThinSpec) -> Result<Self, AreaError> {
        let group = Group::open(&place.pool, spec, place.known)?;
        group.mount_record(&place.mount_point)?;
        let (pool, root) = (place.pool.clone(), place.mount_point.clone());
        let suspender = place.data_plane.suspender();
        Ok(Self { pool, root, group, kernel: OnceLock::new(), suspender, alone: Mutex::default() })
    }

    fn kernel(&self) -> Result<&KernelPools, AreaError> {
        self.kernel.get().ok_or_else(|| AreaError::NotStarted { root: self.root.clone() })
    }

    /// Makes every device appear that the record says is in use.
    fn restore(&self, record: &PoolRecord) -> Result<(), AreaError> {
        let images = record.record().entries(tables::IMAGES).map_err(ChangeError::from)?;
        for (digest, image) in images {
            let uid = image_uid(&digest);
            if let Some(entry) = Self::made(record, &uid)?
                && image.state == ImageState::Complete
            {
                self.show(&uid, &entry, None, true)?;
            }
        }
        let volumes = record.record().entries(tables::VOLUMES).map_err(ChangeError::from)?;
        for (uid, volume) in volumes.into_iter().filter(|(_, volume)| volume.state == VolumeState::Ready) {
            if let Some(entry) = Self::made(record, &uid)? {
                let origin = volume.origin.map(|digest| self.image(&digest));
                self.show(&uid, &entry, origin.as_deref(), false)?;
            }
        }
        for (uid, _) in record.record().entries(tables::STAGING).map_err(ChangeError::from)? {
            if Self::made(record, &uid)?.is_some() {
                self.mount_directory(record, &uid)?;
            }
        }
        Ok(())
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

    fn hide_all(&self) -> Result<(), AreaError> {
        let staging = self.root.join(DIRECTORIES.staging);
        for entry in fs::read_dir(&staging).into_iter().flatten().flatten() {
            mounts::unmount(&entry.path())?;
        }
        let Some(kernel) = self.kernel.get() else { return Ok(()) };
        for class in [Class::Volumes, Class::Images] {
            for info in list_ours().map_err(thin::ThinDeviceError::from)? {
                if let Some(DeviceName::Thin { pool, class: its, holder }) = info.device()
                    && pool == self.pool
                    && its == class
                    && let Some(device) = ThinDevice::find(kernel.of(class), &holder)?
                {
                    device.deactivate()?;
                }
            }
        }
        Ok(())
    }
}

/// What the device of an image is named after: the first 128 bits of its digest, written as a UUID.
fn image_uid(digest: &Digest) -> Uid {
    let hex = digest.hex();
    Uid::from([&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..32]].join("-"))
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
        for class in [Class::Images, Class::Volumes] {
            self.reconcile(record, class)?;
        }
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

    fn has_work_dir(&self, reservation: &Uid) -> bool {
        mounts::is_mounted(&self.work_dir(reservation)).is_ok_and(|mount| mount.is_some())
    }

    fn make_work_dir(&self, record: &PoolRecord, reservation: &Uid, bytes: Bytes) -> Result<(), AreaError> {
        if Self::made(record, reservation)?.is_none() {
            let entry = self.make(record, reservation, Class::Images, bytes)?;
            let device = self.show(reservation, &entry, None, false)?;
            filesystem::mkfs_directory(&device)?;
            flush(&device)?;
            record.thin_made(reservation)?;
        }
        self.mount_directory(record, reservation)
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
        match volumes.into_iter().find(|(_, volume)| volume.origin.as_ref() == Some(digest)) {
            Some((volume, _)) => Err(AreaError::ImageInUse { digest: *digest, volume }),
            None => Ok(()),
        }
    }

    fn remove_image(&self, record: &PoolRecord, digest: &Digest) -> Result<(), AreaError> {
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
        origin: Option<&Digest>,
    ) -> Result<(), AreaError> {
        if let Some(digest) = origin {
            let image = record.record().get(tables::IMAGES, digest).map_err(ChangeError::from)?;
            let found = image.map(|image| image.virtual_size).unwrap_or_default();
            let path = self.image(digest);
            if found > size {
                return Err(AreaError::ImageTooLarge { path, found, promised: size });
            }
            if !path.exists() {
                return Err(AreaError::Vanished { device: path });
            }
        }
        let entry = self.make(record, reservation, Class::Volumes, size)?;
        let origin = origin.map(|digest| self.image(digest));
        self.show(reservation, &entry, origin.as_deref(), false)?;
        Ok(record.thin_made(reservation)?)
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
        if extent.is_none() && !read_only {
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

    fn close(&self) -> Result<(), AreaError> {
        self.hide_all()?;
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
