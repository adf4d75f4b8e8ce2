//! The HTTP file server as its clients see it.
#![allow(missing_docs, clippy::unwrap_used)]

mod curl;

use std::fs;
use std::time::{Duration, Instant};

use berth_testkit::http_source::{HttpSource, STALL_AFTER};
use curl::Curl;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i ^ (i >> 8)) & 0xff).unwrap()).collect()
}

async fn start(dir: &tempfile::TempDir) -> (HttpSource, Curl, Vec<u8>) {
    let data = pattern(2 << 20);
    fs::create_dir(dir.path().join("files")).unwrap();
    fs::write(dir.path().join("files/a b.img"), &data).unwrap();
    let source = HttpSource::start(&dir.path().join("files"), &dir.path().join("log")).await.unwrap();
    let client = Curl { endpoint: source.endpoint(), user: None };
    (source, client, data)
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_files_have_ranges_and_conditions() {
    let dir = tempfile::tempdir().unwrap();
    let (source, http, data) = start(&dir).await;
    let url = source.url("plain", "a%20b.img");
    let whole = http.get(&url).expect(200);
    assert_eq!((&whole.body, whole.headers["accept-ranges"].as_str()), (&data, "bytes"));
    assert_eq!(http.head(&url).expect(200).headers["content-length"], data.len().to_string());
    let with =
        |headers: &[&str]| http.send(&url, &headers.iter().flat_map(|h| ["-H", *h]).collect::<Vec<_>>());
    let part = with(&["Range: bytes=5-9"]).expect(206);
    assert_eq!(
        (part.body.as_slice(), part.headers["content-range"].as_str()),
        (&data[5..10], "bytes 5-9/2097152")
    );
    assert_eq!(with(&["Range: bytes=-4"]).expect(206).body, &data[data.len() - 4..]);
    assert_eq!(with(&["Range: bytes=2097152-"]).expect(416).headers["content-range"], "bytes */2097152");
    let etag = whole.etag();
    with(&["Range: bytes=0-0", &format!("If-Match: {etag}")]).expect(206);
    with(&["If-Match: \"other\""]).expect(412);
    with(&[&format!("If-None-Match: {etag}")]).expect(304);
    with(&["Range: bytes=0-0", &format!("If-Range: {etag}")]).expect(206);
    assert_eq!(with(&["Range: bytes=0-0", "If-Range: \"other\""]).expect(200).body, data);
    http.get(&source.url("plain", "none")).expect(404);
    http.get(&source.url("plain", "..%2Flog")).expect(404);
    http.get(&format!("{}/else/a", source.endpoint())).expect(404);
    fs::write(dir.path().join("files/a b.img"), b"changed").unwrap();
    assert_ne!(http.head(&url).expect(200).etag(), etag);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_switch_does_what_its_name_says() {
    let dir = tempfile::tempdir().unwrap();
    let (source, http, data) = start(&dir).await;
    let url = |switch: &str| source.url(switch, "a%20b.img");
    let ranged = |switch: &str| http.send(&url(switch), &["-H", "Range: bytes=1-3"]);
    let noranges = ranged("noranges").expect(200);
    assert_eq!((noranges.body.len(), noranges.headers.get("accept-ranges")), (data.len(), None));
    http.get(&url("forbidden")).expect(403);
    http.get(&url("missing")).expect(404);
    http.head(&url("nohead")).expect(403);
    assert_eq!(ranged("nohead").expect(206).headers["content-range"], "bytes 1-3/2097152");
    assert_ne!(http.get(&url("changing")).expect(200).etag(), http.get(&url("changing")).expect(200).etag());
    let stalled = http.send(&url("stall"), &["--max-time", "1"]);
    assert_eq!((stalled.exit, stalled.body.len() as u64), (28, STALL_AFTER));
    let cut = http.get(&url("cut/1000"));
    assert_eq!((cut.exit, cut.body.as_slice()), (56, &data[..1000]));
    let begin = Instant::now();
    assert_eq!(
        http.send(&url("slow/1000000"), &["-H", "Range: bytes=0-999999"]).expect(206).body.len(),
        1_000_000
    );
    assert!((800..5000).contains(&begin.elapsed().as_millis()), "{:?}", begin.elapsed());
    // The stalled request is logged when the server notices that its client has gone.
    let deadline = Instant::now() + Duration::from_secs(10);
    while source.log().unwrap().counts_by_op().get("Stall") != Some(&1) && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let log = source.log().unwrap();
    let ends: Vec<_> =
        log.entries().iter().filter(|e| !e.complete).map(|e| (e.op.as_str(), e.sent)).collect();
    assert_eq!(ends.iter().find(|(op, _)| *op == "Stall"), Some(&("Stall", STALL_AFTER)));
    assert_eq!(ends.iter().find(|(op, _)| *op == "Cut(1000)"), Some(&("Cut(1000)", 1000)));
    assert_eq!(log.succeeded("Slow(1000000)").map(|e| e.sent).sum::<u64>(), 1_000_000);
}
