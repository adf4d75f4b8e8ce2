//! Templates in the record of a pool.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

use berth_core::ids::{NodeName, PoolName, Uid};
use berth_core::units::Bytes;
use berth_record::{ChangeError, PoolIdentity, PoolRecord, TemplateEntry, TemplateState, VolumeEntry};
use tempfile::TempDir;

fn record() -> (TempDir, PoolRecord) {
    let dir = tempfile::tempdir().unwrap();
    let identity = PoolIdentity {
        pool_uid: Uid::from("pool-1"),
        pool_name: PoolName::from("fast"),
        node: NodeName::from("n1"),
        pool_id: "area-1".into(),
        area: None,
        made_of: None,
    };
    let record = PoolRecord::create(&dir.path().join("record"), identity).unwrap();
    (dir, record)
}

/// A volume as it is saved.
fn volume_of(template: &Uid) -> VolumeEntry {
    let entry = serde_json::json!({
        "generation": 1, "path": "volumes/v", "size": 1 << 20, "origin": {"template": template}, "state": "Creating", "labels": {},
    });
    serde_json::from_value(entry).unwrap()
}

#[test]
fn a_template_goes_from_intent_to_device_and_back() {
    let (_dir, pool) = record();
    let uid = Uid::from("t1");
    let wanted = TemplateEntry {
        file: "/srv/image.qcow2".into(),
        format: "qcow2".into(),
        virtual_size: Bytes::gib(1),
        state: TemplateState::Attached,
    };
    assert_eq!(pool.begin_template(&uid, &wanted).unwrap().state, TemplateState::Attaching);
    pool.template_attached(&uid).unwrap();
    let other = TemplateEntry { file: "/srv/other".into(), ..wanted.clone() };
    assert_eq!(pool.begin_template(&uid, &other).unwrap(), wanted, "as it is");
    pool.forget_template(&uid).unwrap_err();
    assert_eq!(pool.begin_detach_template(&uid).unwrap().unwrap().state, TemplateState::Detaching);
    pool.begin_template(&uid, &wanted).expect_err("it is being detached");
    pool.template_attached(&uid).expect("its device is in use");
    assert!(pool.begin_detach_template(&uid).unwrap().is_some());
    pool.forget_template(&uid).unwrap();
    pool.forget_template(&uid).expect("the same again");
    assert_eq!(pool.begin_detach_template(&uid).unwrap(), None);
}

#[test]
fn a_template_that_a_volume_starts_from_stays() {
    let (_dir, pool) = record();
    let (uid, volume) = (Uid::from("t1"), Uid::from("v1"));
    let template = TemplateEntry {
        file: "/srv/image.raw".into(),
        format: "raw".into(),
        virtual_size: Bytes::mib(1),
        state: TemplateState::Attaching,
    };
    pool.begin_template(&uid, &template).unwrap();
    pool.begin_volume(&volume, &volume_of(&uid)).expect_err("it has no device yet");
    pool.template_attached(&uid).unwrap();
    pool.begin_volume(&volume, &volume_of(&uid)).unwrap();
    assert!(matches!(pool.begin_detach_template(&uid), Err(ChangeError::State { .. })));
    assert_eq!(pool.volumes_of_template(&uid).unwrap(), std::slice::from_ref(&volume));
    assert_eq!(pool.volumes_of_template(&Uid::from("t2")).unwrap(), []);
    pool.begin_delete_volume(&volume).unwrap();
    pool.begin_detach_template(&uid).expect_err("until it is gone");
    pool.forget_volume(&volume).unwrap();
    assert!(pool.begin_detach_template(&uid).unwrap().is_some());
}
