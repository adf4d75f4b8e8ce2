//! Opening tells apart: absent, damaged, newer, foreign, locked.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use berth_core::ids::{Digest, NodeName, PoolName, Sha256Sum, Uid};
use berth_core::units::{Bytes, Generation};
use berth_record::{
    Attachment, AttachmentMode, CreateError, FORMAT_VERSION, Holder, LedgerPosition, NodeRecord, OpenError,
    Owner, PoolIdentity, PoolRecord, PromiseClass, PromiseEntry, VolumeEntry, VolumeKind, VolumeOrigin,
    tables,
};
use redb::{Database, ReadableDatabase as _, TableDefinition};

const HEADER: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("header");

fn identity() -> PoolIdentity {
    PoolIdentity {
        pool_uid: Uid::from("0f8fad5b-d9cb-469f-a165-70867728950e"),
        pool_name: PoolName::from("fast"),
        node: NodeName::from("n1"),
        pool_id: "6f1e2d3c-0000-4000-8000-000000000001".into(),
        area: None,
        made_of: None,
    }
}

fn promise(number: u64) -> PromiseEntry {
    PromiseEntry {
        generation: Generation(number + 1),
        class: PromiseClass::Volumes,
        data: Bytes::gib(number),
        metadata: Bytes::kib(number),
        holder: Holder {
            kind: "StagingReservation".into(),
            namespace: "vms".into(),
            name: format!("disk-{number}"),
        },
        obeyed: true,
        released: false,
    }
}

fn filled(dir: &Path) -> PathBuf {
    let path = dir.join("record");
    let record = PoolRecord::create(&path, identity()).unwrap();
    let promises: Vec<_> = (0..300).map(|n| (Uid::from(format!("uid-{n:04}")), promise(n))).collect();
    for (revision, part) in promises.chunks(30).enumerate() {
        let position = LedgerPosition {
            lineage: Some("l1".into()),
            obeyed_revision: revision as u64,
            ..LedgerPosition::default()
        };
        record.obey(&position, part).unwrap();
    }
    path
}

fn contents(path: &Path) -> Result<Vec<(Uid, PromiseEntry)>, OpenError> {
    let record = PoolRecord::open(path, Some(&identity().owner()))?;
    Ok(record.record().entries(tables::PROMISES).unwrap())
}

#[test]
fn absent_and_existing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("record");
    assert!(matches!(PoolRecord::open(&path, None), Err(OpenError::NotFound { .. })));
    fs::write(path.with_extension("new"), "left by a process that died").unwrap();
    drop(PoolRecord::create(&path, identity()).unwrap());
    assert!(!path.with_extension("new").exists());
    assert!(matches!(PoolRecord::create(&path, identity()), Err(CreateError::Exists { .. })));
    assert_eq!(*PoolRecord::open(&path, None).unwrap().identity(), identity());
}

#[test]
fn foreign() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path());
    let other = Owner::Pool { uid: identity().pool_uid, node: NodeName::from("n2") };
    match PoolRecord::open(&path, Some(&other)) {
        Err(OpenError::WrongOwner { found, expected, .. }) => {
            assert_eq!((found, expected), (identity().owner(), other));
        }
        answer => panic!("{:?}", answer.err()),
    }
    assert!(matches!(NodeRecord::open(&path, &NodeName::from("n1")), Err(OpenError::WrongOwner { .. })));
    assert_eq!(contents(&path).unwrap().len(), 300);
}

#[test]
fn locked() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path());
    let open = PoolRecord::open(&path, None).unwrap();
    assert!(matches!(PoolRecord::open(&path, None), Err(OpenError::Locked { .. })));
    drop(open);
    assert_eq!(contents(&path).unwrap().len(), 300);
}

#[test]
fn newer() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path());
    let db = Database::open(&path).unwrap();
    let txn = db.begin_write().unwrap();
    txn.open_table(HEADER).unwrap().insert("format_version", b"5".as_slice()).unwrap();
    // A newer program may say who owns it in another way.
    txn.open_table(HEADER).unwrap().insert("owner", b"[]".as_slice()).unwrap();
    txn.commit().unwrap();
    drop(db);
    assert_eq!(FORMAT_VERSION, 4);
    assert!(matches!(PoolRecord::open(&path, None), Err(OpenError::NewerVersion { found: 5, .. })));
}

