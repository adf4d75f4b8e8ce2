//! What `qemu-img` writes, read as `qemu-img` reads it.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_image::{
    ExtentKind, ExtentReader as _, ImageFormat, Note, Probe, ProbeError, ReadError, Reader, probe_file,
};
use common::{Numbers, read_whole};
use tempfile::TempDir;

/// A directory with a raw disk in it.
struct Bench {
    dir: TempDir,
    content: Vec<u8>,
}

/// `None` where there is no `qemu-img`, which is an error in continuous integration.
fn bench() -> Option<Bench> {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "qemu-img is not installed");
        println!("SKIPPED qemu-img is not installed");
        return None;
    }
    let mut content = vec![0; (9 << 20) + 3 * 512];
    let mut numbers = Numbers(1);
    let ranges =
        [0..200_000, (1 << 20) + 17..(2 << 20), (5 << 20)..(7 << 20) + 100, (9 << 20) + 600..content.len()];
    for (index, range) in ranges.into_iter().enumerate() {
        for byte in &mut content[range] {
            *byte = if index % 2 == 0 {
                numbers.next().to_le_bytes()[3]
            } else {
                b"some text "[numbers.below(10)]
            };
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = File::create(dir.path().join("raw")).unwrap();
    for (index, block) in content.chunks(4096).enumerate().filter(|(_, block)| block.iter().any(|b| *b != 0))
    {
        raw.write_all_at(block, index as u64 * 4096).unwrap();
    }
    raw.set_len(content.len() as u64).unwrap();
    Some(Bench { dir, content })
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, args: &[&str]) -> String {
        self.try_run(args).unwrap_or_else(|said| panic!("qemu-img {args:?}: {said}"))
    }

    /// What it printed, or what it complained about.
    fn try_run(&self, args: &[&str]) -> Result<String, String> {
        let run = Command::new("qemu-img").args(args).current_dir(self.dir.path()).output().unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        if run.status.success() { Ok(text(&run.stdout)) } else { Err(text(&run.stderr)) }
    }

    /// Converts the raw disk.
    fn convert(&self, format: &str, options: &[&str], name: &str) -> PathBuf {
        self.run(&[&["convert", "-f", "raw", "-O", format], options, &["raw", name]].concat());
        self.path(name)
    }

    fn refused(&self, name: &str) -> Reason {
        match probe_file(&self.path(name)) {
            Err(ProbeError::Refused { source, .. }) => source.reason(),
            other => panic!("{name}: {other:?}"),
        }
    }
}

/// The size that `qemu-img` reports.
fn reported_size(bench: &Bench, format: &str, name: &str) -> Option<Bytes> {
    let info: serde_json::Value =
        serde_json::from_str(&bench.run(&["info", "-f", format, "--output=json", name])).unwrap();
    info["virtual-size"].as_u64().map(Bytes)
}

async fn check_native(bench: &Bench, driver: &str, name: &str) -> Probe {
    let path = bench.path(name);
    let probe = probe_file(&path).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    assert_eq!(probe.reader, Reader::Native, "{name}");
    assert_eq!(probe.virtual_size, reported_size(bench, driver, name), "{name}");
    let read = read_whole(&path, &probe).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
    // Some formats round the size up.
    let (content, rounding) = read.split_at(bench.content.len());
    assert!(content == bench.content, "{name}: content differs");
    assert!(rounding.iter().all(|byte| *byte == 0), "{name}");
    probe
}

#[tokio::test]
async fn raw_is_read_by_its_holes() {
    let Some(bench) = bench() else { return };
    let path = bench.path("raw");
    let probe = probe_file(&path).unwrap();
    assert!(read_whole(&path, &probe).await.unwrap() == bench.content);
    let mut reader = berth_image::open(&path, &probe).await.unwrap();
    let hole = reader.next_extent(Bytes::mib(3)).await.unwrap().unwrap();
    assert_eq!((hole.kind, hole.len), (ExtentKind::Zero, Bytes::mib(2)));

    let odd = bench.path("odd");
    fs::write(&odd, &bench.content[..1_000_001]).unwrap();
    let probe = probe_file(&odd).unwrap();
    assert_eq!(probe.notes, [Note::Padded]);
    let read = read_whole(&odd, &probe).await.unwrap();
    assert!(read[..1_000_001] == bench.content[..1_000_001]);
    assert_eq!(read.len(), 1_000_448);
    assert!(read[1_000_001..].iter().all(|byte| *byte == 0));
    let mut reader = berth_image::open(&odd, &probe).await.unwrap();
    fs::write(&odd, b"short").unwrap();
    let cut = reader.read_at(Bytes(0), &mut [0; 4096]).await;
    assert!(matches!(cut, Err(ReadError::Truncated { found: Bytes(5), .. })), "{cut:?}");
    assert!(matches!(berth_image::open(&odd, &probe).await, Err(ReadError::Changed { .. })));
}

