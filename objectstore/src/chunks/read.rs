//! Reading an image out of an image store.
//!
//! An index is read by ranges, or taken whole to the local disk, never into memory. Everything in it and in the chunks
//! is checked: an index may come from anyone who can write to the bucket.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_core::ids::{ChunkId, Digest, Sha256Sum};
use berth_core::units::Bytes as Size;
use bytes::{Buf as _, Bytes};
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use tokio_util::task::AbortOnDropHandle;

use super::caibx::{self, ChunkSize, HEAD, ITEM, IndexError, LONGEST, TAIL};
use super::frame::{self, Damage};
use super::local_index::{local_digest, take_index};
use super::store::ChunkStore;
use super::zeros::zero_size;
use crate::{ETag, ObjectStore, StoreError};

/// How many items of an index are read at a time: 160 KiB.
const BATCH: u64 = 4096;
/// How many chunks are in flight while an image is restored.
pub const WINDOW: usize = 16;

/// A chunk on its way into a restored image; given up when it is dropped.
type ItemTask = AbortOnDropHandle<Result<(), ReadError>>;

/// Why an image could not be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// There is no such image.
    #[error("image {digest} is not in the image store")]
    NotFound {
        /// Which.
        digest: Digest,
    },
    /// The index is not one, or not this image's.
    #[error("the index of image {digest} is not valid")]
    Index {
        /// Which.
        digest: Digest,
        /// What is wrong with it.
        source: IndexError,
    },
    /// The index has another sum than its name says.
    #[error("the index of image {digest} has the digest {found}")]
    WrongIndex {
        /// The image.
        digest: Digest,
        /// What was found.
        found: Digest,
    },
    /// A chunk that the image needs is gone.
    #[error("chunk {id} of image {digest} is not in the image store")]
    MissingChunk {
        /// The image.
        digest: Digest,
        /// The chunk.
        id: ChunkId,
    },
    /// A chunk is not what its name says. Reading again does not help.
    #[error("chunk {id} of image {digest} is damaged: {damage}")]
    CorruptChunk {
        /// The image.
        digest: Digest,
        /// The chunk.
        id: ChunkId,
        /// What is wrong with it.
        damage: Damage,
    },
    /// The store.
    #[error("failed to read image {digest}")]
    Store {
        /// The image.
        digest: Digest,
        /// What the store said.
        source: StoreError,
    },
    /// What was read could not be written.
    #[error("failed to write at offset {offset} of the target of image {digest}")]
    Target {
        /// The image.
        digest: Digest,
        /// Where.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The local index.
    #[error("failed to keep the index of image {digest} in {}", path.display())]
    Local {
        /// The image.
        digest: Digest,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The worker is gone: the runtime is shutting down, or it panicked.
    #[error("a worker that reads image {digest} is gone")]
    Worker {
        /// The image.
        digest: Digest,
        /// How it ended.
        source: tokio::task::JoinError,
    },
}

impl ReadError {
    /// True if the same may succeed later without anyone doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Store { source, .. } if source.is_transient())
    }
}

/// A part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// Which item of the index, from 0.
    pub number: u64,
    /// Where it begins in the image.
    pub start: u64,
    /// Its size.
    pub len: Size,
    /// Its chunk.
    pub id: ChunkId,
    /// True if it is all zeros, and need not be fetched.
    pub zero: bool,
}

impl Item {
    /// Where it ends in the image.
    pub fn end(&self) -> u64 {
        self.start + self.len.0
    }
}

/// Where the bytes of an index are.
#[derive(Clone)]
enum Place {
    Local(Arc<File>, PathBuf),
    Store(Option<ETag>),
}

/// An image in an image store. Clones share the index.
pub struct ImageReader<S> {
    chunks: ChunkStore<S>,
    digest: Digest,
    place: Place,
    items: u64,
    virtual_size: Size,
}

impl<S> Clone for ImageReader<S> {
    fn clone(&self) -> Self {
        Self { chunks: self.chunks.clone(), place: self.place.clone(), ..*self }
    }
}

