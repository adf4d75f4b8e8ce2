//! Thin pools: their geometry, how much metadata they need, and when they grow.
//!
//! A kernel pool keeps its mappings in blocks of 4 KiB on a metadata device. Running out of these is worse than running
//! out of data: the pool stops writing and has to be repaired offline. So metadata is promised like data, from worst
//! cases, and only up to [`ADMISSION_PERCENT`] of the device; the rest is for transactions and for a repair.
//!
//! Sources: `thin_metadata_size` of thin-provisioning-tools (`src/thin/metadata_size.rs`), which counts a superblock, one
//! leaf for every 126 mapped blocks and one root for each thin device; `drivers/md/persistent-data` of the kernel for
//! what it leaves out (inner nodes, the two space maps, reference counts of shared blocks).

mod charge;
mod grant;
mod growth;
mod layout;

use std::fmt;

use thiserror::Error;

pub use self::charge::{
    copy_metadata, directory_charge, directory_device, image_charge, regions_device, volume_charge,
};
pub use self::grant::Stopped;
pub use self::growth::{
    Action, Part, PoolMode, PoolState, Room, StopReason, Usage, decide, demanded, low_water,
};
pub use self::layout::{Layout, RECORD, ThinState, capacity, kernel_pool_metadata, layout};
use crate::units::Bytes;

/// A block of metadata.
pub const METADATA_BLOCK: Bytes = Bytes::kib(4);
/// The largest metadata device: 15.8125 GiB, `DM_THIN_MAX_METADATA_SIZE` of libdevmapper. The kernel's own limit
/// (`THIN_METADATA_MAX_SECTORS`) is a little higher.
pub const MAX_METADATA: Bytes = Bytes((255 * (1 << 14) * 8 - (256 << 10)) * 512);
/// The smallest metadata device that is made. The kernel's documentation asks for 2 MiB.
pub const MIN_METADATA: Bytes = Bytes::mib(4);
/// Percent of a metadata device that may be promised.
pub const ADMISSION_PERCENT: u64 = 70;

/// Mappings in a leaf that is half full: `((4096 - 32) / 16, rounded down to a multiple of 3) / 2`.
const MAPPINGS: u64 = 126;
/// Reference counts in a half-full leaf (12 bytes each); only counts above 2 are kept there.
const COUNTS: u64 = 168;
/// Thin devices in a half-full leaf of their tree (32 bytes each).
const DEVICES: u64 = 63;
/// Index entries of a space map in a half-full leaf (24 bytes each).
const INDEX_ENTRIES: u64 = 84;
/// Two-bit counts in a bitmap block: `(4096 - 16) * 4`.
const BITMAP: u64 = 16_320;

/// The unit in which a pool hands out space: a multiple of 64 KiB, at most 1 GiB. Fixed for the life of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockSize(u64);

impl BlockSize {
    /// 64 KiB: the least copying and the finest sharing between snapshots.
    pub const DEFAULT: Self = Self(64 << 10);
    /// The largest the kernel takes.
    pub const MAX: Self = Self(1 << 30);

    /// # Errors
    /// [`GeometryError::BlockSize`] unless the kernel takes it.
    pub const fn new(bytes: Bytes) -> Result<Self, GeometryError> {
        if bytes.0 == 0 || !bytes.0.is_multiple_of(Self::DEFAULT.0) || bytes.0 > Self::MAX.0 {
            return Err(GeometryError::BlockSize { bytes });
        }
        Ok(Self(bytes.0))
    }

    /// In bytes.
    pub const fn bytes(self) -> Bytes {
        Bytes(self.0)
    }

    /// In sectors of 512 bytes.
    pub const fn sectors(self) -> u64 {
        self.0 / 512
    }

    /// How many blocks hold `data`, the last one perhaps in part.
    pub const fn blocks(self, data: Bytes) -> u64 {
        data.0.div_ceil(self.0)
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().fmt(f)
    }
}

