//! An image in an image store, read anywhere by many readers at once: what a server of block devices needs.
//!
//! - **Never a wrong byte.** The index is compared with the image's digest when it is opened, and its pages with the sums of
//!   then when they are read again; a chunk is compared with its id.
//! - **Bounded.** All memory is divided once ([`RemoteConfig::memory`]): what is held of the index, pages of it and chunks
//!   that are kept, fetches under way, and what answers hold.
//! - **Once at a time.** Whoever wants a chunk or a page that is on its way waits for it; zeros are never fetched. A chunk is
//!   one object and one compressed frame, so it is fetched whole, and reads of parts of it share it.
//! - **Patient.** A store that is away or refuses is asked again until [`RemoteConfig::patience`] ends. What is missing or
//!   damaged fails at once. [`RemoteImage::health`] says which.
//!
//! Reads have the window of fetches to themselves; the background has its own few, and begins nothing while reads queue.

mod ahead;
mod background;
mod counters;
mod error;
mod fetch;
mod health;
mod open;
mod pace;
mod patience;
mod plan;
mod shelf;
mod table;

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_core::ids::{ChunkId, Digest};
use berth_core::units::Bytes as Size;
use bytes::Bytes;
use futures::future::{BoxFuture, try_join_all};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use self::background::Prefetched;
pub use self::counters::Counted;
pub use self::error::{OpenRemoteError, RemoteError};
pub use self::health::Health;

use self::ahead::Readers;
use self::background::Background;
use self::counters::{Counters, add};
use self::fetch::Told;
use self::health::Observed;
use self::plan::Plan;
use self::shelf::Shelf;
use self::table::Table;
use super::read::Item;
use super::store::ChunkStore;
use crate::ObjectStore;

/// How many pages of the index one question for extents may read.
const MOST_PAGES: usize = 16;

/// How an image is served.
#[derive(Clone)]
pub struct RemoteConfig {
    /// All that it may take, in bytes: at least 64 MiB and 32 chunks. What the program takes without it is not counted.
    pub memory: Size,
    /// How long a read waits for a store that is away, before it fails.
    pub patience: Duration,
    /// How long one request to the store may take, its answer included.
    pub attempt: Duration,
    /// Who is told of chunks that arrive.
    pub sink: Option<Arc<dyn Sink>>,
}

impl Default for RemoteConfig {
    /// 256 MiB, and five minutes in attempts of 20 s: as long as a device waits for a server that is away.
    fn default() -> Self {
        let (patience, attempt) = (Duration::from_secs(300), Duration::from_secs(20));
        Self { memory: Size::mib(256), patience, attempt, sink: None }
    }
}

/// Is told of verified chunks, to keep them somewhere.
pub trait Sink: Send + Sync + 'static {
    /// The image holds `data` from `offset` on. Said once for each place of the image, after it was fetched and before
    /// anything else is fetched in its stead: taking long slows fetching down, and readers do not wait for it. Two places
    /// may be told of at the same time.
    ///
    /// A place whose chunk was already at hand, because the image holds the same elsewhere, is told of by
    /// [`RemoteImage::prefetch`] alone. What failed is told of again when it is met again; that nobody is there to keep anything is
    /// [`io::ErrorKind::NotConnected`].
    fn arrived(&self, offset: u64, data: Bytes) -> BoxFuture<'_, io::Result<()>>;
}

/// A part of what was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Bytes.
    Data(Bytes),
    /// So many zeros, known from the index.
    Zero(Size),
}

impl Piece {
    /// How many bytes it stands for.
    pub fn len(&self) -> Size {
        match self {
            Self::Data(bytes) => Size(bytes.len() as u64),
            Self::Zero(len) => *len,
        }
    }

    /// True if it is empty, which no piece of a read is.
    pub fn is_empty(&self) -> bool {
        self.len() == Size::ZERO
    }
}

/// What was read. Its memory counts until it is dropped.
#[derive(Debug)]
pub struct Reading {
    /// The parts, in order, without gaps.
    pub pieces: Vec<Piece>,
    _held: Option<OwnedSemaphorePermit>,
}

