//! `berth-node transfer` as people run it.

use std::process::{Output, Stdio};
use std::time::Duration;

use berth_objectstore::ObjectStore as _;
use tokio::process::Command;

use crate::bed::{Bed, MIB, Work, qemu_img, raw_image, same_disk, text};

fn command(bed: &Bed, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth-node"));
    command
        .arg("transfer")
        .args(arguments)
        .args(["--bucket", "test", "--prefix", "p", "-o", "json", "--store-endpoint", &bed.s3.endpoint()])
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
    tokio::time::timeout(Duration::from_secs(240), command.output()).await.expect("the command ends").unwrap()
}

fn left(bed: &Bed) -> usize {
    std::fs::read_dir(bed.dir.path().join("tmp")).unwrap().count()
}

async fn is_disk(bed: &Bed, key: &str, driver: &str, disk: &std::path::Path) -> bool {
    let (object, raw) = (bed.dir.path().join(key), bed.dir.path().join(format!("{key}.as-raw")));
    let found = bed.chunks.store().get(key, None, None).await.unwrap();
    let bytes = found.collect(berth_core::units::Bytes::gib(1)).await.unwrap();
    std::fs::write(&object, bytes).unwrap();
    qemu_img(&["convert", "-q", "-f", driver, "-O", "raw", text(&object), text(&raw)]);
    same_disk(&raw, disk)
}

#[tokio::test(flavor = "multi_thread")]
async fn a41_a_conversion_goes_on_after_a_kill_from_any_source() {
    let bed = Bed::new().await;
    std::fs::create_dir(bed.dir.path().join("tmp")).unwrap();
    let disk = bed.file("disk");
    raw_image(&disk, 120, &[0..90, 110..111]);
    qemu_img(&["convert", "-q", "-f", "raw", "-O", "qcow2", text(&disk), text(&bed.file("disk.qcow2"))]);
    let import = Work::new(&bed, "import");
    import.run(&bed, &bed.origin("plain", "disk", Duration::from_secs(20))).await.unwrap();
    let (file, url) = (text(&bed.file("disk.qcow2")).to_owned(), bed.web.url("slow/90000000", "disk"));
    for (key, source, format, driver) in [
        ("of-file", file.as_str(), "raw", "raw"),
        ("of-url", url.as_str(), "qcow2-plain", "qcow2"),
        ("of-store", "store:ns/import", "qcow2-plain", "qcow2"),
    ] {
        let arguments = [source, "--key", key, "--format", format];
        let seq = bed.s3.log().unwrap().last_seq();
        let mut child = command(&bed, &arguments).spawn().unwrap();
        for _ in 0..400 {
            let log = bed.s3.log().unwrap().after(seq);
            if log.succeeded("UploadPart").count() >= 2 || child.try_wait().unwrap().is_some() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        child.kill().await.unwrap();
        let output = end(command(&bed, &arguments)).await;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{key}: {errors}");
        let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((told["key"].as_str(), told["virtualSize"].as_u64()), (Some(key), Some(120 * MIB)));
        assert!(is_disk(&bed, key, driver, &disk).await, "{key}");
        let log = bed.s3.log().unwrap().after(seq);
        assert_eq!(log.succeeded("CreateMultipartUpload").count(), 1, "{key} went on in its upload");
        assert_eq!((left(&bed), log.open_uploads().len()), (0, 0), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_transferred_is_said_and_leaves_nothing() {
    let bed = Bed::new().await;
    std::fs::create_dir(bed.dir.path().join("tmp")).unwrap();
    raw_image(&bed.file("disk"), 40, &[0..40]);
    let disk = text(&bed.file("disk")).to_owned();
    qemu_img(&["convert", "-q", "-f", "raw", "-O", "vmdk", &disk, text(&bed.file("disk.vmdk"))]);
    let url = bed.web.url("plain", "disk.vmdk");
    let zeros = format!("sha256:{}", "0".repeat(64));
    let cases: [(&[&str], &str); 4] = [
        (&[&disk, "--checksum", &zeros, "--format", "raw"], "not sha256:000"),
        (&["store:ns/absent", "--format", "raw"], "no image ns/absent"),
        (
            &[&url, "--staging", "never", "--checksum", &zeros, "--format", "raw"],
            "the sum of its bytes is asked for",
        ),
        (&[&disk, "--max-virtual-size", "0", "--format", "raw"], "virtual size"),
    ];
    for (arguments, said) in cases {
        let output = end(command(&bed, &[arguments, &["--key", "refused"]].concat())).await;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && errors.contains(said), "{arguments:?}: {errors}");
        assert!(bed.chunks.store().head("refused").await.is_err(), "{arguments:?}");
        assert_eq!((left(&bed), bed.s3.log().unwrap().open_uploads().len()), (0, 0), "{arguments:?}");
    }
}
