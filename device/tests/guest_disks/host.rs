//! The host: its own disk, its configuration, and everything on it that looks at devices.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use berth_device::host_config;
use berth_device::preflight::Preflight;

use super::{GROUP, ROOT, run, text, try_run};

/// LVM does not know the driver of a guest's disks.
const LVM: &str = "devices { types=[\"ubd\",16] }\n";
/// Where the administrator puts what mdadm may look at.
const ARRAYS: &str = "/etc/mdadm/mdadm.conf.d/devices.conf";
const MARK: &str = "the host's";
const MOUNT: &str = "/run/berth-test-root";

/// What the host has of its own.
pub struct Before {
    /// UUIDs and names of its volume group and volume.
    volumes: String,
    /// The device of its root file system.
    root: PathBuf,
}

/// Writes the configuration that keeps guests away, or removes it.
pub fn configure(ours: bool) {
    let etc = Path::new("/etc");
    for file in host_config::FILES {
        let _ = fs::remove_file(etc.join(file.path));
    }
    fs::create_dir_all("/etc/lvm").unwrap();
    fs::create_dir_all("/etc/mdadm/mdadm.conf.d").unwrap();
    for merged in ["/etc/lvm/lvmlocal.conf", ARRAYS] {
        let _ = fs::remove_file(merged);
    }
    fs::write("/etc/lvm/lvm.conf", LVM).unwrap();
    if ours {
        host_config::write(etc).unwrap();
        fs::copy("/etc/lvm/berth.conf", "/etc/lvm/lvmlocal.conf").unwrap();
        let arrays = fs::read_to_string("/etc/mdadm/berth.conf").unwrap() + "DEVICE /dev/ubd*\n";
        fs::write(ARRAYS, arrays).unwrap();
    }
    run("modprobe", &["-r", "nbd"]);
    run("modprobe", &["nbd", "nbds_max=6"]); // each device costs time

    run("modprobe", &["raid1"]);
}

/// Makes the host's volume group with its root file system.
pub fn set_up(disk: &Path) -> Before {
    let lvm = |words: &[&str]| run("lvm", words);
    lvm(&["vgcreate", "--yes", GROUP, text(disk)]);
    lvm(&["lvcreate", "--yes", "-n", "root", "-L", "32m", GROUP]);
    let root = PathBuf::from(format!("/dev/{GROUP}/root"));
    run("mkfs.ext4", &["-q", "-U", ROOT, text(&root)]);
    fs::create_dir_all(MOUNT).unwrap();
    run("mount", &[text(&root), MOUNT]);
    fs::write(Path::new(MOUNT).join("whose"), MARK).unwrap();
    run("umount", &[MOUNT]);
    Before { volumes: volumes(), root }
}

pub fn tear_down(disk: &Path) {
    run("lvm", &["vgremove", "--yes", "--force", GROUP]);
    run("lvm", &["pvremove", "--yes", text(disk)]);
}

/// Starts udev, which looks at everything that is there.
pub fn start_udev() {
    fs::create_dir_all("/run/udev").unwrap();
    run("/lib/systemd/systemd-udevd", &["--daemon"]);
    settle("add");
}

pub fn stop_udev() {
    run("udevadm", &["settle", "--timeout=60"]);
    run("udevadm", &["control", "--exit"]);
}

/// All block devices anew, as after an update of udev, and waits until it is done.
fn settle(action: &str) {
    run("udevadm", &["trigger", "--subsystem-match=block", &format!("--action={action}")]);
    run("udevadm", &["settle", "--timeout=120"]);
}

/// Makes everything look that looks for volume groups, arrays and file systems, and tells what came of the guests' disks.
pub fn look_at_everything(before: &Before) -> Vec<String> {
    for action in ["add", "change"] {
        settle(action);
    }
    let mut found = Vec::new();
    let (_, said) = try_run("lvm", &["pvscan", "--cache", "-aay"]);
    println!("pvscan: {said}");
    let (_, said) = try_run("mdadm", &["--assemble", "--scan"]);
    println!("mdadm: {said}");
    run("udevadm", &["settle", "--timeout=120"]);
    found.extend(arrays().into_iter().map(|array| format!("array {array}")));
    let now = volumes();
    found.extend((now != before.volumes).then(|| format!("group: {now}")));
    found.extend(links());
    found.extend(on_guests());
    found.extend(root_is_elsewhere(before));
    found.extend(host_group_is_broken());
    found
}

/// The checks of a preflight that say that the host looks at guests.
pub fn failed_checks() -> Vec<String> {
    // As in a container, whose own settings of LVM are not the host's.
    let link = Path::new("/host-of-test");
    if !link.exists() {
        std::os::unix::fs::symlink("/", link).unwrap();
    }
    let preflight = Preflight::run_at(link);
    let failed = preflight.failures().filter(|check| host_config::CHECKS.contains(&check.name));
    failed.map(|check| check.name.to_owned()).collect()
}

