//! Stream-optimised vmdk in one pass. Source: "Virtual Disk Format 5.0" of `VMware`; all fields are little-endian, offsets
//! and sizes in sectors of 512 bytes, and everything begins at one.
//!
//! ```text
//! header | descriptor | filling up to 64 KiB
//! grains of the first 32 MiB, each: marker, zlib stream | marker, their grain table | grains of the next ones | ...
//! marker, grain directory | marker, header once more, with the directory's place | end-of-stream marker
//! ```
//!
//! The format is made for this: nothing at the front depends on what follows, so there is no head.

use std::fmt::Write as _;

use berth_core::units::Bytes;

use super::encode::{EncodedBlock, LONGEST_GRAIN};
use super::output::{Output, WriteError};
use super::state::{Load, Save};
use super::{CLUSTER, length, pad_to};

const SECTOR: u64 = 512;
/// A grain of 64 KiB.
const GRAIN_SECTORS: u64 = CLUSTER / SECTOR;
/// Entries of a grain table: 32 MiB of the disk. Four bytes each, so 4 sectors.
const ENTRIES: u64 = 512;
const TABLE_SECTORS: u64 = ENTRIES * 4 / SECTOR;
/// Header, descriptor and filling before the first grain, in sectors.
const OVERHEAD: u64 = 128;
/// Sectors of the descriptor, which follows the header.
const DESCRIPTOR: u64 = 20;
/// Flags: line ends can be checked, grains are compressed, markers are there.
const FLAGS: u32 = 1 | 1 << 16 | 1 << 17;
/// The directory's place in the first header: the footer tells it.
const AT_END: u64 = u64::MAX;
/// A marker before a compressed grain: its first sector on the disk, 8 bytes, and the length of the stream, 4 bytes.
const GRAIN_MARKER: u64 = 12;
/// The most sectors that a grain takes with its marker.
const LONGEST_SECTORS: u64 = (GRAIN_MARKER + LONGEST_GRAIN as u64).div_ceil(SECTOR);

/// Kinds of markers, which take a sector.
const TABLE_MARKER: u32 = 1;
const DIRECTORY_MARKER: u32 = 2;
const FOOTER_MARKER: u32 = 3;

/// The greatest disk. Sector numbers of grains have 32 bits, so a file ends at 2 TiB; each grain takes up to 129 sectors.
pub(super) const LIMIT: Bytes = Bytes::gib(2000);
const _: () = assert!(most_sectors(LIMIT.0) < 1 << 32);

/// The most sectors of a file for a disk of this size.
const fn most_sectors(size: u64) -> u64 {
    let grains = size.div_ceil(CLUSTER);
    let tables = grains.div_ceil(ENTRIES);
    // Markers of directory, footer and end, and the footer.
    OVERHEAD + grains * LONGEST_SECTORS + tables * (1 + TABLE_SECTORS) + (tables * 4).div_ceil(SECTOR) + 4
}

/// The greatest length of the file.
pub(super) fn bound(size: Bytes) -> Bytes {
    Bytes(most_sectors(size.0) * SECTOR)
}

/// Writes a vmdk image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct VmdkWriter {
    /// Of the disk, in sectors.
    capacity: u64,
    id: [u8; 16],
    /// Where the next byte goes in the file. A multiple of a sector.
    end: u64,
    /// Offsets of the grain tables that are in the file, in bytes; zero for those that are not needed.
    directory: Vec<u64>,
    /// The grain table that is being filled, as far as it is: offsets in bytes, zero for what is not stored.
    table: Vec<u64>,
    /// Where the file ended when the table was empty, and the lengths of the streams since; zero for what is not stored.
    began: u64,
    stored: Vec<u64>,
}

impl VmdkWriter {
    pub fn new(output: &Output) -> Self {
        Self {
            capacity: output.virtual_size.0 / SECTOR,
            id: output.id,
            end: 0,
            directory: Vec::new(),
            table: Vec::new(),
            began: 0,
            stored: Vec::new(),
        }
    }

    /// The length of the file so far.
    pub fn end(&self) -> u64 {
        self.end
    }

    pub fn append(&mut self, block: &EncodedBlock, out: &mut Vec<u8>) {
        self.begin(out);
        for (_, bytes) in block.pieces() {
            self.push(bytes.len() as u64, bytes, out);
        }
    }

    /// Leaves out all grains up to this end.
    pub fn zeros(&mut self, until: Bytes, out: &mut Vec<u8>) {
        self.begin(out);
        let until = until.0.div_ceil(CLUSTER);
        loop {
            match until.saturating_sub(self.next()) {
                0 => break,
                ENTRIES.. if self.table.is_empty() => self.directory.push(0),
                _ => self.push(0, &[], out),
            }
        }
    }

    /// The number of the next grain.
    fn next(&self) -> u64 {
        self.directory.len() as u64 * ENTRIES + self.table.len() as u64
    }

    /// What comes before the first grain.
    fn begin(&mut self, out: &mut Vec<u8>) {
        if self.end == 0 {
            let start = out.len();
            out.extend(self.header(AT_END));
            out.extend(self.descriptor().as_bytes());
            self.end = OVERHEAD * SECTOR;
            out.resize(start + length(self.end), 0);
            self.began = self.end;
        }
    }

