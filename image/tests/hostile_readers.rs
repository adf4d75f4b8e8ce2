//! Readers of images made to harm: what is given is content or an error, and takes bounded time and memory.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

mod common;

use std::io::Write as _;
use std::sync::LazyLock;

use berth_core::units::Bytes;
use berth_image::{ExtentKind, ExtentReader as _, ImageReader, ReadError, Reader, probe_at};
use common::images::{Image, all};
use common::source::Memory;
use common::{Numbers, descriptor, put, qcow2_header, vmdk};
use proptest::prelude::*;
use tokio::runtime::{Builder, Runtime};

fn runtime() -> Runtime {
    Builder::new_current_thread().build().unwrap()
}

async fn open(bytes: Vec<u8>) -> Result<ImageReader<Memory>, ReadError> {
    let source = Memory::new(bytes);
    let probe = probe_at(&source, None).await?;
    ImageReader::open(source, &probe).await
}

/// All of a small disk, by its extents; what is zeros without looking is also read as zeros.
async fn read_all(reader: &mut ImageReader<Memory>) -> Result<Vec<u8>, ReadError> {
    let mut content = vec![0xEE; usize::try_from(reader.virtual_size().0).unwrap()];
    let mut at = Bytes(0);
    while let Some(extent) = reader.next_extent(at).await? {
        assert!(extent.offset == at && extent.len > Bytes(0));
        let end = at.saturating_add(extent.len);
        let piece = &mut content[usize::try_from(at.0).unwrap()..usize::try_from(end.0).unwrap()];
        reader.read_at(at, piece).await?;
        assert!(extent.kind == ExtentKind::Data || piece.iter().all(|byte| *byte == 0));
        at = end;
    }
    assert_eq!(at, reader.virtual_size());
    Ok(content)
}

#[tokio::test]
async fn sound_ones_hold_what_they_hold() {
    for image in all() {
        let mut reader = open(image.bytes.clone()).await.unwrap_or_else(|e| panic!("{}: {e:?}", image.name));
        assert!(read_all(&mut reader).await.unwrap() == image.content, "{}", image.name);
        let mut numbers = Numbers(4);
        for _ in 0..100 {
            let start = numbers.below(image.content.len());
            let len = 1 + numbers.below((image.content.len() - start).min(100_000));
            let mut piece = vec![0xEE; len];
            reader.read_at(Bytes(start as u64), &mut piece).await.unwrap();
            assert!(piece == image.content[start..start + len], "{}: {start}+{len}", image.name);
        }
    }
}

/// What became of an image: not opened, failed in reading, or read as far as was looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Refused,
    Failed,
    Read,
}

/// Opens an image that may be anything, and looks at the beginning of its extents and here and there.
async fn look(bytes: Vec<u8>) -> End {
    let len = bytes.len() as u64;
    let source = Memory::new(bytes);
    let Ok(probe) = probe_at(&source, None).await else { return End::Refused };
    if probe.reader != Reader::Native {
        return End::Refused;
    }
    let Ok(mut reader) = ImageReader::open(source.clone(), &probe).await else { return End::Refused };
    let size = reader.virtual_size();
    assert!(size.0 % 512 == 0);
    let (mut at, mut end, mut piece) = (Bytes(0), End::Read, vec![0; 8192]);
    for _ in 0..24 {
        match reader.next_extent(at).await {
            Ok(Some(extent)) => {
                assert!(extent.offset == at && extent.len > Bytes(0), "{extent:?}");
                let next = at.saturating_add(extent.len);
                assert!(next <= size && (next.0 % 512 == 0 || next == size), "{extent:?} of {size}");
                let piece = &mut piece[..usize::try_from(extent.len.0.min(8192)).unwrap()];
                piece.fill(0xEE);
                match reader.read_at(at, piece).await {
                    Ok(()) => assert!(extent.kind == ExtentKind::Data || piece.iter().all(|byte| *byte == 0)),
                    Err(error) => end = fault(&error),
                }
                at = next;
            }
            Ok(None) => break,
            Err(error) => {
                end = fault(&error);
                break;
            }
        }
    }
    for part in [1, 3, 6, 7] {
        let at = Bytes(size.0 / 8 * part);
        let piece = &mut piece[..usize::try_from(size.saturating_sub(at).0.min(8192)).unwrap()];
        if let Err(error) = reader.read_at(at, piece).await {
            end = fault(&error);
        }
    }
    // No more than was asked for, and what lies near it.
    let fetched: u64 = source.requests().iter().map(|range| range.end - range.start).sum();
    assert!(fetched <= 60 * len.max(4 << 20), "{fetched} of {len}");
    assert!(source.requests().len() < 300);
    end
}

fn fault(error: &ReadError) -> End {
    assert!(matches!(error, ReadError::Corrupt { .. } | ReadError::Truncated { .. }), "{error:?}");
    End::Failed
}

/// Each byte of headers and tables, changed in some ways.
#[test]
fn every_byte_of_every_table() {
    let runtime = runtime();
    for image in all() {
        let mut ends = [0; 3];
        for at in image.tables.iter().cloned().flatten() {
            for value in [!image.bytes[at], 0, image.bytes[at] ^ 1] {
                let mut bytes = image.bytes.clone();
                bytes[at] = value;
                (image.seal)(&mut bytes);
                ends[runtime.block_on(look(bytes)) as usize] += 1;
            }
        }
        println!("{}: {} refused, {} failed, {} read", image.name, ends[0], ends[1], ends[2]);
        assert!(ends.iter().all(|count| *count > 0), "{}: {ends:?}", image.name);
    }
}

static IMAGES: LazyLock<Vec<Image>> = LazyLock::new(all);

