//! Images that volumes start from while they are still in their image store: with a store server under a supervisor of its
//! own, both killed, the pool let go and opened again, and the store taken away at last.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_core::hydration::Progress;
use berth_core::ids::{Digest, Uid};
use berth_core::node::Origin;
use berth_core::reason::Reason;
use berth_core::units::{Bytes, Timestamp};
use berth_device::nbd::{self, Attachment, Nbd};
use berth_device::thin::{self, DirectBuffer};
use berth_node::agent::pools::{OpenPool, Pools};
use berth_node::agent::volumes;
use berth_node::area::lazy::{Advanced, Lazy, Source};
use berth_node::supervisor::DataPlane;
use berth_node::supervisor::client::Client;
use berth_node::supervisor::stores::{KeyPair, StoreAccess, StoreServerSpec};
use berth_objectstore::s3::Secret;
use berth_record::{ImageState, LocalState, PromiseClass, tables};
use berth_testkit::s3::fault::{FaultAction, FaultRule};
use tempfile::TempDir;

use super::bed::{Bed, MIB, Work, raw_image, same_disk};
use super::{Bench, FIRST, destroy, forget, holder, name, promise, remove_image, spec_on, switch_off, used};

/// How long anything may take that takes a moment on an idle machine.
const SOON: Duration = Duration::from_secs(120);
/// A chunk for every hour or so.
const SLOW: Option<Bytes> = Some(Bytes(64));
/// The chunks of the image: 6 MiB that are no holes in chunks of 256 KiB, and its end, which is too short for a hole.
const CHUNKS: usize = 25;

/// Everything that a node and a store are.
struct Stage {
    bed: Bed,
    disk: PathBuf,
    digest: Digest,
    real: Bytes,
    size: Bytes,
    /// How many requests the import made.
    before: usize,
    supervisor: Option<Child>,
}

impl Stage {
    /// `None`, with the reason printed, where this machine cannot run the test.
    async fn new(test: &str) -> Option<Self> {
        thin::load_for_templates();
        let missing = [thin::missing_for_templates(), nbd::missing()].concat();
        if !missing.is_empty() {
            println!("SKIPPED {test}: {}", missing.join("; "));
            return None;
        }
        let bed = Bed::new().await;
        let disk = bed.file("disk");
        raw_image(&disk, 24, &[0..1, 2..4, 10..11, 20..22]);
        // Its end is no end of a region.
        OpenOptions::new().write(true).open(&disk).unwrap().set_len(24 * MIB + 20 * 1024).unwrap();
        let work = Work::new(&bed, "image");
        let origin = bed.origin("plain", "disk", Duration::from_secs(60));
        let made = work.run(&bed, &origin).await.unwrap_or_else(|error| panic!("{}", error.chain()));
        let size = Bytes(fs::metadata(&disk).unwrap().len());
        let before = bed.s3.log().unwrap().entries().len();
        let (digest, real) = (made.digest, made.real_size);
        let mut stage = Self { bed, disk, digest, real, size, before, supervisor: None };
        stage.start_supervisor();
        Some(stage)
    }

    fn dir(&self) -> &TempDir {
        &self.bed.dir
    }

    fn socket(&self) -> PathBuf {
        self.dir().path().join("run/supervisor.sock")
    }

    fn start_supervisor(&mut self) {
        let mut program = Command::new(env!("CARGO_BIN_EXE_berth-node"));
        program.arg("supervise").arg("--socket").arg(self.socket());
        program.arg("--run-dir").arg(self.dir().path().join("run")).env("RUST_LOG", "info");
        self.supervisor = Some(program.spawn().unwrap());
        wait_until("the supervisor answers", || Client::new(&self.socket()).hello().is_ok());
    }

    fn kill_supervisor(&mut self) {
        let mut killed = self.supervisor.take().expect("one that runs");
        killed.kill().unwrap();
        killed.wait().unwrap();
    }

    fn pools(&self) -> Pools {
        let dir = self.dir().path();
        Pools::new("n1".into(), dir.join("mnt"), dir).with_data_plane(DataPlane::supervised(&self.socket()))
    }

    fn open(&self, bench: &Bench) -> (Pools, Arc<OpenPool>) {
        let pools = self.pools();
        pools.prepare(&name(), &spec_on(&bench.disk)).unwrap();
        let pool = pools.get(&name()).unwrap();
        (pools, pool)
    }

