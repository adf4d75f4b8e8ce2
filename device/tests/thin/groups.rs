//! Volume groups of our own and of others.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;

use berth_core::ledger::Class;
use berth_core::thin::Part;
use berth_core::units::Bytes;
use berth_device::filesystem::Signature;
use berth_device::thin::{
    KernelPool, LogicalVolume, Scope, VolumeGroup, VolumeGroupError, WhenFull, WipeConsent,
    parse_volume_name, volume_name,
};

use super::{Bench, GROUP, POOL, config, fill, holder, lvm, open_pool, read_block, run, uid, zero_start};

#[test]
fn devices_with_anything_on_them_need_consent_by_name() {
    let Some(bench) = Bench::new("devices_with_anything_on_them_need_consent_by_name") else { return };
    let devices = [bench.small.clone(), bench.large.clone()];
    let create = |consent: Option<&WipeConsent>| VolumeGroup::create(GROUP, &uid(POOL), &devices, consent);
    for device in &devices {
        zero_start(device).unwrap();
    }
    run("mkfs.ext4", &["-q", "-F", bench.small.to_str().unwrap()]);
    let found = |error| match error {
        VolumeGroupError::NotBlank { found } => found,
        other => panic!("{other}"),
    };
    let ext = vec![(bench.small.clone(), Signature::Ext)];
    assert_eq!(found(create(None).unwrap_err()), ext);
    let other = WipeConsent::for_devices([bench.large.clone()]);
    assert_eq!(found(create(Some(&other)).unwrap_err()), ext);
    assert!(run("blkid", &["-p", bench.small.to_str().unwrap()]).contains("ext4"), "nothing was written");

    let consent = WipeConsent::for_devices([bench.small.clone()]);
    let user = OpenOptions::new().read(true).custom_flags(nix::libc::O_EXCL).open(&bench.small).unwrap();
    let error = create(Some(&consent)).unwrap_err();
    assert!(matches!(error, VolumeGroupError::DeviceInUse { .. }), "{error}");
    drop(user);
    let group = create(Some(&consent)).unwrap();
    assert_eq!(group.devices().len(), 2);
    assert!(group.space().unwrap().free > Bytes::gib(1).percent(90));

    let stranger = VolumeGroup::open_own(GROUP, &holder(9), &devices).unwrap_err();
    assert!(matches!(stranger, VolumeGroupError::NotOurs { .. }), "{stranger}");
    let part = VolumeGroup::open_own(GROUP, &uid(POOL), &devices[1..]).unwrap_err();
    assert!(matches!(part, VolumeGroupError::Incomplete { .. } | VolumeGroupError::Run { .. }), "{part}");
    let absent = VolumeGroup::open_own("other", &uid(POOL), &devices).unwrap_err();
    assert!(matches!(absent, VolumeGroupError::NoGroup { .. }), "{absent}");
    let again = VolumeGroup::open_own(GROUP, &uid(POOL), &devices).unwrap();
    again.create_volume("mine", Bytes::mib(5)).unwrap();
    let error = again.clone().remove().unwrap_err();
    assert!(matches!(&error, VolumeGroupError::NotEmpty { volumes, .. } if volumes == "mine"), "{error}");
    again.remove_volume("mine").unwrap();
    again.remove_volume("mine").unwrap();
    again.remove().unwrap();
    for device in &devices {
        assert_eq!(
            berth_device::filesystem::probe_signature(device).unwrap().filter(|s| *s == Signature::Lvm),
            None
        );
    }
}