/// A part of an image that is data, or zeros known from the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its length.
    pub len: Size,
    /// True if it is zeros, and not stored.
    pub zero: bool,
}

/// An image that is served. Clones are the same; with the last one all that is under way ends.
pub struct RemoteImage<S> {
    inner: Arc<Inner<S>>,
    running: Arc<DropGuard>,
}

impl<S> Clone for RemoteImage<S> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner), running: Arc::clone(&self.running) }
    }
}

struct Inner<S> {
    chunks: ChunkStore<S>,
    digest: Digest,
    config: RemoteConfig,
    plan: Plan,
    table: Table,
    pages: Arc<Shelf<usize>>,
    kept: Arc<Shelf<ChunkId>>,
    fetches: Arc<Semaphore>,
    /// How many reads wait for a fetch to begin.
    queued: watch::Sender<usize>,
    held: Arc<Semaphore>,
    readers: Mutex<Readers>,
    looking_ahead: Arc<Semaphore>,
    background: Background,
    told: Told,
    observed: Observed,
    counters: Counters,
    stop: CancellationToken,
}

impl<S: ObjectStore> RemoteImage<S> {
    /// The image's digest.
    pub fn digest(&self) -> Digest {
        self.inner.digest
    }

    /// The size of the image.
    pub fn virtual_size(&self) -> Size {
        self.inner.table.virtual_size()
    }

    /// How much of it is not known to be zeros.
    pub fn data_size(&self) -> Size {
        self.inner.table.data()
    }

    /// The size of its chunks.
    pub fn chunk_size(&self) -> Size {
        self.inner.chunks.chunk_size().size()
    }

    /// The longest read: a power of two, at most 32 MiB.
    pub fn longest_read(&self) -> Size {
        self.inner.plan.longest_read
    }

    /// How it is.
    pub fn health(&self) -> Health {
        self.inner.observed.health()
    }

    /// What was counted.
    pub fn counted(&self) -> Counted {
        self.inner.counters.counted()
    }

    /// Reads a part of the image, at most [`RemoteImage::longest_read`].
    ///
    /// # Errors
    /// [`RemoteError`]; nothing is read in part.
    pub async fn read(&self, offset: u64, len: Size) -> Result<Reading, RemoteError> {
        let range = self.inner.checked(offset, len, self.longest_read())?;
        let read = self.inner.read(range).await;
        add(&self.inner.counters.reads, 1);
        let counted = if read.is_ok() { len.0 } else { 0 };
        add(&self.inner.counters.bytes_read, counted);
        add(&self.inner.counters.failures, u64::from(read.is_err()));
        read
    }

    /// What the image holds from `offset` on: at least one extent, at most `most` of them, not beyond `len`. Neighbours
    /// differ. Nothing but the index is read.
    ///
    /// # Errors
    /// [`RemoteError`]
    pub async fn extents(&self, offset: u64, len: Size, most: usize) -> Result<Vec<Extent>, RemoteError> {
        let range = self.inner.checked(offset, len, self.virtual_size())?;
        self.inner.extents(range, most.max(1)).await
    }
}

impl<S: ObjectStore> Inner<S> {
    fn checked(&self, offset: u64, len: Size, longest: Size) -> Result<Range<u64>, RemoteError> {
        let size = self.table.virtual_size();
        match offset.checked_add(len.0) {
            Some(end) if end <= size.0 && len <= longest => Ok(offset..end),
            _ => Err(RemoteError::Range { digest: self.digest, offset, len, size, longest }),
        }
    }

    async fn read(self: &Arc<Self>, range: Range<u64>) -> Result<Reading, RemoteError> {
        let until = Instant::now() + self.config.patience;
        let items = self.items(&range, until).await?;
        let wanted = items.iter().filter(|item| !item.zero).count();
        let held = self.hold(wanted, until).await?;
        let brought = try_join_all(items.iter().map(|item| self.piece(item, &range, until)));
        self.look_ahead(&range);
        let mut pieces: Vec<Piece> = Vec::with_capacity(items.len());
        for piece in brought.await? {
            match (pieces.last_mut(), piece) {
                (Some(Piece::Zero(run)), Piece::Zero(more)) => *run = run.saturating_add(more),
                (_, piece) => pieces.push(piece),
            }
        }
        Ok(Reading { pieces, _held: held })
    }

