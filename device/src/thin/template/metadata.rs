//! What lies on the device with a clone's metadata.
//!
//! Source: `struct superblock_disk` in `drivers/md/dm-clone-metadata.c` of the kernel:
//!
//! | byte | what |
//! |---|---|
//! | 32 | magic number, 8 bytes |
//! | 172 | size of a region in sectors, 8 bytes |
//! | 180 | size of the clone in sectors, 8 bytes |
//!
//! Numbers are little-endian. A superblock of zeros is formatted by the kernel. Anything else it checks, also by a checksum.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use berth_core::hydration::{Geometry, Metadata, RegionSize};
use berth_core::units::Bytes;

use super::error::TemplateError;
use crate::sys;
use crate::thin::table::DeviceNumber;
use crate::thin::users::users;

/// `SUPERBLOCK_MAGIC`.
const MAGIC: u64 = 0x8af2_7f64;
const MAGIC_AT: usize = 32;
const REGION_AT: usize = 172;
const SIZE_AT: usize = 180;
const SUPERBLOCK: usize = 4096;

/// What lies on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundMetadata {
    /// Nothing.
    Blank,
    /// The metadata of a clone of this size in regions of this size.
    Clone(Geometry),
    /// Something else.
    Other,
}

impl FoundMetadata {
    /// As decisions see it, for the template with these regions.
    pub fn of(self, geometry: &Geometry) -> Metadata {
        match self {
            Self::Blank => Metadata::Blank,
            Self::Clone(found) if found == *geometry => Metadata::OfThis,
            Self::Clone(_) | Self::Other => Metadata::OfOther,
        }
    }
}

/// Reads what lies on a device that no clone uses at this moment, or that was flushed; `None` if there is no such device.
pub fn find_metadata(device: &Path) -> Result<Option<FoundMetadata>, TemplateError> {
    let read = || -> io::Result<FoundMetadata> {
        let file = File::open(device)?;
        sys::flush_buffers(&file)?; // the kernel wrote past what is held in memory of the device
        let mut block = [0; SUPERBLOCK];
        file.read_exact_at(&mut block, 0)?;
        Ok(parse(&block))
    };
    match read() {
        Ok(found) => Ok(Some(found)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TemplateError::Device { action: "read", device: device.to_owned(), source }),
    }
}

/// Makes the metadata blank, so that nothing counts as local. Only for metadata that was never used.
///
/// # Errors
/// [`TemplateError::MetadataInUse`] while something is made of the device.
pub fn clear_metadata(device: &Path) -> Result<(), TemplateError> {
    let failed = |source| TemplateError::Device { action: "clear", device: device.to_owned(), source };
    let number = DeviceNumber::of(device).map_err(failed)?;
    let holders = fs::read_dir(format!("/sys/dev/block/{number}/holders")).map_err(failed)?;
    if holders.count() > 0 {
        let by = users(device).join(", ");
        return Err(TemplateError::MetadataInUse { device: device.to_owned(), by });
    }
    let clear = || {
        let file = OpenOptions::new().write(true).open(device)?;
        file.write_all_at(&[0; SUPERBLOCK], 0)?;
        file.sync_all()?;
        Ok(sys::flush_buffers(&file)?)
    };
    clear().map_err(failed)
}

fn parse(block: &[u8; SUPERBLOCK]) -> FoundMetadata {
    if block.iter().all(|byte| *byte == 0) {
        return FoundMetadata::Blank;
    }
    let sectors = |at| number(block, at).checked_mul(512).map(Bytes);
    let geometry = || {
        let region = RegionSize::new(sectors(REGION_AT)?).ok()?;
        Geometry::new(sectors(SIZE_AT)?, region).ok()
    };
    match geometry() {
        Some(geometry) if number(block, MAGIC_AT) == MAGIC => FoundMetadata::Clone(geometry),
        _ => FoundMetadata::Other,
    }
}

fn number(block: &[u8; SUPERBLOCK], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[at..at + 8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux 6.1 wrote it for a clone of 32,808 sectors in regions of 128.
    fn superblock() -> [u8; SUPERBLOCK] {
        let mut block = [0; SUPERBLOCK];
        block[..4].copy_from_slice(&[0x61, 0x38, 0xaf, 0x6d]);
        block[32..36].copy_from_slice(&[0x64, 0x7f, 0xf2, 0x8a]);
        (block[40], block[45], block[52], block[60], block[68]) = (1, 4, 6, 0x11, 2);
        (block[172], block[188]) = (0x80, 0x10);
        block[180..182].copy_from_slice(&[0x28, 0x80]);
        block
    }

    fn geometry(sectors: u64) -> Geometry {
        Geometry::new(Bytes(sectors * 512), RegionSize::new(Bytes::kib(64)).unwrap()).unwrap()
    }

    #[test]
    fn a_superblock_is_understood() {
        assert_eq!(parse(&superblock()), FoundMetadata::Clone(geometry(32_808)));
        assert_eq!(parse(&[0; SUPERBLOCK]), FoundMetadata::Blank);
        let found = parse(&superblock());
        assert_eq!(found.of(&geometry(32_808)), Metadata::OfThis);
        assert_eq!(found.of(&geometry(32_800)), Metadata::OfOther);
    }

    #[test]
    fn what_is_no_superblock_of_a_clone_is_something_else() {
        for (at, byte) in [(32, 0), (39, 1), (172, 0x81), (172, 0), (179, 0xff), (187, 0xff)] {
            let mut block = superblock();
            block[at] = byte;
            assert_eq!(parse(&block), FoundMetadata::Other, "byte {at}");
        }
        let mut last = [0; SUPERBLOCK];
        last[SUPERBLOCK - 1] = 1;
        assert_eq!(parse(&last), FoundMetadata::Other, "not blank to its end");
    }
}
