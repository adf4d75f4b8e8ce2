//! Probing what is read by ranges: whatever is missing is fetched, and the question asked again.

use std::cell::Cell;

use berth_core::units::Bytes;
use bytes::Bytes as Buffer;

use super::source::{Source, Stop};
use super::{ImageFormat, Probe, probe_source, probe_source_as};
use crate::extents::ReadError;
use crate::read_at::ReadAt;

/// What is fetched around something that is missing: most formats keep all that must be known in one or two of these.
const BLOCK: Bytes = Bytes::kib(256);
/// Blocks that are fetched at most. Of what probing reads, the header extensions of qcow2 lie in up to 8 of them.
const BLOCKS: usize = 24;

/// Finds the format of an image and checks it, or checks that it is of `format`. Reads wherever the format keeps what must
/// be known, so the answer is never unconfirmed. Mostly two requests of 256 KiB; holds 6 MiB at most.
///
/// # Errors
/// [`ReadError::Refused`] as [`super::probe()`] and [`super::probe_as`], [`ReadError::Source`].
pub async fn probe_at<S: ReadAt>(source: &S, format: Option<ImageFormat>) -> Result<Probe, ReadError> {
    look_into(source, |source| format.map_or_else(|| probe_source(source), |f| probe_source_as(f, source)))
        .await
}

/// Asks `look` about an image that is read by ranges.
pub(crate) async fn look_into<S: ReadAt, T>(
    source: &S,
    look: impl Fn(&dyn Source) -> Result<T, Stop> + Send + Sync,
) -> Result<T, ReadError> {
    let mut gathered = Gathered { size: source.size(), blocks: Vec::new(), missing: Cell::new(None) };
    for _ in 0..=BLOCKS {
        let answer = look(&gathered);
        // Some answers do without what is missing, and say less then.
        if let Some(number) = gathered.missing.take() {
            let bytes = fetch_block(source, number).await?;
            gathered.blocks.push((number, bytes));
            continue;
        }
        let image = source.name();
        return answer.map_err(|stop| match stop {
            Stop::Refused(source) => ReadError::Refused { image, source },
            Stop::Io(source) => ReadError::Source { image, source: source.into() },
            Stop::NotSampled { end } => ReadError::Truncated { image, expected: end, found: gathered.size },
        });
    }
    Err(ReadError::Corrupt { image: source.name(), what: "its headers lie in too many places".into() })
}

/// The blocks of an image that were fetched.
struct Gathered {
    size: Bytes,
    /// By number, in no order.
    blocks: Vec<(u64, Buffer)>,
    /// The first block that was asked for and is not there.
    missing: Cell<Option<u64>>,
}

async fn fetch_block<S: ReadAt>(source: &S, number: u64) -> Result<Buffer, ReadError> {
    let at = Bytes(number * BLOCK.0);
    let len = source.size().saturating_sub(at).min(BLOCK);
    // No longer than a block.
    let len = usize::try_from(len.0).unwrap_or(usize::MAX);
    let failed = |error: S::Error| ReadError::Source { image: source.name(), source: Box::new(error) };
    let bytes = source.read_at(at, len).await.map_err(failed)?;
    if bytes.len() == len {
        return Ok(bytes);
    }
    let expected = at.saturating_add(Bytes(len as u64));
    let found = at.saturating_add(Bytes(bytes.len() as u64));
    Err(ReadError::Truncated { image: source.name(), expected, found })
}

impl Source for Gathered {
    fn size(&self) -> Result<Bytes, Stop> {
        Ok(self.size)
    }

    fn fetch(&self, at: Bytes, len: usize) -> Result<Vec<u8>, Stop> {
        let end = at.0.saturating_add(len as u64);
        let mut bytes = Vec::with_capacity(len);
        let mut from = at.0;
        while from < end {
            let number = from / BLOCK.0;
            let block = self.blocks.iter().find(|block| block.0 == number).map(|block| &block.1);
            let within = usize::try_from(from - number * BLOCK.0).unwrap_or(usize::MAX);
            let Some(rest) = block.and_then(|block| block.get(within..)).filter(|rest| !rest.is_empty())
            else {
                self.missing.set(block.is_none().then_some(number));
                return Err(Stop::NotSampled { end: Bytes(end) });
            };
            bytes.extend_from_slice(&rest[..rest.len().min(len - bytes.len())]);
            from = at.0 + bytes.len() as u64;
        }
        Ok(bytes)
    }
}
