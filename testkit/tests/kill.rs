//! The S3 server killed at any moment.
#![allow(missing_docs, clippy::unwrap_used)]

mod curl;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use berth_testkit::s3::LOG_FILE;
use berth_testkit::s3::log::RequestLog;
use curl::Curl;

struct Process {
    child: Child,
    s3: Curl,
}

impl Process {
    fn start(data: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_berth-test-s3"))
            .args(["--bucket", "test", "--data"])
            .arg(data)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let endpoint = line.trim().strip_prefix("listening ").expect("the line that says it is ready");
        Self { s3: Curl::signed(endpoint), child }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_kill_during_a_put_leaves_the_old_object_or_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let size = 8 << 20;
    let files: Vec<_> = (0..2u8)
        .map(|i| {
            let path = dir.path().join(format!("content-{i}"));
            fs::write(&path, vec![b'A' + i; size]).unwrap();
            path
        })
        .collect();
    let server = Process::start(&data);
    server.s3.put_file("/test/k", &files[0], &[]).expect(200);
    server.kill();
    let (mut current, mut interrupted) = (0, 0);
    for round in 0..12u64 {
        let server = Process::start(&data);
        let target = 1 - current;
        let begin = Instant::now();
        let mut put = server.s3.spawn_put("/test/k", &files[target], &["--limit-rate", "80M"]);
        // From before the first byte to about the last one.
        std::thread::sleep(Duration::from_millis(5 + round * 13));
        server.kill();
        let acknowledged = put.wait().unwrap().success();
        assert!(begin.elapsed() < Duration::from_secs(30));

        let server = Process::start(&data);
        let body = server.s3.get("/test/k").expect(200).body;
        assert_eq!(body.len(), size, "round {round}");
        let found = usize::from(body[0] - b'A');
        assert!(body.iter().all(|b| *b == body[0]), "round {round}: a torn object");
        assert!(!acknowledged || found == target, "round {round}: an acknowledged object is gone");
        interrupted += usize::from(found != target);
        current = found;
        assert_eq!(fs::read_dir(data.join("data")).unwrap().count(), 1, "round {round}: leftovers");
    }
    assert!(interrupted >= 3, "only {interrupted} of 12 kills hit a running put");
}

#[test]
fn what_was_acknowledged_before_a_kill_is_there_and_in_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let mut acknowledged = Vec::new();
    for round in 0..4 {
        let server = Process::start(&data);
        let s3 = server.s3.clone();
        let writers: Vec<_> = (0..3)
            .map(|writer| {
                let s3 = s3.clone();
                std::thread::spawn(move || {
                    let keys = (0..1000).map(|n| format!("r{round}-w{writer}-{n}"));
                    let stored =
                        |key: &String| s3.put(&format!("/test/{key}"), key.as_bytes(), &[]).status == 200;
                    keys.take_while(stored).collect::<Vec<_>>()
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(500));
        server.kill();
        acknowledged.extend(writers.into_iter().flat_map(|w| w.join().unwrap()));
    }
    assert!(acknowledged.len() > 20, "only {} objects", acknowledged.len());
    let server = Process::start(&data);
    for key in &acknowledged {
        assert_eq!(server.s3.get(&format!("/test/{key}")).expect(200).text(), *key);
    }
    let log = RequestLog::read(&data.join(LOG_FILE)).unwrap();
    let received = log.put_bytes_by_key();
    let missing: Vec<_> =
        acknowledged.iter().filter(|k| received.get(*k) != Some(&(k.len() as u64))).collect();
    assert_eq!(missing, Vec::<&String>::new());
    let seqs: Vec<_> = log.entries().iter().map(|e| e.seq).collect();
    assert_eq!(seqs, (1..=log.last_seq()).collect::<Vec<_>>());
}
