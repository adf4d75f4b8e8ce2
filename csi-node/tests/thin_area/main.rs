//! A pool of the device mapper on a real kernel: an import in it, a staged image, volumes of it; and killed at any moment.
//!
//! Needs a kernel with thin provisioning and a disk of 1 GiB at least that may be wiped: the one named in
//! `BERTH_TEST_DISK`, or the first one of a user-mode Linux. Says so and passes where there is none.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

#[allow(dead_code)] // no test program uses all of it
#[path = "../bed/mod.rs"]
mod bed;
mod killed;
mod lazy;
mod operations;
mod overcommit;
mod pools;
mod refused;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bed::{Bed, MIB, Work, qemu_img, raw_image, same_disk, text};
use berth_core::ids::{Digest, Lineage, PoolName, Uid};
use berth_core::node::Origin;
use berth_core::thin::{BlockSize, PoolMode, directory_charge};
use berth_core::units::{Bytes, Generation};
use berth_device::mounts::{self, FsType};
use berth_device::thin;
use berth_node::agent::pools::{OpenPool, PoolSpec, Pools};
use berth_node::agent::{fill, volumes};
use berth_node::area::{AreaError, Backend, ThinGroup, ThinSpec};
use berth_node::rpc::attach::{self, ImportedContent, Publication};
use berth_node::rpc::request::Use;
use berth_objectstore::chunks::read::ImageReader;
use berth_record::{Holder, LedgerPosition, PromiseClass, PromiseEntry};
use tokio_util::task::TaskTracker;

const POOL: &str = "0f3c9a1e-5b7d-4c2a-9e10-00a1b2c3d4e5";
const FIRST: Generation = Generation(1);

/// The disk, for one test at a time.
struct Bench {
    disk: PathBuf,
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
        let disk = std::env::var_os("BERTH_TEST_DISK").map_or_else(|| "/dev/ubda".into(), PathBuf::from);
        if !disk.exists() {
            println!("SKIPPED {test}: no disk to wipe; name one in BERTH_TEST_DISK");
            return None;
        }
        let bench = Self { disk, _alone: alone };
        bench.assert_nothing_is_left();
        Some(bench)
    }

    /// Nothing of ours in the kernel, and nothing on the disk.
    fn assert_nothing_is_left(&self) {
        let ours = thin::list_ours().unwrap();
        assert!(ours.is_empty(), "{ours:?}");
        let volumes = lvm(&["lvs", "--noheadings", "--devices", text(&self.disk), "-o", "lv_full_name"]);
        assert_eq!(volumes.trim(), "");
    }
}

fn spec_on(disk: &Path) -> PoolSpec {
    let group = ThinGroup::Exclusive { devices: vec![disk.to_owned()], wipe: true };
    let backend = Backend::Thin(ThinSpec { group, block: BlockSize::DEFAULT.bytes() });
    PoolSpec::new(POOL.into(), backend)
}

