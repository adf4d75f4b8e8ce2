//! VHDX. Source: \[MS-VHDX\] "Virtual Hard Disk v2 File Format" of Microsoft; all fields are little-endian.

use berth_core::units::Bytes;

use super::source::{Source, Stop, array, le_u16, le_u32, le_u64};
use super::{ImageFormat, Note, Probe, Reader, Refusal};

/// The two headers, of which the current one is whichever is sound and has the greater sequence number.
const HEADERS: [Bytes; 2] = [Bytes::kib(64), Bytes::kib(128)];
const HEADER_SIZE: u64 = 4 << 10;
/// Regions begin at multiples of 1 MiB.
const ALIGNMENT: u64 = 1 << 20;
/// Sizes of a block.
const BLOCKS: std::ops::RangeInclusive<u64> = 1 << 20..=256 << 20;
/// The first of the two region tables: the one that readers use.
const REGION_TABLE: Bytes = Bytes::kib(192);
const TABLE_SIZE: u64 = 64 << 10;
const REGION_LIMIT: u32 = 2047;
const ITEM_LIMIT: u16 = 2047;
/// The format's limit.
const SIZE_LIMIT: u64 = 64 << 40;

const METADATA_REGION: [u8; 16] =
    guid(0x8b7c_a206, 0x4790, 0x4b9a, [0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e]);
