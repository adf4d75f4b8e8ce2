//! The S3 server as its clients see it, with curl as an independent client.
#![allow(missing_docs, clippy::unwrap_used)]

mod curl;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use berth_testkit::s3::fault::{FaultAction, FaultRule};
use berth_testkit::s3::{S3Options, TestS3};
use curl::{Answer, Curl};

async fn start(dir: &tempfile::TempDir) -> (TestS3, Curl) {
    let options = S3Options { buckets: vec!["test".into()], min_part_size: 5, ..S3Options::default() };
    let server = TestS3::start_with(dir.path(), options).await.unwrap();
    let client = Curl::signed(&server.endpoint());
    (server, client)
}

/// Bytes that differ at every offset that tests use.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i ^ (i >> 8)) & 0xff).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_keep_bytes_and_metadata_and_answer_ranges_and_conditions() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, s3) = start(&dir).await;
    let data = pattern(3 << 20);
    let headers = ["x-amz-meta-lineage: abc", "content-type: image/raw"];
    let etag = s3.put("/test/dir/k", &data, &headers).expect(200).etag();

    let head = s3.head("/test/dir/k").expect(200);
    assert_eq!(head.headers["content-length"], data.len().to_string());
    assert_eq!(head.headers["x-amz-meta-lineage"], "abc");
    assert_eq!(head.headers["content-type"], "image/raw");
    assert_eq!(head.headers["accept-ranges"], "bytes");
    assert_eq!(head.etag(), etag);
    assert_eq!(s3.get("/test/dir/k").expect(200).body, data);

    let range = |r: &str| s3.send("/test/dir/k", &["-H", &format!("Range: bytes={r}")]);
    let part = range("1000000-2000000").expect(206);
    assert_eq!(part.headers["content-range"], format!("bytes 1000000-2000000/{}", data.len()));
    assert_eq!(part.body, &data[1_000_000..=2_000_000]);
    assert_eq!(range("-5").expect(206).body, &data[data.len() - 5..]);
    assert_eq!(range(&format!("{}-", data.len() - 3)).expect(206).body, &data[data.len() - 3..]);
    assert_eq!(range(&format!("{}-", data.len())).expect(416).xml("Code"), "InvalidRange");

    let with = |h: &str| s3.send("/test/dir/k", &["-H", h]);
    with(&format!("If-Match: {etag}")).expect(200);
    with("If-Match: \"0\"").expect(412);
    with(&format!("If-None-Match: {etag}")).expect(304);
    s3.delete("/test/dir/k").expect(204);
    s3.delete("/test/dir/k").expect(204);
    assert_eq!(s3.get("/test/dir/k").expect(404).xml("Code"), "NoSuchKey");
    assert_eq!(s3.get("/nobucket/k").expect(404).xml("Code"), "NoSuchBucket");
    assert_eq!(s3.put("/nobucket/k", &data, &[]).expect(404).xml("Code"), "NoSuchBucket");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_signatures_and_checksums_are_refused_and_store_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (server, s3) = start(&dir).await;
    let other = Curl { user: Some("AKIATEST:OTHER".into()), ..s3.clone() };
    assert_eq!(other.put("/test/k", b"x", &[]).expect(403).xml("Code"), "SignatureDoesNotMatch");
    let anonymous = Curl { user: None, ..s3.clone() };
    assert_eq!(anonymous.get("/test/k").expect(403).xml("Code"), "AccessDenied");

    // SHA-256 and MD5 of "abc"; see FIPS 180-2 and RFC 1321.
    let sha = "x-amz-checksum-sha256: ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=";
    let md5 = "Content-MD5: kAFQmDzST7DWlj99KOF/cg==";
    assert_eq!(s3.put("/test/k", b"abd", &[sha]).expect(400).xml("Code"), "BadDigest");
    assert_eq!(s3.put("/test/k", b"abd", &[md5]).expect(400).xml("Code"), "BadDigest");
    let signed = "x-amz-content-sha256: ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let refused = s3.put("/test/k", b"abd", &[signed]).expect(400);
    assert_eq!(refused.xml("Code"), "XAmzContentSHA256Mismatch");
    s3.head("/test/k").expect(404);
    s3.put("/test/k", b"abc", &[sha, md5]).expect(200);
    let head = s3.send("/test/k", &["--head", "-H", "x-amz-checksum-mode: ENABLED"]).expect(200);
    assert_eq!(head.headers["x-amz-checksum-sha256"], "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=");
    assert_eq!(std::fs::read_dir(server.data_dir().join("data")).unwrap().count(), 1);
}

