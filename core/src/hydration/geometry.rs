//! Regions: the unit in which a template becomes local, and what a range of it comes to in them.
//!
//! Sources: `drivers/md/dm-clone-target.c` of the kernel (limits, which writes and discards count for a region),
//! `drivers/md/dm-clone-metadata.c` and `drivers/md/persistent-data/dm-array.c` (what the metadata takes).

use std::fmt;

use thiserror::Error;

use super::decide::Progress;
use crate::thin::{BlockSize, METADATA_BLOCK};
use crate::units::Bytes;

/// The most that is written at once: the 256 pages of 4 KiB that one request of the kernel always holds (`BIO_MAX_VECS`). A
/// longer write may be cut anywhere, and a region that is written in two parts is read from the source first.
pub const LARGEST_WRITE: Bytes = Bytes::mib(1);
/// `test_bit` of the kernel does not reach further.
const MOST_REGIONS: u64 = 1 << 31;
const SECTOR: u64 = 512;

/// Bits in a block of the metadata: `(4096 - 24) / 8` words of 64.
const BITS: u64 = 509 * 64;
/// Blocks of bits in a half-full leaf of their tree.
const LEAF: u64 = 126;
/// Superblock, both space maps with their bitmaps, and what one commit takes besides.
const FIXED: u64 = 64;

/// The size of a region: a power of two from 4 KiB to 1 GiB. Fixed by the first use of the metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RegionSize(u64);

/// Why a template cannot be divided into regions.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GeometryError {
    /// Not a region size of the kernel's.
    #[error("region size {0} is not a power of two from 4 KiB to 1 GiB")]
    RegionSize(Bytes),
    /// Not the size of a disk.
    #[error("size {0} is not a positive multiple of 512 bytes")]
    Size(Bytes),
    /// The kernel does not count so far.
    #[error("{size} in regions of {region} are {regions}, more than {MOST_REGIONS}")]
    TooManyRegions {
        /// The size of the template.
        size: Bytes,
        /// The size of a region.
        region: RegionSize,
        /// How many there would be.
        regions: u64,
    },
}

impl RegionSize {
    /// The smallest the kernel takes.
    pub const MIN: Self = Self(4 << 10);
    /// The largest the kernel takes.
    pub const MAX: Self = Self(1 << 30);
    /// The smallest with which an image is shown: the smallest block of a kernel pool, and the smallest chunk of a store. What
    /// is promised for the metadata is enough for these.
    pub const SMALLEST_SHOWN: Self = Self(64 << 10);

    /// # Errors
    /// [`GeometryError::RegionSize`] unless the kernel takes it.
    pub const fn new(bytes: Bytes) -> Result<Self, GeometryError> {
        if !bytes.0.is_power_of_two() || bytes.0 < Self::MIN.0 || bytes.0 > Self::MAX.0 {
            return Err(GeometryError::RegionSize(bytes));
        }
        Ok(Self(bytes.0))
    }

    /// The largest that divides a block of the kernel pool and a chunk of the store, and that the devices take in one write.
    ///
    /// It divides the chunk, so a chunk is whole regions. If it is a whole block as well, the kernel pool need not zero the
    /// block first. `longest` is the longest request of destination and source (`max_sectors_kb`).
    ///
    /// # Errors
    /// [`GeometryError::RegionSize`] if the kernel takes no such size.
    pub const fn choose(block: BlockSize, chunk: Bytes, longest: Bytes) -> Result<Self, GeometryError> {
        let mut bytes = 1_u64 << min(block.bytes().0.trailing_zeros(), chunk.0.trailing_zeros());
        while bytes > LARGEST_WRITE.0 || bytes > longest.0 && bytes > 0 {
            bytes /= 2;
        }
        Self::new(Bytes(bytes))
    }

    /// In bytes.
    pub const fn bytes(self) -> Bytes {
        Bytes(self.0)
    }

    /// In sectors of 512 bytes.
    pub const fn sectors(self) -> u64 {
        self.0 / SECTOR
    }
}

const fn min(a: u32, b: u32) -> u32 {
    let less = if a < b { a } else { b };
    if less > 63 { 63 } else { less }
}

impl fmt::Display for RegionSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().fmt(f)
    }
}

