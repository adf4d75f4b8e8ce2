//! Images read by ranges: how many requests that takes, and what becomes of it when the source goes away.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_image::{
    Compression, ExtentReader as _, ImageFormat, ImageReader, LocalFile, Output, OutputFormat, ReadAt,
    ReadError, Reader, probe_at, probe_file,
};
use common::disk::{Disk, Fill, write};
use common::source::{Away, Counted, Memory, walk};
use common::{Numbers, descriptor, vhdx, vmdk};
use tempfile::TempDir;

const FORMATS: [OutputFormat; 5] = [
    OutputFormat::Qcow2 { compression: Compression::None },
    OutputFormat::Qcow2 { compression: Compression::Zlib },
    OutputFormat::Qcow2 { compression: Compression::Zstd },
    OutputFormat::Vmdk,
    OutputFormat::Vhd,
];

/// The unit in which transfers read.
const UNIT: usize = 256 << 10;

fn disk() -> Disk {
    let (mut disk, mut numbers) = (Disk::new(Bytes((70 << 20) + 512)), Numbers(5));
    for block in [0, 1, 2, 7, 8, 20, 21, 22, 23, 35] {
        disk.fill(block, if block == 8 { Fill::Speck } else { Fill::Mixed }, &mut numbers);
    }
    disk
}

fn object(format: OutputFormat, disk: &Disk) -> Vec<u8> {
    write(Output { format, virtual_size: disk.size, level: None, id: [1; 16] }, disk)
}

/// Compares what is read with the disk.
fn compare(disk: &Disk, at: Bytes, found: &[u8]) {
    const BLOCK: u64 = 2 << 20;
    for (number, found) in found.chunks(64 << 10).enumerate() {
        let at = at.0 + number as u64 * (64 << 10);
        let within = usize::try_from(at % BLOCK).unwrap();
        match disk.blocks.get(&(at / BLOCK)) {
            Some(block) => assert!(found == &block[within..within + found.len()], "{at}"),
            None => assert!(found.iter().all(|byte| *byte == 0), "{at}"),
        }
    }
}

#[tokio::test]
async fn a_source_that_goes_away_is_no_corrupt_image() {
    let disk = disk();
    for format in FORMATS {
        let source = Memory::new(object(format, &disk));
        // On a task of its own, as jobs are.
        let probing = source.clone();
        let probe = tokio::spawn(async move { probe_at(&probing, None).await }).await.unwrap().unwrap();
        source.answer(0);
        let refused = ImageReader::open(source.clone(), &probe).await.err().unwrap();
        assert_eq!(refused.source_error(), Some(&Away(source.requests().len())));
        source.answer(usize::MAX);
        let mut reader = ImageReader::open(source.clone(), &probe).await.unwrap();
        // Whatever fails can be asked for again, and then gives what it would have given.
        let (mut at, mut failed) = (Bytes(0), 0);
        while at < disk.size {
            let len = disk.size.saturating_sub(at).min(Bytes(UNIT as u64));
            let mut piece = vec![0; usize::try_from(len.0).unwrap()];
            let mut answered = 0;
            loop {
                source.answer(answered);
                answered += 1;
                let extent = match reader.next_extent(at).await {
                    Ok(extent) => extent,
                    Err(error) => {
                        assert!(error.source_error::<Away>().is_some(), "{error:?}");
                        failed += 1;
                        continue;
                    }
                };
                assert_eq!(extent.unwrap().offset, at);
                match reader.read_at(at, &mut piece).await {
                    Ok(()) => break,
                    Err(error) => assert!(error.source_error::<Away>().is_some(), "{error:?}"),
                }
                failed += 1;
            }
            compare(&disk, at, &piece);
            at = at.saturating_add(len);
        }
        assert!(failed >= 4, "{format:?}: {failed}");
    }
}

#[tokio::test]
async fn few_requests_for_what_lies_together() {
    let disk = disk();
    for format in FORMATS {
        let image = object(format, &disk);
        let source = Memory::new(image.clone());
        let probe = probe_at(&source, None).await.unwrap();
        assert_eq!(probe.reader, Reader::Native);
        let opening = source.clone();
        let opened = tokio::spawn(async move { ImageReader::open(opening, &probe).await });
        let mut reader = opened.await.unwrap().unwrap();
        let headers = source.requests().len();
        let disk = disk.clone();
        let walked =
            tokio::spawn(async move { walk(&mut reader, UNIT, |at, found| compare(&disk, at, found)).await });
        walked.await.unwrap().unwrap();
        let requests = source.requests().split_off(headers);
        let fetched: u64 = requests.iter().map(|range| range.end - range.start).sum();
        println!("{format:?}: {} bytes, {headers} + {} requests, {fetched}", image.len(), requests.len());
        // Once to probe and once to open.
        assert!(headers <= 4, "{headers}");
        assert!(requests.len() <= 5 + image.len() / (3 << 20) + 3, "{format:?}: {requests:?}");
        assert!(fetched < image.len() as u64 + (4 << 20), "{format:?}: {requests:?}");
    }
}