fn lvm(arguments: &[&str]) -> String {
    let output = Command::new("lvm").args(arguments).env("DM_DISABLE_UDEV", "1").output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn name() -> PoolName {
    "thin".into()
}

fn pools(dir: &Path) -> Pools {
    Pools::new("n1".into(), dir.join("mnt"), dir)
}

/// The UID of the n-th holder.
fn holder(n: u32) -> Uid {
    Uid::from(format!("{n:08x}-1111-4222-8333-444455556666"))
}

/// Promises so much to a holder.
fn promise(pool: &OpenPool, uid: &Uid, class: PromiseClass, data: Bytes) {
    let holder = Holder { kind: "StagingReservation".into(), namespace: "ns".into(), name: uid.to_string() };
    let entry = PromiseEntry {
        generation: FIRST,
        class,
        data,
        metadata: Bytes::mib(1),
        holder,
        obeyed: true,
        released: false,
    };
    let position =
        LedgerPosition { lineage: Some(Lineage::from("l")), obeyed_revision: 1, ..LedgerPosition::default() };
    pool.obey(&position, &[(uid.clone(), entry)]).unwrap();
}

/// As after the end of the program: everything in the kernel stays.
fn forget(pool: Arc<OpenPool>, pools: Pools) {
    drop(pools);
    drop(Arc::into_inner(pool).expect("the last one"));
}

/// As before the machine is switched off: nothing in the kernel stays.
fn switch_off(pool: Arc<OpenPool>, pools: Pools) {
    drop(pools);
    let OpenPool { area, record, .. } = Arc::into_inner(pool).expect("the last one");
    drop(record);
    area.close().unwrap();
    assert_eq!(thin::list_ours().unwrap(), []);
}

fn reopen(dir: &Path) -> (Pools, Arc<OpenPool>) {
    let pools = pools(dir);
    pools.reopen_known().unwrap();
    let pool = pools.get(&name()).unwrap_or_else(|| panic!("{:?}", pools.failure(&name())));
    (pools, pool)
}

fn destroy(pool: Arc<OpenPool>, pools: Pools) {
    drop(pools);
    let OpenPool { area, record, .. } = Arc::into_inner(pool).expect("the last one");
    drop(record);
    let root = area.root().to_owned();
    area.destroy().unwrap();
    assert!(mounts::list().unwrap().iter().all(|mount| !mount.mount_point.starts_with(&root)));
}

fn used(pool: &OpenPool) -> (Bytes, Bytes) {
    let state = pool.area.kernel_pools().unwrap();
    (state.images.data.used, state.volumes.data.used)
}

/// Imports a qcow2 of 24 MiB, 5 of them data, with all work in the pool. The disk it was made of, and the image.
async fn import(bed: &Bed, pool: &Arc<OpenPool>) -> (PathBuf, Digest, Bytes) {
    let disk = bed.dir.path().join("disk");
    raw_image(&disk, 24, &[1..3, 10..11, 20..22]);
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&disk), text(&bed.file("image.qcow2"))]);
    let reservation = holder(1);
    let bytes = directory_charge(Bytes::mib(40), BlockSize::DEFAULT).data;
    promise(pool, &reservation, PromiseClass::Images, bytes);
    volumes::make_work_dir(pool, &reservation, FIRST, bytes, true).unwrap();
    volumes::make_work_dir(pool, &reservation, FIRST, bytes, true).unwrap();
    let dir = pool.area.work_dir(&reservation);
    let mount = mounts::is_mounted(&dir).unwrap().expect("a file system of its own");
    assert!(["nosuid", "nodev", "noexec"].iter().all(|option| mount.has_option(option)), "{mount:?}");
    let room = nix::sys::statvfs::statvfs(&dir).unwrap();
    let room = Bytes(room.blocks_available() * room.fragment_size());
    assert!(room >= Bytes::mib(40), "{room} for the 40 MiB that were asked for");

    let mut work = Work::new(bed, "image");
    work.job.dir.clone_from(&dir);
    let origin = bed.origin("plain", "image.qcow2", Duration::from_secs(60));
    let durable = work.run(bed, &origin).await.unwrap_or_else(|error| panic!("{}", error.chain()));
    bed.check_nothing_left(&work).await;
    for _ in 0..2 {
        volumes::remove_work_dir(pool, &reservation).unwrap();
    }
    pool.released(&reservation, FIRST).unwrap();
    assert!(!dir.exists());
    assert_eq!(used(pool), (Bytes::ZERO, Bytes::ZERO), "all of it was given back");
    (disk, durable.digest, durable.real_size)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_is_imported_staged_cloned_and_leaves_nothing() {
    let Some(bench) = Bench::new("a_template_is_imported_staged_cloned_and_leaves_nothing") else { return };
    let bed = Bed::new().await;
    let dir = bed.dir.path().join("node");
    fs::create_dir(&dir).unwrap();
    let first = pools(&dir);
    first.prepare(&name(), &spec_on(&bench.disk)).unwrap();
    let pool = first.get(&name()).unwrap();
    let begun = pool.area.kernel_pools().unwrap();
    assert_eq!((begun.images.mode, begun.volumes.mode), (PoolMode::ReadWrite, PoolMode::ReadWrite));
    assert!(pool.area.total() > Bytes::mib(700) && begun.images.data.total < Bytes::mib(8), "{begun:?}");
    assert_eq!(pool.area.advisory(), None);
    let (disk, digest, real) = import(&bed, &pool).await;

    let (image, clone, blank) = (holder(2), holder(3), holder(4));
    stage(&bed, &pool, &image, &digest, real, &disk).await;
    make_volumes(&pool, &clone, &blank, &digest, &disk);

    let shown_to_pods = in_use(&first, &blank, &clone, &dir);
    forget(pool, first);
    let (second, pool) = reopen(&dir); // after the program's end, under its workloads
    shown_to_pods.check(&second, &blank, &clone);
    let refused = pool.area.require_unused(&pool.record, &digest).unwrap_err();
    assert!(matches!(refused, AreaError::ImageInUse { .. }), "{refused}");
    switch_off(pool, second);
    let (third, pool) = reopen(&dir); // after the machine's
    assert!(same_disk(&pool.area.volume(&clone), &disk));

    for uid in [&clone, &blank] {
        for _ in 0..2 {
            volumes::remove(&pool, uid).unwrap();
        }
        pool.released(uid, FIRST).unwrap();
        assert!(!pool.area.has_volume(uid));
    }
    remove_image(&pool, &digest);
    pool.released(&image, FIRST).unwrap();
    assert_eq!(used(&pool), (Bytes::ZERO, Bytes::ZERO));
    assert_eq!(thin::list_ours().unwrap().len(), 2, "the kernel pools");
    destroy(pool, third);
    bench.assert_nothing_is_left();
}

