//! VMDK. Source: "Virtual Disk Format 5.0" of `VMware`; all fields are little-endian, offsets in sectors.
//!
//! The grain directory tells where grain tables are, and these where grains are. A compressed grain begins with a marker: its
//! first sector on the disk, 8 bytes, and the length of the zlib stream that follows, 4 bytes.

use std::ops::Range;

use berth_core::units::Bytes;

use super::layout::{Answer, Fault, Packed, Place, Run, following, inside};
use super::tables::Tables;
use super::unpack::Codec;
use crate::probe::{SECTOR, Source, Stop, VmdkHeader};

/// Bytes of the marker before a compressed grain.
const MARKER: u64 = 12;

pub(super) struct VmdkLayout {
    header: VmdkHeader,
}

/// The entries of a grain table from the one on whose grain begins at `start` of the disk.
struct Entries<'t> {
    header: &'t VmdkHeader,
    bytes: &'t [u8],
    start: u64,
}

impl VmdkLayout {
    pub fn read(source: &dyn Source) -> Result<Self, Stop> {
        Ok(Self { header: VmdkHeader::read(source)? })
    }

    pub fn virtual_size(&self) -> Bytes {
        Bytes(self.header.capacity * SECTOR.0)
    }

    pub fn locate(&self, tables: &mut Tables, at: u64) -> Result<Answer, Fault> {
        let header = &self.header;
        let (size, grain) = (self.virtual_size().0, header.grain * SECTOR.0);
        let reach = grain * header.entries;
        let directory = header.directory.saturating_mul(SECTOR.0);
        let entry_at = directory.saturating_add(at / reach * 4);
        let directory_end = directory.saturating_add(size.div_ceil(reach).saturating_mul(4));
        let Some(entries) = tables.get(entry_at, directory_end)? else {
            return Ok(Answer::missing(entry_at));
        };
        let mut entries = numbers(&entries);
        let table = entries.next().unwrap_or(0);
        if table == 0 {
            let zeros = 1 + entries.take_while(|table| *table == 0).count() as u64;
            return Ok(Answer::zero(zeros.saturating_mul(reach).saturating_sub(at % reach).min(size - at)));
        }
        let table = u64::from(table) * SECTOR.0;
        let entry_at = table + at % reach / grain * 4;
        match tables.get(entry_at, table + header.entries * 4)? {
            Some(bytes) => Entries { header, bytes: &bytes, start: at / grain * grain }.locate(tables, at),
            None => Ok(Answer::missing(entry_at)),
        }
    }
}

impl Entries<'_> {
    /// What is at `at`, which the first entry describes.
    fn locate(&self, tables: &Tables, at: u64) -> Result<Answer, Fault> {
        let grain = self.header.grain * SECTOR.0;
        let (within, left) = (at - self.start, self.header.capacity * SECTOR.0 - at);
        let first = self.place(0)?.ok_or_else(|| Fault::corrupt("grain table too short"))?;
        if let (Place::Plain(at), true) = (first, self.header.is_compressed()) {
            let place = Place::Packed(self.packed(tables, at, within + left)?);
            return Ok(Answer::Run(Run { place, len: (grain - within).min(left) }));
        }
        let whole = |number| match self.place(number).ok().flatten()? {
            Place::Plain(_) if self.header.is_compressed() => None,
            // The last one may end with the disk; that is looked at when it is its turn.
            Place::Plain(next) if inside(tables, next, grain).is_err() => None,
            next => Some(next),
        };
        let len = ((1 + following(first, grain, whole)) * grain - within).min(left);
        match first {
            Place::Plain(first) => {
                inside(tables, first + within, len)?;
                Ok(Answer::Run(Run { place: Place::Plain(first + within), len }))
            }
            _ => Ok(Answer::zero(len)),
        }
    }

    /// Where the grain with this number is, counted from `start`; `None` if no entry describes it.
    fn place(&self, number: u64) -> Result<Option<Place>, Fault> {
        let entry = usize::try_from(number).ok().and_then(|number| numbers(self.bytes).nth(number));
        match entry {
            None => Ok(None),
            Some(0) => Ok(Some(Place::Zero)),
            Some(1) if self.header.has_zero_grains() => Ok(Some(Place::Zero)),
            Some(1) => Err(Fault::corrupt("a grain within the header")),
            Some(sector) => Ok(Some(Place::Plain(u64::from(sector) * SECTOR.0))),
        }
    }

    /// The compressed grain at `at`, of which the disk has so many bytes, or more than a grain.
    fn packed(&self, tables: &Tables, at: u64, left: u64) -> Result<Packed, Fault> {
        let grain = self.header.grain * SECTOR.0;
        inside(tables, at, MARKER)?;
        // Its length is not known before it is fetched; mostly the next one follows.
        let next = numbers(self.bytes).map(|sector| u64::from(sector) * SECTOR.0).find(|next| *next > at);
        let end = next.unwrap_or(u64::MAX).min(at + longest(grain)).min(tables.length());
        let length = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        Ok(Packed {
            at,
            len: end.saturating_sub(at).max(MARKER),
            codec: Codec::Grain,
            start: self.start,
            // Some writers compress only what the disk has of its last grain.
            least: length(grain.min(left)),
            most: length(grain),
        })
    }
}

/// The most that a grain takes with its marker: whatever made its stream longer than twice its content is no compressor.
fn longest(grain: u64) -> u64 {
    MARKER + 2 * grain
}

impl Packed {
    /// Where the grain is whose marker `bytes` begin with, the marker included.
    pub fn marked(&self, bytes: &[u8]) -> Result<Range<u64>, Fault> {
        let no_marker = || self.corrupt("has no marker");
        let (sector, rest) = bytes.split_first_chunk().ok_or_else(no_marker)?;
        let (sector, size) = (u64::from_le_bytes(*sector), rest.first_chunk().ok_or_else(no_marker)?);
        // Whoever reads the image as a stream believes the marker, others the table.
        if Some(self.start) != sector.checked_mul(SECTOR.0) {
            return Err(self.corrupt(&format!("is marked as that of sector {sector}")));
        }
        let len = MARKER + u64::from(u32::from_le_bytes(*size));
        if len > longest(self.most as u64) {
            return Err(self.corrupt("is longer than any grain"));
        }
        Ok(self.at..self.at + len)
    }

    /// The stream of a grain with its marker.
    pub fn stream<'b>(&self, bytes: &'b [u8]) -> &'b [u8] {
        debug_assert_eq!(self.codec, Codec::Grain);
        bytes.get(12..).unwrap_or_default()
    }
}

fn numbers(bytes: &[u8]) -> impl Iterator<Item = u32> {
    let (numbers, _) = bytes.as_chunks::<4>();
    numbers.iter().map(|number| u32::from_le_bytes(*number))
}