#[tokio::test]
async fn here_and_there_only_what_is_asked_for_is_fetched() {
    let disk = disk();
    for format in FORMATS {
        let source = Memory::new(object(format, &disk));
        let probe = probe_at(&source, None).await.unwrap();
        let mut reader = ImageReader::open(source.clone(), &probe).await.unwrap();
        let before = source.requests().len();
        let mut numbers = Numbers(3);
        for _ in 0..50 {
            let at = Bytes(512 * numbers.below(140 << 10) as u64);
            let mut piece = vec![0; 4096.min(usize::try_from(disk.size.0 - at.0).unwrap())];
            reader.read_at(at, &mut piece).await.unwrap();
            let within = usize::try_from(at.0 % (2 << 20)).unwrap();
            if within + piece.len() <= 2 << 20 {
                let block = disk.blocks.get(&(at.0 / (2 << 20)));
                let expected =
                    block.map_or(vec![0; piece.len()], |block| block[within..within + piece.len()].to_vec());
                assert!(piece == expected, "{format:?}: {at}");
            }
        }
        let fetched: u64 = source.requests()[before..].iter().map(|range| range.end - range.start).sum();
        assert!(fetched < 50 * (192 << 10), "{format:?}: {fetched}");
    }
}

#[tokio::test]
async fn probing_by_ranges_says_what_probing_a_file_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let text = descriptor("streamOptimized", &["RW 2048 SPARSE \"disk.vmdk\""], "");
    let images = FORMATS.map(|format| object(format, &disk())).into_iter().chain([
        vmdk(&text, 2048, Some(2048)),
        vhdx(5 << 30, 0, 1),
        vec![7; 1000],
        common::sparse_vhd(3),
    ]);
    for image in images {
        fs::write(&path, &image).unwrap();
        let expected = probe_file(&path).unwrap();
        let source = Memory::new(image);
        assert_eq!(probe_at(&source, None).await.unwrap(), expected);
        assert_eq!(probe_at(&source, Some(expected.format)).await.unwrap(), expected);
        let changed = berth_image::Probe { virtual_size: Some(Bytes(512)), ..expected };
        let refused = ImageReader::open(source, &changed).await;
        assert!(matches!(refused.err(), Some(ReadError::Changed { .. })));
    }
    for (image, reason) in [
        (common::sparse_vhd(4), Reason::ImageHasBackingFile),
        (vhdx(5 << 30, 2, 1), Reason::ImageHasBackingFile),
        (vmdk(&text, 2048, Some(4096)), Reason::ImageCorrupt),
    ] {
        match probe_at(&Memory::new(image), None).await {
            Err(ReadError::Refused { source, .. }) => assert_eq!(source.reason(), reason),
            other => panic!("{other:?}"),
        }
    }
    // Raw images are read by ranges too, if nothing is to be known of holes.
    let source = Memory::new(vec![7; 1000]);
    let probe = probe_at(&source, Some(ImageFormat::Raw)).await.unwrap();
    let mut reader = ImageReader::open(source, &probe).await.unwrap();
    let mut all = [1; 1024];
    reader.read_at(Bytes(0), &mut all).await.unwrap();
    assert_eq!((&all[..1000], &all[1000..]), (&[7; 1000][..], &[0; 24][..]));
    assert_eq!(reader.next_extent(Bytes(0)).await.unwrap().unwrap().len, Bytes(1024));
}

/// A source that gives less than it said it has.
struct Short(Memory);

impl ReadAt for Short {
    type Error = Away;

    fn size(&self) -> Bytes {
        self.0.size()
    }

    fn name(&self) -> String {
        "short".into()
    }

    async fn read_at(&self, at: Bytes, len: usize) -> Result<bytes::Bytes, Away> {
        let bytes = self.0.read_at(at, len).await?;
        // Whole headers, and content that ends early.
        Ok(if at.0 < 1 << 20 { bytes } else { bytes.slice(..len - 1) })
    }
}

#[tokio::test]
async fn a_source_that_gives_less_is_cut() {
    for format in FORMATS {
        let source = Short(Memory::new(object(format, &disk())));
        let Ok(probe) = probe_at(&source, None).await else { continue };
        let mut reader = ImageReader::open(source, &probe).await.unwrap();
        let read = walk(&mut reader, UNIT, |_, _| ()).await;
        assert!(matches!(read, Err(ReadError::Truncated { .. })), "{format:?}: {read:?}");
    }
}

