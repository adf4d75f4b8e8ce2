//! An image store: its description, what its object store can do, and single chunks.

use std::sync::Arc;

use berth_core::ids::{ChunkId, Sha256Sum};
use berth_core::units::Bytes as Size;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

use super::caibx::ChunkSize;
use super::frame;
use crate::layout::StoreLayout;
use crate::{Body, ETag, Listed, ObjectInfo, ObjectStore, PutCondition, StoreError, small};

/// The newest format of an image store that this program reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// Why an image store could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// It was made with another chunk size, which cannot be changed.
    #[error("image store {at} has chunks of {found}, not of {wanted}")]
    ChunkSize {
        /// The key of its description.
        at: String,
        /// The chunk size it has.
        found: Size,
        /// The chunk size asked for.
        wanted: Size,
    },
    /// It was written by a newer program.
    #[error("image store {at} has format {found}, this program knows formats up to {known}")]
    NewerVersion {
        /// The key of its description.
        at: String,
        /// Its format.
        found: u32,
        /// The newest known.
        known: u32,
    },
    /// Its description is damaged.
    #[error("the description {at} of the image store is not readable")]
    Corrupt {
        /// The key of its description.
        at: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// There is none, and it was not to be made.
    #[error("there is no image store at {at}")]
    Absent {
        /// The key that its description would have.
        at: String,
    },
    /// The object store.
    #[error("failed to open the image store at {at}")]
    Store {
        /// The key of its description.
        at: String,
        /// What the store said.
        source: StoreError,
    },
}

/// What an object store was seen to do. The default is the least, with which everything still works, more slowly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(clippy::struct_excessive_bools)] // four independent facts
pub struct Capabilities {
    /// `If-None-Match: *` and `If-Match` on writes hold.
    pub conditional_writes: bool,
    /// A body that does not fit its SHA-256 is refused.
    pub verifies_checksums: bool,
    /// Unfinished multipart uploads can be listed.
    pub lists_uploads: bool,
    /// A part of an object can be read.
    pub ranges: bool,
}

/// `berth.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Description {
    format_version: u32,
    chunk_size: u64,
    store_id: Uuid,
}

/// An image store. Clones share everything.
pub struct ChunkStore<S> {
    inner: Arc<Inner<S>>,
}

struct Inner<S> {
    store: S,
    layout: StoreLayout,
    chunk_size: ChunkSize,
    id: Uuid,
    capabilities: Capabilities,
}

impl<S> Clone for ChunkStore<S> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<S: ObjectStore> ChunkStore<S> {
    /// Opens the image store, making it if there is none, and probes what the object store can do.
    pub async fn open_or_create(
        store: S,
        layout: StoreLayout,
        chunk_size: ChunkSize,
    ) -> Result<Self, OpenError> {
        let at = layout.store();
        let failed = |source| OpenError::Store { at: at.clone(), source };
        let capabilities = probe(&store, &layout).await.map_err(failed)?;
        let found = match describe(&store, &at).await {
            Err(OpenError::Absent { .. }) => create(&store, &at, chunk_size).await?,
            other => other?,
        };
        let found_size = checked(&at, &found)?;
        if found_size != chunk_size {
            return Err(OpenError::ChunkSize { at, found: found_size.size(), wanted: chunk_size.size() });
        }
        Ok(Self::assemble(store, layout, found_size, found.store_id, capabilities))
    }

    /// Opens an image store to read from it. Nothing is written, so nothing is probed: its capabilities are the least.
    pub async fn open(store: S, layout: StoreLayout) -> Result<Self, OpenError> {
        let at = layout.store();
        let found = describe(&store, &at).await?;
        let chunk_size = checked(&at, &found)?;
        Ok(Self::assemble(store, layout, chunk_size, found.store_id, Capabilities::default()))
    }

    fn assemble(
        store: S,
        layout: StoreLayout,
        chunk_size: ChunkSize,
        id: Uuid,
        capabilities: Capabilities,
    ) -> Self {
        Self { inner: Arc::new(Inner { store, layout, chunk_size, id, capabilities }) }
    }

    /// The object store.
    pub fn store(&self) -> &S {
        &self.inner.store
    }

    /// Where its objects lie.
    pub fn layout(&self) -> &StoreLayout {
        &self.inner.layout
    }

    /// The size of its chunks.
    pub fn chunk_size(&self) -> ChunkSize {
        self.inner.chunk_size
    }

    /// Its identity, the same for all who use it.
    pub fn id(&self) -> Uuid {
        self.inner.id
    }

    /// What its object store can do.
    pub fn capabilities(&self) -> Capabilities {
        self.inner.capabilities
    }