#[test]
fn damaged_header_values() {
    let dir = tempfile::tempdir().unwrap();
    for (key, value) in [("owner", "[]"), ("pool", "{"), ("format_version", "\"one\"")] {
        let path = dir.path().join(key);
        drop(PoolRecord::create(&path, identity()).unwrap());
        let db = Database::open(&path).unwrap();
        let txn = db.begin_write().unwrap();
        txn.open_table(HEADER).unwrap().insert(key, value.as_bytes()).unwrap();
        txn.commit().unwrap();
        drop(db);
        assert!(matches!(PoolRecord::open(&path, None), Err(OpenError::Corrupt { .. })), "{key}");
    }
}

#[test]
fn no_record_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("record");
    for content in [
        Vec::new(),
        b"redb".to_vec(),
        vec![0; 1 << 20],
        vec![b'x'; 4096],
        b"redb\x1A\x0A\xA9\x0D\x0A".to_vec(),
    ] {
        fs::write(&path, &content).unwrap();
        assert!(
            matches!(PoolRecord::open(&path, None), Err(OpenError::Corrupt { .. })),
            "{} bytes",
            content.len()
        );
        assert_eq!(fs::read(&path).unwrap(), content, "a foreign file was written to");
    }
}

#[test]
fn truncated() {
    let dir = tempfile::tempdir().unwrap();
    let sound = fs::read(filled(dir.path())).unwrap();
    let path = dir.path().join("cut");
    for length in (1..64).map(|part| sound.len() * part / 64).chain([1, 9, 64, 320, 4096, sound.len() - 1]) {
        fs::write(&path, &sound[..length]).unwrap();
        match contents(&path) {
            Err(OpenError::Corrupt { .. }) => {}
            Err(other) => panic!("cut to {length}: {other}"),
            Ok(found) => assert_eq!(found.len(), 300, "cut to {length}"),
        }
    }
}

/// Whatever is overwritten, the answer is the whole content or `Corrupt`, and stays so.
#[test]
fn overwritten_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    let origin = filled(dir.path());
    let expected = contents(&origin).unwrap();
    let sound = fs::read(&origin).unwrap();
    let path = dir.path().join("overwritten");
    let mut refused = 0;
    let used: Vec<usize> =
        (0..sound.len()).step_by(512).filter(|at| sound[*at..][..512].iter().any(|b| *b != 0)).collect();
    for at in used.iter().copied().chain((0..320).step_by(16)) {
        let mut bytes = sound.clone();
        let end = (at + 16).min(bytes.len());
        for byte in &mut bytes[at..end] {
            *byte ^= 0xA5;
        }
        fs::write(&path, &bytes).unwrap();
        match contents(&path) {
            Ok(found) => assert_eq!(found, expected, "overwritten at {at}"),
            Err(OpenError::Corrupt { .. }) => {
                refused += 1;
                assert!(
                    matches!(contents(&path), Err(OpenError::Corrupt { .. })),
                    "sound the second time, at {at}"
                );
            }
            Err(other) => panic!("overwritten at {at}: {other}"),
        }
    }
    assert!(refused > 20, "only {refused} of {} were noticed", used.len());
}

fn dump(path: &Path) -> (Option<i32>, serde_json::Value) {
    let run = Command::new(env!("CARGO_BIN_EXE_berth-record-dump")).arg(path).output().unwrap();
    let shown = serde_json::from_slice(&run.stdout).unwrap_or_default();
    (run.status.code(), shown)
}

#[test]
fn dump_of_good_and_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path());
    let (status, shown) = dump(&path);
    assert_eq!(status, Some(0), "{shown}");
    assert_eq!(shown["header"]["pool"]["pool_name"], "fast");
    assert_eq!(shown["tables"]["promises"]["uid-0007"]["holder"]["name"], "disk-7");

    let open = PoolRecord::open(&path, None).unwrap();
    let (status, shown) = dump(&path);
    assert_eq!((status, &shown["problems"][0]), (Some(1), &"in use by another process".into()));
    let crashed = dir.path().join("crashed");
    fs::copy(&path, &crashed).unwrap();
    drop(open);
    let before = fs::read(&crashed).unwrap();
    let (status, shown) = dump(&crashed);
    assert_eq!(status, Some(1));
    assert_eq!(shown["tables"]["promises"].as_object().unwrap().len(), 300, "{}", shown["problems"]);
    assert_eq!(fs::read(&crashed).unwrap(), before, "a dump changed the record");

    let garbage = dir.path().join("garbage");
    fs::write(&garbage, vec![7; 5000]).unwrap();
    let (status, shown) = dump(&garbage);
    assert_eq!(status, Some(1));
    assert!(!shown["problems"].as_array().unwrap().is_empty());
    assert_eq!(dump(&dir.path().join("absent")).0, Some(2));
}

