//! Which devices of a pool are shown: at the start all that the record says are in use, and none that nobody uses once the
//! pool is let go.

use std::fs;

use berth_core::ids::{Digest, Uid};
use berth_core::ledger::Class;
use berth_device::mounts;
use berth_device::thin::{DeviceInfo, DeviceName, KernelPool, ThinDevice, ThinDeviceError, list_ours};
use berth_record::{ChangeError, ImageState, PoolRecord, VolumeEntry, VolumeKind, VolumeState, tables};

use super::super::DIRECTORIES;
use super::super::error::AreaError;
use super::{Thin, image_uid};
use crate::telemetry::chain;

impl Thin {
    /// Makes every device appear that the record says is in use. One that does not is told, and counts as lost; the others
    /// are served.
    pub(super) fn restore(&self, record: &PoolRecord) -> Result<(), AreaError> {
        let images = record.record().entries(tables::IMAGES).map_err(ChangeError::from)?;
        for (digest, image) in images {
            let restored = match image.state {
                ImageState::Filling { .. } => Ok(()),
                ImageState::Complete => self.restore_image(record, &digest),
                ImageState::Shown { .. } => self.restore_shown(record, &digest),
            };
            told(&digest.to_string(), restored);
        }
        let volumes = record.record().entries(tables::VOLUMES).map_err(ChangeError::from)?;
        for (uid, volume) in volumes.into_iter().filter(|(_, volume)| volume.state == VolumeState::Ready) {
            told(uid.as_str(), self.restore_volume(record, &uid, &volume));
        }
        for (uid, _) in record.record().entries(tables::STAGING).map_err(ChangeError::from)? {
            if Self::made(record, &uid)?.is_some() {
                told(uid.as_str(), self.mount_directory(record, &uid));
            }
        }
        Ok(())
    }

    fn restore_image(&self, record: &PoolRecord, digest: &Digest) -> Result<(), AreaError> {
        let uid = image_uid(digest);
        match Self::made(record, &uid)? {
            Some(entry) => self.show(&uid, &entry, None, true).map(drop),
            None => Ok(()),
        }
    }

    fn restore_volume(&self, record: &PoolRecord, uid: &Uid, volume: &VolumeEntry) -> Result<(), AreaError> {
        let Some(mut entry) = Self::made(record, uid)? else { return Ok(()) };
        let size = volume.size.round_up(self.group.block().bytes());
        if volume.kind == VolumeKind::Volume && entry.size < size {
            // It was to become larger when that was cut off. If it cannot, it works as it was.
            match self.resize(record, uid, size) {
                Ok(resized) => entry = resized,
                Err(error) => {
                    tracing::error!(volume = %uid, error = chain(&error), "stays smaller than recorded");
                }
            }
        }
        let origin = volume.origin.as_ref().map(|origin| self.origin(record, origin)).transpose()?;
        self.show(uid, &entry, origin.as_deref(), volume.kind == VolumeKind::Snapshot).map(drop)
    }

    /// The thin devices of this pool that are shown, of one class.
    fn shown(&self, class: Class) -> Result<Vec<(Uid, DeviceInfo)>, AreaError> {
        let all = list_ours().map_err(ThinDeviceError::from)?;
        let ours = all.into_iter().filter_map(|info| match info.device() {
            Some(DeviceName::Thin { pool, class: its, holder }) if pool == self.pool && its == class => {
                Some((holder, info))
            }
            _ => None,
        });
        Ok(ours.collect())
    }

    /// Whose templates are shown, and whether somebody has each open.
    fn templates(&self) -> Result<Vec<(Uid, bool)>, AreaError> {
        let all = list_ours().map_err(ThinDeviceError::from)?;
        let ours = all.into_iter().filter_map(|info| match info.device() {
            Some(DeviceName::Template { pool, holder }) if pool == self.pool => {
                Some((holder, info.open_count > 0))
            }
            _ => None,
        });
        Ok(ours.collect())
    }

    /// Refuses while somebody uses a volume: then nothing of the pool is taken away.
    pub(super) fn require_idle(&self) -> Result<(), AreaError> {
        for (_, info) in self.shown(Class::Volumes)? {
            if info.open_count > 0 {
                let users = format!("it is open {} times", info.open_count);
                return Err(AreaError::InUse { device: info.name, users });
            }
        }
        Ok(())
    }

    /// Makes every device of the pool go, whoever has opened its kernel pools.
    pub(super) fn hide_all(&self) -> Result<(), AreaError> {
        for path in self.directories() {
            mounts::unmount(&path)?;
        }
        self.hide_class(Class::Volumes)?;
        for (uid, _) in self.templates()? {
            self.hide_template(&uid)?;
            self.release_source(&uid, true)?;
        }
        for (uid, _) in self.shown(Class::Images)? {
            self.release_source(&uid, false)?; // one that was attached for a template that was not shown yet
        }
        self.hide_class(Class::Images)
    }

    fn hide_class(&self, class: Class) -> Result<(), AreaError> {
        let Some(pool) = KernelPool::find(&self.pool, class)? else { return Ok(()) };
        for (uid, _) in self.shown(class)? {
            if let Some(device) = ThinDevice::find(&pool, &uid)? {
                device.deactivate()?;
            }
        }
        Ok(())
    }

    /// Makes the devices go that nobody has open and that need not be kept. True if none is left.
    pub(super) fn hide_unused(&self, keep: impl Fn(&Uid) -> bool) -> Result<bool, AreaError> {
        let mut left = false;
        for path in self.directories() {
            left |= mounts::unmount(&path).is_err();
        }
        for class in [Class::Volumes, Class::Images] {
            // Volumes lie on templates, and these on images.
            let templates = if class == Class::Images { self.templates()? } else { Vec::new() };
            for (uid, _) in templates.into_iter().filter(|(_, open)| !open) {
                self.hide_template(&uid)?;
            }
            let pool = KernelPool::find(&self.pool, class)?;
            for (uid, info) in self.shown(class)? {
                let device = match &pool {
                    Some(pool) if info.open_count == 0 && !keep(&uid) => ThinDevice::find(pool, &uid)?,
                    _ => None,
                };
                match device.map(ThinDevice::deactivate) {
                    Some(Ok(())) => {}
                    Some(Err(ThinDeviceError::InUse { .. })) | None => left = true,
                    Some(Err(error)) => return Err(error.into()),
                }
            }
        }
        Ok(!left)
    }

    fn directories(&self) -> Vec<std::path::PathBuf> {
        let staging = fs::read_dir(self.root.join(DIRECTORIES.staging));
        staging.into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    }
}

fn told(what: &str, shown: Result<(), AreaError>) {
    if let Err(error) = shown {
        tracing::error!(what, error = chain(&error), "cannot be shown, and counts as lost");
    }
}
