//! Directories that cannot be outgrown: each is an ext4 in a preallocated file of the area, shown through a loop device.
//!
//! The file is made under another name, formatted, and renamed once that is over: one that is there has a file system.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use berth_core::ids::Uid;
use berth_core::units::Bytes;
use berth_device::loop_device::{self, LoopOptions};
use berth_device::mounts::{self, FsType, MountOptions};
use berth_device::{files, filesystem};

use super::super::error::{AreaError, io_error};
use super::super::{BoundedDir, DIRECTORIES};

/// What the files' names end with.
const IMAGE: &str = "ext4";
const PARTIAL: &str = "ext4.new";
/// The least that a file system fits in. Whoever was promised less gets so much, of what the pool keeps back.
const LEAST: Bytes = Bytes::kib(256);

fn place(root: &Path, uid: &Uid) -> PathBuf {
    root.join(DIRECTORIES.staging).join(uid.as_str())
}

/// The file of a directory, and what it is called while it is made.
pub fn images(root: &Path, uid: &Uid) -> [PathBuf; 2] {
    [IMAGE, PARTIAL].map(|end| root.join(DIRECTORIES.staging).join(format!("{uid}.{end}")))
}

/// True unless there is a directory with a file system of its own that is not mounted.
pub fn is_shown(root: &Path, uid: &Uid) -> bool {
    let [image, _] = images(root, uid);
    !image.exists() || mounts::is_mounted(&place(root, uid)).is_ok_and(|mount| mount.is_some())
}

/// What is there of the directory. An empty one in its place is only where it was mounted.
pub fn state(root: &Path, uid: &Uid) -> Result<BoundedDir, AreaError> {
    let ([image, _], place) = (images(root, uid), place(root, uid));
    if mounts::is_mounted(&place)?.is_some() {
        return Ok(BoundedDir::Shown);
    }
    let exists = image.try_exists().map_err(io_error("examine", &image))?;
    Ok(if exists { BoundedDir::Hidden } else { BoundedDir::Gone })
}

/// Makes the directory, or shows it if it is made.
pub fn make(root: &Path, uid: &Uid, bytes: Bytes) -> Result<(), AreaError> {
    let [image, partial] = images(root, uid);
    if !image.exists() {
        files::remove_if_there(&partial)?;
        if let Err(error) = fill(&partial, bytes.max(LEAST)) {
            // What was allocated of it would be missing to others.
            files::remove_if_there(&partial)?;
            return Err(error);
        }
        files::rename_durably(&partial, &image)?;
    }
    show(root, uid)
}

/// Makes a file with all its space, and an empty file system in it.
fn fill(path: &Path, bytes: Bytes) -> Result<(), AreaError> {
    let file = files::create_sparse(path, bytes)?;
    files::preallocate(&file, path, bytes)?;
    filesystem::mkfs_directory(path, bytes)?;
    file.sync_all().map_err(io_error("sync", path))
}

/// Shows the directory, if it has a file system of its own.
pub fn show(root: &Path, uid: &Uid) -> Result<(), AreaError> {
    let [image, _] = images(root, uid);
    if !image.exists() {
        return Ok(());
    }
    let options = LoopOptions { direct_io: true, keep_space: true, ..LoopOptions::default() };
    let device = loop_device::attach(&image, options)?;
    let place = place(root, uid);
    let options = MountOptions { no_access_times: true, no_exec: true, ..MountOptions::default() };
    mounts::mount_device(&device.path, &place, FsType::Ext4, options)?;
    match fs::remove_dir(place.join("lost+found")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done.map_err(io_error("empty", &place)),
    }
}

/// Takes the directory's file system away from its place. What it holds stays.
pub fn hide(root: &Path, uid: &Uid) -> Result<(), AreaError> {
    let [image, _] = images(root, uid);
    if !image.exists() {
        return Ok(());
    }
    mounts::unmount(&place(root, uid))?;
    for device in loop_device::find(&image)? {
        loop_device::detach(&device)?;
    }
    Ok(())
}

/// Does so for every directory of the area.
pub fn hide_all(root: &Path) -> Result<(), AreaError> {
    let dir = root.join(DIRECTORIES.staging);
    let entries = match fs::read_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(io_error("list", &dir))?,
    };
    for entry in entries {
        let path = entry.map_err(io_error("list", &dir))?.path();
        if path.extension().is_some_and(|end| end == IMAGE)
            && let Some(uid) = path.file_stem().and_then(|stem| stem.to_str())
        {
            hide(root, &Uid::from(uid))?;
        }
    }
    Ok(())
}

/// Removes the file of a directory that is not shown.
pub fn remove(root: &Path, uid: &Uid) -> Result<(), AreaError> {
    for path in images(root, uid) {
        files::remove_if_there(&path)?;
    }
    Ok(())
}
