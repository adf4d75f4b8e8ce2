//! VHD. Source: "Virtual Hard Disk Image Format Specification" 1.0 of Microsoft; all fields are big-endian.

use berth_core::units::Bytes;

use super::source::{Source, Stop, array, be_u32, be_u64};
use super::{ImageFormat, Probe, Reader, Refusal, SECTOR};

const COOKIE: &[u8; 8] = b"conectix";
const DYNAMIC_COOKIE: &[u8; 8] = b"cxsparse";
const FOOTER: u64 = 512;
const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;
/// The format's limit: 2040 GiB, plus what creators have been seen to round up.
const SIZE_LIMIT: u64 = 2 << 40;

/// Whether the image ends with a footer of a fixed disk that fits to it. False if its end is not at hand.
pub(super) fn has_sound_footer(source: &dyn Source) -> Result<bool, Stop> {
    let size = source.size()?;
    if size.0 < FOOTER {
        return Ok(false);
    }
    match source.exactly(Bytes(size.0 - FOOTER), FOOTER) {
        Ok(footer) => Ok(check_sum(&footer, 64)
            && footer.starts_with(COOKIE)
            && be_u32(&footer, 60)? == FIXED
            && be_u64(&footer, 48)? <= size.0 - FOOTER),
        Err(Stop::NotSampled { .. }) => Ok(false),
        Err(stop) => Err(stop),
    }
}

/// The checked headers of an image that stands for itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VhdHeader {
    /// A multiple of 512.
    pub size: Bytes,
    /// `None` if the disk is fixed.
    pub blocks: Option<VhdBlocks>,
}

/// How a dynamic disk is divided.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VhdBlocks {
    /// Where the block allocation table begins in the file.
    pub table: Bytes,
    /// Its entries, of 4 bytes. Enough for the disk.
    pub entries: u64,
    /// Bytes of a block: a power of two, at least 512.
    pub block: u64,
}

pub(super) fn probe(source: &dyn Source) -> Result<Probe, Stop> {
    let header = VhdHeader::read(source)?;
    Ok(Probe {
        format: ImageFormat::Vhd,
        virtual_size: Some(header.size),
        reader: Reader::Native,
        notes: Vec::new(),
    })
}

impl VhdHeader {
    /// Reads and checks the footer and what it leads to: everything that must hold before a program may open the image. If
    /// the end is not at hand, and there is a copy of the footer at the front, that one counts.
    pub(crate) fn read(source: &dyn Source) -> Result<Self, Stop> {
        let footer = footer(source)?;
        if !check_sum(&footer, 64) {
            return Err(Refusal::corrupt("checksum of the footer").into());
        }
        let size = Bytes(be_u64(&footer, 48)?);
        if size.0 > SIZE_LIMIT || !size.0.is_multiple_of(SECTOR.0) {
            return Err(Refusal::corrupt(format!("virtual size {size}")).into());
        }
        let blocks = match be_u32(&footer, 60)? {
            FIXED => {
                fits(source, size.saturating_add(Bytes(FOOTER)))?;
                None
            }
            DYNAMIC => Some(VhdBlocks::read(source, &footer, size)?),
            DIFFERENCING => return Err(parent(source, &footer)),
            other => return Err(Refusal::unsupported(format!("VHD type {other}")).into()),
        };
        Ok(Self { size, blocks })
    }
}

fn footer(source: &dyn Source) -> Result<Vec<u8>, Stop> {
    let size = source.size()?;
    let head = source.up_to(Bytes(0), Bytes(FOOTER))?;
    let tail = match source.exactly(size.saturating_sub(Bytes(FOOTER)), FOOTER) {
        Ok(tail) => Some(tail),
        Err(Stop::NotSampled { .. }) => None,
        Err(stop) => return Err(stop),
    };
    let copied = head.starts_with(COOKIE);
    if copied && tail.as_ref().is_some_and(|tail| !tail.starts_with(COOKIE)) {
        return Err(Refusal::Truncated { expected: size.saturating_add(Bytes(FOOTER)), found: size }.into());
    }
    if copied && tail.as_ref().is_some_and(|tail| tail.get(48..68) != head.get(48..68)) {
        return Err(Refusal::corrupt("the two footers differ").into());
    }
    Ok(if copied { head } else { tail.unwrap_or_default() })
}

impl VhdBlocks {
    fn read(source: &dyn Source, footer: &[u8], virtual_size: Bytes) -> Result<Self, Stop> {
        let header = source.exactly(Bytes(be_u64(footer, 16)?), 1024)?;
        if !header.starts_with(DYNAMIC_COOKIE) || !check_sum(&header, 36) {
            return Err(Refusal::corrupt("dynamic disk header").into());
        }
        let (table, entries, block) = (be_u64(&header, 16)?, be_u32(&header, 28)?, be_u32(&header, 32)?);
        let (entries, block) = (u64::from(entries), u64::from(block));
        if !block.is_power_of_two() || block < SECTOR.0 {
            return Err(Refusal::corrupt(format!("block size {block}")).into());
        }
        if entries * block < virtual_size.0 {
            return Err(Refusal::corrupt("block table too small for the virtual size").into());
        }
        if !table.is_multiple_of(SECTOR.0) {
            return Err(Refusal::corrupt("unaligned block table").into());
        }
        fits(source, Bytes(table).saturating_add(Bytes(entries * 4)))?;
        Ok(Self { table: Bytes(table), entries, block })
    }
}

/// The refusal of a differencing disk, with the parent's name as its header has it.
fn parent(source: &dyn Source, footer: &[u8]) -> Stop {
    let header = be_u64(footer, 16).map_err(Stop::from).and_then(|at| source.exactly(Bytes(at), 1024));
    let name = header.ok().and_then(|header| array::<512>(&header, 64).ok()).unwrap_or([0; 512]);
    let (units, _) = name.as_chunks::<2>();
    let units = units.iter().map(|unit| u16::from_be_bytes(*unit)).take_while(|unit| *unit != 0);
    let name: String = char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect();
    Refusal::backing_file(name.as_bytes()).into()
}

fn fits(source: &dyn Source, expected: Bytes) -> Result<(), Stop> {
    let found = source.size()?;
    if expected > found {
        return Err(Refusal::Truncated { expected, found }.into());
    }
    Ok(())
}

/// The one's complement of the sum of all bytes but those of the sum itself, which lies at `at`.
fn check_sum(structure: &[u8], at: usize) -> bool {
    let Ok(stored) = be_u32(structure, at) else { return false };
    let sum = |bytes: &[u8]| bytes.iter().fold(0_u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    sum(structure).wrapping_sub(sum(&stored.to_be_bytes())) == !stored
}
