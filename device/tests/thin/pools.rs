//! Kernel pools and thin devices that work as they should.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use berth_core::ledger::Class;
use berth_core::reason::Reason;
use berth_core::thin::{Action, Part, PoolMode, Room, StopReason, decide};
use berth_core::units::Bytes;
use berth_device::partition::Extent;
use berth_device::thin::{
    self, Difference, InProcess, KernelPool, KernelPoolError, PoolStatus, ThinConfig, ThinDevice,
    ThinDeviceError, WhenFull, WorkingPool,
};

use super::{
    Bench, POOL, assert_none_suspended, config, end_pool, fill, holder, id, open_pool, read_block, run, uid,
};

fn working(pool: &KernelPool) -> WorkingPool {
    match pool.status().unwrap() {
        PoolStatus::Working(state) => state,
        PoolStatus::Failed => panic!("{} has failed", pool.name()),
    }
}

fn blocks(first: u64, count: u64) -> Extent {
    Extent { offset: Bytes::kib(64 * first), length: Bytes::kib(64 * count) }
}

#[test]
fn clones_snapshots_and_deltas() {
    let Some(bench) = Bench::new("clones_snapshots_and_deltas") else { return };
    let group = bench.group();
    let images = open_pool(&group, Class::Images, Bytes::mib(64));
    let volumes = open_pool(&group, Class::Volumes, Bytes::mib(64));
    // A template of 16 blocks, read-only; a clone that is longer than it.
    images.create_thin(id(0)).unwrap();
    let whole = |holder, id, size, origin, read_only| ThinConfig { holder, id, size, origin, read_only };
    let (one, two, three) = (holder(1), holder(2), holder(3));
    let size = Bytes::mib(1);
    let template = ThinDevice::activate(&images, &whole(&one, id(0), size, None, false)).unwrap();
    fill(&template.path(), 0, 16, 0xAA).unwrap();
    template.deactivate().unwrap();
    let template = ThinDevice::activate(&images, &whole(&one, id(0), size, None, true)).unwrap();
    assert!(fill(&template.path(), 0, 1, 1).is_err(), "the template is read-only");
    volumes.create_thin(id(7)).unwrap();
    let taken = volumes.create_thin(id(7)).unwrap_err();
    assert!(matches!(taken, KernelPoolError::IdTaken { .. }), "{taken}");
    let origin = template.path();
    let clone_config = whole(&two, id(7), Bytes::mib(2), Some(&origin), false);
    let clone = ThinDevice::activate(&volumes, &clone_config).unwrap();
    assert_eq!(ThinDevice::activate(&volumes, &clone_config).unwrap(), clone, "taken over");
    let other =
        ThinDevice::activate(&volumes, &whole(&two, id(7), Bytes::mib(4), Some(&origin), false)).unwrap_err();
    assert!(matches!(other, ThinDeviceError::Different { .. }), "{other}");
    let error = ThinDevice::activate(&images, &whole(&three, id(0), size, Some(&origin), false)).unwrap_err();
    assert!(matches!(error, ThinDeviceError::OriginInSamePool { .. }), "{error}");
    assert_eq!((read_block(&clone.path(), 3), read_block(&clone.path(), 20)), (0xAA, 0));
    assert_eq!(clone.mapped().unwrap(), Some(Bytes::ZERO));

    // A snapshot while it is in use holds what was written before it.
    fill(&clone.path(), 3, 2, 0xBB).unwrap();
    volumes.create_snap(id(8), id(7), &InProcess).unwrap();
    assert_none_suspended();
    fill(&clone.path(), 4, 1, 0xCC).unwrap();
    clone.discard(blocks(3, 1)).unwrap();
    let snapshot =
        ThinDevice::activate(&volumes, &whole(&three, id(8), Bytes::mib(2), Some(&origin), true)).unwrap();
    let see = |device: &ThinDevice| [2, 3, 4, 20].map(|block| read_block(&device.path(), block));
    assert_eq!(see(&snapshot), [0xAA, 0xBB, 0xBB, 0]);
    assert_eq!(see(&clone), [0xAA, 0xAA, 0xCC, 0], "a discarded block is the template's again");
    assert_eq!(read_block(&template.path(), 4), 0xAA);

    let now = Duration::ZERO;
    let read = volumes.metadata_snapshot(now).unwrap();
    let held = volumes.metadata_snapshot(now).unwrap_err();
    assert!(matches!(held, KernelPoolError::SnapshotHeld { .. }), "{held}");
    let (mut mapped, mut changed) = (Vec::new(), Vec::new());
    read.mapped(id(8), |extent| mapped.push(extent)).unwrap();
    read.changed(id(8), id(7), |change| changed.push(change)).unwrap();
    assert_eq!(mapped, [blocks(3, 2)]);
    assert_eq!(changed, [(blocks(3, 1), Difference::Removed), (blocks(4, 1), Difference::Changed)]);
    changed.clear();
    read.changed(id(8), id(8), |change| changed.push(change)).unwrap();
    assert_eq!(changed, [(blocks(3, 2), Difference::Same)]);
    assert!(read.mapped(id(99), |_| {}).is_err(), "there is no such device");
    volumes.release_stale_snapshot().unwrap();
    assert!(working(&volumes).held_root.is_some(), "what is read is not stale");
    drop(read);
    let leave = || run("dmsetup", &["message", &volumes.name().name(), "0", "reserve_metadata_snap"]);
    leave(); // as a crash leaves it
    volumes.release_stale_snapshot().unwrap();
    assert_eq!(working(&volumes).held_root, None);
    leave();
    drop(volumes.metadata_snapshot(now).unwrap());
    assert_eq!(working(&volumes).held_root, None);

    let in_use = volumes.delete(id(7)).unwrap_err();
    assert!(matches!(in_use, KernelPoolError::InUse { .. }), "{in_use}");
    let in_use = volumes.clone().close(&group).unwrap_err();
    assert!(matches!(in_use, KernelPoolError::InUse { .. }), "{in_use}");
    for device in [snapshot, clone, template] {
        device.deactivate().unwrap();
    }
    for id in [id(7), id(8), id(8)] {
        volumes.delete(id).unwrap();
    }
    assert_eq!(working(&volumes).data.used, 0, "every block was given back");
    end_pool(volumes, &group, &config(Class::Volumes, WhenFull::Queue));
    end_pool(images, &group, &config(Class::Images, WhenFull::Queue));
    group.remove().unwrap();
}

