//! What belongs to others: devices in use, volumes with names like ours.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use berth_core::ledger::Class;
use berth_core::reason::Reason;
use berth_core::thin::Part;
use berth_core::units::Bytes;
use berth_device::find_program;
use berth_device::thin::{
    KernelPool, KernelPoolError, Scope, VolumeGroup, VolumeGroupError, WhenFull, WipeConsent, volume_name,
};

use super::{Bench, GROUP, POOL, config, fill, lvm, read_block, run, uid, zero_start};

/// Why a group cannot be made on a device, though its wiping was agreed to.
fn in_use_by(device: &Path) -> String {
    let devices = [device.to_owned()];
    let consent = WipeConsent::for_devices(devices.clone());
    let error = VolumeGroup::create(GROUP, &uid(POOL), &devices, Some(&consent)).unwrap_err();
    assert_eq!(error.reason(), Reason::DeviceInUse, "{error}");
    match error {
        VolumeGroupError::DeviceInUse { by, .. } => by.join("; "),
        other => panic!("{other}"),
    }
}

#[test]
fn a_device_in_use_is_never_taken_and_its_user_is_named() {
    let Some(bench) = Bench::new("a_device_in_use_is_never_taken_and_its_user_is_named") else { return };
    let small = bench.small.to_str().unwrap();
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mount = dir.path().to_str().unwrap();
    run("mkfs.ext4", &["-q", "-F", small]);
    run("mount", &[small, mount]);
    std::fs::write(dir.path().join("file"), "kept").unwrap();
    assert_eq!(in_use_by(&bench.small), format!("mounted on {mount}"));
    assert_eq!(std::fs::read_to_string(dir.path().join("file")).unwrap(), "kept");
    run("umount", &[mount]);
    run("e2fsck", &["-f", "-n", small]);

    run("mkswap", &["-f", small]);
    run("swapon", &[small]);
    assert_eq!(in_use_by(&bench.small), "used as swap");
    run("swapoff", &[small]);

    zero_start(&bench.small).unwrap();
    lvm(&["vgcreate", "--yes", "foreign", small]);
    lvm(&["lvcreate", "--yes", "-Wn", "-n", "theirs", "-L", "8m", "foreign"]);
    assert_eq!(in_use_by(&bench.small), "part of foreign-theirs");
    lvm(&["vgremove", "--yes", "foreign"]);
    lvm(&["pvremove", "--yes", small]);

    if find_program("mdadm").is_some() {
        run("modprobe", &["raid1"]);
        let new = ["--create", "/dev/md5", "--run", "--level=1", "--raid-devices=2", "--metadata=1.2", small];
        run("mdadm", &[&new[..], &["missing"]].concat());
        assert_eq!(in_use_by(&bench.small), "part of md5");
        run("mdadm", &["--stop", "/dev/md5"]);
    } else {
        println!("no mdadm: a member of an array was not tried");
    }
    zero_start(&bench.small).unwrap();
}

#[test]
fn a_volume_of_others_with_our_name_is_left_alone() {
    let Some(bench) = Bench::new("a_volume_of_others_with_our_name_is_left_alone") else { return };
    let large = bench.large.to_str().unwrap();
    zero_start(&bench.large).unwrap();
    lvm(&["vgcreate", "--yes", "foreign", large]);
    let names =
        [Part::Data, Part::Metadata].map(|part| volume_name(&uid(POOL), Class::Volumes, part).unwrap());
    for (name, tag) in names.iter().zip(["theirs", "berthed"]) {
        lvm(&["lvcreate", "--yes", "-Wn", "-n", name, "--addtag", tag, "-L", "8m", "foreign"]);
        fill(Path::new(&format!("/dev/foreign/{name}")), 0, 4, 7).unwrap();
    }
    let look = || {
        lvm(&[
            "lvs",
            "--noheadings",
            "-o",
            "lv_name,lv_uuid,lv_size,lv_tags,lv_active,seg_pe_ranges",
            "foreign",
        ])
    };
    let before = look();
    let group = VolumeGroup::open_shared("foreign", &Scope::AllBut(Vec::new())).unwrap();
    let config = config(Class::Volumes, WhenFull::Queue);
    let refused = [
        KernelPool::provision(&config, &group, Bytes::mib(64), Bytes::mib(4)),
        KernelPool::open(&config, &group).map(drop),
        KernelPool::destroy(&config, &group),
    ];
    for refused in refused {
        let error = refused.unwrap_err();
        assert!(matches!(error, KernelPoolError::Group(VolumeGroupError::Foreign { .. })), "{error}");
        assert_eq!(error.reason(), Reason::ForeignVolume);
    }
    assert_eq!(look(), before);
    for name in &names {
        assert_eq!(read_block(Path::new(&format!("/dev/foreign/{name}")), 3), 7);
    }
    lvm(&["vgremove", "--yes", "foreign"]);
    lvm(&["pvremove", "--yes", large]);
}

#[test]
fn a_group_whose_header_is_wiped_is_gone() {
    let Some(bench) = Bench::new("a_group_whose_header_is_wiped_is_gone") else { return };
    let group = bench.group();
    group.create_volume("mine", Bytes::mib(8)).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&bench.large).unwrap();
    let mut header = vec![0; 4096];
    file.read_exact_at(&mut header, 0).unwrap();
    file.write_all_at(&[0; 4096], 0).unwrap();
    file.sync_all().unwrap();
    let open = || VolumeGroup::open_own(GROUP, &uid(POOL), std::slice::from_ref(&bench.large));
    let error = open().unwrap_err();
    assert!(matches!(error, VolumeGroupError::NoGroup { .. }), "{error}");
    assert_eq!(error.reason(), Reason::PoolAreaGone);
    let error = group.create_volume("other", Bytes::mib(8)).unwrap_err();
    assert_eq!(error.reason(), Reason::PoolAreaGone, "{error}");
    file.write_all_at(&header, 0).unwrap();
    file.sync_all().unwrap();
    let group = open().expect("what was restored is there");
    assert!(group.find("mine").unwrap().is_some() && group.find("other").unwrap().is_none());
    group.remove_volume("mine").unwrap();
    group.remove().unwrap();
}
