//! Files for pods against an S3 server that fails: fetched and sent whatever happens, and never more than a window twice.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use berth_core::ids::{Digest, NodeName, PoolName, Sha256Sum, Uid};
use berth_core::reason::{Reason, ReasonClass};
use berth_core::units::{Bytes, Generation, Timestamp};
use berth_node::files::{FileError, FileWork, boot, fetch, push};
use berth_objectstore::ObjectStore as _;
use berth_objectstore::s3::{Addressing, Credentials, S3Config, S3Store, Secret};
use berth_objectstore::source::ObjectSource;
use berth_objectstore::{Body, PutCondition, StoreError};
use berth_record::{
    FileContent, FileEntry, FileFetch, FilePublication, FileTarget, Holder, LedgerPosition, PoolIdentity,
    PoolRecord, PromiseClass, PromiseEntry, SentFile, StagingEntry,
};
use berth_testkit::s3::fault::{FaultAction, FaultRule, write_rules};
use berth_testkit::s3::log::RequestLog;
use berth_testkit::s3::{S3Options, TestS3};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

const MIB: usize = 1 << 20;
const KEY: &str = "dir/data.bin";
const NAME: &str = "data.bin";

/// An S3 server, and a pool with the directory of one file.
struct Bed {
    dir: TempDir,
    _s3: TestS3,
    store: S3Store,
    record: Arc<PoolRecord>,
    moved: Arc<AtomicU64>,
}

impl Bed {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = S3Options { buckets: vec!["test".to_owned()], fsync: false, ..S3Options::default() };
        let s3 = TestS3::start_with(&dir.path().join("s3"), options).await.unwrap();
        let config = S3Config {
            endpoint: Some(s3.endpoint()),
            region: "us-east-1".to_owned(),
            bucket: "test".to_owned(),
            addressing: Addressing::Path,
            credentials: Credentials::Static {
                access_key_id: s3.access_key().to_owned(),
                secret_key: Secret::new(s3.secret_key()),
                session_token: None,
            },
            ca_bundle: None,
        };
        let store = S3Store::connect(config).await.unwrap();
        std::fs::create_dir(dir.path().join("work")).unwrap();
        let record = Arc::new(record(&dir.path().join("record")));
        Self { dir, _s3: s3, store, record, moved: Arc::default() }
    }

    fn faults(&self, rules: &[FaultRule]) {
        write_rules(&self.dir.path().join("s3"), rules).unwrap();
    }

    fn work_dir(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    /// The file in its directory.
    fn file(&self) -> PathBuf {
        self.work_dir().join(NAME)
    }

    fn begin(&self, fetch: FileFetch, promised: Bytes) {
        let generation = Generation(1);
        let staging = StagingEntry { generation, dir: "staging/r".into(), bytes: promised };
        let target = FileTarget {
            namespace: "ns".into(),
            secret: None,
            endpoint: "http://unused".into(),
            region: "us-east-1".into(),
            bucket: "test".into(),
            key: KEY.into(),
            virtual_host: false,
            ca_bundle: None,
        };
        let file = FileEntry {
            generation,
            name: NAME.into(),
            made: false,
            fetch,
            content: FileContent::Unchanged,
            target: Some(target),
            published: BTreeMap::new(),
            sent: None,
        };
        self.record.begin_file(&uid(), &staging, &file).unwrap();
    }

    /// A pod writes these bytes and goes.
    fn written(&self, bytes: &[u8]) {
        let publication = FilePublication { target: "/pod".into(), writer: true, boot: boot().to_owned() };
        self.record.publish_file(&uid(), "volume", &publication, false).unwrap();
        std::fs::write(self.file(), bytes).unwrap();
        self.record.unpublish_file("volume", Timestamp(9)).unwrap();
    }

    /// Work that is stopped once this many bytes are done.
    fn work(&self, stop_at: u64) -> FileWork<PoolRecord> {
        let (cancel, moved) = (CancellationToken::new(), Arc::clone(&self.moved));
        let stop = cancel.clone();
        let progress = move |done: Bytes, total: Bytes| {
            assert!(done <= total);
            moved.store(done.0, Ordering::Relaxed);
            if done.0 >= stop_at {
                stop.cancel();
            }
        };
        FileWork {
            uid: uid(),
            generation: Generation(1),
            dir: self.work_dir(),
            record: Arc::clone(&self.record),
            progress: Arc::new(progress),
            cancel,
        }
    }

    async fn fetch(&self, stop_at: u64) -> Result<(), FileError> {
        let source = ObjectSource::new(self.store.clone(), KEY, None, Duration::from_secs(5));
        fetch(&self.work(stop_at), source.into()).await
    }

    async fn push(&self, stop_at: u64) -> Result<SentFile, FileError> {
        push(&self.work(stop_at), &self.store, KEY).await
    }

    async fn put(&self, bytes: Vec<u8>) {
        self.store.put(KEY, Body::Bytes(bytes.into()), PutCondition::Always, None).await.unwrap();
    }

    async fn object(&self) -> Vec<u8> {
        self.store.get(KEY, None, None).await.unwrap().collect(Bytes::gib(1)).await.unwrap().to_vec()
    }

    fn entry(&self) -> FileEntry {
        self.record.file(&uid()).unwrap().unwrap()
    }

    fn open_uploads(&self) -> BTreeSet<String> {
        RequestLog::read(&self.dir.path().join("s3/requests.jsonl")).unwrap().open_uploads()
    }

    /// How many requests of this kind the server has performed.
    fn requests(&self, op: &str) -> usize {
        let log = std::fs::read_to_string(self.dir.path().join("s3/requests.jsonl")).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter(|line| line["op"] == op).count()
    }
}