#[test]
fn what_an_earlier_device_held_is_never_seen() {
    let Some(bench) = Bench::new("what_an_earlier_device_held_is_never_seen") else { return };
    let group = bench.group();
    let images = open_pool(&group, Class::Images, Bytes::mib(16));
    let volumes = open_pool(&group, Class::Volumes, Bytes::mib(16));
    let size = Bytes::mib(8);
    let (one, two) = (holder(1), holder(2));
    let thin = |holder, id, size, origin, read_only| ThinConfig { holder, id, size, origin, read_only };
    volumes.create_thin(id(1)).unwrap();
    let all = Bytes::mib(16); // every block of the pool
    let earlier = ThinDevice::activate(&volumes, &thin(&one, id(1), all, None, false)).unwrap();
    fill(&earlier.path(), 0, 256, 0x5E).unwrap();
    earlier.deactivate().unwrap();
    volumes.delete(id(1)).unwrap();

    // A small part of a block is written: of a device with no origin, and of one whose origin ends within the block.
    images.create_thin(id(3)).unwrap();
    let short = ThinDevice::activate(&images, &thin(&two, id(3), Bytes::kib(96), None, true)).unwrap();
    let origin = short.path();
    for (number, origin) in [(4, None), (5, Some(&*origin))] {
        volumes.create_thin(id(number)).unwrap();
        let later = ThinDevice::activate(&volumes, &thin(&one, id(number), size, origin, false)).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(later.path()).unwrap();
        for block in 0..100 {
            file.write_all_at(&[7; 4096], block * 65_536 + 8192).unwrap(); // the rest of each is the kernel's to fill
        }
        file.sync_all().unwrap();
        drop(file);
        later.clone().deactivate().unwrap(); // nothing of it is in memory any more
        let later = ThinDevice::activate(&volumes, &thin(&one, id(number), size, origin, true)).unwrap();
        let content = std::fs::read(later.path()).unwrap();
        assert!(content.iter().all(|byte| matches!(byte, 0 | 7)), "device {number} shows what it never held");
        assert_eq!(content.iter().map(|byte| usize::from(*byte == 7)).sum::<usize>(), 100 * 4096);
        later.deactivate().unwrap();
    }
    short.deactivate().unwrap();
    end_pool(volumes, &group, &config(Class::Volumes, WhenFull::Queue));
    end_pool(images, &group, &config(Class::Images, WhenFull::Queue));
    group.remove().unwrap();
}

