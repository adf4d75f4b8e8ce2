//! What the decoder does not check: that what the tables refer to lies inside of the file. It reads zeros there, and
//! compressed data that go on with zeros may even decode to something.
//!
//! Table entries as in `docs/interop/qcow2.rst` of QEMU, big-endian.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use berth_core::units::Bytes;

use crate::extents::ReadError;
use crate::probe::Qcow2Header;

/// Bits 9 to 55 of an L1 or L2 entry: the offset of a table or cluster.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 62 of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Entries read at a time.
const BATCH: u64 = 8192;

pub(super) struct Bounds {
    pub path: PathBuf,
    pub header: Qcow2Header,
    /// Of the file.
    pub length: Bytes,
}

impl Bounds {
    /// Checks that every L2 table lies inside of the file.
    pub fn check_l1(&self, file: &File) -> Result<(), ReadError> {
        let cluster = self.header.cluster_size();
        let mut first = 0;
        while first < self.header.l1_entries {
            let count = BATCH.min(self.header.l1_entries - first);
            for entry in self.entries(file, self.header.l1_offset.0 + first * 8, count)? {
                let table = entry & OFFSET;
                if table != 0 {
                    if !table.is_multiple_of(cluster) {
                        return Err(self.corrupt("unaligned L2 table"));
                    }
                    self.check_inside(table, cluster)?;
                }
            }
            first += count;
        }
        Ok(())
    }

    /// Checks that the compressed clusters that make up this range of the disk lie inside of the file. The range lies
    /// within the reach of one L2 table.
    pub fn check_compressed(&self, file: &File, at: u64, len: u64) -> Result<(), ReadError> {
        let (bits, reach) = (self.header.cluster_bits, self.header.table_reach());
        let l1 = self.entries(file, self.header.l1_offset.0 + at / reach * 8, 1)?;
        let table = l1.first().map_or(0, |entry| entry & OFFSET);
        let (mut first, last) = ((at % reach) >> bits, (at % reach + len - 1) >> bits);
        // The offset takes the lower bits, the number of further sectors the ones up to bit 61.
        let offset_bits = 62 - (bits - 8);
        while first <= last {
            let count = BATCH.min(last - first + 1);
            for entry in self.entries(file, table + first * 8, count)? {
                if entry & COMPRESSED == 0 {
                    return Err(self.corrupt("L2 table changed while it was read"));
                }
                let offset = entry & ((1 << offset_bits) - 1);
                let sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
                self.check_inside(offset, (sectors + 1) * 512 - offset % 512)?;
            }
            first += count;
        }
        Ok(())
    }

    /// Checks that this range lies inside of the file.
    pub fn check_inside(&self, offset: u64, len: u64) -> Result<(), ReadError> {
        match Bytes(offset).checked_add(Bytes(len)) {
            Some(end) if end <= self.length => Ok(()),
            Some(expected) => {
                Err(ReadError::Truncated { path: self.path.clone(), expected, found: self.length })
            }
            None => Err(self.corrupt("an offset beyond any file")),
        }
    }

    fn entries(&self, file: &File, at: u64, count: u64) -> Result<Vec<u64>, ReadError> {
        self.check_inside(at, count * 8)?;
        let mut bytes = vec![0; usize::try_from(count * 8).unwrap_or(usize::MAX)];
        let io = |source| ReadError::Io { path: self.path.clone(), source };
        file.read_exact_at(&mut bytes, at).map_err(io)?;
        let (entries, _) = bytes.as_chunks::<8>();
        Ok(entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
    }

    fn corrupt(&self, what: &str) -> ReadError {
        ReadError::Corrupt { path: self.path.clone(), what: what.to_owned() }
    }
}
