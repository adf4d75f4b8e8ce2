//! The S3 client and the chunk store against a real S3 server, and sources against a real web server.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a test; noise is bytes of numbers

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use berth_core::ids::{ChunkId, NodeName, Sha256Sum, Uid};
use berth_core::units::{Bytes as Size, Generation, Timestamp};
use berth_objectstore::chunks::caibx::ChunkSize;
use berth_objectstore::chunks::read::ImageReader;
use berth_objectstore::chunks::session::{Session, Writer};
use berth_objectstore::chunks::store::{Capabilities, ChunkStore, probe};
use berth_objectstore::chunks::upload::ChunkUploader;
use berth_objectstore::chunks::usage::usage;
use berth_objectstore::chunks::verify::verify;
use berth_objectstore::layout::StoreLayout;
use berth_objectstore::s3::{Addressing, Credentials, S3Config, S3Store, Secret};
use berth_objectstore::source::address::AddressPolicy;
use berth_objectstore::source::{HttpConfig, HttpSource, RangedSource, S3Source, SourceError, SourceStream};
use berth_objectstore::{Body, ETag, ObjectStore, PutCondition, StoreError};
use berth_testkit::http_source::HttpSource as Web;
use berth_testkit::s3::TestS3;
use berth_testkit::s3::fault::{FaultAction, FaultRule};
use bytes::Bytes;
use futures::TryStreamExt as _;

const C: usize = 64 << 10;

async fn connect(server: &TestS3, bucket: &str, secret: &str) -> S3Store {
    S3Store::connect(S3Config {
        endpoint: Some(server.endpoint()),
        region: "us-east-1".to_owned(),
        bucket: bucket.to_owned(),
        addressing: Addressing::Path,
        credentials: Credentials::Static {
            access_key_id: server.access_key().to_owned(),
            secret_key: Secret::new(secret),
            session_token: None,
        },
        ca_bundle: None,
    })
    .await
    .unwrap()
}

async fn start() -> (tempfile::TempDir, TestS3, S3Store) {
    let dir = tempfile::tempdir().unwrap();
    let server = TestS3::start(dir.path()).await.unwrap();
    let store = connect(&server, "test", server.secret_key()).await;
    (dir, server, store)
}

fn noise(seed: u32, len: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let byte = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 11) as u8
    };
    (0..len).map(byte).collect()
}

async fn put(store: &S3Store, key: &str, text: &'static str) -> Option<ETag> {
    store.put(key, Body::Bytes(text.into()), PutCondition::Always, None).await.unwrap()
}

