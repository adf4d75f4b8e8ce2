//! Images that are served: reads anywhere, by many, of stores that fail.

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use futures::future::{BoxFuture, join_all};

use super::*;
use crate::chunks::remote::{
    Extent, Health, OpenRemoteError, Piece, Reading, RemoteConfig, RemoteError, RemoteImage, Sink,
};

fn config() -> RemoteConfig {
    let (patience, attempt) = (Duration::from_secs(20), Duration::from_secs(5));
    RemoteConfig { memory: Size::mib(64), patience, attempt, sink: None }
}

/// An image store with one image in it.
struct Bed {
    store: MemoryStore,
    chunks: ChunkStore<MemoryStore>,
    digest: Digest,
    content: Vec<u8>,
    _dir: tempfile::TempDir,
}

impl Bed {
    async fn new(content: Vec<u8>) -> Self {
        let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
        let chunks = open(&store).await;
        let done = upload(&chunks, &dir.path().join("a"), &content).await;
        chunks.put_index(&done).await.unwrap();
        store.clear_log();
        Self { store, chunks, digest: done.digest, content, _dir: dir }
    }

    async fn serve(&self, config: RemoteConfig) -> RemoteImage<MemoryStore> {
        RemoteImage::open(self.chunks.clone(), self.digest, config).await.unwrap()
    }

    /// How often each chunk was asked for.
    fn asked(&self) -> BTreeMap<String, usize> {
        let mut asked = BTreeMap::new();
        for request in self.store.log().into_iter().filter(|request| request.key.contains("/chunks/")) {
            *asked.entry(request.key).or_default() += 1;
        }
        asked
    }

    fn key(&self, seed: u8) -> String {
        self.chunks.layout().chunk(&ChunkId::of(&chunk(seed, C)))
    }
}

fn bytes(reading: &Reading) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in &reading.pieces {
        match piece {
            Piece::Data(data) => bytes.extend_from_slice(data),
            Piece::Zero(len) => bytes.resize(bytes.len() + usize::try_from(len.0).unwrap(), 0),
        }
    }
    bytes
}

