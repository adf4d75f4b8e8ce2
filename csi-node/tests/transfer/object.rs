//! One object of an image, in a format of other tools, on an S3 server that counts and fails.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_core::ids::Digest;
use berth_core::reason::Reason;
use berth_core::stages::{Shape, Stage};
use berth_core::units::Bytes;
use berth_image::{Compression, OutputFormat};
use berth_node::transfer::{
    Claim, Direct, ObjectAttempt, ObjectTarget, Origin, Reporter, SentObject, Snapshot, Source,
    TransferError, abandon_object, send,
};
use berth_objectstore::ObjectStore as _;
use berth_testkit::s3::fault::{FaultAction, FaultRule};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use crate::bed::{Bed, Fuse, MIB, Told, Work, qemu_img, raw_image, same_disk, sum, text};

const PATIENCE: Duration = Duration::from_secs(20);
const QCOW2: OutputFormat = OutputFormat::Qcow2 { compression: Compression::Zlib };

/// Whose the work is, and what was told for others to go on with.
struct Asked {
    told: Arc<Told>,
    ours: AtomicBool,
    resume: Mutex<Option<String>>,
}

impl Asked {
    fn of(work: &Work) -> Arc<Self> {
        let told = Arc::clone(&work.told);
        Arc::new(Self { told, ours: AtomicBool::new(true), resume: Mutex::default() })
    }
}

impl Claim for Asked {
    fn holds(&self) -> BoxFuture<'_, bool> {
        futures::future::ready(self.ours.load(Ordering::Relaxed)).boxed()
    }
}

impl Reporter for Asked {
    fn progress(&self, shape: &Shape, now: Snapshot) {
        self.told.progress(shape, now);
    }

    fn resume(&self, text: String) {
        *self.resume.lock().unwrap() = Some(text);
    }
}

fn target(bed: &Bed, key: &str, format: OutputFormat) -> ObjectTarget {
    ObjectTarget { store: bed.chunks.store().clone(), key: key.to_owned(), format }
}

fn staged(bed: &Bed, file: &str) -> Source {
    Source::Staged(bed.origin("plain", file, PATIENCE))
}

fn ranged(bed: &Bed, switch: &str, file: &str) -> Source {
    let Origin::Remote(source) = bed.origin(switch, file, PATIENCE) else { unreachable!() };
    Source::Direct(Direct::Ranged(source))
}

async fn send_until(
    work: &Work,
    source: &Source,
    target: &ObjectTarget,
    asked: &Arc<Asked>,
    resume: Option<&str>,
    cancel: &CancellationToken,
) -> Result<SentObject, TransferError> {
    let (journal, reporter) = (work.journal(), Arc::clone(asked) as Arc<dyn Reporter>);
    let attempt = ObjectAttempt {
        job: &work.job,
        source,
        target,
        journal: &journal,
        reporter: &reporter,
        resume,
        claim: &**asked,
    };
    tokio::time::timeout(Duration::from_secs(240), send(&attempt, cancel)).await.expect("an attempt ends")
}

async fn send_once(work: &Work, source: &Source, target: &ObjectTarget) -> Result<SentObject, TransferError> {
    send_until(work, source, target, &Asked::of(work), None, &CancellationToken::new()).await
}

/// Until it is done or cannot be; as often as faults that pass allow.
async fn send_patiently(work: &Work, source: &Source, target: &ObjectTarget) -> SentObject {
    for _ in 0..60 {
        match send_once(work, source, target).await {
            Ok(object) => return object,
            Err(error) => assert!(error.is_transient(), "{}", error.chain()),
        }
    }
    panic!("no end");
}

/// The object as a file.
async fn object(bed: &Bed, key: &str) -> PathBuf {
    let path = bed.dir.path().join(key.replace('/', "-"));
    let found = bed.chunks.store().get(key, None, None).await.unwrap();
    std::fs::write(&path, found.collect(Bytes::gib(1)).await.unwrap()).unwrap();
    path
}

