//! An object store in memory, for tests: it can be as poor, as slow and as broken as a test wants.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use berth_core::ids::Sha256Sum;
use berth_core::units::Bytes as Size;
use bytes::Bytes;
use futures::StreamExt as _;

use crate::{Body, ETag, ListPage, Listed, Object, ObjectInfo, ObjectStore, Place, PutCondition, StoreError};

/// What a store lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lacks {
    /// Conditions on writes are ignored.
    pub conditional_writes: bool,
    /// Checksums are ignored.
    pub checksums: bool,
    /// Ranges are ignored: all is sent.
    pub ranges: bool,
}

/// What happens to the next request whose operation and key match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is not done, and fails as unavailable.
    Fail,
    /// It is done, and its answer is lost.
    LoseAnswer,
}

/// One request that a store got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `put`, `get`, `head`, `delete` or `list`.
    pub op: &'static str,
    /// The key or prefix.
    pub key: String,
    /// The bytes sent with it.
    pub sent: Size,
}

#[derive(Default)]
struct Inner {
    objects: BTreeMap<String, (Bytes, ETag)>,
    faults: VecDeque<(&'static str, String, Fault)>,
    log: Vec<Request>,
    next_tag: u64,
    lacks: Lacks,
    delay: Duration,
    page: usize,
}

/// The store. Clones are the same store.
#[derive(Clone, Default)]
pub struct MemoryStore {
    inner: Arc<Mutex<Inner>>,
}

impl MemoryStore {
    /// An empty one that can do everything.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty one that lacks something.
    pub fn lacking(lacks: Lacks) -> Self {
        let store = Self::default();
        store.lock().lacks = lacks;
        store
    }

    /// Lists at most `objects` per page from now on.
    pub fn page_size(&self, objects: usize) {
        self.lock().page = objects;
    }

    /// Every request takes this long from now on.
    pub fn delay(&self, delay: Duration) {
        self.lock().delay = delay;
    }

    /// Breaks the next `op` on a key that contains `part`.
    pub fn break_next(&self, op: &'static str, part: &str, fault: Fault) {
        self.lock().faults.push_back((op, part.to_owned(), fault));
    }

    /// Puts bytes under a key, whatever was there.
    pub fn set(&self, key: &str, bytes: impl Into<Bytes>) {
        let mut inner = self.lock();
        inner.next_tag += 1;
        let tag = ETag(format!("\"{}\"", inner.next_tag));
        inner.objects.insert(key.to_owned(), (bytes.into(), tag));
    }

    /// The bytes under a key.
    pub fn bytes(&self, key: &str) -> Option<Bytes> {
        self.lock().objects.get(key).map(|(bytes, _)| bytes.clone())
    }

    /// Takes a key away.
    pub fn remove(&self, key: &str) -> bool {
        self.lock().objects.remove(key).is_some()
    }

    /// All keys that start with `prefix`.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        self.lock().objects.keys().filter(|key| key.starts_with(prefix)).cloned().collect()
    }

    /// All requests so far.
    pub fn log(&self) -> Vec<Request> {
        self.lock().log.clone()
    }

