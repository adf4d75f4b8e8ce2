//! What goes wrong, and that no device is left suspended by it.

use std::time::{Duration, Instant};

use berth_core::ledger::Class;
use berth_core::reason::Reason;
use berth_core::thin::{Part, PoolMode};
use berth_core::units::Bytes;
use berth_device::thin::{
    self, InProcess, KernelPool, KernelPoolError, SuspendError, ThinConfig, ThinDevice, ThinDeviceError,
    VolumeGroup, WhenFull, volume_name,
};

use super::{
    Bench, POOL, assert_none_suspended, config, end_pool, fill, holder, id, open_pool, read_block, run, uid,
};

/// A clone of a template of 16 blocks, in pools of their own.
struct Clone {
    images: KernelPool,
    volumes: KernelPool,
    template: ThinDevice,
    device: ThinDevice,
}

impl Clone {
    fn new(group: &VolumeGroup) -> Self {
        let images = open_pool(group, Class::Images, Bytes::mib(32));
        let volumes = open_pool(group, Class::Volumes, Bytes::mib(32));
        let (one, two, size) = (holder(1), holder(2), Bytes::mib(1));
        images.create_thin(id(1)).unwrap();
        volumes.create_thin(id(1)).unwrap();
        let thin = ThinConfig { holder: &one, id: id(1), size, origin: None, read_only: false };
        let template = ThinDevice::activate(&images, &thin).unwrap();
        fill(&template.path(), 0, 16, 5).unwrap();
        let origin = template.path();
        let thin = ThinConfig { holder: &two, origin: Some(&origin), ..thin };
        let device = ThinDevice::activate(&volumes, &thin).unwrap();
        Self { images, volumes, template, device }
    }

    fn end(self, group: &VolumeGroup) {
        self.device.deactivate().unwrap();
        self.template.deactivate().unwrap();
        end_pool(self.volumes, group, &config(Class::Volumes, WhenFull::Queue));
        end_pool(self.images, group, &config(Class::Images, WhenFull::Queue));
    }
}

fn suspended() -> Vec<String> {
    thin::all_suspended_of_ours().unwrap().into_iter().map(|info| info.name).collect()
}

#[test]
fn a_snapshot_that_fails_leaves_its_device_working() {
    let Some(bench) = Bench::new("a_snapshot_that_fails_leaves_its_device_working") else { return };
    let group = bench.group();
    let bed = Clone::new(&group);
    bed.volumes.create_snap(id(2), id(1), &InProcess).unwrap();
    let taken = bed.volumes.create_snap(id(2), id(1), &InProcess).unwrap_err();
    assert!(matches!(taken, KernelPoolError::IdTaken { .. }), "{taken}");
    assert_none_suspended();
    let absent = bed.volumes.create_snap(id(3), id(77), &InProcess).unwrap_err();
    assert!(matches!(absent, KernelPoolError::NoSuchId { .. }), "{absent}");
    fill(&bed.device.path(), 0, 1, 6).unwrap();
    assert_eq!(read_block(&bed.device.path(), 0), 6);
    bed.end(&group);
    group.remove().unwrap();
}