async fn all(stream: SourceStream) -> Result<Vec<u8>, SourceError> {
    stream
        .try_fold(Vec::new(), |mut all, piece| async move {
            all.extend_from_slice(&piece);
            Ok(all)
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_are_put_read_listed_and_removed() {
    let (dir, _server, store) = start().await;
    let etag = put(&store, "a/1", "0123456789").await.unwrap();
    let info = store.head("a/1").await.unwrap();
    assert_eq!((info.size, info.etag.as_ref()), (Size(10), Some(&etag)));
    let part = store.get("a/1", Some(2..5), Some(&etag)).await.unwrap();
    assert_eq!(part.size, Size(10));
    assert_eq!(part.collect(Size(3)).await.unwrap(), "234");
    let whole = store.get("a/1", None, None).await.unwrap().collect(Size(9)).await;
    assert!(matches!(whole, Err(StoreError::TooLarge { .. })));
    let stale = store.get("a/1", None, Some(&ETag("\"x\"".to_owned()))).await.err().unwrap();
    assert!(matches!(stale, StoreError::PreconditionFailed { .. }), "{stale}");

    let path = dir.path().join("body");
    let content = noise(1, 300_000);
    std::fs::write(&path, &content).unwrap();
    let body = Body::File { path, len: Size(200_000) };
    let sum = Sha256Sum::of(&content[..200_000]);
    store.put("a/2", body, PutCondition::Always, Some(sum)).await.unwrap();
    let read = store.get("a/2", None, None).await.unwrap().collect(Size::mib(1)).await.unwrap();
    assert_eq!(read, content[..200_000]);
    let missing = Body::File { path: dir.path().join("nothing"), len: Size(1) };
    let error = store.put("a/3", missing, PutCondition::Always, None).await.unwrap_err();
    assert!(matches!(error, StoreError::LocalFile { .. }), "{error}");

    put(&store, "b/1", "").await;
    let page = store.list("a/", None).await.unwrap();
    let keys: Vec<&str> = page.objects.iter().map(|object| object.key.as_str()).collect();
    assert_eq!((keys, page.more), (vec!["a/1", "a/2"], false));
    assert_eq!(page.objects[1].size, Size(200_000));
    assert_eq!(store.list("a/", Some("a/1")).await.unwrap().objects.len(), 1);
    store.delete("a/1").await.unwrap();
    store.delete("a/1").await.unwrap();
    assert!(matches!(store.head("a/1").await, Err(StoreError::NotFound { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn conditions_and_checksums_hold() {
    let (_dir, _server, store) = start().await;
    let put = |key: &'static str, condition, sum| store.put(key, Body::Bytes("x".into()), condition, sum);
    let first = put("k", PutCondition::IfAbsent, None).await.unwrap().unwrap();
    let again = put("k", PutCondition::IfAbsent, None).await.unwrap_err();
    assert!(matches!(again, StoreError::PreconditionFailed { .. }), "{again}");
    put("k", PutCondition::IfMatch(first), None).await.unwrap();
    let stale = put("k", PutCondition::IfMatch(ETag("\"0\"".to_owned())), None).await.unwrap_err();
    assert!(matches!(stale, StoreError::PreconditionFailed { .. }), "{stale}");
    put("sum", PutCondition::Always, Some(Sha256Sum::of(b"x"))).await.unwrap();
    let damaged = put("bad", PutCondition::Always, Some(Sha256Sum::of(b"y"))).await.unwrap_err();
    assert!(matches!(damaged, StoreError::BadDigest { .. }), "{damaged}");
    assert!(matches!(store.head("bad").await, Err(StoreError::NotFound { .. })));
    let tries = (0..16).map(|_| put("once", PutCondition::IfAbsent, None));
    let won = futures::future::join_all(tries).await.into_iter().flatten().count();
    assert_eq!(won, 1);
    let layout = StoreLayout::new("p").unwrap();
    let found = probe(&store, &layout).await.unwrap();
    let expected = Capabilities {
        conditional_writes: true,
        verifies_checksums: true,
        lists_uploads: true,
        ranges: true,
    };
    assert_eq!(found, expected);
    assert!(store.list("p/", None).await.unwrap().objects.is_empty(), "probes are removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_told_apart() {
    let (_dir, server, store) = start().await;
    put(&store, "k", "0123456789").await;
    let nowhere = connect(&server, "nowhere", server.secret_key()).await;
    let error = nowhere.list("", None).await.unwrap_err();
    assert!(matches!(error, StoreError::NoSuchBucket { .. }), "{error}");
    let stranger = connect(&server, "test", "wrong").await;
    let error = stranger.list("", None).await.unwrap_err();
    assert!(matches!(error, StoreError::AccessDenied { .. }) && !error.is_transient(), "{error}");
    assert!(!error.to_string().contains("wrong"), "{error}");

    server.set_faults(&[FaultRule::new(FaultAction::Deny).op("GetObject")]).unwrap();
    let error = store.get("k", None, None).await.err().unwrap();
    assert!(matches!(error, StoreError::AccessDenied { .. }), "{error}");
    server.set_faults(&[FaultRule::new(FaultAction::SlowDown).op("GetObject").times(2)]).unwrap();
    store.get("k", None, None).await.unwrap();
    server.set_faults(&[FaultRule::new(FaultAction::SlowDown).op("GetObject")]).unwrap();
    let error = store.get("k", None, None).await.err().unwrap();
    assert!(error.is_transient() && error.to_string().contains("SlowDown"), "{error}");
    server.set_faults(&[FaultRule::new(FaultAction::Truncate { after_bytes: 4 }).op("GetObject")]).unwrap();
    let error = store.get("k", None, None).await.unwrap().collect(Size(10)).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    server.set_faults(&[]).unwrap();
    drop(server);
    let error = store.head("k").await.unwrap_err();
    assert!(error.is_transient(), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a57_an_image_survives_a_bad_store() {
    let (dir, server, store) = start().await;
    let size = ChunkSize::new(Size(C as u64)).unwrap();
    let layout = StoreLayout::new("images").unwrap();
    let chunks = ChunkStore::open_or_create(store, layout, size).await.unwrap();
    server
        .set_faults(&[
            FaultRule::new(FaultAction::SlowDown).key_prefix("images/chunks/").percent(15, 7).times(20),
            FaultRule::new(FaultAction::LostResponse).op("PutObject").key_prefix("images/").skip(3).times(4),
            FaultRule::new(FaultAction::Reset { after_bytes: 100 }).op("PutObject").skip(20).times(2),
        ])
        .unwrap();
    let writer = Writer {
        uid: Uid::from("u"),
        generation: Generation(1),
        node: NodeName::from("n"),
        started: Timestamp(1),
    };
    let content: Vec<u8> =
        (0..100).flat_map(|i| if i % 3 == 0 { Bytes::from(vec![0; C]) } else { noise(i, C) }).collect();
    // The retries of a caller: everything may fail, and goes on at its checkpoint.
    let mut done = None;
    for _ in 0..20 {
        match write_image(&chunks, &writer, &dir.path().join("i"), &content).await {
            Ok(finished) => {
                done = Some(finished);
                break;
            }
            Err(error) => eprintln!("again: {error:#?}"),
        }
    }
    server.set_faults(&[]).unwrap();
    let done = done.expect("twenty tries are enough for 26 faults");
    assert_eq!(verify(&chunks, &done, |_| ()).await.unwrap().chunks, done.tally.chunks);
    chunks.put_index(&done).await.unwrap();
    let target = dir.path().join("out");
    let file = File::create(&target).unwrap();
    file.set_len(done.virtual_size.0).unwrap();
    let reader = ImageReader::open_local(chunks.clone(), done.digest, &dir.path().join("j")).await.unwrap();
    reader.restore(Arc::new(file), 0, |_| ()).await.unwrap();
    assert!(std::fs::read(&target).unwrap() == content);
    let log = server.log().unwrap();
    assert!(log.faults().values().sum::<u64>() > 4, "the store was bad");
    // What the store's own log says was sent, to what the image needs.
    let sent: u64 =
        log.put_bytes_by_key().iter().filter(|(key, _)| key.contains("chunks/")).map(|(_, n)| n).sum();
    let needed = done.tally.stored_bytes.0;
    assert!(sent >= needed && sent < needed + needed / 4, "{sent} bytes sent for {needed}");
    let found = usage(&chunks).await.unwrap();
    assert_eq!((found.images, found.unreferenced_chunks), (1, 0));
    assert_eq!(found.unique_bytes, done.tally.stored_bytes);
    let missing = chunks.layout().chunk(&ChunkId::of(&noise(50, C)));
    chunks.store().delete(&missing).await.unwrap();
    let error = verify(&chunks, &done, |_| ()).await.unwrap_err();
    assert!(error.to_string().contains(&ChunkId::of(&noise(50, C)).to_string()), "{error}");
}

async fn write_image(
    chunks: &ChunkStore<S3Store>,
    writer: &Writer,
    path: &Path,
    content: &[u8],
) -> Result<berth_objectstore::chunks::upload::FinishedIndex, Box<dyn std::error::Error>> {
    let mut session = Session::begin(chunks.clone(), writer.clone()).await?;
    let mut uploader: ChunkUploader<S3Store> = session.uploader(path).await?;
    let from = usize::try_from(uploader.offset())?;
    for piece in content[from..].chunks(C) {
        uploader.push_data(Bytes::copy_from_slice(piece)).await?;
        if uploader.since_checkpoint() >= Size(10 * C as u64) {
            session.checkpoint(&mut uploader, serde_json::Value::Null).await?;
        }
    }
    Ok(uploader.finish().await?)
}

fn web_config(url: String) -> HttpConfig {
    HttpConfig {
        url,
        headers: Vec::new(),
        ca_bundle: None,
        addresses: AddressPolicy::default(),
        stall: Duration::from_secs(1),
    }
}

fn web(url: String) -> RangedSource {
    HttpSource::new(web_config(url)).unwrap().into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a63_a_source_that_is_silent_is_told_from_one_that_is_slow() {
    let dir = tempfile::tempdir().unwrap();
    let content = noise(3, 3 << 20);
    std::fs::write(dir.path().join("f"), &content).unwrap();
    let server = Web::start(dir.path(), &dir.path().join("log")).await.unwrap();
    let mut stalling = web(server.url("stall", "f"));
    stalling.open(10, None).await.unwrap();
    let stalled = all(stalling.read(0..2 << 20).await.unwrap()).await.unwrap_err();
    assert!(matches!(stalled, SourceError::Stalled { .. }) && stalled.is_transient(), "{stalled}");
    let mut slow = web(server.url("slow/1000000", "f"));
    slow.open(10, None).await.unwrap();
    let begun = std::time::Instant::now();
    assert_eq!(all(slow.read(0..3 << 20).await.unwrap()).await.unwrap(), content);
    assert!(begun.elapsed() > Duration::from_secs(2), "longer than the source may be silent");
}

#[tokio::test(flavor = "multi_thread")]
async fn web_sources() {
    let dir = tempfile::tempdir().unwrap();
    let content = noise(3, 3 << 20);
    std::fs::write(dir.path().join("f"), &content).unwrap();
    std::fs::write(dir.path().join("empty"), "").unwrap();
    let server = Web::start(dir.path(), &dir.path().join("log")).await.unwrap();
    for (switch, ranges) in [("plain", true), ("nohead", true), ("noranges", false)] {
        let mut source = web(server.url(switch, "f"));
        let info = source.open(1000, None).await.unwrap();
        assert_eq!((info.size, info.accepts_ranges), (Some(Size(3 << 20)), ranges), "{switch}");
        assert_eq!(info.head, content[..1000]);
        for range in [0..10, 100..2_000_000, 0..3 << 20, (3 << 20) - 1..3 << 20, 5..5] {
            let expected =
                &content[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
            assert_eq!(
                all(source.read(range.clone()).await.unwrap()).await.unwrap(),
                expected,
                "{switch} {range:?}"
            );
        }
        let version = info.version.unwrap();
        source.open(1, Some(&version)).await.unwrap();
        let other = source.open(1, Some("\"another\"")).await.unwrap_err();
        assert!(matches!(other, SourceError::Changed { .. }), "{other}");
        let mut empty = web(server.url(switch, "empty"));
        let info = empty.open(10, None).await.unwrap();
        assert_eq!((info.size, info.head), (Some(Size(0)), Bytes::new()), "{switch}");
    }
    let open = async |switch: &str| web(server.url(switch, "f")).open(1, None).await.unwrap_err();
    assert!(matches!(open("forbidden").await, SourceError::Forbidden { .. }));
    assert!(matches!(open("missing").await, SourceError::NotFound { .. }));
    let mut changing = web(server.url("changing", "f"));
    changing.open(1, None).await.unwrap();
    let changed = changing.read(0..10).await.err().unwrap();
    assert!(matches!(changed, SourceError::Changed { .. }) && !changed.is_transient(), "{changed}");
    let mut cut = web(server.url("cut/5000", "f"));
    cut.open(10, None).await.unwrap();
    let error = all(cut.read(0..10_000).await.unwrap()).await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
    std::fs::write(dir.path().join("f"), noise(4, 3 << 20)).unwrap();
    let mut source = web(server.url("plain", "f"));
    source.open(1, None).await.unwrap();
    std::fs::write(dir.path().join("f"), noise(5, 2 << 20)).unwrap();
    let changed = source.read(0..10).await.err().unwrap();
    assert!(matches!(changed, SourceError::Changed { .. }), "{changed}");
    drop(server);
    let gone = source.read(0..10).await.err().unwrap();
    assert!(gone.is_transient(), "{gone}");
}

/// Answers every request with a redirect, and remembers the requests' heads.
async fn redirector(target: String) -> (String, Arc<std::sync::Mutex<Vec<String>>>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let target = if target.is_empty() { url.clone() } else { target };
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let heads = Arc::clone(&seen);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut head = vec![0; 4096];
            let read = socket.read(&mut head).await.unwrap_or(0);
            heads.lock().unwrap().push(String::from_utf8_lossy(&head[..read]).into_owned());
            let answer = format!(
                "HTTP/1.1 302 Found\r\nlocation: {target}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            );
            let _ = socket.write_all(answer.as_bytes()).await;
        }
    });
    (url, seen)
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_are_followed_with_care() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), "content").unwrap();
    let server = Web::start(dir.path(), &dir.path().join("log")).await.unwrap();
    let with_token = |url| {
        let mut config = web_config(url);
        config.headers.push(("x-token".to_owned(), Secret::new("hush")));
        HttpSource::new(config).unwrap()
    };
    let (url, _) = redirector(server.url("plain", "f")).await;
    let mut source: RangedSource = with_token(url).into();
    assert_eq!(source.open(100, None).await.unwrap().head, "content");

    let (second, heads) = redirector(String::new()).await;
    let (first, first_heads) = redirector(second).await;
    let mut source: RangedSource = with_token(first).into();
    let endless = source.open(1, None).await.unwrap_err();
    assert!(matches!(endless, SourceError::Redirects { limit: 5, .. }), "{endless}");
    assert_eq!(first_heads.lock().unwrap().len() + heads.lock().unwrap().len(), 6);
    assert!(first_heads.lock().unwrap()[0].contains("hush"));
    assert!(heads.lock().unwrap().iter().all(|head| !head.contains("hush")), "headers stay with their host");

    for bad in ["http://169.254.169.254/latest/meta-data", "http://[fe80::1]/"] {
        let (url, _) = redirector(bad.to_owned()).await;
        let error = web(url).open(1, None).await.unwrap_err();
        assert!(matches!(error, SourceError::Refused { .. }), "{error}");
    }
    let (url, _) = redirector("file:///etc/passwd".to_owned()).await;
    let error = web(url).open(1, None).await.unwrap_err();
    assert!(matches!(error, SourceError::Unusable { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_refused_addresses_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), "content").unwrap();
    let server = Web::start(dir.path(), &dir.path().join("log")).await.unwrap();
    let url = server.url("plain", "f").replace("127.0.0.1", "localhost");
    assert_eq!(web(url.clone()).open(100, None).await.unwrap().head, "content");
    let mut config = web_config(url);
    config.addresses.refused = vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()];
    let mut source: RangedSource = HttpSource::new(config).unwrap().into();
    let error = source.open(1, None).await.unwrap_err();
    assert!(matches!(error, SourceError::Refused { .. }) && !error.is_transient(), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_as_sources() {
    let (_dir, server, store) = start().await;
    let content = noise(6, 1 << 20);
    store.put("f", Body::Bytes(content.clone()), PutCondition::Always, None).await.unwrap();
    put(&store, "empty", "").await;
    let source =
        |key: &str| RangedSource::from(S3Source::new(store.clone(), key, None, Duration::from_secs(1)));
    let mut file = source("f");
    let info = file.open(512, None).await.unwrap();
    assert_eq!(
        (info.size, info.accepts_ranges, &info.head[..]),
        (Some(Size(1 << 20)), true, &content[..512])
    );
    assert_eq!(all(file.read(77..100_000).await.unwrap()).await.unwrap(), content[77..100_000]);
    let info = source("empty").open(512, None).await.unwrap();
    assert_eq!((info.size, info.head), (Some(Size(0)), Bytes::new()));
    assert!(matches!(source("missing").open(1, None).await, Err(SourceError::NotFound { .. })));
    server.set_faults(&[FaultRule::new(FaultAction::Stall { after_bytes: 1000 }).op("GetObject")]).unwrap();
    let stalled = all(file.read(0..10_000).await.unwrap()).await.unwrap_err();
    assert!(matches!(stalled, SourceError::Stalled { .. }), "{stalled}");
    server.set_faults(&[FaultRule::new(FaultAction::Deny).op("GetObject")]).unwrap();
    assert!(matches!(file.read(0..10).await.err(), Some(SourceError::Forbidden { .. })));
    server.set_faults(&[]).unwrap();
    put(&store, "f", "another").await;
    assert!(matches!(file.read(0..5).await.err(), Some(SourceError::Changed { .. })));
}
