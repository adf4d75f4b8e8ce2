//! `berth-node file` as people run it, against an S3 server that fails.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

#[allow(dead_code)] // no test program uses all of it
mod bed;

use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use bed::{Bed, MIB, text};
use berth_core::ids::Sha256Sum;
use berth_core::units::Bytes;
use berth_objectstore::{Body, ObjectStore as _, PutCondition};
use berth_testkit::s3::fault::{FaultAction, FaultRule, write_rules};
use tokio::process::Command;

const KEY: &str = "dir/data.bin";

/// Bytes of which no two words are equal.
fn noise(mib: u64) -> Vec<u8> {
    let words = u32::try_from(mib * MIB / 4).unwrap();
    (0..words).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect()
}

fn command(bed: &Bed, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth-node"));
    command
        .arg("file")
        .args(words)
        .args(["--bucket", "test", "-o", "json", "--store-endpoint", &bed.s3.endpoint()])
        .env("AWS_ACCESS_KEY_ID", bed.s3.access_key())
        .env("AWS_SECRET_ACCESS_KEY", bed.s3.secret_key())
        .env("TMPDIR", bed.dir.path().join("tmp"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

async fn end(mut command: Command) -> Output {
    tokio::time::timeout(Duration::from_secs(120), command.output()).await.expect("the command ends").unwrap()
}

async fn succeeds(command: Command) -> serde_json::Value {
    let output = end(command).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

async fn fails(command: Command, says: &[&str]) {
    let output = end(command).await;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && says.iter().all(|word| errors.contains(word)), "{says:?}: {errors}");
}

struct Place {
    bed: Bed,
    file: PathBuf,
}

impl Place {
    async fn new() -> Self {
        let bed = Bed::new().await;
        for dir in ["tmp", "out"] {
            std::fs::create_dir(bed.dir.path().join(dir)).unwrap();
        }
        let file = bed.dir.path().join("out/data.bin");
        Self { bed, file }
    }

    fn faults(&self, rules: &[FaultRule]) {
        write_rules(&self.bed.dir.path().join("s3"), rules).unwrap();
    }

    async fn put(&self, bytes: Vec<u8>) {
        let store = self.bed.chunks.store();
        let sum = Sha256Sum::of(&bytes);
        store.put(KEY, Body::Bytes(bytes.into()), PutCondition::Always, Some(sum)).await.unwrap();
    }

    async fn object(&self) -> Vec<u8> {
        let got = self.bed.chunks.store().get(KEY, None, None).await.unwrap();
        got.collect(Bytes::gib(1)).await.unwrap().to_vec()
    }

    /// What lies beside the file and among the temporary ones.
    fn left(&self) -> Vec<String> {
        let dirs = ["tmp", "out"].map(|dir| self.bed.dir.path().join(dir));
        let entries = dirs.iter().flat_map(|dir| std::fs::read_dir(dir).unwrap());
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "data.bin").collect()
    }

    fn fetch(&self, more: &[&str]) -> Command {
        command(&self.bed, &[&["fetch", KEY, text(&self.file)], more].concat())
    }

    fn send(&self, more: &[&str]) -> Command {
        command(&self.bed, &[&["send", text(&self.file), KEY], more].concat())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a41_a_fetch_goes_on_after_a_kill_and_its_file_appears_whole() {
    let place = Place::new().await;
    let content = noise(64);
    place.put(content.clone()).await;
    std::fs::write(&place.file, b"what was there before").unwrap();
    place.faults(&[FaultRule::new(FaultAction::Stall { after_bytes: 40 << 20 }).op("GetObject")]);
    let partial = place.file.with_file_name(".data.bin.berth").join("data.bin");
    let mut child = place.fetch(&[]).spawn().unwrap();
    let mut there = 0;
    for _ in 0..500 {
        there = std::fs::metadata(&partial).map_or(0, |file| file.len());
        if there >= 36 * MIB {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(there >= 36 * MIB, "it got as far as {there}");
    child.kill().await.unwrap();
    assert_eq!(std::fs::read(&place.file).unwrap(), b"what was there before");
    place.faults(&[]);
    let seq = place.bed.s3.log().unwrap().last_seq();
    let sum = Sha256Sum::of(&content);
    let told = succeeds(place.fetch(&["--checksum", &format!("sha256:{sum}")])).await;
    assert_eq!(
        (told["size"].as_u64(), told["digest"].as_str()),
        (Some(64 * MIB), Some(&*format!("sha256:{sum}")))
    );
    assert!(std::fs::read(&place.file).unwrap() == content, "another content");
    let log = place.bed.s3.log().unwrap().after(seq);
    let after = log.entries().iter().filter(|entry| entry.fault.is_none()); // not the one that was killed
    let sent: u64 = after.map(|entry| entry.sent).sum();
    assert!(sent <= 32 * MIB + (64 - 40) * MIB, "{sent} bytes came after the kill");
    assert_eq!(place.left(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a41_a_send_goes_on_after_a_kill_and_sends_no_part_twice() {
    let place = Place::new().await;
    let content = noise(64);
    std::fs::write(&place.file, &content).unwrap();
    place.faults(&[FaultRule::new(FaultAction::Delay { ms: 400 }).op("UploadPart")]);
    let mut child = place.send(&[]).spawn().unwrap();
    for _ in 0..500 {
        if place.bed.s3.log().unwrap().entries().iter().filter(|entry| entry.op == "UploadPart").count() >= 2
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    child.kill().await.unwrap();
    place.faults(&[]);
    let told = succeeds(place.send(&[])).await;
    assert_eq!(told["digest"], format!("sha256:{}", Sha256Sum::of(&content)));
    assert!(place.object().await == content, "another content");
    let log = place.bed.s3.log().unwrap();
    let count = |op: &str| log.entries().iter().filter(|entry| entry.op == op).count();
    assert_eq!(count("CreateMultipartUpload"), 1);
    assert!(count("UploadPart") <= 5, "{} parts for 4", count("UploadPart"));
    assert!(log.open_uploads().is_empty());
    assert_eq!(place.left(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_content_than_expected_is_not_put_in_place() {
    let place = Place::new().await;
    place.put(noise(4)).await;
    let wrong = format!("sha256:{}", "0".repeat(64));
    fails(place.fetch(&["--checksum", &wrong]), &[&wrong, "data.bin"]).await;
    assert!(!place.file.exists());
    assert_eq!(place.left(), Vec::<String>::new());
    // The store's own checksum counts where none was asked for.
    place.faults(&[FaultRule::new(FaultAction::Corrupt { at: 1 << 20 }).op("GetObject")]);
    fails(place.fetch(&["--retries", "0"]), &["which the store says of it"]).await;
    assert!(!place.file.exists());
    place.faults(&[]);
    succeeds(place.fetch(&[])).await;
    assert!(std::fs::read(&place.file).unwrap() == noise(4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_is_tried_as_often_as_allowed_and_costs_nothing() {
    let place = Place::new().await;
    place.put(noise(4)).await;
    place.faults(&[FaultRule::new(FaultAction::SlowDown)]);
    fails(place.fetch(&["--retries", "0"]), &["data.bin"]).await;
    std::fs::write(&place.file, b"to be sent").unwrap();
    fails(place.send(&["--retries", "0"]), &["the object store failed"]).await;
    assert_eq!(place.left(), Vec::<String>::new(), "nothing was begun");
    let times = |times| FaultRule::new(FaultAction::SlowDown).times(times);
    place.faults(&[times(4)]);
    succeeds(place.send(&["--retries", "9"])).await;
    assert_eq!(place.object().await, b"to be sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_said_and_not_tried_again() {
    let place = Place::new().await;
    fails(place.fetch(&[]), &["data.bin"]).await;
    fails(place.send(&[]), &["failed to find"]).await;
    let nowhere = place.bed.dir.path().join("none/file");
    fails(command(&place.bed, &["fetch", KEY, text(&nowhere)]), &["failed to find", "none"]).await;
    assert_eq!(place.left(), Vec::<String>::new());
}

/// A file system of its own, where this machine lets one be mounted.
struct Small(PathBuf);

impl Small {
    fn mount(dir: PathBuf) -> Option<Self> {
        std::fs::create_dir(&dir).unwrap();
        let mut mount = std::process::Command::new("mount");
        let done = mount.args(["-t", "tmpfs", "-o", "size=24m", "none"]).arg(&dir).output();
        done.is_ok_and(|done| done.status.success()).then_some(Self(dir))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_is_said_with_numbers_and_left_as_it_was() {
    let place = Place::new().await;
    let Some(small) = Small::mount(place.bed.dir.path().join("small")) else { return };
    place.put(noise(32)).await;
    let file = small.0.join("data.bin");
    fails(command(&place.bed, &["fetch", KEY, text(&file)]), &["32 MiB", "room for"]).await;
    assert_eq!(std::fs::read_dir(&small.0).unwrap().count(), 0);
    // It fills up after the command was killed: it goes on once there is room.
    place.put(noise(16)).await;
    place.faults(&[FaultRule::new(FaultAction::Stall { after_bytes: 2 << 20 }).op("GetObject")]);
    let child = command(&place.bed, &["fetch", KEY, text(&file)]).spawn().unwrap();
    let partial = small.0.join(".data.bin.berth/data.bin");
    for _ in 0..500 {
        if partial.exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(child);
    std::fs::write(small.0.join("other"), vec![1; 12 << 20]).unwrap();
    place.faults(&[]);
    fails(command(&place.bed, &["fetch", KEY, text(&file)]), &["16 MiB", "room for"]).await;
    std::fs::remove_file(small.0.join("other")).unwrap();
    succeeds(command(&place.bed, &["fetch", KEY, text(&file)])).await;
    assert!(std::fs::read(&file).unwrap() == noise(16));
}
