//! Real LVM and device mapper: volume groups, kernel pools, thin devices.
//!
//! Needs a kernel with thin provisioning and two disks that may be wiped, of 64 MiB and 1 GiB at least: those named in
//! `BERTH_TEST_DISKS` (separated by a comma), or the first two of a user-mode Linux. Says so and passes where there are none.
//!
//! Every test ends with the proof that no device of ours and no volume group is left, and none was left suspended.

#![allow(clippy::unwrap_used)]

mod failures;
mod full;
mod groups;
mod growth;
mod others;
mod pools;
mod templates;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use berth_core::ids::Uid;
use berth_core::ledger::Class;
use berth_core::thin::BlockSize;
use berth_core::units::Bytes;
use berth_device::thin::{self, KernelPool, KernelPoolConfig, ThinId, VolumeGroup, WhenFull, WipeConsent};

const POOL: &str = "0f3c9a1e-5b7d-4c2a-9e10-00a1b2c3d4e5";
const GROUP: &str = "berth-test";
const BLOCK: usize = 64 << 10;

/// The disks, for one test at a time.
struct Bench {
    small: PathBuf,
    large: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl Bench {
    /// `None`, with the reason printed, where this machine cannot run the test.
    fn new(test: &str) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = thin::missing();
        if !missing.is_empty() {
            println!("SKIPPED {test}: {}", missing.join("; "));
            return None;
        }
        let Some([small, large]) = disks() else {
            println!("SKIPPED {test}: no disks to wipe; name two in BERTH_TEST_DISKS");
            return None;
        };
        let bench = Self { small, large, _alone: alone };
        bench.assert_nothing_is_left("before the test");
        Some(bench)
    }

    /// A group of our own on the large disk, whatever lies on it.
    fn group(&self) -> VolumeGroup {
        let devices = [self.large.clone()];
        let consent = WipeConsent::for_devices(devices.clone());
        VolumeGroup::create(GROUP, &uid(POOL), &devices, Some(&consent)).unwrap()
    }

    fn assert_nothing_is_left(&self, when: &str) {
        let ours = thin::list_ours().unwrap();
        assert!(ours.is_empty(), "{when}: {ours:?}");
        let (small, large) = (self.small.to_str().unwrap(), self.large.to_str().unwrap());
        let volumes =
            lvm(&["lvs", "--noheadings", "--devices", small, "--devices", large, "-o", "lv_full_name"]);
        assert_eq!(volumes.trim(), "", "{when}");
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if std::thread::panicking() {
            clean_up(&[&self.small, &self.large]);
        } else {
            self.assert_nothing_is_left("after the test");
        }
    }
}

/// After a failure, so that the next test begins on empty disks.
fn clean_up(disks: &[&Path]) {
    for info in thin::all_suspended_of_ours().unwrap_or_default() {
        let _ = thin::resume(&info);
    }
    // A volume on a template on a thin device on a pool.
    for _ in 0..4 {
        for info in thin::list_ours().unwrap_or_default() {
            let _ = Command::new("dmsetup")
                .args(["remove", "--retry", &info.name])
                .env("DM_DISABLE_UDEV", "1")
                .status();
        }
    }
    let _ = Command::new("lvm")
        .args(["vgremove", "--yes", "--force", GROUP])
        .env("DM_DISABLE_UDEV", "1")
        .status();
    for disk in disks {
        let _ = zero_start(disk);
    }
}

fn disks() -> Option<[PathBuf; 2]> {
    if let Ok(named) = std::env::var("BERTH_TEST_DISKS") {
        let (small, large) = named.split_once(',')?;
        return Some([small.into(), large.into()]);
    }
    let disks = ["/dev/ubda", "/dev/ubdb"].map(PathBuf::from);
    disks.iter().all(|disk| disk.exists()).then_some(disks)
}

fn zero_start(disk: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(disk)?;
    file.write_all_at(&vec![0; 1 << 20], 0)?;
    file.sync_all()
}

/// Runs `lvm` as an administrator would, and gives back what it printed.
fn lvm(arguments: &[&str]) -> String {
    run("lvm", arguments)
}

/// Runs a program of the test's own and fails with what it printed.
fn run(program: &str, arguments: &[&str]) -> String {
    let path = berth_device::find_program(program).unwrap_or_else(|| panic!("{program} is not installed"));
    let output = Command::new(path).args(arguments).env("DM_DISABLE_UDEV", "1").output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn uid(text: &str) -> Uid {
    Uid::from(text)
}

/// The UID of the n-th holder.
fn holder(n: u32) -> Uid {
    Uid::from(format!("{n:08x}-1111-4222-8333-444455556666"))
}

fn id(n: u32) -> ThinId {
    ThinId::new(n).unwrap()
}

fn config(class: Class, when_full: WhenFull) -> KernelPoolConfig {
    KernelPoolConfig { pool: uid(POOL), class, block: BlockSize::DEFAULT, when_full }
}

fn open_pool(group: &VolumeGroup, class: Class, data: Bytes) -> KernelPool {
    let config = config(class, WhenFull::Queue);
    KernelPool::provision(&config, group, data, Bytes::mib(4)).unwrap();
    KernelPool::open(&config, group).unwrap()
}

/// Closes and deletes a pool, after `thin_check` was content with it once more.
fn end_pool(pool: KernelPool, group: &VolumeGroup, config: &KernelPoolConfig) {
    pool.close(group).unwrap();
    KernelPool::open(config, group).expect("thin_check is content").close(group).unwrap();
    KernelPool::destroy(config, group).unwrap();
}

/// Writes `count` blocks of `byte` and waits until they are below.
fn fill(device: &Path, first: usize, count: usize, byte: u8) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(device)?;
    for block in first..first + count {
        file.write_all_at(&vec![byte; BLOCK], (block * BLOCK) as u64)?;
    }
    file.sync_all()
}

/// The one byte that a block is made of.
fn read_block(device: &Path, block: usize) -> u8 {
    let mut bytes = vec![0; BLOCK];
    File::open(device).unwrap().read_exact_at(&mut bytes, (block * BLOCK) as u64).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "block {block} of {} is mixed", device.display());
    bytes[0]
}

fn assert_none_suspended() {
    assert_eq!(thin::all_suspended_of_ours().unwrap(), []);
}
