//! Dynamic VHD in one pass. Source: "Virtual Hard Disk Image Format Specification", version 1.0, of Microsoft; all fields are
//! big-endian.
//!
//! ```text
//! head   copy of the footer | dynamic disk header | block allocation table | zeros up to the length of the head
//! body   blocks of 2 MiB that are not zeros, each after a bitmap of one sector | footer
//! ```
//!
//! All blocks are of one length, so which of them are there is all that a state has to tell.

use berth_core::units::Bytes;

use super::encode::{EncodedBlock, Piece};
use super::output::{Output, PartPlan, WriteError};
use super::state::{Load, Save};
use super::{BLOCK, length};

const SECTOR: u64 = 512;
/// Where the table begins: after the footer's copy and a header of 1024 bytes.
const TABLE: u64 = 1536;
/// A block with its bitmap.
const STORED: u64 = SECTOR + BLOCK.0;
/// An entry of the table for a block of zeros.
const ABSENT: u32 = u32::MAX;
/// The format's version, 1.0, of both headers.
const VERSION: u32 = 0x0001_0000;

/// The greatest disk that Hyper-V, Azure and QEMU take. Sector numbers of blocks, of 32 bits, have room for it.
pub(super) const LIMIT: Bytes = Bytes::gib(2040);

/// The least length of the head, and the greatest of the body.
pub(super) fn bounds(size: Bytes) -> (Bytes, Bytes) {
    let blocks = size.0.div_ceil(BLOCK.0);
    (Bytes(TABLE + (blocks * 4).next_multiple_of(SECTOR)), Bytes(blocks * STORED + SECTOR))
}

/// Writes a VHD image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct VhdWriter {
    size: Bytes,
    id: [u8; 16],
    head_len: u64,
    /// Which blocks are stored, so far.
    present: Vec<bool>,
    /// Where the next byte goes in the file. A multiple of a sector.
    end: u64,
}

impl VhdWriter {
    pub fn new(output: &Output, plan: &PartPlan) -> Self {
        let head_len = plan.head_len.0;
        Self { size: output.virtual_size, id: output.id, head_len, present: Vec::new(), end: head_len }
    }

    /// The length of the file so far.
    pub fn end(&self) -> u64 {
        self.end
    }

    pub fn append(&mut self, block: &EncodedBlock, out: &mut Vec<u8>) {
        for (piece, bytes) in block.pieces() {
            if piece != Piece::Zero {
                // All sectors of the block are there.
                out.extend([0xFF; 512]);
                out.extend_from_slice(bytes);
            }
            self.push(piece != Piece::Zero);
        }
    }

    /// Leaves out all blocks up to this end.
    pub fn zeros(&mut self, until: Bytes) {
        self.present.resize(length(until.0.div_ceil(BLOCK.0)), false);
    }

    fn push(&mut self, present: bool) {
        self.present.push(present);
        if present {
            self.end += STORED;
        }
    }

    /// The rest of the body; returns the head.
    pub fn finish(self, out: &mut Vec<u8>) -> Vec<u8> {
        let footer = self.footer();
        out.extend_from_slice(&footer);
        let mut head = [footer, self.header()].concat();
        let mut at = self.head_len / SECTOR;
        for present in &self.present {
            // It fits; see LIMIT.
            let entry = if *present { u32::try_from(at).unwrap_or(ABSENT) } else { ABSENT };
            head.extend(entry.to_be_bytes());
            at += if *present { STORED / SECTOR } else { 0 };
        }
        // The table's last sector is filled with entries of absent blocks.
        let (table_end, _) = bounds(self.size);
        head.resize(length(table_end.0), 0xFF);
        head.resize(length(self.head_len), 0);
        head
    }

    fn blocks(&self) -> u32 {
        u32::try_from(self.present.len()).unwrap_or(u32::MAX)
    }

    /// The footer by offset. Its checksum leaves out itself.
    fn footer(&self) -> Vec<u8> {
        let mut footer = vec![0; length(SECTOR)];
        let mut put = |at: usize, bytes: &[u8]| footer[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"conectix");
        // No features but the bit that is always set.
        put(8, &2_u32.to_be_bytes());
        put(12, &VERSION.to_be_bytes());
        // The dynamic disk header follows the copy of the footer.
        put(16, &SECTOR.to_be_bytes());
        // The time at 24 stays zero: the same input gives the same bytes. The creator at 28 decides for some readers what
        // counts: of this one, the size and not the geometry, which is up to a cylinder smaller.
        put(28, b"win \x00\x0A\x00\x00Wi2k");
        put(40, &self.size.0.to_be_bytes());
        put(48, &self.size.0.to_be_bytes());
        put(56, &geometry(self.size));
        // A dynamic disk.
        put(60, &3_u32.to_be_bytes());
        put(68, &self.id);
        seal(&mut footer, 64);
        footer
    }

    /// The dynamic disk header by offset, without a parent.
    fn header(&self) -> Vec<u8> {
        let mut header = vec![0; 1024];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"cxsparse");
        put(8, &u64::MAX.to_be_bytes());
        put(16, &TABLE.to_be_bytes());
        put(24, &VERSION.to_be_bytes());
        put(28, &self.blocks().to_be_bytes());
        put(32, &u32::try_from(BLOCK.0).unwrap_or(u32::MAX).to_be_bytes());
        seal(&mut header, 36);
        header
    }

    /// One bit for each block.
    pub fn save(&self, save: &mut Save) {
        for eight in self.present.chunks(8) {
            let bits = eight.iter().rev().fold(0, |bits, present| bits << 1 | u8::from(*present));
            save.bytes(&[bits]);
        }
    }

    /// What [`save`](Self::save) wrote when the content had come to `position`.
    pub fn load(
        output: &Output,
        plan: &PartPlan,
        position: Bytes,
        load: &mut Load<'_>,
    ) -> Result<Self, WriteError> {
        let mut writer = Self::new(output, plan);
        let blocks = length(position.0.div_ceil(BLOCK.0));
        let bytes = load.bytes(blocks.div_ceil(8) as u64)?;
        for block in 0..blocks {
            writer.push(bytes[block / 8] >> (block % 8) & 1 == 1);
        }
        Ok(writer)
    }
}

/// Cylinders, heads and sectors of a track, as the specification's appendix calculates them.
fn geometry(size: Bytes) -> [u8; 4] {
    let total = (size.0 / SECTOR).min(65535 * 16 * 255);
    let (mut track, mut heads) = (17, (total / 17).div_ceil(1024).max(4));
    if total >= 65535 * 16 * 63 {
        (track, heads) = (255, 16);
    } else {
        if total / 17 >= heads * 1024 || heads > 16 {
            (track, heads) = (31, 16);
        }
        if track == 31 && total / 31 >= heads * 1024 {
            track = 63;
        }
    }
    let [.., high, low] = (total / track / heads).to_be_bytes();
    let [.., heads] = heads.to_be_bytes();
    let [.., track] = track.to_be_bytes();
    [high, low, heads, track]
}

/// Puts the one's complement of the sum of all bytes to this offset, which is zero so far.
fn seal(structure: &mut [u8], at: usize) {
    let sum: u32 = structure.iter().map(|byte| u32::from(*byte)).sum();
    structure[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
}