    /// The part of an item that is within `range`.
    async fn piece(
        self: &Arc<Self>,
        item: &Item,
        range: &Range<u64>,
        until: Instant,
    ) -> Result<Piece, RemoteError> {
        let (start, end) = (item.start.max(range.start), item.end().min(range.end));
        if item.zero {
            return Ok(Piece::Zero(Size(end - start)));
        }
        let whole = self.obtain(item, until).await?;
        // An item of data is at most 4 MiB.
        let at = |offset: u64| usize::try_from(offset - item.start).unwrap_or(usize::MAX);
        Ok(Piece::Data(whole.slice(at(start)..at(end))))
    }

    /// Takes the memory of so many chunks, for an answer.
    async fn hold(&self, chunks: usize, until: Instant) -> Result<Option<OwnedSemaphorePermit>, RemoteError> {
        if chunks == 0 {
            return Ok(None);
        }
        let chunks = u32::try_from(chunks).unwrap_or(u32::MAX);
        let permit = timeout_at(until, Arc::clone(&self.held).acquire_many_owned(chunks)).await;
        match permit {
            Ok(Ok(permit)) => Ok(Some(permit)),
            Ok(Err(_)) => Err(RemoteError::Stopped { digest: self.digest }),
            Err(_) => Err(self.late("earlier reads are not answered")),
        }
    }

    /// The items that have something of `range`, which is at most some ten thousand.
    async fn items(self: &Arc<Self>, range: &Range<u64>, until: Instant) -> Result<Vec<Item>, RemoteError> {
        let mut items = Vec::new();
        if range.is_empty() {
            return Ok(items);
        }
        for page in self.table.pages_of(range) {
            let bytes = self.page(page, until).await?;
            items.extend(self.table.items_in(page, &bytes, range));
        }
        Ok(items)
    }

    async fn extents(self: &Arc<Self>, range: Range<u64>, most: usize) -> Result<Vec<Extent>, RemoteError> {
        let until = Instant::now() + self.config.patience;
        let mut extents: Vec<Extent> = Vec::new();
        if range.is_empty() {
            return Ok(extents);
        }
        for page in self.table.pages_of(&range).take(MOST_PAGES) {
            let bytes = self.page(page, until).await?;
            for item in self.table.items_in(page, &bytes, &range) {
                let len = Size(item.end().min(range.end) - item.start.max(range.start));
                match extents.last_mut() {
                    Some(last) if last.zero == item.zero => last.len = last.len.saturating_add(len),
                    _ => extents.push(Extent { len, zero: item.zero }),
                }
                if extents.len() > most {
                    extents.truncate(most);
                    return Ok(extents);
                }
            }
        }
        Ok(extents)
    }

    /// Begins to fetch what is likely to be read next, if there is room for it.
    fn look_ahead(self: &Arc<Self>, range: &Range<u64>) {
        let ahead = self.readers.lock().unwrap_or_else(PoisonError::into_inner).read(range);
        let Some(ahead) = ahead else { return };
        let Ok(turn) = Arc::clone(&self.looking_ahead).try_acquire_owned() else { return };
        let (this, end) = (Arc::clone(self), self.table.virtual_size().0);
        tokio::spawn(async move {
            let until = Instant::now() + this.config.attempt;
            // Whoever reads there is told what is wrong.
            let items =
                this.items(&(ahead.start.min(end)..ahead.end.min(end)), until).await.unwrap_or_default();
            let mut items: VecDeque<Item> = items.into_iter().filter(|item| !item.zero).collect();
            while let Some(item) = items.pop_front()
                && this.bring_if_idle(item)
            {}
            drop(turn);
        });
    }

    fn late(&self, said: &str) -> RemoteError {
        RemoteError::Unavailable { digest: self.digest, waited: self.config.patience, said: said.to_owned() }
    }
}
