//! The area of a filesystem pool.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use berth_core::ids::Uid;
use berth_core::units::Bytes;
use berth_device::files::{allocated_bytes, punch_hole, reflink, sync_file_and_parent};
use berth_device::loop_device::{self, LoopOptions};
use berth_device::mounts::{self, FsType, MountError, MountOptions};
use berth_device::pool_area::{ClaimError, PoolArea, PoolAreaConfig, PoolIdentity};

use crate::{Bench, noise, sparse, tool};

const SIZE: Bytes = Bytes::mib(320);

/// Each test has pools of its own: the kernel mounts no two file systems with one UUID.
fn uid(bench: &Bench, pool: &str) -> Uid {
    Uid(format!("{}-{pool}", bench.path("").display()))
}

fn config(bench: &Bench, pool: &str) -> PoolAreaConfig {
    PoolAreaConfig {
        dir: bench.path("pool"),
        size: SIZE,
        mount_point: bench.path("mnt with blank"),
        identity: PoolIdentity { pool: uid(bench, pool), name: "fast".into(), node: "n1".into() },
        headroom_percent: 5,
    }
}

#[test]
fn an_area_is_made_once_taken_over_and_not_shared() {
    let Some(bench) = Bench::new("an_area_is_made_once") else { return };
    let config = config(&bench, "u1");
    let area = PoolArea::open_or_create(&config).unwrap();
    assert_eq!((&area.root, area.size, &area.advisory), (&config.mount_point, SIZE, &None));
    assert!(area.total < SIZE && area.total > Bytes::mib(150), "{}", area.total);
    assert!(area.free().unwrap() > area.total);
    let info = mounts::is_mounted(&area.root).unwrap().unwrap();
    assert_eq!(info.fs_type, "xfs");
    assert!(["nosuid", "nodev", "noatime"].iter().all(|option| info.has_option(option)), "{}", info.options);
    fs::write(area.root.join("kept"), noise(1, 4 << 20)).unwrap();

    let again = PoolArea::open_or_create(&config).unwrap();
    assert_eq!((again.device(), again.total), (area.device(), area.total), "taken over as it is");
    assert_eq!(bench.left().0.len(), 1, "mounted once");

    let error = PoolArea::open_or_create(&self::config(&bench, "u2")).unwrap_err();
    assert!(matches!(&error, ClaimError::InUseByPool { pool, .. } if *pool == uid(&bench, "u1")), "{error}");

    area.unmount_and_detach().unwrap();
    area.unmount_and_detach().unwrap();
    assert_eq!(bench.left(), (vec![], vec![]));
    let back = PoolArea::open_or_create(&config).unwrap();
    assert_eq!(back.total, area.total, "the total does not depend on what is stored");
    assert_eq!(fs::read(back.root.join("kept")).unwrap(), noise(1, 4 << 20));
    back.destroy().unwrap();
    assert_eq!(fs::read_dir(&config.dir).unwrap().count(), 0);
}

#[test]
fn a_crash_between_any_two_steps_is_gone_over() {
    let Some(bench) = Bench::new("a_crash_between_any_two_steps") else { return };
    let config = config(&bench, "u1");
    let image = config.dir.join("berth-pool.xfs");
    let claim = config.dir.join("berth-pool.json");
    let area = PoolArea::open_or_create(&config).unwrap();
    let total = area.total;
    area.unmount_and_detach().unwrap();
    let made = fs::read_to_string(&claim).unwrap();
    let creating: String = made.lines().filter(|line| !line.contains("emptyFree")).collect();
    let creating = creating.replace("\"image\",", "\"creating\"");

    // Claimed, the image made and named, and the claim not yet updated.
    fs::write(&claim, &creating).unwrap();
    let area = PoolArea::open_or_create(&config).unwrap();
    assert_eq!(area.total, total);
    area.unmount_and_detach().unwrap();

    // Attached and not mounted.
    let device =
        loop_device::attach(&image, LoopOptions { direct_io: true, ..LoopOptions::default() }).unwrap();
    let area = PoolArea::open_or_create(&config).unwrap();
    assert_eq!(area.device(), Some(&device), "no second device");
    area.unmount_and_detach().unwrap();

    // A part of its space was given away by someone.
    let device = loop_device::attach(&image, LoopOptions::default()).unwrap();
    mounts::mount_device(&device.path, &config.mount_point, FsType::Xfs, MountOptions::default()).unwrap();
    assert!(trim(&config.mount_point));
    mounts::unmount(&config.mount_point).unwrap();
    loop_device::detach(&device).unwrap();
    assert!(allocated_bytes(&image).unwrap() < Bytes::mib(100));
    let area = PoolArea::open_or_create(&config).unwrap();
    assert!(allocated_bytes(&image).unwrap() >= SIZE && area.advisory.is_none());
    area.unmount_and_detach().unwrap();

    // Claimed, and the image half made under its temporary name.
    fs::remove_file(&image).unwrap();
    fs::write(&claim, &creating).unwrap();
    fs::write(config.dir.join("berth-pool.xfs.partial"), b"half").unwrap();
    let area = PoolArea::open_or_create(&config).unwrap();
    assert_eq!(area.total, total);
    assert!(!config.dir.join("berth-pool.xfs.partial").exists());
    area.destroy().unwrap();
}

