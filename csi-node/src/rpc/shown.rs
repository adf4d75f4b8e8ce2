//! Where the kernel shows a volume: which mounts are of its devices.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use berth_device::mounts::{self, MountInfo};

use super::status::RpcError;

/// A block device by which a volume is shown.
struct Device {
    number: u64,
    /// The name of its node.
    name: Option<OsString>,
}

impl Device {
    fn at(path: &Path) -> Option<Self> {
        let path = fs::canonicalize(path).ok()?;
        Some(Self { number: fs::metadata(&path).ok()?.rdev(), name: path.file_name().map(OsStr::to_owned) })
    }

    /// True if the mount is of its file system, or of its node.
    fn is_in(&self, mount: &MountInfo) -> bool {
        let number = (nix::sys::stat::major(self.number), nix::sys::stat::minor(self.number));
        if (u64::from(mount.device.0), u64::from(mount.device.1)) == number {
            return true;
        }
        // Only mounts of something of that name are looked at: a look at any other may take forever.
        let same_name = self.name.is_some() && mount.root.file_name() == self.name.as_deref();
        same_name && fs::metadata(&mount.mount_point).is_ok_and(|found| found.rdev() == self.number)
    }
}

/// A place other than `staged` and `target` that shows one of these devices; none if `target` does: then what was
/// published is only asked for again, and what others made of it since (kubelet shows devices at a second place) is no
/// matter.
pub fn elsewhere(devices: &[PathBuf], staged: &Path, target: &Path) -> Result<Option<PathBuf>, RpcError> {
    let devices: Vec<_> = devices.iter().filter_map(|path| Device::at(path)).collect();
    let shown = |mount: &MountInfo| devices.iter().any(|device| device.is_in(mount));
    if mounts::is_mounted(target)?.as_ref().is_some_and(shown) {
        return Ok(None);
    }
    let staged = mounts::is_mounted(staged)?.map_or_else(|| staged.to_owned(), |mount| mount.mount_point);
    // A mount of the host's own tree shows each place a second time, deeper.
    let staged = staged.strip_prefix("/").unwrap_or(&staged);
    let other = |mount: &MountInfo| shown(mount) && !mount.mount_point.ends_with(staged);
    Ok(mounts::list()?.into_iter().find(other).map(|mount| mount.mount_point))
}