/// The object as a raw disk, after the tool that owns the format has checked it.
async fn disk_of(bed: &Bed, key: &str, driver: &str) -> PathBuf {
    let path = object(bed, key).await;
    if driver == "qcow2" || driver == "vmdk" {
        qemu_img(&["check", "-q", "-f", driver, text(&path)]);
    }
    let raw = path.with_extension("disk");
    qemu_img(&["convert", "-q", "-f", driver, "-O", "raw", text(&path), text(&raw)]);
    raw
}

fn parts_sent(bed: &Bed) -> u64 {
    bed.s3.log().unwrap().succeeded("UploadPart").count() as u64
}

fn nothing_is_left(bed: &Bed, work: &Work) {
    let left: Vec<_> = std::fs::read_dir(&work.job.dir).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(bed.s3.log().unwrap().open_uploads(), std::collections::BTreeSet::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_source_becomes_every_format() {
    let bed = Bed::new().await;
    let disk = bed.file("disk");
    raw_image(&disk, 70, &[0..9, 30..50, 69..70]);
    for (format, name) in [("qcow2", "disk.qcow2"), ("vmdk", "disk.vmdk")] {
        qemu_img(&["convert", "-q", "-f", "raw", "-O", format, text(&disk), text(&bed.file(name))]);
    }
    let import = Work::new(&bed, "import");
    let stored = import.run(&bed, &bed.origin("plain", "disk", PATIENCE)).await.unwrap();
    let sources = [
        ("fetched", staged(&bed, "disk"), true),
        ("qcow2", staged(&bed, "disk.qcow2"), true),
        ("converted", staged(&bed, "disk.vmdk"), true),
        ("ranged", ranged(&bed, "plain", "disk"), true),
        ("by-ranges", ranged(&bed, "plain", "disk.qcow2"), false),
        ("sparse-by-ranges", ranged(&bed, "plain", "disk.vmdk"), false),
        (
            "stored",
            Source::Direct(Direct::Stored { chunks: bed.chunks.clone(), digest: stored.digest }),
            false,
        ),
    ];
    let formats = [
        ("raw", OutputFormat::Raw),
        ("qcow2", OutputFormat::Qcow2 { compression: Compression::None }),
        ("qcow2", QCOW2),
        ("qcow2", OutputFormat::Qcow2 { compression: Compression::Zstd }),
        ("vmdk", OutputFormat::Vmdk),
        ("vpc", OutputFormat::Vhd),
    ];
    for (from, source, summed) in &sources {
        for (number, (driver, format)) in formats.iter().enumerate() {
            // Every format from one source, and every source into one.
            if *from != "stored" && number != 3 {
                continue;
            }
            let work = Work::new(&bed, &format!("{from}-{number}"));
            let key = format!("out/{from}-{number}");
            let object = send_once(&work, source, &target(&bed, &key, *format)).await.unwrap();
            assert!(same_disk(&disk_of(&bed, &key, driver).await, &disk), "{key}");
            let found = bed.chunks.store().head(&key).await.unwrap();
            assert_eq!((object.size, object.virtual_size), (found.size, Bytes(70 * MIB)), "{key}");
            assert_eq!(object.source_digest.is_some(), *summed, "{key}");
            nothing_is_left(&bed, &work);
        }
    }
    let ranged = send_once(&Work::new(&bed, "again"), &sources[3].1, &target(&bed, "out/again", QCOW2)).await;
    assert_eq!(ranged.unwrap().source_digest, Some(Digest(sum(&disk))));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_read_by_ranges_goes_on_where_it_was() {
    let bed = Bed::new().await;
    let disk = bed.dir.path().join("disk");
    raw_image(&disk, 150, &[0..70, 80..140]);
    qemu_img(&[
        "convert",
        "-q",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-c",
        text(&disk),
        text(&bed.file("disk.qcow2")),
    ]);
    let source = ranged(&bed, "slow/120000000", "disk.qcow2");
    let mut work = Work::new(&bed, "ranges");
    work.job.promised = Bytes::ZERO;
    let target = target(&bed, "ranges", OutputFormat::Vhd);
    let mut cuts = 0;
    let object = loop {
        let cancel = CancellationToken::new();
        *work.told.fuse.lock().unwrap() = Some(Fuse::new((50 + 8 * cuts) * MIB, &cancel));
        match send_until(&work, &source, &target, &Asked::of(&work), None, &cancel).await {
            Ok(object) => break object,
            Err(TransferError::Cancelled) => cuts += 1,
            Err(error) => panic!("{}", error.chain()),
        }
        nothing_is_staged(&work);
        assert!(cuts < 30, "no progress");
    };
    assert!(cuts >= 2, "too few cuts to tell");
    assert_eq!(object.source_digest, None, "not all of its bytes were read");
    assert!(same_disk(&disk_of(&bed, "ranges", "vpc").await, &disk));
    nothing_is_left(&bed, &work);
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_anywhere_it_goes_on_and_repeats_at_most_a_window() {
    let bed = Bed::new().await;
    let disk = bed.file("disk");
    raw_image(&disk, 200, &[0..110, 120..190]);
    for (name, format, driver) in [("raw", OutputFormat::Raw, "raw"), ("qcow2", QCOW2, "qcow2")] {
        let source = ranged(&bed, "slow/120000000", "disk");
        let mut work = Work::new(&bed, name);
        (work.job.checksum, work.job.promised) = (Some(sum(&disk)), Bytes::ZERO);
        let target = target(&bed, name, format);
        let before = bed.s3.log().unwrap().last_seq();
        let mut cuts = 0;
        let object = loop {
            let cancel = CancellationToken::new();
            *work.told.fuse.lock().unwrap() = Some(Fuse::new((50 + 8 * (cuts * 7 % 5)) * MIB, &cancel));
            match send_until(&work, &source, &target, &Asked::of(&work), None, &cancel).await {
                Ok(object) => break object,
                Err(TransferError::Cancelled) => cuts += 1,
                Err(error) => panic!("{}", error.chain()),
            }
            nothing_is_staged(&work);
            assert!(cuts < 30, "no progress");
        };
        assert!(cuts >= 2, "too few cuts to tell");
        assert_eq!(
            object.source_digest,
            Some(Digest(sum(&disk))),
            "the sum covers what came before each cut"
        );
        assert!(same_disk(&disk_of(&bed, name, driver).await, &disk), "{name}");
        nothing_is_left(&bed, &work);
        let log = bed.s3.log().unwrap().after(before);
        assert_eq!(log.succeeded("CreateMultipartUpload").count(), 1, "{name}");
        let again: u64 = log.repeated_parts().values().map(|repeats| repeats.bytes).sum();
        assert!(again <= 32 * MIB * cuts, "{name}: {again} bytes were received again in {cuts} cuts");
    }
}

fn nothing_is_staged(work: &Work) {
    assert_eq!(std::fs::read_dir(&work.job.dir).unwrap().count(), 0, "no byte is staged");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_node_goes_on_with_what_was_told_and_the_store_has() {
    let bed = Bed::new().await;
    let disk = bed.file("disk");
    raw_image(&disk, 200, &[0..200]);
    let source = ranged(&bed, "slow/120000000", "disk");
    let (first, second) = (Work::on(&bed, "moved", "node-a", 1), Work::on(&bed, "moved", "node-b", 2));
    let (target, asked) = (target(&bed, "moved", QCOW2), Asked::of(&first));
    let cancel = CancellationToken::new();
    *first.told.fuse.lock().unwrap() = Some(Fuse::new(120 * MIB, &cancel));
    let cut = send_until(&first, &source, &target, &asked, None, &cancel).await;
    assert!(matches!(cut, Err(TransferError::Cancelled)), "{cut:?}");
    let (sent, resume) = (parts_sent(&bed), asked.resume.lock().unwrap().clone().unwrap());
    assert!(sent >= 3 && resume.len() < 4096, "{sent} parts, {} bytes told", resume.len());

    let asked = Asked::of(&second);
    let cancel = CancellationToken::new();
    let object = send_until(&second, &source, &target, &asked, Some(&resume), &cancel).await;
    assert_eq!(object.unwrap().source_digest, Some(Digest(sum(&disk))));
    assert!(same_disk(&disk_of(&bed, "moved", "qcow2").await, &disk));
    let log = bed.s3.log().unwrap();
    assert_eq!(log.succeeded("CreateMultipartUpload").count(), 1, "it is the same upload");
    let again: u64 = log.repeated_parts().values().map(|repeats| repeats.bytes).sum();
    assert!(again <= 32 * MIB, "{again} bytes were received again");
    nothing_is_left(&bed, &second);

    // What cannot be understood, or is not there any more, is begun anew.
    for (name, resume) in [("garbled", "{}".to_owned()), ("gone", resume)] {
        let work = Work::on(&bed, name, "node-c", 1);
        let target = ObjectTarget { key: name.to_owned(), ..target.clone() };
        let cancel = CancellationToken::new();
        send_until(&work, &source, &target, &Asked::of(&work), Some(&resume), &cancel).await.unwrap();
        assert!(same_disk(&disk_of(&bed, name, "qcow2").await, &disk), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_the_store_pass_and_never_make_another_object() {
    let bed = Bed::new().await;
    let disk = bed.file("disk");
    raw_image(&disk, 90, &[0..90]);
    let source = staged(&bed, "disk");
    let rules = [
        (
            "reset",
            FaultRule::new(FaultAction::Reset { after_bytes: 1 << 20 }).op("UploadPart").skip(1).times(5),
        ),
        ("lost", FaultRule::new(FaultAction::LostResponse).op("CompleteMultipartUpload").times(3)),
        ("late", FaultRule::new(FaultAction::LostResponse).op("UploadPart").skip(1).times(5)),
        ("busy", FaultRule::new(FaultAction::SlowDown).skip(2).times(6)),
        ("list", FaultRule::new(FaultAction::SlowDown).op("ListParts").times(5)),
        ("unknown", FaultRule::new(FaultAction::LostResponse).op("CreateMultipartUpload").times(2)),
    ];
    for (name, rule) in rules {
        let work = Work::new(&bed, name);
        bed.s3.set_faults(&[rule]).unwrap();
        send_patiently(&work, &source, &target(&bed, name, QCOW2)).await;
        assert!(!bed.s3.log().unwrap().faults().is_empty(), "{name} met no fault");
        bed.s3.set_faults(&[]).unwrap();
        assert!(same_disk(&disk_of(&bed, name, "qcow2").await, &disk), "{name}");
        nothing_is_left(&bed, &work);
    }
    bed.s3.set_faults(&[FaultRule::new(FaultAction::Deny).op("UploadPart")]).unwrap();
    let work = Work::new(&bed, "denied");
    let denied = target(&bed, "denied", QCOW2);
    let error = send_once(&work, &source, &denied).await.unwrap_err();
    assert_eq!(
        (error.reason(), error.is_transient()),
        (Reason::ObjectStoreDenied, false),
        "{}",
        error.chain()
    );
    bed.s3.set_faults(&[]).unwrap();
    abandon_object(&work.job, &denied, &work.journal(), None).await.unwrap();
    nothing_is_left(&bed, &work);
    assert!(bed.chunks.store().head("denied").await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_lost_the_work_makes_no_object_and_small_ones_are_one_request() {
    let bed = Bed::new().await;
    raw_image(&bed.file("disk"), 64, &[0..60]);
    raw_image(&bed.file("small"), 8, &[1..3]);
    for (name, parts) in [("disk", true), ("small", false)] {
        let (work, source) = (Work::new(&bed, name), ranged(&bed, "plain", name));
        let (target, asked) = (target(&bed, name, QCOW2), Asked::of(&work));
        asked.ours.store(false, Ordering::Relaxed);
        let before = parts_sent(&bed);
        let lost = send_until(&work, &source, &target, &asked, None, &CancellationToken::new()).await;
        assert!(matches!(lost, Err(TransferError::NotOurs)), "{lost:?}");
        assert!(bed.chunks.store().head(name).await.is_err(), "{name} is there");
        assert_eq!(parts_sent(&bed) > before, parts, "{name}");
        send_once(&work, &source, &target).await.unwrap();
        assert!(same_disk(&disk_of(&bed, name, "qcow2").await, &bed.file(name)), "{name}");
        assert_eq!(work.told.stages.lock().unwrap().contains(&Stage::Verify), parts);
        nothing_is_left(&bed, &work);
        assert_eq!(parts_sent(&bed) > before, parts, "{name}");
    }
}
