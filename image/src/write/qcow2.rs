//! qcow2 in one pass. Source: `docs/interop/qcow2.rst` of QEMU; all fields are big-endian.
//!
//! ```text
//! head   header | refcount table | L1 table | zeros up to the length of the head
//! body   clusters of the first 512 MiB | their L2 table | clusters of the next ones | their L2 table | ...
//!        and a refcount block after the table with which 2 GiB of the file are complete, and at the end
//! ```
//!
//! Compressed clusters lie one after the other, whatever cluster of the file they begin in. Everything else begins at a
//! cluster, and what is left free before it is never used.

use berth_core::units::Bytes;

use super::encode::{EncodedBlock, LONGEST_PACKED, Piece};
use super::output::{Compression, Output, OutputFormat, PartPlan, WriteError};
use super::state::{Load, Save};
use super::{BLOCK, CLUSTER, length, pad_to};

#[cfg(test)]
mod tests;

const CLUSTER_BITS: u32 = CLUSTER.trailing_zeros();
/// Entries of an L2 table, which is as large as a cluster: 512 MiB of the disk.
const ENTRIES: u64 = CLUSTER / 8;
/// Refcounts of 16 bits in a block of them, which is as large as a cluster: 2 GiB of the file.
const COUNTS: u64 = CLUSTER / 2;
/// Bit 63 of an entry: nothing else refers to the cluster.
const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Where the number of further sectors begins in the entry of a compressed cluster.
const SECTORS_SHIFT: u32 = 62 - (CLUSTER_BITS - 8);
/// Bit 3 of the incompatible features: the field for the kind of compression counts.
const COMPRESSION_TYPE: u64 = 1 << 3;
/// The header with that field, which is padded to a multiple of 8.
const HEADER_LENGTH: u32 = 112;
/// The head with its padding is at most this long unless its tables are longer: 5 MiB.
const PADDED_HEAD: u64 = 80;

/// Where the tables of the head are, in clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Geometry {
    /// Of the disk.
    clusters: u64,
    /// L2 tables of the disk, so entries of the L1 table.
    tables: u64,
    refcount_table: u64,
    l1_table: u64,
}

impl Geometry {
    fn new(size: Bytes) -> Self {
        let clusters = size.0.div_ceil(CLUSTER);
        let tables = clusters.div_ceil(ENTRIES);
        let l1_table = (tables * 8).div_ceil(CLUSTER);
        let mut geometry = Self { clusters, tables, refcount_table: 1, l1_table };
        // A longer table may need one more refcount block, so it is tried until it holds them all.
        loop {
            let needed = (geometry.refcount_blocks() * 8).div_ceil(CLUSTER);
            if needed <= geometry.refcount_table {
                return geometry;
            }
            geometry.refcount_table = needed;
        }
    }

    /// Clusters of the head without padding.
    fn head(&self) -> u64 {
        1 + self.refcount_table + self.l1_table
    }

    /// The most refcount blocks that the file can need, which count themselves. One more for what begins at the last.
    fn refcount_blocks(&self) -> u64 {
        let others = self.head().max(PADDED_HEAD) + self.clusters + self.tables;
        others.div_ceil(COUNTS - 1) + 1
    }
}

/// The least length of the head, and the greatest of the body. No cluster of the disk takes more than one of the file: runs
/// of compressed ones begin at a cluster, and each is shorter than one.
pub(super) fn bounds(size: Bytes) -> (Bytes, Bytes) {
    let geometry = Geometry::new(size);
    let body = geometry.clusters + geometry.tables + geometry.refcount_blocks();
    (Bytes(geometry.head() * CLUSTER), Bytes(body * CLUSTER))
}

/// How often each cluster of the file is referred to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Refcounts {
    /// The offset of each refcount block that is in the file.
    blocks: Vec<u64>,
    /// Of the clusters that no such block counts.
    counts: Vec<u16>,
}

impl Refcounts {
    /// The first cluster of the file that is in no block yet.
    fn first(&self) -> u64 {
        self.blocks.len() as u64 * COUNTS
    }

    /// Counts one more reference to the clusters that these bytes are in. A compressed cluster has more than eight bytes, so
    /// sixteen bits suffice.
    fn add(&mut self, at: u64, len: u64) {
        for cluster in at / CLUSTER..(at + len).div_ceil(CLUSTER) {
            let index = length(cluster - self.first());
            if self.counts.len() <= index {
                self.counts.resize(index + 1, 0);
            }
            self.counts[index] = self.counts[index].saturating_add(1);
        }
    }
}

