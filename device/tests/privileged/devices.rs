//! Loop devices, partitions, file systems and mounts.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};

use berth_core::units::Bytes;
use berth_device::filesystem::{Consent, FilesystemError, Signature, mkfs, probe_signature};
use berth_device::loop_device::{LoopError, LoopOptions, attach, detach, find};
use berth_device::mounts::{self, FsType, MountError, MountOptions};
use berth_device::partition::{Extent, PartitionError, partition_of};

use crate::{Bench, noise, sparse, tool};

const WRITABLE: LoopOptions =
    LoopOptions { read_only: false, direct_io: false, extent: None, keep_space: false };

#[test]
fn a_file_is_attached_once_and_detached_as_often_as_asked() {
    let Some(bench) = Bench::new("a_file_is_attached_once") else { return };
    let path = bench.path("disk");
    sparse(&path, Bytes::mib(16));
    let device = attach(&path, LoopOptions { direct_io: true, ..WRITABLE }).unwrap();
    assert_eq!(attach(&path, WRITABLE).unwrap(), device, "the same device is taken over");
    assert_eq!((find(&path).unwrap(), device.size().unwrap()), (vec![device.clone()], Bytes::mib(16)));
    assert!(device.direct_io, "this file system can");

    let read_only = attach(&path, LoopOptions { read_only: true, ..WRITABLE }).unwrap();
    assert_ne!(read_only.path, device.path);
    assert!(fs::write(&read_only.path, b"no").is_err());
    detach(&read_only).unwrap();

    File::options().write(true).open(&path).unwrap().set_len(32 << 20).unwrap();
    assert_eq!(device.size().unwrap(), Bytes::mib(16));
    assert_eq!(device.refresh_size().unwrap(), Bytes::mib(32));

    detach(&device).unwrap();
    detach(&device).unwrap();
    assert_eq!(find(&path).unwrap(), vec![]);
    assert_eq!(find(&bench.path("missing")).unwrap(), vec![]);
}

#[test]
fn a_device_that_was_given_to_another_file_is_left_alone() {
    let Some(bench) = Bench::new("a_device_that_was_given_to_another") else { return };
    sparse(&bench.path("mine"), Bytes::mib(1));
    sparse(&bench.path("other"), Bytes::mib(1));
    let other = attach(&bench.path("other"), WRITABLE).unwrap();
    let mut stale = attach(&bench.path("mine"), WRITABLE).unwrap();
    detach(&stale).unwrap();
    stale.path.clone_from(&other.path); // as if the number had been used again
    assert!(matches!(detach(&stale), Err(LoopError::Rebound { .. })));
    assert_eq!(find(&bench.path("other")).unwrap(), vec![other.clone()]);
    detach(&other).unwrap();
}

/// An image with these partitions, as `sfdisk` makes it.
fn partitioned(bench: &Bench, name: &str, script: &str) -> PathBuf {
    let path = bench.path(name);
    sparse(&path, Bytes::mib(64));
    tool("sfdisk", &["--quiet", path.to_str().unwrap()], script);
    path
}

fn extent(offset: u64, length: u64) -> Extent {
    Extent { offset: Bytes::mib(offset), length: Bytes::mib(length) }
}