const BAT_REGION: [u8; 16] =
    guid(0x2dc2_7766, 0xf623, 0x4200, [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
const FILE_PARAMETERS: [u8; 16] =
    guid(0xcaa1_6737, 0xfa36, 0x4d43, [0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b]);
const DISK_SIZE: [u8; 16] =
    guid(0x2fa5_4224, 0xcd1b, 0x4876, [0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8]);
const PARENT_LOCATOR: [u8; 16] =
    guid(0xa8d3_5f2d, 0xb30b, 0x454d, [0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c]);

const SECTOR_SIZE: [u8; 16] =
    guid(0x8141_bf1d, 0xa96f, 0x4709, [0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f]);
const PHYSICAL_SECTOR_SIZE: [u8; 16] =
    guid(0xcda3_48c7, 0x445d, 0x4471, [0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56]);
const DISK_ID: [u8; 16] = guid(0xbeca_12ab, 0xb2e6, 0x4523, [0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46]);

const HAS_PARENT: u32 = 1 << 1;
/// Flag of an item: who does not know it must not open the image.
const IS_REQUIRED: u32 = 1 << 2;

/// A GUID as it lies in the file.
const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> [u8; 16] {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

/// The checked headers of an image that stands for itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VhdxHeader {
    /// Of the disk, a multiple of 512.
    pub size: Bytes,
    /// Bytes of a payload block: a power of two, 1 MiB to 256 MiB.
    pub block: u64,
    /// Payload blocks between two entries of sector bitmaps in the block allocation table.
    pub chunk_ratio: u64,
    /// Where the block allocation table begins in the file, and how long it is.
    pub table: (Bytes, u64),
    /// What must be written from the log into the rest of the file before this can be read.
    pub log: bool,
}

/// The metadata lies beyond the first MiB, so a sample rarely tells the size.
pub(super) fn probe(source: &dyn Source) -> Result<Probe, Stop> {
    let header = match VhdxHeader::read(source) {
        Ok(header) => Some(header),
        Err(Stop::NotSampled { .. }) => None,
        Err(stop) => return Err(stop),
    };
    let log = header.map_or_else(|| has_log(source), |header| Ok(header.log));
    let tool = match log {
        Ok(log) => log,
        Err(Stop::NotSampled { .. }) => false,
        Err(stop) => return Err(stop),
    };
    Ok(Probe {
        format: ImageFormat::Vhdx,
        virtual_size: header.map(|header| header.size),
        reader: if tool { Reader::QemuImg { driver: "vhdx" } } else { Reader::Native },
        notes: if header.is_none() { vec![Note::SizeUnconfirmed] } else { Vec::new() },
    })
}

impl VhdxHeader {
    /// Reads and checks headers, regions and metadata: everything that must hold before a program may open the image.
    pub(crate) fn read(source: &dyn Source) -> Result<Self, Stop> {
        let log = has_log(source)?;
        let regions = Regions::read(source)?;
        let metadata = regions.metadata.ok_or_else(|| Refusal::corrupt("no metadata region"))?;
        let metadata = Metadata::read(source, metadata.0)?;
        let (Some(size), Some((block, flags))) = (metadata.size, metadata.parameters) else {
            return Err(Refusal::corrupt("metadata without size or parameters").into());
        };
        if flags & HAS_PARENT != 0 {
            return Err(Refusal::backing_file(b"").into());
        }
        if size > SIZE_LIMIT || size % 512 != 0 {
            return Err(Refusal::corrupt(format!("virtual size {}", Bytes(size))).into());
        }
        let (sector, block) = (u64::from(metadata.sector.unwrap_or(0)), u64::from(block));
        if sector != 512 && sector != 4096 {
            return Err(Refusal::corrupt(format!("sectors of {sector} bytes")).into());
        }
        if !block.is_power_of_two() || !BLOCKS.contains(&block) {
            return Err(Refusal::corrupt(format!("block size {block}")).into());
        }
        let table = regions.table.ok_or_else(|| Refusal::corrupt("no block allocation table"))?;
        let chunk_ratio = (sector << 23) / block;
        let blocks = size.div_ceil(block);
        if (blocks + blocks.saturating_sub(1) / chunk_ratio) * 8 > table.1 {
            return Err(Refusal::corrupt("block table too small for the virtual size").into());
        }
        Ok(Self { size: Bytes(size), block, chunk_ratio, table, log })
    }
}

/// Whether the header that counts, the sound one of two with the greater number, names a log.
fn has_log(source: &dyn Source) -> Result<bool, Stop> {
    let mut current: Option<(u64, bool)> = None;
    for at in HEADERS {
        let header = source.exactly(at, HEADER_SIZE)?;
        if !header.starts_with(b"head") || le_u32(&header, 4)? != checksum(&header) {
            continue;
        }
        if le_u16(&header, 66)? != 1 {
            return Err(Refusal::unsupported(format!("VHDX version {}", le_u16(&header, 66)?)).into());
        }
        let (number, log) = (le_u64(&header, 8)?, array::<16>(&header, 48)? != [0; 16]);
        if current.is_none_or(|(before, _)| number > before) {
            current = Some((number, log));
        }
    }
    Ok(current.ok_or_else(|| Refusal::corrupt("no sound header"))?.1)
}

/// Where regions begin in the file, and how long they are.
#[derive(Default)]
struct Regions {
    metadata: Option<(Bytes, u64)>,
    table: Option<(Bytes, u64)>,
}

impl Regions {
    fn read(source: &dyn Source) -> Result<Self, Stop> {
        let regions = source.exactly(REGION_TABLE, TABLE_SIZE)?;
        if !regions.starts_with(b"regi") || le_u32(&regions, 8)? > REGION_LIMIT {
            return Err(Refusal::corrupt("region table").into());
        }
        if le_u32(&regions, 4)? != checksum(&regions) {
            return Err(Refusal::corrupt("checksum of the region table").into());
        }
        let mut found = Self::default();
        for entry in 0..le_u32(&regions, 8)? {
            let at = 16 + 32 * entry as usize;
            let (id, place) = (array(&regions, at)?, Bytes(le_u64(&regions, at + 16)?));
            let length = u64::from(le_u32(&regions, at + 24)?);
            match id {
                METADATA_REGION => once(found.metadata.replace((place, length)).is_none())?,
                BAT_REGION => once(found.table.replace((place, length)).is_none())?,
                _ if le_u32(&regions, at + 28)? & 1 != 0 => {
                    return Err(Refusal::unsupported("an unknown VHDX region").into());
                }
                _ => {}
            }
            if !place.0.is_multiple_of(ALIGNMENT) {
                return Err(Refusal::corrupt("unaligned region").into());
            }
            inside(source, place, length)?;
        }
        Ok(found)
    }
}

/// What the metadata items say, as far as they are there.
#[derive(Default)]
struct Metadata {
    size: Option<u64>,
    /// Block size and flags.
    parameters: Option<(u32, u32)>,
    /// Bytes of a logical sector.
    sector: Option<u32>,
}

impl Metadata {
    fn read(source: &dyn Source, region: Bytes) -> Result<Self, Stop> {
        let table = source.exactly(region, TABLE_SIZE)?;
        if !table.starts_with(b"metadata") || le_u16(&table, 10)? > ITEM_LIMIT {
            return Err(Refusal::corrupt("metadata table").into());
        }
        let mut found = Self::default();
        for entry in 0..le_u16(&table, 10)? {
            let at = 32 + 32 * usize::from(entry);
            let (id, offset) = (array::<16>(&table, at)?, le_u32(&table, at + 16)?);
            let item = region.saturating_add(Bytes(offset.into()));
            match id {
                DISK_SIZE => once(found.size.replace(le_u64(&source.exactly(item, 8)?, 0)?).is_none())?,
                FILE_PARAMETERS => {
                    let item = source.exactly(item, 8)?;
                    once(found.parameters.replace((le_u32(&item, 0)?, le_u32(&item, 4)?)).is_none())?;
                }
                SECTOR_SIZE => once(found.sector.replace(le_u32(&source.exactly(item, 4)?, 0)?).is_none())?,
                PARENT_LOCATOR => return Err(Refusal::backing_file(b"").into()),
                PHYSICAL_SECTOR_SIZE | DISK_ID => {}
                _ if le_u32(&table, at + 24)? & IS_REQUIRED != 0 => {
                    return Err(Refusal::unsupported("an unknown VHDX metadata item").into());
                }
                _ => {}
            }
        }
        Ok(found)
    }
}

/// What may be there once only: with two of them, two readers could see two disks.
fn once(first: bool) -> Result<(), Refusal> {
    if first { Ok(()) } else { Err(Refusal::corrupt("a structure is there twice")) }
}

fn inside(source: &dyn Source, at: Bytes, length: u64) -> Result<(), Stop> {
    let found = source.size()?;
    match at.checked_add(Bytes(length)) {
        Some(end) if end <= found => Ok(()),
        Some(expected) => Err(Refusal::Truncated { expected, found }.into()),
        None => Err(Refusal::corrupt("a region is beyond any disk").into()),
    }
}

/// CRC-32C (Castagnoli) of each byte.
const CRC: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut crc, mut bit) = (byte, 0);
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte as usize] = crc;
        byte += 1;
    }
    table
};

/// CRC-32C of a table whose own checksum, at byte 4, counts as zero.
fn checksum(table: &[u8]) -> u32 {
    let counted = table.iter().enumerate().map(|(at, byte)| if (4..8).contains(&at) { 0 } else { *byte });
    !counted.fold(u32::MAX, |crc, byte| (crc >> 8) ^ CRC[usize::from(crc.to_le_bytes()[0] ^ byte)])
}
