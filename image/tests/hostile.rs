//! Images made to harm: each is refused for what it is, and none makes the code panic.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

mod common;

use std::fs;

use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_image::{
    ExtentReader as _, ImageFormat, Note, Probe, Reader, Refusal, Sample, probe, probe_as, probe_file_as,
};
use common::{
    Numbers, descriptor, put, qcow2_header, seal_vhd, seal_vhdx, sparse_vhd, vhd_footer, vhdx, vmdk,
};

fn whole(bytes: &[u8]) -> Sample<'_> {
    Sample { head: bytes, size: Bytes(bytes.len() as u64), tail: None }
}

fn look(bytes: &[u8]) -> Result<Probe, Refusal> {
    probe(&whole(bytes))
}

fn qcow2() -> Vec<u8> {
    let mut image = qcow2_header(16, 1 << 30, 2);
    image.resize(3 << 16, 0);
    image
}

fn changed(at: usize, value: &[u8]) -> Result<Probe, Refusal> {
    let mut image = qcow2();
    put(&mut image, at, value);
    look(&image)
}

#[test]
fn raw_is_what_is_nothing_else() {
    let found = look(&[7; 1000]).unwrap();
    assert_eq!((found.format, found.virtual_size), (ImageFormat::Raw, Some(Bytes(1024))));
    assert_eq!((found.reader, found.notes), (Reader::Native, vec![Note::Padded]));
    assert_eq!(look(&[]).unwrap().virtual_size, Some(Bytes(0)));
    // Whoever says raw gets raw, whatever a guest has written to the first sector.
    let declared = probe_as(ImageFormat::Raw, &whole(&qcow2())).unwrap();
    assert_eq!((declared.format, declared.virtual_size), (ImageFormat::Raw, Some(Bytes(3 << 16))));
    let other = Refusal::OtherFormat { expected: ImageFormat::Vmdk, found: Some(ImageFormat::Qcow2) };
    assert_eq!(probe_as(ImageFormat::Vmdk, &whole(&qcow2())), Err(other));
}

