//! An image as a stream of extents.

use std::error::Error;
use std::future::Future;
use std::io;
use std::path::Path;

use berth_core::units::Bytes;
use thiserror::Error;
use tokio::task::spawn_blocking;

use crate::probe::{ImageFormat, Probe, ProbeError, Refusal, probe_file_as};
use crate::raw::RawReader;
use crate::read_at::LocalFile;
#[cfg(doc)]
use crate::read_at::ReadAt;
use crate::reader::ImageReader;

/// The most that one trip to a blocking thread reads, and so what a reader keeps as its buffer.
pub(crate) const PIECE: usize = 1 << 20;

/// What a range of an image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes that must be read. They may still be zero.
    Data,
    /// Zeros, without looking.
    Zero,
}

/// A range of an image. Never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins on the disk.
    pub offset: Bytes,
    /// How long it is.
    pub len: Bytes,
    /// What it holds.
    pub kind: ExtentKind,
}

/// What a source of bytes says when it cannot be read; see [`ReadAt::Error`].
pub type SourceError = Box<dyn Error + Send + Sync>;

/// Why an image could not be opened or read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// Its bytes cannot be had: nothing is known to be wrong with the image.
    #[error("failed to read image {image}")]
    Source {
        /// The image.
        image: String,
        /// What the source says: its [`ReadAt::Error`].
        source: SourceError,
    },
    /// The image's structures contradict each other.
    #[error("image {image} is corrupt: {what}")]
    Corrupt {
        /// The image.
        image: String,
        /// Which, and how.
        what: String,
    },
    /// The image ends before something that it refers to.
    #[error("image {image} is truncated: {found} where there must be {expected}")]
    Truncated {
        /// The image.
        image: String,
        /// The least length that it must have.
        expected: Bytes,
        /// The length that it has.
        found: Bytes,
    },
    /// Something beyond the end of the disk was asked for.
    #[error("range {offset}+{len} bytes is outside of image {image}")]
    OutOfRange {
        /// The image.
        image: String,
        /// Where the range begins.
        offset: u64,
        /// How long it is.
        len: usize,
    },
    /// The image is not what was probed.
    #[error("image {image} has changed since it was probed")]
    Changed {
        /// The image.
        image: String,
    },
    /// Only a tool can read the format.
    #[error("image {image} can only be read through {driver}")]
    NotNative {
        /// The image.
        image: String,
        /// The driver of `qemu-img`.
        driver: &'static str,
    },
    /// It is not an image that may be opened.
    #[error("image {image} is refused")]
    Refused {
        /// The image.
        image: String,
        /// Why.
        source: Refusal,
    },
}

impl ReadError {
    /// What the source of the bytes said, if that is what ended the reading, and if it is of this type.
    pub fn source_error<E: Error + 'static>(&self) -> Option<&E> {
        match self {
            Self::Source { source, .. } => source.downcast_ref(),
            _ => None,
        }
    }

    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        Self::Source { image: path.display().to_string(), source: source.into() }
    }
}

impl From<ProbeError> for ReadError {
    fn from(error: ProbeError) -> Self {
        match error {
            ProbeError::Refused { path, source } => {
                Self::Refused { image: path.display().to_string(), source }
            }
            ProbeError::Io { path, source } => Self::io(&path, source),
        }
    }
}

/// Reads an image front to back, or anywhere.
///
/// **Guarantees:** the extents from 0 on are ascending, do not overlap and cover the disk up to
/// [`virtual_size`](Self::virtual_size), a multiple of 512; what lies beyond the file's end is an error, not zeros;
/// memory does not grow with the image ([`ImageReader`]: about 40 MiB at most). Files are read and data decompressed on
/// blocking threads, so that neither holds up anybody else.
pub trait ExtentReader: Send {
    /// The size that a machine sees.
    fn virtual_size(&self) -> Bytes;

    /// The extent that begins at `from`, or `None` at the end. It may end before the next one differs, so two in a row
    /// can be of one kind.
    fn next_extent(&mut self, from: Bytes) -> impl Future<Output = Result<Option<Extent>, ReadError>> + Send;

    /// Fills `buf` with what lies at `offset`, zeros included.
    fn read_at(
        &mut self,
        offset: Bytes,
        buf: &mut [u8],
    ) -> impl Future<Output = Result<(), ReadError>> + Send;
}

/// A reader of any native format, in a file.
#[allow(clippy::large_enum_variant)] // there is one for each image that is read
pub enum AnyReader {
    /// Of a raw image, by its holes.
    Raw(RawReader),
    /// Of any other.
    Image(ImageReader<LocalFile>),
}

impl ExtentReader for AnyReader {
    fn virtual_size(&self) -> Bytes {
        match self {
            Self::Raw(reader) => reader.virtual_size(),
            Self::Image(reader) => reader.virtual_size(),
        }
    }

    async fn next_extent(&mut self, from: Bytes) -> Result<Option<Extent>, ReadError> {
        match self {
            Self::Raw(reader) => reader.next_extent(from).await,
            Self::Image(reader) => reader.next_extent(from).await,
        }
    }

    async fn read_at(&mut self, offset: Bytes, buf: &mut [u8]) -> Result<(), ReadError> {
        match self {
            Self::Raw(reader) => reader.read_at(offset, buf).await,
            Self::Image(reader) => reader.read_at(offset, buf).await,
        }
    }
}

/// Opens what was probed, for reading only, and nothing besides.
///
/// # Errors
/// [`ReadError::Changed`] if the file is not what `probe` says, [`ReadError::NotNative`] if a tool must read it.
pub async fn open(path: &Path, probe: &Probe) -> Result<AnyReader, ReadError> {
    if probe.format != ImageFormat::Raw {
        let file = LocalFile::open(path).await.map_err(|source| ReadError::io(path, source))?;
        return ImageReader::open(file, probe).await.map(AnyReader::Image);
    }
    let owned = path.to_owned();
    let now = on_thread(path, move || Ok(probe_file_as(ImageFormat::Raw, &owned)?)).await?;
    if now != *probe {
        return Err(ReadError::Changed { image: path.display().to_string() });
    }
    RawReader::open(path).await.map(AnyReader::Raw)
}

/// Runs `work` on a blocking thread.
pub(crate) async fn on_thread<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, ReadError> + Send + 'static,
) -> Result<T, ReadError> {
    spawn_blocking(work).await.map_err(|stopped| ReadError::io(path, io::Error::other(stopped)))?
}

/// Refuses a range that does not lie on the disk.
pub(crate) fn check_range(
    image: impl FnOnce() -> String,
    size: Bytes,
    offset: Bytes,
    len: usize,
) -> Result<(), ReadError> {
    match offset.checked_add(Bytes(len as u64)) {
        Some(end) if end <= size => Ok(()),
        _ => Err(ReadError::OutOfRange { image: image(), offset: offset.0, len }),
    }
}
