//! Files for pods in the record of a pool.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

use std::collections::BTreeMap;

use berth_core::ids::{Digest, NodeName, PoolName, Sha256Sum, Uid};
use berth_core::units::{Bytes, Generation, Timestamp};
use berth_record::{
    ChangeError, FileContent, FileEntry, FileFetch, FilePublication, FileTarget, Holder, LedgerPosition,
    PoolIdentity, PoolRecord, PromiseClass, PromiseEntry, Sending, SentFile, StagingEntry,
};
use tempfile::TempDir;

const BOOT: &str = "this boot";

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
    let promise = PromiseEntry {
        generation: Generation(1),
        class: PromiseClass::Images,
        data: Bytes::mib(64),
        metadata: Bytes::ZERO,
        holder: Holder { kind: "StagingReservation".into(), namespace: "ns".into(), name: "r".into() },
        obeyed: true,
        released: false,
    };
    let position =
        LedgerPosition { lineage: Some("l".into()), obeyed_revision: 1, ..LedgerPosition::default() };
    record.obey(&position, &[(uid(), promise)]).unwrap();
    (dir, record)
}

fn uid() -> Uid {
    Uid::from("r")
}

fn begin(record: &PoolRecord, generation: u64, fetch: FileFetch) -> Result<FileEntry, ChangeError> {
    let generation = Generation(generation);
    let staging = StagingEntry { generation, dir: "staging/r".into(), bytes: Bytes::mib(64) };
    let target = FileTarget {
        namespace: "ns".into(),
        secret: None,
        endpoint: "http://store".into(),
        region: "r".into(),
        bucket: "b".into(),
        key: "k".into(),
        virtual_host: false,
        ca_bundle: None,
    };
    let file = FileEntry {
        generation,
        name: "data".into(),
        made: false,
        fetch,
        content: FileContent::Unchanged,
        target: Some(target),
        published: BTreeMap::new(),
        sent: None,
    };
    record.begin_file(&uid(), &staging, &file)
}

fn seen(target: &str, writer: bool) -> FilePublication {
    FilePublication { target: target.into(), writer, boot: BOOT.to_owned() }
}

fn sent() -> SentFile {
    SentFile {
        etag: Some("\"e\"".into()),
        version: None,
        sha256: Digest(Sha256Sum::of(b"")),
        size: Bytes::ZERO,
    }
}

/// What the record says when it refuses.
fn refusal<T: std::fmt::Debug>(result: Result<T, ChangeError>) -> String {
    match result {
        Err(ChangeError::State { state, .. }) => state,
        other => panic!("not refused by its state: {other:?}"),
    }
}

#[test]
fn readers_are_many_and_a_writer_is_alone() {
    let (_dir, record) = record();
    begin(&record, 1, FileFetch::Waiting).unwrap();
    let publish = |volume: &str, writer| {
        record.publish_file(&uid(), volume, &seen(&format!("/{volume}"), writer), false)
    };
    assert_eq!(refusal(publish("a", false)), "not all there");
    record.file_fetched(&uid(), Generation(1), FileFetch::Complete).unwrap();
    assert_eq!(refusal(record.file_fetched(&uid(), Generation(1), FileFetch::Waiting)), "complete");
    publish("a", false).unwrap();
    publish("b", false).unwrap();
    assert_eq!(refusal(publish("c", true)), "published to readers");
    assert_eq!(record.last_used(&uid()).unwrap(), None, "it is in use");
    assert!(record.unpublish_file("a", Timestamp(8)).unwrap());
    assert!(record.unpublish_file("b", Timestamp(9)).unwrap());
    assert_eq!(record.last_used(&uid()).unwrap(), Some(Timestamp(9)));
    assert!(!record.unpublish_file("b", Timestamp(9)).unwrap(), "there is none any more");
    publish("c", true).unwrap();
    publish("c", true).expect("the same again");
    assert_eq!(refusal(publish("d", true)), "published to a writer");
    assert_eq!(refusal(publish("d", false)), "published to a writer");
    assert!(record.file(&uid()).unwrap().unwrap().is_only_copy(), "from before the writer sees it");
}

