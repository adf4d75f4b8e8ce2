//! Imports against a real S3 protocol and a real web server, with images of `qemu-img`.

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::bed::{Bed, Fuse, MIB, Work, qemu_img, raw_image, same_disk, sum, text};
use berth_core::ids::Digest;
use berth_core::reason::Reason;
use berth_core::stages::Stage;
use berth_core::units::{Bytes, Generation, Timestamp};
use berth_node::transfer::{Origin, TransferError, abandon, probe_source};
use berth_objectstore::chunks::publish::Expected;
use berth_objectstore::chunks::session::{Session, Writer};
use berth_testkit::http_source::HttpSource;
use berth_testkit::s3::fault::{FaultAction, FaultRule};
use berth_testkit::vhdx::name_log;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(20);

/// A format, options of `qemu-img convert`, and whether a tool must convert it back.
const FORMATS: [(&str, &[&str], bool); 8] = [
    ("raw", &[], false),
    ("qcow2", &[], false),
    ("qcow2", &["-c"], false),
    ("qcow2", &["-c", "-o", "compression_type=zstd"], false),
    ("vmdk", &["-o", "subformat=streamOptimized"], false),
    ("vpc", &["-o", "subformat=dynamic,force_size"], false),
    ("vpc", &["-o", "subformat=fixed"], false),
    ("vhdx", &[], false),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_format_comes_back_as_the_disk_it_is() {
    let bed = Bed::new().await;
    let disk = bed.dir.path().join("disk");
    raw_image(&disk, 24, &[1..3, 10..11, 20..22]);
    for (number, (format, options, converted)) in FORMATS.into_iter().enumerate() {
        let name = format!("{format}-{number}");
        let file = bed.file(&name);
        qemu_img(&[&["convert", "-f", "raw", "-O", format], options, &[text(&disk), text(&file)]].concat());
        let origin = bed.origin("plain", &name, PATIENCE);
        let Origin::Remote(source) = &origin else { unreachable!() };
        let work = Work::new(&bed, &name);
        let probed = probe_source(source, &work.job.limits, None).await.unwrap();
        assert_eq!(probed.converted, converted, "{name}");
        let durable =
            work.run(&bed, &origin).await.unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
        assert_eq!(durable.source_digest, Some(Digest(sum(&file))), "{name}");
        assert_eq!(durable.virtual_size, probed.virtual_size, "{name}");
        // The last chunk counts as data where it is not whole: some formats round the size up.
        let rest = durable.virtual_size.0 % (256 << 10);
        assert_eq!(durable.real_size, Bytes(5 * MIB + rest), "{name}");
        assert!(same_disk(&bed.restore(&durable).await, &disk), "{name}");
        let mut expected = vec![Stage::Fetch, Stage::Convert, Stage::Upload, Stage::Verify, Stage::Publish];
        expected.retain(|stage| converted || *stage != Stage::Convert);
        assert_eq!(*work.told.stages.lock().unwrap(), expected, "{name}");
        bed.check_nothing_left(&work).await;
        let (manifest, _) = bed.chunks.manifest(&work.job.name).await.unwrap().unwrap();
        assert_eq!((manifest.digest, manifest.owner), (durable.digest, work.job.uid.clone()));
    }
    let chunks = bed.keys().await.into_iter().filter(|key| key.contains("/chunks/")).count();
    assert!(chunks < 30, "the same content was stored {chunks} times");
}

/// Runs an import that must fail, takes it back as the agent does, and looks for traces.
async fn refused(bed: &Bed, work: &Work, origin: &Origin, reason: Reason) -> TransferError {
    let error = work.run(bed, origin).await.expect_err(&work.job.name.name);
    assert_eq!(error.reason(), reason, "{}: {}", work.job.name, error.chain());
    assert!(!error.is_transient(), "{}", error.chain());
    work.abandon(bed, false).await;
    bed.check_nothing_left(work).await;
    bed.check_nothing_published().await;
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_sources_are_refused_with_their_reason_and_leave_nothing() {
    let bed = Bed::new().await;
    let disk = bed.file("disk");
    raw_image(&disk, 20, &[0..20]);
    let file = |name: &str| text(&bed.file(name)).to_owned();
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &file("disk"), "-F", "raw", &file("backed")]);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &format!("data_file={}", file("data")),
        &file("outside"),
        "1M",
    ]);
    qemu_img(&["create", "-q", "-f", "qcow2", &file("huge"), "3G"]);
    qemu_img(&["convert", "-q", "-f", "raw", "-O", "qcow2", &file("disk"), &file("cut")]);
    let whole = std::fs::read(bed.file("cut")).unwrap();
    std::fs::write(bed.file("cut"), &whole[..whole.len() / 2]).unwrap();
    let secret = ["--object", "secret,id=s,data=x"];
    // Not LUKS: `qemu-img` times its key derivation, and now and then fails on a busy machine.
    let aes = ["-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=s"];
    qemu_img(&[&["create", "-q"], &secret[..], &aes, &[&file("locked"), "1M"]].concat());
    std::fs::write(bed.file("text"), b"# Disk DescriptorFile\nRW 1 FLAT \"/etc/passwd\" 0\n".repeat(30))
        .unwrap();

    let cases = [
        ("plain", "backed", Reason::ImageHasBackingFile),
        ("plain", "outside", Reason::ImageHasDataFile),
        ("plain", "huge", Reason::VirtualSizeTooLarge),
        ("plain", "cut", Reason::ImageTruncated),
        ("plain", "locked", Reason::ImageEncrypted),
        ("plain", "absent", Reason::SourceNotFound),
        ("forbidden", "disk", Reason::SourceForbidden),
        ("changing", "disk", Reason::SourceChanged),
    ];
    for (switch, name, reason) in cases {
        let work = Work::new(&bed, &format!("{switch}-{name}"));
        refused(&bed, &work, &bed.origin(switch, name, PATIENCE), reason).await;
    }
    let work = Work::new(&bed, "text");
    let error = work.run(&bed, &bed.origin("plain", "text", PATIENCE)).await.unwrap_err();
    assert!(matches!(error, TransferError::Refused(_)), "{}", error.chain());
    work.abandon(&bed, false).await;

    let origin = bed.origin("plain", "disk", PATIENCE);
    let mut work = Work::new(&bed, "wrong-sum");
    work.job.checksum = Some(berth_core::ids::Sha256Sum::of(b"else"));
    let error = refused(&bed, &work, &origin, Reason::ChecksumMismatch).await;
    assert!(error.to_string().contains(&sum(&disk).to_string()), "{error}");
    let mut work = Work::new(&bed, "too-large");
    work.job.limits.bytes = Bytes::mib(19);
    refused(&bed, &work, &origin, Reason::SourceTooLarge).await;
    let mut work = Work::new(&bed, "not-promised");
    work.job.promised = Bytes::mib(20);
    refused(&bed, &work, &origin, Reason::PromiseBroken).await;
    // What is cut off in its middle is found out there: chunks of it may have been sent, which nothing names.
    let named: Vec<_> = bed.keys().await.into_iter().filter(|key| !key.contains("/chunks/")).collect();
    assert_eq!(named, Vec::<String>::new());
}

