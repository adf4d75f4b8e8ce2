//! Fetching in the background: behind the reads of guests, at a limited rate, and it can be paused.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use berth_core::units::Bytes as Size;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::super::caibx::LONGEST;
use super::super::read::Item;
use super::counters::add;
use super::pace::Pace;
use super::shelf::Found;
use super::{Inner, RemoteError, RemoteImage};
use crate::ObjectStore;

/// What was fetched in the background.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Prefetched {
    /// Places of the image whose chunks are here, or were handed on.
    pub chunks: u64,
    /// Bytes that were transferred for them.
    pub transferred: Size,
    /// Places whose chunks are missing or damaged.
    pub bad: u64,
}

/// Who may fetch in the background, and how fast.
pub(super) struct Background {
    turns: Arc<Semaphore>,
    paused: watch::Sender<bool>,
    pub(super) pace: Mutex<Pace>,
}

impl Background {
    /// So many at once, without a limit of the rate.
    pub(super) fn new(turns: usize) -> Self {
        let pace = Mutex::new(Pace::new(Instant::now()));
        Self { turns: Arc::new(Semaphore::new(turns)), paused: watch::Sender::new(false), pace }
    }
}

impl<S: ObjectStore> RemoteImage<S> {
    /// Fetches all data of a part of the image, and tells the sink of each place once. Places that it was told of are not
    /// fetched again; without a sink, what is read soon is likely to be kept.
    ///
    /// Begins nothing while reads queue, while it is paused, or faster than the rate. Missing and damaged chunks are
    /// counted and passed over. Dropping it ends what it began.
    ///
    /// # Errors
    /// [`RemoteError`], if the store was away for longer than reads wait, or the index is damaged.
    pub async fn prefetch(&self, range: Range<u64>) -> Result<Prefetched, RemoteError> {
        let (inner, mut done, mut tasks) = (&self.inner, Prefetched::default(), JoinSet::new());
        let end = range.end.min(self.virtual_size().0);
        let mut at = range.start;
        while at < end {
            let part = at..end.min(at.saturating_add(LONGEST));
            let items = inner.items(&part, Instant::now() + inner.config.patience).await?;
            // One that began in the part before was met there.
            let new = |item: &Item| item.start >= part.start || part.start == range.start;
            for item in items.into_iter().filter(|item| !item.zero && new(item)) {
                if inner.has(&item) {
                    continue;
                }
                let permit = inner.background_turn().await?;
                tasks.spawn(Arc::clone(inner).bring_behind(item, permit));
                while let Some(brought) = tasks.try_join_next() {
                    done.count(brought.unwrap_or_else(|_| Err(inner.stopped())))?;
                }
            }
            at = part.end;
        }
        while let Some(brought) = tasks.join_next().await {
            done.count(brought.unwrap_or_else(|_| Err(inner.stopped())))?;
        }
        Ok(done)
    }

    /// Counts nothing as told to the sink any more, so that the next [`Self::prefetch`] tells of all: for a sink that has lost what
    /// it was told of.
    pub fn tell_again(&self) {
        self.inner.told.forget();
    }

    /// Limits the background to so many bytes per second of what is transferred; nothing is no limit.
    pub fn set_background_rate(&self, rate: Option<Size>) {
        let mut pace = self.inner.background.pace.lock().unwrap_or_else(PoisonError::into_inner);
        pace.set(rate, Instant::now());
    }

    /// Lets the background begin nothing more, or go on.
    pub fn pause_background(&self, paused: bool) {
        self.inner.background.paused.send_replace(paused);
    }
}

impl Prefetched {
    fn count(&mut self, brought: Result<Size, RemoteError>) -> Result<(), RemoteError> {
        match brought {
            Ok(transferred) => {
                self.chunks += 1;
                self.transferred = self.transferred.saturating_add(transferred);
            }
            Err(RemoteError::Missing { .. } | RemoteError::Damaged { .. }) => self.bad += 1,
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

impl<S: ObjectStore> Inner<S> {
    /// True if nothing is left to do for an item.
    fn has(&self, item: &Item) -> bool {
        if self.config.sink.is_some() { self.told.was(item.number) } else { self.kept.knows(&item.id) }
    }

    /// Waits until the background may begin another fetch.
    async fn background_turn(&self) -> Result<OwnedSemaphorePermit, RemoteError> {
        let permit = Arc::clone(&self.background.turns).acquire_owned().await.map_err(|_| self.stopped())?;
        loop {
            let free_at = self.background.pace.lock().unwrap_or_else(PoisonError::into_inner).free_at();
            sleep_until(free_at).await;
            let (mut paused, mut queued) = (self.background.paused.subscribe(), self.queued.subscribe());
            if *paused.borrow() {
                paused.wait_for(|paused| !paused).await.map_err(|_| self.stopped())?;
            } else if *queued.borrow() > 0 {
                queued.wait_for(|count| *count == 0).await.map_err(|_| self.stopped())?;
            } else {
                return Ok(permit);
            }
        }
    }

    /// Brings one item, or waits for whoever does. Returns what was transferred for it here.
    async fn bring_behind(
        self: Arc<Self>,
        item: Item,
        permit: OwnedSemaphorePermit,
    ) -> Result<Size, RemoteError> {
        loop {
            match self.kept.find(item.id) {
                Found::Kept(bytes) => {
                    self.tell(&item, bytes).await;
                    return Ok(Size::ZERO);
                }
                Found::Coming(coming) => match coming.await {
                    Ok(outcome) => {
                        self.tell(&item, outcome?).await;
                        return Ok(Size::ZERO);
                    }
                    Err(_) if self.stop.is_cancelled() => return Err(self.stopped()),
                    Err(_) => {}
                },
                Found::Absent(delivery, _) => {
                    let (_, transferred) = self.bring(item, delivery, Some(permit)).await?;
                    self.spend(transferred);
                    add(&self.counters.chunks_background, 1);
                    return Ok(transferred);
                }
            }
        }
    }
}