pub fn stop_arrays() {
    for array in arrays() {
        run("mdadm", &["--stop", &format!("/dev/{array}")]);
    }
    run("udevadm", &["settle", "--timeout=60"]);
}

/// Lets the guest's volumes go that LVM has activated.
pub fn forget_strangers(disk: &Path) {
    for (name, _) in block_devices() {
        let folder = Path::new("/sys/block").join(&name);
        let dm = fs::read_to_string(folder.join("dm/name")).unwrap_or_default();
        if dm.trim_end() == format!("{GROUP}-theirs") {
            run("dmsetup", &["remove", dm.trim_end()]);
        }
    }
    // So that the host's own is found again.
    fs::write("/etc/lvm/lvmlocal.conf", format!("devices {{ filter=[\"a|^{}$|\",\"r|.*|\"] }}", text(disk)))
        .unwrap();
}

fn volumes() -> String {
    let (_, said) = try_run(
        "lvm",
        &["lvs", "--noheadings", "--separator=,", "-o", "vg_name,vg_uuid,lv_name,lv_uuid,lv_tags"],
    );
    let mut lines: Vec<_> = said.lines().map(str::trim).filter(|line| line.contains(GROUP)).collect();
    lines.sort_unstable();
    lines.join("; ")
}

fn arrays() -> Vec<String> {
    let text = fs::read_to_string("/proc/mdstat").unwrap_or_default();
    text.lines()
        .filter(|line| line.starts_with("md"))
        .filter_map(|line| Some(line.split(' ').next()?.to_owned()))
        .collect()
}

/// Every block device, with its node.
fn block_devices() -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir("/sys/class/block").unwrap().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.map(|name| (name.clone(), Path::new("/dev").join(name))).collect()
}

/// True for a device that shows the disk of a guest, or what lies below one.
fn is_guests(name: &str) -> bool {
    let folder = Path::new("/sys/class/block").join(name);
    let read = |file: &str| fs::read_to_string(folder.join(file)).unwrap_or_default();
    let uuid = read("dm/uuid");
    let data = uuid.starts_with("LVM-") && read("dm/name").contains("-berth--");
    let backing = read("loop/backing_file");
    let looped = backing.starts_with("/dev/mapper/berth-") || backing.starts_with("/dev/dm-");
    name.starts_with("nbd") || uuid.starts_with("BERTH-") || data || looped
}

/// Links by content that lead to the disk of a guest.
fn links() -> Vec<String> {
    let mut found = Vec::new();
    for by in ["by-uuid", "by-label", "by-partuuid", "by-partlabel"] {
        for entry in fs::read_dir(Path::new("/dev/disk").join(by)).into_iter().flatten().flatten() {
            let Ok(target) = fs::canonicalize(entry.path()) else { continue };
            let name = target.file_name().unwrap().to_string_lossy().into_owned();
            if is_guests(&name) {
                found.push(format!("{by} {} is {name}", entry.file_name().to_string_lossy()));
            }
        }
    }
    found
}

/// Partitions of NBD devices, and devices that somebody has made of the disk of a guest.
fn on_guests() -> Vec<String> {
    let mut found = Vec::new();
    for (name, _) in block_devices() {
        if name.starts_with("nbd") && name.contains('p') {
            found.push(format!("partition {name}"));
        }
        let holders = fs::read_dir(Path::new("/sys/class/block").join(&name).join("holders"));
        for holder in holders.into_iter().flatten().flatten() {
            let holder = holder.file_name().to_string_lossy().into_owned();
            if is_guests(&name) && !is_guests(&holder) {
                found.push(format!("holder of {name}: {holder}"));
            }
        }
    }
    found
}

/// Asks for the host's root file system in every way that a host asks for it.
fn root_is_elsewhere(before: &Before) -> Vec<String> {
    let own = fs::metadata(&before.root).unwrap().rdev();
    let tag = format!("UUID={ROOT}");
    let mut found = Vec::new();
    for (program, arguments) in [("blkid", ["-U", ROOT].as_slice()), ("findfs", &[&tag])] {
        let (_, said) = try_run(program, arguments);
        if !fs::metadata(said.trim()).is_ok_and(|device| device.rdev() == own) {
            found.push(format!("root: {program} says {}", said.trim()));
        }
    }
    let (mounted, said) = try_run("mount", &["-o", "ro", &tag, MOUNT]);
    if mounted {
        let whose = fs::read_to_string(Path::new(MOUNT).join("whose")).unwrap_or_default();
        found.extend((whose != MARK).then(|| "root: another file system was mounted".to_owned()));
        run("umount", &[MOUNT]);
    } else {
        found.push(format!("root: not mounted: {said}"));
    }
    found
}

/// The host's group goes and comes back.
fn host_group_is_broken() -> Option<String> {
    for state in ["-an", "-ay"] {
        let (ok, said) = try_run("lvm", &["vgchange", state, GROUP]);
        if !ok {
            return Some(format!("the host's group: vgchange {state}: {said}"));
        }
    }
    None
}