/// A byte of a table and what it becomes: anything, or what makes counts and offsets extreme.
fn change() -> impl Strategy<Value = (prop::sample::Index, u8)> {
    (any::<prop::sample::Index>(), prop_oneof![any::<u8>(), Just(0), Just(0xFF), Just(0x7F), Just(1)])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, max_shrink_time: 60_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tables_of_anything(
        number in 0..9_usize,
        changes in prop::collection::vec(change(), 1..12),
        sealed in any::<bool>(),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let image = &IMAGES[number];
        let places: Vec<usize> = image.tables.iter().cloned().flatten().collect();
        let mut bytes = image.bytes.clone();
        for (place, value) in changes {
            bytes[places[place.index(places.len())]] = value;
        }
        if sealed {
            (image.seal)(&mut bytes);
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        runtime().block_on(look(bytes));
    }

    /// The content is right or an error wherever the image is cut.
    #[test]
    fn cut_anywhere(number in 0..9_usize, cut in any::<prop::sample::Index>()) {
        let image = &IMAGES[number];
        let length = cut.index(image.bytes.len());
        let read = runtime().block_on(async {
            let source = Memory::new(image.bytes[..length].to_vec());
            // What is not even the beginning of the format is raw.
            let probe = probe_at(&source, None).await?;
            if probe.format == berth_image::ImageFormat::Raw {
                return Ok(None);
            }
            read_all(&mut ImageReader::open(source, &probe).await?).await.map(Some)
        });
        match read {
            Ok(Some(content)) => prop_assert!(content == image.content, "{} cut to {length}", image.name),
            Ok(None) => prop_assert!(length < 512 || image.name == "vhd", "{} cut to {length}", image.name),
            Err(error) => prop_assert!(
                matches!(
                    error,
                    ReadError::Truncated { .. } | ReadError::Refused { .. } | ReadError::Corrupt { .. }
                ),
                "{} cut to {length}: {error:?}",
                image.name
            ),
        }
    }
}

fn deflate(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn zlib(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn zstd_window(content: &[u8], log: u32) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(log).unwrap();
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

/// A qcow2 with one compressed cluster of 64 KiB.
fn one_cluster(stream: &[u8], zstd: bool) -> Vec<u8> {
    let mut image = qcow2_header(16, 65536, 1);
    if zstd {
        put(&mut image, 72, &8_u64.to_be_bytes());
        put(&mut image, 100, &112_u32.to_be_bytes());
        image[104] = 1;
    }
    image.resize(3 << 16, 0);
    put(&mut image, 1 << 16, &(2_u64 << 16).to_be_bytes());
    let sectors = stream.len().div_ceil(512) as u64 - 1;
    put(&mut image, 2 << 16, &(3_u64 << 16 | sectors << 54 | 1 << 62).to_be_bytes());
    image.extend(stream);
    image.resize(image.len().next_multiple_of(512), 0xAB);
    image
}

/// A stream-optimised vmdk with one grain of 64 KiB.
fn one_grain(sector: u64, claimed: Option<u32>, stream: &[u8]) -> Vec<u8> {
    let text = descriptor("streamOptimized", &["RW 128 SPARSE \"disk.vmdk\""], "");
    let mut image = vmdk(&text, 128, Some(128));
    put(&mut image, 40 * 512, &41_u32.to_le_bytes());
    put(&mut image, 41 * 512, &128_u32.to_le_bytes());
    let mut grain = sector.to_le_bytes().to_vec();
    grain.extend(claimed.unwrap_or(u32::try_from(stream.len()).unwrap()).to_le_bytes());
    grain.extend(stream);
    grain.resize(grain.len().next_multiple_of(512), 0xAB);
    let end = image.split_off(image.len() - 1536);
    image.resize(1 << 16, 0);
    [image, grain, end].concat()
}

#[tokio::test]
async fn what_decompresses_to_something_else_is_corrupt() {
    let (content, more) = (vec![7; 65536], vec![7; 64 << 20]);
    let good = [
        one_cluster(&deflate(&content), false),
        one_cluster(&zstd_window(&content, 17), true),
        one_cluster(&zstd_window(&content, 23), true),
        one_grain(0, None, &zlib(&content)),
    ];
    for (number, image) in good.into_iter().enumerate() {
        let read = read_all(&mut open(image).await.unwrap()).await;
        assert!(read.unwrap() == content, "{number}");
    }
    let bad = [
        one_cluster(&deflate(&more), false),
        one_cluster(&deflate(&content[1..]), false),
        one_cluster(&deflate(&content)[2..], false),
        one_cluster(&zstd_window(&more, 23), true),
        one_cluster(&zstd_window(&content[1..], 23), true),
        // A window of 128 MiB for 64 KiB.
        one_cluster(&zstd_window(&content, 27), true),
        one_cluster(&zstd_window(&content, 17)[1..], true),
        one_grain(0, None, &zlib(&more)),
        one_grain(0, None, &zlib(&content[1..])),
        one_grain(128, None, &zlib(&content)),
        one_grain(u64::MAX, None, &zlib(&content)),
        one_grain(0, Some(u32::MAX), &zlib(&content)),
        one_grain(0, Some(0), &zlib(&content)),
    ];
    for (number, image) in bad.into_iter().enumerate() {
        let read = read_all(&mut open(image).await.unwrap()).await;
        assert!(
            matches!(read, Err(ReadError::Corrupt { .. })),
            "{number}: {:?}",
            read.map(|read| read.len())
        );
    }
    let longer = one_grain(0, Some(100_000), &zlib(&content));
    let read = read_all(&mut open(longer).await.unwrap()).await;
    assert!(matches!(read, Err(ReadError::Truncated { .. })), "{read:?}");
}
