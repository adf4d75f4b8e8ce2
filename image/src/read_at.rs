//! Bytes that can be read anywhere: of a file, of an object behind an address.

use std::fs::File;
use std::future::Future;
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_core::units::Bytes;
use bytes::Bytes as Buffer;
use tokio::task::spawn_blocking;

/// Bytes of a known number that can be read anywhere, in any order.
///
/// **Assumptions:** the bytes do not change while they are read. What can change (an object behind an address) is the
/// implementation's to notice, by a version that each request names; it then answers with an error of its own. So is
/// trying again: an error ends whatever read here.
///
/// A call may be a request over a network. The readers of this crate make few and large ones, mostly ascending, and one
/// after the other.
pub trait ReadAt: Send + Sync + 'static {
    /// Why bytes cannot be had. It comes out again in [`crate::ReadError::Source`].
    type Error: std::error::Error + Send + Sync + 'static;

    /// How many bytes there are. The same in every call.
    fn size(&self) -> Bytes;

    /// What errors call the image: a path, or an address without secrets.
    fn name(&self) -> String;

    /// The `len` bytes at `at`, which lie within [`size`](Self::size). `len` is at most 4 MiB and 512 KiB.
    ///
    /// # Errors
    /// Whenever there would be fewer bytes.
    fn read_at(&self, at: Bytes, len: usize) -> impl Future<Output = Result<Buffer, Self::Error>> + Send;
}

/// A file on this machine, or a block device, open for reading. Reads run on blocking threads.
#[derive(Clone, Debug)]
pub struct LocalFile {
    file: Arc<File>,
    path: PathBuf,
    /// When it was opened.
    size: Bytes,
}

impl LocalFile {
    /// Opens the file for reading only.
    ///
    /// # Errors
    /// The file system's.
    pub async fn open(path: &Path) -> io::Result<Self> {
        let path = path.to_owned();
        let opened = spawn_blocking(move || {
            let mut file = File::open(&path)?;
            // Metadata have no length for block devices.
            let size = Bytes(file.seek(SeekFrom::End(0))?);
            Ok(Self { file: Arc::new(file), path, size })
        });
        opened.await.map_err(io::Error::other)?
    }
}

impl ReadAt for LocalFile {
    type Error = io::Error;

    fn size(&self) -> Bytes {
        self.size
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    async fn read_at(&self, at: Bytes, len: usize) -> io::Result<Buffer> {
        let file = Arc::clone(&self.file);
        let read = spawn_blocking(move || {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, at.0).map(|()| Buffer::from(bytes))
        });
        read.await.map_err(io::Error::other)?
    }
}
