//! The first look at a source: its format and sizes, from its head alone, before a byte is promised or written.

use berth_core::units::Bytes;
use berth_image::{FOOTER_SAMPLE, HEAD_SAMPLE, ImageFormat, Probe, Reader, Sample, probe, probe_as};
use berth_objectstore::source::{RangedSource, SourceInfo};
use futures::StreamExt as _;

use super::error::TransferError;
use super::job::{Limits, Probed};

/// How much more of the head is read where the first sample does not hold the size: VHDX keeps it up to 8 MiB away.
const LONG_HEAD: Bytes = Bytes::mib(8);

/// Reads the head of `source`, and its end where a format keeps its size there. Holds at most 8 MiB.
///
/// Its format is `format`, if that is given.
pub async fn probe_source(
    source: &RangedSource,
    limits: &Limits,
    format: Option<ImageFormat>,
) -> Result<Probed, TransferError> {
    Ok(open_and_probe(&mut source.clone(), limits, format).await?.0)
}

/// As [`probe_source`]; `source` is open afterwards, at the version that was probed.
pub(crate) async fn open_and_probe(
    source: &mut RangedSource,
    limits: &Limits,
    format: Option<ImageFormat>,
) -> Result<(Probed, SourceInfo), TransferError> {
    let info = source.open(HEAD_SAMPLE.0, None).await?;
    let size = info.size.ok_or(TransferError::NoSize)?;
    if size > limits.bytes {
        return Err(TransferError::SourceSize { found: size, limit: limits.bytes });
    }
    let tail = if info.accepts_ranges && size > HEAD_SAMPLE {
        Some(read(source, Bytes(size.0 - FOOTER_SAMPLE.0), size).await?)
    } else {
        None
    };
    let look = |head: &[u8]| {
        let sample = Sample { head, size, tail: tail.as_deref() };
        format.map_or_else(|| probe(&sample), |format| probe_as(format, &sample))
    };
    let mut found = look(&info.head)?;
    if found.virtual_size.is_none() && info.accepts_ranges {
        let head = read(source, Bytes::ZERO, size.min(LONG_HEAD)).await?;
        found = look(&head)?;
    }
    let rereadable = info.accepts_ranges && info.version.is_some();
    Ok((Probed { rereadable, ..checked(&found, size, limits)? }, info))
}

/// Compares what a probe found with the limits.
pub fn checked(found: &Probe, size: Bytes, limits: &Limits) -> Result<Probed, TransferError> {
    // Where only the whole file tells, it may be as large as allowed; the whole file is probed again before it is read.
    let virtual_size = found.virtual_size.unwrap_or(limits.virtual_size);
    if virtual_size > limits.virtual_size {
        return Err(TransferError::VirtualSize { found: virtual_size, limit: limits.virtual_size });
    }
    let converted = matches!(found.reader, Reader::QemuImg { .. });
    Ok(Probed { format: found.format, source_bytes: size, virtual_size, converted, rereadable: false })
}

async fn read(source: &RangedSource, from: Bytes, to: Bytes) -> Result<Vec<u8>, TransferError> {
    let mut stream = source.read(from.0..to.0).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        bytes.extend_from_slice(&piece?);
    }
    Ok(bytes)
}
