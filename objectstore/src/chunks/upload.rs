//! Writing an image into an image store, in order, with a bounded number of chunks in flight.
//!
//! **Memory**: at most [`WINDOW`] chunks and their frames (8 MiB at 256 KiB), and the ids of the last 65,536 chunks.
//!
//! **Canonical form**: what comes out depends on the content and the chunk size only, not on how it was pushed. The
//! image is a grid of chunks; a maximal run of whole zero chunks is cut as [`zero_items`] says; every other chunk is an
//! item, the last one as short as it is, zeros or not.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use berth_core::ids::{ChunkId, Digest};
use berth_core::units::Bytes as Size;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::OnceCell;
use tokio_util::task::AbortOnDropHandle;

use super::caibx::{ChunkSize, LONGEST, zero_items};
use super::frame;
use super::index_file::{IndexFile, IndexFileError};
use super::store::ChunkStore;
use super::tombstones::Tombstones;
use super::verify::{Tally, tally};
use super::zeros::{self, zero_id};
use crate::{ObjectStore, StoreError};

/// How many chunks are in flight.
pub const WINDOW: usize = 16;
/// How many ids of stored chunks are remembered.
const REMEMBERED: usize = 65_536;

/// Why an image could not be written. After any of them, go on from the last checkpoint.
#[derive(Debug, Error)]
pub enum UploadError {
    /// A chunk did not reach the store.
    #[error("failed to store chunk {id}")]
    Chunk {
        /// Which.
        id: ChunkId,
        /// What the store said.
        source: StoreError,
    },
    /// A chunk could not be compressed.
    #[error("failed to compress chunk {id}")]
    Compress {
        /// Which.
        id: ChunkId,
        /// What the library said.
        source: std::io::Error,
    },
    /// The local index.
    #[error("failed to keep the index of the upload")]
    Index(#[from] IndexFileError),
    /// Something other than a whole chunk came where one must.
    #[error("{len} at offset {offset} is not a chunk: only the last one may be shorter than {chunk}")]
    Misaligned {
        /// Where.
        offset: u64,
        /// What came.
        len: Size,
        /// What must come.
        chunk: Size,
    },
    /// A worker is gone: the runtime is shutting down, or it panicked.
    #[error("a worker of the upload is gone")]
    Worker(#[source] tokio::task::JoinError),
}

impl UploadError {
    /// True if going on from the last checkpoint may succeed without anyone doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Chunk { source, .. } if source.is_transient())
    }
}

/// What an upload has done. A part of every checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counters {
    /// Bytes of frames that the store took.
    pub bytes_on_wire: Size,
    /// Chunks that were sent.
    pub chunks_new: u64,
    /// Chunks that were in the store, or in this image, already.
    pub chunks_reused: u64,
    /// Bytes of whole zero chunks, which are not sent.
    pub bytes_zero: Size,
    /// All other bytes.
    pub bytes_data: Size,
}

/// How far an upload is: all before `offset` is in the store and in the index on the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Checkpoint {
    /// The next byte to be pushed.
    pub offset: u64,
    /// How many items the index has.
    pub items: u64,
    /// How many bytes before `offset` are a run of zeros that may go on, and are in no item yet.
    pub zero_run: u64,
    /// What was done until here.
    pub counters: Counters,
}

impl Checkpoint {
    /// The same, without what no item of the index on the disk vouches for: the run of zeros is pushed again, which costs
    /// no request.
    pub(super) fn at_its_last_item(&self) -> Self {
        let bytes_zero = self.counters.bytes_zero.saturating_sub(Size(self.zero_run));
        let counters = Counters { bytes_zero, ..self.counters };
        Self { offset: self.offset.saturating_sub(self.zero_run), zero_run: 0, items: self.items, counters }
    }
}

/// An index that is whole, on the local disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FinishedIndex {
    /// The file.
    pub path: PathBuf,
    /// Its digest: the identity of the image.
    pub digest: Digest,
    /// Its size.
    pub index_size: Size,
    /// The size of the image.
    pub virtual_size: Size,
    /// Its chunk size.
    pub chunk_size: ChunkSize,
    /// How many items it has.
    pub items: u64,
    /// Its distinct chunks.
    pub tally: Tally,
    /// What the upload did.
    pub counters: Counters,
}

/// Writes one image. Dropping it stops what is in flight.
pub struct ChunkUploader<S> {
    shared: Arc<Shared<S>>,
    index: IndexFile,
    in_flight: VecDeque<(u64, AbortOnDropHandle<Result<Landed, UploadError>>)>,
    offset: u64,
    zero_run: u64,
    checkpoint: u64,
    counters: Counters,
}