#[test]
fn partitions_of_both_kinds_are_found() {
    let Some(bench) = Bench::new("partitions_of_both_kinds") else { return };
    let gpt = partitioned(&bench, "gpt", "label: gpt\nstart=1MiB, size=8MiB\nstart=16MiB, size=20MiB\n");
    assert_eq!(partition_of(&gpt, 1).unwrap(), extent(1, 8));
    assert_eq!(partition_of(&gpt, 2).unwrap(), extent(16, 20));
    for number in [0, 3, 128, 129, u32::MAX] {
        assert!(matches!(partition_of(&gpt, number), Err(PartitionError::Missing { .. })), "{number}");
    }
    let mbr = "label: dos\nstart=1MiB, size=4MiB\nstart=8MiB, size=40MiB, type=5\n\
               start=10MiB, size=3MiB\nstart=20MiB, size=5MiB\n";
    let mbr = partitioned(
        &bench,
        "mbr",
        &mbr.replacen("start=10", "5: start=10", 1).replacen("\nstart=20", "\n6: start=20", 1),
    );
    assert_eq!(partition_of(&mbr, 1).unwrap(), extent(1, 4));
    assert_eq!(partition_of(&mbr, 5).unwrap(), extent(10, 3));
    assert_eq!(partition_of(&mbr, 6).unwrap(), extent(20, 5));
    for number in [2, 3, 7] {
        assert!(matches!(partition_of(&mbr, number), Err(PartitionError::Missing { .. })), "{number}");
    }

    let file = File::options().write(true).open(&gpt).unwrap();
    let content = noise(4, 4096);
    file.write_all_at(&content, 16 << 20).unwrap();
    let options = LoopOptions { read_only: true, extent: Some(partition_of(&gpt, 2).unwrap()), ..WRITABLE };
    let device = attach(&gpt, options).unwrap();
    assert_eq!(device.size().unwrap(), Bytes::mib(20));
    let mut read = vec![0; 4096];
    File::open(&device.path).unwrap().read_exact_at(&mut read, 0).unwrap();
    assert!(read == content, "the device starts where the partition does");
    assert!(!Path::new(&format!("{}p1", device.path.display())).exists());
    detach(&device).unwrap();

    for at in [512 + 60, 1024 + 32] {
        let mut byte = [0];
        let file = File::options().read(true).write(true).open(&gpt).unwrap();
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        assert!(matches!(partition_of(&gpt, 1), Err(PartitionError::Damaged { .. })), "one bit at {at}");
        file.write_all_at(&byte, at).unwrap();
    }
    assert_eq!(partition_of(&gpt, 1).unwrap(), extent(1, 8));
    file.set_len(30 << 20).unwrap();
    assert!(matches!(partition_of(&gpt, 2), Err(PartitionError::Damaged { .. })), "ends beyond the image");
}

#[test]
fn the_kernel_never_looks_for_partitions() {
    let Some(bench) = Bench::new("the_kernel_never_looks_for_partitions") else { return };
    let gpt = partitioned(&bench, "gpt", "label: gpt\nstart=1MiB, size=8MiB\n");
    let device = attach(&gpt, WRITABLE).unwrap();
    let name = device.path.file_name().unwrap().to_str().unwrap().to_owned();
    assert!(!Path::new(&format!("/sys/block/{name}/{name}p1")).exists());
    assert_eq!(fs::read_to_string(format!("/sys/block/{name}/loop/partscan")).unwrap().trim(), "0");
    assert_eq!(fs::read_to_string(format!("/sys/block/{name}/loop/autoclear")).unwrap().trim(), "0");
    assert_eq!(probe_signature(&device.path).unwrap(), Some(Signature::Gpt));
    detach(&device).unwrap();
}

#[test]
fn only_blank_devices_are_formatted() {
    let Some(bench) = Bench::new("only_blank_devices_are_formatted") else { return };
    for (fs_type, signature) in [(FsType::Ext4, Signature::Ext), (FsType::Xfs, Signature::Xfs)] {
        let path = bench.path(fs_type.as_str());
        sparse(&path, Bytes::mib(320));
        let device = attach(&path, WRITABLE).unwrap();
        mkfs(&device.path, fs_type, Consent::OnlyIfBlank).unwrap();
        assert_eq!(probe_signature(&device.path).unwrap(), Some(signature));
        let target = bench.path("mnt");
        mounts::mount_device(&device.path, &target, fs_type, MountOptions::default()).unwrap();
        fs::write(target.join("precious"), b"data").unwrap();
        mounts::unmount(&target).unwrap();

        for other in [FsType::Ext4, FsType::Xfs] {
            let error = mkfs(&device.path, other, Consent::OnlyIfBlank).unwrap_err();
            assert!(matches!(error, FilesystemError::NotBlank { .. }), "{error}");
        }
        let read_only = MountOptions { read_only: true, ..MountOptions::default() };
        mounts::mount_device(&device.path, &target, fs_type, read_only).unwrap();
        assert_eq!(fs::read(target.join("precious")).unwrap(), b"data");
        assert!(fs::write(target.join("precious"), b"x").is_err());
        mounts::unmount(&target).unwrap();
        detach(&device).unwrap();
    }
}

