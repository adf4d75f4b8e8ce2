//! What an import needs around it: an S3 server, a web server, images, and what is left afterwards.
#![allow(missing_docs)]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_core::ids::{NodeName, ObjectName, Sha256Sum, Uid};
use berth_core::progress::Said;
use berth_core::reason::Reason;
use berth_core::stages::{Shape, Stage};
use berth_core::units::{Bytes, Generation, Timestamp};
use berth_node::transfer::{
    Durable, Journal, Limits, Observer, Origin, Reporter, Snapshot, Source, TransferError, TransferJob,
    abandon, import,
};
use berth_objectstore::ObjectStore as _;
use berth_objectstore::chunks::caibx::ChunkSize;
use berth_objectstore::chunks::read::ImageReader;
use berth_objectstore::chunks::store::ChunkStore;
use berth_objectstore::layout::StoreLayout;
use berth_objectstore::s3::{Addressing, Credentials, S3Config, S3Store, Secret};
use berth_objectstore::source::address::AddressPolicy;
use berth_objectstore::source::{HttpConfig, HttpSource as WebSource};
use berth_record::NodeRecord;
use berth_testkit::http_source::HttpSource;
use berth_testkit::s3::{S3Options, TestS3};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

pub const MIB: u64 = 1 << 20;

pub struct Bed {
    pub dir: TempDir,
    pub s3: TestS3,
    pub web: HttpSource,
    pub chunks: ChunkStore<S3Store>,
}

impl Bed {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = S3Options { buckets: vec!["test".to_owned()], fsync: false, ..S3Options::default() };
        let s3 = TestS3::start_with(&dir.path().join("s3"), options).await.unwrap();
        std::fs::create_dir(dir.path().join("files")).unwrap();
        let web = HttpSource::start(&dir.path().join("files"), &dir.path().join("web.log")).await.unwrap();
        let store = connect(&s3).await;
        let layout = StoreLayout::new("p").unwrap();
        let chunks = ChunkStore::open_or_create(store, layout, ChunkSize::DEFAULT).await.unwrap();
        Self { dir, s3, web, chunks }
    }

    /// Another image store in the same bucket.
    pub async fn other_store(&self, prefix: &str) -> ChunkStore<S3Store> {
        let layout = StoreLayout::new(prefix).unwrap();
        ChunkStore::open_or_create(connect(&self.s3).await, layout, ChunkSize::DEFAULT).await.unwrap()
    }

    /// A path below the directory that the web server serves.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("files").join(name)
    }

    pub fn origin(&self, switch: &str, file: &str, stall: Duration) -> Origin {
        let config = HttpConfig {
            url: self.web.url(switch, file),
            headers: Vec::new(),
            ca_bundle: None,
            addresses: AddressPolicy::default(),
            stall,
        };
        Origin::Remote(WebSource::new(config).unwrap().into())
    }

    /// Everything in the store but its description.
    pub async fn keys(&self) -> Vec<String> {
        let (mut keys, mut after) = (Vec::new(), None);
        loop {
            let page = self.chunks.store().list("p/", after.as_deref()).await.unwrap();
            keys.extend(page.objects.iter().map(|object| object.key.clone()));
            after = keys.last().cloned();
            if !page.more {
                keys.retain(|key| key != "p/berth.json");
                return keys;
            }
        }
    }

    /// What an import is never to leave: sessions, and files in `dir`.
    pub async fn check_nothing_left(&self, work: &Work) {
        let sessions: Vec<_> =
            self.keys().await.into_iter().filter(|key| key.contains("/sessions/")).collect();
        assert_eq!(sessions, Vec::<String>::new());
        let files: Vec<_> =
            std::fs::read_dir(&work.job.dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files, Vec::<PathBuf>::new());
    }

    pub async fn check_nothing_published(&self) {
        let keys = self.keys().await;
        assert!(!keys.iter().any(|key| key.contains("/images/") || key.contains("/manifests/")), "{keys:?}");
    }

    /// The image as the store gives it back.
    pub async fn restore(&self, durable: &Durable) -> PathBuf {
        let reader = ImageReader::open(self.chunks.clone(), durable.digest).await.unwrap();
        reader.verify_index().await.unwrap();
        let path = self.dir.path().join("restored");
        let file = File::create(&path).unwrap();
        file.set_len(reader.virtual_size().0).unwrap();
        reader.restore(Arc::new(file), 0, |_| ()).await.unwrap();
        path
    }
}

async fn connect(s3: &TestS3) -> S3Store {
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
    S3Store::connect(config).await.unwrap()
}

/// One import on one node.
pub struct Work {
    pub job: TransferJob,
    pub record: Arc<NodeRecord>,
    pub told: Arc<Told>,
}

impl Work {
    /// Of the import `name`, placed for the first time on a node with nothing.
    pub fn new(bed: &Bed, name: &str) -> Self {
        Self::on(bed, name, "node-a", 1)
    }

    pub fn on(bed: &Bed, name: &str, node: &str, generation: u64) -> Self {
        let dir = bed.dir.path().join(format!("work-{name}-{node}"));
        std::fs::create_dir_all(&dir).unwrap();
        let node = NodeName::from(node);
        let record = bed.dir.path().join(format!("{name}-{node}.redb"));
        let record = Arc::new(NodeRecord::create(&record, &node).unwrap());
        let limits = Limits {
            virtual_size: Bytes::gib(2),
            bytes: Bytes::gib(1),
            stall: Duration::from_secs(20),
            retries: 3,
            conversion_window: Bytes::mib(16),
        };
        let job = TransferJob {
            uid: Uid(format!("uid-{name}")),
            generation: Generation(generation),
            name: ObjectName::new("ns", name),
            node,
            limits,
            format: None,
            checksum: None,
            dir,
            promised: Bytes::gib(4),
        };
        Self { job, record, told: Arc::default() }
    }

