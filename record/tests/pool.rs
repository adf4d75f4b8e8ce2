//! What the record of a pool allows, in which order.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

use std::collections::BTreeMap;

use berth_core::ids::{Digest, NodeName, PoolName, Sha256Sum, Uid};
use berth_core::units::{Bytes, Generation, Timestamp};
use berth_record::{
    Attachment, AttachmentMode, ChangeError, Holder, ImageState, JobEntry, LedgerPosition, LocalState,
    NodeRecord, PoolIdentity, PoolRecord, PromiseClass, PromiseEntry, StagingEntry, ThinState, VolumeEntry,
    VolumeKind, VolumeState, tables,
};
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

fn volume(generation: u64) -> VolumeEntry {
    VolumeEntry {
        generation: Generation(generation),
        path: "volumes/v".into(),
        size: Bytes::gib(1),
        origin: None,
        kind: VolumeKind::Volume,
        source: None,
        state: VolumeState::Ready,
        labels: BTreeMap::new(),
    }
}

fn attachment() -> Attachment {
    Attachment {
        loop_device: None,
        backing_file: "volumes/v".into(),
        staged_path: "/staged".into(),
        mode: AttachmentMode::Block,
    }
}

#[test]
fn promises_are_obeyed_released_forgotten() {
    let (_dir, record) = record();
    let uid = Uid::from("u");
    let promise = PromiseEntry {
        generation: Generation(2),
        class: PromiseClass::Images,
        data: Bytes::gib(1),
        metadata: Bytes::mib(1),
        holder: Holder { kind: "StagedImage".into(), namespace: String::new(), name: "i".into() },
        obeyed: false,
        released: false,
    };
    assert_eq!(record.ledger_position().unwrap(), LedgerPosition::default());
    let position =
        LedgerPosition { lineage: Some("l".into()), obeyed_revision: 7, ..LedgerPosition::default() };
    record.obey(&position, &[(uid.clone(), promise.clone())]).unwrap();
    assert_eq!(record.ledger_position().unwrap(), position);
    assert!(record.record().get(tables::PROMISES, &uid).unwrap().unwrap().obeyed);

    let late = LedgerPosition { obeyed_revision: 8, ..position.clone() };
    let older = PromiseEntry { generation: Generation(1), ..promise.clone() };
    assert!(matches!(record.obey(&late, &[(uid.clone(), older)]), Err(ChangeError::StaleGeneration { .. })));
    assert_eq!(record.ledger_position().unwrap(), position, "a refused ledger moved the position");
    assert!(matches!(record.forget_promise(&uid), Err(ChangeError::State { .. })));
    assert!(matches!(record.promise_released(&uid, Generation(1)), Err(ChangeError::StaleGeneration { .. })));
    for _ in 0..2 {
        record.promise_released(&uid, Generation(2)).unwrap();
    }
    record.forget_promise(&uid).unwrap();
    record.forget_promise(&uid).unwrap();
    assert!(matches!(record.promise_released(&uid, Generation(2)), Err(ChangeError::Missing { .. })));
}

/// A record that obeys one promise, to `u`.
fn promised() -> (TempDir, PoolRecord, Uid) {
    let (dir, record) = record();
    let uid = Uid::from("u");
    let promise = PromiseEntry {
        generation: Generation(1),
        class: PromiseClass::Volumes,
        data: Bytes::gib(1),
        metadata: Bytes::ZERO,
        holder: Holder { kind: "StagingReservation".into(), namespace: "ns".into(), name: "r".into() },
        obeyed: true,
        released: false,
    };
    let position =
        LedgerPosition { lineage: Some("l".into()), obeyed_revision: 1, ..LedgerPosition::default() };
    record.obey(&position, &[(uid.clone(), promise)]).unwrap();
    (dir, record, uid)
}