    /// Forgets the requests so far.
    pub fn clear_log(&self) {
        self.lock().log.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs a request, waits, and says what is to go wrong with it.
    async fn arrive(&self, op: &'static str, key: &str, sent: Size) -> Option<Fault> {
        let (delay, fault) = {
            let mut inner = self.lock();
            inner.log.push(Request { op, key: key.to_owned(), sent });
            let at = inner.faults.iter().position(|(on, part, _)| *on == op && key.contains(part.as_str()));
            (inner.delay, at.and_then(|at| inner.faults.remove(at)).map(|(_, _, fault)| fault))
        };
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        fault
    }
}

fn place(key: &str) -> Place {
    Place { bucket: "memory".to_owned(), key: key.to_owned() }
}

fn unavailable(key: &str) -> StoreError {
    StoreError::Unavailable { place: place(key), said: "broken by a test".to_owned() }
}

impl Inner {
    fn put(
        &mut self,
        key: &str,
        bytes: Bytes,
        condition: &PutCondition,
        sha256: Option<Sha256Sum>,
    ) -> Result<ETag, StoreError> {
        if !self.lacks.checksums && sha256.is_some_and(|sum| sum != Sha256Sum::of(&bytes)) {
            return Err(StoreError::BadDigest { place: place(key), said: "wrong sum".to_owned() });
        }
        let found = self.objects.get(key).map(|(_, tag)| tag);
        let holds = match condition {
            PutCondition::Always => true,
            PutCondition::IfAbsent => found.is_none(),
            PutCondition::IfMatch(tag) => found == Some(tag),
        };
        if !holds && !self.lacks.conditional_writes {
            return Err(StoreError::PreconditionFailed { place: place(key) });
        }
        self.next_tag += 1;
        let tag = ETag(format!("\"{}\"", self.next_tag));
        self.objects.insert(key.to_owned(), (bytes, tag.clone()));
        Ok(tag)
    }
}

impl ObjectStore for MemoryStore {
    async fn put(
        &self,
        key: &str,
        body: Body,
        condition: PutCondition,
        sha256: Option<Sha256Sum>,
    ) -> Result<Option<ETag>, StoreError> {
        let fault = self.arrive("put", key, body.len()).await;
        if fault == Some(Fault::Fail) {
            return Err(unavailable(key));
        }
        let bytes = match body {
            Body::Bytes(bytes) => bytes,
            Body::File { path, len } => {
                let local =
                    |reason: String| StoreError::LocalFile { place: place(key), path: path.clone(), reason };
                let mut bytes = std::fs::read(&path).map_err(|error| local(error.to_string()))?;
                bytes.truncate(usize::try_from(len.0).map_err(|error| local(error.to_string()))?);
                Bytes::from(bytes)
            }
        };
        let tag = self.lock().put(key, bytes, &condition, sha256)?;
        if fault == Some(Fault::LoseAnswer) { Err(unavailable(key)) } else { Ok(Some(tag)) }
    }

    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        if_match: Option<&ETag>,
    ) -> Result<Object, StoreError> {
        if self.arrive("get", key, Size::ZERO).await.is_some() {
            return Err(unavailable(key));
        }
        let (found, lacks) = {
            let inner = self.lock();
            (inner.objects.get(key).cloned(), inner.lacks)
        };
        let (bytes, tag) = found.ok_or_else(|| StoreError::NotFound { place: place(key) })?;
        if if_match.is_some_and(|wanted| *wanted != tag) {
            return Err(StoreError::PreconditionFailed { place: place(key) });
        }
        let size = Size(bytes.len() as u64);
        let part = match range {
            Some(_) if lacks.ranges => {
                return Err(StoreError::Unsupported { place: place(key), said: "no ranges".to_owned() });
            }
            Some(range) if range.start >= size.0 => {
                return Err(StoreError::InvalidRequest { place: place(key), said: "status 416".to_owned() });
            }
            Some(range) => {
                let index = |at: u64| usize::try_from(at.min(size.0)).unwrap_or(usize::MAX);
                bytes.slice(index(range.start)..index(range.end))
            }
            None => bytes,
        };
        let pieces: Vec<_> = part.chunks(64 << 10).map(|piece| Ok(part.slice_ref(piece))).collect();
        Ok(Object { size, etag: Some(tag), place: place(key), body: futures::stream::iter(pieces).boxed() })
    }

    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        if self.arrive("head", key, Size::ZERO).await.is_some() {
            return Err(unavailable(key));
        }
        match self.lock().objects.get(key) {
            Some((bytes, tag)) => Ok(ObjectInfo { size: Size(bytes.len() as u64), etag: Some(tag.clone()) }),
            None => Err(StoreError::NotFound { place: place(key) }),
        }
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        if self.arrive("delete", key, Size::ZERO).await == Some(Fault::Fail) {
            return Err(unavailable(key));
        }
        self.lock().objects.remove(key);
        Ok(())
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<ListPage, StoreError> {
        if self.arrive("list", prefix, Size::ZERO).await.is_some() {
            return Err(unavailable(prefix));
        }
        let inner = self.lock();
        let page = if inner.page == 0 { 1000 } else { inner.page };
        let mut found = inner.objects.iter().filter(|(key, _)| {
            key.starts_with(prefix) && start_after.is_none_or(|after| key.as_str() > after)
        });
        let objects = found
            .by_ref()
            .take(page)
            .map(|(key, (bytes, tag))| Listed {
                key: key.clone(),
                size: Size(bytes.len() as u64),
                etag: Some(tag.clone()),
                last_modified: None,
            })
            .collect();
        Ok(ListPage { objects, more: found.next().is_some() })
    }

    async fn lists_uploads(&self) -> Result<bool, StoreError> {
        Ok(true)
    }
}
