//! Who uses a device.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use nix::sys::stat::{major, minor};

use super::sysfs::{SysfsError, folder, names, text};
use crate::mounts::{self, MountError};

/// What uses a device or one of its partitions, as one phrase each: devices made of it, mounts, and processes that have it
/// open. Processes are found as far as this process may look into others, and sees them.
pub(super) fn holders(index: u32) -> Result<Vec<String>, HoldersError> {
    let mut found = Vec::new();
    let mut numbers = BTreeSet::new();
    let device = format!("nbd{index}");
    let folder = folder(index);
    let partitions = names(&folder)?.into_iter().filter(|name| name.starts_with(&device));
    for folder in std::iter::once(folder.clone()).chain(partitions.map(|name| folder.join(name))) {
        numbers.extend(text(&folder.join("dev"))?.and_then(|text| number(&text)));
        for holder in names(&folder.join("holders"))? {
            let name = text(&folder.join("holders").join(&holder).join("dm/name"))?;
            found.push(format!("device {}", name.unwrap_or(holder)));
        }
    }
    for mount in mounts::list()?.into_iter().filter(|mount| numbers.contains(&mount.device)) {
        found.push(format!("mount {}", mount.mount_point.display()));
    }
    found.extend(processes(&numbers));
    Ok(found)
}

/// Why it is not known who uses a device.
#[derive(Debug, thiserror::Error)]
pub enum HoldersError {
    /// The kernel's description of it could not be read.
    #[error("failed to look at what is made of it")]
    Sysfs(#[from] SysfsError),
    /// The mounts could not be read.
    #[error("failed to look at mounts")]
    Mounts(#[from] MountError),
}

fn number(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The processes that have one of these block devices open. What goes while it is looked at is not one of them.
pub(crate) fn processes(numbers: &BTreeSet<(u32, u32)>) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) else {
            continue;
        };
        let descriptors = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
        if descriptors.map(|descriptor| descriptor.path()).any(|path| is_one_of(&path, numbers)) {
            let program = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            found.push(format!("process {pid} ({})", program.trim()));
        }
    }
    found
}

/// Looks only at what lies below a folder `dev`: another file may lie on a file system that does not answer.
fn is_one_of(descriptor: &Path, numbers: &BTreeSet<(u32, u32)>) -> bool {
    let below_dev =
        |target: &Path| target.parent().is_some_and(|parent| parent.iter().any(|part| part == "dev"));
    if !fs::read_link(descriptor).is_ok_and(|target| below_dev(&target)) {
        return false;
    }
    fs::metadata(descriptor).is_ok_and(|metadata| {
        let number = (major(metadata.rdev()), minor(metadata.rdev()));
        metadata.file_type().is_block_device()
            && matches!((u32::try_from(number.0), u32::try_from(number.1)), (Ok(a), Ok(b)) if numbers.contains(&(a, b)))
    })
}