#[test]
fn a_silent_origin_stops_snapshots_and_growth_but_leaves_nothing_suspended() {
    let Some(bench) = Bench::new("a_silent_origin_stops_snapshots_and_growth") else { return };
    let group = bench.group();
    let bed = Clone::new(&group);
    // A suspended template answers nobody.
    run("dmsetup", &["suspend", &bed.template.name().name()]);
    let started = Instant::now();
    let silent = bed.volumes.create_snap(id(2), id(1), &InProcess).unwrap_err();
    assert!(matches!(silent, KernelPoolError::Suspend(SuspendError::OriginSilent { .. })), "{silent}");
    assert_eq!(silent.reason(), Reason::OriginSilent);
    assert!(started.elapsed() < Duration::from_secs(30));
    assert_eq!(suspended(), [bed.template.name().name()], "the clone was not touched");

    // Growth would wait for this read, which waits for the origin.
    let path = bed.device.path();
    let reader = std::thread::spawn(move || read_block(&path, 9));
    std::thread::sleep(Duration::from_secs(1));
    let error = bed.device.resize(Bytes::mib(2), &InProcess).unwrap_err();
    assert!(matches!(error, ThinDeviceError::Suspend { .. }), "{error}");
    let growing = config(Class::Volumes, WhenFull::Queue);
    let error = bed.volumes.grow(&growing, &group, Part::Data, Bytes::mib(4), &InProcess).unwrap_err();
    assert!(matches!(error, KernelPoolError::Suspend(SuspendError::OriginSilent { .. })), "{error}");
    assert_eq!(suspended(), [bed.template.name().name()]);

    for info in thin::all_suspended_of_ours().unwrap() {
        thin::resume(&info).unwrap();
    }
    assert_eq!(reader.join().unwrap(), 5);
    assert_none_suspended();
    bed.device.resize(Bytes::mib(2), &InProcess).unwrap();
    bed.volumes.refresh(&growing, &InProcess).unwrap();
    assert_eq!(bed.volumes.state().unwrap().data.total, Bytes::mib(36));
    bed.volumes.create_snap(id(2), id(1), &InProcess).unwrap();
    assert_none_suspended();
    bed.end(&group);
    group.remove().unwrap();
}

#[test]
fn a_suspension_that_takes_too_long_is_given_up_without_an_error_for_anyone() {
    let Some(bench) = Bench::new("a_suspension_that_takes_too_long_is_given_up") else { return };
    let group = bench.group();
    let growing = config(Class::Volumes, WhenFull::Queue);
    let pool = open_pool(&group, Class::Volumes, Bytes::mib(16));
    pool.create_thin(id(1)).unwrap();
    let one = holder(1);
    let thin = ThinConfig { holder: &one, id: id(1), size: Bytes::mib(64), origin: None, read_only: false };
    let device = ThinDevice::activate(&pool, &thin).unwrap();
    // A write that waits for the pool to grow keeps the device from coming to rest.
    let path = device.path();
    let writer = std::thread::spawn(move || fill(&path, 0, 300, 1));
    let deadline = Instant::now() + Duration::from_secs(30);
    while pool.state().unwrap().mode != PoolMode::OutOfDataSpace {
        assert!(Instant::now() < deadline, "the pool never fills");
        std::thread::sleep(Duration::from_millis(50));
    }
    let error = device.resize(Bytes::mib(80), &InProcess).unwrap_err();
    assert!(matches!(error, ThinDeviceError::Dm(_)), "{error}");
    assert_none_suspended();
    assert_eq!(device.size().unwrap(), Bytes::mib(64), "it has its old table");
    pool.grow(&growing, &group, Part::Data, Bytes::mib(16), &InProcess).unwrap();
    writer.join().unwrap().expect("it waited for the growth");
    assert_eq!(read_block(&device.path(), 299), 1);
    device.resize(Bytes::mib(80), &InProcess).unwrap();
    device.deactivate().unwrap();
    end_pool(pool, &group, &growing);
    group.remove().unwrap();
}

#[test]
fn what_a_crash_left_suspended_is_found_and_resumed_pools_first() {
    let Some(bench) = Bench::new("what_a_crash_left_suspended_is_found_and_resumed_pools_first") else {
        return;
    };
    let group = bench.group();
    let bed = Clone::new(&group);
    run("dmsetup", &["suspend", "--noflush", &bed.device.name().name()]);
    run("dmsetup", &["suspend", &bed.volumes.name().name()]);
    assert_eq!(suspended(), [bed.volumes.name().name(), bed.device.name().name()]);
    for info in thin::all_suspended_of_ours().unwrap() {
        thin::resume(&info).unwrap();
    }
    assert_none_suspended();
    fill(&bed.device.path(), 0, 2, 3).unwrap();
    bed.end(&group);
    group.remove().unwrap();
}

