//! Images made by hand, and reading them whole.
#![allow(dead_code, missing_docs)]

pub mod disk;
pub mod images;
pub mod source;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use berth_core::units::Bytes;
use berth_image::{AnyReader, ExtentKind, ExtentReader, Probe, ReadError};

/// A generator of numbers that look random and are the same in every run.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33 ^ self.0 << 20
    }

    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }
}

/// Reads an image by its extents, and checks that they cover it in order.
pub async fn read_whole(path: &Path, probe: &Probe) -> Result<Vec<u8>, ReadError> {
    let mut reader = berth_image::open(path, probe).await?;
    assert_eq!(Some(reader.virtual_size()), probe.virtual_size);
    let size = usize::try_from(reader.virtual_size().0).unwrap();
    let mut content = vec![0; size];
    let mut at = Bytes(0);
    while let Some(extent) = reader.next_extent(at).await? {
        assert_eq!(extent.offset, at);
        assert!(extent.len > Bytes::ZERO);
        let start = usize::try_from(at.0).unwrap();
        let end = start + usize::try_from(extent.len.0).unwrap();
        if extent.kind == ExtentKind::Data {
            reader.read_at(at, &mut content[start..end]).await?;
        }
        at = Bytes(end as u64);
    }
    assert_eq!(at, reader.virtual_size());
    check_odd_reads(&mut reader, &content).await?;
    Ok(content)
}

/// What lies at offsets and in lengths that fit to nothing.
async fn check_odd_reads(reader: &mut AnyReader, content: &[u8]) -> Result<(), ReadError> {
    let mut numbers = Numbers(7);
    for _ in 0..20 {
        let start = numbers.below(content.len());
        let len = numbers.below((content.len() - start).min(200_000)) + 1;
        let mut part = vec![0xEE; len];
        reader.read_at(Bytes(start as u64), &mut part).await?;
        assert!(part == content[start..start + len], "{start}+{len}");
    }
    let beyond = reader.read_at(Bytes(content.len() as u64), &mut [0]).await;
    assert!(matches!(beyond, Err(ReadError::OutOfRange { .. })));
    Ok(())
}

pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A qcow2 header of version 3.
pub fn qcow2_header(cluster_bits: u32, size: u64, l1_entries: u32) -> Vec<u8> {
    let mut head = vec![0; 512];
    put(&mut head, 0, b"QFI\xfb");
    put(&mut head, 4, &3_u32.to_be_bytes());
    put(&mut head, 20, &cluster_bits.to_be_bytes());
    put(&mut head, 24, &size.to_be_bytes());
    put(&mut head, 36, &l1_entries.to_be_bytes());
    put(&mut head, 40, &(1_u64 << cluster_bits).to_be_bytes());
    put(&mut head, 48, &(1_u64 << cluster_bits).to_be_bytes());
    put(&mut head, 56, &1_u32.to_be_bytes());
    put(&mut head, 96, &4_u32.to_be_bytes());
    put(&mut head, 100, &104_u32.to_be_bytes());
    head
}

/// A sparse qcow2 file in which every L2 table describes one data cluster, its first: all of them the same one.
pub fn scattered_qcow2(path: &Path, cluster_bits: u32, size: u64) {
    let cluster = 1_u64 << cluster_bits;
    let tables = size.div_ceil(cluster * cluster / 8);
    let l1_clusters = (tables * 8).div_ceil(cluster);
    let file = File::create(path).unwrap();
    file.write_all_at(&qcow2_header(cluster_bits, size, u32::try_from(tables).unwrap()), 0).unwrap();
    let data = (1 + l1_clusters) * cluster;
    file.write_all_at(&vec![0x5A; usize::try_from(cluster).unwrap()], data).unwrap();
    for table in 0..tables {
        let at = data + (1 + table) * cluster;
        file.write_all_at(&(at | 1 << 63).to_be_bytes(), cluster + table * 8).unwrap();
        file.write_all_at(&(data | 1 << 63).to_be_bytes(), at).unwrap();
    }
    file.set_len(data + (1 + tables) * cluster).unwrap();
}

/// A sparse or, with `footer`, stream-optimised VMDK of 1 MiB without grains.
pub fn vmdk(descriptor: &str, capacity: u64, footer: Option<u64>) -> Vec<u8> {
    let mut file = vec![0; 64 << 10];
    let header = |capacity: u64, directory: u64| {
        let mut head = vec![0; 512];
        put(&mut head, 0, b"KDMV");
        put(&mut head, 4, &1_u32.to_le_bytes());
        put(&mut head, 8, &if footer.is_some() { 0x30001_u32 } else { 3 }.to_le_bytes());
        put(&mut head, 12, &capacity.to_le_bytes());
        put(&mut head, 20, &128_u64.to_le_bytes());
        put(&mut head, 28, &1_u64.to_le_bytes());
        put(&mut head, 36, &20_u64.to_le_bytes());
        put(&mut head, 44, &512_u32.to_le_bytes());
        put(&mut head, 56, &directory.to_le_bytes());
        put(&mut head, 77, &u16::from(footer.is_some()).to_le_bytes());
        head
    };
    put(&mut file, 0, &header(capacity, if footer.is_some() { u64::MAX } else { 30 }));
    put(&mut file, 512, descriptor.as_bytes());
    if let Some(capacity) = footer {
        let at = file.len() - 1024;
        put(&mut file, at, &header(capacity, 40));
    }
    file
}