#[test]
fn a_clone_is_mounted_beside_its_origin() {
    let Some(bench) = Bench::new("a_clone_is_mounted_beside_its_origin") else { return };
    let (origin, clone) = (bench.path("origin"), bench.path("clone"));
    sparse(&origin, Bytes::mib(320));
    mkfs(&origin, FsType::Xfs, Consent::OnlyIfBlank).unwrap();
    fs::copy(&origin, &clone).unwrap();
    let devices = [attach(&origin, WRITABLE).unwrap(), attach(&clone, WRITABLE).unwrap()];
    let options = MountOptions { duplicate_uuid: true, ..MountOptions::default() };
    let targets = [bench.path("a"), bench.path("b")];
    mounts::mount_device(&devices[0].path, &targets[0], FsType::Xfs, MountOptions::default()).unwrap();
    let refused = mounts::mount_device(&devices[1].path, &targets[1], FsType::Xfs, MountOptions::default());
    assert!(matches!(refused, Err(MountError::Kernel { action: "mount", .. })));
    mounts::mount_device(&devices[1].path, &targets[1], FsType::Xfs, options).unwrap();
    mounts::mount_device(&devices[1].path, &targets[1], FsType::Xfs, options).unwrap();
    let wrong = mounts::mount_device(&devices[0].path, &targets[1], FsType::Xfs, options);
    assert!(matches!(wrong, Err(MountError::Occupied { .. })));
    for (target, device) in targets.iter().zip(&devices) {
        mounts::unmount(target).unwrap();
        detach(device).unwrap();
    }
}

#[test]
fn files_directories_and_nodes_are_bound() {
    let Some(bench) = Bench::new("files_directories_and_nodes_are_bound") else { return };
    let (file, dir, disk) = (bench.path("file"), bench.path("dir"), bench.path("disk"));
    fs::write(&file, b"content").unwrap();
    fs::create_dir(&dir).unwrap();
    sparse(&disk, Bytes::mib(1));
    let device = attach(&disk, WRITABLE).unwrap();
    let place = bench.path("pod\twith tab/volume");

    for source in [&file, &dir, &device.path] {
        mounts::bind_mount(source, &place, false).unwrap();
        mounts::bind_mount(source, &place, false).unwrap();
        assert_eq!(bench.left().0, vec![mounts::is_mounted(&place).unwrap().unwrap().mount_point], "once");
        assert!(matches!(
            mounts::bind_mount(&bench.path("pod\twith tab"), &place, false),
            Err(MountError::Occupied { .. })
        ));
        mounts::unmount(&place).unwrap();
        mounts::unmount(&place).unwrap();
        if source.is_dir() { fs::remove_dir(&place).unwrap() } else { fs::remove_file(&place).unwrap() }
    }

    mounts::bind_mount(&device.path, &place, false).unwrap();
    assert!(fs::metadata(&place).unwrap().file_type().is_block_device());
    let content = noise(5, 4096);
    let node = File::options().write(true).open(&place).unwrap();
    node.write_all_at(&content, 0).unwrap();
    node.sync_all().unwrap();
    drop(node);
    assert!(fs::read(&disk).unwrap()[..4096] == content);
    mounts::unmount(&place).unwrap();
    fs::remove_file(&place).unwrap();

    mounts::bind_mount(&file, &place, true).unwrap();
    assert_eq!(fs::read(&place).unwrap(), b"content");
    assert!(fs::write(&place, b"no").is_err());
    assert!(fs::write(&file, b"yes").is_ok());
    mounts::unmount(&place).unwrap();
    detach(&device).unwrap();
}
