//! The chunk store as a whole, on an object store in memory.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a test; noise is bytes of numbers

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use berth_core::ids::{ChunkId, Digest, NodeName, ObjectName, Sha256Sum, Uid};
use berth_core::units::{Bytes as Size, Generation, Timestamp};
use bytes::Bytes;
use proptest::prelude::*;

use super::caibx::{self, ChunkSize};
use super::read::{ImageReader, ReadError, Restored};
use super::session::{Session, SessionError, Writer};
use super::store::ChunkStore;
use super::upload::{ChunkUploader, FinishedIndex, UploadError, WINDOW};
use super::usage::usage;
use super::verify::{VerifyError, verify};
use super::zeros::zero_id;
use crate::layout::StoreLayout;
use crate::memory::{Fault, Lacks, MemoryStore};

mod reading;
mod remote;

const C: usize = 64 << 10;

async fn open(store: &MemoryStore) -> ChunkStore<MemoryStore> {
    let size = ChunkSize::new(Size(C as u64)).unwrap();
    ChunkStore::open_or_create(store.clone(), StoreLayout::new("p").unwrap(), size).await.unwrap()
}

fn writer(generation: u64, node: &str) -> Writer {
    Writer {
        uid: Uid::from("import-1"),
        generation: Generation(generation),
        node: NodeName::from(node),
        started: Timestamp(1),
    }
}

/// A chunk of noise that differs by `seed`; 0 is zeros.
fn chunk(seed: u8, len: usize) -> Bytes {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let byte = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(byte).collect()
}

fn image(seeds: &[u8], tail: usize) -> Vec<u8> {
    let mut image: Vec<u8> = seeds.iter().flat_map(|seed| chunk(*seed, C)).collect();
    image.extend(chunk(9, tail));
    image
}

async fn push(uploader: &mut ChunkUploader<MemoryStore>, image: &[u8]) -> Result<(), UploadError> {
    let from = usize::try_from(uploader.offset()).unwrap();
    for piece in image[from..].chunks(C) {
        uploader.push_data(Bytes::copy_from_slice(piece)).await?;
    }
    Ok(())
}

async fn upload(chunks: &ChunkStore<MemoryStore>, path: &Path, image: &[u8]) -> FinishedIndex {
    let mut uploader = ChunkUploader::new(chunks.clone(), Arc::default(), path).unwrap();
    push(&mut uploader, image).await.unwrap();
    uploader.finish().await.unwrap()
}

/// The canonical index, made the slow and obvious way.
fn naive_index(image: &[u8]) -> Vec<u8> {
    let mut index = caibx::encode_head(ChunkSize::new(Size(C as u64)).unwrap()).to_vec();
    let (mut at, mut items) = (0, 0);
    while at < image.len() {
        let zeros = image[at..].chunks_exact(C).take_while(|chunk| chunk.iter().all(|b| *b == 0)).count() * C;
        let len = if zeros == 0 { C.min(image.len() - at) } else { (64 << 20).min(1 << zeros.ilog2()) };
        let id = ChunkId::of(&image[at..at + len]);
        at += len;
        items += 1;
        index.extend(caibx::encode_item(at as u64, &id));
    }
    index.extend(caibx::encode_tail(items));
    index
}

