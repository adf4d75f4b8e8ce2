//! Object storage: the store trait, its S3 client, the chunk store that lies in a bucket, and sources read by range.
//!
//! [`ObjectStore`] is exactly what Berth needs from a store and nothing more; [`s3::S3Store`] is the one that talks to
//! a real one. [`chunks`] keeps images in the casync chunk-store layout. [`source`] reads images to be imported.

pub mod checksum;
pub mod chunks;
pub mod layout;
#[cfg(any(test, feature = "fake"))]
pub mod memory;
pub mod s3;
pub mod source;

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::path::PathBuf;

use berth_core::ids::Sha256Sum;
use berth_core::units::Bytes as Size;
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What a store calls one version of an object's content, with its quotes, as the store sent it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ETag(pub String);

impl fmt::Display for ETag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where an object lies: a bucket, and a key in it or nothing for the bucket itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The bucket.
    pub bucket: String,
    /// The key, or the prefix of a listing; empty for the bucket.
    pub key: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.key)
    }
}

/// Why a store did not do what it was asked. `said` is the store's own words.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StoreError {
    /// No such object.
    #[error("{place} does not exist")]
    NotFound {
        /// What was asked for.
        place: Place,
    },
    /// No such bucket: a wrong name, region or endpoint.
    #[error("bucket `{}` does not exist: {said}", place.bucket)]
    NoSuchBucket {
        /// What was asked for.
        place: Place,
        /// The store's words.
        said: String,
    },
    /// The credentials are wrong, expired, or lack a permission.
    #[error("access to {place} is denied: {said}")]
    AccessDenied {
        /// What was asked for.
        place: Place,
        /// The store's words.
        said: String,
    },
    /// The store has no room, or a quota is used up.
    #[error("the store has no room for {place}: {said}")]
    Full {
        /// What was to be stored.
        place: Place,
        /// The store's words.
        said: String,
    },
    /// The object is not in the state that the request was conditional on.
    #[error("{place} was changed or created by someone else")]
    PreconditionFailed {
        /// What was asked for.
        place: Place,
    },
    /// What arrived is not what was sent.
    #[error("{place} arrived damaged: {said}")]
    BadDigest {
        /// What was asked for.
        place: Place,
        /// The store's words.
        said: String,
    },
    /// The store cannot do this at all.
    #[error("the store does not support what was asked of {place}: {said}")]
    Unsupported {
        /// What was asked for.
        place: Place,
        /// The store's words.
        said: String,
    },
    /// The store will not do this however often it is asked.
    #[error("the store refused the request for {place}: {said}")]
    InvalidRequest {
        /// What was asked for.
        place: Place,
        /// The store's words.
        said: String,
    },
    /// Not now: 5xx, throttling, timeouts, connections refused or lost. The only transient reason.
    #[error("{place} is unavailable: {said}")]
    Unavailable {
        /// What was asked for.
        place: Place,
        /// The store's words, or what happened to the connection.
        said: String,
    },
    /// More came than the object may hold.
    #[error("{place} is larger than {limit}")]
    TooLarge {
        /// What was asked for.
        place: Place,
        /// The most that was to be read.
        limit: Size,
    },
    /// A local file to be sent could not be read.
    #[error("failed to read {} to be stored at {place}: {reason}", path.display())]
    LocalFile {
        /// Where it was to go.
        place: Place,
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

impl StoreError {
    /// True if the same request may succeed later without anyone doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

/// What an object is to hold.
#[derive(Clone, Debug)]
pub enum Body {
    /// These bytes.
    Bytes(Bytes),
    /// The first `len` bytes of a file, streamed.
    File {
        /// The file.
        path: PathBuf,
        /// How much of it.
        len: Size,
    },
}

impl Body {
    /// How many bytes it is.
    pub fn len(&self) -> Size {
        match self {
            Self::Bytes(bytes) => Size(bytes.len() as u64),
            Self::File { len, .. } => *len,
        }
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == Size::ZERO
    }
}

/// What must hold for an object to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PutCondition {
    /// Nothing.
    Always,
    /// There is no object under this key.
    IfAbsent,
    /// The object is still this version.
    IfMatch(ETag),
}

/// What is known of an object without its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// The size of the whole object.
    pub size: Size,
    /// Its version, where the store says it.
    pub etag: Option<ETag>,
}

/// An object's content, as it arrives.
pub struct Object {
    /// The size of the whole object, also when a part of it was asked for.
    pub size: Size,
    /// Its version, where the store says it.
    pub etag: Option<ETag>,
    /// Where it lies, for messages.
    pub place: Place,
    /// The bytes. An error ends them.
    pub body: BoxStream<'static, Result<Bytes, StoreError>>,
}

impl Object {
    /// All the bytes that were asked for, refusing more than `limit`.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`], or whatever ended the stream.
    pub async fn collect(mut self, limit: Size) -> Result<Bytes, StoreError> {
        let mut whole = BytesMut::new();
        while let Some(piece) = self.body.next().await {
            let piece = piece?;
            if whole.len() as u64 + piece.len() as u64 > limit.0 {
                return Err(StoreError::TooLarge { place: self.place, limit });
            }
            if whole.is_empty() {
                whole = BytesMut::from(piece);
            } else {
                whole.extend_from_slice(&piece);
            }
        }
        Ok(whole.freeze())
    }
}

/// One line of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The key.
    pub key: String,
    /// The object's size.
    pub size: Size,
    /// Its version, where the store says it.
    pub etag: Option<ETag>,
    /// When it was written, in seconds since 1970 by the store's clock.
    pub last_modified: Option<i64>,
}

/// A page of a listing, ordered by the bytes of the keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListPage {
    /// At most 1,000 objects.
    pub objects: Vec<Listed>,
    /// True if there is more after the last of them.
    pub more: bool,
}

/// An object store, as far as Berth needs one. Keys are whole, prefixes included.
///
/// **Assumptions**: an object is replaced whole or not at all; a listing and a read that begin after a write was
/// acknowledged see it. What else a store can do is probed (see [`chunks::store::Capabilities`]).
pub trait ObjectStore: Send + Sync + 'static {
    /// Stores an object; with `sha256`, asks the store to refuse anything else than bytes of that sum.
    /// Returns the new version where the store says it.
    fn put(
        &self,
        key: &str,
        body: Body,
        condition: PutCondition,
        sha256: Option<Sha256Sum>,
    ) -> impl Future<Output = Result<Option<ETag>, StoreError>> + Send;

    /// Reads an object, or the bytes of `range` (not empty) of it; with `if_match`, only that version.
    fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        if_match: Option<&ETag>,
    ) -> impl Future<Output = Result<Object, StoreError>> + Send;

    /// What is known of an object.
    fn head(&self, key: &str) -> impl Future<Output = Result<ObjectInfo, StoreError>> + Send;

    /// Removes an object. One that does not exist is no error.
    fn delete(&self, key: &str) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// A page of the objects whose keys start with `prefix` and come after `start_after`.
    fn list(
        &self,
        prefix: &str,
        start_after: Option<&str>,
    ) -> impl Future<Output = Result<ListPage, StoreError>> + Send;

    /// True if the store can list multipart uploads that were begun and not finished.
    fn lists_uploads(&self) -> impl Future<Output = Result<bool, StoreError>> + Send;
}

/// The bytes of an object that is expected to be small.
pub(crate) async fn small<S: ObjectStore>(store: &S, key: &str) -> Result<(Bytes, Option<ETag>), StoreError> {
    let object = store.get(key, None, None).await?;
    let etag = object.etag.clone();
    Ok((object.collect(Size::mib(4)).await?, etag))
}
