//! VMDK. Source: "Virtual Disk Format 5.0" of `VMware`; all fields are little-endian, offsets and sizes in sectors.

use berth_core::units::Bytes;

use super::source::{Source, Stop, le_u16, le_u32, le_u64};
use super::{ImageFormat, Note, Probe, Reader, Refusal};

const MAGIC: &[u8; 4] = b"KDMV";
/// Flags of the header.
const ZERO_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
const MARKERS: u32 = 1 << 17;
const DEFLATE: u16 = 1;
/// Where the grain directory is if only the footer knows.
const AT_END: u64 = u64::MAX;
/// Where some readers look for a descriptor, and how far, whatever the header says.
const FIXED_DESCRIPTOR: (Bytes, Bytes) = (Bytes(512), Bytes(20 * 512));
/// The size of the descriptor that creators reserve is 10 KiB.
const DESCRIPTOR_LIMIT: u64 = 64 << 10;
/// Grains are 4 KiB to 64 KiB; 1 GiB is what QEMU still opens.
const GRAIN_LIMIT: u64 = 2 << 20;

/// Compressed grains are decompressed whole, so of larger ones the tool takes care.
const NATIVE_GRAIN: u64 = 4096;

/// A checked header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VmdkHeader {
    flags: u32,
    /// Of the disk, in sectors.
    pub capacity: u64,
    /// Sectors of a grain: a power of two.
    pub grain: u64,
    /// Entries of a grain table, 1 to 512.
    pub entries: u64,
    descriptor: (u64, u64),
    /// Where the grain directory begins, in sectors.
    pub directory: u64,
}

pub(super) fn probe(source: &dyn Source) -> Result<Probe, Stop> {
    let (header, confirmed) = match VmdkHeader::read(source) {
        Ok(header) => (header, true),
        // The size is the header's; whatever the footer tells remains to be seen.
        Err(Stop::NotSampled { end }) => match VmdkHeader::read_first(source)? {
            header if header.directory == AT_END => (header, false),
            _ => return Err(Stop::NotSampled { end }),
        },
        Err(stop) => return Err(stop),
    };
    let noted = [
        (header.flags & (COMPRESSED | MARKERS) != 0, Note::StreamOptimized),
        (!confirmed, Note::SizeUnconfirmed),
    ];
    Ok(Probe {
        format: ImageFormat::Vmdk,
        virtual_size: Some(Bytes(header.capacity * 512)),
        reader: if header.is_native() { Reader::Native } else { Reader::QemuImg { driver: "vmdk" } },
        notes: noted.into_iter().filter_map(|(there, note)| there.then_some(note)).collect(),
    })
}

impl VmdkHeader {
    /// Reads and checks the header that counts: everything that must hold before a program may open the image.
    pub(crate) fn read(source: &dyn Source) -> Result<Self, Stop> {
        let header = Self::read_first(source)?;
        let header = if header.directory == AT_END { read_footer(source, &header)? } else { header };
        let directory = header.directory.checked_mul(512).map(Bytes);
        let expected = directory.ok_or_else(|| Refusal::corrupt("grain directory beyond any disk"))?;
        let found = source.size()?;
        if expected >= found {
            return Err(Refusal::Truncated { expected, found }.into());
        }
        Ok(header)
    }

    /// The one that the image begins with, and its descriptor.
    fn read_first(source: &dyn Source) -> Result<Self, Stop> {
        let head = source.up_to(Bytes(0), Bytes(512))?;
        if head.starts_with(b"COWD") {
            return Err(Refusal::unsupported("a VMFS sparse extent").into());
        }
        if !head.starts_with(MAGIC) {
            return Err(descriptor_file(source));
        }
        let header = Self::parse(&source.exactly(Bytes(0), 512)?)?;
        // Zero would make some readers take the descriptor for the image, and open what it names.
        if !(1..1 << 53).contains(&header.capacity) {
            return Err(Refusal::corrupt(format!("capacity of {} sectors", header.capacity)).into());
        }
        check_descriptor(source, &header)?;
        Ok(header)
    }

    fn parse(header: &[u8]) -> Result<Self, Refusal> {
        let version = le_u32(header, 4)?;
        if !(1..=3).contains(&version) {
            return Err(Refusal::unsupported(format!("VMDK version {version}")));
        }
        let flags = le_u32(header, 8)?;
        let grain = le_u64(header, 20)?;
        if !grain.is_power_of_two() || !(8..=GRAIN_LIMIT).contains(&grain) {
            return Err(Refusal::corrupt(format!("grains of {grain} sectors")));
        }
        let entries = u64::from(le_u32(header, 44)?);
        if !(1..=512).contains(&entries) {
            return Err(Refusal::corrupt("entries of a grain table"));
        }
        let method = le_u16(header, 77)?;
        if flags & COMPRESSED != 0 && method != DEFLATE {
            return Err(Refusal::unsupported(format!("VMDK compression {method}")));
        }
        Ok(Self {
            flags,
            capacity: le_u64(header, 12)?,
            grain,
            entries,
            descriptor: (le_u64(header, 28)?, le_u64(header, 36)?),
            directory: le_u64(header, 56)?,
        })
    }

