//! VHD. Source: "Virtual Hard Disk Image Format Specification" 1.0 of Microsoft; all fields are big-endian.
//!
//! The block allocation table tells the sector of the file at which each block begins: with its bitmap, which has a bit for
//! each sector of the block, the highest of a byte first, and is filled up to a whole sector. A sector without its bit was
//! never written, so it is zeros, whatever lies there.

use berth_core::units::Bytes;

use super::layout::{Answer, Fault, Flat, Layout, Missing, Place, Run, inside};
use super::tables::Tables;
use crate::probe::{SECTOR, Source, Stop, VhdBlocks, VhdHeader};

/// The entry of a block that is not there.
const UNUSED: u32 = u32::MAX;

/// A dynamic disk.
pub(super) struct VhdLayout {
    size: Bytes,
    blocks: VhdBlocks,
}

impl VhdLayout {
    pub fn read(source: &dyn Source) -> Result<Layout, Stop> {
        let header = VhdHeader::read(source)?;
        match header.blocks {
            Some(blocks) => Ok(Layout::Vhd(Self { size: header.size, blocks })),
            None => Ok(Layout::Flat(Flat { content: header.size })),
        }
    }

    pub fn virtual_size(&self) -> Bytes {
        self.size
    }

    pub fn locate(&self, tables: &mut Tables, at: u64) -> Result<Answer, Fault> {
        let VhdBlocks { table, entries, block } = self.blocks;
        let entry_at = table.0 + at / block * 4;
        let Some(bytes) = tables.get(entry_at, table.0 + entries * 4)? else {
            return Ok(Answer::missing(entry_at));
        };
        let (sectors, _) = bytes.as_chunks::<4>();
        let mut sectors = sectors.iter().map(|sector| u32::from_be_bytes(*sector));
        let first = sectors.next().unwrap_or(UNUSED);
        let left = self.size.0 - at;
        if first == UNUSED {
            let unused = 1 + sectors.take_while(|sector| *sector == UNUSED).count() as u64;
            return Ok(Answer::zero((unused * block - at % block).min(left)));
        }
        let bitmap = u64::from(first) * SECTOR.0;
        let bitmap_end = bitmap + (block / SECTOR.0).div_ceil(8).next_multiple_of(SECTOR.0);
        let sector = at % block / SECTOR.0;
        let byte_at = bitmap + sector / 8;
        let Some(bits) = tables.get(byte_at, bitmap_end)? else {
            return Ok(Answer::Missing(Missing { at: byte_at, content_follows: true }));
        };
        let (written, count) = alike(&bits, sector % 8, block / SECTOR.0 - sector);
        let len = (count * SECTOR.0 - at % SECTOR.0).min(left);
        if !written {
            return Ok(Answer::zero(len));
        }
        let place = bitmap_end + at % block;
        inside(tables, place, len)?;
        Ok(Answer::Run(Run { place: Place::Plain(place), len }))
    }
}

/// The bit with this number, and how many alike it there are from it on, of at most so many. The number is below 8.
fn alike(bits: &[u8], number: u64, most: u64) -> (bool, u64) {
    let first = bits.first().is_some_and(|byte| byte << number & 0x80 != 0);
    let same = if first { 0xFF } else { 0 };
    let mut count = 0;
    let mut skip = number;
    for byte in bits {
        // Zeros where it is alike; those before the first are not looked at.
        let other = (byte ^ same) << skip;
        if other != 0 {
            count += u64::from(other.leading_zeros());
            break;
        }
        count += 8 - skip;
        skip = 0;
        if count >= most {
            break;
        }
    }
    (first, count.clamp(1, most.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_that_are_alike_are_counted() {
        assert_eq!(alike(&[0xFF, 0xFF], 0, 16), (true, 16));
        assert_eq!(alike(&[0xFF, 0xFF], 3, 13), (true, 13));
        assert_eq!(alike(&[0b1110_1111, 0], 0, 16), (true, 3));
        assert_eq!(alike(&[0b1110_1111, 0], 3, 13), (false, 1));
        assert_eq!(alike(&[0b1110_1111, 0], 4, 12), (true, 4));
        assert_eq!(alike(&[0, 0b0001_0000], 7, 9), (false, 4));
        assert_eq!(alike(&[0, 0], 5, 2), (false, 2));
    }
}