/// Writes a qcow2 image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Qcow2Writer {
    geometry: Geometry,
    zstd: bool,
    size: Bytes,
    head_len: u64,
    /// Where the next byte goes in the file.
    end: u64,
    /// Offsets of the L2 tables that are in the file, zero for those that are not needed.
    l1: Vec<u64>,
    /// The L2 table that is being filled, as far as it is.
    table: Vec<u64>,
    refcounts: Refcounts,
    /// How the table came to be: how the file was when it was empty, and what has been stored of each cluster since.
    began: Began,
    stored: Vec<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Began {
    end: u64,
    refcounts: Refcounts,
}

/// In `stored`: a cluster as it is. Zero is one that is not stored, and all else the length of a compressed one.
const PLAIN: u16 = u16::MAX;
const _: () = assert!(LONGEST_PACKED < PLAIN as usize);

impl Qcow2Writer {
    pub fn new(output: &Output, plan: &PartPlan) -> Self {
        let mut refcounts = Refcounts { blocks: Vec::new(), counts: Vec::new() };
        let geometry = Geometry::new(output.virtual_size);
        refcounts.add(0, geometry.head() * CLUSTER);
        // What pads the head is free.
        refcounts.counts.resize(length(plan.head_len.0 / CLUSTER), 0);
        Self::beginning_at(output, plan, Began { end: plan.head_len.0, refcounts }, Vec::new())
    }

    /// With an empty table.
    fn beginning_at(output: &Output, plan: &PartPlan, began: Began, l1: Vec<u64>) -> Self {
        Self {
            geometry: Geometry::new(output.virtual_size),
            zstd: output.format == OutputFormat::Qcow2 { compression: Compression::Zstd },
            size: output.virtual_size,
            head_len: plan.head_len.0,
            end: began.end,
            l1,
            table: Vec::new(),
            refcounts: began.refcounts.clone(),
            began,
            stored: Vec::new(),
        }
    }

    /// The length of the file so far.
    pub fn end(&self) -> u64 {
        self.end
    }

    pub fn append(&mut self, block: &EncodedBlock, out: &mut Vec<u8>) {
        for (piece, bytes) in block.pieces() {
            let stored = match piece {
                Piece::Zero => 0,
                Piece::Plain(_) => PLAIN,
                // No longer than LONGEST_PACKED, which fits.
                Piece::Packed(len) => u16::try_from(len).unwrap_or(PLAIN),
            };
            self.push(stored, bytes, out);
        }
    }

    /// Leaves out all clusters up to this end.
    pub fn zeros(&mut self, until: Bytes, out: &mut Vec<u8>) {
        let until = until.0.div_ceil(CLUSTER);
        loop {
            let next = self.l1.len() as u64 * ENTRIES + self.table.len() as u64;
            match until.saturating_sub(next) {
                0 => break,
                ENTRIES.. if self.table.is_empty() => self.l1.push(0),
                _ => self.push(0, &[], out),
            }
        }
    }

    /// The next cluster of the disk. `bytes` is what is stored of it; while a state is read there are none.
    fn push(&mut self, stored: u16, bytes: &[u8], out: &mut Vec<u8>) {
        let entry = match stored {
            0 => 0,
            PLAIN => self.put_cluster(bytes, out) | COPIED,
            len => {
                let (at, len) = (self.end, u64::from(len));
                self.refcounts.add(at, len);
                out.extend_from_slice(bytes);
                self.end += len;
                let further = (at + len - 1) / 512 - at / 512;
                at | further << SECTORS_SHIFT | COMPRESSED
            }
        };
        self.table.push(entry);
        self.stored.push(stored);
        if self.table.len() as u64 == ENTRIES {
            self.put_table(out);
        }
    }

