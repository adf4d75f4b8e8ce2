//! Images that we write, read by `qemu-img` and by our own readers.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use berth_core::units::Bytes;
use berth_image::{BLOCK, Compression, ImageFormat, Output, OutputFormat, Reader, probe_file};
use common::Numbers;
use common::disk::{Disk, FILLS, Fill, write};
use tempfile::TempDir;

const FORMATS: [OutputFormat; 6] = [
    OutputFormat::Raw,
    OutputFormat::Qcow2 { compression: Compression::None },
    OutputFormat::Qcow2 { compression: Compression::Zlib },
    OutputFormat::Qcow2 { compression: Compression::Zstd },
    OutputFormat::Vmdk,
    OutputFormat::Vhd,
];

struct Bench {
    dir: TempDir,
}

/// `None` where there is no `qemu-img`, which is an error in continuous integration.
fn bench() -> Option<Bench> {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "qemu-img is not installed");
        println!("SKIPPED qemu-img is not installed");
        return None;
    }
    Some(Bench { dir: tempfile::tempdir().unwrap() })
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, args: &[&str]) -> String {
        let run = Command::new("qemu-img").args(args).current_dir(self.dir.path()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(run.status.success(), "qemu-img {args:?}: {}{}", text(&run.stdout), text(&run.stderr));
        text(&run.stdout)
    }

    fn info(&self, driver: &str, name: &str) -> serde_json::Value {
        serde_json::from_str(&self.run(&["info", "-f", driver, "--output=json", name])).unwrap()
    }
}

fn driver(format: OutputFormat) -> &'static str {
    match format {
        OutputFormat::Raw => "raw",
        OutputFormat::Qcow2 { .. } => "qcow2",
        OutputFormat::Vmdk => "vmdk",
        OutputFormat::Vhd => "vpc",
    }
}

/// Writes the disk and has `qemu-img` check and describe it. Returns the length of the file.
fn write_checked(bench: &Bench, format: OutputFormat, disk: &Disk) -> usize {
    let output = Output { format, virtual_size: disk.size, level: None, id: [0xAB; 16] };
    let object = write(output, disk);
    fs::write(bench.path("image"), &object).unwrap();
    let info = bench.info(driver(format), "image");
    assert_eq!(info["virtual-size"], disk.size.0, "{format:?}: {info}");
    if let OutputFormat::Qcow2 { compression } = format {
        let kind = if compression == Compression::Zstd { "zstd" } else { "zlib" };
        assert_eq!(info["format-specific"]["data"]["compression-type"], kind);
        let check = bench.run(&["check", "-f", "qcow2", "--output=json", "image"]);
        let check: serde_json::Value = serde_json::from_str(&check).unwrap();
        for problem in ["leaks", "corruptions", "check-errors"] {
            assert!(check[problem].as_u64().unwrap_or(0) == 0, "{format:?}: {check}");
        }
        // Nothing after the last cluster that is referred to.
        assert_eq!(check["image-end-offset"], object.len(), "{check}");
    }
    if format == OutputFormat::Vmdk {
        assert_eq!(info["format-specific"]["data"]["create-type"], "streamOptimized");
        assert_eq!(info["format-specific"]["data"]["extents"][0]["compressed"], true);
        bench.run(&["check", "-f", "vmdk", "image"]);
    }
    object.len()
}

/// Checks that `qemu-img` and our own reader, if there is one, read the disk back.
async fn check_content(bench: &Bench, format: OutputFormat, disk: &Disk) {
    let path = bench.path("image");
    let probe = match format {
        OutputFormat::Raw => berth_image::probe_file_as(ImageFormat::Raw, &path),
        _ => probe_file(&path),
    };
    let probe = probe.unwrap();
    assert_eq!(probe.virtual_size, Some(disk.size));
    disk.save(&bench.path("raw"));
    bench.run(&["compare", "-f", "raw", "-F", driver(format), "raw", "image"]);
    if probe.reader == Reader::Native {
        disk.check(&path, &probe).await;
    }
}