/// Stages the image, and looks at it.
async fn stage(bed: &Bed, pool: &Arc<OpenPool>, image: &Uid, digest: &Digest, real: Bytes, disk: &Path) {
    promise(pool, image, PromiseClass::Images, real);
    let reader = ImageReader::open(bed.chunks.clone(), *digest).await.unwrap();
    for _ in 0..2 {
        fill::restore(pool, image, &reader, real, &TaskTracker::new(), |_| ()).await.unwrap();
    }
    let shown = pool.area.image(digest);
    assert!(same_disk(&shown, disk));
    assert_eq!(used(pool).0, Bytes::mib(5), "holes take nothing");
    let write = OpenOptions::new().write(true).open(&shown).and_then(|file| {
        file.write_all_at(&[1; 4096], 0)?;
        file.sync_all()
    });
    write.expect_err("it is read-only");
}

/// Makes a clone of the image, writes to it and to the disk that it is like, and a blank volume.
fn make_volumes(pool: &OpenPool, clone: &Uid, blank: &Uid, digest: &Digest, disk: &Path) {
    for (uid, origin) in [(clone, Origin::Image(*digest)), (blank, Origin::Blank)] {
        promise(pool, uid, PromiseClass::Volumes, Bytes::mib(64));
        for _ in 0..2 {
            volumes::make(pool, uid, FIRST, Bytes::mib(64), &origin, &BTreeMap::new()).unwrap();
        }
    }
    assert_eq!(used(pool).1, Bytes::ZERO, "nothing is copied");
    let device = pool.area.volume(clone);
    assert!(same_disk(&device, disk));
    assert_eq!(fs::read(&device).unwrap().len() as u64, 64 * MIB);
    for path in [&device, disk] {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&[9; 4096], 2 * MIB + 512).unwrap();
        file.sync_all().unwrap();
    }
    assert!(same_disk(&device, disk) && !same_disk(&pool.area.image(digest), disk), "the image is as it was");
}

/// As a deleted `StagedImage` goes.
fn remove_image(pool: &OpenPool, digest: &Digest) {
    pool.area.require_unused(&pool.record, digest).unwrap();
    pool.record.begin_evict(digest).unwrap();
    pool.area.remove_image(&pool.record, digest).unwrap();
    pool.record.forget_image(digest).unwrap();
}

/// Where volumes are shown to workloads.
struct Shown {
    files: PathBuf,
    block: PathBuf,
    read_only: PathBuf,
}