/// What the tasks in flight share.
struct Shared<S> {
    chunks: ChunkStore<S>,
    tombstones: Arc<Tombstones>,
    known: Mutex<HashMap<ChunkId, Arc<OnceCell<u32>>>>,
}

/// A chunk that is in the store.
struct Landed {
    id: ChunkId,
    /// The size of its frame.
    stored: u32,
    sent: bool,
}

enum Content {
    Data(Bytes),
    Zero(Size),
}

impl<S: ObjectStore> ChunkUploader<S> {
    /// Begins an image whose index grows at `index`. `tombstones` are those of an open session.
    pub fn new(
        chunks: ChunkStore<S>,
        tombstones: Arc<Tombstones>,
        index: &Path,
    ) -> Result<Self, UploadError> {
        let index = IndexFile::create(index, chunks.chunk_size())?;
        Ok(Self::assemble(chunks, tombstones, index, 0, 0, Counters::default()))
    }

    /// Goes on from a checkpoint. What the index holds after it is cut off.
    ///
    /// # Errors
    /// [`IndexFileError::Lost`] if the index at `index` does not reach the checkpoint: another node's.
    pub fn resume(
        chunks: ChunkStore<S>,
        tombstones: Arc<Tombstones>,
        index: &Path,
        from: &Checkpoint,
    ) -> Result<Self, UploadError> {
        let end = from.offset.saturating_sub(from.zero_run);
        let index = IndexFile::resume(index, chunks.chunk_size(), from.items, end)?;
        Ok(Self::assemble(chunks, tombstones, index, from.offset, from.zero_run, from.counters))
    }

    fn assemble(
        chunks: ChunkStore<S>,
        tombstones: Arc<Tombstones>,
        index: IndexFile,
        offset: u64,
        zero_run: u64,
        counters: Counters,
    ) -> Self {
        let shared = Arc::new(Shared { chunks, tombstones, known: Mutex::default() });
        Self { shared, index, in_flight: VecDeque::new(), offset, zero_run, checkpoint: offset, counters }
    }

    /// The next byte to be pushed.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How much was pushed since the last checkpoint.
    pub fn since_checkpoint(&self) -> Size {
        Size(self.offset - self.checkpoint)
    }

    /// What was done so far, without what is in flight.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The local index.
    pub fn index_path(&self) -> &Path {
        self.index.path()
    }

    fn chunk(&self) -> u64 {
        self.shared.chunks.chunk_size().bytes()
    }

    /// Pushes the next chunk: exactly one, or less if it is the last. Waits while the window is full.
    pub async fn push_data(&mut self, data: Bytes) -> Result<(), UploadError> {
        let len = data.len() as u64;
        let chunk = self.chunk();
        if len == 0 {
            return Ok(());
        }
        if len > chunk || !self.offset.is_multiple_of(chunk) {
            return Err(UploadError::Misaligned { offset: self.offset, len: Size(len), chunk: Size(chunk) });
        }
        if len == chunk && zeros::is_zero(&data) {
            return self.push_zero_chunks(len).await;
        }
        self.end_zero_run().await?;
        self.offset += len;
        self.counters.bytes_data = self.counters.bytes_data.saturating_add(Size(len));
        self.enqueue(len, Content::Data(data)).await
    }

    /// Pushes zeros: whole chunks, and less than one only at the image's end.
    pub async fn push_zero(&mut self, len: Size) -> Result<(), UploadError> {
        let chunk = self.chunk();
        if len.0 > 0 && !self.offset.is_multiple_of(chunk) {
            return Err(UploadError::Misaligned { offset: self.offset, len, chunk: Size(chunk) });
        }
        let rest = len.0 % chunk;
        self.push_zero_chunks(len.0 - rest).await?;
        let rest = usize::try_from(rest).expect("less than a chunk");
        self.push_data(Bytes::from(vec![0; rest])).await
    }

    async fn push_zero_chunks(&mut self, len: u64) -> Result<(), UploadError> {
        self.offset += len;
        self.counters.bytes_zero = self.counters.bytes_zero.saturating_add(Size(len));
        self.zero_run += len;
        while self.zero_run >= LONGEST {
            self.zero_run -= LONGEST;
            self.enqueue(LONGEST, Content::Zero(Size(LONGEST))).await?;
        }
        Ok(())
    }

    async fn end_zero_run(&mut self) -> Result<(), UploadError> {
        for item in zero_items(std::mem::take(&mut self.zero_run)) {
            self.enqueue(item, Content::Zero(Size(item))).await?;
        }
        Ok(())
    }