fn record(path: &Path) -> PoolRecord {
    let identity = PoolIdentity {
        pool_uid: Uid::from("pool-1"),
        pool_name: PoolName::from("fast"),
        node: NodeName::from("n1"),
        pool_id: "area-1".into(),
        area: None,
        made_of: None,
    };
    let record = PoolRecord::create(path, identity).unwrap();
    let promise = PromiseEntry {
        generation: Generation(1),
        class: PromiseClass::Images,
        data: Bytes::gib(1),
        metadata: Bytes::ZERO,
        holder: Holder { kind: "StagingReservation".into(), namespace: "ns".into(), name: "r".into() },
        obeyed: true,
        released: false,
    };
    let position =
        LedgerPosition { lineage: Some("l".into()), obeyed_revision: 1, ..LedgerPosition::default() };
    record.obey(&position, &[(uid(), promise)]).unwrap();
    record
}

fn uid() -> Uid {
    Uid::from("r")
}

/// Bytes of which no two words are equal.
fn noise(length: usize) -> Vec<u8> {
    let words = u32::try_from(length.div_ceil(4)).unwrap();
    let bytes = (0..words).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes());
    bytes.take(length).collect()
}

#[tokio::test]
async fn stopped_anywhere_a_fetch_goes_on_and_repeats_at_most_a_window() {
    let bed = Bed::new().await;
    let content = noise(56 * MIB + 5);
    bed.put(content.clone()).await;
    bed.begin(FileFetch::Waiting, Bytes::mib(64));
    let mut reached = 0;
    for stop in [5_u64, 22, 30, 38] {
        let stopped = bed.fetch(stop << 20).await;
        assert!(matches!(stopped, Err(FileError::Cancelled)), "{stopped:?}");
        let FileFetch::Fetching { offset, .. } = bed.entry().fetch else { panic!("{:?}", bed.entry()) };
        assert!(offset.0 >= reached && offset.0 + (16 << 20) >= stop << 20, "{offset} of {stop} MiB");
        reached = offset.0;
        // What was not synced may be anything after a power cut.
        let file = std::fs::OpenOptions::new().write(true).open(bed.file()).unwrap();
        file.set_len(offset.0).unwrap();
    }
    bed.fetch(u64::MAX).await.unwrap();
    assert_eq!(bed.entry().fetch, FileFetch::Complete);
    assert!(std::fs::read(bed.file()).unwrap() == content, "another content");
    bed.fetch(0).await.expect("the same again does nothing");
}