    /// Something that takes a cluster for itself. Returns its offset.
    fn put_cluster(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> u64 {
        let at = pad_to(self.end, CLUSTER, out);
        out.extend_from_slice(bytes);
        self.refcounts.add(at, CLUSTER);
        self.end = at + CLUSTER;
        at
    }

    /// The L2 table, if it refers to anything. The next one begins.
    fn put_table(&mut self, out: &mut Vec<u8>) {
        let mut table = std::mem::take(&mut self.table);
        self.stored.clear();
        if table.iter().all(|entry| *entry == 0) {
            self.l1.push(0);
            return;
        }
        table.resize(length(ENTRIES), 0);
        let at = self.put_cluster(&big_endian(&table), out);
        self.l1.push(at);
        self.put_refcounts(out);
        self.began = Began { end: self.end, refcounts: self.refcounts.clone() };
    }

    /// The refcount blocks of those parts of the file that are complete.
    fn put_refcounts(&mut self, out: &mut Vec<u8>) {
        while self.end / CLUSTER >= self.refcounts.first() + COUNTS {
            let rest = self.refcounts.counts.split_off(length(COUNTS));
            let complete = std::mem::replace(&mut self.refcounts.counts, rest);
            self.refcounts.blocks.push(self.end.next_multiple_of(CLUSTER));
            self.put_cluster(&refcount_block(&complete), out);
        }
    }

    /// The rest of the body; returns the head.
    pub fn finish(mut self, out: &mut Vec<u8>) -> Vec<u8> {
        if !self.table.is_empty() {
            self.put_table(out);
        }
        self.end = pad_to(self.end, CLUSTER, out);
        self.put_refcounts(out);
        // The last block counts itself.
        self.refcounts.add(self.end, CLUSTER);
        out.extend(refcount_block(&self.refcounts.counts));
        self.refcounts.blocks.push(self.end);
        self.head()
    }

    fn head(&self) -> Vec<u8> {
        let mut head = self.header();
        head.resize(length(CLUSTER), 0);
        head.extend(big_endian(&self.refcounts.blocks));
        head.resize(length((1 + self.geometry.refcount_table) * CLUSTER), 0);
        let entry = |table: &u64| if *table == 0 { 0 } else { table | COPIED };
        head.extend(big_endian(&self.l1.iter().map(entry).collect::<Vec<_>>()));
        head.resize(length(self.head_len), 0);
        head
    }

    /// The header, by offset: no backing file, no encryption, no snapshots, no extensions.
    fn header(&self) -> Vec<u8> {
        let mut header = vec![0; HEADER_LENGTH as usize];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        // At most 100,000 tables and 2 clusters of refcounts; see `STORE_LIMIT`.
        let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes();
        put(0, b"QFI\xfb");
        put(4, &3_u32.to_be_bytes());
        put(20, &CLUSTER_BITS.to_be_bytes());
        put(24, &self.size.0.to_be_bytes());
        put(36, &small(self.geometry.tables));
        put(40, &((1 + self.geometry.refcount_table) * CLUSTER).to_be_bytes());
        put(48, &CLUSTER.to_be_bytes());
        put(56, &small(self.geometry.refcount_table));
        put(72, &if self.zstd { COMPRESSION_TYPE } else { 0 }.to_be_bytes());
        // Refcounts of 2^4 bits.
        put(96, &4_u32.to_be_bytes());
        put(100, &HEADER_LENGTH.to_be_bytes());
        put(104, &[u8::from(self.zstd)]);
        header
    }

    /// The state as of when the table was empty, and what is needed to fill it again: its entries, and whatever was counted
    /// meanwhile, follow from that.
    pub fn save(&self, save: &mut Save) {
        save.number(self.began.end / CLUSTER);
        save.offsets(&self.l1, CLUSTER);
        save.offsets(&self.began.refcounts.blocks, CLUSTER);
        self.began.refcounts.counts.iter().for_each(|count| save.number(u64::from(*count)));
        self.stored.iter().for_each(|stored| save.bytes(&stored.to_le_bytes()));
    }

    /// What [`save`](Self::save) wrote when the content had come to `position`. Whatever the numbers are, the file does not
    /// become longer than it can be, and that is what every length in memory follows from.
    pub fn load(
        output: &Output,
        plan: &PartPlan,
        position: Bytes,
        load: &mut Load<'_>,
    ) -> Result<Self, WriteError> {
        let done = position.0.div_ceil(CLUSTER);
        let (tables, filled) = (done / ENTRIES, done % ENTRIES);
        let end = load.number(plan.worst_case.0 / CLUSTER)?;
        let l1 = load.offsets(tables, plan.head_len.0, end * CLUSTER, CLUSTER)?;
        let blocks = load.offsets(end / COUNTS, plan.head_len.0, end * CLUSTER, CLUSTER)?;
        let written = l1.iter().filter(|table| **table != 0).count() + blocks.len();
        let most = plan.head_len.0 / CLUSTER + tables * ENTRIES + written as u64;
        if !(plan.head_len.0 / CLUSTER..=most).contains(&end) || blocks.contains(&0) {
            return Err(WriteError::State { what: "length of the file" });
        }
        let mut counts = Vec::new();
        for _ in 0..end % COUNTS {
            counts.push(u16::try_from(load.number(u64::from(u16::MAX))?).unwrap_or(u16::MAX));
        }
        let began = Began { end: end * CLUSTER, refcounts: Refcounts { blocks, counts } };
        let mut writer = Self::beginning_at(output, plan, began, l1);
        let (stored, _) = load.bytes(filled * 2)?.as_chunks::<2>();
        let mut discarded = Vec::new();
        for stored in stored {
            writer.push(u16::from_le_bytes(*stored), &[], &mut discarded);
            discarded.clear();
        }
        Ok(writer)
    }
}

fn big_endian(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
}

fn refcount_block(counts: &[u16]) -> Vec<u8> {
    let mut block: Vec<u8> = counts.iter().flat_map(|count| count.to_be_bytes()).collect();
    block.resize(length(CLUSTER), 0);
    block
}

const _: () = assert!(BLOCK.0.is_multiple_of(CLUSTER) && (ENTRIES * CLUSTER).is_multiple_of(BLOCK.0));
