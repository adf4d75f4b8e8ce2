//! An image as a stream of extents.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};

use berth_core::units::Bytes;
use thiserror::Error;
use tokio::task::spawn_blocking;

use crate::probe::{ImageFormat, Probe, ProbeError, Reader, probe_file_as};
use crate::qcow2::Qcow2Reader;
use crate::raw::RawReader;

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

/// Why an image could not be opened or read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The file cannot be read.
    #[error("failed to read image {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The file system's answer.
        source: io::Error,
    },
    /// The image's structures contradict each other.
    #[error("image {path} is corrupt: {what}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Which, and how.
        what: String,
    },
    /// The image ends before something that it refers to.
    #[error("image {path} is truncated: {found} where there must be {expected}")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The least length that the file must have.
        expected: Bytes,
        /// The length that it has.
        found: Bytes,
    },
    /// Something beyond the end of the disk was asked for.
    #[error("range {offset}+{len} bytes is outside of image {path}")]
    OutOfRange {
        /// The file.
        path: PathBuf,
        /// Where the range begins.
        offset: u64,
        /// How long it is.
        len: usize,
    },
    /// The file is not what was probed.
    #[error("image {path} has changed since it was probed")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Only a tool can read the format.
    #[error("image {path} can only be read through {driver}")]
    NotNative {
        /// The file.
        path: PathBuf,
        /// The driver of `qemu-img`.
        driver: &'static str,
    },
    /// The file is not an image that may be opened.
    #[error(transparent)]
    Probe(#[from] ProbeError),
}

/// Reads an image front to back, or anywhere.
///
/// **Guarantees:** the extents from 0 on are ascending, do not overlap and cover the disk up to
/// [`virtual_size`](Self::virtual_size), a multiple of 512; what lies beyond the file's end is an error, not zeros;
/// memory does not grow with the image (qcow2: its L1 table, at most 32 MiB, and about 6 MiB). Work is done on blocking
/// threads, so that a slow disk holds up nobody else.
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

/// A reader of any native format.
pub enum AnyReader {
    /// Of a raw image.
    Raw(RawReader),
    /// Of a qcow2 image.
    Qcow2(Qcow2Reader),
}

impl ExtentReader for AnyReader {
    fn virtual_size(&self) -> Bytes {
        match self {
            Self::Raw(reader) => reader.virtual_size(),
            Self::Qcow2(reader) => reader.virtual_size(),
        }
    }

    async fn next_extent(&mut self, from: Bytes) -> Result<Option<Extent>, ReadError> {
        match self {
            Self::Raw(reader) => reader.next_extent(from).await,
            Self::Qcow2(reader) => reader.next_extent(from).await,
        }
    }

    async fn read_at(&mut self, offset: Bytes, buf: &mut [u8]) -> Result<(), ReadError> {
        match self {
            Self::Raw(reader) => reader.read_at(offset, buf).await,
            Self::Qcow2(reader) => reader.read_at(offset, buf).await,
        }
    }
}

/// Opens what was probed, for reading only, and nothing besides.
///
/// # Errors
/// [`ReadError::Changed`] if the file is not what `probe` says, [`ReadError::NotNative`] if a tool must read it.
pub async fn open(path: &Path, probe: &Probe) -> Result<AnyReader, ReadError> {
    if let Reader::QemuImg { driver } = probe.reader {
        return Err(ReadError::NotNative { path: path.to_owned(), driver });
    }
    let (owned, format) = (path.to_owned(), probe.format);
    let now = on_thread(path, move || Ok(probe_file_as(format, &owned)?)).await?;
    if now != *probe {
        return Err(ReadError::Changed { path: path.to_owned() });
    }
    match format {
        ImageFormat::Qcow2 => Qcow2Reader::open(path).await.map(AnyReader::Qcow2),
        _ => RawReader::open(path).await.map(AnyReader::Raw),
    }
}

/// Runs `work` on a blocking thread. A panic there can only be a decoder's that met contradictions.
pub(crate) async fn on_thread<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, ReadError> + Send + 'static,
) -> Result<T, ReadError> {
    match spawn_blocking(work).await {
        Ok(answer) => answer,
        Err(stopped) if stopped.is_panic() => Err(ReadError::Corrupt {
            path: path.to_owned(),
            what: "its structures make the decoder fail".into(),
        }),
        Err(stopped) => Err(ReadError::Io { path: path.to_owned(), source: io::Error::other(stopped) }),
    }
}

/// Refuses a range that does not lie on the disk.
pub(crate) fn check_range(path: &Path, size: Bytes, offset: Bytes, len: usize) -> Result<(), ReadError> {
    match offset.checked_add(Bytes(len as u64)) {
        Some(end) if end <= size => Ok(()),
        _ => Err(ReadError::OutOfRange { path: path.to_owned(), offset: offset.0, len }),
    }
}