/// Runs `f` for 0..n at once and counts the statuses.
fn race(n: usize, f: impl Fn(usize) -> Answer + Sync) -> BTreeMap<u16, usize> {
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..n)
            .map(|i| {
                scope.spawn({
                    let f = &f;
                    move || f(i).status
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    statuses.into_iter().fold(BTreeMap::new(), |mut counts, status| {
        *counts.entry(status).or_default() += 1;
        counts
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn of_sixteen_conditional_writers_exactly_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let (server, s3) = start(&dir).await;
    let create = |i: usize| s3.put("/test/once", format!("writer {i}").as_bytes(), &["If-None-Match: *"]);
    assert_eq!(race(16, create), BTreeMap::from([(200, 1), (412, 15)]));
    let etag = format!("If-Match: {}", s3.head("/test/once").etag());
    let swap = |i: usize| s3.put("/test/once", format!("swap {i}").as_bytes(), &[&etag]);
    assert_eq!(race(16, swap), BTreeMap::from([(200, 1), (412, 15)]));
    let complete = |i: usize| {
        let (id, list) = upload(&s3, "/test/big", &[(1, format!("upload {i}").as_bytes())]);
        let target = format!("/test/big?uploadId={id}");
        s3.send(&target, &["-X", "POST", "--data-binary", &list, "-H", "If-None-Match: *"])
    };
    assert_eq!(race(8, complete), BTreeMap::from([(200, 1), (412, 7)]));
    let log = server.log().unwrap();
    let existed = |v| log.entries().iter().filter(|e| e.key == "once" && e.existed == Some(v)).count();
    assert_eq!((existed(false), existed(true)), (1, 31));
    assert_eq!(log.open_uploads().len(), 7);
}

fn upload(s3: &Curl, target: &str, parts: &[(u32, &[u8])]) -> (String, String) {
    let id = s3.post(&format!("{target}?uploads="), "").expect(200).xml("UploadId");
    let mut list = String::from("<CompleteMultipartUpload>");
    for (n, data) in parts {
        let etag = s3.put(&format!("{target}?partNumber={n}&uploadId={id}"), data, &[]).expect(200).etag();
        write!(list, "<Part><PartNumber>{n}</PartNumber><ETag>{etag}</ETag></Part>").unwrap();
    }
    (id, list + "</CompleteMultipartUpload>")
}

#[tokio::test(flavor = "multi_thread")]
async fn multipart_uploads_are_listed_completed_and_aborted() {
    let dir = tempfile::tempdir().unwrap();
    let (server, s3) = start(&dir).await;
    let data = pattern(2_000_000);
    let (a, b, c) = (&data[..700_000], &data[700_000..1_500_000], &data[1_500_000..]);
    let (id, list) = upload(&s3, "/test/big", &[(1, a), (3, b), (9, c)]);
    let parts = s3.get(&format!("/test/big?max-parts=2&uploadId={id}")).expect(200);
    assert_eq!(parts.xml_all("PartNumber"), ["1", "3"]);
    assert_eq!((parts.xml("IsTruncated"), parts.xml("NextPartNumberMarker")), ("true".into(), "3".into()));
    let rest = s3.get(&format!("/test/big?part-number-marker=3&uploadId={id}")).expect(200);
    assert_eq!(rest.xml_all("Size"), ["500000"]);

    let (other, _) = upload(&s3, "/test/big2", &[(1, a)]);
    assert_eq!(s3.get("/test?uploads=").expect(200).xml_all("UploadId"), [id.clone(), other.clone()]);
    assert_eq!(
        s3.get("/test?prefix=big2&uploads=").expect(200).xml_all("UploadId"),
        std::slice::from_ref(&other)
    );

    let wrong = list.replace("<PartNumber>3", "<PartNumber>4");
    let complete = |list: &str| s3.post(&format!("/test/big?uploadId={id}"), list);
    assert_eq!(complete(&wrong).expect(400).xml("Code"), "InvalidPart");
    assert!(complete(&list).expect(200).xml("ETag").contains("-3"));
    assert_eq!(complete(&list).expect(404).xml("Code"), "NoSuchUpload");
    assert_eq!(s3.get("/test/big").expect(200).body, data);
    let across = s3.send("/test/big", &["-H", "Range: bytes=699990-1500009"]).expect(206);
    assert_eq!(across.body, &data[699_990..1_500_010]);

    s3.delete(&format!("/test/big2?uploadId={other}")).expect(204);
    let again = s3.delete(&format!("/test/big2?uploadId={other}")).expect(404);
    assert_eq!(again.xml("Code"), "NoSuchUpload");
    let late = s3.put(&format!("/test/big2?partNumber=1&uploadId={other}"), a, &[]).expect(404);
    assert_eq!(late.xml("Code"), "NoSuchUpload");
    let log = server.log().unwrap();
    assert!(log.open_uploads().is_empty());
    assert_eq!(log.counts_by_op()["UploadPart"], 5);
    assert_eq!(log.repeated_parts(), BTreeMap::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_copies_and_bulk_deletes() {
    let dir = tempfile::tempdir().unwrap();
    let (server, s3) = start(&dir).await;
    for key in ["a", "b/1", "b/2", "b/3", "c"] {
        s3.put(&format!("/test/{key}"), key.as_bytes(), &["x-amz-meta-m: v"]).expect(200);
    }
    let list = |query: &str| s3.get(&format!("/test?{query}")).expect(200);
    assert_eq!(list("list-type=2").xml_all("Key"), ["a", "b/1", "b/2", "b/3", "c"]);
    let top = list("delimiter=%2F&list-type=2");
    assert_eq!(
        (top.xml_all("Key"), top.xml_all("Prefix")),
        (vec!["a".into(), "c".into()], vec!["b/".into()])
    );
    assert_eq!(list("list-type=2&start-after=b%2F2").xml_all("Key"), ["b/3", "c"]);
    let (mut keys, mut token) = (Vec::new(), String::new());
    loop {
        let page = if token.is_empty() {
            list("list-type=2&max-keys=2&prefix=b%2F")
        } else {
            list(&format!("continuation-token={token}&list-type=2&max-keys=2&prefix=b%2F"))
        };
        keys.extend(page.xml_all("Key"));
        token = page.xml("NextContinuationToken");
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(keys, ["b/1", "b/2", "b/3"]);

    s3.send("/test/copy", &["-X", "PUT", "-H", "x-amz-copy-source: /test/b/1"]).expect(200);
    s3.delete("/test/b/1").expect(204);
    let copy = s3.get("/test/copy").expect(200);
    assert_eq!((copy.body.as_slice(), copy.headers["x-amz-meta-m"].as_str()), (b"b/1".as_slice(), "v"));
    let doomed = "<Delete><Object><Key>a</Key></Object><Object><Key>none</Key></Object></Delete>";
    assert_eq!(s3.post("/test?delete=", doomed).expect(200).xml_all("Key"), ["a", "none"]);
    assert_eq!(list("list-type=2").xml_all("Key"), ["b/2", "b/3", "c", "copy"]);

    s3.send("/other", &["-X", "PUT"]).expect(200);
    assert_eq!(s3.send("/other", &["-X", "PUT"]).expect(409).xml("Code"), "BucketAlreadyOwnedByYou");
    assert_eq!(s3.get("/").expect(200).xml_all("Name"), ["other", "test"]);
    s3.head("/other").expect(200);
    s3.head("/missing-bucket").expect(404);
    let bulk = server.log().unwrap().succeeded("DeleteObjects").next().unwrap().keys.clone();
    assert_eq!(bulk, ["a", "none"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_reads_look_like_those_of_real_networks() {
    let dir = tempfile::tempdir().unwrap();
    let (server, s3) = start(&dir).await;
    let data = pattern(1 << 20);
    s3.put("/test/k", &data, &[]).expect(200);
    let once = |action| FaultRule::new(action).op("GetObject").times(1);
    let with = |action| {
        server.set_faults(&[once(action)]).unwrap();
        s3.get("/test/k")
    };
    assert_eq!(with(FaultAction::SlowDown).expect(503).xml("Code"), "SlowDown");
    s3.get("/test/k").expect(200);
    assert_eq!(with(FaultAction::Deny).expect(403).xml("Code"), "AccessDenied");
    let reset = with(FaultAction::Reset { after_bytes: 300_000 });
    assert_eq!((reset.exit, reset.body.len()), (56, 300_000));
    let gone = with(FaultAction::Reset { after_bytes: 0 });
    assert_eq!((gone.exit, gone.status), (56, 0));
    let short = with(FaultAction::Truncate { after_bytes: 300_001 });
    assert_eq!((short.exit, short.body.as_slice()), (18, &data[..300_001]));
    let corrupt = with(FaultAction::Corrupt { at: 70_000 }).expect(200).body;
    let changed: Vec<_> = (0..data.len()).filter(|i| corrupt[*i] != data[*i]).collect();
    assert_eq!(changed, [70_000]);
    let begin = Instant::now();
    assert_eq!(with(FaultAction::Delay { ms: 400 }).expect(200).body, data);
    assert!(begin.elapsed() >= Duration::from_millis(400));
    server.set_faults(&[once(FaultAction::Stall { after_bytes: 10 })]).unwrap();
    let stalled = s3.send("/test/k", &["--max-time", "1"]);
    assert_eq!((stalled.exit, stalled.body.as_slice()), (28, &data[..10]));
    server.set_faults(&[]).unwrap();
    assert_eq!(s3.get("/test/k").expect(200).body, data);
    let log = server.log().unwrap();
    assert_eq!(log.faults().len(), 8);
    let cut: Vec<_> =
        log.entries().iter().filter(|e| e.op == "GetObject" && !e.complete).map(|e| e.sent).collect();
    assert_eq!(cut, [300_000, 0, 300_001, 10]);
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_writes_either_prevent_them_or_hide_their_success() {
    let dir = tempfile::tempdir().unwrap();
    let (server, s3) = start(&dir).await;
    let data = pattern(4 << 20);
    let with = |op: &str, action| server.set_faults(&[FaultRule::new(action).op(op).times(1)]).unwrap();
    with("PutObject", FaultAction::Reset { after_bytes: 1_000_000 });
    let reset = s3.put("/test/k", &data, &[]);
    assert!(reset.exit == 55 || reset.exit == 56, "curl {}", reset.exit);
    s3.head("/test/k").expect(404);
    with("PutObject", FaultAction::LostResponse);
    assert_eq!(s3.put("/test/k", &data, &[]).status, 0);
    assert_eq!(s3.get("/test/k").expect(200).body, data);
    with("PutObject", FaultAction::SlowDown);
    s3.put("/test/k", &data, &[]).expect(503);
    s3.put("/test/k", &data, &[]).expect(200);

    let (id, list) = upload(&s3, "/test/big", &[(1, b"12345")]);
    with("CompleteMultipartUpload", FaultAction::LostResponse);
    assert_eq!(s3.post(&format!("/test/big?uploadId={id}"), &list).status, 0);
    assert_eq!(s3.post(&format!("/test/big?uploadId={id}"), &list).expect(404).xml("Code"), "NoSuchUpload");
    assert_eq!(s3.get("/test/big").expect(200).body, b"12345");

    let log = server.log().unwrap();
    let puts: Vec<_> = log.entries().iter().filter(|e| e.op == "PutObject").collect();
    assert!((1_000_000..4 << 20).contains(&puts[0].received), "{}", puts[0].received);
    assert_eq!((puts[0].status, puts[0].payload), (0, None));
    assert_eq!((puts[1].status, puts[1].complete), (200, false));
    let again = log.repeated_puts()["k"];
    assert_eq!((again.times, again.bytes), (1, 4 << 20));
    assert!(log.open_uploads().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_lost_was_acknowledged_and_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let (server, s3) = start(&dir).await;
    s3.put("/test/old", b"kept", &[]).expect(200);
    server.set_faults(&[FaultRule::new(FaultAction::Lose).op("PutObject").times(2)]).unwrap();
    let data = pattern(3 << 20);
    let lost = s3.put("/test/k", &data, &[]).expect(200);
    s3.get("/test/k").expect(404);
    s3.put("/test/old", b"lost", &[]).expect(200);
    assert_eq!(s3.get("/test/old").expect(200).body, b"kept", "what was there stays");
    assert_eq!(s3.get("/test?list-type=2").expect(200).xml_all("Key"), ["old"]);
    drop(server);

    let (server, s3) = start(&dir).await;
    s3.get("/test/k").expect(404);
    let kept = s3.put("/test/k", &data, &[]).expect(200);
    assert_eq!(kept.headers["etag"], lost.headers["etag"], "the same was said of what was lost");
    assert_eq!(s3.get("/test/k").expect(200).body, data);
    let log = server.log().unwrap();
    let faults: Vec<_> = log.entries().iter().filter(|e| e.fault.is_some()).map(|e| e.key.as_str()).collect();
    assert_eq!(faults, ["k", "old"]);
    assert_eq!(log.repeated_puts()["k"].bytes, 3 << 20);
    assert!(std::fs::read_dir(dir.path().join("data")).unwrap().count() <= 2, "its bytes are gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_listings_show_the_past_and_nothing_else_does() {
    let dir = tempfile::tempdir().unwrap();
    let (server, s3) = start(&dir).await;
    s3.put("/test/old", b"1", &[]).expect(200);
    s3.put("/test/deleted", b"1", &[]).expect(200);
    tokio::time::sleep(Duration::from_millis(3100)).await;
    s3.delete("/test/deleted").expect(204);
    s3.put("/test/new", b"1", &[]).expect(200);
    server
        .set_faults(&[FaultRule::new(FaultAction::StaleList { age_ms: 3000 }).op("ListObjectsV2").times(1)])
        .unwrap();
    assert_eq!(s3.get("/test?list-type=2").expect(200).xml_all("Key"), ["deleted", "old"]);
    s3.get("/test/new").expect(200);
    s3.get("/test/deleted").expect(404);
    assert_eq!(s3.get("/test?list-type=2").expect(200).xml_all("Key"), ["new", "old"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_objects_uploads_rules_and_log() {
    let dir = tempfile::tempdir().unwrap();
    let (server, s3) = start(&dir).await;
    s3.put("/test/k", b"kept", &["x-amz-meta-m: v"]).expect(200);
    let (id, list) = upload(&s3, "/test/big", &[(1, b"12345"), (2, b"6")]);
    server.set_faults(&[FaultRule::new(FaultAction::Deny).op("HeadObject").times(2)]).unwrap();
    s3.head("/test/k").expect(403);
    let before = server.log().unwrap().last_seq();
    drop(server);

    let (server, s3) = start(&dir).await;
    let kept = s3.get("/test/k").expect(200);
    assert_eq!((kept.body.as_slice(), kept.headers["x-amz-meta-m"].as_str()), (b"kept".as_slice(), "v"));
    s3.head("/test/k").expect(403);
    s3.head("/test/k").expect(200);
    assert_eq!(s3.get("/test?uploads=").expect(200).xml_all("UploadId"), std::slice::from_ref(&id));
    s3.post(&format!("/test/big?uploadId={id}"), &list).expect(200);
    assert_eq!(s3.get("/test/big").expect(200).body, b"123456");
    let log = server.log().unwrap();
    let seqs: Vec<_> = log.entries().iter().map(|e| e.seq).collect();
    assert_eq!(seqs, (1..=log.last_seq()).collect::<Vec<_>>());
    assert!(log.last_seq() > before);
    assert_eq!(log.put_bytes_by_key(), BTreeMap::from([("k".to_owned(), 4)]));
}