#[tokio::test]
async fn qcow2_is_read_as_written() {
    let Some(bench) = bench() else { return };
    let cases: [(&str, &[&str]); 16] = [
        ("zstd", &["-c", "-o", "compression_type=zstd"]),
        ("zstd-small", &["-c", "-o", "compression_type=zstd,cluster_size=512"]),
        ("zstd-large", &["-c", "-o", "compression_type=zstd,cluster_size=2M"]),
        ("zstd-uncompressed", &["-o", "compression_type=zstd"]),
        ("subclusters", &["-o", "extended_l2=on,cluster_size=128k"]),
        ("subclusters-small", &["-o", "extended_l2=on,cluster_size=16k"]),
        ("subclusters-large", &["-o", "extended_l2=on,cluster_size=2M"]),
        ("subclusters-zstd", &["-c", "-o", "extended_l2=on,compression_type=zstd"]),
        ("plain", &[]),
        ("compressed", &["-c"]),
        ("version2", &["-o", "compat=0.10"]),
        ("small-clusters", &["-o", "cluster_size=512"]),
        ("large-clusters", &["-o", "cluster_size=2M"]),
        ("small-compressed", &["-c", "-o", "cluster_size=4k"]),
        ("large-compressed", &["-c", "-o", "cluster_size=2M"]),
        ("preallocated", &["-o", "preallocation=metadata"]),
    ];
    for (name, options) in cases {
        bench.convert("qcow2", options, name);
        let notes = check_native(&bench, "qcow2", name).await.notes;
        assert_eq!(notes.contains(&Note::Zstd), name.contains("zstd"), "{name}");
        assert_eq!(notes.contains(&Note::ExtendedL2), name.contains("subclusters"), "{name}");
    }
    bench.run(&["snapshot", "-c", "one", "plain"]);
    assert_eq!(check_native(&bench, "qcow2", "plain").await.notes, [Note::SnapshotsIgnored]);
    bench.run(&["create", "-f", "qcow2", "empty", "300G"]);
    let probe = probe_file(&bench.path("empty")).unwrap();
    let mut reader = berth_image::open(&bench.path("empty"), &probe).await.unwrap();
    let all = reader.next_extent(Bytes(0)).await.unwrap().unwrap();
    assert_eq!((all.kind, all.len), (ExtentKind::Zero, Bytes::gib(300)));
    assert!(reader.next_extent(all.len).await.unwrap().is_none());
}

#[test]
fn qcow2_that_refers_to_something_is_refused() {
    let Some(bench) = bench() else { return };
    bench.run(&["create", "-f", "qcow2", "-b", "raw", "-F", "raw", "overlay"]);
    assert_eq!(bench.refused("overlay"), Reason::ImageHasBackingFile);
    bench.run(&["create", "-f", "qcow2", "-o", "data_file=outside", "with-data-file", "1M"]);
    assert_eq!(bench.refused("with-data-file"), Reason::ImageHasDataFile);
    let secret = ["create", "--object", "secret,id=s,data=secret", "-f", "qcow2", "-o"];
    let luks = ["encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", "luks", "1M"];
    let mut tries = 0;
    while let Err(said) = bench.try_run(&[&secret[..], &luks].concat()) {
        // It times its key derivation, and on a busy machine now and then cannot.
        tries += 1;
        assert!(said.contains("CPU usage") && tries < 10, "{said}");
    }
    assert_eq!(bench.refused("luks"), Reason::ImageEncrypted);
    bench.run(&[&secret[..], &["encrypt.format=aes,encrypt.key-secret=s", "aes", "1M"]].concat());
    assert_eq!(bench.refused("aes"), Reason::ImageEncrypted);
    bench.run(&["create", "-f", "qcow", "qcow1", "1M"]);
    assert_eq!(bench.refused("qcow1"), Reason::ImageFormatUnsupported);
    bench.run(&["create", "-f", "vdi", "vdi", "1M"]);
    assert_eq!(bench.refused("vdi"), Reason::ImageFormatUnsupported);
}

