//! Who uses a device that the kernel does not give away.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::sys::stat::{major, minor};

use crate::mounts;

/// One phrase for each user that is found: devices made of it or of its partitions, mounts, swap. Never empty.
pub(super) fn users(device: &Path) -> Vec<String> {
    let mut found = Vec::new();
    if let Ok(metadata) = fs::metadata(device) {
        let number = (major(metadata.rdev()), minor(metadata.rdev()));
        let folder = format!("/sys/dev/block/{}:{}", number.0, number.1);
        found.extend(made_of(Path::new(&folder)));
        let mounts = mounts::list().unwrap_or_default();
        let mounted = mounts.iter().filter(|mount| (mount.device.0.into(), mount.device.1.into()) == number);
        found.extend(mounted.map(|mount| format!("mounted on {}", mount.mount_point.display())));
    }
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    found.extend(is_swap(&swaps, device).then(|| "used as swap".to_owned()));
    if found.is_empty() {
        found.push("somebody has it open for itself alone".to_owned());
    }
    found
}

fn made_of(folder: &Path) -> Vec<String> {
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let partitions = names(folder).into_iter().filter(|path| path.join("partition").exists());
    let mut found = Vec::new();
    for part in std::iter::once(folder.to_owned()).chain(partitions) {
        for holder in names(&part.join("holders")) {
            let name = holder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let dm = fs::read_to_string(holder.join("dm/name")).unwrap_or_default();
            let dm = dm.trim_end();
            found.push(format!("part of {}", if dm.is_empty() { &name } else { dm }));
        }
    }
    found
}

fn is_swap(swaps: &str, device: &Path) -> bool {
    swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .any(|name| Path::new(name) == device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_is_told_by_its_name() {
        let swaps = "Filename\t\t\tType\n/dev/sdb2    partition\t1048572\t0\t-2\n";
        assert!(is_swap(swaps, Path::new("/dev/sdb2")) && !is_swap(swaps, Path::new("/dev/sdb")));
    }

    #[test]
    fn somebody_is_always_named() {
        assert_eq!(users(Path::new("/nowhere")).len(), 1);
    }
}