/// Why a pool cannot be made as asked for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GeometryError {
    /// Not a block size of the kernel's.
    #[error("block size {bytes} is not a multiple of 64 KiB up to 1 GiB")]
    BlockSize {
        /// What was asked for.
        bytes: Bytes,
    },
    /// The metadata would not fit on the largest metadata device.
    #[error(
        "{data} in blocks of {block} with {snapshots} snapshots need {needed} of metadata, more than {most}"
    )]
    MetadataTooLarge {
        /// The data.
        data: Bytes,
        /// The block size.
        block: BlockSize,
        /// Snapshots.
        snapshots: u64,
        /// What they need.
        needed: Bytes,
        /// What may be promised on the largest metadata device.
        most: Bytes,
    },
    /// Nothing useful would be left for data.
    #[error("{space} are too little for a pool: at least {least} are needed")]
    TooSmall {
        /// What there is.
        space: Bytes,
        /// What is needed.
        least: Bytes,
    },
}

/// The metadata that one thin device of `size` takes at most, whatever it shares: what is charged for it.
pub fn device_metadata(size: Bytes, block: BlockSize) -> Bytes {
    let leaves = block.blocks(size).div_ceil(MAPPINGS).max(1);
    blocks(leaves.saturating_add(inner_nodes(leaves).max(1)))
}

/// The metadata that a pool takes for itself, however many devices it has (up to 16,777,216, all that the kernel knows).
/// With snapshots, each block of data may have a reference count of its own.
pub fn pool_metadata(data: Bytes, block: BlockSize, devices: u64, snapshots: bool) -> Bytes {
    let data_blocks = block.blocks(data);
    let mut count = 1; // the superblock
    count += tree(devices, DEVICES) + tree(devices, MAPPINGS);
    let bitmaps = data_blocks.div_ceil(BITMAP);
    count += bitmaps + tree(bitmaps, INDEX_ENTRIES);
    if snapshots {
        count += tree(data_blocks, COUNTS);
    }
    blocks(count).saturating_add(METADATA_MAP)
}

/// The space map of the metadata itself, at its largest: one index block and 255 bitmaps.
const METADATA_MAP: Bytes = Bytes(256 * METADATA_BLOCK.0);

/// The metadata needed for `data` bytes in blocks of `block`, each block mapped once, and up to `snapshots` snapshots that
/// have come to share no leaf with one another: the worst case.
pub fn metadata_needed(data: Bytes, block: BlockSize, snapshots: u64) -> Bytes {
    let devices = snapshots.saturating_add(1);
    let mappings = Bytes(device_metadata(data, block).0.saturating_mul(devices));
    pool_metadata(data, block, devices, snapshots > 0).saturating_add(mappings)
}

/// How large the metadata device has to be so that this much may be promised on it; a multiple of `extent`.
///
/// # Errors
/// [`GeometryError::MetadataTooLarge`] if no device is large enough; a larger block size helps ([`block_size_for`]).
pub fn metadata_device(
    data: Bytes,
    block: BlockSize,
    snapshots: u64,
    extent: Bytes,
) -> Result<Bytes, GeometryError> {
    let needed = metadata_needed(data, block, snapshots);
    let most = admissible_metadata(MAX_METADATA);
    if needed > most {
        return Err(GeometryError::MetadataTooLarge { data, block, snapshots, needed, most });
    }
    let size = Bytes((needed.0 * 100).div_ceil(ADMISSION_PERCENT)).max(MIN_METADATA);
    let rounded = size.round_up(extent);
    Ok(if rounded > MAX_METADATA { size.round_up(METADATA_BLOCK) } else { rounded })
}

/// The part of a metadata device of `size` that may be promised.
pub fn admissible_metadata(size: Bytes) -> Bytes {
    Bytes(size.0.min(MAX_METADATA.0)).percent(ADMISSION_PERCENT)
}

/// The smallest block size, 64 KiB or doubled from it, whose metadata fits on a metadata device; `None` if none does.
pub fn block_size_for(data: Bytes, snapshots: u64) -> Option<BlockSize> {
    let sizes = std::iter::successors(Some(BlockSize::DEFAULT), |size| {
        (size.0 < BlockSize::MAX.0).then_some(BlockSize(size.0 * 2))
    });
    sizes
        .into_iter()
        .find(|block| metadata_needed(data, *block, snapshots) <= admissible_metadata(MAX_METADATA))
}

fn blocks(count: u64) -> Bytes {
    Bytes(count.saturating_mul(METADATA_BLOCK.0))
}

/// All nodes of a tree of `entries` whose leaves hold `per_leaf` of them.
fn tree(entries: u64, per_leaf: u64) -> u64 {
    let leaves = entries.div_ceil(per_leaf).max(1);
    leaves.saturating_add(inner_nodes(leaves))
}