/// Where what is read goes. Called from several threads at once, at distinct offsets.
pub trait WriteAt: Send + Sync + 'static {
    /// Writes all of `data` at `offset`.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
}

impl WriteAt for File {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_all_at(data, offset)
    }
}

/// How far a restore is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// All before this is written, or is zeros.
    pub offset: u64,
    /// What was written.
    pub bytes_written: Size,
    /// What was left out because it is zeros.
    pub bytes_skipped: Size,
    /// How many chunks were fetched.
    pub chunks: u64,
}

impl<S: ObjectStore> ImageReader<S> {
    /// Opens an image whose index stays in the store and is read by ranges, always of the same version.
    ///
    /// The index's digest is not checked by this, since that takes all of it: see [`ImageReader::verify_index`]. Every
    /// item that is read is checked to be a possible one.
    pub async fn open(chunks: ChunkStore<S>, digest: Digest) -> Result<Self, ReadError> {
        let key = chunks.layout().image(&digest);
        let info = chunks.store().head(&key).await.map_err(|source| failed(digest, source))?;
        let reader =
            Self { chunks, digest, place: Place::Store(info.etag), items: 0, virtual_size: Size::ZERO };
        reader.check(info.size).await
    }

    /// Opens an image after taking its index to `path`, checked against the digest: reads of items are then local.
    /// A whole index that lies there already is used again.
    pub async fn open_local(chunks: ChunkStore<S>, digest: Digest, path: &Path) -> Result<Self, ReadError> {
        let local = |source| ReadError::Local { digest, path: path.to_owned(), source };
        if local_digest(path).await.is_none_or(|found| found != digest) {
            take_index(&chunks, digest, path).await?;
        }
        let file = File::open(path).map_err(local)?;
        let size = Size(file.metadata().map_err(local)?.len());
        let place = Place::Local(Arc::new(file), path.to_owned());
        let reader = Self { chunks, digest, place, items: 0, virtual_size: Size::ZERO };
        reader.check(size).await
    }

    /// Reads head, tail and last item.
    async fn check(mut self, size: Size) -> Result<Self, ReadError> {
        let digest = self.digest;
        let invalid = |source| ReadError::Index { digest, source };
        if size.0 < (HEAD + TAIL) as u64 {
            return Err(invalid(IndexError::Length(size)));
        }
        let head: [u8; HEAD] = self.bytes(0).await?;
        let found = caibx::decode_head(&head).map_err(invalid)?;
        if found != self.chunks.chunk_size() {
            let found = found.bytes();
            return Err(invalid(IndexError::Format { field: "average", found }));
        }
        let tail: [u8; TAIL] = self.bytes(size.0 - TAIL as u64).await?;
        self.items = caibx::decode_tail(&tail, size).map_err(invalid)?;
        if self.items > 0 {
            self.virtual_size = Size(self.end_of(self.items - 1).await?);
        }
        Ok(self)
    }

    /// The image's digest.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The size of the image.
    pub fn virtual_size(&self) -> Size {
        self.virtual_size
    }

    /// How many items its index has.
    pub fn item_count(&self) -> u64 {
        self.items
    }

    /// The items from the one that holds byte `offset` on; none if that is the end of the image.
    pub async fn items_from(&self, offset: u64) -> Result<Items<S>, ReadError> {
        let number = self.number_at(offset).await?;
        self.items_at(number).await
    }

    /// The items from item `number` on.
    pub async fn items_at(&self, number: u64) -> Result<Items<S>, ReadError> {
        let start = if number == 0 { 0 } else { self.end_of(number.min(self.items) - 1).await? };
        Ok(Items { reader: self.clone(), next: number.min(self.items), start, batch: Bytes::new() })
    }

