//! VHDX. Source: \[MS-VHDX\] "Virtual Hard Disk v2 File Format" of Microsoft; all fields are little-endian.

use berth_core::units::Bytes;

use super::source::{Source, Stop, array, le_u16, le_u32, le_u64};
use super::{ImageFormat, Note, Probe, Reader, Refusal};

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

const HAS_PARENT: u32 = 1 << 1;

/// A GUID as it lies in the file.
const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> [u8; 16] {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

/// The metadata lies beyond the first MiB, so a sample rarely tells the size.
pub(super) fn probe(source: &dyn Source) -> Result<Probe, Stop> {
    let (virtual_size, notes) = match virtual_size(source) {
        Ok(size) => (Some(size), Vec::new()),
        Err(Stop::NotSampled { .. }) => (None, vec![Note::SizeUnconfirmed]),
        Err(stop) => return Err(stop),
    };
    Ok(Probe { format: ImageFormat::Vhdx, virtual_size, reader: Reader::QemuImg { driver: "vhdx" }, notes })
}

fn virtual_size(source: &dyn Source) -> Result<Bytes, Stop> {
    let regions = source.exactly(REGION_TABLE, TABLE_SIZE)?;
    if !regions.starts_with(b"regi") || le_u32(&regions, 8)? > REGION_LIMIT {
        return Err(Refusal::corrupt("region table").into());
    }
    if le_u32(&regions, 4)? != checksum(&regions) {
        return Err(Refusal::corrupt("checksum of the region table").into());
    }
    let mut metadata = None;
    for entry in 0..le_u32(&regions, 8)? {
        let at = 16 + 32 * entry as usize;
        let (id, place, length) =
            (array(&regions, at)?, Bytes(le_u64(&regions, at + 16)?), le_u32(&regions, at + 24)?);
        if id == METADATA_REGION {
            once(metadata.replace(place).is_none())?;
        } else if id != BAT_REGION && le_u32(&regions, at + 28)? & 1 != 0 {
            return Err(Refusal::unsupported("an unknown VHDX region").into());
        }
        inside(source, place, length.into())?;
    }
    metadata_size(source, metadata.ok_or_else(|| Refusal::corrupt("no metadata region"))?)
}

fn metadata_size(source: &dyn Source, region: Bytes) -> Result<Bytes, Stop> {
    let table = source.exactly(region, TABLE_SIZE)?;
    if !table.starts_with(b"metadata") || le_u16(&table, 10)? > ITEM_LIMIT {
        return Err(Refusal::corrupt("metadata table").into());
    }
    let (mut size, mut parameters) = (None, None);
    for entry in 0..le_u16(&table, 10)? {
        let at = 32 + 32 * usize::from(entry);
        let (id, offset) = (array::<16>(&table, at)?, le_u32(&table, at + 16)?);
        let item = region.saturating_add(Bytes(offset.into()));
        match id {
            DISK_SIZE => once(size.replace(le_u64(&source.exactly(item, 8)?, 0)?).is_none())?,
            FILE_PARAMETERS => once(parameters.replace(le_u32(&source.exactly(item, 8)?, 4)?).is_none())?,
            PARENT_LOCATOR => return Err(Refusal::backing_file(b"").into()),
            _ => {}
        }
    }
    match (size, parameters) {
        (_, Some(flags)) if flags & HAS_PARENT != 0 => Err(Refusal::backing_file(b"").into()),
        (Some(size), Some(_)) if size <= SIZE_LIMIT && size % 512 == 0 => Ok(Bytes(size)),
        (Some(size), Some(_)) => Err(Refusal::corrupt(format!("virtual size {}", Bytes(size))).into()),
        _ => Err(Refusal::corrupt("metadata without size or parameters").into()),
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