/// Sizes at which something ends: a sector, a cluster, a block, an L2 table.
#[tokio::test]
async fn edges() {
    let Some(bench) = bench() else { return };
    let table = 512 << 20;
    let sizes = [512, 65536 - 512, 65536, 65536 + 512, BLOCK.0, BLOCK.0 + 512, 9 << 20, table, table + 512];
    for format in FORMATS {
        for size in sizes {
            let mut numbers = Numbers(size);
            let mut disk = Disk::new(Bytes(size));
            disk.fill(0, Fill::Mixed, &mut numbers);
            disk.fill((size - 1) / BLOCK.0, Fill::Speck, &mut numbers);
            write_checked(&bench, format, &disk);
            check_content(&bench, format, &disk).await;
        }
    }
}

#[tokio::test]
async fn every_kind_of_content() {
    let Some(bench) = bench() else { return };
    for format in FORMATS {
        for (index, fill) in FILLS.into_iter().enumerate() {
            let mut numbers = Numbers(index as u64);
            let mut disk = Disk::new(Bytes((24 << 20) + 1536));
            (0..13).for_each(|block| disk.fill(block, fill, &mut numbers));
            let len = write_checked(&bench, format, &disk);
            check_content(&bench, format, &disk).await;
            println!("{format:?} of {fill:?}: {len} bytes");
            // The head, whose padding is 5 MiB, and one cluster for each speck at most; of a VHD, one block.
            let most = match (format, fill) {
                (OutputFormat::Raw, _) => disk.size.0,
                (OutputFormat::Vhd, Fill::Zeros)
                | (OutputFormat::Qcow2 { .. }, Fill::Zeros | Fill::Speck) => 6 << 20,
                (OutputFormat::Vmdk, Fill::Zeros | Fill::Speck) => 128 << 10,
                (OutputFormat::Vmdk, _) => 25 << 20,
                _ => 32 << 20,
            };
            assert!(len as u64 <= most, "{format:?} of {fill:?}: {len}");
        }
    }
}

#[tokio::test]
async fn random_disks() {
    let Some(bench) = bench() else { return };
    for seed in 0..12 {
        let mut numbers = Numbers(seed);
        let mut disk = Disk::new(Bytes(512 * (1 + numbers.below(600 << 11) as u64)));
        for _ in 0..numbers.below(20) {
            let block = numbers.below(usize::try_from(disk.size.0.div_ceil(BLOCK.0)).unwrap()) as u64;
            disk.fill(block, FILLS[numbers.below(FILLS.len())], &mut numbers);
        }
        for format in &FORMATS[1..] {
            write_checked(&bench, *format, &disk);
            check_content(&bench, *format, &disk).await;
        }
    }
}

#[test]
fn an_empty_tebibyte() {
    let Some(bench) = bench() else { return };
    for format in &FORMATS[1..] {
        let len = write_checked(&bench, *format, &Disk::new(Bytes::gib(1024)));
        assert!(len <= 6 << 20, "{format:?}: {len}");
    }
}

/// What `qemu-img convert` makes of it, byte by byte: `compare` takes what is not allocated for zeros.
#[test]
fn converted_back() {
    let Some(bench) = bench() else { return };
    for format in FORMATS {
        let mut disk = Disk::new(Bytes((7 << 20) + 512));
        (0..4).for_each(|block| disk.fill(block, Fill::Mixed, &mut Numbers(block)));
        write_checked(&bench, format, &disk);
        bench.run(&["convert", "-f", driver(format), "-O", "raw", "image", "back"]);
        disk.save(&bench.path("raw"));
        assert!(fs::read(bench.path("back")).unwrap() == fs::read(bench.path("raw")).unwrap(), "{format:?}");
    }
}

/// Our geometry is the one that `qemu-img` calculates by the same specification.
#[test]
fn geometry_of_a_vhd() {
    let Some(bench) = bench() else { return };
    for size in ["1M", "10M", "33M", "100M", "504M", "600M", "5G", "126G", "128G", "500G", "2000G"] {
        // Its own size is that of the geometry.
        bench.run(&["create", "-f", "vpc", "theirs", size]);
        let theirs = fs::read(bench.path("theirs")).unwrap();
        let size = Bytes(bench.info("vpc", "theirs")["virtual-size"].as_u64().unwrap());
        let ours = write(
            Output { format: OutputFormat::Vhd, virtual_size: size, level: None, id: [0; 16] },
            &Disk::new(size),
        );
        assert_eq!(ours[56..60], theirs[56..60], "{size}");
    }
}
