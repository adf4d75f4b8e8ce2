//! Volumes and work directories: intent in the record, then the file, then the record again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use berth_core::ids::Uid;
use berth_core::node::Origin;
use berth_core::units::{Bytes, Generation};
use berth_record::{ChangeError, StagingEntry, VolumeEntry, VolumeKind, VolumeOrigin, VolumeState, tables};
use thiserror::Error;

use super::pools::OpenPool;
use crate::area::{AreaError, Copy};
use crate::node::now;
use crate::sabotage;

/// Why a volume or directory was not made or removed.
#[derive(Debug, Error)]
pub enum VolumeError {
    /// The record.
    #[error("the record refuses")]
    Record(#[from] ChangeError),
    /// The area.
    #[error("the pool's area fails")]
    Area(#[from] AreaError),
    /// It was ready, and its file is gone: another one would pass for it.
    #[error("the file {} of volume {uid} is gone, and is not made again", path.display())]
    Lost {
        /// Which.
        uid: Uid,
        /// Its file.
        path: PathBuf,
    },
}

/// Makes a volume; one that is half made is made again from the start, one that was ready never.
pub fn make(
    pool: &OpenPool,
    uid: &Uid,
    generation: Generation,
    size: Bytes,
    origin: &Origin,
    labels: &BTreeMap<String, String>,
) -> Result<(), VolumeError> {
    let wanted = VolumeEntry {
        generation,
        path: pool.area.recorded_path(uid),
        size,
        origin: match origin {
            Origin::Blank => None,
            Origin::Image(digest) => Some(VolumeOrigin::Image(*digest)),
        },
        kind: VolumeKind::Volume,
        source: None,
        state: VolumeState::Creating,
        labels: labels.clone(),
    };
    let entry = pool.record.begin_volume(uid, &wanted)?;
    finish(pool, uid, &entry)
}

/// Makes what was begun of a volume, a copy or a snapshot, from the start if it is half made.
pub fn finish(pool: &OpenPool, uid: &Uid, entry: &VolumeEntry) -> Result<(), VolumeError> {
    if entry.state == VolumeState::Ready {
        if !pool.area.has_volume(uid) {
            return Err(VolumeError::Lost { uid: uid.clone(), path: pool.area.volume(uid) });
        }
    } else if let Some(source) = &entry.source {
        let copy = Copy {
            uid,
            size: entry.size,
            origin: entry.origin.as_ref(),
            read_only: entry.kind == VolumeKind::Snapshot,
        };
        pool.area.copy_volume(&pool.record, source, &copy)?;
    } else {
        pool.area.make_volume(&pool.record, uid, entry.size, entry.origin.as_ref())?;
    }
    pool.record.volume_ready(uid, entry.generation)?;
    if let (Some(VolumeOrigin::Image(digest)), None) = (&entry.origin, &entry.source) {
        pool.record.image_used(digest, now())?;
    }
    Ok(())
}

/// Makes a volume larger, in use or not: what is recorded first. What was cut off behind that is ended by whoever opens the
/// pool, and by [`enlarged`].
pub fn grow(pool: &OpenPool, uid: &Uid, size: Bytes) -> Result<(), VolumeError> {
    pool.record.volume_resized(uid, size)?;
    Ok(pool.area.resize_volume(&pool.record, uid, size)?)
}

/// Makes the devices of a volume as large as it is recorded, whatever ended before they were. Nothing to do is no error.
pub fn enlarged(pool: &OpenPool, uid: &Uid) -> Result<(), VolumeError> {
    let found = pool.record.record().get(tables::VOLUMES, uid).map_err(ChangeError::from)?;
    match found.filter(|volume| volume.kind == VolumeKind::Volume && volume.state == VolumeState::Ready) {
        Some(volume) => Ok(pool.area.resize_volume(&pool.record, uid, volume.size)?),
        None => Ok(()),
    }
}

/// Removes a volume that is not attached.
pub fn remove(pool: &OpenPool, uid: &Uid) -> Result<(), VolumeError> {
    let volume = pool.record.record().get(tables::VOLUMES, uid).map_err(ChangeError::from)?;
    if !pool.record.begin_delete_volume(uid)? {
        return Ok(());
    }
    pool.area.detach(uid)?;
    if !sabotage::active(sabotage::RELEASE_WITHOUT_DELETE) {
        pool.area.remove_volume(&pool.record, uid)?;
    }
    if let Some(VolumeOrigin::Image(digest)) = volume.and_then(|volume| volume.origin)
        && pool.record.record().get(tables::IMAGES, &digest).map_err(ChangeError::from)?.is_some()
    {
        // Its time without a use begins now.
        pool.record.image_used(&digest, now())?;
    }
    Ok(pool.record.forget_volume(uid)?)
}

/// Makes the directory of a reservation, `bounded` if nothing in it may outgrow `bytes`. One that is there stays as it is, also
/// one that an earlier version made without a bound.
pub fn make_work_dir(
    pool: &OpenPool,
    uid: &Uid,
    generation: Generation,
    bytes: Bytes,
    bounded: bool,
) -> Result<(), VolumeError> {
    let dir = Path::new("staging").join(uid.as_str());
    pool.record.begin_staging(uid, &StagingEntry { generation, dir, bytes })?;
    if bounded && !pool.area.has_work_dir(uid) {
        return Ok(pool.area.make_bounded_dir(&pool.record, uid, bytes)?);
    }
    Ok(pool.area.make_work_dir(&pool.record, uid, bytes)?)
}

/// Removes it with all it holds.
pub fn remove_work_dir(pool: &OpenPool, uid: &Uid) -> Result<(), VolumeError> {
    if !sabotage::active(sabotage::RELEASE_WITHOUT_DELETE) {
        pool.area.remove_work_dir(&pool.record, uid)?;
    }
    pool.record.forget_staging(uid)?;
    Ok(())
}