#[test]
fn everything_survives_closing_and_grows_in_use() {
    let Some(bench) = Bench::new("everything_survives_closing_and_grows_in_use") else { return };
    let group = bench.group();
    let config = config(Class::Volumes, WhenFull::Queue);
    let pool = open_pool(&group, Class::Volumes, Bytes::mib(16));
    pool.create_thin(id(5)).unwrap();
    let one = holder(1);
    let size = Bytes::mib(8);
    let thin = |size| ThinConfig { holder: &one, id: id(5), size, origin: None, read_only: false };
    let device = ThinDevice::activate(&pool, &thin(size)).unwrap();
    fill(&device.path(), 0, 8, 1).unwrap();
    assert_eq!(pool.active_devices().unwrap().len(), 1);
    pool.set_transaction_id(0, 41).unwrap();
    pool.set_transaction_id(0, 41).expect("repeated");
    let wrong = pool.set_transaction_id(7, 42).unwrap_err();
    assert!(matches!(wrong, KernelPoolError::TransactionId { found: 41, .. }), "{wrong}");

    // In use: the device, the data, the metadata.
    device.resize(Bytes::mib(32), &InProcess).unwrap();
    assert_eq!(device.size().unwrap(), Bytes::mib(32));
    let smaller = device.resize(Bytes::mib(31), &InProcess).unwrap_err();
    assert!(matches!(smaller, ThinDeviceError::Smaller { .. }), "{smaller}");
    let before = working(&pool);
    pool.grow(&config, &group, Part::Data, Bytes::mib(32), &InProcess).unwrap();
    pool.grow(&config, &group, Part::Metadata, Bytes::mib(8), &InProcess).unwrap();
    pool.refresh(&config, &InProcess).expect("nothing to do");
    assert_none_suspended();
    let after = working(&pool);
    assert_eq!((before.data.total, after.data.total), (256, 768));
    assert_eq!((before.metadata.total, after.metadata.total), (1024, 3072));
    assert_eq!(pool.table().unwrap().low_water_blocks, 153, "a fifth of 768");
    fill(&device.path(), 0, 500, 2).unwrap();
    assert_eq!(device.mapped().unwrap(), Some(Bytes::kib(64 * 500)));

    // Closed and opened: content, size and transaction are there.
    device.deactivate().unwrap();
    pool.close(&group).unwrap();
    assert!(KernelPool::find(&uid(POOL), Class::Volumes).unwrap().is_none());
    let pool = KernelPool::open(&config, &group).unwrap();
    assert_eq!((working(&pool).transaction_id, working(&pool).data.used), (41, 500));
    let device = ThinDevice::activate(&pool, &thin(Bytes::mib(32))).unwrap();
    assert_eq!((read_block(&device.path(), 0), read_block(&device.path(), 499)), (2, 2));
    let adopted = KernelPool::open(&config, &group).expect("active already");
    assert_eq!(adopted.name(), pool.name());
    assert_eq!(ThinDevice::find(&pool, &one).unwrap(), Some(device.clone()));
    device.deactivate().unwrap();
    end_pool(pool, &group, &config);
    group.remove().unwrap();
}

/// Writes a part of a block past memory, which tells what the kernel says: from memory, every failure is the same.
fn write_directly(device: &Path, block: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).custom_flags(nix::libc::O_DIRECT).open(device)?;
    let buffer = vec![1; 8192];
    let start = buffer.as_ptr().align_offset(4096);
    file.write_all_at(&buffer[start..start + 4096], block * 65_536)
}