/// A range of a template, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its first byte.
    pub offset: Bytes,
    /// Its length; may be zero.
    pub length: Bytes,
}

/// A hole, by what makes it local.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hole {
    /// What a discard marks as local: regions of full size.
    pub discarded: Option<Span>,
    /// What zeros have to be written to: the region that is shorter.
    pub written: Option<Span>,
}

/// Why a range is not written or discarded.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SpanError {
    /// It is empty, or reaches beyond the end.
    #[error("{length} at {offset} are not inside of {size}")]
    Outside {
        /// Where it begins.
        offset: Bytes,
        /// Its length.
        length: Bytes,
        /// The size of the template.
        size: Bytes,
    },
    /// It begins or ends inside of a region, which is then completed from the source.
    #[error("{length} at {offset} are not whole regions of {region}")]
    PartOfRegion {
        /// Where it begins.
        offset: Bytes,
        /// Its length.
        length: Bytes,
        /// The size of a region.
        region: RegionSize,
    },
}

/// A template in regions. The last one is shorter where the size is no multiple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    size: Bytes,
    region: RegionSize,
}

impl Geometry {
    /// # Errors
    /// [`GeometryError::Size`], [`GeometryError::TooManyRegions`].
    pub const fn new(size: Bytes, region: RegionSize) -> Result<Self, GeometryError> {
        if size.0 == 0 || !size.0.is_multiple_of(SECTOR) {
            return Err(GeometryError::Size(size));
        }
        let geometry = Self { size, region };
        let regions = geometry.regions();
        if regions > MOST_REGIONS {
            return Err(GeometryError::TooManyRegions { size, region, regions });
        }
        Ok(geometry)
    }

    /// The size of the template. A multiple of 512 bytes.
    pub const fn size(&self) -> Bytes {
        self.size
    }

    /// The size of a region.
    pub const fn region(&self) -> RegionSize {
        self.region
    }

    /// How many regions there are, the last one perhaps shorter.
    pub const fn regions(&self) -> u64 {
        self.size.0.div_ceil(self.region.0)
    }

    /// The last region, if it is shorter than the others. The kernel takes neither a write nor a discard for the whole of it:
    /// a write makes it read the rest of the region from the source first, a discard passes it over.
    pub const fn short_region(&self) -> Option<Span> {
        let length = self.size.0 % self.region.0;
        if length == 0 {
            return None;
        }
        Some(Span { offset: Bytes(self.size.0 - length), length: Bytes(length) })
    }

    /// A range without the shorter region at the end; `None` if nothing else is in it.
    pub fn without_short(&self, span: Span) -> Option<Span> {
        let Some(short) = self.short_region() else { return Some(span) };
        let length = span.length.min(short.offset.saturating_sub(span.offset));
        (length > Bytes::ZERO).then_some(Span { length, ..span })
    }

    /// True if nothing but the shorter region at the end can be what is not local.
    pub fn lacks_only_short(&self, progress: Progress) -> bool {
        progress.hydrated.saturating_add(1) == progress.total && self.short_region().is_some()
    }

    /// Takes a range of whole regions; the last of them may be the shorter one.
    ///
    /// # Errors
    /// [`SpanError`] for every other range.
    pub fn check(&self, span: Span) -> Result<(), SpanError> {
        let Span { offset, length } = span;
        let inside = offset.checked_add(length).filter(|end| *end <= self.size && length > Bytes::ZERO);
        let Some(end) = inside else {
            return Err(SpanError::Outside { offset, length, size: self.size });
        };
        let starts_one = |at: Bytes| at.0.is_multiple_of(self.region.0);
        if starts_one(offset) && (starts_one(end) || end == self.size) {
            return Ok(());
        }
        Err(SpanError::PartOfRegion { offset, length, region: self.region })
    }