    async fn enqueue(&mut self, len: u64, content: Content) -> Result<(), UploadError> {
        if self.in_flight.len() >= WINDOW {
            self.settle_first().await?;
        }
        let task = tokio::spawn(Arc::clone(&self.shared).land(content));
        self.in_flight.push_back((len, AbortOnDropHandle::new(task)));
        Ok(())
    }

    /// Waits for the oldest chunk in flight and writes its item.
    async fn settle_first(&mut self) -> Result<(), UploadError> {
        let Some((len, task)) = self.in_flight.front_mut() else { return Ok(()) };
        let landed = task.await.map_err(UploadError::Worker)??;
        self.index.append(*len, &landed.id, landed.stored)?;
        self.in_flight.pop_front();
        if landed.sent {
            self.counters.chunks_new = self.counters.chunks_new.saturating_add(1);
            self.counters.bytes_on_wire =
                self.counters.bytes_on_wire.saturating_add(Size(u64::from(landed.stored)));
        } else {
            self.counters.chunks_reused = self.counters.chunks_reused.saturating_add(1);
        }
        Ok(())
    }

    /// Waits for all that is in flight and makes the index durable on the local disk.
    pub async fn flush(&mut self) -> Result<Checkpoint, UploadError> {
        while !self.in_flight.is_empty() {
            self.settle_first().await?;
        }
        self.index.sync().await?;
        self.checkpoint = self.offset;
        Ok(Checkpoint {
            offset: self.offset,
            items: self.index.items(),
            zero_run: self.zero_run,
            counters: self.counters,
        })
    }

    /// The image ends here: waits for all, and completes the index. It is still to be verified and published.
    pub async fn finish(mut self) -> Result<FinishedIndex, UploadError> {
        self.end_zero_run().await?;
        self.flush().await?;
        let (path, items) = (self.index.path().to_owned(), self.index.items());
        let virtual_size = Size(self.index.end());
        let chunk_size = self.shared.chunks.chunk_size();
        let (digest, index_size) = self.index.finish().await?;
        let tallied = path.clone();
        let tally = tokio::task::spawn_blocking(move || tally(&tallied, chunk_size.size(), items))
            .await
            .map_err(UploadError::Worker)??;
        Ok(FinishedIndex {
            path,
            digest,
            index_size,
            virtual_size,
            chunk_size,
            items,
            tally,
            counters: self.counters,
        })
    }
}

impl<S: ObjectStore> Shared<S> {
    /// Sees to it that a chunk is in the store, sending it only if it must be.
    async fn land(self: Arc<Self>, content: Content) -> Result<Landed, UploadError> {
        let (id, content) = match content {
            Content::Zero(size) => {
                (zero_id(size).expect("zero items are powers of two up to 64 MiB"), content)
            }
            Content::Data(data) => blocking(move || (ChunkId::of(&data), Content::Data(data))).await?,
        };
        let cell = self.cell(&id);
        let mut sent = false;
        let said = &mut sent;
        // Whoever comes first stores it; the same chunk elsewhere in the window waits for that.
        let stored = *cell
            .get_or_try_init(|| async move {
                let (stored, new) = self.store(id, content).await?;
                *said = new;
                Ok::<u32, UploadError>(stored)
            })
            .await?;
        Ok(Landed { id, stored, sent })
    }

    async fn store(&self, id: ChunkId, content: Content) -> Result<(u32, bool), UploadError> {
        let failed = |source| UploadError::Chunk { id, source };
        // A tombstone means that the chunk may be deleted at any time after this session: it is sent again.
        if !self.tombstones.contains(&id)
            && let Some(info) = self.chunks.find(&id).await.map_err(failed)?
            && let Ok(stored) = u32::try_from(info.size.0)
        {
            return Ok((stored, false));
        }
        let frame = blocking(move || match content {
            Content::Data(data) => frame::compress(&data),
            Content::Zero(size) => zeros::compressed(size, frame::LEVEL),
        })
        .await?
        .map_err(|source| UploadError::Compress { id, source })?;
        let stored =
            u32::try_from(frame.len()).expect("frames are little larger than chunks of at most 64 MiB");
        self.chunks.put_frame(&id, frame).await.map_err(failed)?;
        Ok((stored, true))
    }

    fn cell(&self, id: &ChunkId) -> Arc<OnceCell<u32>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= REMEMBERED {
            known.clear();
        }
        Arc::clone(known.entry(*id).or_default())
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, UploadError> {
    tokio::task::spawn_blocking(work).await.map_err(UploadError::Worker)
}