#[test]
fn a_full_pool_fails_at_once_or_waits_to_grow() {
    let Some(bench) = Bench::new("a_full_pool_fails_at_once_or_waits_to_grow") else { return };
    let group = bench.group();
    let fixed = config(Class::Images, WhenFull::Error);
    KernelPool::provision(&fixed, &group, Bytes::mib(16), Bytes::mib(4)).unwrap();
    let pool = KernelPool::open(&fixed, &group).unwrap();
    pool.create_thin(id(1)).unwrap();
    let one = holder(1);
    let thin = ThinConfig { holder: &one, id: id(1), size: Bytes::mib(64), origin: None, read_only: false };
    let device = ThinDevice::activate(&pool, &thin).unwrap();
    let started = Instant::now();
    fill(&device.path(), 0, 300, 1).expect_err("there are 256 blocks");
    let error = write_directly(&device.path(), 900).expect_err("it is full");
    assert_eq!(error.raw_os_error(), Some(nix::libc::ENOSPC), "{error}");
    assert!(started.elapsed() < Duration::from_secs(30), "it does not wait for space");
    let state = pool.state().unwrap();
    assert_eq!((state.mode, state.data.percent()), (PoolMode::OutOfDataSpace, 100));
    let none = Room {
        data_limit: Bytes::mib(16),
        metadata_limit: Bytes::mib(4),
        free: Bytes::ZERO,
        extent: Bytes::mib(4),
    };
    assert_eq!(decide(&state, &none)[0], Action::StopGranting(StopReason::Data));
    let refused = pool.create_thin(id(2)).unwrap_err();
    assert!(matches!(refused, KernelPoolError::NotWritable { .. }), "{refused}");
    assert_eq!(refused.reason(), Reason::DataAlmostFull);
    device.deactivate().unwrap();
    pool.delete(id(1)).unwrap();
    assert_eq!(pool.state().unwrap().mode, PoolMode::ReadWrite, "what was deleted is free");
    end_pool(pool, &group, &fixed);

    let growing = config(Class::Volumes, WhenFull::Queue);
    let pool = open_pool(&group, Class::Volumes, Bytes::mib(16));
    pool.create_thin(id(1)).unwrap();
    let device = ThinDevice::activate(&pool, &thin).unwrap();
    let path = device.path();
    let writer = std::thread::spawn(move || fill(&path, 0, 300, 1));
    let deadline = Instant::now() + Duration::from_secs(30);
    while pool.state().unwrap().mode != PoolMode::OutOfDataSpace {
        assert!(Instant::now() < deadline, "the pool never fills");
        std::thread::sleep(Duration::from_millis(50));
    }
    let plenty = Room { data_limit: Bytes::gib(1), free: group.space().unwrap().free, ..none };
    let [Action::Grow { part: Part::Data, by }] = decide(&pool.state().unwrap(), &plenty)[..] else {
        panic!("{:?}", decide(&pool.state().unwrap(), &plenty));
    };
    pool.grow(&growing, &group, Part::Data, by, &InProcess).unwrap();
    writer.join().unwrap().expect("it waited for the growth");
    assert_eq!((working(&pool).data.used, pool.state().unwrap().mode), (300, PoolMode::ReadWrite));
    device.deactivate().unwrap();
    end_pool(pool, &group, &growing);
    group.remove().unwrap();
}

#[test]
fn a_mounted_file_system_is_frozen_for_its_snapshot() {
    let Some(bench) = Bench::new("a_mounted_file_system_is_frozen_for_its_snapshot") else { return };
    let group = bench.group();
    let pool = open_pool(&group, Class::Volumes, Bytes::mib(128));
    pool.create_thin(id(1)).unwrap();
    let (one, two) = (holder(1), holder(2));
    let thin = |holder, id| ThinConfig { holder, id, size: Bytes::mib(64), origin: None, read_only: false };
    let device = ThinDevice::activate(&pool, &thin(&one, id(1))).unwrap();
    run("mkfs.ext4", &["-q", device.path().to_str().unwrap()]);
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mount = dir.path().to_str().unwrap();
    run("mount", &[device.path().to_str().unwrap(), mount]);
    std::fs::write(dir.path().join("file"), vec![9; 1 << 20]).unwrap(); // not synced
    pool.create_snap(id(2), id(1), &InProcess).unwrap();
    assert_none_suspended();
    std::fs::write(dir.path().join("later"), "x").unwrap();
    device.resize(Bytes::mib(80), &InProcess).unwrap();
    run("umount", &[mount]);
    let snapshot = ThinDevice::activate(&pool, &thin(&two, id(2))).unwrap();
    run("e2fsck", &["-f", "-n", snapshot.path().to_str().unwrap()]);
    run("mount", &["-o", "ro,noload", snapshot.path().to_str().unwrap(), mount]);
    assert_eq!(std::fs::read(dir.path().join("file")).unwrap(), vec![9; 1 << 20]);
    assert!(!dir.path().join("later").exists());
    let busy = snapshot.clone().deactivate().unwrap_err();
    assert!(matches!(busy, ThinDeviceError::InUse { .. }), "{busy}");
    run("umount", &[mount]);
    snapshot.deactivate().unwrap();
    device.deactivate().unwrap();
    assert_eq!(thin::list_ours().unwrap().len(), 1, "the pool");
    end_pool(pool, &group, &config(Class::Volumes, WhenFull::Queue));
    group.remove().unwrap();
}