async fn restore(
    chunks: &ChunkStore<MemoryStore>,
    digest: Digest,
    target: &Path,
) -> Result<Restored, ReadError> {
    let reader = ImageReader::open(chunks.clone(), digest).await?;
    let file = File::create(target).unwrap();
    file.set_len(reader.virtual_size().0).unwrap();
    reader.restore(Arc::new(file), 0, |_| ()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_comes_back_and_takes_only_what_is_new() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    let content = image(&[1, 0, 0, 0, 2, 1, 0], 1000);
    let done = upload(&chunks, &dir.path().join("a"), &content).await;
    assert_eq!(std::fs::read(&done.path).unwrap(), naive_index(&content));
    assert_eq!(done.virtual_size, Size(content.len() as u64));
    // Runs of three and one: zero chunks of two sizes; chunk 1 twice.
    assert_eq!((done.items, done.tally.chunks), (7, 5));
    assert_eq!(done.tally.data_bytes, Size(2 * C as u64 + 1000));
    assert_eq!((done.counters.chunks_new, done.counters.chunks_reused), (5, 2));
    assert_eq!(done.counters.bytes_zero, Size(4 * C as u64));
    let stored: u64 = store.keys("p/chunks/").iter().map(|key| store.bytes(key).unwrap().len() as u64).sum();
    assert_eq!((done.counters.bytes_on_wire, done.tally.stored_bytes), (Size(stored), Size(stored)));

    let verified = verify(&chunks, &done, |_| ()).await.unwrap();
    assert_eq!((verified.chunks, verified.read_back), (5, 0));
    chunks.put_index(&done).await.unwrap();
    let restored = restore(&chunks, done.digest, &dir.path().join("out")).await.unwrap();
    assert_eq!(std::fs::read(dir.path().join("out")).unwrap(), content);
    assert_eq!(
        (restored.bytes_written, restored.bytes_skipped),
        (Size(3 * C as u64 + 1000), Size(4 * C as u64))
    );
    assert_eq!(restored.chunks, 4, "zero chunks are never fetched");

    store.clear_log();
    let again = upload(&chunks, &dir.path().join("b"), &content).await;
    assert_eq!(
        (again.digest, again.counters.chunks_new, again.counters.bytes_on_wire),
        (done.digest, 0, Size(0))
    );
    assert!(store.log().iter().all(|request| request.op != "put"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_image_and_an_empty_tebibyte() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    let empty = upload(&chunks, &dir.path().join("a"), &[]).await;
    assert_eq!((empty.items, empty.virtual_size), (0, Size(0)));
    let mut uploader = ChunkUploader::new(chunks.clone(), Arc::default(), &dir.path().join("b")).unwrap();
    uploader.push_zero(Size(1 << 40)).await.unwrap();
    let done = uploader.finish().await.unwrap();
    assert_eq!((done.items, done.tally.chunks, done.tally.data_bytes), (16384, 1, Size(0)));
    chunks.put_index(&done).await.unwrap();
    store.clear_log();
    let reader = ImageReader::open(chunks.clone(), done.digest).await.unwrap();
    reader.verify_index().await.unwrap();
    let file = Arc::new(tempfile::tempfile().unwrap());
    let restored = reader.restore(file, 0, |_| ()).await.unwrap();
    assert_eq!((restored.offset, restored.bytes_skipped), (1 << 40, Size(1 << 40)));
    assert!(store.log().iter().all(|request| !request.key.contains("chunks/")));
}

#[tokio::test]
async fn only_the_last_chunk_may_be_short() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    let mut uploader = ChunkUploader::new(chunks, Arc::default(), &dir.path().join("a")).unwrap();
    uploader.push_data(chunk(1, 10)).await.unwrap();
    let misaligned = |result| matches!(result, Err(UploadError::Misaligned { offset: 10, .. }));
    assert!(misaligned(uploader.push_data(chunk(1, C)).await));
    assert!(misaligned(uploader.push_zero(Size(C as u64)).await));
    assert!(misaligned(uploader.push_data(chunk(1, C + 1)).await));
    assert_eq!(uploader.finish().await.unwrap().virtual_size, Size(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_upload_goes_on_at_its_checkpoint() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    let path = dir.path().join("a");
    let content = image(&[1, 2, 3, 0, 0, 4, 5, 6, 7, 8], 5);
    let mut uploader = ChunkUploader::new(chunks.clone(), Arc::default(), &path).unwrap();
    push(&mut uploader, &content[..5 * C]).await.unwrap();
    let checkpoint = uploader.flush().await.unwrap();
    assert_eq!((checkpoint.offset, checkpoint.items, checkpoint.zero_run), (5 * C as u64, 3, 2 * C as u64));
    store.break_next("put", &ChunkId::of(&chunk(7, C)).to_string(), Fault::Fail);
    let broken = async {
        push(&mut uploader, &content).await?;
        uploader.flush().await
    };
    let error = broken.await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    drop(uploader);
    let mut uploader = ChunkUploader::resume(chunks.clone(), Arc::default(), &path, &checkpoint).unwrap();
    assert_eq!(uploader.offset(), checkpoint.offset);
    push(&mut uploader, &content).await.unwrap();
    let done = uploader.finish().await.unwrap();
    assert_eq!(done.digest, Digest(Sha256Sum::of(&naive_index(&content))));
    let puts = store.log().iter().filter(|r| r.op == "put" && r.key.contains("chunks/")).count();
    assert!(puts <= 11 + 1, "{puts} chunks sent: what was stored before the failure is found again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_bounds_what_is_in_flight() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    store.delay(std::time::Duration::from_secs(30));
    store.clear_log();
    let mut uploader = ChunkUploader::new(chunks, Arc::default(), &dir.path().join("a")).unwrap();
    let pushing = async {
        for seed in 1..=40 {
            uploader.push_data(chunk(seed, C)).await.unwrap();
        }
    };
    assert!(tokio::time::timeout(std::time::Duration::from_secs(2), pushing).await.is_err(), "pushing waits");
    assert_eq!(uploader.offset() / C as u64, WINDOW as u64 + 1, "the window, and the one that waits");
    assert!(store.log().len() <= WINDOW);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_with_a_tombstone_are_sent_again() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    let content = image(&[1, 2], 0);
    upload(&chunks, &dir.path().join("a"), &content).await;
    store.set(&chunks.layout().tombstone(&ChunkId::of(&chunk(2, C))), "");
    store.clear_log();
    let session = Session::begin(chunks.clone(), writer(1, "n1")).await.unwrap();
    let log = store.log();
    let written = log.iter().position(|r| r.op == "put" && r.key == "p/sessions/import-1").unwrap();
    let listed = log.iter().position(|r| r.op == "list" && r.key == "p/tombstones/").unwrap();
    assert!(written < listed, "the session protects before anything is looked at");
    let mut uploader = session.uploader(&dir.path().join("b")).await.unwrap();
    push(&mut uploader, &content).await.unwrap();
    let done = uploader.finish().await.unwrap();
    assert_eq!((done.counters.chunks_new, done.counters.chunks_reused), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_node_goes_on_and_the_first_is_stopped() {
    for lacks in [Lacks::default(), Lacks { conditional_writes: true, ..Lacks::default() }] {
        let (store, dir) = (MemoryStore::lacking(lacks), tempfile::tempdir().unwrap());
        let chunks = open(&store).await;
        let content = image(&[1, 0, 2, 3, 0, 0, 4, 5], 77);
        let mut first = Session::begin(chunks.clone(), writer(1, "n1")).await.unwrap();
        let mut old = first.uploader(&dir.path().join("n1")).await.unwrap();
        push(&mut old, &content[..2 * C]).await.unwrap();
        first.checkpoint(&mut old, serde_json::json!({"etag": "v1"})).await.unwrap();
        push(&mut old, &content[..5 * C]).await.unwrap();
        first.checkpoint(&mut old, serde_json::json!({"etag": "v2"})).await.unwrap();

        store.clear_log();
        let mut second = Session::begin(chunks.clone(), writer(2, "n2")).await.unwrap();
        assert_eq!(second.saved().unwrap().state["etag"], "v2");
        let mut new = second.uploader(&dir.path().join("n2")).await.unwrap();
        assert_eq!(new.offset(), 5 * C as u64);
        push(&mut old, &content[..7 * C]).await.unwrap();
        let late = first.checkpoint(&mut old, serde_json::Value::Null).await;
        assert!(matches!(late, Err(SessionError::Superseded { found: Generation(2), .. })), "{late:?}");
        assert!(matches!(first.end().await, Err(SessionError::Superseded { .. })));
        let again = Session::begin(chunks.clone(), writer(1, "n1")).await.err().unwrap();
        assert!(matches!(again, SessionError::Superseded { .. }) && !again.is_transient());

        push(&mut new, &content[..6 * C]).await.unwrap();
        second.checkpoint(&mut new, serde_json::Value::Null).await.unwrap();
        drop((second, new));
        // The same generation again, after a crash, on a node that lost its disk.
        let third = Session::begin(chunks.clone(), writer(2, "n2")).await.unwrap();
        let mut last = third.uploader(&dir.path().join("n3")).await.unwrap();
        assert_eq!(last.offset(), 6 * C as u64);
        push(&mut last, &content).await.unwrap();
        let done = last.finish().await.unwrap();
        assert_eq!(done.digest, Digest(Sha256Sum::of(&naive_index(&content))));
        verify(&chunks, &done, |_| ()).await.unwrap();
        third.end().await.unwrap();
        assert_eq!(store.keys("p/sessions/"), Vec::<String>::new(), "nothing is left behind");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_with_damaged_pieces_starts_over() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    let content = image(&[1, 2, 3], 0);
    let mut session = Session::begin(chunks.clone(), writer(1, "n1")).await.unwrap();
    let mut uploader = session.uploader(&dir.path().join("a")).await.unwrap();
    push(&mut uploader, &content[..2 * C]).await.unwrap();
    session.checkpoint(&mut uploader, serde_json::Value::Null).await.unwrap();
    let piece = store.keys("p/sessions/import-1/").pop().unwrap();
    store.set(&piece, store.bytes(&piece).unwrap().slice(..50));
    let corrupt = session.uploader(&dir.path().join("b")).await.err().unwrap();
    assert!(matches!(&corrupt, SessionError::Corrupt { key } if *key == piece), "{corrupt}");
    session.start_over().await.unwrap();
    let mut uploader = session.uploader(&dir.path().join("b")).await.unwrap();
    push(&mut uploader, &content).await.unwrap();
    assert_eq!(uploader.finish().await.unwrap().counters.chunks_reused, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_session_is_begun_anew_and_can_be_ended() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    let mut session = Session::begin(chunks.clone(), writer(1, "n1")).await.unwrap();
    let mut uploader = session.uploader(&dir.path().join("a")).await.unwrap();
    push(&mut uploader, &image(&[1, 2], 0)).await.unwrap();
    session.checkpoint(&mut uploader, serde_json::Value::Null).await.unwrap();
    let key = "p/sessions/import-1";
    store.set(key, Bytes::from_static(br#"{"formatVersion":2,"what":"else"}"#));
    let refused = Session::begin(chunks.clone(), writer(1, "n1")).await.err().unwrap();
    assert!(matches!(&refused, SessionError::Newer { key: found } if found == key), "{refused}");
    store.set(key, Bytes::from_static(b"{"));
    assert!(matches!(session.confirm().await, Err(SessionError::Gone { .. })));
    let gone = Session::resume(chunks.clone(), writer(1, "n1")).await.err().unwrap();
    assert!(matches!(gone, SessionError::Gone { .. }), "{gone}");
    let anew = Session::begin(chunks.clone(), writer(1, "n1")).await.unwrap();
    assert!(anew.saved().is_none());
    store.set(key, Bytes::from_static(b"{"));
    Session::begin(chunks, writer(1, "n1")).await.unwrap().end().await.unwrap();
    assert_eq!(store.keys("p/sessions/"), Vec::<String>::new(), "nothing is left behind");
}

/// Zeros that no item stands for yet lie in the session's object alone, where others may write.
#[tokio::test(flavor = "multi_thread")]
async fn zeros_that_only_the_session_tells_of_are_not_taken_from_it() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    let (path, content) = (dir.path().join("a"), image(&[1, 2, 0, 0, 3, 4], 5));
    let mut session = Session::begin(chunks.clone(), writer(1, "n1")).await.unwrap();
    let mut uploader = session.local_uploader(&path).await.unwrap();
    push(&mut uploader, &content[..4 * C]).await.unwrap();
    session.checkpoint(&mut uploader, serde_json::Value::Null).await.unwrap();
    drop((session, uploader));
    let session = Session::begin(chunks.clone(), writer(1, "n1")).await.unwrap();
    let honest = session.saved().unwrap().upload.clone();
    assert_eq!((honest.items, honest.zero_run), (2, 2 * C as u64));
    let key = "p/sessions/import-1";
    let forge = |items: u64, offset: usize, zeros: usize| {
        let mut forged: serde_json::Value = serde_json::from_slice(&store.bytes(key).unwrap()).unwrap();
        let upload = &mut forged["checkpoint"]["upload"];
        (upload["items"], upload["offset"], upload["zeroRun"]) = (items.into(), offset.into(), zeros.into());
        upload["counters"]["chunksNew"] = u64::MAX.into();
        store.set(key, forged.to_string());
    };
    let forged = [(2, 4 * C, 2 * C), (2, 5 * C, 3 * C), (0, 4 * C, 4 * C), (0, content.len(), content.len())];
    for (items, offset, zeros) in forged {
        std::fs::copy(&path, dir.path().join("b")).unwrap();
        std::fs::copy(dir.path().join("a.sizes"), dir.path().join("b.sizes")).unwrap();
        forge(items, offset, zeros);
        let mut session = Session::begin(chunks.clone(), writer(1, "n1")).await.unwrap();
        let mut uploader = session.local_uploader(&dir.path().join("b")).await.unwrap();
        assert_eq!(uploader.offset(), items * C as u64, "from the last item on");
        push(&mut uploader, &content).await.unwrap();
        let done = uploader.finish().await.unwrap();
        assert_eq!(done.digest, Digest(Sha256Sum::of(&naive_index(&content))), "{items} {offset} {zeros}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_survives_a_lost_answer_and_notices_its_end() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    let mut session = Session::begin(chunks.clone(), writer(1, "n1")).await.unwrap();
    let mut uploader = session.uploader(&dir.path().join("a")).await.unwrap();
    push(&mut uploader, &image(&[1], 0)).await.unwrap();
    store.break_next("put", "p/sessions/import-1", Fault::LoseAnswer);
    let lost = session.checkpoint(&mut uploader, serde_json::Value::Null).await;
    assert!(lost.unwrap_err().is_transient());
    session.checkpoint(&mut uploader, serde_json::Value::Null).await.unwrap();
    store.remove("p/sessions/import-1");
    let gone = session.checkpoint(&mut uploader, serde_json::Value::Null).await;
    assert!(matches!(gone, Err(SessionError::Gone { .. })), "{gone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn verification_finds_what_is_missing_short_or_damaged() {
    for checksums in [false, true] {
        let store = MemoryStore::lacking(Lacks { checksums, ..Lacks::default() });
        let dir = tempfile::tempdir().unwrap();
        let chunks = open(&store).await;
        let seeds: Vec<u8> = (0..60).collect();
        let done = upload(&chunks, &dir.path().join("a"), &image(&seeds, 3)).await;
        store.page_size(7);
        let mut seen = 0;
        let verified = verify(&chunks, &done, |done| seen = done).await.unwrap();
        assert_eq!((verified.chunks, seen), (61, 61));
        assert_eq!(verified.read_back, if checksums { 61 } else { 0 });
        let id = ChunkId::of(&chunk(33, C));
        let key = chunks.layout().chunk(&id);
        let frame = store.bytes(&key).unwrap();
        let mut damaged = frame.to_vec();
        *damaged.last_mut().unwrap() ^= 1;
        store.set(&key, damaged);
        match verify(&chunks, &done, |_| ()).await {
            Err(VerifyError::Damaged { id: found }) => assert!(checksums && found == id),
            other => assert!(!checksums && other.is_ok(), "{other:?}"),
        }
        store.set(&key, frame.slice(1..));
        let short = verify(&chunks, &done, |_| ()).await;
        assert!(matches!(short, Err(VerifyError::Size { id: found, .. }) if found == id), "{short:?}");
        store.remove(&key);
        let missing = verify(&chunks, &done, |_| ()).await;
        assert!(matches!(missing, Err(VerifyError::Missing { id: found }) if found == id), "{missing:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_image_in_a_large_store_takes_few_listings() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    for i in 0..5000_u32 {
        store.set(&chunks.layout().chunk(&ChunkId::of(&i.to_le_bytes())), "other");
    }
    let done = upload(&chunks, &dir.path().join("a"), &image(&[1, 2], 0)).await;
    store.page_size(100);
    assert_eq!(verify(&chunks, &done, |_| ()).await.unwrap().listings, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_lead_to_images() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    let done = upload(&chunks, &dir.path().join("a"), &image(&[1], 0)).await;
    let manifest = super::publish::Manifest {
        format_version: 1,
        digest: done.digest,
        virtual_size: done.virtual_size,
        chunk_size: done.chunk_size,
        data_bytes: done.tally.data_bytes,
        source_digest: None,
        owner: Uid::from("o"),
        generation: Generation(1),
        created: Timestamp(5),
        labels: [("os".to_owned(), "debian".to_owned())].into(),
    };
    let name = ObjectName::new("ns", "debian");
    chunks.publish(&name, &manifest, &super::publish::Expected::Absent).await.unwrap();
    let text = String::from_utf8(store.bytes("p/manifests/ns/debian.json").unwrap().to_vec()).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["virtualSize"], C);
    assert_eq!(value["chunkSize"], C);
    assert_eq!(value["digest"], done.digest.to_string());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However an image is pushed, and wherever the upload is stopped and resumed, the index is the naive one.
    #[test]
    fn the_index_depends_on_the_content_only(
        seeds in proptest::collection::vec(prop_oneof![3 => Just(0_u8), 1 => 1_u8..4], 0..40),
        tail in prop_oneof![Just(0_usize), 1..C],
        zero_tail in any::<bool>(),
        cuts in proptest::collection::vec(0_u8..4, 40),
    ) {
        let mut content = image(&seeds, tail);
        if zero_tail {
            let at = content.len() - tail;
            content[at..].fill(0);
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        let digest = runtime.block_on(async {
            let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
            let chunks = open(&store).await;
            let path = dir.path().join("a");
            let mut uploader = ChunkUploader::new(chunks.clone(), Arc::default(), &path).unwrap();
            for (seed, cut) in seeds.iter().zip(&cuts) {
                if *seed == 0 && *cut < 2 {
                    uploader.push_zero(Size(C as u64)).await.unwrap();
                } else {
                    uploader.push_data(chunk(*seed, C)).await.unwrap();
                }
                if *cut == 3 {
                    let checkpoint = uploader.flush().await.unwrap();
                    uploader = ChunkUploader::resume(chunks.clone(), Arc::default(), &path, &checkpoint).unwrap();
                }
            }
            if zero_tail {
                uploader.push_zero(Size(tail as u64)).await.unwrap();
            } else {
                uploader.push_data(chunk(9, tail)).await.unwrap();
            }
            uploader.finish().await.unwrap().digest
        });
        prop_assert_eq!(digest, Digest(Sha256Sum::of(&naive_index(&content))));
    }
}