#[test]
fn metadata_that_is_lost_or_damaged_is_never_made_anew_nor_repaired() {
    let Some(bench) = Bench::new("metadata_that_is_lost_or_damaged_is_never_made_anew_nor_repaired") else {
        return;
    };
    let group = bench.group();
    let config = config(Class::Volumes, WhenFull::Queue);
    let pool = open_pool(&group, Class::Volumes, Bytes::mib(32));
    pool.create_thin(id(1)).unwrap();
    let metadata = volume_name(&uid(POOL), Class::Volumes, Part::Metadata).unwrap();
    pool.close(&group).unwrap();

    let device = group.activate(&metadata).unwrap().path;
    let good = std::fs::read(&device).unwrap();
    // Block 1 onwards: the superblock says that trees are there, which are not.
    fill(&device, 1, 20, 0xFF).unwrap();
    let damaged = std::fs::read(&device).unwrap();
    let error = KernelPool::open(&config, &group).unwrap_err();
    assert!(matches!(error, KernelPoolError::Damaged { .. }), "{error}");
    assert_eq!(error.reason(), Reason::NeedsCheck);
    assert!(std::fs::read(&device).unwrap() == damaged, "nothing was written");
    // A superblock of somebody else, and none at all.
    for foreign in [0x5A, 0] {
        fill(&device, 0, 1, foreign).unwrap();
        let before = std::fs::read(&device).unwrap();
        let error = KernelPool::open(&config, &group).unwrap_err();
        assert!(matches!(error, KernelPoolError::MetadataLost { .. }), "{error}");
        assert_eq!(error.reason(), Reason::NeedsCheck);
        assert!(std::fs::read(&device).unwrap() == before, "nothing was written");
    }
    // Made anew by whoever: new metadata beside data that was used is a loss, too.
    group.deactivate(&metadata).unwrap();
    group.remove_volume(&metadata).unwrap();
    KernelPool::provision(&config, &group, Bytes::mib(32), Bytes::mib(4)).unwrap();
    let error = KernelPool::open(&config, &group).unwrap_err();
    assert!(
        matches!(error, KernelPoolError::MetadataLost { .. } | KernelPoolError::Damaged { .. }),
        "{error}"
    );

    let device = group.activate(&metadata).unwrap().path;
    std::fs::write(&device, &good).unwrap();
    std::fs::File::open(&device).unwrap().sync_all().unwrap();
    let pool = KernelPool::open(&config, &group).expect("what was restored is there");
    let taken = pool.create_thin(id(1)).unwrap_err();
    assert!(matches!(taken, KernelPoolError::IdTaken { .. }), "{taken}");
    end_pool(pool, &group, &config);
    group.remove().unwrap();
}

#[test]
fn an_interrupted_opening_goes_on() {
    let Some(bench) = Bench::new("an_interrupted_opening_goes_on") else { return };
    let group = bench.group();
    let config = config(Class::Volumes, WhenFull::Queue);
    // Left-over metadata of a pool that was deleted lies where the new one is made.
    let pool = open_pool(&group, Class::Volumes, Bytes::mib(16));
    pool.create_thin(id(1)).unwrap();
    pool.set_transaction_id(0, 9).unwrap();
    end_pool(pool, &group, &config);
    let pool = open_pool(&group, Class::Volumes, Bytes::mib(16));
    pool.create_thin(id(1)).expect("an empty pool");
    // A device that was made and got no table.
    let name = thin::DeviceName::thin(&uid(POOL), Class::Volumes, &holder(1)).unwrap();
    run("dmsetup", &["create", &name.name(), "-u", &name.uuid(), "--notable"]);
    let one = holder(1);
    let thin = ThinConfig { holder: &one, id: id(1), size: Bytes::mib(1), origin: None, read_only: false };
    let device = ThinDevice::activate(&pool, &thin).unwrap();
    fill(&device.path(), 0, 1, 1).unwrap();
    // A volume that was extended, and its pool does not know it yet.
    let data = volume_name(&uid(POOL), Class::Volumes, Part::Data).unwrap();
    group.extend_to(&data, Bytes::mib(24)).unwrap();
    pool.refresh(&config, &InProcess).unwrap();
    assert_eq!(pool.state().unwrap().data.total, Bytes::mib(24));
    device.deactivate().unwrap();
    end_pool(pool, &group, &config);
    group.remove().unwrap();
}
