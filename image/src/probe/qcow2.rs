//! qcow2. Source: `docs/interop/qcow2.rst` of QEMU; all fields are big-endian.

use berth_core::units::Bytes;

use super::source::{Source, Stop, be_u32, be_u64};
use super::{ImageFormat, Note, Probe, Reader, Refusal, SECTOR};

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;

/// QEMU's limit of the L1 table. It bounds what reading takes, and is 256 TiB with 64 KiB clusters.
const L1_LIMIT: u64 = 32 << 20;
/// QEMU's limit of internal snapshots.
const SNAPSHOT_LIMIT: u32 = 65536;
/// Header extensions that are looked at; each takes at least 8 bytes of the first cluster.
const EXTENSION_LIMIT: usize = 256;

const EXTENSION_END: u32 = 0;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;

/// The checked header of an image that stands for itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Qcow2Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// As the header says, maybe no multiple of 512.
    pub size: Bytes,
    pub l1_offset: Bytes,
    pub l1_entries: u64,
    pub snapshots: u32,
    pub zstd: bool,
    pub extended_l2: bool,
}

pub(super) fn probe(source: &dyn Source) -> Result<Probe, Stop> {
    let header = Qcow2Header::read(source)?;
    let noted = [
        (header.snapshots > 0, Note::SnapshotsIgnored),
        (header.zstd, Note::Zstd),
        (header.extended_l2, Note::ExtendedL2),
    ];
    Ok(Probe {
        format: ImageFormat::Qcow2,
        virtual_size: Some(header.size.round_up(SECTOR)),
        reader: Reader::Native,
        notes: noted.into_iter().filter_map(|(there, note)| there.then_some(note)).collect(),
    })
}

impl Qcow2Header {
    /// Reads and checks the header: everything that must hold before a program may open the image.
    pub(crate) fn read(source: &dyn Source) -> Result<Self, Stop> {
        let head = source.exactly(Bytes(0), 72)?;
        let version = be_u32(&head, 4)?;
        let (head, features) = match version {
            2 => (head, 0),
            3 => {
                let head = source.exactly(Bytes(0), 104)?;
                let features = be_u64(&head, 72)?;
                (head, features)
            }
            _ => return Err(Refusal::unsupported(format!("qcow2 version {version}")).into()),
        };
        let cluster_bits = be_u32(&head, 20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(Refusal::corrupt(format!("cluster size 2^{cluster_bits}")).into());
        }
        stands_alone(source, &head)?;
        check_features(features)?;
        let extensions = if version == 3 { check_v3(source, &head, cluster_bits)? } else { 72 };
        check_extensions(source, extensions, cluster_bits, features & DATA_FILE != 0)?;
        let header = Self {
            version,
            cluster_bits,
            size: Bytes(be_u64(&head, 24)?),
            l1_offset: Bytes(be_u64(&head, 40)?),
            l1_entries: be_u32(&head, 36)?.into(),
            snapshots: be_u32(&head, 60)?,
            zstd: features & COMPRESSION != 0,
            extended_l2: features & EXTENDED_L2 != 0,
        };
        header.check_tables(source, &head)?;
        Ok(header)
    }

    /// Bytes in a cluster.
    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an entry of an L2 table.
    pub(crate) fn entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Bytes of the disk that one L2 table describes.
    pub(crate) fn table_reach(&self) -> u64 {
        self.cluster_size() * (self.cluster_size() / self.entry_size())
    }