#[test]
fn foreign_formats_are_named() {
    let mut iso = vec![0; 40 << 10];
    put(&mut iso, 32769, b"CD001");
    let mut tar = vec![0; 1024];
    put(&mut tar, 257, b"ustar");
    let cases: [(&[u8], &str); 6] = [
        (&iso, "ISO 9660"),
        (&tar, "tar"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfdxx", "zstd"),
        (b"QFI\xfb\0\0\0\x01", "qcow image of version 1"),
    ];
    for (content, name) in cases {
        let refusal = look(content).unwrap_err();
        assert!(refusal.to_string().contains(name), "{refusal}");
        assert_eq!(refusal.reason(), Reason::ImageFormatUnsupported);
    }
    assert_eq!(probe_as(ImageFormat::Raw, &whole(&iso)).unwrap().format, ImageFormat::Raw);
}

#[test]
fn qcow2_headers() {
    let good = look(&qcow2()).unwrap();
    assert_eq!((good.virtual_size, good.reader), (Some(Bytes::gib(1)), Reader::Native));
    let reason = |at, value: &[u8]| changed(at, value).unwrap_err().reason();
    assert_eq!(reason(8, &200_u64.to_be_bytes()), Reason::ImageHasBackingFile);
    assert_eq!(reason(16, &5_u32.to_be_bytes()), Reason::ImageHasBackingFile);
    assert_eq!(reason(8, &u64::MAX.to_be_bytes()), Reason::ImageHasBackingFile);
    assert_eq!(reason(32, &1_u32.to_be_bytes()), Reason::ImageEncrypted);
    assert_eq!(reason(32, &2_u32.to_be_bytes()), Reason::ImageEncrypted);
    assert_eq!(reason(79, &[1]), Reason::ImageCorrupt);
    assert_eq!(reason(79, &[2]), Reason::ImageCorrupt);
    assert_eq!(reason(79, &[4]), Reason::ImageHasDataFile);
    assert_eq!(reason(79, &[0x20]), Reason::ImageFormatUnsupported);
    assert_eq!(reason(72, &[0x80]), Reason::ImageFormatUnsupported);
    assert_eq!(reason(20, &8_u32.to_be_bytes()), Reason::ImageCorrupt);
    assert_eq!(reason(20, &22_u32.to_be_bytes()), Reason::ImageCorrupt);
    assert_eq!(reason(24, &u64::MAX.to_be_bytes()), Reason::ImageCorrupt);
    assert_eq!(reason(24, &(2_u64 << 30).to_be_bytes()), Reason::ImageCorrupt);
    assert_eq!(reason(36, &0x0100_0000_u32.to_be_bytes()), Reason::ImageFormatUnsupported);
    assert_eq!(reason(36, &100_000_u32.to_be_bytes()), Reason::ImageTruncated);
    assert_eq!(reason(40, &(1_u64 << 40).to_be_bytes()), Reason::ImageTruncated);
    assert_eq!(reason(40, &512_u64.to_be_bytes()), Reason::ImageCorrupt);
    assert_eq!(reason(4, &4_u32.to_be_bytes()), Reason::ImageFormatUnsupported);
    assert_eq!(reason(100, &u32::MAX.to_be_bytes()), Reason::ImageCorrupt);
    // An extension that names a data file, or holds a key, though the feature bits do not say so.
    let mut named = b"\x44\x41\x54\x41\0\0\0\x0b/etc/passwd".to_vec();
    assert_eq!(changed(104, &named), Err(Refusal::DataFile { name: "/etc/passwd".into() }));
    named[..4].copy_from_slice(&0x0537_be77_u32.to_be_bytes());
    assert_eq!(changed(104, &named), Err(Refusal::Encrypted));
}

#[test]
fn qcow2_cut_in_its_header() {
    let image = qcow2();
    for length in [8, 71, 103, 65_544] {
        match look(&image[..length]) {
            Err(Refusal::Truncated { found, .. }) => assert_eq!(found, Bytes(length as u64)),
            other => panic!("cut to {length}: {other:?}"),
        }
        // A small sample of a whole image is no cut image.
        let sample = Sample { head: &image[..length], size: Bytes(image.len() as u64), tail: None };
        assert_eq!(probe(&sample).is_ok(), length > 1000, "{length}");
    }
}

#[test]
fn vmdk_descriptors() {
    let extent = "RW 2048 SPARSE \"disk.vmdk\"";
    let good = descriptor("monolithicSparse", &[extent], "");
    let found = look(&vmdk(&good, 2048, None)).unwrap();
    assert_eq!((found.virtual_size, found.reader), (Some(Bytes::mib(1)), Reader::Native));
    let reason = |text: &str, capacity| look(&vmdk(text, capacity, None)).unwrap_err().reason();
    // Zero sectors: QEMU would open the files that the descriptor names.
    assert_eq!(reason(&good, 0), Reason::ImageCorrupt);
    assert_eq!(reason(&good, u64::MAX / 256), Reason::ImageCorrupt);
    let second = descriptor("monolithicSparse", &[extent, "RW 2048 FLAT \"/etc/passwd\" 0"], "");
    assert_eq!(look(&vmdk(&second, 2048, None)), Err(Refusal::DataFile { name: "/etc/passwd".into() }));
    let parent = descriptor("monolithicSparse", &[extent], "parentFileNameHint=\"/etc/passwd\"");
    assert_eq!(reason(&parent, 2048), Reason::ImageHasBackingFile);
    assert_eq!(reason(&good.replace("ffffffff", "12345678"), 2048), Reason::ImageHasBackingFile);
    let hidden = format!("{good}\0\0parentFileNameHint=\"/etc/passwd\"");
    assert_eq!(reason(&hidden, 2048), Reason::ImageHasBackingFile);
    assert_eq!(reason(&descriptor("monolithicFlat", &[extent], ""), 2048), Reason::ImageFormatUnsupported);
    assert_eq!(reason(&descriptor("monolithicSparse", &[], ""), 2048), Reason::ImageCorrupt);
    let text = descriptor("monolithicFlat", &["RW 2048 FLAT \"/etc/passwd\" 0"], "");
    assert_eq!(look(text.as_bytes()), Err(Refusal::DataFile { name: "/etc/passwd".into() }));
}

#[test]
fn vmdk_footers() {
    let text = descriptor("streamOptimized", &["RW 2048 SPARSE \"disk.vmdk\""], "");
    let image = vmdk(&text, 2048, Some(2048));
    assert_eq!(look(&image).unwrap().notes, [Note::StreamOptimized]);
    let (head, tail) = (&image[..32 << 10], &image[image.len() - 1536..]);
    let early = probe(&Sample { head, size: Bytes(image.len() as u64), tail: None }).unwrap();
    assert_eq!(early.notes, [Note::StreamOptimized, Note::SizeUnconfirmed]);
    let confirmed = probe(&Sample { head, size: Bytes(image.len() as u64), tail: Some(tail) }).unwrap();
    assert_eq!(confirmed.notes, [Note::StreamOptimized]);
    // The footer, which counts, promises another disk.
    let lie = look(&vmdk(&text, 2048, Some(2 << 30))).unwrap_err();
    assert_eq!(lie.reason(), Reason::ImageCorrupt);
    assert_eq!(look(&image[..60 << 10]).unwrap_err().reason(), Reason::ImageTruncated);
}

#[test]
fn vhd_footers() {
    let dynamic = sparse_vhd(3);
    let found = look(&dynamic).unwrap();
    assert_eq!((found.format, found.virtual_size), (ImageFormat::Vhd, Some(Bytes::mib(8))));
    assert_eq!(found.reader, Reader::Native);
    assert_eq!(look(&sparse_vhd(4)), Err(Refusal::BackingFile { name: "parent.vhd".into() }));
    assert_eq!(look(&dynamic[..2048]).unwrap_err().reason(), Reason::ImageTruncated);
    let mut differing = dynamic.clone();
    let end = differing.len() - 512;
    put(&mut differing, end, &vhd_footer(3, 1 << 40, 512));
    assert_eq!(look(&differing).unwrap_err().reason(), Reason::ImageCorrupt);
    let mut flipped = dynamic;
    flipped[50] ^= 1;
    assert_eq!(look(&flipped).unwrap_err().reason(), Reason::ImageCorrupt);

    let fixed = [vec![1; 1 << 20], vhd_footer(2, 1 << 20, u64::MAX)].concat();
    assert_eq!(look(&fixed).unwrap().virtual_size, Some(Bytes::mib(1)));
    let footer_alone = [vec![1; 1 << 20], vhd_footer(2, 2 << 20, u64::MAX)].concat();
    assert_eq!(look(&footer_alone).unwrap().format, ImageFormat::Raw);
}

#[test]
fn vhdx_metadata() {
    let found = look(&vhdx(5 << 30, 0, 1)).unwrap();
    assert_eq!((found.format, found.virtual_size), (ImageFormat::Vhdx, Some(Bytes::gib(5))));
    assert_eq!(look(&vhdx(5 << 30, 2, 1)).unwrap_err().reason(), Reason::ImageHasBackingFile);
    assert_eq!(look(&vhdx(5 << 30, 0, 2)).unwrap_err().reason(), Reason::ImageCorrupt);
    assert_eq!(look(&vhdx(5 << 30, 0, 0)).unwrap_err().reason(), Reason::ImageCorrupt);
    assert_eq!(look(&vhdx(1 << 60, 0, 1)).unwrap_err().reason(), Reason::ImageCorrupt);
    assert_eq!(look(&vhdx(1 << 30, 0, 1)[..1500 << 10]).unwrap_err().reason(), Reason::ImageTruncated);
    let mut image = vhdx(5 << 30, 0, 1);
    let early =
        probe(&Sample { head: &image[..64 << 10], size: Bytes(image.len() as u64), tail: None }).unwrap();
    assert_eq!((early.virtual_size, early.notes), (None, vec![Note::SizeUnconfirmed]));

    // A log in the older header was written out since; one in the newer header was not.
    put(&mut image, (64 << 10) + 48, &[7; 16]);
    seal_vhdx(&mut image);
    assert_eq!(look(&image).unwrap().reader, Reader::Native);
    put(&mut image, (128 << 10) + 48, &[7; 16]);
    seal_vhdx(&mut image);
    assert_eq!(look(&image).unwrap().reader, Reader::QemuImg { driver: "vhdx" });
    let early = Sample { head: &image[..1 << 20], size: Bytes(image.len() as u64), tail: None };
    assert_eq!(probe(&early).unwrap().reader, Reader::QemuImg { driver: "vhdx" });
    image[(128 << 10) + 100] ^= 1; // Only the older one is sound.
    assert_eq!(look(&image).unwrap().reader, Reader::QemuImg { driver: "vhdx" });
    image[(64 << 10) + 100] ^= 1;
    assert_eq!(look(&image).unwrap_err().reason(), Reason::ImageCorrupt);
}

/// Bytes that are tried beside random ones: they make counts and offsets extreme.
const EXTREMES: [u8; 4] = [0, 1, 0x7f, 0xff];

/// Makes the checksums of the base with this number right again.
fn seal(base: usize, image: &mut [u8], changed: &[usize]) {
    let end = image.len() - 512;
    match base {
        3 => {
            seal_vhd(&mut image[end..], 64);
            seal_vhd(&mut image[512..1536], 36);
            seal_vhd(&mut image[..512], 64);
        }
        4 => seal_vhd(&mut image[end..], 64),
        5 if changed.iter().any(|at| *at < 256 << 10) => seal_vhdx(image),
        _ => {}
    }
}

#[test]
fn mutated_headers_never_panic() {
    let stream = descriptor("streamOptimized", &["RW 2048 SPARSE \"disk.vmdk\""], "");
    let sparse = descriptor("monolithicSparse", &["RW 2048 SPARSE \"disk.vmdk\""], "");
    let fixed = [vec![1; 4096], vhd_footer(2, 4096, u64::MAX)].concat();
    // With each: where its structures are.
    let mut bases = [
        (qcow2(), vec![0..160]),
        (vmdk(&sparse, 2048, None), vec![0..80, 512..700]),
        (vmdk(&stream, 2048, Some(2048)), vec![0..80, 512..700, 64512..64600]),
        (sparse_vhd(3), vec![0..80, 512..600]),
        (fixed, vec![4096..4200]),
        (
            vhdx(1 << 30, 0, 1),
            vec![
                65_536..65_620,
                131_072..131_150,
                196_608..196_690,
                1_048_576..1_048_720,
                1_114_112..1_114_132,
            ],
        ),
    ];
    let mut numbers = Numbers(0x00be_4714);
    let mut accepted = 0;
    for round in 0..20_400_usize {
        let (image, places) = &mut bases[round % 6];
        let mut undo = Vec::new();
        for _ in 0..=numbers.below(4) {
            let place = places[numbers.below(places.len())].clone();
            let at = place.start + numbers.below(place.len());
            let extreme = EXTREMES[numbers.below(4)];
            undo.push((at, image[at]));
            image[at] = if numbers.below(2) == 0 { extreme } else { numbers.next().to_le_bytes()[0] };
        }
        let changed: Vec<usize> = undo.iter().map(|(at, _)| *at).collect();
        // Otherwise only the checksum would be tested.
        if round % 4 < 2 {
            seal(round % 6, image, &changed);
        }
        let cut = if numbers.below(8) == 0 { numbers.below(image.len()) } else { image.len() };
        if let Ok(found) = look(&image[..cut]) {
            accepted += 1;
            assert!(found.virtual_size.is_none_or(|size| size.0 % 512 == 0), "round {round}: {found:?}");
        }
        undo.iter().rev().for_each(|(at, byte)| image[*at] = *byte);
        seal(round % 6, image, &changed);
    }
    assert!(accepted > 500, "only {accepted} mutations were accepted, so little was tested");
}

#[tokio::test]
async fn mutated_tables_end_in_content_or_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    common::scattered_qcow2(&path, 12, 16 << 20);
    let sound = fs::read(&path).unwrap();
    let mut numbers = Numbers(11);
    let (mut opened, mut failed) = (0, 0);
    for _ in 0..400 {
        let mut image = sound.clone();
        for _ in 0..=numbers.below(3) {
            let place = [0..112, 4096..4160, 12288..12320][numbers.below(3)].clone();
            let at = place.start + numbers.below(place.len());
            image[at] = if numbers.below(2) == 0 {
                EXTREMES[numbers.below(4)]
            } else {
                numbers.next().to_le_bytes()[0]
            };
        }
        fs::write(&path, &image).unwrap();
        let Ok(found) = probe_file_as(ImageFormat::Qcow2, &path) else { continue };
        let Ok(mut reader) = berth_image::open(&path, &found).await else { continue };
        opened += 1;
        let mut at = Bytes(0);
        for _ in 0..64 {
            match reader.next_extent(at).await {
                Ok(Some(extent)) => {
                    assert!(extent.offset == at && extent.len > Bytes(0));
                    let mut piece = vec![0; usize::try_from(extent.len.0.min(10_000)).unwrap()];
                    failed += usize::from(reader.read_at(at, &mut piece).await.is_err());
                    at = at.saturating_add(extent.len);
                }
                Ok(None) => break,
                Err(_) => {
                    failed += 1;
                    break;
                }
            }
        }
    }
    assert!(opened > 50 && failed > 10, "{opened} opened, {failed} failed");
}