    /// As after a restart: with nothing but what is on disk.
    pub fn journal(&self) -> Journal {
        Journal::new(Arc::clone(&self.record), self.job.uid.clone(), self.job.generation)
    }

    pub async fn run(&self, bed: &Bed, origin: &Origin) -> Result<Durable, TransferError> {
        self.run_until(bed, origin, &CancellationToken::new()).await
    }

    pub async fn run_until(
        &self,
        bed: &Bed,
        origin: &Origin,
        cancel: &CancellationToken,
    ) -> Result<Durable, TransferError> {
        self.read_until(bed, &Source::Staged(origin.clone()), cancel).await
    }

    pub async fn read_until(
        &self,
        bed: &Bed,
        source: &Source,
        cancel: &CancellationToken,
    ) -> Result<Durable, TransferError> {
        let reporter: Arc<dyn Reporter> = Arc::clone(&self.told) as _;
        let journal = self.journal();
        let work = import(&self.job, source, &bed.chunks, &journal, &reporter, &*self.told, cancel);
        tokio::time::timeout(Duration::from_secs(240), work).await.expect("an import ends")
    }

    pub async fn abandon(&self, bed: &Bed, published: bool) {
        abandon(&self.job, &bed.chunks, &self.journal(), published).await.unwrap();
        assert!(self.record.job(&self.job.uid).unwrap().is_none());
    }
}

pub type Happening = Box<dyn FnOnce() + Send>;

/// Stops an import once it has done so many bytes of whatever stages, so that where it is stopped does not depend on how
/// fast the machine is.
pub struct Fuse {
    left: u64,
    seen: Option<Snapshot>,
    cancel: CancellationToken,
}

impl Fuse {
    pub fn new(bytes: u64, cancel: &CancellationToken) -> Self {
        Self { left: bytes, seen: None, cancel: cancel.clone() }
    }

    fn burn(&mut self, now: Snapshot) {
        // What was done before in the same stage is not done now.
        let before = self.seen.filter(|seen| seen.stage == now.stage).map_or(now.done, |seen| seen.done);
        self.left = self.left.saturating_sub(now.done.saturating_sub(before).0);
        self.seen = Some(now);
        if self.left == 0 {
            self.cancel.cancel();
        }
    }
}

/// What was told, with what must always hold of it.
#[derive(Default)]
pub struct Told {
    pub said: Mutex<Said>,
    pub stages: Mutex<Vec<Stage>>,
    pub attempts: AtomicU32,
    pub errors: Mutex<Vec<String>>,
    pub reasons: Mutex<Vec<Reason>>,
    /// Whom to stop when this stage is told of.
    pub stop_at: Mutex<Option<(Stage, CancellationToken)>>,
    /// Whom to stop once so much more is done.
    pub fuse: Mutex<Option<Fuse>>,
    /// What is to happen once when this stage is told of.
    pub happens_at: Mutex<Option<(Stage, Happening)>>,
}

impl Reporter for Told {
    fn progress(&self, shape: &Shape, now: Snapshot) {
        assert!(now.done <= now.total || now.total == Bytes::ZERO, "{now:?}");
        let mut stages = self.stages.lock().unwrap();
        if stages.last() != Some(&now.stage) {
            stages.push(now.stage);
        }
        if let Some((stage, cancel)) = &*self.stop_at.lock().unwrap()
            && *stage == now.stage
        {
            cancel.cancel();
        }
        if let Some(fuse) = &mut *self.fuse.lock().unwrap() {
            fuse.burn(now);
        }
        let mut happens = self.happens_at.lock().unwrap();
        if happens.as_ref().is_some_and(|(stage, _)| *stage == now.stage) {
            happens.take().unwrap().1();
        }
        let mut said = self.said.lock().unwrap();
        let percent = shape.percent(now.stage, now.done, now.total);
        if let Some(next) = said.next(percent, now.stage, Timestamp(u64::MAX)) {
            assert!(next.percent >= said.percent && next.percent < 100);
            *said = Said { at: None, ..next };
        }
    }
}

impl Observer for Told {
    fn attempt(&self, _: u32) {
        self.attempts.fetch_add(1, Ordering::Relaxed);
    }

    fn retrying(&self, error: &TransferError, _: Duration) {
        self.errors.lock().unwrap().push(error.chain());
        self.reasons.lock().unwrap().push(error.reason());
    }
}

/// A raw image of `size` MiB whose `data` ranges, in MiB, hold bytes that cannot be compressed; the rest are holes.
pub fn raw_image(path: &Path, size: u64, data: &[std::ops::Range<u64>]) {
    let file = File::create(path).unwrap();
    file.set_len(size * MIB).unwrap();
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut piece = vec![0; usize::try_from(MIB).unwrap()];
    for at in data.iter().cloned().flatten() {
        for word in piece.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all_at(&piece, at * MIB).unwrap();
    }
}

pub fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn sum(path: &Path) -> Sha256Sum {
    Sha256Sum::of(&std::fs::read(path).unwrap())
}

/// True if two files have the same bytes, but for zeros at the end of one of them.
pub fn same_disk(one: &Path, other: &Path) -> bool {
    let (one, other) = (std::fs::read(one).unwrap(), std::fs::read(other).unwrap());
    let common = one.len().min(other.len());
    one[..common] == other[..common] && one[common..].iter().chain(&other[common..]).all(|byte| *byte == 0)
}
