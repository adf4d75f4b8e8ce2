//! An object in an S3 store as a source.

use std::ops::Range;
use std::time::Duration;

use berth_core::units::Bytes as Size;
use futures::StreamExt as _;

use super::{SourceError, SourceInfo, SourceStream};
use crate::s3::S3Store;
use crate::{ETag, Object, StoreError};

/// One object, or one version of it.
#[derive(Clone, Debug)]
pub struct ObjectSource {
    store: S3Store,
    key: String,
    version: Option<String>,
    stall: Duration,
    etag: Option<ETag>,
}

/// An object in an S3 store.
pub type S3Source = ObjectSource;

impl ObjectSource {
    /// The object `key`, or its version `version_id`. Nothing for `stall` counts as stalled.
    pub fn new(store: S3Store, key: impl Into<String>, version_id: Option<String>, stall: Duration) -> Self {
        Self { store, key: key.into(), version: version_id, stall, etag: None }
    }

    fn location(&self) -> String {
        format!("s3://{}/{}", self.store.bucket(), self.key)
    }

    pub(super) async fn open(
        &mut self,
        first: u64,
        version: Option<&str>,
    ) -> Result<SourceInfo, SourceError> {
        self.etag = version.map(|version| ETag(version.to_owned()));
        let range = Some(0..first.max(1));
        let (object, accepts_ranges) = match self.get(range).await {
            Ok(object) => (object, true),
            // An empty object has no first byte, and some stores have no ranges.
            Err(StoreError::InvalidRequest { .. } | StoreError::Unsupported { .. }) => {
                let object = self.get(None).await.map_err(|error| self.failed(error))?;
                let empty = object.size == Size::ZERO;
                (object, empty)
            }
            Err(error) => return Err(self.failed(error)),
        };
        self.etag.clone_from(&object.etag);
        let size = object.size;
        let mut bytes = self.stream(object, first.min(size.0));
        let mut head = bytes::BytesMut::new();
        while let Some(piece) = bytes.next().await {
            head.extend_from_slice(&piece?);
        }
        let version = self.etag.as_ref().map(|etag| etag.0.clone());
        Ok(SourceInfo { size: Some(size), version, accepts_ranges, head: head.freeze() })
    }

    pub(super) async fn read(&self, range: Range<u64>) -> Result<SourceStream, SourceError> {
        let len = range.end.saturating_sub(range.start);
        if len == 0 {
            return Ok(futures::stream::empty().boxed());
        }
        let object = self.get(Some(range)).await.map_err(|error| self.failed(error))?;
        Ok(self.stream(object, len))
    }

    async fn get(&self, range: Option<Range<u64>>) -> Result<Object, StoreError> {
        self.store.get_version(&self.key, self.version.as_deref(), range, self.etag.as_ref()).await
    }

    fn stream(&self, object: Object, len: u64) -> SourceStream {
        let this = self.clone();
        let body = object.body.map(move |piece| piece.map_err(|error| this.failed(error)));
        super::http::bounded(self.location(), body.boxed(), 0, Some(len), self.stall)
    }

    fn failed(&self, error: StoreError) -> SourceError {
        let location = self.location();
        match error {
            StoreError::NotFound { .. } | StoreError::NoSuchBucket { .. } => {
                SourceError::NotFound { location }
            }
            StoreError::AccessDenied { said, .. } => SourceError::Forbidden { location, said },
            StoreError::PreconditionFailed { .. } => SourceError::Changed { location },
            StoreError::Unavailable { said, .. } => SourceError::Unavailable { location, said },
            other => SourceError::Unusable { location, said: other.to_string() },
        }
    }
}