struct Bench(TempDir);

/// `None` where there is no `qemu-img`, which is an error in continuous integration.
fn bench() -> Option<Bench> {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "qemu-img is not installed");
        println!("SKIPPED qemu-img is not installed");
        return None;
    }
    Some(Bench(tempfile::tempdir().unwrap()))
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn convert(&self, format: &str, options: &[&str], name: &str) -> PathBuf {
        let args = [&["convert", "-f", "raw", "-O", format], options, &["raw", name]].concat();
        let run = Command::new("qemu-img").args(&args).current_dir(self.0.path()).output().unwrap();
        assert!(run.status.success(), "{args:?}: {run:?}");
        self.path(name)
    }
}

const GIB: u64 = 1 << 30;

/// What the 4 KiB with this number hold: every fourth 64 KiB random, the others almost nothing.
fn content(number: u64) -> [u8; 4096] {
    let mut content = [0; 4096];
    content[..8].copy_from_slice(&(number + 1).to_le_bytes());
    if (number / 16).is_multiple_of(4) {
        let mut numbers = Numbers(number);
        content[8..].fill_with(|| numbers.next().to_le_bytes()[2]);
    }
    content
}

/// Whether there is data: 320 MiB, 64 MiB, and 128 KiB of each of the last 512 MiB.
fn is_data(number: u64) -> bool {
    match number >> 8 {
        mib @ (0..320 | 400..464) => mib < 464,
        512.. => number % 256 < 32,
        _ => false,
    }
}

fn write_raw(path: &Path) {
    let raw = File::create(path).unwrap();
    for number in (0..GIB / 4096).filter(|number| is_data(*number)) {
        raw.write_all_at(&content(number), number * 4096).unwrap();
    }
    raw.set_len(GIB).unwrap();
}

/// 448 MiB of data on a disk of 1 GiB, read as a transfer reads.
#[tokio::test]
async fn a_gibibyte_takes_few_requests() {
    let Some(bench) = bench() else { return };
    write_raw(&bench.path("raw"));
    let data = (0..GIB / 4096).filter(|number| is_data(*number)).count() as u64 * 4096;
    let cases: [(&str, &[&str]); 9] = [
        ("qcow2", &[]),
        ("qcow2", &["-o", "cluster_size=4k"]),
        ("qcow2", &["-c"]),
        ("qcow2", &["-c", "-o", "compression_type=zstd,cluster_size=2M"]),
        ("qcow2", &["-o", "extended_l2=on"]),
        ("vmdk", &[]),
        ("vmdk", &["-o", "subformat=streamOptimized"]),
        ("vpc", &["-o", "subformat=dynamic,force_size=on"]),
        ("vhdx", &["-o", "subformat=dynamic"]),
    ];
    for (format, options) in cases {
        let path = bench.convert(format, options, "image");
        let source = Counted { source: LocalFile::open(&path).await.unwrap(), requests: Mutex::default() };
        let probe = probe_at(&source, None).await.unwrap();
        let mut reader = ImageReader::open(source, &probe).await.unwrap();
        let mut found = 0;
        let check = |at: Bytes, piece: &[u8]| {
            for (index, piece) in piece.chunks(4096).enumerate() {
                let number = at.0 / 4096 + index as u64;
                if is_data(number) {
                    found += piece.len() as u64;
                    assert!(piece == content(number), "{format} {options:?}: {number}");
                } else {
                    assert!(piece.iter().all(|byte| *byte == 0), "{format} {options:?}: {number}");
                }
            }
        };
        walk(&mut reader, UNIT, check).await.unwrap();
        assert_eq!(found, data, "{format} {options:?}");
        let requests = reader.source().requests.lock().unwrap();
        let fetched: u64 = requests.iter().map(|range| range.end - range.start).sum();
        let length = reader.source().size().0;
        let backwards = requests.windows(2).filter(|pair| pair[1].start < pair[0].start).count() as u64;
        println!(
            "{format} {options:?}: {length} bytes, {} requests, {backwards} backwards, {fetched} fetched",
            requests.len()
        );
        let few = length / (3 << 20) + 30;
        assert!(requests.len() as u64 <= few, "{format} {options:?}: {} requests", requests.len());
        assert!(backwards <= 30, "{format} {options:?}: {backwards} backwards");
        // Of compressed clusters and those between them that are not, some is fetched twice.
        let most = if options.contains(&"-c") { length + length / 4 } else { length + length / 20 };
        assert!(fetched <= most + (4 << 20), "{format} {options:?}: {fetched}");
    }
}