    /// The number of the item that holds byte `offset`: bisection, some 20 reads of 40 bytes for a tebibyte.
    async fn number_at(&self, offset: u64) -> Result<u64, ReadError> {
        let (mut low, mut high) = (0, self.items);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.end_of(middle).await? > offset {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        Ok(low)
    }

    async fn end_of(&self, number: u64) -> Result<u64, ReadError> {
        let item: [u8; ITEM] = self.bytes(HEAD as u64 + number * ITEM as u64).await?;
        Ok(caibx::decode_item(&item).0)
    }

    async fn bytes<const N: usize>(&self, at: u64) -> Result<[u8; N], ReadError> {
        let read = self.read_index(at, N as u64).await?;
        let length = IndexError::Length(Size(read.len() as u64));
        read[..].try_into().map_err(|_| ReadError::Index { digest: self.digest, source: length })
    }

    async fn read_index(&self, at: u64, len: u64) -> Result<Bytes, ReadError> {
        match &self.place {
            Place::Local(file, path) => {
                let mut buffer = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
                file.read_exact_at(&mut buffer, at).map_err(|source| ReadError::Local {
                    digest: self.digest,
                    path: path.clone(),
                    source,
                })?;
                Ok(Bytes::from(buffer))
            }
            Place::Store(etag) => {
                let key = self.chunks.layout().image(&self.digest);
                let read = async {
                    let range = Some(at..at + len);
                    self.chunks.store().get(&key, range, etag.as_ref()).await?.collect(Size(len)).await
                };
                read.await.map_err(|source| failed(self.digest, source))
            }
        }
    }

    /// Reads the whole index once and compares its sum with the digest. In pieces.
    pub async fn verify_index(&self) -> Result<(), ReadError> {
        let size = caibx::index_size(self.items).0;
        let mut hash = Sha256::new();
        let mut at = 0;
        while at < size {
            let len = (size - at).min(1 << 20);
            hash.update(&self.read_index(at, len).await?);
            at += len;
        }
        expect_digest(self.digest, Digest(Sha256Sum(hash.finalize().into())))
    }

    /// The bytes of an item, checked. Zero items are made, not fetched.
    pub async fn fetch(&self, item: &Item) -> Result<Bytes, ReadError> {
        if item.zero {
            return Ok(Bytes::from(vec![0; usize::try_from(item.len.0).unwrap_or(usize::MAX)]));
        }
        let frame = self.fetch_frame(item).await?;
        let (digest, item) = (self.digest, *item);
        tokio::task::spawn_blocking(move || open_frame(digest, &item, &frame).map(Bytes::from))
            .await
            .map_err(|source| ReadError::Worker { digest, source })?
    }

    async fn fetch_frame(&self, item: &Item) -> Result<Bytes, ReadError> {
        let digest = self.digest;
        self.chunks.get_frame(&item.id, item.len).await.map_err(|source| match source {
            StoreError::NotFound { .. } => ReadError::MissingChunk { digest, id: item.id },
            StoreError::TooLarge { .. } => {
                ReadError::CorruptChunk { digest, id: item.id, damage: Damage::Frame }
            }
            source => ReadError::Store { digest, source },
        })
    }

    /// Writes the image to `target` from the item that holds byte `offset` on. Only data is written: where the image
    /// has whole zero chunks the target must read as zeros already. `progress` is told how far everything is written.
    ///
    /// Memory: [`WINDOW`] chunks and their frames.
    pub async fn restore<T: WriteAt>(
        &self,
        target: Arc<T>,
        offset: u64,
        mut progress: impl FnMut(&Restored) + Send,
    ) -> Result<Restored, ReadError> {
        let mut items = self.items_from(offset).await?;
        let mut done = Restored { offset: items.start, ..Restored::default() };
        let mut in_flight: VecDeque<(Item, Option<ItemTask>)> = VecDeque::new();
        loop {
            let next = items.next().await?;
            let last = next.is_none();
            if let Some(item) = next {
                let task = (!item.zero).then(|| {
                    let (reader, target) = (self.clone(), Arc::clone(&target));
                    AbortOnDropHandle::new(tokio::spawn(
                        async move { reader.restore_item(&item, target).await },
                    ))
                });
                in_flight.push_back((item, task));
            }
            while in_flight.len() >= WINDOW || (last && !in_flight.is_empty()) {
                let Some((item, task)) = in_flight.pop_front() else { break };
                if let Some(task) = task {
                    task.await.map_err(|source| ReadError::Worker { digest: self.digest, source })??;
                    done.chunks += 1;
                    done.bytes_written = done.bytes_written.saturating_add(item.len);
                } else {
                    done.bytes_skipped = done.bytes_skipped.saturating_add(item.len);
                }
                done.offset = item.end();
                progress(&done);
            }
            if last {
                return Ok(done);
            }
        }
    }

    /// Fetches, checks and writes one item; the last two on a thread of their own.
    async fn restore_item<T: WriteAt>(&self, item: &Item, target: Arc<T>) -> Result<(), ReadError> {
        let frame = self.fetch_frame(item).await?;
        let (digest, item) = (self.digest, *item);
        tokio::task::spawn_blocking(move || {
            let data = open_frame(digest, &item, &frame)?;
            target.write_at(item.start, &data).map_err(|source| ReadError::Target {
                digest,
                offset: item.start,
                source,
            })
        })
        .await
        .map_err(|source| ReadError::Worker { digest, source })?
    }

    fn item(&self, number: u64, start: u64, end: u64, id: ChunkId) -> Result<Item, ReadError> {
        possible_item(self.chunks.chunk_size(), number, start, end, id)
            .map_err(|source| ReadError::Index { digest: self.digest, source })
    }
}

/// Checks that an item is one that Berth can have written.
pub(super) fn possible_item(
    chunk_size: ChunkSize,
    number: u64,
    start: u64,
    end: u64,
    id: ChunkId,
) -> Result<Item, IndexError> {
    let zero_of = zero_size(&id);
    let len = end.saturating_sub(start);
    let longest = if zero_of.is_some() { LONGEST } else { chunk_size.bytes() };
    let fits = zero_of.is_none_or(|size| size.0 == len);
    if len == 0 || len > longest || !fits {
        return Err(IndexError::Item { item: number, start, end });
    }
    Ok(Item { number, start, len: Size(len), id, zero: zero_of.is_some() })
}

/// The items of an image, in order.
pub struct Items<S> {
    reader: ImageReader<S>,
    next: u64,
    start: u64,
    batch: Bytes,
}

impl<S: ObjectStore> Items<S> {
    /// The next one.
    pub async fn next(&mut self) -> Result<Option<Item>, ReadError> {
        if self.next == self.reader.items {
            return Ok(None);
        }
        if self.batch.len() < ITEM {
            let count = (self.reader.items - self.next).min(BATCH);
            let at = HEAD as u64 + self.next * ITEM as u64;
            self.batch = self.reader.read_index(at, count * ITEM as u64).await?;
        }
        let mut item = [0; ITEM];
        if self.batch.len() < ITEM {
            let source = IndexError::Length(Size(self.batch.len() as u64));
            return Err(ReadError::Index { digest: self.reader.digest, source });
        }
        self.batch.copy_to_slice(&mut item);
        let (end, id) = caibx::decode_item(&item);
        let item = self.reader.item(self.next, self.start, end, id)?;
        self.next += 1;
        self.start = end;
        Ok(Some(item))
    }
}

/// A store's failure while an image is read.
pub(super) fn failed(digest: Digest, source: StoreError) -> ReadError {
    match source {
        StoreError::NotFound { .. } => ReadError::NotFound { digest },
        source => ReadError::Store { digest, source },
    }
}

/// The index must be that of the image.
pub(super) fn expect_digest(digest: Digest, found: Digest) -> Result<(), ReadError> {
    if found == digest { Ok(()) } else { Err(ReadError::WrongIndex { digest, found }) }
}

fn open_frame(digest: Digest, item: &Item, frame: &[u8]) -> Result<Vec<u8>, ReadError> {
    frame::decompress(frame, item.len, &item.id).map_err(|damage| ReadError::CorruptChunk {
        digest,
        id: item.id,
        damage,
    })
}
