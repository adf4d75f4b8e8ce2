//! Opening an image that is to be served: all of its index is read once, in pieces.

use std::sync::{Arc, Mutex};

use berth_core::ids::Digest;
use berth_core::units::Bytes as Size;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::super::caibx::{self, HEAD, ITEM, IndexError, TAIL};
use super::super::store::ChunkStore;
use super::ahead::Readers;
use super::background::Background;
use super::counters::Counters;
use super::fetch::Told;
use super::health::Observed;
use super::patience::{GivenUp, Patience};
use super::plan::{Plan, least};
use super::shelf::Shelf;
use super::table::{PAGE, Reading, Table};
use super::{Inner, OpenRemoteError, RemoteConfig, RemoteError, RemoteImage};
use crate::{ObjectStore, StoreError};

/// How many items are read at a time: 640 KiB.
const STRIDE: u64 = 16 * PAGE;
/// How many such pieces are on their way at once.
const AHEAD: usize = 4;

/// What it takes to read an index.
struct Opening<'a, S> {
    chunks: &'a ChunkStore<S>,
    digest: Digest,
    config: &'a RemoteConfig,
    patience: Patience<'a>,
}

impl<S: ObjectStore> RemoteImage<S> {
    /// Opens an image, after its whole index was read and compared with its digest.
    ///
    /// # Errors
    /// [`OpenRemoteError`]. A store that is away is waited for as reads wait.
    pub async fn open(
        chunks: ChunkStore<S>,
        digest: Digest,
        config: RemoteConfig,
    ) -> Result<Self, OpenRemoteError> {
        let (chunk_size, memory) = (chunks.chunk_size(), config.memory);
        let plan = Plan::of(memory, chunk_size).ok_or(OpenRemoteError::Memory {
            digest,
            memory,
            chunk_size: chunk_size.size(),
            least: least(chunk_size),
        })?;
        let (observed, counters) = (Observed::default(), Counters::default());
        let patience = Patience {
            until: Instant::now() + config.patience,
            attempt: config.attempt,
            observed: &observed,
            counters: &counters,
        };
        let opening = Opening { chunks: &chunks, digest, config: &config, patience };
        let table = opening.table(&plan).await?;
        let stop = CancellationToken::new();
        let ahead = plan.ahead(chunk_size);
        let inner = Inner {
            digest,
            plan,
            pages: Shelf::new(plan.pages),
            kept: Shelf::new(plan.kept),
            fetches: Arc::new(Semaphore::new(plan.fetches)),
            queued: watch::Sender::new(0),
            held: Arc::new(Semaphore::new(plan.held)),
            readers: Mutex::new(Readers::new(chunk_size.bytes(), ahead.0)),
            looking_ahead: Arc::new(Semaphore::new(1)),
            background: Background::new(plan.background),
            told: Told::new(if config.sink.is_some() { table.items() } else { 0 }),
            stop: stop.clone(),
            chunks,
            config,
            table,
            observed,
            counters,
        };
        Ok(Self { inner: Arc::new(inner), running: Arc::new(stop.drop_guard()) })
    }
}

impl<S: ObjectStore> Opening<'_, S> {
    async fn table(&self, plan: &Plan) -> Result<Table, OpenRemoteError> {
        let (digest, chunk_size) = (self.digest, self.chunks.chunk_size());
        let invalid = |source| OpenRemoteError::Index { digest, source };
        let key = self.chunks.layout().image(&digest);
        let info = self.patience.ask(|| self.chunks.store().head(&key)).await;
        let size = info.map_err(|given_up| self.failed(given_up))?.size;
        if size.0 < (HEAD + TAIL) as u64 {
            return Err(invalid(IndexError::Length(size)));
        }
        let (head, tail) =
            tokio::try_join!(self.part(0, HEAD as u64), self.part(size.0 - TAIL as u64, TAIL as u64))?;
        let short = |bytes: &Bytes| invalid(IndexError::Length(Size(bytes.len() as u64)));
        let head: [u8; HEAD] = head[..].try_into().map_err(|_| short(&head))?;
        let found = caibx::decode_head(&head).map_err(invalid)?;
        if found != chunk_size {
            return Err(invalid(IndexError::Format { field: "average", found: found.bytes() }));
        }
        let last: [u8; TAIL] = tail[..].try_into().map_err(|_| short(&tail))?;
        let items = caibx::decode_tail(&last, size).map_err(invalid)?;
        if !plan.holds(items) {
            return Err(OpenRemoteError::Items { digest, items, memory: self.config.memory });
        }
        let mut reading = Reading::new(chunk_size, items, &head);
        let strides = (0..items.div_ceil(STRIDE)).map(|stride| {
            let first = stride * STRIDE;
            let count = STRIDE.min(items - first);
            self.part(HEAD as u64 + first * ITEM as u64, count * ITEM as u64)
        });
        let mut parts = stream::iter(strides).buffered(AHEAD);
        while let Some(part) = parts.next().await {
            reading.add(&part?).map_err(invalid)?;
        }
        let (table, found) = reading.finish(&tail);
        if found != digest {
            return Err(OpenRemoteError::WrongIndex { digest, found });
        }
        Ok(table)
    }

    /// Exactly so many bytes of the index.
    async fn part(&self, at: u64, len: u64) -> Result<Bytes, OpenRemoteError> {
        let key = self.chunks.layout().image(&self.digest);
        let read = || async {
            let object = self.chunks.store().get(&key, Some(at..at + len), None).await?;
            object.collect(Size(len)).await
        };
        let bytes = self.patience.ask(read).await.map_err(|given_up| self.failed(given_up))?;
        if bytes.len() as u64 != len {
            let source = IndexError::Length(Size(bytes.len() as u64));
            return Err(OpenRemoteError::Index { digest: self.digest, source });
        }
        Ok(bytes)
    }

    fn failed(&self, given_up: GivenUp) -> OpenRemoteError {
        let digest = self.digest;
        match given_up {
            GivenUp::Final(StoreError::NotFound { .. }) => OpenRemoteError::NotFound { digest },
            GivenUp::Final(error) => RemoteError::Refused { digest, said: error.to_string() }.into(),
            GivenUp::Late(said) => {
                RemoteError::Unavailable { digest, waited: self.config.patience, said }.into()
            }
        }
    }
}
