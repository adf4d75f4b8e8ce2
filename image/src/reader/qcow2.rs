//! qcow2. Source: `docs/interop/qcow2.rst` of QEMU; all fields are big-endian.
//!
//! The L1 table tells where L2 tables are, each as large as a cluster; their entries tell where clusters are. Extended
//! entries divide a cluster into 32 subclusters, of which each has a bit that says it is allocated, and one that says it is
//! zeros. Reference counts, snapshots and bitmaps say nothing of the content, and are not read.

use berth_core::units::Bytes;

use super::layout::{Answer, Fault, Missing, Packed, Place, Run, following, inside};
use super::tables::{PAGE, Tables};
use super::unpack::Codec;
use crate::probe::{Qcow2Header, SECTOR, Source, Stop};

/// Bits 9 to 55 of an L1 entry, or of an L2 entry that is not compressed: the offset of a table or cluster.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 62 of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry that is not extended: the cluster is zeros. Not in version 2.
const ZERO: u64 = 1;
/// Subclusters of a cluster.
const SUBCLUSTERS: u64 = 32;

pub(super) struct Qcow2Layout {
    header: Qcow2Header,
}

/// The entries of an L2 table from the one on whose cluster begins at `start` of the disk.
struct Entries<'t> {
    header: &'t Qcow2Header,
    bytes: &'t [u8],
    start: u64,
}

impl Qcow2Layout {
    pub fn read(source: &dyn Source) -> Result<Self, Stop> {
        Ok(Self { header: Qcow2Header::read(source)? })
    }

    pub fn virtual_size(&self) -> Bytes {
        self.header.size.round_up(SECTOR)
    }

    pub fn locate(&self, tables: &mut Tables, at: u64) -> Result<Answer, Fault> {
        let (header, size) = (&self.header, self.header.size.0);
        if at >= size {
            return Ok(Answer::zero(self.virtual_size().0 - at));
        }
        let reach = header.table_reach();
        let l1_at = header.l1_offset.0 + at / reach * 8;
        let Some(l1) = tables.get(l1_at, header.l1_offset.0 + header.l1_entries * 8)? else {
            return Ok(Answer::missing(l1_at));
        };
        let mut l1 = numbers(&l1).map(|entry| entry & OFFSET);
        let table = l1.next().unwrap_or(0);
        if table == 0 {
            let zeros = 1 + l1.take_while(|table| *table == 0).count() as u64;
            return Ok(Answer::zero((zeros * reach - at % reach).min(size - at)));
        }
        let cluster = header.cluster_size();
        if !table.is_multiple_of(cluster) {
            return Err(Fault::corrupt("unaligned L2 table"));
        }
        inside(tables, table, cluster)?;
        let entry_at = table + at % reach / cluster * header.entry_size();
        match tables.get(entry_at, table + cluster)? {
            Some(bytes) => {
                Entries { header, bytes: &bytes, start: at / cluster * cluster }.locate(tables, at)
            }
            // Writers put an L2 table before its clusters; small ones are then near them.
            None => Ok(Answer::Missing(Missing { at: entry_at, content_follows: cluster < PAGE })),
        }
    }
}

impl Entries<'_> {
    /// What is at `at`, which the first entry describes.
    fn locate(&self, tables: &Tables, at: u64) -> Result<Answer, Fault> {
        let unit = self.unit();
        let number = (at - self.start) / unit;
        let place = self.place(number)?.ok_or_else(|| Fault::corrupt("L2 table too short"))?;
        let left = self.header.size.0 - at;
        if let Place::Packed(packed) = place {
            inside(tables, packed.at, packed.len)?;
            let len = (self.header.cluster_size() - (at - self.start)).min(left);
            return Ok(Answer::Run(Run { place, len }));
        }
        let more = following(place, unit, |further| {
            let next = self.place(number + further).ok().flatten()?;
            // The last one may end with the disk; that is looked at when it is its turn.
            let whole = !matches!(next, Place::Plain(next) if inside(tables, next, unit).is_err());
            whole.then_some(next)
        });
        let len = ((1 + more) * unit - at % unit).min(left);
        let place = match place {
            Place::Plain(place) => {
                inside(tables, place + at % unit, len)?;
                Place::Plain(place + at % unit)
            }
            other => other,
        };
        Ok(Answer::Run(Run { place, len }))
    }

    /// Bytes of what has a place of its own: a cluster or a subcluster.
    fn unit(&self) -> u64 {
        let cluster = self.header.cluster_size();
        if self.header.extended_l2 { cluster / SUBCLUSTERS } else { cluster }
    }

    /// Where the unit with this number is, counted from `start`; `None` if no entry describes it.
    fn place(&self, number: u64) -> Result<Option<Place>, Fault> {
        let units = self.header.cluster_size() / self.unit();
        let (entry, part) = (number / units, number % units);
        let at = usize::try_from(entry * self.header.entry_size()).unwrap_or(usize::MAX);
        let mut fields = numbers(self.bytes.get(at..).unwrap_or_default());
        let Some(word) = fields.next() else { return Ok(None) };
        if word & COMPRESSED != 0 {
            return Ok(Some(Place::Packed(self.packed(word, entry))));
        }
        let bitmap = if self.header.extended_l2 { fields.next().unwrap_or(0) } else { self.bits(word)? };
        let host = word & OFFSET;
        match (bitmap >> part & 1 != 0, bitmap >> (SUBCLUSTERS + part) & 1 != 0) {
            (true, true) => Err(Fault::corrupt("a subcluster that is both allocated and zeros")),
            (false, _) => Ok(Some(Place::Zero)),
            (true, false) if host == 0 || !host.is_multiple_of(self.header.cluster_size()) => {
                Err(Fault::corrupt("unaligned cluster"))
            }
            (true, false) => Ok(Some(Place::Plain(host + part * self.unit()))),
        }
    }

    /// What the bits of the first subcluster would be if the entry had them.
    fn bits(&self, word: u64) -> Result<u64, Fault> {
        match (word & ZERO != 0, word & OFFSET != 0) {
            (true, _) if self.header.version == 2 => Err(Fault::corrupt("a zero cluster in version 2")),
            (true, _) => Ok(1 << SUBCLUSTERS),
            (false, allocated) => Ok(allocated.into()),
        }
    }

    /// The offset takes the lower bits, the number of further sectors those up to bit 61: at most two clusters.
    fn packed(&self, word: u64, entry: u64) -> Packed {
        let cluster = self.header.cluster_size();
        let offset_bits = 62 - (self.header.cluster_bits - 8);
        let at = word & ((1 << offset_bits) - 1);
        let sectors = (word & (COMPRESSED - 1)) >> offset_bits;
        let whole = usize::try_from(cluster).unwrap_or(usize::MAX);
        Packed {
            at,
            len: (sectors + 1) * SECTOR.0 - at % SECTOR.0,
            codec: if self.header.zstd { Codec::Zstd } else { Codec::Deflate },
            start: self.start + entry * cluster,
            least: whole,
            most: whole,
        }
    }
}

fn numbers(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (numbers, _) = bytes.as_chunks::<8>();
    numbers.iter().map(|number| u64::from_be_bytes(*number))
}
