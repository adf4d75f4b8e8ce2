//! Bringing chunks and pages of the index: one fetch for all who want the same.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use berth_core::ids::ChunkId;
use berth_core::units::Bytes as Size;
use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, timeout_at};

use super::super::frame::{self, Damage};
use super::super::read::Item;
use super::counters::add;
use super::health::Bad;
use super::patience::{GivenUp, Patience};
use super::shelf::{Coming, Delivery, Found};
use super::{Inner, RemoteError};
use crate::{ObjectStore, StoreError};

/// A chunk that was fetched: its bytes, and how many were transferred.
pub(super) type Brought = Result<(Bytes, Size), RemoteError>;

/// Which places of the image the sink was told of: a bit for each item of the index.
pub(super) struct Told(Vec<AtomicU64>);

impl Told {
    pub(super) fn new(items: u64) -> Self {
        Self((0..items.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, item: u64) -> Option<(&AtomicU64, u64)> {
        let word = self.0.get(usize::try_from(item / 64).ok()?)?;
        Some((word, 1 << (item % 64)))
    }

    /// True if it was.
    pub(super) fn was(&self, item: u64) -> bool {
        self.word(item).is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    /// Takes note that it was told of nothing.
    pub(super) fn forget(&self) {
        self.0.iter().for_each(|word| word.store(0, Ordering::Release));
    }

    /// Takes note that it is; nothing if it was before.
    fn begin(&self, item: u64) -> Option<Telling<'_>> {
        let (word, bit) = self.word(item)?;
        let was = word.fetch_or(bit, Ordering::AcqRel) & bit != 0;
        (!was).then(|| Telling { word, bit, kept: false })
    }
}

/// The sink is being told. Given up or failed, it was not.
struct Telling<'a> {
    word: &'a AtomicU64,
    bit: u64,
    kept: bool,
}

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.word.fetch_and(!self.bit, Ordering::AcqRel);
        }
    }
}

/// One of the reads that wait, as long as it does.
struct Queued<'a>(&'a watch::Sender<usize>);