/// A blank volume with a file system, and a clone as a block device, once writable and once not.
fn in_use(pools: &Pools, blank: &Uid, clone: &Uid, dir: &Path) -> Shown {
    let shown =
        Shown { files: dir.join("files"), block: dir.join("block"), read_only: dir.join("read-only") };
    let volume = attach::find(pools, [], "v1-blank", blank).unwrap();
    for _ in 0..2 {
        volume.stage(&shown.files, Use::Filesystem(FsType::Ext4), ImportedContent::default()).unwrap();
    }
    fs::write(shown.files.join("file"), "kept").unwrap();
    File::open(&shown.files).unwrap().sync_all().unwrap();
    let volume = attach::find(pools, [], "v1-clone", clone).unwrap();
    let staged = dir.join("staged");
    volume.stage(&staged, Use::Block, ImportedContent::default()).unwrap();
    for (target, read_only) in [(&shown.block, false), (&shown.read_only, true)] {
        let how = Publication { read_only, alone: false };
        volume.publish(&staged, target, Use::Block, how).unwrap();
    }
    let start = |path: &Path| {
        let mut bytes = vec![0; 4096];
        File::open(path).unwrap().read_exact_at(&mut bytes, 2 * MIB + 512).unwrap();
        bytes
    };
    assert!(start(&shown.block) == start(&shown.read_only) && start(&shown.block) == [9; 4096]);
    OpenOptions::new().write(true).open(&shown.block).unwrap();
    let write = OpenOptions::new().write(true).open(&shown.read_only);
    write.and_then(|file| file.write_all_at(&[1; 4096], 0)).expect_err("it is read-only");
    volumes::remove(&pools.get(&name()).unwrap(), clone).expect_err("one in use stays");
    shown
}

impl Shown {
    /// Nothing has changed for the workloads; then they end.
    fn check(&self, pools: &Pools, blank: &Uid, clone: &Uid) {
        assert_eq!(fs::read_to_string(self.files.join("file")).unwrap(), "kept");
        for target in [&self.block, &self.read_only] {
            attach::unpublish(target).unwrap();
        }
        attach::unstage(pools, [], blank, &self.files).unwrap();
        attach::unstage(pools, [], clone, &self.block.with_file_name("staged")).unwrap();
    }
}

#[test]
fn in_a_group_of_others_it_takes_what_it_is_given_and_touches_nothing_else() {
    let test = "in_a_group_of_others_it_takes_what_it_is_given_and_touches_nothing_else";
    let Some(bench) = Bench::new(test) else { return };
    let dir = tempfile::tempdir().unwrap();
    let disk = text(&bench.disk);
    lvm(&["vgcreate", "--yes", "others", disk]);
    lvm(&["lvcreate", "--yes", "-Wn", "-n", "theirs", "-L", "32m", "others"]);
    fs::write("/dev/others/theirs", [7; 4096]).unwrap();
    let look = |fields: &str| lvm(&["lvs", "--noheadings", "-o", fields, "others/theirs"]);
    let theirs = look("lv_uuid,lv_size,lv_tags,lv_active,seg_pe_ranges");
    let free = || lvm(&["vgs", "--noheadings", "--units", "m", "-o", "vg_free", "others"]);
    let before = free();

    let size = Bytes::mib(640);
    let group = ThinGroup::Shared { name: "others".to_owned(), size };
    let backend = Backend::Thin(ThinSpec { group, block: BlockSize::DEFAULT.bytes() });
    let pools = pools(dir.path());
    pools.prepare(&name(), &PoolSpec::new(POOL.into(), backend)).unwrap();
    let pool = pools.get(&name()).unwrap();
    let taken = free();
    assert_ne!(taken, before, "all of it is taken at once");
    let (all, uid) = (pool.area.total(), holder(1));
    assert!(all > Bytes::mib(500), "{all}");
    promise(&pool, &uid, PromiseClass::Volumes, all);
    volumes::make(&pool, &uid, FIRST, all, &Origin::Blank, &BTreeMap::new()).unwrap();
    assert!(pool.area.kernel_pools().unwrap().volumes.data.total >= all, "it grew to what is promised");
    assert_eq!(free(), taken, "from what it had");
    switch_off(pool, pools);
    let (pools, pool) = reopen(dir.path());
    assert_eq!((free(), pool.area.total()), (taken, all), "nor does it take more later");
    volumes::remove(&pool, &uid).unwrap();
    destroy(pool, pools);

    assert_eq!(free(), before);
    assert_eq!(look("lv_uuid,lv_size,lv_tags,lv_active,seg_pe_ranges"), theirs);
    assert!(fs::read("/dev/others/theirs").unwrap().starts_with(&[7; 4096]));
    lvm(&["vgremove", "--yes", "others"]);
    lvm(&["pvremove", "--yes", disk]);
    bench.assert_nothing_is_left();
}
