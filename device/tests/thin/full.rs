//! Metadata that runs full, and discards that give space back to what is below.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use berth_core::ids::Uid;
use berth_core::ledger::Class;
use berth_core::reason::Reason;
use berth_core::thin::{Part, PoolMode, StopReason, ThinState};
use berth_core::units::Bytes;
use berth_device::files;
use berth_device::loop_device::{self, LoopOptions};
use berth_device::partition::Extent;
use berth_device::thin::{
    Discards, InProcess, KernelPool, KernelPoolError, PoolStatus, Scope, ThinConfig, ThinDevice, VolumeGroup,
    WhenFull, WipeConsent, volume_name,
};

use super::{BLOCK, Bench, POOL, config, end_pool, fill, holder, id, open_pool, read_block, run, uid};

/// Where the flags of a superblock stand, the one that wants a check, and what its checksum is combined with
/// (`drivers/md/dm-thin-metadata.c`).
const FLAGS_AT: usize = 4;
const NEEDS_CHECK: u8 = 1;
const CHECKSUM_XOR: u32 = 160_774;

/// How many devices surely leave 512 KiB of metadata below 70 %.
const FIRST: u32 = 50;

fn thin(holder: &Uid, size: Bytes) -> ThinConfig<'_> {
    ThinConfig { holder, id: id(1), size, origin: None, read_only: false }
}

/// Makes devices until one is refused; tells where grants stop, and why no more can be made.
fn fill_metadata(pool: &KernelPool) -> KernelPoolError {
    // So many have room in any case, and are made without a look in between.
    let name = pool.name().name();
    let many =
        format!("for n in $(seq 2 {FIRST}); do dmsetup message {name} 0 \"create_thin $n\" || exit; done");
    run("sh", &["-c", &many]);
    assert_eq!(pool.state().unwrap().stopped(), None);
    let mut alarm = false;
    for n in FIRST + 1..1000 {
        let state = pool.state().unwrap();
        if !alarm && let Some(why) = state.stopped() {
            assert!((71..80).contains(&state.metadata.percent()), "{state:?}");
            assert_eq!((why, why.reason()), (StopReason::Metadata, Reason::MetadataAlmostFull));
            println!("no grants from {n} devices on, at {} %", state.metadata.percent());
            alarm = true;
        }
        if let Err(error) = pool.create_thin(id(n)) {
            println!("no more than {n} devices: {error}");
            assert!(alarm, "the alarm comes before the end");
            return error;
        }
    }
    panic!("metadata never runs full: {:?}", pool.state().unwrap());
}

#[test]
fn full_metadata_stops_grants_and_new_blocks_and_growth_mends_it() {
    let test = "full_metadata_stops_grants_and_new_blocks_and_growth_mends_it";
    let Some(bench) = Bench::new(test) else { return };
    let large = bench.large.to_str().unwrap();
    // Small extents, for metadata that a few devices fill.
    run("lvm", &["vgcreate", "--yes", "-s", "128k", "small-extents", large]);
    let group = VolumeGroup::open_shared("small-extents", &Scope::Only(vec![bench.large.clone()])).unwrap();
    let config = config(Class::Volumes, WhenFull::Queue);
    KernelPool::provision(&config, &group, Bytes::mib(64), Bytes::kib(512)).unwrap();
    let pool = KernelPool::open(&config, &group).unwrap();
    let images = open_pool(&group, Class::Images, Bytes::mib(16));
    let (one, two) = (holder(1), holder(2));
    images.create_thin(id(1)).unwrap();
    let image = ThinDevice::activate(&images, &thin(&two, Bytes::mib(1))).unwrap();
    pool.create_thin(id(1)).unwrap();
    let device = ThinDevice::activate(&pool, &thin(&one, Bytes::mib(64))).unwrap();
    fill(&device.path(), 0, 4, 9).unwrap();

    let refused = fill_metadata(&pool);
    assert_eq!(refused.reason(), Reason::ReadOnly, "{refused}");
    let volumes = pool.state().unwrap();
    assert_eq!((volumes.mode, volumes.metadata.percent()), (PoolMode::ReadOnly, 100));
    let state = ThinState { images: images.state().unwrap(), volumes };
    assert_eq!(state.stopped(Class::Volumes).map(|stopped| stopped.reason()), Some(Reason::ReadOnly));
    assert_eq!(state.stopped(Class::Images), None);
    fill(&device.path(), 4, 1, 9).expect_err("there is no room for its place");
    assert_eq!(read_block(&device.path(), 3), 9, "reads go on");
    fill(&image.path(), 0, 16, 5).expect("the other class goes on");

    pool.grow(&config, &group, Part::Metadata, Bytes::kib(512), &InProcess).unwrap();
    assert_eq!((pool.state().unwrap().mode, pool.state().unwrap().stopped()), (PoolMode::ReadWrite, None));
    fill(&device.path(), 4, 50, 8).unwrap();
    assert_eq!((read_block(&device.path(), 3), read_block(&device.path(), 53)), (9, 8));
    for device in [device, image] {
        device.deactivate().unwrap();
    }
    end_pool(pool, &group, &config);
    end_pool(images, &group, &super::config(Class::Images, WhenFull::Queue));
    run("lvm", &["vgremove", "--yes", "small-extents"]);
    run("lvm", &["pvremove", "--yes", large]);
}