    fn source(&self, pool: &OpenPool, rate: Option<Bytes>) -> Source {
        let s3 = &self.bed.s3;
        let access = StoreAccess {
            endpoint: Some(s3.endpoint()),
            region: "us-east-1".to_owned(),
            bucket: "test".to_owned(),
            prefix: "p".to_owned(),
            virtual_host: false,
            ca_bundle: None,
            keys: Some(KeyPair {
                access_key_id: s3.access_key().to_owned(),
                secret_key: Secret::new(s3.secret_key()),
                session_token: None,
            }),
        };
        let id = lazy(pool).source_id(&self.digest);
        let server = StoreServerSpec { id, digest: self.digest, size: self.size, data: self.real, access };
        Source { server, rate }
    }

    /// As the agent begins to show an image.
    fn begin(&self, pool: &OpenPool, image: &Uid, rate: Option<Bytes>) -> Source {
        assert_eq!(lazy(pool).missing(), [""; 0]);
        promise(pool, image, PromiseClass::Images, lazy(pool).charge(self.real, self.size));
        pool.record.begin_fill(&self.digest, image, self.size, self.real, Timestamp(1)).unwrap();
        let source = self.source(pool, rate);
        assert!(lazy(pool).begin(&pool.record, &self.digest, &source, Bytes::kib(256)).unwrap());
        source
    }

    fn advance(&self, pool: &OpenPool, source: Option<&Source>) -> Advanced {
        lazy(pool).advance(&pool.record, &self.digest, source).unwrap()
    }

    fn progress(&self, pool: &OpenPool, source: &Source) -> Progress {
        match self.advance(pool, Some(source)) {
            Advanced::Hydrating(progress) => progress,
            other => panic!("{other:?}"),
        }
    }

    fn await_local(&self, pool: &OpenPool, source: &Source) {
        wait_until("all of it is here", || match self.advance(pool, Some(source)) {
            Advanced::Local => true,
            Advanced::Hydrating(_) => {
                std::thread::sleep(Duration::from_millis(200));
                false
            }
            other => panic!("{other:?}"),
        });
    }

    /// How often each chunk was asked for since the import.
    fn asked(&self) -> BTreeMap<String, usize> {
        let mut asked = BTreeMap::new();
        for entry in self.bed.s3.log().unwrap().entries().iter().skip(self.before).cloned() {
            if entry.op == "GetObject" && entry.key.contains("/chunks/") {
                *asked.entry(entry.key).or_default() += 1;
            }
        }
        asked
    }

    fn reason(&self, pools: &Pools, pool: &OpenPool) -> Option<Reason> {
        let id = lazy(pool).source_id(&self.digest);
        let lines = pools.data_plane().servers().list().unwrap();
        let line = lines.into_iter().find(|line| line.id == id)?;
        Some(line.store?.trouble()?.0)
    }

    /// Takes everything down, and looks for what should not be there.
    fn end(mut self, pools: Pools, pool: Arc<OpenPool>, image: &Uid, volumes: &[Uid], bench: &Bench) {
        for uid in volumes {
            volumes::remove(&pool, uid).unwrap();
            pool.released(uid, FIRST).unwrap();
        }
        remove_image(&pool, &self.digest);
        pool.released(image, FIRST).unwrap();
        assert_eq!(used(&pool), (Bytes::ZERO, Bytes::ZERO), "every block was given back");
        assert_eq!(pool.record.record().entries(tables::THIN).unwrap(), []);
        assert_eq!(pools.data_plane().servers().list().unwrap(), []);
        assert_eq!(Attachment::list(&mut Nbd::open().unwrap()).unwrap(), []);
        assert_eq!(servers(), [0; 0]);
        destroy(pool, pools);
        bench.assert_nothing_is_left();
        self.kill_supervisor();
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.supervisor.is_some() {
            self.kill_supervisor();
        }
    }
}

fn lazy(pool: &OpenPool) -> &dyn Lazy {
    pool.area.lazy().expect("a pool of thin devices")
}

fn wait_until(what: &str, mut test: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !test() {
        assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The processes that serve image stores.
fn servers() -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if words.split(|byte| *byte == 0).any(|word| word == b"serve-store") {
            found.push(process);
        }
    }
    found
}

