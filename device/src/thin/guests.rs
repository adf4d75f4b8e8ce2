//! Which loop devices show the disk of a guest: those over a thin device, and those over the file of a volume.

use std::fs;
use std::path::{Path, PathBuf};

use super::names::UUID_PREFIX;

/// Their nodes. What cannot be read shows none.
pub(super) fn loop_devices() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let Ok(backing) = fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        if is_guests(backing.trim_end(), &dm_uuid) {
            found.push(Path::new("/dev").join(entry.file_name()));
        }
    }
    found.sort();
    found
}

/// The same as in the udev rule (`09-berth-guest-disks.rules`). `uuid_of` gives the dm UUID of `dm-N`.
fn is_guests(backing: &str, uuid_of: &dyn Fn(&str) -> Option<String>) -> bool {
    if backing.starts_with("/dev/mapper/berth-") {
        return true;
    }
    if let Some(name) = backing.strip_prefix("/dev/").filter(|name| name.starts_with("dm-")) {
        return uuid_of(name).is_some_and(|uuid| uuid.starts_with(UUID_PREFIX));
    }
    let path = Path::new(backing);
    let in_volumes = path.parent().is_some_and(|folder| folder.ends_with("volumes"));
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let is_uuid = stem.split('-').map(str::len).eq([8, 4, 4, 4, 12]);
    in_volumes && is_uuid && path.extension().is_some_and(|extension| extension == "raw")
}

fn dm_uuid(name: &str) -> Option<String> {
    fs::read_to_string(Path::new("/sys/block").join(name).join("dm/uuid")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loop_devices_over_volumes_are_of_guests_and_others_are_not() {
        let uuid_of = |name: &str| match name {
            "dm-3" => Some("BERTH-thin-volumes-x".to_owned()),
            "dm-4" => Some("LVM-abc".to_owned()),
            _ => None,
        };
        let uid = "0f3c9a1e-5b7d-4c2a-9e10-00a1b2c3d4e5";
        for ours in ["/dev/mapper/berth-0f3c9a1e-x", "/dev/dm-3", &format!("/p/volumes/{uid}.raw")] {
            assert!(is_guests(ours, &uuid_of), "{ours}");
        }
        let others = ["/dev/dm-4", "/dev/dm-9", "/dev/sda", "/p/berth-pool.xfs", "/p/volumes/x.raw", ""];
        for other in others.into_iter().map(str::to_owned).chain([format!("/p/volumes/{uid}.qcow2")]) {
            assert!(!is_guests(&other, &uuid_of), "{other}");
        }
    }
}