#[tokio::test]
async fn what_does_not_fit_or_has_changed_is_refused_for_good_with_numbers() {
    let bed = Bed::new().await;
    bed.put(noise(40 * MIB)).await;
    bed.begin(FileFetch::Waiting, Bytes::mib(32));
    let error = bed.fetch(u64::MAX).await.unwrap_err();
    assert_eq!((error.reason(), error.reason().class()), (Reason::SourceTooLarge, ReasonClass::Terminal));
    let said = error.to_string();
    assert!(said.contains("40 MiB") && said.contains("32 MiB"), "{said}");
    assert!(!bed.file().exists(), "nothing is written");

    bed.begin(FileFetch::Waiting, Bytes::mib(64));
    bed.fetch(20 << 20).await.unwrap_err();
    bed.put(vec![7; 40 * MIB]).await;
    let error = bed.fetch(u64::MAX).await.unwrap_err();
    assert_eq!(error.reason(), Reason::SourceChanged, "{error:?}");
    assert_ne!(bed.entry().fetch, FileFetch::Complete);
}

#[tokio::test]
async fn a_store_that_is_away_or_breaks_off_loses_a_fetch_nothing() {
    let bed = Bed::new().await;
    let content = noise(40 * MIB);
    bed.put(content.clone()).await;
    bed.begin(FileFetch::Waiting, Bytes::mib(64));
    bed.faults(&[FaultRule::new(FaultAction::SlowDown)]);
    assert_eq!(bed.fetch(u64::MAX).await.unwrap_err().reason(), Reason::SourceUnavailable);
    let cut =
        FaultRule::new(FaultAction::Truncate { after_bytes: 20 << 20 }).op("GetObject").skip(1).times(1);
    bed.faults(&[cut]);
    assert_eq!(bed.fetch(u64::MAX).await.unwrap_err().reason().class(), ReasonClass::Transient);
    assert!(bed.moved.load(Ordering::Relaxed) >= 16 << 20);
    bed.fetch(u64::MAX).await.unwrap();
    assert!(std::fs::read(bed.file()).unwrap() == content);
}

#[tokio::test]
async fn small_and_empty_files_go_both_ways() {
    for content in [Vec::new(), b"hello".to_vec(), noise(16 * MIB)] {
        let bed = Bed::new().await;
        bed.put(content.clone()).await;
        bed.begin(FileFetch::Waiting, Bytes::mib(64));
        bed.fetch(u64::MAX).await.unwrap();
        assert!(std::fs::read(bed.file()).unwrap() == content);
        let changed = [&content[..], b"!"].concat();
        bed.written(&changed);
        let sent = bed.push(u64::MAX).await.unwrap();
        assert_eq!(sent.sha256, Digest(Sha256Sum::of(&changed)));
        assert!(bed.object().await == changed);
        assert!(!bed.entry().is_only_copy());
    }
}

#[tokio::test]
async fn stopped_after_any_part_a_push_goes_on_and_sends_no_part_twice() {
    let bed = Bed::new().await;
    let content = noise(70 * MIB + 9);
    bed.begin(FileFetch::Complete, Bytes::mib(128));
    bed.written(&content);
    for stop in [0_u64, 1, 17, 33, 49] {
        let stopped = bed.push(stop << 20).await;
        assert!(matches!(stopped, Err(FileError::Cancelled)), "{stopped:?}");
        assert!(bed.entry().is_only_copy(), "until it is there");
    }
    let sent = bed.push(u64::MAX).await.unwrap();
    assert!(bed.object().await == content);
    assert_eq!((sent.size, sent.sha256), (Bytes(content.len() as u64), Digest(Sha256Sum::of(&content))));
    assert_eq!(bed.entry().sent, Some(sent.clone()));
    assert_eq!((bed.requests("UploadPart"), bed.requests("CreateMultipartUpload")), (5, 1));
    assert_eq!(bed.push(u64::MAX).await.unwrap(), sent, "the same again sends nothing");
    assert_eq!(bed.requests("UploadPart"), 5);
}