/// The nodes above `leaves` leaves; each has at least [`MAPPINGS`] below it, but for the root.
fn inner_nodes(leaves: u64) -> u64 {
    let mut level = leaves;
    let mut sum = 0_u64;
    while level > 1 {
        level = level.div_ceil(MAPPINGS);
        sum = sum.saturating_add(level);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB64: BlockSize = BlockSize::DEFAULT;

    /// The estimate of `thin_metadata_size` 0.9: `ceil(blocks / 126) + devices` blocks of 4 KiB.
    fn tool(data: Bytes, block: BlockSize, devices: u64) -> Bytes {
        blocks(block.blocks(data).div_ceil(126) + devices)
    }

    #[test]
    fn block_sizes_are_those_of_the_kernel() {
        for good in [64 << 10, 128 << 10, 192 << 10, 1 << 30] {
            assert_eq!(BlockSize::new(Bytes(good)).map(BlockSize::bytes), Ok(Bytes(good)));
        }
        for bad in [0, 1, 4096, (64 << 10) + 512, (1 << 30) + (64 << 10), u64::MAX] {
            assert!(BlockSize::new(Bytes(bad)).is_err(), "{bad}");
        }
        assert_eq!((KIB64.sectors(), KIB64.blocks(Bytes(1)), KIB64.blocks(Bytes::mib(1))), (128, 1, 16));
    }

    #[test]
    fn never_below_what_the_tool_says_and_not_far_above_it() {
        // What `thin_metadata_size -b64k -s100g -m1000` prints.
        assert_eq!(tool(Bytes::gib(100), KIB64, 1000), Bytes(57_360_384));
        // And `-b64k -s1t -m1`.
        assert_eq!(tool(Bytes::gib(1024), KIB64, 1), Bytes(545_398_784));
        for (data, block) in
            [(Bytes::mib(10), KIB64), (Bytes::gib(1024), KIB64), (Bytes::gib(1 << 14), BlockSize(1 << 20))]
        {
            let (ours, theirs) = (metadata_needed(data, block, 0), tool(data, block, 1));
            assert!(ours >= theirs, "{data}: {ours} < {theirs}");
            assert!(
                ours <= theirs.percent(103).saturating_add(Bytes::mib(2)),
                "{data}: {ours} against {theirs}"
            );
        }
    }

    #[test]
    fn snapshots_and_sizes_only_add() {
        let mut last = Bytes::ZERO;
        for snapshots in [0, 1, 2, 10, 100] {
            let needed = metadata_needed(Bytes::gib(64), KIB64, snapshots);
            assert!(needed > last);
            assert!(needed.0 >= device_metadata(Bytes::gib(64), KIB64).0 * (snapshots + 1));
            last = needed;
        }
        assert!(device_metadata(Bytes(1), KIB64) == Bytes::kib(8), "a root and a leaf");
        assert!(metadata_needed(Bytes(u64::MAX), KIB64, u64::MAX) > MAX_METADATA, "saturates");
    }

    #[test]
    fn devices_are_made_so_that_what_is_needed_may_be_promised() {
        for (data, snapshots) in [(Bytes::mib(1), 0), (Bytes::gib(100), 3), (Bytes::gib(4096), 0)] {
            let size = metadata_device(data, KIB64, snapshots, Bytes::mib(4)).expect("fits");
            assert!(size.0.is_multiple_of(4 << 20) && size >= MIN_METADATA && size <= MAX_METADATA);
            assert!(admissible_metadata(size) >= metadata_needed(data, KIB64, snapshots));
        }
        let error = metadata_device(Bytes::gib(1 << 16), KIB64, 0, Bytes::mib(4)).expect_err("64 TiB");
        assert!(matches!(error, GeometryError::MetadataTooLarge { .. }), "{error}");
        assert_eq!(MAX_METADATA.to_string(), "15.8 GiB");
    }

    #[test]
    fn the_block_size_rises_with_what_is_to_be_mapped() {
        assert_eq!(block_size_for(Bytes::gib(1024), 0), Some(KIB64));
        assert_eq!(block_size_for(Bytes::gib(1 << 16), 0), Some(BlockSize(256 << 10)));
        assert!(block_size_for(Bytes::gib(1024), 100) > Some(KIB64));
        assert_eq!(block_size_for(Bytes(u64::MAX), u64::MAX), None);
    }
}