    fn check_tables(&self, source: &dyn Source, head: &[u8]) -> Result<(), Stop> {
        let corrupt = |what: &str| Err(Stop::Refused(Refusal::corrupt(what)));
        if self.size.0 > i64::MAX.unsigned_abs() - 511 {
            return corrupt("virtual size beyond any disk");
        }
        if self.extended_l2 && self.cluster_bits < 14 {
            return corrupt("subclusters of less than 512 bytes");
        }
        if self.snapshots > SNAPSHOT_LIMIT {
            return corrupt("too many snapshots");
        }
        if self.l1_entries < self.size.0.div_ceil(self.table_reach()) {
            return corrupt("L1 table too small for the virtual size");
        }
        if self.l1_entries * 8 > L1_LIMIT {
            return Err(Refusal::unsupported("an L1 table above 32 MiB").into());
        }
        if !self.l1_offset.0.is_multiple_of(self.cluster_size())
            || be_u64(head, 48)? % self.cluster_size() != 0
        {
            return corrupt("unaligned L1 or refcount table");
        }
        let end = self.l1_offset.saturating_add(Bytes(self.l1_entries * 8));
        let found = source.size()?;
        if end > found {
            return Err(Refusal::Truncated { expected: end, found }.into());
        }
        Ok(())
    }
}

/// Refuses backing files and encryption: both are in the part that versions 2 and 3 share.
fn stands_alone(source: &dyn Source, head: &[u8]) -> Result<(), Stop> {
    let (offset, length) = (be_u64(head, 8)?, be_u32(head, 16)?);
    if offset != 0 || length != 0 {
        let name = source.up_to(Bytes(offset), Bytes(length.min(1023).into())).unwrap_or_default();
        return Err(Refusal::backing_file(&name).into());
    }
    if be_u32(head, 32)? != 0 {
        return Err(Refusal::Encrypted.into());
    }
    Ok(())
}

fn check_features(features: u64) -> Result<(), Refusal> {
    if features & !KNOWN != 0 {
        let bit = (features & !KNOWN).trailing_zeros();
        return Err(Refusal::unsupported(format!("incompatible qcow2 feature {bit}")));
    }
    if features & CORRUPT != 0 {
        return Err(Refusal::corrupt("it is marked as corrupt"));
    }
    if features & DIRTY != 0 {
        return Err(Refusal::corrupt("it was not closed properly"));
    }
    Ok(())
}

/// Checks what only version 3 has, and returns where the header extensions begin.
fn check_v3(source: &dyn Source, head: &[u8], cluster_bits: u32) -> Result<u64, Stop> {
    let length = u64::from(be_u32(head, 100)?);
    if !(104..=1 << cluster_bits).contains(&length) || length % 8 != 0 {
        return Err(Refusal::corrupt(format!("header length {length}")).into());
    }
    if be_u32(head, 96)? > 6 {
        return Err(Refusal::corrupt("refcounts of more than 64 bits").into());
    }
    let method = if length > 104 { source.exactly(Bytes(104), 1)?.first().copied().unwrap_or(0) } else { 0 };
    match (method, be_u64(head, 72)? & COMPRESSION != 0) {
        (0, false) | (1, true) => Ok(length),
        (0 | 1, _) => Err(Refusal::corrupt("compression type and feature bit disagree").into()),
        (other, _) => Err(Refusal::unsupported(format!("qcow2 compression type {other}")).into()),
    }
}

/// Header extensions name an external data file and hold keys; every other one may be ignored.
fn check_extensions(source: &dyn Source, start: u64, cluster_bits: u32, data_file: bool) -> Result<(), Stop> {
    let mut at = start;
    let mut name = None;
    for _ in 0..EXTENSION_LIMIT {
        if at + 8 > 1 << cluster_bits || Bytes(at + 8) > source.size()? {
            break;
        }
        let extension = source.exactly(Bytes(at), 8)?;
        let (kind, length) = (be_u32(&extension, 0)?, u64::from(be_u32(&extension, 4)?));
        match kind {
            EXTENSION_END => break,
            EXTENSION_ENCRYPTION => return Err(Refusal::Encrypted.into()),
            EXTENSION_DATA_FILE => name = Some(source.up_to(Bytes(at + 8), Bytes(length.min(1023)))?),
            _ => {}
        }
        at += 8 + length.next_multiple_of(8);
    }
    if data_file || name.is_some() {
        return Err(Refusal::data_file(&name.unwrap_or_default()).into());
    }
    Ok(())
}