/// Noise without zero chunks, of `count` different ones.
fn noise(count: usize) -> Vec<u8> {
    (0..count)
        .flat_map(|number| {
            let mut chunk = chunk(u8::try_from(number % 200 + 1).unwrap(), C).to_vec();
            chunk[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
            chunk
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_range_and_every_extent_is_that_of_the_image() {
    let bed = Bed::new(image(&[1, 0, 0, 0, 2, 3, 3, 0, 4, 0], 777)).await;
    let served = bed.serve(config()).await;
    assert_eq!(served.virtual_size(), Size(bed.content.len() as u64));
    assert_eq!(served.data_size(), Size(5 * C as u64 + 777));
    let mut state = 7_u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % below
    };
    for _ in 0..500 {
        let from = next(bed.content.len());
        let len = next(bed.content.len() - from + 1);
        let read = served.read(from as u64, Size(len as u64)).await.unwrap();
        assert!(bytes(&read) == bed.content[from..from + len], "{len} at {from}");
        let extents = served.extents(from as u64, Size(len as u64), 100).await.unwrap();
        assert_eq!(extents.iter().map(|extent| extent.len.0).sum::<u64>(), len as u64);
        assert!(extents.windows(2).all(|pair| pair[0].zero != pair[1].zero), "{extents:?}");
        let mut at = from;
        for extent in extents {
            let end = at + usize::try_from(extent.len.0).unwrap();
            assert!(!extent.zero || bed.content[at..end].iter().all(|byte| *byte == 0));
            at = end;
        }
    }
    let one = served.extents(C as u64, Size(4 * C as u64), 1).await.unwrap();
    assert_eq!(one, [Extent { len: Size(3 * C as u64), zero: true }]);
    let size = bed.content.len() as u64;
    for (offset, len) in [(0, size + 1), (size, 1), (u64::MAX, 2)] {
        let read = served.read(offset, Size(len)).await;
        assert!(matches!(read, Err(RemoteError::Range { .. })), "{read:?}");
    }
    assert_eq!(served.health(), Health::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_readers_ask_for_each_chunk_once_and_never_for_zeros() {
    let mut content = noise(40);
    content.extend(vec![0; 8 * C]);
    let bed = Bed::new(content).await;
    bed.store.delay(Duration::from_millis(3));
    let served = bed.serve(config()).await;
    let readers = (0..20).map(|_| async {
        for at in (0..bed.content.len()).step_by(C / 2) {
            let read = served.read(at as u64, Size(C as u64 / 2)).await.unwrap();
            assert!(bytes(&read) == bed.content[at..at + C / 2], "at {at}");
        }
    });
    join_all(readers).await;
    let asked = bed.asked();
    assert_eq!(asked.len(), 40, "no zeros");
    assert!(asked.values().all(|times| *times == 1), "{asked:?}");
    let counted = served.counted();
    assert_eq!((counted.chunks_fetched, counted.reads), (40, 20 * 96));
    assert!(counted.chunks_ahead >= 10, "readers that go through an image are read ahead of: {counted:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_chunks_fail_at_once_by_name_and_nothing_else_does() {
    let bed = Bed::new(image(&[1, 2, 3], 0)).await;
    let served = bed.serve(config()).await;
    let good = bed.store.bytes(&bed.key(2)).unwrap();
    let id = ChunkId::of(&chunk(2, C)).to_string();
    let other = bed.store.bytes(&bed.key(3)).unwrap();
    let bomb = Bytes::from(zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap());
    for bad in [Some(other), Some(bomb), Some(Bytes::from(vec![0; 1 << 20])), None] {
        match &bad {
            Some(bad) => bed.store.set(&bed.key(2), bad.clone()),
            None => assert!(bed.store.remove(&bed.key(2))),
        }
        let begun = Instant::now();
        let read = served.read(10, Size(2 * C as u64)).await;
        let health = served.health();
        if bad.is_some() {
            assert!(matches!(read, Err(RemoteError::Damaged { .. })), "{read:?}");
            assert_eq!(health, Health::Damaged { chunk: id.clone() });
        } else {
            assert!(matches!(read, Err(RemoteError::Missing { .. })), "{read:?}");
            assert_eq!(health, Health::Missing { chunk: id.clone() });
        }
        assert!(begun.elapsed() < Duration::from_secs(2), "it was waited for");
        let last = served.read(2 * C as u64, Size(C as u64)).await.unwrap();
        assert!(bytes(&last) == bed.content[2 * C..]);
    }
    bed.store.set(&bed.key(2), good);
    assert!(bytes(&served.read(0, Size(3 * C as u64)).await.unwrap()) == bed.content);
    assert_eq!(served.health(), Health::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_changes_while_it_is_served_is_noticed() {
    let bed = Bed::new(image(&[1, 2, 3], 0)).await;
    let served = bed.serve(config()).await;
    let key = bed.chunks.layout().image(&bed.digest);
    let good = bed.store.bytes(&key).unwrap();
    // The ids of two chunks that are there, exchanged.
    let mut wrong = good.to_vec();
    let id = |at: usize| caibx::HEAD + at * caibx::ITEM + 8..caibx::HEAD + (at + 1) * caibx::ITEM;
    wrong[id(0)].copy_from_slice(&good[id(1)]);
    wrong[id(1)].copy_from_slice(&good[id(0)]);
    for bad in [Some(Bytes::from(wrong)), Some(good.slice(..good.len() - 50)), None] {
        match bad {
            Some(bad) => bed.store.set(&key, bad),
            None => assert!(bed.store.remove(&key)),
        }
        let read = served.read(0, Size(9)).await;
        assert!(matches!(read, Err(RemoteError::IndexDamaged { page: 0, .. })), "{read:?}");
        assert_eq!(served.health(), Health::IndexDamaged);
    }
    bed.store.set(&key, good);
    assert!(bytes(&served.read(0, Size(9)).await.unwrap()) == bed.content[..9]);
    assert_eq!(served.health(), Health::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_is_refused_when_it_is_opened() {
    let bed = Bed::new(image(&[1, 2, 3], 0)).await;
    let open = || async { RemoteImage::open(bed.chunks.clone(), bed.digest, config()).await.err().unwrap() };
    let little = RemoteConfig { memory: Size::mib(32), ..config() };
    let refused = RemoteImage::open(bed.chunks.clone(), bed.digest, little).await.err().unwrap();
    assert!(matches!(refused, OpenRemoteError::Memory { .. }), "{refused}");
    let key = bed.chunks.layout().image(&bed.digest);
    let good = bed.store.bytes(&key).unwrap();
    let mut wrong = good.to_vec();
    wrong[caibx::HEAD + 9] ^= 1;
    bed.store.set(&key, wrong);
    assert!(matches!(open().await, OpenRemoteError::WrongIndex { .. }));
    let mut wrong = good.to_vec();
    wrong[caibx::HEAD..caibx::HEAD + 8].copy_from_slice(&1_u64.to_le_bytes());
    bed.store.set(&key, wrong);
    assert!(matches!(open().await, OpenRemoteError::Index { .. }));
    bed.store.set(&key, good.slice(..100));
    assert!(matches!(open().await, OpenRemoteError::Index { .. }));
    bed.store.remove(&key);
    assert!(matches!(open().await, OpenRemoteError::NotFound { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_is_waited_for_until_patience_ends() {
    let bed = Bed::new(image(&[1, 2], 0)).await;
    let served = bed.serve(config()).await;
    for _ in 0..3 {
        bed.store.break_next("get", "/chunks/", Fault::Fail);
    }
    assert!(bytes(&served.read(0, Size(C as u64)).await.unwrap()) == bed.content[..C]);
    assert_eq!((served.counted().retries, served.health()), (3, Health::Ok));

    let impatient = RemoteConfig {
        patience: Duration::from_millis(900),
        attempt: Duration::from_millis(200),
        ..config()
    };
    let served = bed.serve(impatient).await;
    served.extents(0, Size(1), 1).await.unwrap();
    bed.store.delay(Duration::from_secs(1));
    let begun = Instant::now();
    let read = served.read(0, Size(2 * C as u64)).await;
    assert!(
        matches!(&read, Err(RemoteError::Unavailable { said, .. }) if said.contains("in time") || said.contains("no answer")),
        "{read:?}"
    );
    let took = begun.elapsed();
    assert!((Duration::from_millis(600)..Duration::from_secs(4)).contains(&took), "{took:?}");
    assert!(matches!(served.health(), Health::Stalled { .. }), "{:?}", served.health());
    bed.store.delay(Duration::ZERO);
    assert!(bytes(&served.read(0, Size(2 * C as u64)).await.unwrap()) == bed.content);
    assert_eq!(served.health(), Health::Ok);
}

/// Keeps what it is told, and fails as often as it is to.
#[derive(Default)]
struct Kept {
    told: Mutex<Vec<(u64, Bytes)>>,
    failures: Mutex<u32>,
    /// While it is `Some(true)`, nothing is kept yet.
    shut: Option<tokio::sync::watch::Receiver<bool>>,
}

impl Sink for Kept {
    fn arrived(&self, offset: u64, data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            if let Some(shut) = &self.shut {
                shut.clone().wait_for(|shut| !shut).await.unwrap();
            }
            let mut failures = self.failures.lock().unwrap();
            if *failures > 0 {
                *failures -= 1;
                return Err(io::Error::other("full"));
            }
            self.told.lock().unwrap().push((offset, data));
            Ok(())
        })
    }
}

impl Kept {
    fn check(&self, content: &[u8]) {
        let mut told = self.told.lock().unwrap().clone();
        told.sort_by_key(|(offset, _)| *offset);
        let places: Vec<u64> = told.iter().map(|(offset, _)| *offset).collect();
        let data = |at: &usize| content[*at..content.len().min(at + C)].iter().any(|byte| *byte != 0);
        let wanted: Vec<u64> = (0..content.len()).step_by(C).filter(data).map(|at| at as u64).collect();
        assert_eq!(places, wanted, "each place of data once");
        for (offset, data) in told {
            let at = usize::try_from(offset).unwrap();
            assert!(data == content[at..at + data.len()], "at {offset}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sink_is_told_of_each_place_once_whoever_fetches_it() {
    let mut content = noise(30);
    content.extend(vec![0; 5 * C]);
    content.extend(image(&[1, 1, 2, 0, 1], 100));
    let bed = Bed::new(content).await;
    bed.store.delay(Duration::from_millis(2));
    let sink = Arc::new(Kept { failures: Mutex::new(3), ..Kept::default() });
    let served = bed.serve(RemoteConfig { sink: Some(Arc::clone(&sink) as _), ..config() }).await;
    let size = bed.content.len() as u64;
    let reader = async {
        for at in [3 * C, 20 * C, 36 * C, 35 * C, 4 * C] {
            let read = served.read(at as u64, Size(C as u64)).await.unwrap();
            assert!(bytes(&read) == bed.content[at..at + C]);
        }
    };
    let (first, ()) = tokio::join!(served.prefetch(0..size), reader);
    first.unwrap();
    // What the sink failed to keep is told of again.
    for _ in 0..3 {
        served.prefetch(0..size).await.unwrap();
    }
    sink.check(&bed.content);
    assert!(bed.asked().values().all(|times| *times == 1), "{:?}", bed.asked());
    let again = served.prefetch(0..size).await.unwrap();
    assert_eq!((again.chunks, again.transferred), (0, Size::ZERO), "all is told");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sink_is_told_again_of_what_was_given_up_and_readers_do_not_wait_for_it() {
    let bed = Bed::new(noise(6)).await;
    let (gate, shut) = tokio::sync::watch::channel(true);
    let sink = Arc::new(Kept { shut: Some(shut), ..Kept::default() });
    let served = bed.serve(RemoteConfig { sink: Some(Arc::clone(&sink) as _), ..config() }).await;
    let size = bed.content.len() as u64;
    let given_up = tokio::time::timeout(Duration::from_millis(300), served.prefetch(0..size)).await;
    assert!(given_up.is_err() && served.counted().chunks_fetched > 0);
    let read = tokio::time::timeout(Duration::from_secs(10), served.read(5 * C as u64, Size(10))).await;
    assert!(
        bytes(&read.expect("readers do not wait for the sink").unwrap()) == bed.content[5 * C..5 * C + 10]
    );
    assert!(sink.told.lock().unwrap().is_empty(), "it keeps nothing yet");
    gate.send(false).unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while sink.told.lock().unwrap().len() < 6 {
        assert!(Instant::now() < until, "{} of 6 are kept", sink.told.lock().unwrap().len());
        served.prefetch(0..size).await.unwrap();
    }
    sink.check(&bed.content);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_background_is_slow_pauses_and_passes_over_what_is_bad() {
    let bed = Bed::new(noise(24)).await;
    let served = bed.serve(config()).await;
    let size = bed.content.len() as u64;
    served.pause_background(true);
    let (one, all) = (served.clone(), served.clone());
    let going = tokio::spawn(async move { all.prefetch(0..size).await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(bed.asked().len(), 0, "it is paused");
    one.read(0, Size(10)).await.unwrap();
    assert_eq!(bed.asked().len(), 1, "reads are not");
    // 23 chunks of 64 KiB that do not compress, at 1 MiB/s: 1.4 s, less what is begun at once.
    let begun = Instant::now();
    served.set_background_rate(Some(Size::mib(1)));
    served.pause_background(false);
    let done = going.await.unwrap().unwrap();
    let took = begun.elapsed();
    assert!((Duration::from_millis(700)..Duration::from_secs(5)).contains(&took), "{took:?}");
    assert_eq!((done.chunks, done.bad), (24, 0), "that of the read is here already");
    assert!(bed.asked().values().all(|times| *times == 1));

    let bed = Bed::new(image(&[1, 2, 3], 0)).await;
    bed.store.remove(&bed.key(2));
    let served = bed.serve(config()).await;
    let done = served.prefetch(0..u64::MAX).await.unwrap();
    assert_eq!((done.chunks, done.bad), (2, 1));
    assert!(matches!(served.health(), Health::Missing { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_whose_fetch_was_given_up_fetch_themselves_and_all_end_with_the_server() {
    let bed = Bed::new(image(&[1, 2], 0)).await;
    let served = bed.serve(config()).await;
    served.extents(0, Size(1), 1).await.unwrap();
    bed.store.delay(Duration::from_millis(300));
    let background = served.clone();
    let fetching = tokio::spawn(async move { background.prefetch(0..C as u64).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let reader = served.clone();
    let reading = tokio::spawn(async move { reader.read(0, Size(C as u64)).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    fetching.abort();
    let read = reading.await.unwrap().unwrap();
    assert!(bytes(&read) == bed.content[..C], "whoever joined a fetch does not fail with it");
}