#[tokio::test]
async fn an_answer_that_is_lost_at_the_end_counts_as_done() {
    let bed = Bed::new().await;
    let content = noise(40 * MIB);
    bed.begin(FileFetch::Complete, Bytes::mib(64));
    bed.written(&content);
    bed.faults(&[FaultRule::new(FaultAction::LostResponse).op("CompleteMultipartUpload").times(3)]);
    while bed.push(u64::MAX).await.is_err() {}
    assert!(bed.object().await == content && !bed.entry().is_only_copy());
    assert_eq!((bed.requests("UploadPart"), bed.requests("CreateMultipartUpload")), (3, 1));
}

#[tokio::test]
async fn faults_of_the_store_pass_and_it_stays_the_only_copy_meanwhile() {
    let bed = Bed::new().await;
    let content = noise(40 * MIB);
    bed.begin(FileFetch::Complete, Bytes::mib(64));
    bed.written(&content);
    bed.faults(&[FaultRule::new(FaultAction::SlowDown)]);
    assert_eq!(bed.push(u64::MAX).await.unwrap_err().reason(), Reason::ObjectStoreUnavailable);
    bed.faults(&[FaultRule::new(FaultAction::Deny).op("UploadPart")]);
    assert_eq!(bed.push(u64::MAX).await.unwrap_err().reason(), Reason::ObjectStoreDenied);
    bed.faults(&[FaultRule::new(FaultAction::Reset { after_bytes: 1 << 20 })
        .op("UploadPart")
        .percent(50, 7)]);
    let mut attempts = 0;
    while bed.push(u64::MAX).await.is_err() {
        assert!(bed.entry().is_only_copy());
        attempts += 1;
        assert!(attempts < 50);
    }
    assert!(bed.object().await == content);
}

#[tokio::test]
async fn no_pod_writes_while_it_is_sent_and_nothing_is_sent_while_one_does() {
    let bed = Bed::new().await;
    bed.begin(FileFetch::Complete, Bytes::mib(64));
    bed.written(b"first");
    let publication = FilePublication { target: "/pod".into(), writer: true, boot: boot().to_owned() };
    let publish = || bed.record.publish_file(&uid(), "again", &publication, false);
    bed.faults(&[FaultRule::new(FaultAction::SlowDown)]);
    bed.push(u64::MAX).await.unwrap_err();
    assert!(publish().unwrap_err().to_string().contains("being sent"));
    bed.faults(&[]);
    bed.push(u64::MAX).await.unwrap();
    publish().unwrap();
    let error = bed.push(u64::MAX).await.unwrap_err();
    assert!(matches!(error, FileError::Change(_)), "{error}");
    bed.record.unpublish_file("again", Timestamp(9)).unwrap();
    assert_eq!(bed.push(u64::MAX).await.unwrap().size, Bytes(5));
}

#[tokio::test]
async fn a_file_that_was_changed_again_is_sent_anew() {
    let bed = Bed::new().await;
    bed.begin(FileFetch::Complete, Bytes::mib(64));
    bed.written(&noise(40 * MIB));
    bed.push(17 << 20).await.unwrap_err();
    std::fs::write(bed.file(), vec![3; 33 * MIB]).unwrap(); // as after a power cut that lost what was not synced
    bed.push(u64::MAX).await.unwrap();
    assert!(bed.object().await == vec![3; 33 * MIB]);
    assert_eq!(bed.requests("AbortMultipartUpload"), 1);
}

#[tokio::test]
async fn an_upload_that_somebody_removed_begins_anew() {
    let bed = Bed::new().await;
    let content = noise(40 * MIB);
    bed.begin(FileFetch::Complete, Bytes::mib(64));
    bed.written(&content);
    bed.push(17 << 20).await.unwrap_err();
    let FileContent::Sending(sending) = bed.entry().content else { panic!("{:?}", bed.entry()) };
    bed.store.abort_upload(KEY, &sending.upload).await.unwrap();
    bed.push(u64::MAX).await.unwrap_err();
    bed.push(u64::MAX).await.unwrap();
    assert!(bed.object().await == content);
}