    /// What is known of a chunk, or nothing if it is not there.
    pub(super) async fn find(&self, id: &ChunkId) -> Result<Option<ObjectInfo>, StoreError> {
        match self.store().head(&self.layout().chunk(id)).await {
            Ok(info) if info.size > Size::ZERO => Ok(Some(info)),
            Ok(_) | Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Stores a chunk's frame, with its checksum.
    pub(super) async fn put_frame(&self, id: &ChunkId, frame: Bytes) -> Result<(), StoreError> {
        let sum = Sha256Sum::of(&frame);
        self.store()
            .put(&self.layout().chunk(id), Body::Bytes(frame), PutCondition::Always, Some(sum))
            .await?;
        Ok(())
    }

    /// Reads a chunk's frame. `size` is that of the chunk: more than its frame can have is refused.
    pub(super) async fn get_frame(&self, id: &ChunkId, size: Size) -> Result<Bytes, StoreError> {
        self.store().get(&self.layout().chunk(id), None, None).await?.collect(frame::bound(size)).await
    }
}

async fn describe<S: ObjectStore>(store: &S, at: &str) -> Result<Description, OpenError> {
    match small(store, at).await {
        Ok((bytes, _)) => {
            serde_json::from_slice(&bytes).map_err(|source| OpenError::Corrupt { at: at.to_owned(), source })
        }
        Err(StoreError::NotFound { .. }) => Err(OpenError::Absent { at: at.to_owned() }),
        Err(source) => Err(OpenError::Store { at: at.to_owned(), source }),
    }
}

/// Makes the description, or finds that of whoever was faster. Read back in every case: without conditional writes the
/// last one to write wins, and all must agree on it.
async fn create<S: ObjectStore>(
    store: &S,
    at: &str,
    chunk_size: ChunkSize,
) -> Result<Description, OpenError> {
    let new = Description {
        format_version: FORMAT_VERSION,
        chunk_size: chunk_size.bytes(),
        store_id: Uuid::new_v4(),
    };
    let text =
        serde_json::to_vec_pretty(&new).map_err(|source| OpenError::Corrupt { at: at.to_owned(), source })?;
    let sum = Sha256Sum::of(&text);
    match store.put(at, Body::Bytes(text.into()), PutCondition::IfAbsent, Some(sum)).await {
        Ok(_) | Err(StoreError::PreconditionFailed { .. }) => describe(store, at).await,
        Err(source) => Err(OpenError::Store { at: at.to_owned(), source }),
    }
}

fn checked(at: &str, found: &Description) -> Result<ChunkSize, OpenError> {
    if found.format_version > FORMAT_VERSION {
        return Err(OpenError::NewerVersion {
            at: at.to_owned(),
            found: found.format_version,
            known: FORMAT_VERSION,
        });
    }
    ChunkSize::new(Size(found.chunk_size))
        .map_err(|error| OpenError::Corrupt { at: at.to_owned(), source: serde::de::Error::custom(error) })
}

/// How old the object of a probe is, by the store's clock, whose process must have died. Probing takes seconds. Unit: seconds.
const LEFT_BEHIND: i64 = 3600;

/// Tries what the object store can do, on a key of its own which is removed again. Removes those, too, that others have left who
/// died meanwhile.
pub async fn probe<S: ObjectStore>(store: &S, layout: &StoreLayout) -> Result<Capabilities, StoreError> {
    let key = layout.probe(Uuid::new_v4());
    let tried = async {
        let capabilities = try_everything(store, &key).await?;
        let probes = store.list(&layout.probes(), None).await?;
        for old in left_behind(&probes.objects, &key) {
            store.delete(old).await?;
        }
        Ok(capabilities)
    };
    let tried = tried.await;
    let removed = store.delete(&key).await;
    let capabilities = tried?;
    removed?;
    Ok(capabilities)
}

/// Those that are an hour older than `own`, which was written just now.
fn left_behind<'a>(probes: &'a [Listed], own: &str) -> Vec<&'a str> {
    let now = probes.iter().find(|probe| probe.key == own).and_then(|probe| probe.last_modified);
    let is_old = |probe: &&Listed| {
        now.zip(probe.last_modified).is_some_and(|(now, then)| now.saturating_sub(then) >= LEFT_BEHIND)
    };
    probes.iter().filter(is_old).map(|probe| probe.key.as_str()).collect()
}

async fn try_everything<S: ObjectStore>(store: &S, key: &str) -> Result<Capabilities, StoreError> {
    let put = |text: &'static [u8], condition| store.put(key, Body::Bytes(text.into()), condition, None);
    let first = put(b"first", PutCondition::Always).await?;
    let absent = refused(put(b"again", PutCondition::IfAbsent).await)?;
    let stale = refused(put(b"stale", PutCondition::IfMatch(ETag("\"0123456789abcdef\"".to_owned()))).await)?;
    let current = match first {
        Some(etag) if absent && stale => !refused(put(b"second", PutCondition::IfMatch(etag)).await)?,
        _ => false,
    };
    let wrong = Some(Sha256Sum::of(b"something else"));
    let checks =
        refused(store.put(key, Body::Bytes((&b"damaged"[..]).into()), PutCondition::Always, wrong).await)?;
    put(b"0123456789", PutCondition::Always).await?;
    let ranges = match store.get(key, Some(2..5), None).await {
        Ok(object) => object.size == Size(10) && object.collect(Size(10)).await? == b"234"[..],
        Err(error) if error.is_transient() => return Err(error),
        Err(_) => false,
    };
    Ok(Capabilities {
        conditional_writes: absent && stale && current,
        verifies_checksums: checks,
        lists_uploads: store.lists_uploads().await?,
        ranges,
    })
}

