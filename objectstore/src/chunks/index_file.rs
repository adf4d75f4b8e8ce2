//! An index as it grows on the local disk, with the stored size of every chunk beside it.
//!
//! Two files: `PATH`, the index without its tail, and `PATH.sizes`, 4 bytes per item: the stored size of its chunk,
//! little-endian. Both are cut back to a checkpoint when work resumes, so what lies after it is never trusted.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use berth_core::ids::{ChunkId, Digest, Sha256Sum};
use berth_core::units::Bytes as Size;
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use super::caibx::{self, ChunkSize, HEAD, ITEM};

const SIZE: usize = 4;

/// Why the local index could not be written or read.
#[derive(Debug, Error)]
pub enum IndexFileError {
    /// The disk.
    #[error("failed to {doing} index file {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It holds less than a checkpoint says, or something else: the work must resume from the store's copy.
    #[error("index file {} does not hold the {items} items of the checkpoint", path.display())]
    Lost {
        /// Which file.
        path: PathBuf,
        /// How many items it should hold.
        items: u64,
    },
}

/// One item with the size of its stored chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Where it ends in the image.
    pub end: u64,
    /// Its chunk.
    pub id: ChunkId,
    /// The size of the chunk as it is stored.
    pub stored: u32,
}

/// The growing index.
pub(super) struct IndexFile {
    path: PathBuf,
    index: BufWriter<File>,
    sizes: BufWriter<File>,
    items: u64,
    end: u64,
}

fn io_at<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> IndexFileError + use<'a> {
    move |source| IndexFileError::Io { doing, path: path.to_owned(), source }
}

fn sizes_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".sizes");
    PathBuf::from(name)
}

fn index_len(items: u64) -> u64 {
    HEAD as u64 + items * ITEM as u64
}

impl IndexFile {
    /// A new one, instead of whatever was there.
    pub fn create(path: &Path, chunk_size: ChunkSize) -> Result<Self, IndexFileError> {
        let mut index = BufWriter::new(File::create(path).map_err(io_at("create", path))?);
        let sizes = BufWriter::new(File::create(sizes_path(path)).map_err(io_at("create", path))?);
        index.write_all(&caibx::encode_head(chunk_size)).map_err(io_at("write", path))?;
        Ok(Self { path: path.to_owned(), index, sizes, items: 0, end: 0 })
    }

    /// Cuts back to the first `items`, the last of which must end at `end`, and goes on from there.
    pub fn resume(path: &Path, chunk_size: ChunkSize, items: u64, end: u64) -> Result<Self, IndexFileError> {
        let lost = || IndexFileError::Lost { path: path.to_owned(), items };
        let open =
            |path: &Path| OpenOptions::new().read(true).write(true).open(path).map_err(io_at("open", path));
        let mut index = match open(path) {
            Err(IndexFileError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(lost());
            }
            other => other?,
        };
        let mut sizes = open(&sizes_path(path)).map_err(|_| lost())?;
        if items > index.metadata().map_err(io_at("read", path))?.len() / ITEM as u64 {
            return Err(lost()); // also a number that nobody has ever counted to
        }
        cut(&mut index, index_len(items)).map_err(io_at("cut", path))?.ok_or_else(lost)?;
        cut(&mut sizes, items * SIZE as u64).map_err(io_at("cut", path))?.ok_or_else(lost)?;
        let mut head = [0; HEAD];
        index.rewind().and_then(|()| index.read_exact(&mut head)).map_err(io_at("read", path))?;
        if caibx::decode_head(&head) != Ok(chunk_size) {
            return Err(lost());
        }
        let mut found = 0;
        if items > 0 {
            let mut last = [0; ITEM];
            index
                .seek(SeekFrom::Start(index_len(items - 1)))
                .and_then(|_| index.read_exact(&mut last))
                .map_err(io_at("read", path))?;
            found = caibx::decode_item(&last).0;
        }
        if found != end {
            return Err(lost());
        }
        index.seek(SeekFrom::End(0)).map_err(io_at("read", path))?;
        Ok(Self {
            path: path.to_owned(),
            index: BufWriter::new(index),
            sizes: BufWriter::new(sizes),
            items,
            end,
        })
    }

    /// Adds an item of `len` bytes.
    pub fn append(&mut self, len: u64, id: &ChunkId, stored: u32) -> Result<(), IndexFileError> {
        self.end += len;
        self.items += 1;
        self.index.write_all(&caibx::encode_item(self.end, id)).map_err(io_at("write", &self.path))?;
        self.sizes.write_all(&stored.to_le_bytes()).map_err(io_at("write", &self.path))
    }

    /// How many items it has.
    pub fn items(&self) -> u64 {
        self.items
    }