#[tokio::test]
async fn an_upload_that_the_store_refuses_is_given_up_before_the_next_begins() {
    let bed = Bed::new().await;
    let content = noise(40 * MIB);
    bed.begin(FileFetch::Complete, Bytes::mib(64));
    bed.written(&content);
    bed.push(17 << 20).await.unwrap_err();
    let FileContent::Sending(mut sending) = bed.entry().content else { panic!("{:?}", bed.entry()) };
    sending.parts[0].etag = "\"another\"".to_owned();
    bed.record.file_sending(&uid(), boot(), Some(sending)).unwrap();
    let error = bed.push(u64::MAX).await.unwrap_err();
    assert!(matches!(error, FileError::Store(StoreError::InvalidRequest { .. })), "{error:?}");
    assert_eq!(bed.open_uploads().len(), 1);
    bed.faults(&[FaultRule::new(FaultAction::SlowDown).op("AbortMultipartUpload")]);
    bed.push(u64::MAX).await.unwrap_err();
    assert_eq!(bed.open_uploads().len(), 1, "it is not forgotten");
    bed.faults(&[]);
    bed.push(u64::MAX).await.unwrap();
    assert!(bed.object().await == content);
    assert!(bed.open_uploads().is_empty(), "{:?}", bed.open_uploads());
}

#[tokio::test]
async fn a_store_that_lets_nobody_give_up_an_upload_gets_the_file_all_the_same() {
    let bed = Bed::new().await;
    bed.begin(FileFetch::Complete, Bytes::mib(64));
    bed.written(&noise(40 * MIB));
    bed.push(17 << 20).await.unwrap_err();
    std::fs::write(bed.file(), vec![3; 33 * MIB]).unwrap();
    bed.faults(&[FaultRule::new(FaultAction::Deny).op("AbortMultipartUpload")]);
    bed.push(u64::MAX).await.unwrap();
    assert!(bed.object().await == vec![3; 33 * MIB]);
}

#[tokio::test]
async fn what_a_pod_puts_in_place_of_its_file_leads_nowhere() {
    let bed = Bed::new().await;
    let secret = bed.dir.path().join("secret");
    std::fs::write(&secret, b"of the host").unwrap();
    bed.begin(FileFetch::Complete, Bytes::mib(64));
    bed.written(b"");
    let replace = |make: &dyn Fn(&Path)| {
        let _ = std::fs::remove_file(bed.file());
        make(&bed.file());
    };
    let pipe = |path: &Path| assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    let sparse = |path: &Path| std::fs::File::create(path).unwrap().set_len(1 << 42).unwrap();
    for (make, reason) in [
        (&(|_: &Path| ()) as &dyn Fn(&Path), Reason::FileMissing),
        (&|path: &Path| symlink(&secret, path).unwrap(), Reason::FileMissing),
        (&pipe, Reason::FileMissing),
        (&sparse, Reason::SourceTooLarge),
    ] {
        replace(make);
        assert_eq!(bed.push(u64::MAX).await.unwrap_err().reason(), reason);
        assert!(bed.entry().is_only_copy());
    }
    assert!(bed.store.get(KEY, None, None).await.is_err(), "nothing was sent");
}

#[tokio::test]
async fn an_object_that_is_not_what_was_sent_is_not_durable() {
    let bed = Bed::new().await;
    bed.begin(FileFetch::Complete, Bytes::mib(64));
    bed.written(b"what is to be kept");
    bed.put(b"something else".to_vec()).await;
    bed.faults(&[FaultRule::new(FaultAction::Lose).op("PutObject").times(1)]);
    let error = bed.push(u64::MAX).await.unwrap_err();
    assert_eq!(error.reason(), Reason::VerificationFailed, "{error}");
    assert!(bed.entry().is_only_copy());
    bed.push(u64::MAX).await.unwrap();
    assert!(bed.object().await == b"what is to be kept");
}
