//! Sources of images that are read by range: http(s) and S3.
//!
//! A source is opened once; every later read must see the same version, or fails with [`SourceError::Changed`].

pub mod address;
mod client;
mod http;
mod object;

use std::ops::Range;
use std::time::Duration;

use berth_core::units::Bytes as Size;
use bytes::Bytes;
use futures::stream::BoxStream;
use thiserror::Error;

pub use http::{HttpConfig, HttpSource};
pub use object::{ObjectSource, S3Source};

/// Why a source could not be read. `source` names it without its query, which may hold secrets.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SourceError {
    /// Not a URL that can be read.
    #[error("`{location}` is not an http or https url")]
    Url {
        /// What was given.
        location: String,
    },
    /// It points where it must not.
    #[error("{location} leads to the refused address {address}")]
    Refused {
        /// The source.
        location: String,
        /// The address, or the name of one.
        address: String,
    },
    /// There is none.
    #[error("{location} does not exist")]
    NotFound {
        /// The source.
        location: String,
    },
    /// It needs other credentials.
    #[error("access to {location} is denied: {said}")]
    Forbidden {
        /// The source.
        location: String,
        /// The server's words.
        said: String,
    },
    /// It is another version than was opened: start over.
    #[error("{location} has changed while it was read")]
    Changed {
        /// The source.
        location: String,
    },
    /// Nothing came for too long.
    #[error("{location} sent nothing for {} s", after.as_secs_f32())]
    Stalled {
        /// The source.
        location: String,
        /// How long.
        after: Duration,
    },
    /// Not now: 5xx, 429, connections refused, lost, or ended too early.
    #[error("{location} is unavailable: {said}")]
    Unavailable {
        /// The source.
        location: String,
        /// What happened.
        said: String,
    },
    /// The server answered something else than was asked for, and will again.
    #[error("{location} cannot be read: {said}")]
    Unusable {
        /// The source.
        location: String,
        /// What it answered.
        said: String,
    },
    /// More redirects than are followed.
    #[error("{location} redirects more than {limit} times")]
    Redirects {
        /// The source.
        location: String,
        /// How many are followed.
        limit: usize,
    },
    /// The certificates to trust, or a header to send, are none.
    #[error("the client for {location} cannot be made: {said}")]
    Client {
        /// The source.
        location: String,
        /// What is wrong.
        said: String,
    },
}

impl SourceError {
    /// True if the same read may succeed later without anyone doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Stalled { .. } | Self::Unavailable { .. })
    }
}

/// What a source says of itself when it is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceInfo {
    /// Its size, if it says it.
    pub size: Option<Size>,
    /// Its version, with which a later process can open it again as the same. Without one (no strong `ETag`) only a
    /// change of size is noticed, and a later process has to start over.
    pub version: Option<String>,
    /// True if a part of it can be read. If not, a read from further on reads all before and throws it away.
    pub accepts_ranges: bool,
    /// Its first bytes: as many as were asked for, or all.
    pub head: Bytes,
}

/// Bytes of a source, in order. An error ends them; fewer bytes than were asked for are an error.
pub type SourceStream = BoxStream<'static, Result<Bytes, SourceError>>;

/// Anything that is read by range.
#[derive(Clone, Debug)]
pub enum RangedSource {
    /// A web server.
    Http(HttpSource),
    /// An object in an S3 store.
    S3(S3Source),
}

impl RangedSource {
    /// Opens it: reads up to `first` bytes, and holds on to the version found. With `version`, only that one.
    ///
    /// # Errors
    /// [`SourceError::Changed`] if it is not `version` any more.
    pub async fn open(&mut self, first: u64, version: Option<&str>) -> Result<SourceInfo, SourceError> {
        match self {
            Self::Http(source) => source.open(first, version).await,
            Self::S3(source) => source.open(first, version).await,
        }
    }

    /// The bytes of `range`, of the version that was opened.
    pub async fn read(&self, range: Range<u64>) -> Result<SourceStream, SourceError> {
        match self {
            Self::Http(source) => source.read(range).await,
            Self::S3(source) => source.read(range).await,
        }
    }
}

impl From<HttpSource> for RangedSource {
    fn from(source: HttpSource) -> Self {
        Self::Http(source)
    }
}

impl From<S3Source> for RangedSource {
    fn from(source: S3Source) -> Self {
        Self::S3(source)
    }
}