impl<'a> Queued<'a> {
    fn new(queued: &'a watch::Sender<usize>) -> Self {
        queued.send_modify(|count| *count += 1);
        Self(queued)
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl<S: ObjectStore> Inner<S> {
    /// The bytes of an item of data: kept, on their way, or fetched now.
    pub(super) async fn obtain(self: &Arc<Self>, item: &Item, until: Instant) -> Result<Bytes, RemoteError> {
        loop {
            let coming = match self.kept.find(item.id) {
                Found::Kept(bytes) => {
                    add(&self.counters.hits, 1);
                    return Ok(bytes);
                }
                Found::Coming(coming) => {
                    add(&self.counters.joined, 1);
                    coming
                }
                Found::Absent(delivery, coming) => {
                    let (this, item) = (Arc::clone(self), *item);
                    tokio::spawn(async move { this.bring(item, delivery, None).await });
                    coming
                }
            };
            if let Some(outcome) = self.arrival(coming, until).await {
                return outcome;
            }
        }
    }

    /// Waits for what somebody brings. Nothing if it has to be looked for again.
    async fn arrival(&self, coming: Coming, until: Instant) -> Option<Result<Bytes, RemoteError>> {
        match timeout_at(until, coming).await {
            Err(_) => Some(Err(self.late("the store did not answer in time"))),
            // The patience of an earlier reader ended, ours did not.
            Ok(Ok(Err(RemoteError::Unavailable { .. }))) if Instant::now() < until => None,
            Ok(Ok(outcome)) => Some(outcome),
            Ok(Err(_)) if self.stop.is_cancelled() => Some(Err(self.stopped())),
            // Whoever brought it was stopped.
            Ok(Err(_)) => None,
        }
    }

    /// Fetches a chunk that nobody else fetches, and tells of it. Without a `permit` it queues for one.
    pub(super) async fn bring(
        &self,
        item: Item,
        delivery: Delivery<ChunkId>,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Brought {
        let fetching = async {
            let permit = match permit {
                Some(permit) => Ok(permit),
                None => self.turn().await,
            };
            match permit {
                Ok(permit) => self.fetch(&item).await.map(|brought| (permit, brought)),
                Err(error) => Err(error),
            }
        };
        let outcome = tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(self.stopped()),
            outcome = fetching => outcome,
        };
        match outcome {
            Ok((permit, (bytes, transferred))) => {
                delivery.done(Ok(bytes.clone()));
                self.tell(&item, bytes.clone()).await;
                drop(permit);
                Ok((bytes, transferred))
            }
            Err(error) => {
                delivery.done(Err(error.clone()));
                Err(error)
            }
        }
    }

    async fn turn(&self) -> Result<OwnedSemaphorePermit, RemoteError> {
        let _queued = Queued::new(&self.queued);
        Arc::clone(&self.fetches).acquire_owned().await.map_err(|_| self.stopped())
    }

    /// Fetches a chunk ahead of its readers, unless they need the window. False if they do.
    pub(super) fn bring_if_idle(self: &Arc<Self>, item: Item) -> bool {
        if self.kept.knows(&item.id) {
            return true;
        }
        if self.fetches.available_permits() <= self.plan.fetches / 2 {
            return false;
        }
        let Ok(permit) = Arc::clone(&self.fetches).try_acquire_owned() else { return false };
        if let Found::Absent(delivery, _) = self.kept.find(item.id) {
            let this = Arc::clone(self);
            tokio::spawn(async move {
                let brought = this.bring(item, delivery, Some(permit)).await;
                add(&this.counters.chunks_ahead, u64::from(brought.is_ok()));
            });
        }
        true
    }

    /// Tells the sink, if there is one and it was not told yet.
    pub(super) async fn tell(&self, item: &Item, bytes: Bytes) {
        let Some(sink) = &self.config.sink else { return };
        let Some(mut telling) = self.told.begin(item.number) else { return };
        match sink.arrived(item.start, bytes).await {
            Ok(()) => telling.kept = true,
            Err(error) if error.kind() == io::ErrorKind::NotConnected => {
                tracing::debug!(image = %self.digest, offset = item.start, "nobody keeps chunks");
            }
            Err(error) => {
                tracing::warn!(image = %self.digest, offset = item.start, %error, "a chunk that arrived was not kept");
            }
        }
    }

    async fn fetch(&self, item: &Item) -> Brought {
        let frame = self.patience().ask(|| self.chunks.get_frame(&item.id, item.len)).await;
        let frame = match frame {
            Ok(frame) => frame,
            Err(given_up) => return Err(self.chunk_error(item, given_up)),
        };
        let (id, len, transferred) = (item.id, item.len, Size(frame.len() as u64));
        let opened = tokio::task::spawn_blocking(move || frame::decompress(&frame, len, &id)).await;
        match opened {
            Ok(Ok(data)) => {
                self.observed.chunk(id, None);
                add(&self.counters.chunks_fetched, 1);
                add(&self.counters.bytes_fetched, transferred.0);
                Ok((Bytes::from(data), transferred))
            }
            Ok(Err(damage)) => Err(self.damaged(id, damage)),
            Err(_) => Err(self.stopped()),
        }
    }

    fn chunk_error(&self, item: &Item, given_up: GivenUp) -> RemoteError {
        match given_up {
            GivenUp::Final(StoreError::NotFound { .. }) => {
                self.observed.chunk(item.id, Some(Bad::Missing));
                RemoteError::Missing { digest: self.digest, id: item.id }
            }
            // More than a frame of this chunk can be.
            GivenUp::Final(StoreError::TooLarge { .. }) => self.damaged(item.id, Damage::Frame),
            GivenUp::Final(error) => RemoteError::Refused { digest: self.digest, said: error.to_string() },
            GivenUp::Late(said) => self.late(&said),
        }
    }

    fn damaged(&self, id: ChunkId, damage: Damage) -> RemoteError {
        self.observed.chunk(id, Some(Bad::Damaged));
        RemoteError::Damaged { digest: self.digest, id, damage }
    }

    /// The bytes of a page of the index, checked.
    pub(super) async fn page(self: &Arc<Self>, page: usize, until: Instant) -> Result<Bytes, RemoteError> {
        loop {
            let coming = match self.pages.find(page) {
                Found::Kept(bytes) => return Ok(bytes),
                Found::Coming(coming) => coming,
                Found::Absent(delivery, coming) => {
                    let this = Arc::clone(self);
                    tokio::spawn(async move {
                        let outcome = tokio::select! {
                            biased;
                            () = this.stop.cancelled() => Err(this.stopped()),
                            outcome = this.fetch_page(page) => outcome,
                        };
                        delivery.done(outcome);
                    });
                    coming
                }
            };
            if let Some(outcome) = self.arrival(coming, until).await {
                return outcome;
            }
        }
    }

    async fn fetch_page(&self, page: usize) -> Result<Bytes, RemoteError> {
        let place = self.table.place(page);
        let bytes = self.patience().ask(|| self.index_part(&place)).await;
        let good = match bytes {
            Ok(bytes) => self.table.is_page(page, &bytes).then_some(bytes),
            Err(GivenUp::Late(said)) => return Err(self.late(&said)),
            Err(GivenUp::Final(_)) => None,
        };
        self.observed.page(page, good.is_none());
        add(&self.counters.index_pages, u64::from(good.is_some()));
        // A copy, because what arrived may be a part of a larger buffer.
        good.map(|bytes| Bytes::copy_from_slice(&bytes))
            .ok_or(RemoteError::IndexDamaged { digest: self.digest, page })
    }

    async fn index_part(&self, place: &std::ops::Range<u64>) -> Result<Bytes, StoreError> {
        let key = self.chunks.layout().image(&self.digest);
        let object = self.chunks.store().get(&key, Some(place.clone()), None).await?;
        object.collect(Size(place.end - place.start)).await
    }

    fn patience(&self) -> Patience<'_> {
        Patience {
            until: Instant::now() + self.config.patience,
            attempt: self.config.attempt,
            observed: &self.observed,
            counters: &self.counters,
        }
    }

    pub(super) fn stopped(&self) -> RemoteError {
        RemoteError::Stopped { digest: self.digest }
    }

    /// Spends from the background's pace.
    pub(super) fn spend(&self, transferred: Size) {
        let mut pace = self.background.pace.lock().unwrap_or_else(PoisonError::into_inner);
        pace.spend(transferred, Instant::now());
    }
}