/// Wherever the file is cut, the answer is an error or the whole content, never other content.
#[tokio::test]
async fn truncated_qcow2_never_reads_as_something_else() {
    let Some(bench) = bench() else { return };
    let cases: [&[&str]; 3] = [&[], &["-c"], &["-c", "-o", "cluster_size=4k"]];
    for options in cases {
        let path = bench.convert("qcow2", options, "whole");
        let whole = fs::read(&path).unwrap();
        let (mut numbers, mut truncated, mut intact) = (Numbers(3), 0, 0);
        let cut = bench.path("cut");
        let near_end = [1, 100, 512, 600, 4096, 70_000].map(|less| whole.len() - less);
        for length in (0..60).map(|_| numbers.below(whole.len())).chain(near_end) {
            fs::write(&cut, &whole[..length]).unwrap();
            let read = match probe_file(&cut) {
                Ok(probe) if probe.format == ImageFormat::Qcow2 => read_whole(&cut, &probe).await,
                Ok(probe) => {
                    assert!(length < 4, "{probe:?}");
                    continue;
                }
                Err(e) => Err(e.into()),
            };
            match read {
                Ok(content) => {
                    assert!(
                        content == bench.content,
                        "{options:?} cut to {length} of {} reads wrongly",
                        whole.len()
                    );
                    intact += 1;
                }
                Err(ReadError::Truncated { found, .. }) => {
                    assert_eq!(found, Bytes(length as u64));
                    truncated += 1;
                }
                Err(ReadError::Refused { source, .. }) => {
                    assert_eq!(source.reason(), Reason::ImageTruncated, "{options:?} cut to {length}");
                    truncated += 1;
                }
                Err(other) => panic!("{options:?} cut to {length}: {other}"),
            }
        }
        assert!(truncated > 50, "{options:?}: {truncated} truncated, {intact} intact");
    }
}

#[tokio::test]
async fn other_formats_are_read_as_written() {
    let Some(bench) = bench() else { return };
    let cases: [(&str, &str, &[&str], ImageFormat); 11] = [
        ("sparse.vmdk", "vmdk", &["-o", "subformat=monolithicSparse"], ImageFormat::Vmdk),
        ("zeroed.vmdk", "vmdk", &["-o", "zeroed_grain=on"], ImageFormat::Vmdk),
        ("version6.vmdk", "vmdk", &["-o", "compat6=on"], ImageFormat::Vmdk),
        ("stream.vmdk", "vmdk", &["-o", "subformat=streamOptimized"], ImageFormat::Vmdk),
        ("dynamic.vhd", "vpc", &["-o", "subformat=dynamic"], ImageFormat::Vhd),
        ("exact.vhd", "vpc", &["-o", "subformat=dynamic,force_size=on"], ImageFormat::Vhd),
        ("fixed.vhd", "vpc", &["-o", "subformat=fixed"], ImageFormat::Vhd),
        ("fixed-exact.vhd", "vpc", &["-o", "subformat=fixed,force_size=on"], ImageFormat::Vhd),
        ("dynamic.vhdx", "vhdx", &["-o", "subformat=dynamic,block_size=1M"], ImageFormat::Vhdx),
        ("large.vhdx", "vhdx", &["-o", "subformat=dynamic,block_size=256M"], ImageFormat::Vhdx),
        ("fixed.vhdx", "vhdx", &["-o", "subformat=fixed"], ImageFormat::Vhdx),
    ];
    for (name, driver, options, format) in cases {
        bench.convert(driver, options, name);
        let probe = check_native(&bench, driver, name).await;
        assert_eq!(probe.format, format, "{name}");
        assert!(!probe.notes.contains(&Note::SizeUnconfirmed), "{name}");
    }
}