    /// A range that [`Self::check`] takes, by what makes it local if it is a hole.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn hole(&self, span: Span) -> Result<Hole, SpanError> {
        self.check(span)?;
        let end = Bytes(span.offset.0 + span.length.0);
        let written = self.short_region().filter(|_| end == self.size);
        let length = Bytes(span.length.0 - written.map_or(0, |short| short.length.0));
        let discarded = Some(Span { length, ..span }).filter(|whole| whole.length > Bytes::ZERO);
        Ok(Hole { discarded, written })
    }

    /// How large the metadata device has to be, so that a commit which changes every bit fits beside the one before; a multiple
    /// of 1 MiB.
    pub const fn metadata(&self) -> Bytes {
        let bits = self.regions().div_ceil(BITS);
        let leaves = bits.div_ceil(LEAF);
        let tree = leaves + leaves.div_ceil(LEAF) + 1;
        Bytes((2 * (bits + tree) + FIXED) * METADATA_BLOCK.0).round_up(Bytes::mib(1))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn region(bytes: Bytes) -> RegionSize {
        RegionSize::new(bytes).expect("a region size")
    }

    fn geometry(size: Bytes) -> Geometry {
        Geometry::new(size, region(Bytes::kib(64))).expect("a disk")
    }

    fn span(offset: Bytes, length: Bytes) -> Span {
        Span { offset, length }
    }

    #[test]
    fn only_sizes_that_the_kernel_takes_are_sizes() {
        for bytes in [Bytes(0), Bytes(512), Bytes(2048), Bytes::kib(12), Bytes::gib(2), Bytes(u64::MAX)] {
            assert_eq!(RegionSize::new(bytes), Err(GeometryError::RegionSize(bytes)));
        }
        assert_eq!((region(Bytes::kib(4)), region(Bytes::gib(1))), (RegionSize::MIN, RegionSize::MAX));
        assert_eq!(region(Bytes::kib(4)).sectors(), 8);
        assert_eq!(Geometry::new(Bytes(513), RegionSize::MIN), Err(GeometryError::Size(Bytes(513))));
        let (size, many) = (Bytes::gib(8 << 10), Bytes(Bytes::gib(8 << 10).0 + 512));
        assert!(Geometry::new(size, RegionSize::MIN).is_ok());
        let error = Geometry::new(many, RegionSize::MIN).expect_err("too many");
        assert!(matches!(error, GeometryError::TooManyRegions { regions: 2_147_483_649, .. }), "{error}");
    }

    #[test]
    fn a_region_divides_block_and_chunk_and_is_written_at_once() {
        let choose = |block, chunk, longest| {
            RegionSize::choose(BlockSize::new(block).expect("a block size"), chunk, longest)
                .map(RegionSize::bytes)
        };
        let (kib, mib) = (Bytes::kib, Bytes::mib);
        assert_eq!(choose(kib(64), kib(256), mib(4)), Ok(kib(64)));
        assert_eq!(choose(mib(1), kib(256), mib(4)), Ok(kib(256)));
        assert_eq!(choose(mib(4), mib(4), mib(4)), Ok(mib(1)), "no longer than one request");
        assert_eq!(choose(kib(192), mib(4), mib(4)), Ok(kib(64)), "blocks need not be powers of two");
        assert_eq!(choose(mib(1), mib(1), Bytes(255 * 512)), Ok(kib(64)), "what the device takes");
        assert!(choose(kib(64), Bytes(512), mib(4)).is_err());
        assert!(choose(kib(64), kib(64), Bytes(2048)).is_err());
        assert!(choose(kib(64), kib(64), Bytes::ZERO).is_err());
        assert!(choose(kib(64), Bytes::ZERO, mib(1)).is_ok(), "everything divides nothing");
    }

    #[test]
    fn the_last_region_may_be_shorter() {
        let even = geometry(Bytes::mib(1));
        assert_eq!((even.regions(), even.short_region()), (16, None));
        let odd = geometry(Bytes(Bytes::mib(1).0 + 512));
        assert_eq!((odd.regions(), odd.short_region()), (17, Some(span(Bytes::mib(1), Bytes(512)))));
        let tiny = geometry(Bytes(512));
        assert_eq!((tiny.regions(), tiny.short_region()), (1, Some(span(Bytes(0), Bytes(512)))));
    }

    #[test]
    fn what_ends_inside_of_a_region_is_refused() {
        let odd = geometry(Bytes(Bytes::mib(1).0 + 512));
        for (offset, length) in [(0, 64), (64, 128), (0, 1024), (960, 64)] {
            assert_eq!(odd.check(span(Bytes::kib(offset), Bytes::kib(length))), Ok(()), "{offset} {length}");
        }
        assert_eq!(odd.check(span(Bytes::kib(960), Bytes(Bytes::kib(64).0 + 512))), Ok(()), "to the end");
        for (offset, length) in [(4, 60), (0, 4), (0, 65), (64, 63)] {
            let error = odd.check(span(Bytes::kib(offset), Bytes::kib(length))).expect_err("a part");
            assert!(matches!(error, SpanError::PartOfRegion { .. }), "{error}");
        }
        for (offset, length) in
            [(Bytes(0), Bytes(0)), (Bytes::mib(1), Bytes(1024)), (Bytes(u64::MAX), Bytes(1))]
        {
            let error = odd.check(span(offset, length)).expect_err("outside");
            assert!(matches!(error, SpanError::Outside { .. }), "{error}");
        }
    }

    #[test]
    fn the_shorter_region_of_a_hole_is_written() {
        let odd = geometry(Bytes(Bytes::mib(1).0 + 512));
        let short = span(Bytes::mib(1), Bytes(512));
        let (from, to_the_end) = (Bytes::kib(960), Bytes(Bytes::kib(64).0 + 512));
        assert_eq!(
            odd.hole(span(from, to_the_end)),
            Ok(Hole { discarded: Some(span(from, Bytes::kib(64))), written: Some(short) })
        );
        assert_eq!(odd.hole(short), Ok(Hole { discarded: None, written: Some(short) }));
        let inside = span(Bytes::ZERO, Bytes::kib(128));
        assert_eq!(odd.hole(inside), Ok(Hole { discarded: Some(inside), written: None }));
    }

    #[test]
    fn metadata_holds_two_of_everything() {
        assert_eq!(geometry(Bytes::gib(1)).metadata(), Bytes::mib(1));
        // 16,777,216 bits are 516 blocks of them, in 5 leaves.
        assert_eq!(geometry(Bytes::gib(1024)).metadata(), Bytes::mib(5));
        let most = Geometry::new(Bytes::gib(8 << 10), RegionSize::MIN).expect("the most");
        assert!(most.metadata() >= Bytes((2 * MOST_REGIONS / 8).max(1)) && most.metadata() < Bytes::gib(1));
    }

    #[test]
    fn the_short_region_is_left_out_and_told_from_others() {
        let region = RegionSize::new(Bytes::kib(64)).expect("a region size");
        let odd = Geometry::new(Bytes(Bytes::mib(1).0 + 512), region).expect("a disk");
        let span = |offset, length| Span { offset: Bytes(offset), length: Bytes(length) };
        let whole = Bytes::mib(1).0;
        for (asked, left) in [
            (span(0, 65_536), Some(span(0, 65_536))),
            (span(0, whole + 512), Some(span(0, whole))),
            (span(whole - 65_536, 66_048), Some(span(whole - 65_536, 65_536))),
            (span(whole, 512), None),
        ] {
            assert_eq!(odd.without_short(asked), left, "{asked:?}");
        }
        let even = Geometry::new(Bytes::mib(1), region).expect("a disk");
        assert_eq!(even.without_short(span(0, whole)), Some(span(0, whole)));
        let progress = |hydrated| Progress { hydrated, total: 17 };
        assert!(odd.lacks_only_short(progress(16)) && !even.lacks_only_short(progress(16)));
        assert!(!odd.lacks_only_short(progress(15)) && !odd.lacks_only_short(progress(17)));
    }

    proptest! {
        #[test]
        fn a_hole_is_covered_once(regions in 1..40_u64, short in 0..128_u64, first in 0..40_u64, count in 1..41_u64) {
            let size = Bytes(regions * (64 << 10) + short * 512);
            let geometry = geometry(size);
            let offset = first * (64 << 10);
            let length = (count * (64 << 10)).min(size.0.saturating_sub(offset));
            let span = span(Bytes(offset), Bytes(length));
            let Ok(Hole { discarded, written }) = geometry.hole(span) else {
                prop_assert!(offset >= size.0);
                return Ok(());
            };
            let covered: u64 = [discarded, written].into_iter().flatten().map(|part| part.length.0).sum();
            prop_assert_eq!(covered, length);
            prop_assert_eq!(discarded.or(written).map(|part| part.offset), Some(span.offset));
            prop_assert!(discarded.is_none_or(|whole| whole.length.0 % (64 << 10) == 0));
        }
    }
}
