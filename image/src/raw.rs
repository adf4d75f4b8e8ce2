//! Raw images: files, sparse or not, and block devices.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_core::units::Bytes;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::extents::{Extent, ExtentKind, ExtentReader, PIECE, ReadError, check_range, on_thread};
use crate::probe::SECTOR;

/// Reads a raw image. A hole of the file is a zero extent; a last sector that is not whole is padded with zeros.
pub struct RawReader {
    inner: Arc<Inner>,
    /// Kept between reads.
    buffer: Vec<u8>,
}

struct Inner {
    file: File,
    path: PathBuf,
    /// The length of the file when it was opened.
    length: Bytes,
}

impl RawReader {
    /// Opens the file for reading only.
    ///
    /// # Errors
    /// [`ReadError::Source`], with an [`io::Error`].
    pub async fn open(path: &Path) -> Result<Self, ReadError> {
        let owned = path.to_owned();
        let inner = on_thread(path, move || {
            let opened =
                File::open(&owned).and_then(|mut file| file.seek(SeekFrom::End(0)).map(|end| (file, end)));
            let (file, end) = opened.map_err(|source| ReadError::io(&owned, source))?;
            Ok(Inner { file, path: owned, length: Bytes(end) })
        });
        Ok(Self { inner: Arc::new(inner.await?), buffer: Vec::new() })
    }
}

impl ExtentReader for RawReader {
    fn virtual_size(&self) -> Bytes {
        self.inner.length.round_up(SECTOR)
    }

    async fn next_extent(&mut self, from: Bytes) -> Result<Option<Extent>, ReadError> {
        if from >= self.virtual_size() {
            return Ok(None);
        }
        let inner = Arc::clone(&self.inner);
        on_thread(&self.inner.path, move || inner.extent(from).map(Some)).await
    }

    async fn read_at(&mut self, offset: Bytes, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(|| self.inner.name(), self.virtual_size(), offset, buf.len())?;
        let mut at = offset;
        for piece in buf.chunks_mut(PIECE) {
            let (inner, mut buffer) = (Arc::clone(&self.inner), std::mem::take(&mut self.buffer));
            buffer.resize(piece.len(), 0);
            let read = move || inner.read(at, &mut buffer).map(|()| buffer);
            self.buffer = on_thread(&self.inner.path, read).await?;
            piece.copy_from_slice(&self.buffer);
            at = at.saturating_add(Bytes(piece.len() as u64));
        }
        Ok(())
    }
}

impl Inner {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// The extent at `from`, which is below the virtual size.
    fn extent(&self, from: Bytes) -> Result<Extent, ReadError> {
        let size = self.length.round_up(SECTOR);
        let kind_and_end = match self.seek(from, Whence::SeekData)? {
            Some(data) if data > from => (ExtentKind::Zero, data),
            Some(_) => (ExtentKind::Data, self.seek(from, Whence::SeekHole)?.unwrap_or(size)),
            None => (ExtentKind::Zero, size),
        };
        let (kind, end) = kind_and_end;
        // The padding belongs to what comes before it.
        let end = if end >= self.length { size } else { end };
        Ok(Extent { offset: from, len: end.saturating_sub(from), kind })
    }

    /// The next data or hole at or after `from`; `None` if there is no more. Where nobody knows of holes, all is data.
    fn seek(&self, from: Bytes, whence: Whence) -> Result<Option<Bytes>, ReadError> {
        match lseek(self.file.as_fd(), from.as_i64(), whence) {
            Ok(found) => Ok(Some(Bytes::from_i64(found))),
            Err(Errno::ENXIO) => Ok(None),
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) if matches!(whence, Whence::SeekData) => Ok(Some(from)),
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(Some(self.length)),
            Err(errno) => Err(ReadError::io(&self.path, errno.into())),
        }
    }

    fn read(&self, at: Bytes, buf: &mut [u8]) -> Result<(), ReadError> {
        let present = self.length.saturating_sub(at).0.min(buf.len() as u64);
        let (data, padding) = buf.split_at_mut(usize::try_from(present).unwrap_or(usize::MAX).min(buf.len()));
        padding.fill(0);
        self.file.read_exact_at(data, at.0).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => ReadError::Truncated {
                image: self.name(),
                expected: self.length,
                found: Bytes(self.file.metadata().map_or(0, |now| now.len())),
            },
            _ => ReadError::io(&self.path, source),
        })
    }
}