#[test]
fn metadata_that_needs_a_check_is_read_and_mended_only_by_a_person() {
    let test = "metadata_that_needs_a_check_is_read_and_mended_only_by_a_person";
    let Some(bench) = Bench::new(test) else { return };
    let group = bench.group();
    let config = config(Class::Volumes, WhenFull::Queue);
    let pool = open_pool(&group, Class::Volumes, Bytes::mib(64));
    let one = holder(1);
    pool.create_thin(id(1)).unwrap();
    let device = ThinDevice::activate(&pool, &thin(&one, Bytes::mib(64))).unwrap();
    fill(&device.path(), 0, 4, 9).unwrap();
    device.deactivate().unwrap();
    pool.close(&group).unwrap();
    let name = volume_name(&uid(POOL), Class::Volumes, Part::Metadata).unwrap();
    let metadata = group.activate(&name).unwrap().path;
    want_check(&metadata);
    let before = std::fs::read(&metadata).unwrap();

    let pool = KernelPool::open(&config, &group).expect("it can be read");
    assert_eq!(pool.state().unwrap().stopped(), Some(StopReason::NeedsCheck));
    let device = ThinDevice::activate(&pool, &thin(&one, Bytes::mib(64))).unwrap();
    assert_eq!(read_block(&device.path(), 3), 9, "reads go on");
    fill(&device.path(), 4, 1, 9).expect_err("nothing new is written");
    for refused in [
        pool.create_thin(id(2)),
        pool.create_snap(id(2), id(1), &InProcess),
        pool.grow(&config, &group, Part::Data, Bytes::mib(4), &InProcess),
    ] {
        let error = refused.unwrap_err();
        assert_eq!(error.reason(), Reason::NeedsCheck, "{error}");
    }
    device.deactivate().unwrap();
    pool.close(&group).unwrap();
    let metadata = group.activate(&name).unwrap().path;
    assert!(std::fs::read(&metadata).unwrap() == before, "nothing was written");

    // What docs/operations.md tells to do by hand.
    let path = metadata.to_str().unwrap();
    run("thin_check", &["-q", path]);
    run("thin_check", &["-q", "--clear-needs-check-flag", path]);
    let pool = KernelPool::open(&config, &group).unwrap();
    assert_eq!(pool.state().unwrap().stopped(), None);
    let device = ThinDevice::activate(&pool, &thin(&one, Bytes::mib(64))).unwrap();
    fill(&device.path(), 4, 1, 8).unwrap();
    assert_eq!((read_block(&device.path(), 3), read_block(&device.path(), 4)), (9, 8));
    device.deactivate().unwrap();
    end_pool(pool, &group, &config);
    group.remove().unwrap();
}

/// Sets the flag that the kernel sets when it could not finish a transaction.
fn want_check(metadata: &Path) {
    let file = File::options().read(true).write(true).open(metadata).unwrap();
    let mut block = [0; 4096];
    file.read_exact_at(&mut block, 0).unwrap();
    let checksum = |block: &[u8; 4096]| (crc32c(&block[FLAGS_AT..]) ^ CHECKSUM_XOR).to_le_bytes();
    assert_eq!(block[..4], checksum(&block), "this is how it is computed");
    block[FLAGS_AT] |= NEEDS_CHECK;
    let new = checksum(&block);
    block[..4].copy_from_slice(&new);
    file.write_all_at(&block, 0).unwrap();
    file.sync_all().unwrap();
}

/// As the kernel computes it: without the inversion at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0x82F6_3B78 * (sum & 1)))
    })
}

#[test]
fn what_is_discarded_goes_back_to_what_is_below() {
    let Some(_bench) = Bench::new("what_is_discarded_goes_back_to_what_is_below") else { return };
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap().set_len(192 << 20).unwrap();
    // The disks of a guest take discards of 32 KiB at most, less than a block; a loop device takes any.
    let disk = loop_device::attach(&path, LoopOptions::default()).unwrap();
    let devices = [disk.path.clone()];
    let consent = WipeConsent::for_devices(devices.clone());
    let group = VolumeGroup::create("berth-discards", &uid(POOL), &devices, Some(&consent)).unwrap();
    let pool = open_pool(&group, Class::Volumes, Bytes::mib(96));
    let PoolStatus::Working(working) = pool.status().unwrap() else { panic!("it has failed") };
    assert_eq!(working.discards, Discards::PassedDown);
    pool.create_thin(id(1)).unwrap();
    let one = holder(1);
    let device = ThinDevice::activate(&pool, &thin(&one, Bytes::mib(64))).unwrap();
    let used = || files::allocated_bytes(&path).unwrap();
    let empty = used();
    fill(&device.path(), 0, 512, 3).unwrap();
    let full = used();
    assert!(full.saturating_sub(empty) >= Bytes::mib(32), "{empty}, {full}");
    device.discard(Extent { offset: Bytes::ZERO, length: Bytes((256 * BLOCK) as u64) }).unwrap();
    let half = used();
    assert!(full.saturating_sub(half) >= Bytes::mib(15), "{full}, {half}");
    assert_eq!((read_block(&device.path(), 0), read_block(&device.path(), 300)), (0, 3));
    println!("allocated: {empty} at first, {full} with 32 MiB, {half} after 16 MiB were discarded");
    device.deactivate().unwrap();
    end_pool(pool, &group, &config(Class::Volumes, WhenFull::Queue));
    group.remove().unwrap();
    loop_device::detach(&disk).unwrap();
    assert!(Path::new(&path).exists());
}