fn kill(process: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(process), nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// Reads past memory, as a machine does that starts.
fn read(device: &Path, at: u64, length: usize) -> Vec<u8> {
    let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(device).unwrap();
    let mut buffer = DirectBuffer::new(length);
    file.read_exact_at(&mut buffer, at).unwrap();
    buffer.to_vec()
}

fn make_clone(pool: &OpenPool, uid: &Uid, digest: &Digest) -> PathBuf {
    promise(pool, uid, PromiseClass::Volumes, Bytes::mib(64));
    volumes::make(pool, uid, FIRST, Bytes::mib(64), &Origin::Image(*digest), &BTreeMap::new()).unwrap();
    pool.area.volume(uid)
}

/// A range of the disk and of the volume is the same.
fn same_at(stage: &Stage, volume: &Path, at: u64, length: usize) {
    let mut wanted = vec![0; length];
    fs::File::open(&stage.disk).unwrap().read_exact_at(&mut wanted, at).unwrap();
    assert!(read(volume, at, length) == wanted, "{length} bytes at {at} of {}", volume.display());
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_start_while_their_image_is_in_its_store_and_each_chunk_is_fetched_once() {
    let test = "volumes_start_while_their_image_is_in_its_store_and_each_chunk_is_fetched_once";
    let Some(bench) = Bench::new(test) else { return };
    let Some(stage) = Stage::new(test).await else { return };
    tokio::task::block_in_place(move || {
        let (pools, pool) = stage.open(&bench);
        let (image, clones) = (holder(2), [3, 4, 5, 6].map(holder));
        let source = stage.begin(&pool, &image, SLOW);
        let before = stage.progress(&pool, &source);
        let devices: Vec<_> = clones.iter().map(|uid| make_clone(&pool, uid, &stage.digest)).collect();
        same_at(&stage, &devices[0], 0, 4096);
        let few = stage.asked().len();
        assert!(few <= CHUNKS * 3 / 4, "{few} chunks of {CHUNKS} were asked for, {before:?}");
        assert_eq!(used(&pool).1, Bytes::ZERO, "nothing is copied");

        // All of them boot at once.
        std::thread::scope(|scope| {
            for device in &devices {
                scope.spawn(|| {
                    for at in [2, 20, 10, 3, 23] {
                        same_at(&stage, device, at * MIB, 1 << 20);
                    }
                });
            }
        });
        let quick = Source { rate: None, ..source };
        stage.await_local(&pool, &quick);
        let asked = stage.asked();
        assert_eq!(asked.len(), CHUNKS, "each chunk was asked for");
        assert!(asked.values().all(|times| *times == 1), "and once: {asked:?}");
        let held = pool.record.record().get(tables::IMAGES, &stage.digest).unwrap().unwrap();
        assert!(matches!(held.state, ImageState::Shown { local: LocalState::Local, .. }), "{held:?}");
        assert!(lazy(&pool).is_settled(&pool.record, &stage.digest).unwrap());
        assert_eq!(used(&pool).0, stage.real.round_up(Bytes::kib(64)), "no more than is promised");
        assert_eq!((servers(), pools.data_plane().servers().list().unwrap()), (vec![], vec![]));
        for device in &devices {
            assert!(same_disk(device, &stage.disk));
        }
        stage.end(pools, pool, &image, &clones, &bench);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_wrong_whoever_is_killed_and_nothing_is_needed_once_it_is_local() {
    let test = "nothing_is_wrong_whoever_is_killed_and_nothing_is_needed_once_it_is_local";
    let Some(bench) = Bench::new(test) else { return };
    let Some(mut stage) = Stage::new(test).await else { return };
    tokio::task::block_in_place(move || {
        let (pools, pool) = stage.open(&bench);
        let (image, clone) = (holder(2), holder(3));
        let source = stage.begin(&pool, &image, SLOW);
        stage.progress(&pool, &source);
        let device = make_clone(&pool, &clone, &stage.digest);
        same_at(&stage, &device, 2 * MIB, 1 << 20);
        let written = OpenOptions::new().write(true).open(&device).unwrap();
        for file in [&written, &OpenOptions::new().write(true).open(&stage.disk).unwrap()] {
            file.write_all_at(&[9; 4096], 10 * MIB + 512).unwrap();
            file.sync_all().unwrap();
        }
        drop(written);

        // The server: reads wait for the next one.
        let first = servers();
        first.iter().copied().for_each(kill);
        same_at(&stage, &device, 3 * MIB, 1 << 20);
        wait_until("another one runs", || servers().iter().any(|server| !first.contains(server)));
        same_at(&stage, &device, 21 * MIB, 4096);
        // The supervisor, and the server while it is away.
        stage.kill_supervisor();
        same_at(&stage, &device, 20 * MIB, 4096);
        servers().into_iter().for_each(kill);
        stage.start_supervisor();
        same_at(&stage, &device, 20 * MIB, 1 << 20);
        // The agent.
        forget(pool, pools);
        let pools = stage.pools();
        pools.reopen_known().unwrap();
        let pool = pools.get(&name()).unwrap();
        assert!(pool.area.has_volume(&clone));
        same_at(&stage, &device, 10 * MIB, 1 << 20);
        pool.area.require_unused(&pool.record, &stage.digest).expect_err("a volume reads from it");

        // The machine: what is not here needs the store again.
        let before = stage.progress(&pool, &stage.source(&pool, SLOW));
        assert!(before.hydrated > 0 && !before.is_complete(), "{before:?}");
        switch_off(pool, pools);
        let pools = stage.pools();
        pools.reopen_known().unwrap();
        let pool = pools.get(&name()).unwrap();
        assert!(!pool.area.has_volume(&clone), "it waits for its image");
        assert_eq!(stage.advance(&pool, None), Advanced::SourceNeeded);
        let source = stage.source(&pool, SLOW);
        let after = stage.progress(&pool, &source);
        assert!(after.hydrated >= before.hydrated, "{before:?}, then {after:?}");
        pool.area.start(&pool.record).unwrap();
        assert!(pool.area.has_volume(&clone));
        same_at(&stage, &device, 0, 1 << 20);

        let quick = Source { rate: None, ..source };
        stage.await_local(&pool, &quick);
        // The store is not needed any more, whatever happens to it.
        stage.bed.s3.set_faults(&[FaultRule::new(FaultAction::SlowDown)]).unwrap();
        assert!(same_disk(&device, &stage.disk));
        switch_off(pool, pools);
        let pools = stage.pools();
        pools.reopen_known().unwrap();
        let pool = pools.get(&name()).unwrap();
        assert_eq!(stage.advance(&pool, None), Advanced::Local);
        assert!(same_disk(&device, &stage.disk));
        stage.end(pools, pool, &image, &[clone], &bench);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_or_lies_is_said_to_and_no_wrong_byte_is_read() {
    let test = "a_store_that_is_away_or_lies_is_said_to_and_no_wrong_byte_is_read";
    let Some(bench) = Bench::new(test) else { return };
    let Some(stage) = Stage::new(test).await else { return };
    tokio::task::block_in_place(move || {
        let (pools, pool) = stage.open(&bench);
        let (image, clone) = (holder(2), holder(3));
        let source = stage.begin(&pool, &image, SLOW);
        stage.progress(&pool, &source);
        let device = make_clone(&pool, &clone, &stage.digest);
        same_at(&stage, &device, 0, 4096);

        // Away: reads wait.
        let chunks = |action| FaultRule::new(action).op("GetObject").key_prefix("p/chunks/");
        stage.bed.s3.set_faults(&[chunks(FaultAction::SlowDown)]).unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| same_at(&stage, &device, 20 * MIB, 4096));
            wait_until("it is said to be away", || {
                stage.reason(&pools, &pool) == Some(Reason::ObjectStoreUnavailable)
            });
            assert!(!reader.is_finished());
            stage.bed.s3.set_faults(&[]).unwrap();
            reader.join().unwrap();
        });
        wait_until("it is said to be there", || stage.reason(&pools, &pool).is_none());

        // Wrong: reads fail, and are right once it is.
        stage.bed.s3.set_faults(&[chunks(FaultAction::Corrupt { at: 100 })]).unwrap();
        let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(&device).unwrap();
        let mut buffer = DirectBuffer::new(4096);
        file.read_exact_at(&mut buffer, 10 * MIB).expect_err("a wrong byte");
        drop(file);
        wait_until("it is said to be damaged", || stage.reason(&pools, &pool) == Some(Reason::ChunkDamaged));
        stage.bed.s3.set_faults(&[]).unwrap();
        same_at(&stage, &device, 10 * MIB, 4096);
        wait_until("it is said to be well", || stage.reason(&pools, &pool).is_none());
        let quick = Source { rate: None, ..source };
        stage.await_local(&pool, &quick);
        assert!(same_disk(&device, &stage.disk));
        stage.end(pools, pool, &image, &[clone], &bench);
    });
}
