//! Transfers that stage nothing, into an image store: of files that are read where they lie, and of an image of another store.

use std::time::Duration;

use crate::bed::{Bed, Fuse, MIB, Work, qemu_img, raw_image, same_disk, sum, text};
use berth_core::ids::{Digest, Sha256Sum};
use berth_core::reason::Reason;
use berth_core::stages::Stage;
use berth_node::transfer::{Direct, Origin, Source, TransferError};
use berth_objectstore::source::{ObjectSource, RangedSource};
use berth_objectstore::{Body, ObjectStore as _, PutCondition};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(20);

fn ranged(bed: &Bed, switch: &str, file: &str) -> Source {
    let Origin::Remote(source) = bed.origin(switch, file, PATIENCE) else { unreachable!() };
    Source::Direct(Direct::Ranged(source))
}

/// The largest file that is left of it.
fn largest_file(work: &Work) -> u64 {
    let files = std::fs::read_dir(&work.job.dir).unwrap();
    files.map(|file| file.unwrap().metadata().unwrap().len()).max().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_image_is_read_where_it_lies_and_goes_on_where_it_was() {
    let bed = Bed::new().await;
    let disk = bed.file("disk");
    raw_image(&disk, 160, &[0..60, 70..140]);
    let mut work = Work::new(&bed, "cut");
    work.job.promised = berth_core::units::Bytes::mib(8);
    work.job.checksum = Some(sum(&disk));
    let source = ranged(&bed, "slow/80000000", "disk");
    let mut cuts = 0;
    let durable = loop {
        let cancel = CancellationToken::new();
        *work.told.fuse.lock().unwrap() = Some(Fuse::new((40 + 8 * (cuts * 7 % 5)) * MIB, &cancel));
        match work.read_until(&bed, &source, &cancel).await {
            Ok(durable) => break durable,
            Err(TransferError::Cancelled) => cuts += 1,
            Err(error) => panic!("{}", error.chain()),
        }
        assert!(largest_file(&work) < MIB, "nothing but an index is kept");
        assert!(cuts < 30, "no progress");
    };
    assert!(cuts >= 2, "too few cuts to tell");
    assert_eq!(durable.source_digest, Some(Digest(sum(&disk))), "the sum covers what came before each cut");
    assert!(same_disk(&bed.restore(&durable).await, &disk));
    assert_eq!(work.told.stages.lock().unwrap().first(), Some(&Stage::Upload), "nothing is fetched first");
    bed.check_nothing_left(&work).await;
    let read = bed.web.log().unwrap().bytes_sent();
    // A window, and what had been read ahead.
    assert!(read <= (160 + (32 + 16) * cuts + 2) * MIB, "{read} bytes were read in {cuts} cuts");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_as_it_was_is_never_mixed() {
    let bed = Bed::new().await;
    raw_image(&bed.file("disk"), 96, &[0..96]);
    let mut work = Work::new(&bed, "changed");
    work.job.checksum = Some(Sha256Sum::of(b"another"));
    let source = ranged(&bed, "plain", "disk");
    let wrong = work.read_until(&bed, &source, &CancellationToken::new()).await.unwrap_err();
    assert_eq!(wrong.reason(), Reason::ChecksumMismatch, "{}", wrong.chain());
    work.abandon(&bed, false).await;
    bed.check_nothing_published().await;

    work.job.checksum = None;
    let cancel = CancellationToken::new();
    *work.told.fuse.lock().unwrap() = Some(Fuse::new(64 * MIB, &cancel));
    let cut = work.read_until(&bed, &ranged(&bed, "slow/80000000", "disk"), &cancel).await;
    assert!(matches!(cut, Err(TransferError::Cancelled)), "{cut:?}");
    raw_image(&bed.file("disk"), 96, &[5..96]);
    let changed = work.read_until(&bed, &source, &CancellationToken::new()).await.unwrap_err();
    assert_eq!(changed.reason(), Reason::SourceChanged, "{}", changed.chain());
    bed.check_nothing_published().await;

    for (switch, file) in [("noranges", "disk"), ("plain", "odd")] {
        std::fs::write(bed.file("odd"), vec![7; 1000]).unwrap();
        let work = Work::new(&bed, switch);
        let refused = work.read_until(&bed, &ranged(&bed, switch, file), &CancellationToken::new()).await;
        assert!(matches!(refused, Err(TransferError::NotDirect(_))), "{switch}: {refused:?}");
    }
}

/// Every format that is read by ranges, as `qemu-img` writes it: its driver, and options.
const FORMATS: [(&str, &[&str]); 9] = [
    ("qcow2", &[]),
    ("qcow2", &["-c"]),
    ("qcow2", &["-c", "-o", "compression_type=zstd"]),
    ("qcow2", &["-o", "extended_l2=on"]),
    ("vmdk", &[]),
    ("vmdk", &["-o", "subformat=streamOptimized"]),
    ("vpc", &["-o", "force_size=on"]),
    ("vpc", &["-o", "subformat=fixed,force_size=on"]),
    ("vhdx", &[]),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_format_is_read_where_it_lies_and_goes_on_where_it_was() {
    let bed = Bed::new().await;
    let disk = bed.dir.path().join("disk");
    raw_image(&disk, 96, &[0..50, 60..90]);
    for (number, (driver, options)) in FORMATS.iter().enumerate() {
        let name = format!("disk-{number}.{driver}");
        let file = bed.file(&name);
        let convert = ["convert", "-q", "-f", "raw", "-O", driver];
        qemu_img(&[&convert[..], options, &[text(&disk), text(&file)]].concat());
        let before = bed.web.log().unwrap().bytes_sent();
        let mut work = Work::new(&bed, &format!("ranges-{number}"));
        work.job.promised = berth_core::units::Bytes::mib(8);
        let source = ranged(&bed, "slow/120000000", &name);
        let cancel = CancellationToken::new();
        *work.told.fuse.lock().unwrap() = Some(Fuse::new(50 * MIB, &cancel));
        let cut = work.read_until(&bed, &source, &cancel).await;
        assert!(matches!(cut, Err(TransferError::Cancelled)), "{name}: {cut:?}");
        assert!(largest_file(&work) < MIB, "{name}: nothing but an index is kept");
        work.told.fuse.lock().unwrap().take();
        let durable = work.read_until(&bed, &source, &CancellationToken::new()).await.unwrap();
        assert_eq!(durable.source_digest, None, "{name}: not all of its bytes were read");
        assert!(same_disk(&bed.restore(&durable).await, &disk), "{name}");
        bed.check_nothing_left(&work).await;
        let (read, size) = (bed.web.log().unwrap().bytes_sent() - before, file.metadata().unwrap().len());
        // A window, what had been read ahead, and the tables, again after the cut.
        assert!(read <= size + (32 + 24) * MIB, "{name}: {read} bytes were read of {size}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_in_a_bucket_is_read_with_few_requests() {
    let bed = Bed::new().await;
    let disk = bed.dir.path().join("disk");
    raw_image(&disk, 64, &[0..20, 30..60]);
    for (driver, options) in [FORMATS[1], FORMATS[2], FORMATS[5], FORMATS[8]] {
        let (name, file) = (format!("{driver}-{}", options.len()), bed.file("image"));
        let convert = ["convert", "-q", "-f", "raw", "-O", driver];
        qemu_img(&[&convert[..], options, &[text(&disk), text(&file)]].concat());
        let content = std::fs::read(&file).unwrap();
        let (key, length) = (format!("upload/{name}"), content.len() as u64);
        let store = bed.chunks.store().clone();
        store.put(&key, Body::Bytes(content.into()), PutCondition::Always, None).await.unwrap();
        let source: RangedSource = ObjectSource::new(store, key.as_str(), None, PATIENCE).into();
        let work = Work::new(&bed, &name);
        let source = Source::Direct(Direct::Ranged(source));
        let durable = work.read_until(&bed, &source, &CancellationToken::new()).await.unwrap();
        assert!(same_disk(&bed.restore(&durable).await, &disk), "{name}");
        let log = bed.s3.log().unwrap();
        let reads: Vec<u64> =
            log.entries().iter().filter(|e| e.key == key && e.op == "GetObject").map(|e| e.sent).collect();
        let sent: u64 = reads.iter().sum();
        println!("{name}: {length} bytes, {sent} of them in {} requests", reads.len());
        // Twice the head and some tables; what the disk needs once.
        assert!(sent <= length + 4 * MIB, "{name}: {sent} bytes of {length}");
        assert!(reads.len() as u64 <= length / (4 * MIB) + 24, "{name}: {} requests", reads.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn by_ranges_too_nothing_is_mixed_and_a_sum_is_refused() {
    let bed = Bed::new().await;
    let disk = bed.dir.path().join("disk");
    let write = |data: std::ops::Range<u64>| {
        raw_image(&disk, 96, &[data]);
        qemu_img(&["convert", "-q", "-f", "raw", "-O", "qcow2", text(&disk), text(&bed.file("disk.qcow2"))]);
    };
    write(0..96);
    let mut work = Work::new(&bed, "changed");
    let cancel = CancellationToken::new();
    *work.told.fuse.lock().unwrap() = Some(Fuse::new(50 * MIB, &cancel));
    let cut = work.read_until(&bed, &ranged(&bed, "slow/80000000", "disk.qcow2"), &cancel).await;
    assert!(matches!(cut, Err(TransferError::Cancelled)), "{cut:?}");
    write(5..96);
    let source = ranged(&bed, "plain", "disk.qcow2");
    let changed = work.read_until(&bed, &source, &CancellationToken::new()).await.unwrap_err();
    assert_eq!(changed.reason(), Reason::SourceChanged, "{}", changed.chain());
    std::fs::remove_file(bed.file("disk.qcow2")).unwrap();
    let gone = work.read_until(&bed, &source, &CancellationToken::new()).await.unwrap_err();
    assert_eq!(gone.reason(), Reason::SourceNotFound, "{}", gone.chain());
    bed.check_nothing_published().await;

    write(0..96);
    let cut_off = std::fs::read(bed.file("disk.qcow2")).unwrap();
    std::fs::write(bed.file("cut.qcow2"), &cut_off[..cut_off.len() / 2]).unwrap();
    let cut_off = Work::new(&bed, "cut-off");
    let torn = ranged(&bed, "plain", "cut.qcow2");
    let torn = cut_off.read_until(&bed, &torn, &CancellationToken::new()).await.unwrap_err();
    assert_eq!(torn.reason(), Reason::ImageTruncated, "{}", torn.chain());
    work = Work::new(&bed, "summed");
    work.job.checksum = Some(sum(&bed.file("disk.qcow2")));
    let refused = work.read_until(&bed, &source, &CancellationToken::new()).await;
    assert!(matches!(refused, Err(TransferError::NotDirect(_))), "{refused:?}");
    bed.check_nothing_published().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_goes_from_store_to_store_and_is_the_same() {
    let bed = Bed::new().await;
    let disk = bed.file("disk");
    raw_image(&disk, 130, &[0..60, 70..129]);
    let first = Work::new(&bed, "first");
    let whole = first.run(&bed, &bed.origin("plain", "disk", PATIENCE)).await.unwrap();
    let from = bed.other_store("p").await;
    let to = bed.other_store("q").await;
    let other = Bed { chunks: to, ..bed };
    let work = Work::new(&other, "copy");
    let source = Source::Direct(Direct::Stored { chunks: from.clone(), digest: whole.digest });
    let mut cuts = 0;
    let copied = loop {
        let cancel = CancellationToken::new();
        *work.told.fuse.lock().unwrap() = Some(Fuse::new((40 + 8 * cuts) * MIB, &cancel));
        match work.read_until(&other, &source, &cancel).await {
            Ok(durable) => break durable,
            Err(TransferError::Cancelled) => cuts += 1,
            Err(error) => panic!("{}", error.chain()),
        }
        assert_eq!(from.pinned(&work.job.uid).await.unwrap(), Some(whole.digest), "it is read");
    };
    assert!(cuts >= 1);
    assert_eq!(copied.digest, whole.digest);
    assert_eq!(copied.source_digest, None, "it has no source but itself");
    assert!(same_disk(&other.restore(&copied).await, &disk));
    assert_eq!(from.pinned(&work.job.uid).await.unwrap(), None, "nobody reads it any more");

    let absent = Digest(Sha256Sum::of(b"none"));
    let source = Source::Direct(Direct::Stored { chunks: from.clone(), digest: absent });
    let missing = Work::new(&other, "absent").read_until(&other, &source, &CancellationToken::new()).await;
    assert_eq!(missing.unwrap_err().reason(), Reason::SourceNotFound);
}