#[test]
fn a_promise_is_not_released_while_anything_is_recorded_under_it_and_nothing_begins_after() {
    let (_dir, record, uid) = promised();
    let digest = Digest(Sha256Sum::of(b"image"));
    let staging = StagingEntry { generation: Generation(1), dir: "staging/u".into(), bytes: Bytes::gib(1) };
    let released = || record.promise_released(&uid, Generation(1));
    let refused = |what: &str| match released() {
        Err(ChangeError::State { state, .. }) => assert!(state.ends_with(what), "{state}"),
        other => panic!("{what}: {other:?}"),
    };
    let fill = || record.begin_fill(&digest, &uid, Bytes::gib(4), Bytes::gib(1), Timestamp(1));

    record.begin_volume(&uid, &volume(1)).unwrap();
    refused("of a volume");
    record.volume_ready(&uid, Generation(1)).unwrap();
    record.attach(&uid, &attachment()).unwrap();
    refused("of an attached volume");
    assert!(record.begin_delete_volume(&uid).is_err(), "one that is attached");
    record.detached(&uid, Timestamp(9)).unwrap();
    record.begin_delete_volume(&uid).unwrap();
    refused("of a volume");
    record.forget_volume(&uid).unwrap();
    record.begin_staging(&uid, &staging).unwrap();
    refused("of a work directory");
    record.forget_staging(&uid).unwrap();
    fill().unwrap();
    refused("of an image");
    record.forget_image(&digest).unwrap();

    released().unwrap();
    assert!(matches!(record.begin_volume(&uid, &volume(1)), Err(ChangeError::State { .. })));
    assert!(matches!(record.begin_staging(&uid, &staging), Err(ChangeError::State { .. })));
    assert!(matches!(fill(), Err(ChangeError::State { .. })));
    released().unwrap();
}

#[test]
fn volumes_move_forward_only() {
    let (_dir, record) = record();
    let uid = Uid::from("v");
    assert_eq!(record.begin_volume(&uid, &volume(1)).unwrap().state, VolumeState::Creating);
    assert!(matches!(record.attach(&uid, &attachment()), Err(ChangeError::State { .. })));
    assert_eq!(record.begin_volume(&uid, &volume(2)).unwrap().generation, Generation(2));
    assert!(matches!(record.begin_volume(&uid, &volume(1)), Err(ChangeError::StaleGeneration { .. })));
    assert!(matches!(record.volume_ready(&uid, Generation(1)), Err(ChangeError::StaleGeneration { .. })));
    record.volume_ready(&uid, Generation(2)).unwrap();
    assert_eq!(record.begin_volume(&uid, &volume(2)).unwrap().state, VolumeState::Ready);
    assert!(matches!(record.volume_resized(&uid, Bytes::mib(1)), Err(ChangeError::State { .. })));
    record.volume_resized(&uid, Bytes::gib(2)).unwrap();

    record.attach(&uid, &attachment()).unwrap();
    assert!(matches!(record.begin_delete_volume(&uid), Err(ChangeError::State { .. })));
    assert!(record.detached(&uid, Timestamp(7)).unwrap() && !record.detached(&uid, Timestamp(9)).unwrap());
    assert_eq!(record.last_used(&uid).unwrap(), Some(Timestamp(7)), "the end of its use");
    assert!(matches!(record.forget_volume(&uid), Err(ChangeError::State { .. })));
    assert!(record.begin_delete_volume(&uid).unwrap());
    assert!(matches!(record.begin_volume(&uid, &volume(3)), Err(ChangeError::State { .. })));
    assert!(matches!(record.volume_ready(&uid, Generation(3)), Err(ChangeError::State { .. })));
    record.forget_volume(&uid).unwrap();
    assert_eq!(record.last_used(&uid).unwrap(), None);
    assert!(!record.begin_delete_volume(&uid).unwrap());
}

#[test]
fn images_resume_where_they_were() {
    let (_dir, record) = record();
    let digest = Digest(Sha256Sum::of(b"image"));
    let holder = Uid::from("h");
    let begin = |now| record.begin_fill(&digest, &holder, Bytes::gib(4), Bytes::gib(1), Timestamp(now));
    assert_eq!(begin(1).unwrap().state, ImageState::Filling { offset: Bytes::ZERO });
    record.fill_progress(&digest, &holder, Bytes::mib(32)).unwrap();
    assert_eq!(begin(2).unwrap().state, ImageState::Filling { offset: Bytes::mib(32) });
    let late = Uid::from("late");
    assert!(matches!(record.fill_progress(&digest, &late, Bytes::mib(64)), Err(ChangeError::State { .. })));
    assert!(matches!(record.fill_complete(&digest, &late), Err(ChangeError::State { .. })));
    record.fill_complete(&digest, &holder).unwrap();
    assert!(matches!(record.fill_progress(&digest, &holder, Bytes::mib(1)), Err(ChangeError::State { .. })));
    assert!(matches!(record.forget_image(&digest), Err(ChangeError::State { .. })));
    record.image_used(&digest, Timestamp(9)).unwrap();
    record.image_used(&digest, Timestamp(3)).unwrap();
    let image = record.record().get(tables::IMAGES, &digest).unwrap().unwrap();
    assert_eq!((image.state, image.last_used), (ImageState::Complete, Timestamp(9)));
    record.begin_evict(&digest).unwrap();
    record.forget_image(&digest).unwrap();
    assert!(record.record().entries(tables::IMAGES).unwrap().is_empty());
}

