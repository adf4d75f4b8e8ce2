//! What promises cost in a pool of thin devices: the blocks that they may come to occupy, and what maps these.

use super::{BlockSize, COUNTS, blocks, device_metadata, tree};
use crate::hydration::{Geometry, RegionSize};
use crate::ledger::Charge;
use crate::units::Bytes;

/// The least by which images are filled, and where each part begins: the smallest chunk of an image store.
const FILL: Bytes = Bytes::kib(64);
/// What the file system of a directory keeps for itself besides [`DIRECTORY_PERCENT`]: its journal of 16 MiB, and as much
/// again.
const DIRECTORY_FIXED: Bytes = Bytes::mib(32);
/// Percent of a directory's bytes that its file system needs for bitmaps, inodes and extents. Inodes take 0.4 %, and an
/// extent of 12 bytes for each block of 4 KiB, which is the worst case, 0.3 %.
const DIRECTORY_PERCENT: u64 = 1;

/// A volume of `size`.
pub fn volume_charge(size: Bytes, block: BlockSize) -> Charge {
    device(size, block)
}

/// The metadata that a copy of a volume of `size` may need beside [`volume_charge`]: the kernel keeps reference counts of
/// blocks that more than two devices share, and two of these are copies.
pub fn copy_metadata(size: Bytes, block: BlockSize) -> Bytes {
    blocks(tree(block.blocks(size), COUNTS))
}

/// The device that a directory for `size` bytes of files lies on: ext4 with blocks of 4 KiB, a journal of at most 16 MiB,
/// an inode for each 64 KiB, no reserved share and no room to be resized (`-b 4096 -J size=16 -i 65536 -m 0 -O ^resize_inode`).
pub fn directory_device(size: Bytes) -> Bytes {
    let share = Bytes((size.0 / 100).saturating_add(1).saturating_mul(DIRECTORY_PERCENT));
    size.saturating_add(share).saturating_add(DIRECTORY_FIXED)
}

/// A directory for `size` bytes of files.
pub fn directory_charge(size: Bytes, block: BlockSize) -> Charge {
    device(directory_device(size), block)
}

/// A staged image with `real` bytes that are not holes, and what it takes to show it before they are all there. With blocks of
/// more than 64 KiB each 64 KiB of it may lie in a block of their own, up to all of the disk. Where the disk does not end with
/// a region, zeros may be written at its end.
pub fn image_charge(real: Bytes, virtual_size: Bytes, block: BlockSize) -> Charge {
    let parts = real.0.div_ceil(FILL.0);
    let end = if virtual_size.0.is_multiple_of(FILL.0) { Bytes::ZERO } else { block.bytes() };
    let scattered = Bytes(parts.saturating_mul(block.bytes().0)).saturating_add(end);
    let content = device(scattered.min(whole(virtual_size, block)), block);
    let regions = device(regions_device(virtual_size), block);
    Charge {
        data: content.data.saturating_add(regions.data),
        metadata: content.metadata.saturating_add(regions.metadata),
    }
}

/// The device that says of each region of an image of this size whether it is local, where regions are as small as they may
/// be ([`RegionSize::SMALLEST_SHOWN`]). Nothing for a size that is never shown so: such an image is filled before it is used.
pub fn regions_device(virtual_size: Bytes) -> Bytes {
    let rounded = virtual_size.round_up(Bytes(512));
    Geometry::new(rounded, RegionSize::SMALLEST_SHOWN).map_or(Bytes::ZERO, |geometry| geometry.metadata())
}

fn device(size: Bytes, block: BlockSize) -> Charge {
    Charge { data: whole(size, block), metadata: device_metadata(size, block) }
}

fn whole(size: Bytes, block: BlockSize) -> Bytes {
    Bytes(block.blocks(size).saturating_mul(block.bytes().0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB64: BlockSize = BlockSize::DEFAULT;
    const MIB1: BlockSize = BlockSize(1 << 20);

    #[test]
    fn whole_blocks_and_what_maps_them_are_charged() {
        let odd = volume_charge(Bytes(1), KIB64);
        assert_eq!((odd.data, odd.metadata), (Bytes::kib(64), Bytes::kib(8)));
        let large = volume_charge(Bytes::gib(10), KIB64);
        assert_eq!((large.data, large.metadata), (Bytes::gib(10), device_metadata(Bytes::gib(10), KIB64)));
        assert!(volume_charge(Bytes::gib(10), MIB1).metadata < large.metadata);
        assert_eq!(volume_charge(Bytes(u64::MAX), MIB1).data, Bytes(u64::MAX), "saturates");
    }

    #[test]
    fn copies_pay_for_what_the_kernel_counts_of_shared_blocks() {
        let (size, block) = (Bytes::gib(64), KIB64);
        for copies in [2, 3, 10] {
            let mappings = volume_charge(size, block).metadata.0 * (copies + 1);
            let paid = Bytes(mappings + copies * copy_metadata(size, block).0);
            let needed = super::super::metadata_needed(size, block, copies);
            let pool = super::super::pool_metadata(size, block, copies + 1, false);
            assert!(paid.saturating_add(pool) >= needed, "{copies}: {paid} and {pool} for {needed}");
        }
        assert!(copy_metadata(size, block) < volume_charge(size, block).metadata);
    }

    #[test]
    fn an_image_costs_its_bytes_where_blocks_are_no_larger_than_its_parts() {
        let regions = regions_device(Bytes::gib(4));
        assert_eq!(
            regions,
            Bytes::mib(1),
            "65,536 bits take two blocks, and all the rest is room for a commit"
        );
        let charge = |real, block| image_charge(real, Bytes::gib(4), block).data.saturating_sub(regions);
        assert_eq!(charge(Bytes::gib(1), KIB64), Bytes::gib(1));
        assert_eq!(charge(Bytes(Bytes::gib(1).0 + 1), KIB64), Bytes(Bytes::gib(1).0 + KIB64.bytes().0));
        assert_eq!(charge(Bytes::mib(64), MIB1), Bytes::gib(1), "each 64 KiB in a block of their own");
        assert_eq!(charge(Bytes::gib(1), MIB1), Bytes::gib(4), "but never more than the disk has");
        assert_eq!(charge(Bytes::ZERO, KIB64), Bytes::ZERO);
    }

    #[test]
    fn an_image_also_costs_what_it_takes_to_show_it_early() {
        let size = Bytes(Bytes::gib(1).0 + 512);
        let regions = regions_device(size);
        let charge = image_charge(Bytes::mib(1), size, KIB64);
        assert_eq!(charge.data, Bytes(Bytes::mib(1).0 + KIB64.bytes().0 + regions.0), "zeros at the end");
        let content = device_metadata(Bytes(Bytes::mib(1).0 + KIB64.bytes().0), KIB64);
        assert_eq!(charge.metadata, Bytes(content.0 + device_metadata(regions, KIB64).0));
        assert_eq!(regions_device(Bytes::ZERO), Bytes::ZERO);
        assert!(regions_device(Bytes::gib(1024)) < Bytes::mib(8), "little, whatever the size");
    }

    #[test]
    fn a_directory_has_room_for_its_file_system_too() {
        assert_eq!(
            directory_device(Bytes::gib(1)),
            Bytes(Bytes::gib(1).0 + (1 << 30) / 100 + 1 + (32 << 20))
        );
        assert!(directory_charge(Bytes::ZERO, KIB64).data >= Bytes::mib(32));
        assert_eq!(directory_device(Bytes(u64::MAX)), Bytes(u64::MAX));
    }
}