    /// Grains are compressed.
    pub(crate) fn is_compressed(&self) -> bool {
        self.flags & COMPRESSED != 0
    }

    /// A grain table can say of a grain that it is zeros, by 1 in place of a sector.
    pub(crate) fn has_zero_grains(&self) -> bool {
        self.flags & ZERO_GRAINS != 0
    }

    /// The specification has compressed grains with markers only.
    fn is_native(&self) -> bool {
        !self.is_compressed() || (self.flags & MARKERS != 0 && self.grain <= NATIVE_GRAIN)
    }
}

/// The end of a stream-optimised image: a marker, a second header and the end-of-stream marker, 512 bytes each. Readers
/// take the second header for the true one, so it must say the same.
fn read_footer(source: &dyn Source, header: &VmdkHeader) -> Result<VmdkHeader, Stop> {
    let found = source.size()?;
    let truncated = Refusal::Truncated { expected: found.saturating_add(Bytes(512)), found };
    let Some(start) = found.0.checked_sub(1536) else { return Err(truncated.into()) };
    let end = source.exactly(Bytes(start), 1536)?;
    let (footer, last) = (&end[512..1024], &end[1024..]);
    if !footer.starts_with(MAGIC) || last.iter().any(|byte| *byte != 0) {
        return Err(truncated.into());
    }
    let footer = VmdkHeader::parse(footer)?;
    if footer.capacity != header.capacity
        || footer.descriptor != header.descriptor
        || footer.directory == AT_END
    {
        return Err(Refusal::corrupt("header and footer differ").into());
    }
    Ok(footer)
}

/// The embedded descriptor must name this one extent and no parent.
fn check_descriptor(source: &dyn Source, header: &VmdkHeader) -> Result<(), Stop> {
    no_parent(&source.up_to(FIXED_DESCRIPTOR.0, FIXED_DESCRIPTOR.1)?)?;
    let (offset, sectors) = header.descriptor;
    if offset == 0 {
        return Err(Refusal::unsupported("a sparse extent without a descriptor").into());
    }
    let (Some(at), Some(length)) = (offset.checked_mul(512), sectors.checked_mul(512)) else {
        return Err(Refusal::corrupt("descriptor beyond any disk").into());
    };
    if length > DESCRIPTOR_LIMIT {
        return Err(Refusal::corrupt(format!("descriptor of {}", Bytes(length))).into());
    }
    let text = source.exactly(Bytes(at), length)?;
    no_parent(&text)?;
    let text = String::from_utf8_lossy(&text);
    let text = text.split('\0').next().unwrap_or_default();
    let kind = value(text, "createType").unwrap_or_default();
    if !["monolithicSparse", "streamOptimized"].contains(&kind) {
        let kind: String = kind.chars().take(40).collect();
        return Err(Refusal::unsupported(format!("VMDK type {kind:?}")).into());
    }
    if value(text, "parentCID").is_some_and(|id| !id.eq_ignore_ascii_case("ffffffff")) {
        return Err(Refusal::backing_file(b"").into());
    }
    match extents(text).count() {
        1 => Ok(()),
        0 => Err(Refusal::corrupt("descriptor without an extent").into()),
        _ => Err(Refusal::data_file(extents(text).nth(1).and_then(file_name).unwrap_or_default().as_bytes())
            .into()),
    }
}

fn no_parent(text: &[u8]) -> Result<(), Refusal> {
    const HINT: &[u8] = b"parentFileNameHint";
    match text.windows(HINT.len()).position(|window| window == HINT) {
        Some(at) => {
            let line = text[at + HINT.len()..].split(|byte| *byte == b'\n').next().unwrap_or_default();
            Err(Refusal::backing_file(line.trim_ascii().trim_ascii_start()))
        }
        None => Ok(()),
    }
}

/// A descriptor that is a file of its own has its data elsewhere, always.
fn descriptor_file(source: &dyn Source) -> Stop {
    let text = match source.up_to(Bytes(0), Bytes(DESCRIPTOR_LIMIT)) {
        Ok(text) => text,
        Err(Stop::NotSampled { .. }) => Vec::new(),
        Err(stop) => return stop,
    };
    let text = String::from_utf8_lossy(&text);
    Refusal::data_file(extents(&text).next().and_then(file_name).unwrap_or_default().as_bytes()).into()
}

/// Lines like `RW 4192256 SPARSE "disk.vmdk"`.
fn extents(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| {
        let access = line.split_whitespace().next().unwrap_or_default();
        ["RW", "RDONLY", "NOACCESS"].iter().any(|known| access.eq_ignore_ascii_case(known))
    })
}

fn file_name(extent: &str) -> Option<&str> {
    extent.split('"').nth(1)
}

/// The value of a line `name = "value"`.
fn value<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        key.trim().eq_ignore_ascii_case(name).then(|| value.trim().trim_matches('"'))
    })
}
