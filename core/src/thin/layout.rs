//! What a volume group is divided into, and what may be promised in its two kernel pools.

use super::{
    ADMISSION_PERCENT, BlockSize, GeometryError, MAX_METADATA, METADATA_BLOCK, MIN_METADATA, PoolState,
    admissible_metadata, device_metadata, pool_metadata,
};
use crate::ledger::{Charge, MAX_PROMISES};
use crate::overcommit::Overcommit;
use crate::units::Bytes;
use crate::view::LedgerCapacity;

/// The volume of a pool's record.
pub const RECORD: Bytes = Bytes::mib(64);
/// The least of data that a pool is made with.
const LEAST_DATA: Bytes = Bytes::mib(256);
/// The devices that a kernel pool's metadata is sized for beyond one that has all the data. More of them may be promised
/// where there is metadata for them.
const DEVICES: u64 = 1024;

/// The volumes of a staging pool. The metadata of both kernel pools is made at its full size, because it may never run
/// out; their data begins small and grows, one extent at least each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The pool's record.
    pub record: Bytes,
    /// The metadata of each of the two kernel pools.
    pub metadata: Bytes,
    /// Left free, so that damaged metadata can be repaired into it.
    pub spare: Bytes,
    /// The data of both kernel pools together: what may be promised. Two extents less than what is left, because each
    /// kernel pool has whole ones.
    pub data: Bytes,
}

/// How `space`, which is all that the pool may use of its volume group, is divided.
///
/// # Errors
/// [`GeometryError::MetadataTooLarge`] if the blocks are too small for so much data, [`GeometryError::TooSmall`] if too
/// little data would be left.
pub fn layout(space: Bytes, block: BlockSize, extent: Bytes) -> Result<Layout, GeometryError> {
    let record = RECORD.round_up(extent);
    let metadata = kernel_pool_metadata(space, block, extent)?;
    let kept = [record, metadata, metadata, metadata, extent, extent];
    let left = space.saturating_sub(kept.into_iter().sum());
    let data = Bytes(left.0 - left.0.checked_rem(extent.0).unwrap_or(0));
    if data < LEAST_DATA {
        let least = kept.into_iter().sum::<Bytes>().saturating_add(LEAST_DATA.round_up(extent));
        return Err(GeometryError::TooSmall { space, least });
    }
    Ok(Layout { record, metadata, spare: metadata, data })
}

/// How large the metadata device of a kernel pool is that may come to hold all of `data` in up to a thousand thin devices; a
/// multiple of `extent`.
///
/// # Errors
/// [`GeometryError::MetadataTooLarge`] if no device is large enough.
pub fn kernel_pool_metadata(data: Bytes, block: BlockSize, extent: Bytes) -> Result<Bytes, GeometryError> {
    let roots = Bytes(2 * METADATA_BLOCK.0 * DEVICES);
    let mappings = device_metadata(data, block).saturating_add(roots);
    let needed = overhead(data, block).saturating_add(mappings);
    let most = admissible_metadata(MAX_METADATA);
    if needed > most {
        return Err(GeometryError::MetadataTooLarge { data, block, snapshots: 0, needed, most });
    }
    let size = Bytes((needed.0 * 100).div_ceil(ADMISSION_PERCENT)).max(MIN_METADATA);
    let rounded = size.round_up(extent);
    Ok(if rounded > MAX_METADATA { size.round_up(METADATA_BLOCK) } else { rounded })
}

/// What a kernel pool that may come to have `data` bytes needs for itself, with as many devices as a ledger has promises.
fn overhead(data: Bytes, block: BlockSize) -> Bytes {
    pool_metadata(data, block, MAX_PROMISES as u64, false)
}

/// The state of the two kernel pools of a staging pool on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThinState {
    /// Of staged images and directories.
    pub images: PoolState,
    /// Of volumes.
    pub volumes: PoolState,
}

/// What may be promised where both kernel pools together may have `total` bytes of data: a class can attain the total less
/// what the other class's kernel pool has grown to, because none ever shrinks.
pub fn capacity(total: Bytes, block: BlockSize, state: &ThinState) -> LedgerCapacity {
    let class = |own: &PoolState, other: &PoolState| Charge {
        data: total.saturating_sub(other.data.total),
        metadata: admissible_metadata(own.metadata.total).saturating_sub(overhead(total, block)),
    };
    let images = class(&state.images, &state.volumes);
    let volumes = class(&state.volumes, &state.images);
    let metadata = images.metadata.saturating_add(volumes.metadata);
    LedgerCapacity { images, volumes, total: Charge { data: total, metadata }, overcommit: Overcommit::NONE }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::thin::{PoolMode, Usage, volume_charge};

    const KIB64: BlockSize = BlockSize::DEFAULT;
    const EXTENT: Bytes = Bytes::mib(4);

    fn state(data: Bytes, metadata: Bytes) -> PoolState {
        let usage = |total| Usage { used: Bytes::ZERO, total };
        PoolState {
            mode: PoolMode::ReadWrite,
            needs_check: false,
            data: usage(data),
            metadata: usage(metadata),
        }
    }

    #[test]
    fn everything_in_a_layout_fits_and_all_of_its_data_can_be_promised() {
        for space in [Bytes::gib(1), Bytes::gib(100), Bytes::gib(4096), Bytes(Bytes::gib(7).0 + 12_345)] {
            let layout = layout(space, KIB64, EXTENT).expect("large enough");
            let Layout { record, metadata, spare, data } = layout;
            assert!(record.0 + 2 * metadata.0 + spare.0 + data.0 + 2 * EXTENT.0 <= space.0, "{layout:?}");
            assert!([record, metadata, data].iter().all(|part| part.0.is_multiple_of(EXTENT.0)));
            let thin =
                ThinState { images: state(Bytes::ZERO, metadata), volumes: state(Bytes::ZERO, metadata) };
            let capacity = capacity(data, KIB64, &thin);
            let one = volume_charge(data, KIB64);
            assert_eq!(capacity.volumes.data, data);
            assert!(one.metadata <= capacity.volumes.metadata, "{space}: {one:?} of {capacity:?}");
            let many = volume_charge(Bytes(data.0 / 1000), KIB64);
            assert!(many.metadata.0 * 1000 <= capacity.images.metadata.0, "{space}");
        }
    }

    #[test]
    fn what_is_too_small_or_too_finely_divided_is_refused_with_numbers() {
        let small = layout(Bytes::mib(256), KIB64, EXTENT).expect_err("too small").to_string();
        assert!(small.starts_with("256 MiB are too little for a pool: at least "), "{small}");
        let fine = layout(Bytes::gib(1 << 16), KIB64, EXTENT).expect_err("64 TiB in 64 KiB");
        assert!(matches!(fine, GeometryError::MetadataTooLarge { .. }), "{fine}");
    }

    #[test]
    fn a_class_can_attain_the_total_less_what_the_other_has_grown_to() {
        let (ten, metadata) = (Bytes::gib(10), Bytes::mib(64));
        let thin =
            ThinState { images: state(Bytes::gib(4), metadata), volumes: state(Bytes::gib(1), metadata) };
        let capacity = capacity(ten, KIB64, &thin);
        assert_eq!((capacity.images.data, capacity.volumes.data), (Bytes::gib(9), Bytes::gib(6)));
        assert_eq!(capacity.total.data, ten);
        assert!(capacity.images.metadata < metadata.percent(70));
        assert_eq!(capacity.total.metadata.0, 2 * capacity.images.metadata.0);
    }
}