/// What the web server sent of the image itself.
fn sent(bed: &Bed) -> u64 {
    bed.web.log().unwrap().bytes_sent()
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_anywhere_it_goes_on_and_repeats_at_most_a_window() {
    let bed = Bed::new().await;
    let disk = bed.file("disk");
    raw_image(&disk, 160, &[0..60, 70..140]);
    let reference = Work::new(&bed, "reference");
    let whole = reference.run(&bed, &bed.origin("plain", "disk", PATIENCE)).await.unwrap();
    reference.abandon(&bed, true).await;
    for key in bed.keys().await {
        berth_objectstore::ObjectStore::delete(bed.chunks.store(), &key).await.unwrap();
    }
    let (sent_before, log_before) = (sent(&bed), bed.s3.log().unwrap().last_seq());

    let work = Work::new(&bed, "cut");
    // No faster than it is noticed that it is to stop.
    let origin = bed.origin("slow/80000000", "disk", PATIENCE);
    let (mut cuts, mut stages) = (0, std::collections::BTreeMap::<Stage, u32>::new());
    let durable = loop {
        let cancel = CancellationToken::new();
        // From less than a window to almost two.
        *work.told.fuse.lock().unwrap() = Some(Fuse::new((20 + 8 * (cuts * 7 % 5)) * MIB, &cancel));
        match work.run_until(&bed, &origin, &cancel).await {
            Ok(durable) => break durable,
            Err(TransferError::Cancelled) => cuts += 1,
            Err(error) => panic!("{}", error.chain()),
        }
        let at = *work.told.stages.lock().unwrap().last().unwrap();
        *stages.entry(at).or_default() += 1;
        assert!(cuts < 60, "no progress: {stages:?}");
    };
    let cuts_in = |stage| u64::from(stages.get(&stage).copied().unwrap_or_default());
    assert!(cuts_in(Stage::Fetch) >= 3 && cuts_in(Stage::Upload) >= 3, "too few cuts to tell: {stages:?}");
    assert_eq!(durable.digest, whole.digest);
    assert_eq!(durable.source_digest, whole.source_digest);
    assert_eq!(durable.real_size, whole.real_size);
    assert!(same_disk(&bed.restore(&durable).await, &disk));
    bed.check_nothing_left(&work).await;

    let fetch_cuts = cuts_in(Stage::Fetch);
    let fetched = sent(&bed) - sent_before;
    // Every start asks for no more than the first byte again; a new one also for the head.
    let most = (160 + 2 + 32 * fetch_cuts) * MIB;
    assert!(
        fetched <= most,
        "{fetched} bytes were read for {} with {fetch_cuts} cuts in the fetch",
        160 * MIB
    );
    let log = bed.s3.log().unwrap().after(log_before);
    let again: u64 =
        log.repeated_puts().iter().filter(|(key, _)| key.contains("/chunks/")).map(|(_, r)| r.bytes).sum();
    assert!(again <= 32 * MIB * cuts, "{again} bytes of chunks were received again in {cuts} cuts");
    println!("{cuts} cuts {stages:?}, read {fetched}, received again {again}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_in_every_stage_it_goes_on() {
    let bed = Bed::new().await;
    let disk = bed.dir.path().join("disk");
    raw_image(&disk, 64, &[0..20]);
    qemu_img(&["convert", "-q", "-f", "raw", "-O", "vhdx", text(&disk), text(&bed.file("disk.vhdx"))]);
    name_log(&bed.file("disk.vhdx")).unwrap();
    let (work, origin) = (Work::new(&bed, "stopped"), bed.origin("plain", "disk.vhdx", PATIENCE));
    for stage in [Stage::Fetch, Stage::Convert, Stage::Upload, Stage::Verify, Stage::Publish] {
        for _ in 0..2 {
            let cancel = CancellationToken::new();
            *work.told.stop_at.lock().unwrap() = Some((stage, cancel.clone()));
            let outcome = work.run_until(&bed, &origin, &cancel).await;
            assert!(matches!(outcome, Err(TransferError::Cancelled)), "{stage}: {outcome:?}");
            // What is at work when it is stopped may come to the next stage before it notices.
            let told = std::mem::take(&mut *work.told.stages.lock().unwrap());
            assert!(told.iter().rev().take(2).any(|at| *at == stage), "{stage}: {told:?}");
        }
    }
    work.told.stop_at.lock().unwrap().take();
    let durable = work.run(&bed, &origin).await.unwrap();
    assert!(same_disk(&bed.restore(&durable).await, &disk));
    bed.check_nothing_left(&work).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b63_a_conversion_goes_on_at_its_last_window() {
    let bed = Bed::new().await;
    let disk = bed.dir.path().join("disk");
    raw_image(&disk, 64, &[0..60]);
    // No whole number of the units that the tool's file is lengthened to while it is at work.
    std::fs::File::options().write(true).open(&disk).unwrap().set_len(64 * MIB + 512).unwrap();
    qemu_img(&["convert", "-q", "-f", "raw", "-O", "vhdx", text(&disk), text(&bed.file("disk.vhdx"))]);
    name_log(&bed.file("disk.vhdx")).unwrap();
    let (work, origin) = (Work::new(&bed, "windows"), bed.origin("plain", "disk.vhdx", PATIENCE));
    let cancel = CancellationToken::new();
    *work.told.stop_at.lock().unwrap() = Some((Stage::Convert, cancel.clone()));
    let outcome = work.run_until(&bed, &origin, &cancel).await;
    assert!(matches!(outcome, Err(TransferError::Cancelled)), "{outcome:?}");
    work.told.stop_at.lock().unwrap().take();
    let cancel = CancellationToken::new();
    // Into the second of four windows.
    *work.told.fuse.lock().unwrap() = Some(Fuse::new(20 * MIB, &cancel));
    let outcome = work.run_until(&bed, &origin, &cancel).await;
    assert!(matches!(outcome, Err(TransferError::Cancelled)), "{outcome:?}");
    assert_eq!(work.told.stages.lock().unwrap().last(), Some(&Stage::Convert));
    work.told.fuse.lock().unwrap().take();
    // What nobody writes again keeps a mark that is put on it.
    let raw = std::fs::File::options().write(true).open(work.job.raw_file()).unwrap();
    raw.write_all_at(b"mark", 0).unwrap();
    let durable = work.run(&bed, &origin).await.unwrap();
    let mut expected = std::fs::read(&disk).unwrap();
    expected[..4].copy_from_slice(b"mark");
    assert!(std::fs::read(bed.restore(&durable).await).unwrap() == expected, "converted from the beginning");
    bed.check_nothing_left(&work).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_node_goes_on_and_the_first_one_can_do_no_harm() {
    let bed = Bed::new().await;
    raw_image(&bed.file("disk"), 100, &[0..100]);
    let origin = bed.origin("plain", "disk", PATIENCE);
    let first = Work::on(&bed, "moved", "node-a", 1);
    let cancel = CancellationToken::new();
    let stopper = async {
        // Once two windows are in the store.
        while bed.s3.log().unwrap().put_bytes_by_key().values().sum::<u64>() < 70 * MIB {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        cancel.cancel();
    };
    let (outcome, ()) = tokio::join!(first.run_until(&bed, &origin, &cancel), stopper);
    assert!(matches!(outcome, Err(TransferError::Cancelled)));
    let seq = bed.s3.log().unwrap().last_seq();

    let second = Work::on(&bed, "moved", "node-b", 2);
    let durable = second.run(&bed, &origin).await.unwrap();
    let log = bed.s3.log().unwrap();
    let received: u64 = log.after(seq).put_bytes_by_key().values().sum();
    assert!(received < 34 * MIB, "{received} bytes were sent though most were there");
    assert!(same_disk(&bed.restore(&durable).await, &bed.file("disk")));
    bed.check_nothing_left(&second).await;

    let before = bed.keys().await;
    let error = first.run(&bed, &origin).await.unwrap_err();
    assert!(error.is_superseded(), "{}", error.chain());
    assert_eq!(bed.keys().await, before);
    // Its files go with its reservation; what belongs to the later one stays.
    first.abandon(&bed, false).await;
    bed.check_nothing_left(&first).await;
    assert_eq!(bed.keys().await, before);
    assert_eq!(bed.chunks.manifest(&first.job.name).await.unwrap().unwrap().0.digest, durable.digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_done_is_not_done_again_and_names_are_not_taken_over() {
    let bed = Bed::new().await;
    raw_image(&bed.file("disk"), 8, &[0..4]);
    let origin = bed.origin("plain", "disk", PATIENCE);
    let work = Work::new(&bed, "once");
    let durable = work.run(&bed, &origin).await.unwrap();
    let (sent_before, seq) = (sent(&bed), bed.s3.log().unwrap().last_seq());
    assert_eq!(work.run(&bed, &origin).await.unwrap(), durable, "from the record");
    assert_eq!(sent(&bed), sent_before, "nothing is read");
    let elsewhere = Work::on(&bed, "once", "node-b", 2);
    assert_eq!(elsewhere.run(&bed, &origin).await.unwrap(), durable, "read anew: the bucket proves nothing");
    let log = bed.s3.log().unwrap().after(seq);
    assert!(
        log.put_bytes_by_key().keys().all(|key| !key.contains("/chunks/")),
        "{:?}",
        log.put_bytes_by_key()
    );
    bed.check_nothing_left(&elsewhere).await;

    let mut thief = Work::new(&bed, "thief");
    thief.job.name = work.job.name.clone();
    let error = thief.run(&bed, &origin).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), (Reason::NameTaken, false));
    thief.abandon(&bed, true).await;
    assert_eq!(bed.chunks.manifest(&work.job.name).await.unwrap().unwrap().0.owner, work.job.uid);
    work.abandon(&bed, true).await;
    assert!(bed.chunks.manifest(&work.job.name).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_write_into_the_bucket_is_never_the_result() {
    let bed = Bed::new().await;
    raw_image(&bed.file("secret"), 8, &[0..6]);
    raw_image(&bed.file("own"), 4, &[3..4]);
    let secret = Work::new(&bed, "secret");
    let theirs = secret.run(&bed, &bed.origin("plain", "secret", PATIENCE)).await.unwrap();
    let (forged, _) = bed.chunks.manifest(&secret.job.name).await.unwrap().unwrap();
    let work = Work::on(&bed, "own", "node-a", 2);

    // A name of ours that claims the other image, and is charged nothing.
    let mut manifest = forged.clone();
    manifest.owner = work.job.uid.clone();
    manifest.labels.insert("berth.real-bytes".to_owned(), "0".to_owned());
    bed.chunks.publish(&work.job.name, &manifest, &Expected::Absent).await.unwrap();
    // A session of ours that has uploaded all of the other image, and says so of our source.
    let writer = Writer {
        uid: work.job.uid.clone(),
        generation: Generation(1),
        node: "node-b".into(),
        started: Timestamp(1),
    };
    let mut session = Session::begin(bed.chunks.clone(), writer).await.unwrap();
    let index = bed.dir.path().join("forged.caibx");
    let mut uploader = session.uploader(&index).await.unwrap();
    for piece in std::fs::read(bed.file("secret")).unwrap().chunks(256 << 10) {
        uploader.push_data(piece.to_vec().into()).await.unwrap();
    }
    let state = serde_json::json!({ "sourceDigest": Digest(sum(&bed.file("own"))).to_string() });
    session.checkpoint(&mut uploader, state).await.unwrap();

    let durable = work.run(&bed, &bed.origin("plain", "own", PATIENCE)).await.unwrap();
    assert_ne!(durable.digest, theirs.digest);
    assert_eq!((durable.virtual_size, durable.real_size), (Bytes::mib(4), Bytes::mib(1)));
    assert!(same_disk(&bed.restore(&durable).await, &bed.file("own")));
    let (named, _) = bed.chunks.manifest(&work.job.name).await.unwrap().unwrap();
    assert_eq!(named.digest, durable.digest);
    bed.check_nothing_left(&work).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_writer_does_not_bring_a_deleted_name_back() {
    let bed = Bed::new().await;
    raw_image(&bed.file("disk"), 8, &[0..4]);
    let origin = bed.origin("plain", "disk", PATIENCE);
    // While it verifies, while it gives the name, and between two attempts.
    for stage in [Stage::Verify, Stage::Publish] {
        let late = Work::new(&bed, &format!("late-{}", stage as u8));
        let other = Arc::new(Work::on(&bed, &format!("late-{}", stage as u8), "node-b", 2));
        let (chunks, given_up) = (bed.chunks.clone(), Arc::clone(&other));
        let handle = tokio::runtime::Handle::current();
        let delete = move || {
            let abandoned =
                async { abandon(&given_up.job, &chunks, &given_up.journal(), true).await.unwrap() };
            tokio::task::block_in_place(|| handle.block_on(abandoned));
        };
        *late.told.happens_at.lock().unwrap() = Some((stage, Box::new(delete)));
        for attempt in 0..2 {
            let error = late.run(&bed, &origin).await.unwrap_err();
            assert!(error.is_superseded(), "{stage} {attempt}: {}", error.chain());
            assert!(bed.chunks.manifest(&late.job.name).await.unwrap().is_none(), "{stage} {attempt}");
        }
        late.abandon(&bed, true).await;
        bed.check_nothing_left(&late).await;
    }
    let late = Work::new(&bed, "stopped");
    let cancel = CancellationToken::new();
    *late.told.stop_at.lock().unwrap() = Some((Stage::Upload, cancel.clone()));
    assert!(matches!(late.run_until(&bed, &origin, &cancel).await, Err(TransferError::Cancelled)));
    late.told.stop_at.lock().unwrap().take();
    Work::on(&bed, "stopped", "node-b", 2).abandon(&bed, true).await;
    let error = late.run(&bed, &origin).await.unwrap_err();
    assert!(error.is_superseded(), "{}", error.chain());
    assert!(bed.chunks.manifest(&late.job.name).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn poor_sources_are_read_to_their_end() {
    let bed = Bed::new().await;
    raw_image(&bed.file("disk"), 50, &[0..50]);
    // Without ranges; and with connections that break off after 18 MiB, more often than an import may fail in a row.
    for (name, switch) in [("no-ranges", "noranges".to_owned()), ("breaks", format!("cut/{}", 18 * MIB))] {
        let mut work = Work::new(&bed, name);
        work.job.limits.retries = 1;
        let durable = work.run(&bed, &bed.origin(&switch, "disk", PATIENCE)).await.unwrap();
        assert_eq!(durable.source_digest, Some(Digest(sum(&bed.file("disk")))), "{name}");
        assert!(same_disk(&bed.restore(&durable).await, &bed.file("disk")), "{name}");
        bed.check_nothing_left(&work).await;
    }
    // One that stands still after every MiB comes nearer each time; one that is away does not.
    raw_image(&bed.file("small"), 4, &[0..4]);
    let mut work = Work::new(&bed, "stalls");
    work.job.limits.retries = 1;
    work.run(&bed, &bed.origin("stall", "small", Duration::from_millis(300))).await.unwrap();
    let errors = work.told.errors.lock().unwrap().join("\n");
    assert!(errors.contains("sent nothing for 0.3 s"), "{errors}");
    let mut work = Work::new(&bed, "away");
    work.job.limits.retries = 1;
    let origin = bed.origin("plain", "disk", PATIENCE);
    let Bed { dir, s3, web, chunks } = bed;
    drop(web);
    std::fs::create_dir(dir.path().join("other")).unwrap();
    let web = HttpSource::start(&dir.path().join("other"), &dir.path().join("other.log")).await.unwrap();
    let bed = Bed { dir, s3, web, chunks };
    let error = work.run(&bed, &origin).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), (Reason::RetriesExhausted, false));
    assert!(
        error.chain().contains("given up after 2 attempts") && error.chain().contains("unavailable"),
        "{}",
        error.chain()
    );
    work.abandon(&bed, false).await;
    bed.check_nothing_left(&work).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_the_store_pass_and_what_is_missing_is_sent_again() {
    let bed = Bed::new().await;
    raw_image(&bed.file("disk"), 40, &[0..40]);
    let origin = bed.origin("plain", "disk", PATIENCE);
    let stale = FaultRule::new(FaultAction::StaleList { age_ms: 3_600_000 }).op("ListObjectsV2");
    let rules = [
        FaultRule::new(FaultAction::SlowDown).op("PutObject").key_prefix("p/chunks/").skip(20).times(12),
        FaultRule::new(FaultAction::LostResponse).op("PutObject").key_prefix("p/sessions/").skip(1).times(3),
        stale.key_prefix("p/chunks/").times(1),
    ];
    bed.s3.set_faults(&rules).unwrap();
    let work = Work::new(&bed, "faults");
    let durable = work.run(&bed, &origin).await.unwrap_or_else(|error| panic!("{}", error.chain()));
    let faults = bed.s3.log().unwrap().faults();
    assert_eq!(faults.len(), 3, "not every rule was met: {faults:?}");
    let errors = work.told.errors.lock().unwrap().join("\n");
    assert!(errors.contains("is not in the store"), "{errors}");
    assert!(work.told.attempts.load(Ordering::Relaxed) >= 2);
    bed.s3.set_faults(&[]).unwrap();
    assert!(same_disk(&bed.restore(&durable).await, &bed.file("disk")));
    bed.check_nothing_left(&work).await;

    let work = Work::new(&bed, "denied");
    bed.s3.set_faults(&[FaultRule::new(FaultAction::Deny).op("PutObject")]).unwrap();
    let error = work.run(&bed, &origin).await.unwrap_err();
    assert_eq!(
        (error.reason(), error.is_transient()),
        (Reason::ObjectStoreDenied, false),
        "{}",
        error.chain()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terabyte_of_holes_costs_few_requests() {
    let bed = Bed::new().await;
    let disk = bed.file("disk");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&disk), "1T"]);
    let mut work = Work::new(&bed, "sparse");
    work.job.limits.virtual_size = Bytes::gib(1024);
    work.job.promised = Bytes::gib(1);
    let durable = work.run(&bed, &bed.origin("plain", "disk", PATIENCE)).await.unwrap();
    assert_eq!((durable.virtual_size, durable.real_size, durable.chunks), (Bytes::gib(1024), Bytes::ZERO, 1));
    let counts = bed.s3.log().unwrap().counts_by_op();
    assert!(counts["PutObject"] < 40, "{counts:?}");
    bed.check_nothing_left(&work).await;
}