/// As a program of format 1 wrote it: an origin is a digest alone, and there are no kinds.
#[test]
fn an_older_record_is_read_and_raised_before_anything_new_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("record");
    drop(PoolRecord::create(&path, identity()).unwrap());
    let (digest, uid) = (Digest(Sha256Sum::of(b"index")), Uid::from("v"));
    let volume = format!(
        r#"{{"generation":1,"path":"volumes/v","size":4096,"origin":"{digest}","state":"Ready","labels":{{}}}}"#
    );
    let volumes: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("volumes");
    let version = |path: &Path| {
        let db = Database::open(path).unwrap();
        let txn = db.begin_read().unwrap();
        txn.open_table(HEADER).unwrap().get("format_version").unwrap().unwrap().value().to_vec()
    };
    let db = Database::open(&path).unwrap();
    let txn = db.begin_write().unwrap();
    txn.open_table(HEADER).unwrap().insert("format_version", b"1".as_slice()).unwrap();
    txn.open_table(volumes).unwrap().insert("v", volume.as_bytes()).unwrap();
    txn.commit().unwrap();
    drop(db);

    let other = Owner::Pool { uid: "other".into(), node: "n1".into() };
    assert!(PoolRecord::open(&path, Some(&other)).is_err());
    assert_eq!(*PoolRecord::identity_at(&path, dir.path()).unwrap().area(), identity().pool_uid);
    assert_eq!(version(&path), b"1", "to look at it, or to be refused it, changes nothing");
    let record = PoolRecord::open(&path, Some(&identity().owner())).unwrap();
    let entry = record.record().get(tables::VOLUMES, &uid).unwrap().unwrap();
    assert_eq!((&entry.origin, entry.kind), (&Some(VolumeOrigin::Image(digest)), VolumeKind::Volume));
    let template = VolumeEntry { origin: Some(VolumeOrigin::Template { template: "t".into() }), ..entry };
    record.record().commit(|change| change.put(tables::VOLUMES, &uid, &template)).unwrap();
    assert_eq!(record.record().get(tables::VOLUMES, &uid).unwrap(), Some(template), "reads back");
    drop(record);
    assert_eq!(version(&path), FORMAT_VERSION.to_string().as_bytes());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no copy is left");
}

#[test]
fn an_area_changes_hands_with_all_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path());
    let record = PoolRecord::open(&path, None).unwrap();
    let attachment = Attachment {
        loop_device: Some("/dev/loop1".into()),
        backing_file: "volumes/v".into(),
        staged_path: "/staged".into(),
        mode: AttachmentMode::Device,
    };
    let attached = |record: &PoolRecord| record.record().entries(tables::ATTACHMENTS).unwrap().len();
    record.record().commit(|change| change.put(tables::ATTACHMENTS, &"v".into(), &attachment)).unwrap();
    let position = record.ledger_position().unwrap();
    drop(record);
    let adopt = |uid: &str, node: &str| {
        PoolRecord::adopt(&path, &uid.into(), &"slow".into(), &node.into(), None).unwrap()
    };
    let record = adopt("new", "n1");
    assert_eq!((attached(&record), record.identity().pool_uid.as_str()), (1, "new"));
    assert_eq!(
        (record.identity().area(), &record.identity().pool_id),
        (&identity().pool_uid, &identity().pool_id)
    );
    assert_eq!(record.ledger_position().unwrap(), position);
    drop(record);
    for _ in 0..2 {
        assert_eq!(attached(&adopt("new", "n2")), 0, "nothing is attached on another node");
    }
    assert!(matches!(contents(&path), Err(OpenError::WrongOwner { .. })), "its old owner's no more");
    let owner = Owner::Pool { uid: "new".into(), node: "n2".into() };
    let record = PoolRecord::open(&path, Some(&owner)).unwrap();
    assert_eq!(record.record().entries(tables::PROMISES).unwrap().len(), 300);
    drop(record);
    assert_eq!(adopt(identity().pool_uid.as_str(), "n2").identity().area, None, "its own again");
}