/// A descriptor as embedded in an image.
pub fn descriptor(kind: &str, extents: &[&str], more: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=1234\nparentCID=ffffffff\ncreateType=\"{kind}\"\n{more}\n{}\n",
        extents.join("\n")
    )
}

/// A VHD footer with a sound checksum.
pub fn vhd_footer(kind: u32, size: u64, header: u64) -> Vec<u8> {
    let mut footer = vec![0; 512];
    put(&mut footer, 0, b"conectix");
    put(&mut footer, 16, &header.to_be_bytes());
    put(&mut footer, 48, &size.to_be_bytes());
    put(&mut footer, 60, &kind.to_be_bytes());
    seal_vhd(&mut footer, 64);
    footer
}

pub fn seal_vhd(structure: &mut [u8], at: usize) {
    put(structure, at, &[0; 4]);
    let sum: u32 = structure.iter().map(|byte| u32::from(*byte)).sum();
    put(structure, at, &(!sum).to_be_bytes());
}

/// A VHD of 8 MiB without blocks: dynamic (3) or differencing (4).
pub fn sparse_vhd(kind: u32) -> Vec<u8> {
    let footer = vhd_footer(kind, 8 << 20, 512);
    let mut header = vec![0; 1024];
    put(&mut header, 0, b"cxsparse");
    put(&mut header, 16, &1536_u64.to_be_bytes());
    put(&mut header, 28, &4_u32.to_be_bytes());
    put(&mut header, 32, &(2_u32 << 20).to_be_bytes());
    let name: Vec<u8> = "parent.vhd".encode_utf16().flat_map(u16::to_be_bytes).collect();
    put(&mut header, 64, &name);
    seal_vhd(&mut header, 36);
    [footer.clone(), header, vec![0xFF; 512], footer].concat()
}

const METADATA: &[u8; 16] = b"\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e";
const TABLE: &[u8; 16] = b"\x66\x77\xc2\x2d\x23\xf6\x00\x42\x9d\x64\x11\x5e\x9b\xfd\x4a\x08";
const PARAMETERS: &[u8; 16] = b"\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b";
const DISK_SIZE: &[u8; 16] = b"\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8";
const SECTOR_SIZE: &[u8; 16] = b"\x1d\xbf\x41\x81\x6f\xa9\x09\x47\xba\x47\xf2\x33\xa8\xfa\xab\x5f";

/// A VHDX whose metadata are at 1 MiB and its table of 64 KiB at 2 MiB: `items` of them say the size. Blocks of 1 MiB.
pub fn vhdx(size: u64, flags: u32, items: u16) -> Vec<u8> {
    let mut file = vec![0; 3 << 20];
    put(&mut file, 0, b"vhdxfile");
    for (number, at) in [(1_u64, 64 << 10), (2, 128 << 10)] {
        put(&mut file, at, b"head");
        put(&mut file, at + 8, &number.to_le_bytes());
        put(&mut file, at + 66, &1_u16.to_le_bytes());
    }
    let regions = 192 << 10;
    put(&mut file, regions, b"regi");
    put(&mut file, regions + 8, &2_u32.to_le_bytes());
    for (number, (id, at)) in [(METADATA, 1_u64 << 20), (TABLE, 2 << 20)].into_iter().enumerate() {
        let entry = regions + 16 + 32 * number;
        put(&mut file, entry, id);
        put(&mut file, entry + 16, &at.to_le_bytes());
        put(&mut file, entry + 24, &(128_u32 << 10).to_le_bytes());
        put(&mut file, entry + 28, &1_u32.to_le_bytes());
    }
    seal_vhdx(&mut file);
    let metadata = 1 << 20;
    put(&mut file, metadata, b"metadata");
    put(&mut file, metadata + 10, &(2 + items).to_le_bytes());
    let known = [(PARAMETERS, 65536_u32), (SECTOR_SIZE, 65552)].into_iter();
    let sizes = (0..items).map(|_| (DISK_SIZE, 65544));
    for (number, (id, at)) in known.chain(sizes).enumerate() {
        put(&mut file, metadata + 32 + 32 * number, id);
        put(&mut file, metadata + 48 + 32 * number, &at.to_le_bytes());
    }
    put(&mut file, metadata + 65536, &(1_u32 << 20).to_le_bytes());
    put(&mut file, metadata + 65540, &flags.to_le_bytes());
    put(&mut file, metadata + 65544, &size.to_le_bytes());
    put(&mut file, metadata + 65552, &512_u32.to_le_bytes());
    file
}

/// Makes the checksums of headers and of the region table right.
pub fn seal_vhdx(file: &mut [u8]) {
    for part in [64 << 10..68 << 10, 128 << 10..132 << 10, 192 << 10..256 << 10] {
        let table = &mut file[part];
        put(table, 4, &[0; 4]);
        let crc = crc32c(table);
        put(table, 4, &crc.to_le_bytes());
    }
}

fn crc32c(bytes: &[u8]) -> u32 {
    let crc = bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(
            crc ^ u32::from(*byte),
            |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 },
        )
    });
    !crc
}
