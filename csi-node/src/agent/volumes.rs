//! Volumes and work directories: intent in the record, then the file, then the record again.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use berth_core::ids::Uid;
use berth_core::node::Origin;
use berth_core::units::{Bytes, Generation};
use berth_device::files::{self, FileError};
use berth_device::loop_device::{self, LoopError};
use berth_record::{ChangeError, StagingEntry, VolumeEntry, VolumeState};
use thiserror::Error;

use super::pools::OpenPool;
use crate::node::now;
use crate::sabotage;

/// What is read at once where blocks cannot be shared.
const PIECE: usize = 1 << 20;

/// Why a volume or directory was not made or removed.
#[derive(Debug, Error)]
pub enum VolumeError {
    /// The record.
    #[error("the record refuses")]
    Record(#[from] ChangeError),
    /// A file.
    #[error("a file operation failed")]
    File(#[from] FileError),
    /// It was ready, and its file is gone: another one would pass for it.
    #[error("the file {} of volume {uid} is gone, and is not made again", path.display())]
    Lost {
        /// Which.
        uid: Uid,
        /// Its file.
        path: PathBuf,
    },
    /// Its image does not fit into what was promised.
    #[error("image {} has {found}, the volume is promised {promised}", path.display())]
    ImageTooLarge {
        /// The image's file.
        path: PathBuf,
        /// What it has.
        found: Bytes,
        /// What is promised.
        promised: Bytes,
    },
    /// A loop device that shows the volume.
    #[error("a loop device stays")]
    Loop(#[from] LoopError),
    /// A file or directory.
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

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let path = path.to_owned();
    move |source| VolumeError::Io { action, path, source }
}

/// The file that says that formatting of a volume began and has not ended.
pub fn format_mark(pool: &OpenPool, reservation: &Uid) -> PathBuf {
    pool.volume_file(reservation).with_extension("formatting")
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
    let digest = match origin {
        Origin::Blank => None,
        Origin::Image(digest) => Some(*digest),
    };
    let wanted = VolumeEntry {
        generation,
        path: OpenPool::volume_path(uid),
        size,
        origin: digest,
        state: VolumeState::Creating,
        labels: labels.clone(),
    };
    let entry = pool.record.begin_volume(uid, &wanted)?;
    let path = pool.volume_file(uid);
    if entry.state == VolumeState::Ready {
        if !path.exists() {
            return Err(VolumeError::Lost { uid: uid.clone(), path });
        }
    } else {
        files::remove_if_there(&path)?;
        let file = match entry.origin {
            None => files::create_sparse(&path, entry.size)?,
            Some(digest) => clone_image(&pool.image_file(&digest), &path, entry.size)?,
        };
        files::sync_file_and_parent(&file, &path)?;
    }
    pool.record.volume_ready(uid, generation)?;
    if let Some(digest) = &entry.origin {
        pool.record.image_used(digest, now())?;
    }
    Ok(())
}

/// A file with the image's content, zeros after it, never larger than `size`. Shares the image's blocks where the file system can.
fn clone_image(image: &Path, path: &Path, size: Bytes) -> Result<File, VolumeError> {
    let found = Bytes(fs::metadata(image).map_err(io_error("examine", image))?.len());
    if found > size {
        return Err(VolumeError::ImageTooLarge { path: image.to_owned(), found, promised: size });
    }
    let file = match files::reflink(image, path) {
        Err(FileError::ReflinkUnsupported { .. }) => copy_sparse(image, path)?,
        other => other?,
    };
    let length = file.metadata().map_err(io_error("examine", path))?.len();
    if length < size.0 {
        file.set_len(size.0).map_err(io_error("extend", path))?;
    }
    Ok(file)
}

fn copy_sparse(image: &Path, path: &Path) -> Result<File, VolumeError> {
    let source = File::open(image).map_err(io_error("open", image))?;
    let length = source.metadata().map_err(io_error("examine", image))?.len();
    let target = files::create_sparse(path, Bytes(length))?;
    let mut buffer = vec![0; PIECE];
    let mut offset = 0;
    while offset < length {
        let count = source.read_at(&mut buffer, offset).map_err(io_error("read", image))?;
        if count == 0 {
            break;
        }
        if buffer[..count].iter().any(|byte| *byte != 0) {
            target.write_all_at(&buffer[..count], offset).map_err(io_error("write", path))?;
        }
        offset += count as u64;
    }
    Ok(target)
}

/// Removes a volume that is not attached.
pub fn remove(pool: &OpenPool, uid: &Uid) -> Result<(), VolumeError> {
    if !pool.record.begin_delete_volume(uid)? {
        return Ok(());
    }
    let path = pool.volume_file(uid);
    for device in loop_device::find(&path)? {
        loop_device::detach(&device)?;
    }
    if !sabotage::active(sabotage::RELEASE_WITHOUT_DELETE) {
        files::remove_if_there(&path)?;
        files::remove_if_there(&format_mark(pool, uid))?;
        files::sync_parent(&path)?;
    }
    Ok(pool.record.forget_volume(uid)?)
}

/// Makes the directory that a transfer may work in.
pub fn make_work_dir(
    pool: &OpenPool,
    uid: &Uid,
    generation: Generation,
    bytes: Bytes,
) -> Result<(), VolumeError> {
    let path = pool.work_dir(uid);
    let dir = Path::new("staging").join(uid.as_str());
    pool.record.begin_staging(uid, &StagingEntry { generation, dir, bytes })?;
    fs::create_dir_all(&path).map_err(io_error("make", &path))?;
    Ok(files::sync_parent(&path)?)
}

/// Removes it with all it holds.
pub fn remove_work_dir(pool: &OpenPool, uid: &Uid) -> Result<(), VolumeError> {
    let path = pool.work_dir(uid);
    if !sabotage::active(sabotage::RELEASE_WITHOUT_DELETE) {
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.map_err(io_error("remove", &path))?,
        }
        files::sync_parent(&path)?;
    }
    pool.record.forget_staging(uid)?;
    Ok(())
}