#[test]
fn an_image_that_is_shown_is_local_only_once_that_is_said_and_is_given_up_before_it_is_forgotten() {
    let (_dir, record) = record();
    let digest = Digest(Sha256Sum::of(b"image"));
    let holder = Uid::from("h");
    let begin = |record: &PoolRecord| {
        record.begin_fill(&digest, &holder, Bytes::gib(4), Bytes::gib(1), Timestamp(1)).unwrap().state
    };
    let refused = |change: Result<(), ChangeError>| matches!(change, Err(ChangeError::State { .. }));
    begin(&record);
    assert!(refused(record.image_local(&digest, LocalState::Begun)), "it is not shown");
    record.fill_progress(&digest, &holder, Bytes::mib(32)).unwrap();
    assert!(refused(record.begin_show(&digest, Bytes::kib(64))), "a part of it is here, in another way");
    record.begin_evict(&digest).unwrap();
    for _ in 0..2 {
        record.begin_show(&digest, Bytes::kib(64)).unwrap();
    }
    assert!(refused(record.begin_show(&digest, Bytes::kib(128))), "its regions never change");
    assert!(refused(record.fill_progress(&digest, &holder, Bytes::mib(32))));
    assert!(refused(record.fill_complete(&digest, &holder)));
    for (local, complete) in [(LocalState::New, false), (LocalState::Begun, false), (LocalState::Local, true)]
    {
        record.image_local(&digest, local).unwrap();
        let state = begin(&record);
        assert_eq!(state, ImageState::Shown { region: Bytes::kib(64), local }, "it stays as it is");
        assert_eq!(state.is_complete(), complete);
        assert!(refused(record.forget_image(&digest)));
    }
    record.begin_evict(&digest).unwrap();
    assert_eq!(begin(&record), ImageState::Filling { offset: Bytes::ZERO }, "nothing of it counts any more");
    record.forget_image(&digest).unwrap();
}

#[test]
fn staging_and_jobs_refuse_late_writers() {
    let (dir, record) = record();
    let uid = Uid::from("r");
    let staging =
        |g| StagingEntry { generation: Generation(g), dir: "staging/r".into(), bytes: Bytes::gib(1) };
    record.begin_staging(&uid, &staging(2)).unwrap();
    assert!(matches!(record.begin_staging(&uid, &staging(1)), Err(ChangeError::StaleGeneration { .. })));
    assert!(record.forget_staging(&uid).unwrap());

    let node = NodeRecord::create(&dir.path().join("node"), &NodeName::from("n1")).unwrap();
    let job = |g: u64| JobEntry {
        generation: Generation(g),
        kind: "TemplateImport".into(),
        stage: "Upload".into(),
        payload: serde_json::json!({"offset": g}),
        updated: Timestamp(g),
    };
    node.checkpoint(&uid, &job(2)).unwrap();
    assert!(matches!(node.checkpoint(&uid, &job(1)), Err(ChangeError::StaleGeneration { .. })));
    node.checkpoint(&uid, &job(3)).unwrap();
    assert_eq!(node.job(&uid).unwrap(), Some(job(3)));
    assert!(node.forget_job(&uid).unwrap() && !node.forget_job(&uid).unwrap());
}

#[test]
fn thin_devices_have_numbers_and_transactions_of_their_own() {
    let (dir, record) = record();
    let [a, b, c] = ["a", "b", "c"].map(Uid::from);
    let begin = |uid: &Uid, class| record.begin_thin(uid, class, Bytes::gib(1)).map(|thin| thin.id);
    assert_eq!(begin(&a, PromiseClass::Volumes).unwrap(), 1);
    assert_eq!(begin(&b, PromiseClass::Volumes).unwrap(), 2);
    assert_eq!(begin(&c, PromiseClass::Images).unwrap(), 1, "each kernel pool counts for itself");
    assert!(matches!(begin(&a, PromiseClass::Volumes), Err(ChangeError::State { .. })), "once");
    record.thin_made(&a).unwrap();
    assert!(matches!(record.forget_thin(&a), Err(ChangeError::State { .. })), "what is there stays known");
    assert_eq!(record.begin_remove_thin(&a).unwrap().map(|thin| thin.state), Some(ThinState::Removing));
    assert!(matches!(record.thin_made(&a), Err(ChangeError::State { .. })), "never used again");
    record.forget_thin(&a).unwrap();
    record.forget_thin(&a).unwrap();
    assert_eq!(record.begin_remove_thin(&a).unwrap(), None);
    assert_eq!(begin(&a, PromiseClass::Volumes).unwrap(), 3, "not the one that was just given back");
    drop(record);
    let record = PoolRecord::open(&dir.path().join("record"), None).unwrap();
    let counters = record.thin_counters(PromiseClass::Volumes).unwrap();
    assert_eq!((counters.transaction, counters.last_id), (4, 3), "three made, one removed");
    assert_eq!(record.thin_counters(PromiseClass::Images).unwrap().transaction, 1);
    assert_eq!(record.thin(&b).unwrap().map(|thin| thin.state), Some(ThinState::Making));
}

