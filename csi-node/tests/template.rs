//! `berth-node template import` as people run it.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

#[allow(dead_code)] // no test program uses all of it
mod bed;

use std::process::{Output, Stdio};
use std::time::Duration;

use bed::{Bed, MIB, qemu_img, raw_image, same_disk, text};
use berth_core::ids::ObjectName;
use tokio::process::Command;

fn command(bed: &Bed, name: &str, file: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth-node"));
    command
        .args([
            "template",
            "import",
            text(&bed.file(file)),
            "--bucket",
            "test",
            "--prefix",
            "p",
            "--name",
            name,
        ])
        .args(["-o", "json", "--store-endpoint", &bed.s3.endpoint()])
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

#[tokio::test(flavor = "multi_thread")]
async fn imports_files_and_goes_on_after_a_kill() {
    let bed = Bed::new().await;
    std::fs::create_dir(bed.dir.path().join("tmp")).unwrap();
    let disk = bed.file("disk");
    raw_image(&disk, 150, &[0..100, 120..121]);
    qemu_img(&["convert", "-q", "-f", "raw", "-O", "vmdk", text(&disk), text(&bed.file("disk.vmdk"))]);

    for file in ["disk", "disk.vmdk"] {
        let name = format!("images/{}", file.replace('.', "-"));
        let seq = bed.s3.log().unwrap().last_seq();
        let mut child = command(&bed, &name, file).spawn().unwrap();
        // In the upload of the first; of the second, whose chunks are all there, wherever it is by then.
        for _ in 0..200 {
            let stored: u64 = bed.s3.log().unwrap().after(seq).put_bytes_by_key().values().sum();
            if stored > 40 * MIB || child.try_wait().unwrap().is_some() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        child.kill().await.unwrap();
        let output = end(command(&bed, &name, file)).await;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{errors}");
        let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let manifest =
            bed.chunks.manifest(&ObjectName::new("images", &name["images/".len()..])).await.unwrap();
        let (manifest, _) = manifest.unwrap();
        assert_eq!(
            (told["digest"].as_str(), told["name"].as_str()),
            (Some(&*manifest.digest.to_string()), Some(&*name))
        );
        assert_eq!(told["realSize"], 101 * MIB);
        let durable = serde_json::from_value(told).unwrap();
        assert!(same_disk(&bed.restore(&durable).await, &disk));
        assert!(!bed.keys().await.iter().any(|key| key.contains("/sessions/")));
        assert_eq!(left(&bed), 0, "the work directory stays");
    }
    let again: u64 = bed.s3.log().unwrap().repeated_puts().values().map(|repeats| repeats.bytes).sum();
    assert!(again < 32 * MIB, "{again} bytes were received twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_imported_is_said_and_leaves_nothing() {
    let bed = Bed::new().await;
    std::fs::create_dir(bed.dir.path().join("tmp")).unwrap();
    raw_image(&bed.file("disk"), 4, &[0..1]);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        text(&bed.file("disk")),
        "-F",
        "raw",
        text(&bed.file("backed")),
    ]);
    let mut wrong_sum = command(&bed, "images/sum", "disk");
    wrong_sum.args(["--checksum", &format!("sha256:{}", "0".repeat(64))]);
    let cases = [
        (command(&bed, "images/backed", "backed"), "backing file"),
        (command(&bed, "images/absent", "absent"), "absent"),
        (wrong_sum, "not sha256:0000"),
    ];
    for (command, expected) in cases {
        let output = end(command).await;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && errors.contains(expected), "{expected}: {errors}");
        assert_eq!(bed.keys().await, Vec::<String>::new(), "{expected}");
        assert_eq!(left(&bed), 0, "{expected}: {errors}");
    }
}