    /// Where the last item ends in the image.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was added survives a power cut.
    pub async fn sync(&mut self) -> Result<(), IndexFileError> {
        let path = self.path.clone();
        let doing = "sync";
        self.index.flush().map_err(io_at(doing, &path))?;
        self.sizes.flush().map_err(io_at(doing, &path))?;
        let index = self.index.get_ref().try_clone().map_err(io_at(doing, &path))?;
        let sizes = self.sizes.get_ref().try_clone().map_err(io_at(doing, &path))?;
        tokio::task::spawn_blocking(move || index.sync_data().and_then(|()| sizes.sync_data()))
            .await
            .map_err(io::Error::other)
            .flatten()
            .map_err(io_at(doing, &path))
    }

    /// Writes the tail: the index is whole. Returns its digest and size.
    pub async fn finish(mut self) -> Result<(Digest, Size), IndexFileError> {
        let path = self.path.clone();
        self.index.write_all(&caibx::encode_tail(self.items)).map_err(io_at("write", &path))?;
        self.sync().await?;
        let size = caibx::index_size(self.items);
        let hashed = path.clone();
        let digest = tokio::task::spawn_blocking(move || hash_file(&hashed))
            .await
            .map_err(io::Error::other)
            .flatten()
            .map_err(io_at("read", &path))?;
        Ok((digest, size))
    }
}

/// Cuts a file to `len` and stands at its end; nothing if it is shorter.
fn cut(file: &mut File, len: u64) -> io::Result<Option<()>> {
    if file.metadata()?.len() < len {
        return Ok(None);
    }
    file.set_len(len)?;
    file.seek(SeekFrom::End(0))?;
    Ok(Some(()))
}

/// The digest of the file. Blocking.
pub(super) fn hash_file(path: &Path) -> io::Result<Digest> {
    let mut file = BufReader::with_capacity(256 << 10, File::open(path)?);
    let mut hash = Sha256::new();
    io::copy(&mut file, &mut HashWriter(&mut hash))?;
    Ok(Digest(Sha256Sum(hash.finalize().into())))
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads items `first..last` of an index that lies at `path`, in order. Blocking; 64 KiB of memory.
pub(super) fn entries(
    path: &Path,
    first: u64,
    last: u64,
) -> Result<impl Iterator<Item = Result<Entry, IndexFileError>> + use<>, IndexFileError> {
    let open = |path: &Path, at: u64| -> Result<BufReader<File>, IndexFileError> {
        let mut file = File::open(path).map_err(io_at("open", path))?;
        file.seek(SeekFrom::Start(at)).map_err(io_at("read", path))?;
        Ok(BufReader::with_capacity(32 << 10, file))
    };
    let mut index = open(path, index_len(first))?;
    let mut sizes = open(&sizes_path(path), first * SIZE as u64)?;
    let path = path.to_owned();
    Ok((first..last).map(move |_| {
        let mut item = [0; ITEM];
        let mut size = [0; SIZE];
        index
            .read_exact(&mut item)
            .and_then(|()| sizes.read_exact(&mut size))
            .map_err(io_at("read", &path))?;
        let (end, id) = caibx::decode_item(&item);
        Ok(Entry { end, id, stored: u32::from_le_bytes(size) })
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn resumes_at_a_checkpoint_and_distrusts_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i");
        let size = ChunkSize::DEFAULT;
        let mut file = IndexFile::create(&path, size).unwrap();
        for i in 0..5_u8 {
            file.append(10, &ChunkId::of(&[i]), u32::from(i)).unwrap();
        }
        file.sync().await.unwrap();
        drop(file);
        let mut file = IndexFile::resume(&path, size, 3, 30).unwrap();
        file.append(7, &ChunkId::of(b"other"), 99).unwrap();
        let (digest, len) = file.finish().await.unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((bytes.len() as u64, Digest(Sha256Sum::of(&bytes))), (len.0, digest));
        let all: Vec<Entry> = entries(&path, 2, 4).unwrap().collect::<Result<_, _>>().unwrap();
        assert_eq!(all[0], Entry { end: 30, id: ChunkId::of(&[2]), stored: 2 });
        assert_eq!(all[1], Entry { end: 37, id: ChunkId::of(b"other"), stored: 99 });
    }

    #[tokio::test]
    async fn a_lost_index_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i");
        let size = ChunkSize::DEFAULT;
        assert!(matches!(IndexFile::resume(&path, size, 0, 0), Err(IndexFileError::Lost { .. })));
        let mut file = IndexFile::create(&path, size).unwrap();
        file.append(10, &ChunkId::of(b"x"), 1).unwrap();
        file.sync().await.unwrap();
        drop(file);
        assert!(matches!(IndexFile::resume(&path, size, 2, 20), Err(IndexFileError::Lost { .. })));
        assert!(matches!(IndexFile::resume(&path, size, 1, 20), Err(IndexFileError::Lost { .. })));
        let wrapped = (1 << 62) + 1;
        assert!(matches!(IndexFile::resume(&path, size, wrapped, 10), Err(IndexFileError::Lost { .. })));
        let other = ChunkSize::new(Size::kib(64)).unwrap();
        assert!(matches!(IndexFile::resume(&path, other, 1, 10), Err(IndexFileError::Lost { .. })));
        assert!(IndexFile::resume(&path, size, 1, 10).is_ok());
    }
}
