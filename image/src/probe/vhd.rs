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

pub(super) fn probe(source: &dyn Source) -> Result<Probe, Stop> {
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
    let footer = if copied { head } else { tail.unwrap_or_default() };
    if !check_sum(&footer, 64) {
        return Err(Refusal::corrupt("checksum of the footer").into());
    }
    let virtual_size = Bytes(be_u64(&footer, 48)?);
    if virtual_size.0 > SIZE_LIMIT || !virtual_size.0.is_multiple_of(SECTOR.0) {
        return Err(Refusal::corrupt(format!("virtual size {virtual_size}")).into());
    }
    match be_u32(&footer, 60)? {
        FIXED => fits(source, virtual_size.saturating_add(Bytes(FOOTER)))?,
        DYNAMIC => check_dynamic(source, &footer, virtual_size)?,
        DIFFERENCING => return Err(parent(source, &footer)),
        other => return Err(Refusal::unsupported(format!("VHD type {other}")).into()),
    }
    Ok(Probe {
        format: ImageFormat::Vhd,
        virtual_size: Some(virtual_size),
        reader: Reader::QemuImg { driver: "vpc" },
        notes: Vec::new(),
    })
}

fn check_dynamic(source: &dyn Source, footer: &[u8], virtual_size: Bytes) -> Result<(), Stop> {
    let header = source.exactly(Bytes(be_u64(footer, 16)?), 1024)?;
    if !header.starts_with(DYNAMIC_COOKIE) || !check_sum(&header, 36) {
        return Err(Refusal::corrupt("dynamic disk header").into());
    }
    let (table, entries, block) = (be_u64(&header, 16)?, be_u32(&header, 28)?, be_u32(&header, 32)?);
    if !block.is_power_of_two() || block < 512 {
        return Err(Refusal::corrupt(format!("block size {block}")).into());
    }
    if u64::from(entries) * u64::from(block) < virtual_size.0 {
        return Err(Refusal::corrupt("block table too small for the virtual size").into());
    }
    fits(source, Bytes(table).saturating_add(Bytes(u64::from(entries) * 4)))
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
