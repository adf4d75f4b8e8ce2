//! Partition tables, read in memory-safe code so that the kernel never has to look into an image.
//!
//! Sources: UEFI 2.10 chapter 5 (GPT, protective MBR); the MBR and its chain of extended records as the kernel's
//! `block/partitions/msdos.c` and `sfdisk` read them. Sectors of 512 and (GPT) 4,096 bytes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

pub use berth_core::extents::Extent;
use berth_core::units::Bytes;
use thiserror::Error;

/// GPT entry arrays are 16 KiB in practice; more than this is refused.
const MAX_ENTRY_BYTES: u64 = 1 << 20;
/// Extended records are chained; a longer chain than this is refused, which also ends loops.
const MAX_LOGICAL: u32 = 128;

/// Why there is no such partition.
#[derive(Debug, Error)]
pub enum PartitionError {
    /// The image has no partition table.
    #[error("{path} has no partition table", path = path.display())]
    NoTable {
        /// The image.
        path: PathBuf,
    },
    /// The table does not have this partition.
    #[error("{path} has no partition {number}", path = path.display())]
    Missing {
        /// The image.
        path: PathBuf,
        /// The partition, from 1.
        number: u32,
    },
    /// The table is damaged or lies.
    #[error("partition table of {path} is damaged: {reason}", path = path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The image could not be read.
    #[error("failed to read {path}", path = path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a table of some image is of no use; the path is added outside.
enum Fault {
    NoTable,
    Missing,
    Damaged(&'static str),
    Read(io::Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            Self::Damaged("it points beyond the end of the image")
        } else {
            Self::Read(error)
        }
    }
}

/// Where partition `number` (from 1, as `sfdisk` counts) lies in the raw image or block device `path`.
pub fn partition_of(path: &Path, number: u32) -> Result<Extent, PartitionError> {
    let at = || path.to_owned();
    find(path, number).map_err(|fault| match fault {
        Fault::NoTable => PartitionError::NoTable { path: at() },
        Fault::Missing => PartitionError::Missing { path: at(), number },
        Fault::Damaged(reason) => PartitionError::Damaged { path: at(), reason },
        Fault::Read(source) => PartitionError::Read { path: at(), source },
    })
}

fn find(path: &Path, number: u32) -> Result<Extent, Fault> {
    let file = File::open(path)?;
    let size = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
    let mut mbr = [0; 512];
    if size < 512 {
        return Err(Fault::NoTable);
    }
    file.read_exact_at(&mut mbr, 0)?;
    if mbr[510..] != [0x55, 0xAA] {
        return Err(Fault::NoTable);
    }
    let extent = if (0..4).any(|slot| mbr_entry(&mbr, slot).kind == 0xEE) {
        gpt(&file, number)?
    } else {
        mbr_partition(&file, &mbr, number)?
    };
    let end = extent.offset.checked_add(extent.length).ok_or(Fault::Damaged("a partition has no end"))?;
    if extent.length == Bytes::ZERO || end.0 > size {
        return Err(Fault::Damaged("a partition is empty or ends beyond the image"));
    }
    Ok(extent)
}

struct MbrEntry {
    kind: u8,
    start: u32,
    sectors: u32,
}

impl MbrEntry {
    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0F | 0x85)
    }

    fn extent(&self, base: u64) -> Extent {
        let offset = (base + u64::from(self.start)) * 512;
        Extent { offset: Bytes(offset), length: Bytes(u64::from(self.sectors) * 512) }
    }
}

fn mbr_entry(sector: &[u8; 512], slot: usize) -> MbrEntry {
    let at = 446 + 16 * slot;
    MbrEntry { kind: sector[at + 4], start: le32(sector, at + 8), sectors: le32(sector, at + 12) }
}

fn mbr_partition(file: &File, mbr: &[u8; 512], number: u32) -> Result<Extent, Fault> {
    match number {
        0 => Err(Fault::Missing),
        1..=4 => {
            let entry = mbr_entry(mbr, number as usize - 1);
            if entry.kind == 0 || entry.is_extended() { Err(Fault::Missing) } else { Ok(entry.extent(0)) }
        }
        _ => {
            let extended = (0..4).map(|slot| mbr_entry(mbr, slot)).find(MbrEntry::is_extended);
            logical(file, extended.ok_or(Fault::Missing)?.start, number)
        }
    }
}

/// Logical partitions count from 5. Each extended record holds one, and where the next record lies.
fn logical(file: &File, extended: u32, number: u32) -> Result<Extent, Fault> {
    let base = u64::from(extended);
    let mut record = base;
    let mut current = 5;
    for _ in 0..MAX_LOGICAL {
        let mut sector = [0; 512];
        file.read_exact_at(&mut sector, record * 512)?;
        if sector[510..] != [0x55, 0xAA] {
            return Err(Fault::Damaged("an extended record has no signature"));
        }
        let entry = mbr_entry(&sector, 0);
        if entry.kind != 0 && entry.sectors != 0 {
            if current == number {
                return Ok(entry.extent(record));
            }
            current += 1;
        }
        let next = mbr_entry(&sector, 1);
        if !next.is_extended() || next.start == 0 {
            return Err(Fault::Missing);
        }
        record = base + u64::from(next.start);
    }
    Err(Fault::Damaged("its extended records do not end"))
}

