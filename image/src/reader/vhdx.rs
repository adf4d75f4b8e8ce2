//! VHDX. Source: \[MS-VHDX\] "Virtual Hard Disk v2 File Format" of Microsoft; all fields are little-endian.
//!
//! The block allocation table has an entry for each payload block: its state in bits 0 to 2, and in bits 20 to 63 the MiB of
//! the file at which it lies. After the entries of a chunk comes one of a sector bitmap, which only disks with a parent use.

use berth_core::units::Bytes;

use super::layout::{Answer, Fault, Place, Run, following, inside};
use super::tables::Tables;
use crate::probe::{Source, Stop, VhdxHeader};

/// Bits of the state.
const STATE: u64 = 7;
/// States: what was never there, is undefined, zero, or given up by the machine, reads as zeros.
const ABSENT: std::ops::RangeInclusive<u64> = 0..=3;
const FULLY_PRESENT: u64 = 6;
/// Bits of the offset, which is a multiple of 1 MiB.
const OFFSET: u64 = !0 << 20;

pub(super) struct VhdxLayout {
    header: VhdxHeader,
}

impl VhdxLayout {
    pub fn read(source: &dyn Source) -> Result<Self, Stop> {
        Ok(Self { header: VhdxHeader::read(source)? })
    }

    pub fn virtual_size(&self) -> Bytes {
        self.header.size
    }

    pub fn locate(&self, tables: &mut Tables, at: u64) -> Result<Answer, Fault> {
        let VhdxHeader { size, block, chunk_ratio, table: (table, len), .. } = self.header;
        let number = at / block;
        let entry_at = table.0 + (number + number / chunk_ratio) * 8;
        let Some(entries) = tables.get(entry_at, table.0 + len)? else {
            return Ok(Answer::missing(entry_at));
        };
        let (entries, _) = entries.as_chunks::<8>();
        let before = number / chunk_ratio;
        let place = |further: u64| {
            // Behind as many bitmap entries as chunks end in between.
            let index = further + (number + further) / chunk_ratio - before;
            let entry = entries.get(usize::try_from(index).ok()?)?;
            Some(place(u64::from_le_bytes(*entry)))
        };
        let first = place(0).ok_or_else(|| Fault::corrupt("block table too short"))??;
        let whole = |further| match place(further)?.ok()? {
            Place::Plain(next) if inside(tables, next, block).is_err() => None,
            next => Some(next),
        };
        let (within, left) = (at % block, size.0 - at);
        let len = ((1 + following(first, block, whole)) * block - within).min(left);
        match first {
            Place::Plain(first) => {
                inside(tables, first + within, len)?;
                Ok(Answer::Run(Run { place: Place::Plain(first + within), len }))
            }
            _ => Ok(Answer::zero(len)),
        }
    }
}

fn place(entry: u64) -> Result<Place, Fault> {
    match entry & STATE {
        state if ABSENT.contains(&state) => Ok(Place::Zero),
        FULLY_PRESENT if entry & OFFSET != 0 => Ok(Place::Plain(entry & OFFSET)),
        FULLY_PRESENT => Err(Fault::corrupt("a block within the header")),
        state => Err(Fault::Corrupt(format!("a block in state {state}"))),
    }
}
