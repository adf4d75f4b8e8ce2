//! The host leaves the disks of guests alone: with a real udev, LVM, mdadm and blkid, which look at every device.
//!
//! **Changes the configuration of the machine it runs on** (`/etc/udev`, `/etc/lvm`, `/etc/mdadm`), so it only runs where
//! `BERTH_TEST_THROWAWAY_HOST` is set, which a scenario does in a guest whose files vanish. Needs two disks that may be wiped,
//! as the tests of thin pools do: the first is the host's own, with a volume group and its root file system.
//!
//! The second test is the proof of the first: the same devices, looked at in the same way, without the configuration.

#![allow(clippy::unwrap_used)]

mod guest;
mod host;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use berth_device::{find_program, nbd, thin};

/// What the guest's disks take over from the host.
const GROUP: &str = "hostvg";
const ROOT: &str = "11111111-2222-4333-8444-555555555555";
/// What only a disk of a guest has.
const GUESTS_LABEL: &str = "guestroot";
const GUESTS_FILESYSTEM: &str = "99999999-2222-4333-8444-555555555555";

/// The machine, for one test at a time.
struct Bench {
    host: PathBuf,
    pool: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl Bench {
    /// `None`, with the reason printed, where this machine cannot run the test.
    fn new(test: &str) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut missing = [thin::missing(), nbd::missing()].concat();
        if std::env::var_os("BERTH_TEST_THROWAWAY_HOST").is_none() {
            missing =
                vec!["BERTH_TEST_THROWAWAY_HOST does not say that this machine may be changed".to_owned()];
        }
        for program in ["udevadm", "mdadm", "sfdisk", "qemu-img"] {
            missing.extend(find_program(program).is_none().then(|| format!("{program} is not installed")));
        }
        let [host, pool] = ["/dev/ubda", "/dev/ubdb"].map(PathBuf::from);
        missing.extend((!host.exists() || !pool.exists()).then(|| "no two disks to wipe".to_owned()));
        if !missing.is_empty() {
            println!("SKIPPED {test}: {}", missing.join("; "));
            return None;
        }
        Some(Self { host, pool, _alone: alone })
    }
}

#[test]
fn nothing_on_the_disk_of_a_guest_changes_the_host() {
    let Some(bench) = Bench::new("nothing_on_the_disk_of_a_guest_changes_the_host") else { return };
    host::configure(true);
    let images = guest::Images::make();
    host::start_udev();
    let before = host::set_up(&bench.host);
    let disks = guest::Disks::show(&bench.pool, images);
    assert!(disks.all_are_cloned());
    assert_eq!(host::look_at_everything(&before), Vec::<String>::new());
    assert_eq!(host::failed_checks(), Vec::<String>::new());
    disks.hide();
    host::tear_down(&bench.host);
    host::stop_udev();
}

#[test]
fn without_the_configuration_the_same_look_finds_all_of_it() {
    let Some(bench) = Bench::new("without_the_configuration_the_same_look_finds_all_of_it") else { return };
    host::configure(false);
    let images = guest::Images::make();
    host::start_udev();
    let before = host::set_up(&bench.host);
    let disks = guest::Disks::show(&bench.pool, images);
    let found = host::look_at_everything(&before).join("\n");
    println!("{found}");
    for expected in
        ["group", "array", "by-uuid", "by-label", "partition", "holder", "root", "the host's group"]
    {
        assert!(found.lines().any(|line| line.starts_with(expected)), "no {expected} in:\n{found}");
    }
    let failed = host::failed_checks();
    for check in ["udev-rule", "lvm-filter", "nbd-partitions", "mdadm-devices"] {
        assert!(failed.iter().any(|failed| failed == check), "{failed:?}");
    }
    host::stop_arrays();
    host::forget_strangers(&bench.host);
    disks.hide();
    host::tear_down(&bench.host);
    host::stop_udev();
}

/// Runs a program as an administrator would, with the settings of the host, and fails with what it printed.
fn run(program: &str, arguments: &[&str]) -> String {
    let (ok, text) = try_run(program, arguments);
    assert!(ok, "{program} {arguments:?}: {text}");
    text
}

/// The same for one that may fail: whether it did not, and what it printed.
fn try_run(program: &str, arguments: &[&str]) -> (bool, String) {
    let path = find_program(program).unwrap_or_else(|| panic!("{program} is not installed"));
    let output = Command::new(path)
        .args(arguments)
        .env_remove("LVM_SYSTEM_DIR")
        .env_remove("DM_DISABLE_UDEV")
        .env("LVM_SUPPRESS_FD_WARNINGS", "1")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        (true, text(&output.stdout))
    } else {
        (false, text(&output.stdout) + &text(&output.stderr))
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