fn gpt(file: &File, number: u32) -> Result<Extent, Fault> {
    for sector in [512_u64, 4096] {
        let mut header = [0; 512];
        if file.read_exact_at(&mut header, sector).is_ok() && &header[..8] == b"EFI PART" {
            return gpt_partition(file, &header, sector, number);
        }
    }
    Err(Fault::Damaged("its protective record has no GPT behind it"))
}

fn gpt_partition(file: &File, header: &[u8; 512], sector: u64, number: u32) -> Result<Extent, Fault> {
    let length = le32(header, 12) as usize;
    if !(92..=512).contains(&length) {
        return Err(Fault::Damaged("its header has an impossible length"));
    }
    let mut summed = *header;
    summed[16..20].fill(0);
    if crc32(&[&summed[..length]]) != le32(header, 16) {
        return Err(Fault::Damaged("the checksum of its header is wrong"));
    }
    let entries = le64(header, 72).checked_mul(sector).ok_or(Fault::Damaged("its entries have no place"))?;
    let (count, size) = (le32(header, 80), le32(header, 84));
    let total = u64::from(count) * u64::from(size);
    if !(128..=4096).contains(&size) || total > MAX_ENTRY_BYTES {
        return Err(Fault::Damaged("its entries have an impossible size"));
    }
    let array_length = usize::try_from(total).map_err(|_| Fault::Damaged("its entries are too many"))?;
    let mut array = vec![0; array_length];
    file.read_exact_at(&mut array, entries)?;
    if crc32(&[&array]) != le32(header, 88) {
        return Err(Fault::Damaged("the checksum of its entries is wrong"));
    }
    let index = number.checked_sub(1).filter(|index| *index < count).ok_or(Fault::Missing)?;
    let entry = &array[index as usize * size as usize..][..size as usize];
    if entry[..16] == [0; 16] {
        return Err(Fault::Missing);
    }
    gpt_extent(le64(entry, 32), le64(entry, 40), sector)
        .ok_or(Fault::Damaged("a partition ends before it starts"))
}

/// The last sector belongs to the partition.
fn gpt_extent(first: u64, last: u64, sector: u64) -> Option<Extent> {
    let sectors = last.checked_sub(first)?.checked_add(1)?;
    let (offset, length) = (first.checked_mul(sector)?, sectors.checked_mul(sector)?);
    Some(Extent { offset: Bytes(offset), length: Bytes(length) })
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |sum, byte| (sum << 8) | u32::from(*byte))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |sum, byte| (sum << 8) | u64::from(*byte))
}

/// The CRC of IEEE 802.3 over all parts in order; tables are a few KiB, so bit by bit is fast enough.
fn crc32(parts: &[&[u8]]) -> u32 {
    let bytes = parts.iter().flat_map(|part| part.iter());
    !bytes.fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_standard_one() {
        assert_eq!(crc32(&[b"1234", b"56789"]), 0xCBF4_3926);
    }

    #[test]
    fn images_without_a_table_have_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blank");
        for size in [0, 100, 1 << 20] {
            std::fs::write(&path, vec![0; size]).unwrap();
            assert!(matches!(partition_of(&path, 1), Err(PartitionError::NoTable { .. })));
        }
    }

    #[test]
    fn a_loop_of_extended_records_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loop");
        let mut image = vec![0; 4096];
        image[450] = 5;
        image[454] = 2; // the extended partition starts at sector 2
        image[510..512].copy_from_slice(&[0x55, 0xAA]);
        image[1024 + 446 + 16 + 4] = 5;
        image[1024 + 446 + 16 + 8] = 1; // record 2 points at record 3, which points at itself
        image[1024 + 510..1024 + 512].copy_from_slice(&[0x55, 0xAA]);
        let (head, tail) = image.split_at_mut(1536);
        tail[..512].copy_from_slice(&head[1024..1536]);
        std::fs::write(&path, &image).unwrap();
        assert!(matches!(partition_of(&path, 5), Err(PartitionError::Damaged { .. })));
        assert!(matches!(partition_of(&path, 1), Err(PartitionError::Missing { .. })));
    }

    #[test]
    fn hostile_extents_do_not_overflow() {
        assert_eq!(gpt_extent(5, 4, 512), None);
        assert_eq!(gpt_extent(0, u64::MAX, 512), None);
        assert_eq!(gpt_extent(1, u64::MAX / 512, 4096), None);
        assert_eq!(gpt_extent(2, 2, 512), Some(Extent { offset: Bytes(1024), length: Bytes(512) }));
    }
}