/// True if a write was refused, as it had to be. A store that is away, or lets nobody in, has said nothing.
fn refused(result: Result<Option<ETag>, StoreError>) -> Result<bool, StoreError> {
    match result {
        Ok(_) | Err(StoreError::Unsupported { .. }) => Ok(false),
        Err(
            StoreError::PreconditionFailed { .. }
            | StoreError::BadDigest { .. }
            | StoreError::InvalidRequest { .. },
        ) => Ok(true),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Fault, Lacks, MemoryStore};

    fn layout() -> StoreLayout {
        StoreLayout::new("p").unwrap()
    }

    #[tokio::test]
    async fn is_made_once_and_then_only_opened() {
        let store = MemoryStore::new();
        assert!(matches!(ChunkStore::open(store.clone(), layout()).await, Err(OpenError::Absent { .. })));
        let made = ChunkStore::open_or_create(store.clone(), layout(), ChunkSize::DEFAULT).await.unwrap();
        let opened = ChunkStore::open_or_create(store.clone(), layout(), ChunkSize::DEFAULT).await.unwrap();
        assert_eq!((made.id(), made.chunk_size()), (opened.id(), ChunkSize::DEFAULT));
        assert_eq!(ChunkStore::open(store.clone(), layout()).await.unwrap().id(), made.id());
        assert_eq!(store.keys(""), ["p/berth.json"], "probes are removed");
        let other = ChunkSize::new(Size::mib(1)).unwrap();
        let error = ChunkStore::open_or_create(store, layout(), other).await.err().unwrap();
        assert_eq!(error.to_string(), "image store p/berth.json has chunks of 256 KiB, not of 1 MiB");
    }

    #[tokio::test]
    async fn sixteen_at_once_agree() {
        let store = MemoryStore::new();
        store.delay(std::time::Duration::from_millis(1));
        let open = || ChunkStore::open_or_create(store.clone(), layout(), ChunkSize::DEFAULT);
        let all = futures::future::join_all((0..16).map(|_| open())).await;
        let ids: std::collections::HashSet<Uuid> =
            all.into_iter().map(|chunks| chunks.unwrap().id()).collect();
        assert_eq!(ids.len(), 1);
    }

    #[tokio::test]
    async fn newer_and_damaged_stores_are_refused() {
        let store = MemoryStore::new();
        store.set(
            "p/berth.json",
            r#"{"formatVersion":2,"chunkSize":262144,"storeId":"00000000-0000-0000-0000-000000000000"}"#,
        );
        let open = || ChunkStore::open(store.clone(), layout());
        assert!(matches!(open().await, Err(OpenError::NewerVersion { found: 2, known: 1, .. })));
        store.set("p/berth.json", "{");
        assert!(matches!(open().await, Err(OpenError::Corrupt { .. })));
    }

    #[test]
    fn what_a_dead_process_has_left_goes_after_an_hour_by_the_stores_clock() {
        let probe =
            |key: &str, at| Listed { key: key.to_owned(), size: Size(1), etag: None, last_modified: at };
        let probes = [
            probe("old", Some(1000)),
            probe("own", Some(4600)),
            probe("at-work", Some(1001)),
            probe("?", None),
        ];
        assert_eq!(left_behind(&probes, "own"), ["old"]);
        assert_eq!(left_behind(&probes, "at-work"), [""; 0], "its clock is behind");
        assert_eq!(left_behind(&probes, "absent"), [""; 0], "nobody knows how late it is");
    }

    #[tokio::test]
    async fn what_a_store_lacks_is_found() {
        let all = Capabilities {
            conditional_writes: true,
            verifies_checksums: true,
            lists_uploads: true,
            ranges: true,
        };
        assert_eq!(probe(&MemoryStore::new(), &layout()).await, Ok(all));
        let lacks = Lacks { conditional_writes: true, checksums: true, ranges: true };
        let none = Capabilities { lists_uploads: true, ..Capabilities::default() };
        let poor = MemoryStore::lacking(lacks);
        assert_eq!(probe(&poor, &layout()).await, Ok(none));
        assert!(poor.keys("").is_empty());
        let broken = MemoryStore::new();
        broken.break_next("get", "probe-", Fault::Fail);
        assert!(
            probe(&broken, &layout()).await.is_err_and(|error| error.is_transient()),
            "unknown is not absent"
        );
        assert!(broken.keys("").is_empty());
    }
}