#[test]
fn nothing_else_is_mounted_over_or_as_the_area() {
    let Some(bench) = Bench::new("nothing_else_is_mounted") else { return };
    let config = config(&bench, "u1");
    let area = PoolArea::open_or_create(&config).unwrap();
    area.unmount_and_detach().unwrap();

    fs::create_dir_all(bench.path("other")).unwrap();
    mounts::bind_mount(&bench.path("other"), &config.mount_point, false).unwrap();
    let error = PoolArea::open_or_create(&config).unwrap_err();
    assert!(matches!(error, ClaimError::Mount(MountError::Occupied { .. })), "{error}");
    assert!(bench.left().1.is_empty(), "the device attached for the attempt is gone");
    mounts::unmount(&config.mount_point).unwrap();

    let image = config.dir.join("berth-pool.xfs");
    File::options().write(true).open(&image).unwrap().write_all_at(&[0xEE; 16], 32).unwrap();
    assert!(matches!(PoolArea::open_or_create(&config), Err(ClaimError::ForeignImage { .. })));
    fs::remove_file(&image).unwrap();
    assert!(matches!(PoolArea::open_or_create(&config), Err(ClaimError::ImageLost { .. })));
}

#[test]
fn a44_a_full_pool_is_full_inside_and_its_space_is_its_own() {
    let Some(bench) = Bench::new("a_full_pool_is_full_inside") else { return };
    let config = config(&bench, "u1");
    let area = PoolArea::open_or_create(&config).unwrap();
    let image = config.dir.join("berth-pool.xfs");
    let before = allocated_bytes(&image).unwrap();
    assert!(before >= SIZE, "all of it is allocated: {before}");

    let path = area.root.join("fill");
    let mut file = File::create(&path).unwrap();
    let block = noise(2, 1 << 20);
    let mut written = 0_u64;
    let error = loop {
        match file.write_all(&block).and_then(|()| file.sync_data()) {
            Ok(()) => written += 1 << 20,
            Err(error) => break error,
        }
        assert!(written <= SIZE.0, "more than the pool holds");
    };
    assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
    assert!(Bytes(written) >= area.total, "what may be promised fits: {} of {}", Bytes(written), area.total);
    assert!(
        allocated_bytes(&image).unwrap() <= before.saturating_add(Bytes::mib(1)),
        "the host gave nothing more"
    );
    fs::write(bench.path("beside"), b"the host still has space").unwrap();

    drop(file);
    fs::remove_file(&path).unwrap();
    sync_file_and_parent(&File::open(&area.root).unwrap(), &area.root).unwrap();
    assert!(!trim(&area.root));
    assert!(allocated_bytes(&image).unwrap() >= before, "no discard gives the pool's space away");
    area.destroy().unwrap();
}

/// Discards all free space of a mounted file system, as hosts do once a week; whether it could.
fn trim(root: &Path) -> bool {
    let program = berth_device::find_program("fstrim").expect("fstrim is part of util-linux");
    std::process::Command::new(program).arg(root).output().unwrap().status.success()
}