#[test]
fn volumes_of_a_group_are_bounded_and_marked() {
    let Some(bench) = Bench::new("volumes_of_a_group_are_bounded_and_marked") else { return };
    let group = bench.group();
    let volume = group.create_volume("one", Bytes::mib(5)).unwrap();
    assert!(volume.is_ours() && volume.is_new() && !volume.active);
    assert_eq!(volume.size, Bytes::mib(8), "whole extents");
    let active = group.activate("one").unwrap();
    assert!(active.active && active.path.exists());
    group.mark_used("one").unwrap();
    assert!(!group.find("one").unwrap().unwrap().is_new());
    assert_eq!(group.extend_to("one", Bytes::mib(20)).unwrap().size, Bytes::mib(20));
    assert_eq!(group.extend_to("one", Bytes::mib(1)).unwrap().size, Bytes::mib(20), "never smaller");
    let error = group.create_volume("two", Bytes::gib(2)).unwrap_err();
    assert!(matches!(error, VolumeGroupError::NoSpace { .. }), "{error}");
    group.deactivate("one").unwrap();
    assert!(!active.path.exists());
    group.remove_volume("one").unwrap();
    group.remove().unwrap();
}

#[test]
fn what_others_have_in_a_shared_group_stays_untouched() {
    let Some(bench) = Bench::new("what_others_have_in_a_shared_group_stays_untouched") else { return };
    let large = bench.large.to_str().unwrap();
    zero_start(&bench.large).unwrap();
    lvm(&["vgcreate", "--yes", "foreign", large]);
    lvm(&["lvcreate", "--yes", "-Wn", "-n", "theirs", "-L", "32m", "foreign"]);
    fill("/dev/foreign/theirs".as_ref(), 0, 4, 7).unwrap();
    let before = lvm(&[
        "lvs",
        "--noheadings",
        "-o",
        "lv_uuid,lv_size,lv_tags,lv_active,seg_pe_ranges",
        "foreign/theirs",
    ]);

    let group = VolumeGroup::open_shared("foreign", &Scope::AllBut(vec![bench.small.clone()])).unwrap();
    assert_eq!(group.devices(), std::slice::from_ref(&bench.large));
    let hidden = VolumeGroup::open_shared("foreign", &Scope::AllBut(vec![bench.large.clone()])).unwrap_err();
    assert!(matches!(hidden, VolumeGroupError::NoGroup { .. }), "{hidden}");
    let pool = open_pool(&group, Class::Volumes, Bytes::mib(64));
    let config = config(Class::Volumes, WhenFull::Queue);
    pool.create_thin(super::id(1)).unwrap();
    let ours = volume_name(&uid(POOL), Class::Volumes, Part::Data).unwrap();
    let listed: Vec<_> =
        group.volumes().unwrap().into_iter().filter(LogicalVolume::is_ours).map(|v| v.name).collect();
    assert_eq!((listed.len(), listed.contains(&ours)), (2, true), "{listed:?}");
    assert!(listed.iter().all(|name| parse_volume_name(name).is_some()));
    let foreign = |result: Result<(), VolumeGroupError>| {
        assert!(matches!(result, Err(VolumeGroupError::Foreign { .. })), "{result:?}");
    };
    foreign(group.remove_volume("theirs"));
    foreign(group.deactivate("theirs"));
    foreign(group.mark_used("theirs"));
    foreign(group.extend_to("theirs", Bytes::mib(64)).map(drop));
    foreign(group.create_volume("theirs", Bytes::mib(8)).map(drop));
    let removed = group.clone().remove();
    assert!(matches!(removed, Err(VolumeGroupError::NotOurs { .. })), "{removed:?}");
    pool.close(&group).unwrap();
    KernelPool::destroy(&config, &group).unwrap();

    let after = lvm(&[
        "lvs",
        "--noheadings",
        "-o",
        "lv_uuid,lv_size,lv_tags,lv_active,seg_pe_ranges",
        "foreign/theirs",
    ]);
    assert_eq!(before, after);
    assert_eq!(
        (read_block("/dev/foreign/theirs".as_ref(), 0), read_block("/dev/foreign/theirs".as_ref(), 3)),
        (7, 7)
    );
    lvm(&["vgremove", "--yes", "foreign"]);
    lvm(&["pvremove", "--yes", large]);
}
