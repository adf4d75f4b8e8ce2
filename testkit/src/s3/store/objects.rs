//! Single objects: conditional writes, reads, deletes, copies.

use std::sync::Arc;

use super::disk;
use super::{Headers, Listed, ObjectMeta, Received, Segment, Store, StoreError, StoredObject, Sums};
use crate::s3::log::now_ms;

/// Deletions remembered per bucket for stale listings.
const REMEMBERED_DELETIONS: usize = 4096;

/// What a write demands of the object that is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Condition {
    /// Nothing.
    #[default]
    None,
    /// `If-None-Match: *`: there is none.
    Absent,
    /// `If-Match: *`: there is one.
    Present,
    /// `If-Match: "etag"`: it has this one.
    ETag(String),
}

impl Condition {
    fn check(&self, key: &str, current: Option<&StoredObject>) -> Result<(), StoreError> {
        let holds = match self {
            Self::Absent => current.is_none(),
            Self::Present | Self::ETag(_) if current.is_none() => {
                return Err(StoreError::NoSuchKey(key.to_owned()));
            }
            Self::None | Self::Present => true,
            Self::ETag(etag) => current.is_some_and(|c| c.meta.etag == *etag),
        };
        if holds { Ok(()) } else { Err(StoreError::PreconditionFailed(key.to_owned())) }
    }
}

/// The content of a new object.
pub(super) struct NewContent {
    pub(super) etag: String,
    pub(super) files: Vec<(Arc<disk::DataFile>, u64)>,
    pub(super) headers: Headers,
    pub(super) sums: Sums,
    pub(super) upload_id: Option<String>,
}

impl NewContent {
    fn of(received: Received, headers: Headers) -> Self {
        Self {
            etag: received.etag(),
            files: vec![(Arc::new(received.file), received.len)],
            headers,
            sums: received.sums,
            upload_id: None,
        }
    }

    /// The object `key` with this content, in place of `current`.
    fn object(self, key: &str, current: Option<&StoredObject>) -> StoredObject {
        let now = now_ms();
        let meta = ObjectMeta {
            key: key.to_owned(),
            etag: self.etag,
            size: self.files.iter().map(|(_, len)| len).sum(),
            modified_ms: now,
            created_ms: current.map_or(now, |c| c.meta.created_ms),
            segments: self.files.iter().map(|(f, len)| Segment { file: f.name(), len: *len }).collect(),
            headers: self.headers,
            sums: self.sums,
            upload_id: self.upload_id,
        };
        StoredObject { meta, files: self.files.into_iter().map(|(f, _)| f).collect() }
    }
}

impl Store {
    /// Stores what was received as `key`. Returns the object and whether there was one before.
    pub(crate) fn put(
        &self,
        bucket: &str,
        key: &str,
        received: Received,
        headers: Headers,
        condition: &Condition,
    ) -> Result<(Arc<StoredObject>, bool), StoreError> {
        let content = NewContent::of(received, headers);
        let _lock = self.lock_key(bucket, key);
        self.commit(bucket, key, content, condition)
    }

    /// Answers as [`Store::put`] would, and stores nothing.
    pub(crate) fn lose(
        &self,
        bucket: &str,
        key: &str,
        received: Received,
        headers: Headers,
        condition: &Condition,
    ) -> Result<(Arc<StoredObject>, bool), StoreError> {
        let content = NewContent::of(received, headers);
        let current = self.index().bucket(bucket)?.objects.get(key).cloned();
        condition.check(key, current.as_deref())?;
        Ok((Arc::new(content.object(key, current.as_deref())), current.is_some()))
    }

    /// Makes `content` the object `key`. The caller holds the key's lock.
    pub(super) fn commit(
        &self,
        bucket: &str,
        key: &str,
        content: NewContent,
        condition: &Condition,
    ) -> Result<(Arc<StoredObject>, bool), StoreError> {
        let current = self.index().bucket(bucket)?.objects.get(key).cloned();
        condition.check(key, current.as_deref())?;
        let object = content.object(key, current.as_deref());
        self.disk.write_json(&self.disk.object(bucket, key), &object.meta)?;
        for file in &object.files {
            file.keep(true);
        }
        let object = Arc::new(object);
        self.index().bucket_mut(bucket)?.objects.insert(key.to_owned(), object.clone());
        if let Some(old) = &current {
            // Removed when the last reader has finished.
            old.files.iter().for_each(|f| f.keep(false));
        }
        Ok((object, current.is_some()))
    }

    /// The object `key`.
    pub(crate) fn get(&self, bucket: &str, key: &str) -> Result<Arc<StoredObject>, StoreError> {
        let index = self.index();
        let object = index.bucket(bucket)?.objects.get(key).cloned();
        object.ok_or_else(|| StoreError::NoSuchKey(key.to_owned()))
    }