/// A VHDX that names a log, though that is empty.
#[tokio::test]
async fn vhdx_with_a_log_is_left_to_the_tool() {
    let Some(bench) = bench() else { return };
    let path = bench.convert("vhdx", &[], "log.vhdx");
    let mut image = fs::read(&path).unwrap();
    for at in [64 << 10, 128 << 10] {
        common::put(&mut image, at + 48, &[7; 16]);
    }
    common::seal_vhdx(&mut image);
    fs::write(&path, image).unwrap();
    let probe = probe_file(&path).unwrap();
    assert_eq!(probe.reader, Reader::QemuImg { driver: "vhdx" });
    assert!(matches!(berth_image::open(&path, &probe).await, Err(ReadError::NotNative { .. })));
    let source = "driver=vhdx,file.driver=file,file.filename=log.vhdx";
    bench.run(&["convert", "--image-opts", "-O", "raw", source, "back"]);
    assert!(fs::read(bench.path("back")).unwrap()[..bench.content.len()] == bench.content);
}

/// Disks written here and there, with zeros and holes, as a machine would: into subclusters, over compressed clusters.
#[tokio::test]
async fn used_disks_are_read_as_the_tool_reads_them() {
    let Some(bench) = bench() else { return };
    let cases: [(&str, &[&str]); 9] = [
        ("qcow2", &["-o", "extended_l2=on,cluster_size=32k"]),
        ("qcow2", &["-o", "cluster_size=4k"]),
        ("qcow2", &["-c"]),
        ("qcow2", &["-c", "-o", "extended_l2=on,compression_type=zstd"]),
        ("qcow2", &["-o", "compat=0.10"]),
        ("vmdk", &["-o", "zeroed_grain=on"]),
        ("vmdk", &[]),
        ("vpc", &["-o", "force_size=on"]),
        ("vhdx", &["-o", "block_size=1M"]),
    ];
    let mut numbers = Numbers(77);
    for (driver, options) in cases {
        let path = bench.convert(driver, options, "used");
        let mut commands = Vec::new();
        for _ in 0..40 {
            let at = 512 * numbers.below(18_000);
            let len = 512 * (1 + numbers.below(400)).min(18_435 - at / 512);
            let what = match numbers.below(4) {
                0 => format!("write -z {at} {len}"),
                1 => format!("discard {at} {len}"),
                _ => format!("write -P {} {at} {len}", 1 + numbers.below(200)),
            };
            commands.extend(["-c".to_owned(), what]);
        }
        let run = Command::new("qemu-io").args(["-f", driver]).args(&commands).arg(&path).output().unwrap();
        assert!(run.status.success(), "{driver} {options:?}: {run:?}");
        bench.run(&["convert", "-f", driver, "-O", "raw", "used", "back"]);
        let probe = probe_file(&path).unwrap();
        assert_eq!(probe.reader, Reader::Native, "{driver} {options:?}");
        let read = read_whole(&path, &probe).await.unwrap();
        assert!(read == fs::read(bench.path("back")).unwrap(), "{driver} {options:?}: content differs");
    }
}

#[test]
fn vmdk_of_several_files_is_refused() {
    let Some(bench) = bench() else { return };
    for kind in ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        bench.convert("vmdk", &["-o", &format!("subformat={kind}")], &format!("{kind}.vmdk"));
        assert_eq!(bench.refused(&format!("{kind}.vmdk")), Reason::ImageHasDataFile, "{kind}");
    }
    bench.convert("vmdk", &[], "base.vmdk");
    bench.run(&["create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "child.vmdk"]);
    assert_eq!(bench.refused("child.vmdk"), Reason::ImageHasBackingFile);
    // An extent of a disk of several files is none by itself.
    let extent = fs::read_dir(bench.dir.path()).unwrap().map(|entry| entry.unwrap().path());
    let extent =
        extent.filter(|path| path.to_string_lossy().ends_with("Sparse-s001.vmdk")).collect::<Vec<_>>();
    let [extent] = extent.as_slice() else { panic!("{extent:?}") };
    assert_eq!(bench.refused(name_of(extent)), Reason::ImageFormatUnsupported);
}

fn name_of(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}