#[test]
fn a_source_stays_until_its_snapshot_is_made_and_may_go_then() {
    let (_dir, record) = record();
    let [source, snapshot, other] = ["source", "snapshot", "other"].map(Uid::from);
    let (small, large) = (Bytes::mib(1), Bytes::mib(2));
    let refused =
        |done: Result<(), ChangeError>| assert!(matches!(done, Err(ChangeError::State { .. })), "{done:?}");
    record.begin_thin(&source, PromiseClass::Volumes, large).unwrap();
    refused(record.begin_thin_snapshot(&snapshot, &source, large).map(drop)); // half made
    record.thin_made(&source).unwrap();
    refused(record.begin_thin_snapshot(&snapshot, &source, small).map(drop)); // would lose its end
    let before = record.thin_counters(PromiseClass::Volumes).unwrap().transaction;
    let (entry, of) = record.begin_thin_snapshot(&snapshot, &source, large).unwrap();
    assert_eq!(record.thin_counters(PromiseClass::Volumes).unwrap().transaction, before + 1);
    assert_eq!(
        (entry.state, entry.source.as_ref(), of.state),
        (ThinState::Making, Some(&source), ThinState::Made)
    );
    assert_ne!(entry.id, of.id);
    refused(record.begin_thin_snapshot(&snapshot, &source, large).map(drop));
    refused(record.begin_remove_thin(&source).map(drop));
    record.begin_thin(&other, PromiseClass::Volumes, small).unwrap();
    refused(record.begin_remove_thin(&source).map(drop));
    record.thin_made(&snapshot).unwrap();
    record.begin_remove_thin(&source).unwrap();
    record.forget_thin(&source).unwrap();
    refused(record.thin_resized(&snapshot, small).map(drop));
    assert_eq!(record.thin_resized(&snapshot, Bytes::mib(3)).unwrap().size, Bytes::mib(3));
}

#[test]
fn a_promise_of_the_node_itself_comes_and_goes_with_its_volume() {
    let (_dir, record) = record();
    let (uid, snapshot) = (Uid::from("v"), Uid::from("s"));
    let promise = |data| PromiseEntry {
        generation: Generation(1),
        class: PromiseClass::Volumes,
        data,
        metadata: Bytes::ZERO,
        holder: Holder::local(&uid),
        obeyed: true,
        released: false,
    };
    let begin = |refuse: bool| {
        record.begin_volume_under(&uid, &volume(1), |promises| {
            assert!(promises.is_empty());
            if refuse {
                Err(ChangeError::Missing { table: "x", key: "y".into() })
            } else {
                Ok(Some(promise(Bytes(1))))
            }
        })
    };
    begin(true).unwrap_err();
    let nothing = |record: &PoolRecord| {
        record.record().entries(tables::PROMISES).unwrap().is_empty()
            && record.record().entries(tables::VOLUMES).unwrap().is_empty()
    };
    assert!(nothing(&record), "both or neither");
    assert_eq!(begin(false).unwrap().state, VolumeState::Creating);
    let copy = VolumeEntry { kind: VolumeKind::Snapshot, source: Some(uid.clone()), ..volume(1) };
    assert!(record.begin_volume(&snapshot, &copy).is_err(), "of a half made one");
    record.volume_ready(&uid, Generation(1)).unwrap();
    record.begin_volume(&snapshot, &copy).unwrap();
    assert!(record.begin_delete_volume(&uid).is_err(), "while it is copied");
    record.volume_ready(&snapshot, Generation(1)).unwrap();
    assert!(record.volume_resized(&snapshot, Bytes::gib(2)).is_err(), "a snapshot stays as it is");
    let grow = |size| record.volume_resized_under(&uid, size, |_| Ok::<_, ChangeError>(Some(promise(size))));
    assert!(grow(Bytes(1)).is_err());
    grow(Bytes::gib(2)).unwrap();
    assert_eq!(record.record().get(tables::PROMISES, &uid).unwrap(), Some(promise(Bytes::gib(2))));
    for uid in [&uid, &snapshot] {
        record.begin_delete_volume(uid).unwrap();
        record.forget_volume(uid).unwrap();
    }
    assert!(nothing(&record));
}
