//! Who uses a block device, so that it is not taken from under them.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::stat::{major, minor};
use thiserror::Error;

use crate::mounts::{self, MountError};
use crate::nbd;

/// Why it is not known who uses a device.
#[derive(Debug, Error)]
pub enum UsersError {
    /// The mounts could not be read.
    #[error("failed to look at mounts")]
    Mounts(#[from] MountError),
    /// The device could not be looked at.
    #[error("failed to look at {device}", device = device.display())]
    Device {
        /// The device.
        device: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What uses a block device, as one phrase each: devices made of it, mounts, processes that have it open, and what is only
/// known to hold it. One that is not there has no users. Loop devices over it are not among them.
pub fn users(device: &Path) -> Result<Vec<String>, UsersError> {
    let failed = |source| UsersError::Device { device: device.to_owned(), source };
    let metadata = match fs::metadata(device) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        metadata => metadata.map_err(failed)?,
    };
    if !metadata.file_type().is_block_device() {
        return Ok(Vec::new());
    }
    let (major, minor) = (major(metadata.rdev()), minor(metadata.rdev()));
    let mut found = Vec::new();
    let holders = format!("/sys/dev/block/{major}:{minor}/holders");
    for holder in fs::read_dir(holders).into_iter().flatten().flatten() {
        let name = fs::read_to_string(holder.path().join("dm/name")).map(|name| name.trim_end().to_owned());
        found.push(format!("device {}", name.unwrap_or(holder.file_name().to_string_lossy().into_owned())));
    }
    let number = |part: u64| u32::try_from(part).unwrap_or(u32::MAX);
    let numbers = [(number(major), number(minor))].into();
    for mount in mounts::list()?.into_iter().filter(|mount| mount.device == (number(major), number(minor))) {
        found.push(format!("mount {}", mount.mount_point.display()));
    }
    found.extend(nbd::processes(&numbers));
    if found.is_empty() && is_claimed(device).map_err(failed)? {
        found.push("something that only the kernel sees, such as a mount elsewhere".to_owned());
    }
    Ok(found)
}

/// True if somebody is the only user of a device, as a mount in any namespace is.
fn is_claimed(device: &Path) -> io::Result<bool> {
    match OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device) {
        Ok(_) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(true),
        Err(error) => Err(error),
    }
}
