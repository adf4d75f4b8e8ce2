//! A source behind an address as bytes that are read anywhere: what readers of formats need.

use berth_core::units::Bytes;
use berth_image::ReadAt;
use berth_objectstore::source::{RangedSource, SourceError};
use bytes::{Bytes as Buffer, BytesMut};
use futures::TryStreamExt as _;

/// An open source of a known size. Every request names the version that was opened.
pub(crate) struct Ranges {
    source: RangedSource,
    size: Bytes,
    name: String,
}

impl Ranges {
    /// Of a source that is open and says its version; `name` is what errors call it.
    pub fn new(source: RangedSource, size: Bytes, name: String) -> Self {
        Self { source, size, name }
    }
}

impl ReadAt for Ranges {
    type Error = SourceError;

    fn size(&self) -> Bytes {
        self.size
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    async fn read_at(&self, at: Bytes, len: usize) -> Result<Buffer, SourceError> {
        let end = at.0.saturating_add(len as u64);
        let mut stream = self.source.read(at.0..end).await?;
        let first = stream.try_next().await?.unwrap_or_default();
        if first.len() == len {
            return Ok(first);
        }
        let mut all = BytesMut::with_capacity(len);
        all.extend_from_slice(&first);
        while let Some(more) = stream.try_next().await? {
            all.extend_from_slice(&more);
        }
        if all.len() != len {
            let said = format!("{} bytes came of {len} at {}", all.len(), at.0);
            return Err(SourceError::Unavailable { location: self.name.clone(), said });
        }
        Ok(all.freeze())
    }
}