    /// Removes the object `key`; returns whether there was one.
    pub(crate) fn delete(&self, bucket: &str, key: &str, condition: &Condition) -> Result<bool, StoreError> {
        let _lock = self.lock_key(bucket, key);
        let current = self.index().bucket(bucket)?.objects.get(key).cloned();
        condition.check(key, current.as_deref())?;
        let Some(current) = current else { return Ok(false) };
        disk::remove(&self.disk.object(bucket, key))?;
        current.files.iter().for_each(|f| f.keep(false));
        let mut index = self.index();
        let bucket = index.bucket_mut(bucket)?;
        bucket.objects.remove(key);
        bucket.deleted.push_back((now_ms(), Listed::of(&current)));
        if bucket.deleted.len() > REMEMBERED_DELETIONS {
            bucket.deleted.pop_front();
        }
        Ok(true)
    }

    /// Stores the content of `source` as `key` too, with other headers if given.
    pub(crate) fn copy(
        &self,
        source: &StoredObject,
        bucket: &str,
        key: &str,
        headers: Option<Headers>,
    ) -> Result<(Arc<StoredObject>, bool), StoreError> {
        let mut files = Vec::new();
        for (file, segment) in source.files.iter().zip(&source.meta.segments) {
            files.push((Arc::new(self.disk.link(file)?), segment.len));
        }
        let content = NewContent {
            etag: source.meta.etag.clone(),
            files,
            headers: headers.unwrap_or_else(|| source.meta.headers.clone()),
            sums: source.meta.sums.clone(),
            upload_id: None,
        };
        let _lock = self.lock_key(bucket, key);
        self.commit(bucket, key, content, &Condition::None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(store: &Store, data: &[u8]) -> Received {
        Received::of(&store.disk, data)
    }

    fn put(store: &Store, key: &str, data: &[u8], condition: &Condition) -> Result<String, StoreError> {
        store
            .put("bucket", key, received(store, data), Headers::default(), condition)
            .map(|(o, _)| o.meta.etag.clone())
    }

    fn open(dir: &std::path::Path) -> Store {
        Store::open(dir, false, 1).unwrap()
    }

    fn data_files(dir: &std::path::Path) -> usize {
        std::fs::read_dir(dir.join("data")).unwrap().count()
    }

    #[test]
    fn conditions_and_their_effect_are_one_step() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        store.create_bucket("bucket").unwrap();
        let missing = put(&store, "k", b"1", &Condition::Present).unwrap_err();
        assert!(matches!(missing, StoreError::NoSuchKey(_)));
        let first = put(&store, "k", b"1", &Condition::Absent).unwrap();
        let taken = put(&store, "k", b"2", &Condition::Absent).unwrap_err();
        assert!(matches!(taken, StoreError::PreconditionFailed(_)));
        let second = put(&store, "k", b"2", &Condition::ETag(first.clone())).unwrap();
        let stale = put(&store, "k", b"3", &Condition::ETag(first)).unwrap_err();
        assert!(matches!(stale, StoreError::PreconditionFailed(_)));
        assert_eq!(store.get("bucket", "k").unwrap().meta.etag, second);
        // Refused and replaced contents are gone from disk.
        assert_eq!(data_files(dir.path()), 1);
    }

    #[test]
    fn a_replaced_object_stays_readable_for_those_who_hold_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        store.create_bucket("bucket").unwrap();
        put(&store, "k", b"old", &Condition::None).unwrap();
        let held = store.get("bucket", "k").unwrap();
        put(&store, "k", b"new", &Condition::None).unwrap();
        assert_eq!(std::fs::read(held.files[0].path()).unwrap(), b"old");
        drop(held);
        assert_eq!(data_files(dir.path()), 1);
        assert!(store.delete("bucket", "k", &Condition::None).unwrap());
        assert!(!store.delete("bucket", "k", &Condition::None).unwrap());
        assert_eq!(data_files(dir.path()), 0);
    }

    #[test]
    fn copies_share_bytes_but_not_fate() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        store.create_bucket("bucket").unwrap();
        put(&store, "a", b"abc", &Condition::None).unwrap();
        let source = store.get("bucket", "a").unwrap();
        store.copy(&source, "bucket", "b", None).unwrap();
        drop(source);
        store.delete("bucket", "a", &Condition::None).unwrap();
        drop(store);
        let copy = open(dir.path()).get("bucket", "b").unwrap();
        assert_eq!(std::fs::read(copy.files[0].path()).unwrap(), b"abc");
    }

    #[test]
    fn what_no_object_names_is_removed_at_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        store.create_bucket("bucket").unwrap();
        put(&store, "k", b"1", &Condition::None).unwrap();
        std::fs::write(dir.path().join("data/stray"), "half an upload").unwrap();
        std::fs::write(dir.path().join("tmp/half"), "{").unwrap();
        drop(store);
        let store = open(dir.path());
        assert_eq!(data_files(dir.path()), 1);
        assert_eq!(store.get("bucket", "k").unwrap().meta.size, 1);
        assert!(matches!(store.get("other", "k"), Err(StoreError::NoSuchBucket(_))));
    }
}