#[test]
fn the_only_copy_is_neither_removed_nor_released_until_it_is_sent() {
    let (_dir, record) = record();
    begin(&record, 1, FileFetch::Complete).unwrap();
    record.publish_file(&uid(), "v", &seen("/v", true), false).unwrap();
    assert_eq!(refusal(record.begin_remove_file(&uid(), BOOT, true)), "published", "consent is not enough");
    assert_eq!(refusal(record.file_sent(&uid(), BOOT, &sent(), Timestamp(9))), "written");
    assert_eq!(refusal(record.file_sending(&uid(), BOOT, None)), "published to a writer");
    record.unpublish_file("v", Timestamp(9)).unwrap();
    assert_eq!(refusal(record.begin_remove_file(&uid(), BOOT, false)), "the only copy");
    let sending = Sending {
        upload: "u".into(),
        size: Bytes(5),
        modified: 7,
        part: Bytes::mib(16),
        parts: Vec::new(),
        hash: Vec::new(),
    };
    record.file_sending(&uid(), BOOT, Some(sending)).unwrap();
    assert_eq!(refusal(record.publish_file(&uid(), "w", &seen("/w", true), false)), "being sent");
    record.publish_file(&uid(), "w", &seen("/w", false), false).expect("a reader changes nothing");
    record.file_sent(&uid(), BOOT, &sent(), Timestamp(9)).unwrap();
    assert_eq!(refusal(record.file_sending(&uid(), BOOT, None)), "no only copy");
    assert_eq!(refusal(record.begin_remove_file(&uid(), BOOT, false)), "published");
    record.unpublish_file("w", Timestamp(9)).unwrap();
    assert_eq!(refusal(record.forget_staging(&uid())), "not being removed");
    assert_eq!(refusal(record.promise_released(&uid(), Generation(1))), "that of a file");
    assert_eq!(record.begin_remove_file(&uid(), BOOT, false).unwrap().unwrap().sent, Some(sent()));
    assert_eq!(refusal(record.publish_file(&uid(), "x", &seen("/x", false), false)), "being removed");
    assert_eq!(refusal(begin(&record, 1, FileFetch::Complete)), "being removed");
    assert!(record.forget_staging(&uid()).unwrap());
    assert_eq!(record.begin_remove_file(&uid(), BOOT, false).unwrap(), None);
    record.promise_released(&uid(), Generation(1)).unwrap();
    assert_eq!(refusal(begin(&record, 1, FileFetch::Complete)), "released");
}

#[test]
fn changes_that_nobody_wants_are_no_only_copy() {
    let (_dir, record) = record();
    begin(&record, 1, FileFetch::Complete).unwrap();
    record.publish_file(&uid(), "v", &seen("/v", true), true).unwrap();
    assert!(!record.file(&uid()).unwrap().unwrap().is_only_copy());
}

#[test]
fn changes_that_nobody_wants_never_replace_what_is_still_to_be_sent() {
    let (_dir, record) = record();
    begin(&record, 1, FileFetch::Complete).unwrap();
    record.publish_file(&uid(), "v", &seen("/v", true), false).unwrap();
    record.unpublish_file("v", Timestamp(9)).unwrap();
    assert_eq!(refusal(record.publish_file(&uid(), "w", &seen("/w", true), true)), "the only copy");
    record.file_sent(&uid(), BOOT, &sent(), Timestamp(9)).unwrap();
    record.publish_file(&uid(), "w", &seen("/w", true), true).unwrap();
}

#[test]
fn what_an_earlier_boot_showed_is_seen_by_nobody_and_stays_the_only_copy() {
    let (_dir, record) = record();
    begin(&record, 1, FileFetch::Complete).unwrap();
    record.publish_file(&uid(), "v", &seen("/v", true), false).unwrap();
    let file = record.file(&uid()).unwrap().unwrap();
    assert_eq!((file.shown(BOOT).count(), file.shown("next").count()), (1, 0));
    assert_eq!(refusal(record.begin_remove_file(&uid(), "next", false)), "the only copy");
    let next = FilePublication { boot: "next".to_owned(), ..seen("/w", false) };
    record.publish_file(&uid(), "w", &next, false).unwrap();
    assert_eq!(record.file(&uid()).unwrap().unwrap().published.len(), 1);
    record.file_sent(&uid(), "next", &sent(), Timestamp(9)).unwrap();
}

#[test]
fn a_later_placement_keeps_what_is_there_and_an_earlier_one_is_refused() {
    let (_dir, record) = record();
    begin(&record, 1, FileFetch::Waiting).unwrap();
    let part = FileFetch::Fetching { version: "\"e\"".into(), size: Bytes(9), offset: Bytes(4) };
    record.file_fetched(&uid(), Generation(1), part.clone()).unwrap();
    assert_eq!(begin(&record, 2, FileFetch::Waiting).unwrap().fetch, part);
    let late = record.file_fetched(&uid(), Generation(1), FileFetch::Complete);
    assert!(matches!(late, Err(ChangeError::StaleGeneration { .. })));
    assert!(matches!(begin(&record, 1, FileFetch::Waiting), Err(ChangeError::StaleGeneration { .. })));
}