    /// The next grain, as a stream of this length. While a state is read there are no bytes.
    fn push(&mut self, len: u64, bytes: &[u8], out: &mut Vec<u8>) {
        let at = self.end;
        if len > 0 {
            out.extend((self.next() * GRAIN_SECTORS).to_le_bytes());
            out.extend(low(len).to_le_bytes());
            out.extend_from_slice(bytes);
            self.end = pad_to(at + GRAIN_MARKER + len, SECTOR, out);
        }
        self.table.push(if len > 0 { at } else { 0 });
        self.stored.push(len);
        if self.table.len() as u64 == ENTRIES {
            self.put_table(out);
        }
    }

    /// The grain table, if it refers to anything. The next one begins.
    fn put_table(&mut self, out: &mut Vec<u8>) {
        let mut table = std::mem::take(&mut self.table);
        self.stored.clear();
        if table.iter().all(|entry| *entry == 0) {
            self.directory.push(0);
            return;
        }
        table.resize(length(ENTRIES), 0);
        let at = self.put_metadata(TABLE_MARKER, &sectors(&table), out);
        self.directory.push(at);
        self.began = self.end;
    }

    /// A marker, and what it announces, of which the offset is returned.
    fn put_metadata(&mut self, kind: u32, bytes: &[u8], out: &mut Vec<u8>) -> u64 {
        let len = bytes.len() as u64;
        out.extend(len.div_ceil(SECTOR).to_le_bytes());
        // No stream follows.
        out.extend(0_u32.to_le_bytes());
        out.extend(kind.to_le_bytes());
        let at = pad_to(self.end + 16, SECTOR, out);
        out.extend_from_slice(bytes);
        self.end = pad_to(at + len, SECTOR, out);
        at
    }

    /// The rest of the file.
    pub fn finish(mut self, out: &mut Vec<u8>) {
        if !self.table.is_empty() {
            self.put_table(out);
        }
        let directory = self.put_metadata(DIRECTORY_MARKER, &sectors(&self.directory), out);
        self.put_metadata(FOOTER_MARKER, &self.header(directory / SECTOR), out);
        // A marker of zeros ends the stream.
        out.extend([0; 512]);
    }

    /// The header by offset, with the directory's place.
    fn header(&self, directory: u64) -> Vec<u8> {
        let mut header = vec![0; length(SECTOR)];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"KDMV");
        // Version 3 is that of stream-optimised disks.
        put(4, &3_u32.to_le_bytes());
        put(8, &FLAGS.to_le_bytes());
        put(12, &self.capacity.to_le_bytes());
        put(20, &GRAIN_SECTORS.to_le_bytes());
        put(28, &1_u64.to_le_bytes());
        put(36, &DESCRIPTOR.to_le_bytes());
        put(44, &low(ENTRIES).to_le_bytes());
        put(56, &directory.to_le_bytes());
        put(64, &OVERHEAD.to_le_bytes());
        // Bytes that a transfer as text would change.
        put(73, b"\n \r\n");
        // Compressed by deflate.
        put(77, &1_u16.to_le_bytes());
        header
    }

    fn descriptor(&self) -> String {
        let id = self.id;
        // The largest number stands for no parent.
        let content = u32::from_be_bytes([id[0], id[1], id[2], id[3]]).min(u32::MAX - 1);
        // The geometry of large disks of this adapter, whose number of cylinders has 16 bits.
        let cylinders = (self.capacity / (255 * 63)).min(65535);
        let mut text = String::from("# Disk DescriptorFile\nversion=1\n");
        // Writing to a String does not fail.
        let _ = write!(text, "CID={content:08x}\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\n\n");
        let _ = write!(text, "# Extent description\nRW {} SPARSE \"disk.vmdk\"\n\n", self.capacity);
        text.push_str(
            "# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\nddb.adapterType = \"lsilogic\"\n",
        );
        let _ = writeln!(text, "ddb.geometry.cylinders = \"{cylinders}\"");
        text.push_str("ddb.geometry.heads = \"255\"\nddb.geometry.sectors = \"63\"\n");
        text
    }

    /// The state as of when the table was empty, and what is needed to fill it again.
    pub fn save(&self, save: &mut Save) {
        save.number(self.began / SECTOR);
        save.offsets(&self.directory, SECTOR);
        self.stored.iter().for_each(|len| save.number(*len));
    }

    /// What [`save`](Self::save) wrote when the content had come to `position`. The file does not become longer than it can
    /// be, whatever the numbers are.
    pub fn load(output: &Output, position: Bytes, load: &mut Load<'_>) -> Result<Self, WriteError> {
        let done = position.0.div_ceil(CLUSTER);
        let (tables, filled) = (done / ENTRIES, done % ENTRIES);
        let mut writer = Self::new(output);
        let most = OVERHEAD + tables * (ENTRIES * LONGEST_SECTORS + 1 + TABLE_SECTORS);
        let began = load.number(most)?;
        if began < if done == 0 { 0 } else { OVERHEAD } || (done == 0 && began > 0) {
            return Err(WriteError::State { what: "length of the file" });
        }
        writer.directory = load.offsets(tables, OVERHEAD * SECTOR, began * SECTOR, SECTOR)?;
        writer.began = began * SECTOR;
        writer.end = writer.began;
        let mut discarded = Vec::new();
        for _ in 0..filled {
            let len = load.number(LONGEST_GRAIN as u64)?;
            writer.push(len, &[], &mut discarded);
            discarded.clear();
        }
        Ok(writer)
    }
}

/// Entries of tables: where something begins, in sectors. They fit; see [`LIMIT`].
fn sectors(offsets: &[u64]) -> Vec<u8> {
    offsets.iter().flat_map(|offset| low(offset / SECTOR).to_le_bytes()).collect()
}

fn low(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