#[test]
fn space_of_volumes_is_given_back_and_space_of_pools_is_not() {
    let Some(bench) = Bench::new("space_of_volumes_is_given_back") else { return };
    let config = config(&bench, "u1");
    let area = PoolArea::open_or_create(&config).unwrap();
    let number = area.device().unwrap().number;
    assert!(!trim(&area.root));
    area.destroy().unwrap();

    // The same kernel device for another use: what the pool set there is gone.
    let disk = bench.path("disk");
    sparse(&disk, SIZE);
    let device = loop_device::attach(&disk, LoopOptions::default()).unwrap();
    println!("pool on loop{number}, disk on loop{}", device.number);
    tool("mkfs.xfs", &["-q", device.path.to_str().unwrap()], "");
    mounts::mount_device(&device.path, &bench.path("disk mnt"), FsType::Xfs, MountOptions::default())
        .unwrap();
    let file = bench.path("disk mnt/file");
    fs::write(&file, noise(7, 128 << 20)).unwrap();
    sync_file_and_parent(&File::open(&file).unwrap(), &file).unwrap();
    assert!(allocated_bytes(&disk).unwrap() > Bytes::mib(128));
    fs::remove_file(&file).unwrap();
    let parent = bench.path("disk mnt");
    let given_back = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(100)); // XFS frees deleted files in the background
        trim(&parent) && allocated_bytes(&disk).unwrap() < Bytes::mib(100)
    });
    assert!(given_back, "discards reach the file");
    mounts::unmount(&parent).unwrap();
    loop_device::detach(&device).unwrap();
}

#[test]
fn copies_share_their_blocks_until_they_are_written() {
    let Some(bench) = Bench::new("copies_share_their_blocks") else { return };
    let area = PoolArea::open_or_create(&config(&bench, "u1")).unwrap();
    let (template, volume) = (area.root.join("template"), area.root.join("volume"));
    let content = noise(3, 64 << 20);
    fs::write(&template, &content).unwrap();
    sync_file_and_parent(&File::open(&template).unwrap(), &template).unwrap();

    let before = area.free().unwrap();
    let copies: Vec<_> =
        (0..5).map(|n| reflink(&template, &area.root.join(format!("copy{n}"))).unwrap()).collect();
    copies[0].sync_all().unwrap();
    let taken = before.saturating_sub(area.free().unwrap());
    assert!(taken < Bytes::mib(1), "five copies of 64 MiB took {taken}");

    let clone = reflink(&template, &volume).unwrap();
    clone.write_all_at(&vec![0xAA; 1 << 20], 8 << 20).unwrap();
    punch_hole(&clone, &volume, Bytes::mib(32), Bytes::mib(1)).unwrap();
    clone.sync_all().unwrap();
    let taken = before.saturating_sub(area.free().unwrap());
    assert!(taken >= Bytes::mib(1) && taken < Bytes::mib(3), "one written MiB took {taken}");
    assert!(fs::read(&template).unwrap() == content, "the template did not change");
    let volume = fs::read(&volume).unwrap();
    assert!(volume[8 << 20..9 << 20].iter().all(|byte| *byte == 0xAA));
    assert!(volume[32 << 20..33 << 20].iter().all(|byte| *byte == 0));
    assert!(volume[..8 << 20] == content[..8 << 20] && volume[33 << 20..] == content[33 << 20..]);

    let error = reflink(&template, &bench.path("outside")).unwrap_err();
    assert!(matches!(error, berth_device::files::FileError::ReflinkUnsupported { .. }), "{error}");
    assert!(!bench.path("outside").exists());
    drop((copies, clone));
    area.destroy().unwrap();
}

#[test]
fn an_area_in_use_is_not_unmounted() {
    let Some(bench) = Bench::new("an_area_in_use_is_not_unmounted") else { return };
    let area = PoolArea::open_or_create(&config(&bench, "u1")).unwrap();
    let disk = area.root.join("disk");
    sparse(&disk, Bytes::mib(64));
    let device = loop_device::attach(&disk, LoopOptions::default()).unwrap();
    assert!(matches!(area.unmount_and_detach(), Err(ClaimError::Mount(MountError::Busy { .. }))));
    tool("mkfs.ext4", &["-q", device.path.to_str().unwrap()], "");
    mounts::mount_device(&device.path, &bench.path("disk"), FsType::Ext4, MountOptions::default()).unwrap();
    mounts::unmount(&bench.path("disk")).unwrap();
    loop_device::detach(&device).unwrap();
    area.destroy().unwrap();
}
