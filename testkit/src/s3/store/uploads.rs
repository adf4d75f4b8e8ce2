//! Multipart uploads: open ones survive a restart, completing one moves no bytes.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use s3s::crypto::{Checksum as _, Md5};
use serde::{Deserialize, Serialize};

use super::objects::NewContent;
use super::{
    Condition, DataFile, Disk, Headers, Index, Received, Store, StoreError, StoredObject, Sums, disk,
};
use crate::s3::log::now_ms;
use crate::wire::{hex, unhex};

/// An upload, as its JSON file holds it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct UploadMeta {
    pub(crate) id: String,
    pub(crate) bucket: String,
    pub(crate) key: String,
    /// Milliseconds since 1970.
    pub(crate) initiated_ms: u64,
    pub(crate) headers: Headers,
}

/// A part, as its JSON file holds it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PartMeta {
    /// 1 to 10,000.
    pub(crate) number: u32,
    pub(crate) etag: String,
    /// Bytes.
    pub(crate) size: u64,
    /// Milliseconds since 1970.
    pub(crate) modified_ms: u64,
    file: String,
    pub(crate) sums: Sums,
}

#[derive(Debug)]
pub(super) struct Upload {
    meta: UploadMeta,
    parts: BTreeMap<u32, (PartMeta, Arc<DataFile>)>,
}

impl Upload {
    /// Names of the data files of all parts.
    pub(super) fn file_names(&self) -> Vec<String> {
        self.parts.values().map(|(part, _)| part.file.clone()).collect()
    }
}

/// A part as the client lists it when completing.
#[derive(Debug, Clone)]
pub(crate) struct Completed {
    pub(crate) number: u32,
    pub(crate) etag: String,
    /// SHA-256 in base64, if the client repeats it.
    pub(crate) sha256: Option<String>,
}

impl Store {
    pub(super) fn load_uploads(disk: &Disk, index: &mut Index) -> Result<(), StoreError> {
        for (id, path) in disk::list(&disk.upload(None))? {
            let meta = path.join("upload.json");
            // Created but not acknowledged, or completed and not yet removed.
            let meta: Option<UploadMeta> = if meta.exists() { Some(disk::read_json(&meta)?) } else { None };
            let Some(meta) = meta.filter(|m| !is_completed(index, m)) else {
                fs::remove_dir_all(&path).map_err(|e| StoreError::io(&path, e))?;
                continue;
            };
            let mut parts = BTreeMap::new();
            for (name, file) in disk::list(&path)? {
                if name != "upload.json" {
                    let part: PartMeta = disk::read_json(&file)?;
                    let data = Arc::new(disk.existing(&part.file));
                    parts.insert(part.number, (part, data));
                }
            }
            index.uploads.insert(id, Upload { meta, parts });
        }
        Ok(())
    }

    /// Opens an upload and returns its id.
    pub(crate) fn create_upload(
        &self,
        bucket: &str,
        key: &str,
        headers: Headers,
    ) -> Result<String, StoreError> {
        self.check_bucket(bucket)?;
        let id = uuid::Uuid::new_v4().simple().to_string();
        let dir = self.disk.upload(Some(&id));
        let (bucket, key) = (bucket.to_owned(), key.to_owned());
        let meta = UploadMeta { id: id.clone(), bucket, key, initiated_ms: now_ms(), headers };
        fs::create_dir(&dir).map_err(|e| StoreError::io(&dir, e))?;
        self.disk.write_json(&dir.join("upload.json"), &meta)?;
        self.index().uploads.insert(id.clone(), Upload { meta, parts: BTreeMap::new() });
        Ok(id)
    }

    fn with_upload<T>(
        &self,
        bucket: &str,
        key: &str,
        id: &str,
        read: impl FnOnce(&mut Upload) -> T,
    ) -> Result<T, StoreError> {
        let mut index = self.index();
        index.bucket(bucket)?;
        let upload = index.uploads.get_mut(id).filter(|u| u.meta.bucket == bucket && u.meta.key == key);
        upload.map(read).ok_or_else(|| StoreError::NoSuchUpload(id.to_owned()))
    }

    /// Fails unless the upload is open.
    pub(crate) fn check_upload(&self, bucket: &str, key: &str, id: &str) -> Result<(), StoreError> {
        self.with_upload(bucket, key, id, |_| ())
    }

    /// Stores a part; returns whether it replaced one.
    pub(crate) fn put_part(
        &self,
        bucket: &str,
        key: &str,
        id: &str,
        number: u32,
        received: Received,
    ) -> Result<bool, StoreError> {
        let _lock = self.lock_key(bucket, key);
        self.check_upload(bucket, key, id)?;
        let part = PartMeta {
            number,
            etag: received.etag(),
            size: received.len,
            modified_ms: now_ms(),
            file: received.file.name(),
            sums: received.sums,
        };
        self.disk.write_json(&self.disk.upload(Some(id)).join(format!("{number}.json")), &part)?;
        received.file.keep(true);
        let file = Arc::new(received.file);
        let old = self.with_upload(bucket, key, id, |u| u.parts.insert(number, (part, file)))?;
        if let Some((_, file)) = &old {
            file.keep(false);
        }
        Ok(old.is_some())
    }

    /// The parts above number `after`, at most `max`, and whether there are more.
    pub(crate) fn parts(
        &self,
        (bucket, key, id): (&str, &str, &str),
        after: u32,
        max: usize,
    ) -> Result<(Vec<PartMeta>, bool), StoreError> {
        self.with_upload(bucket, key, id, |u| {
            let mut parts: Vec<_> =
                u.parts.range(after.saturating_add(1)..).take(max + 1).map(|(_, (p, _))| p.clone()).collect();
            let more = parts.len() > max;
            parts.truncate(max);
            (parts, more)
        })
    }

    /// The open uploads of keys with `prefix`, by key and then by start, behind the given key and upload.
    pub(crate) fn uploads(
        &self,
        bucket: &str,
        prefix: &str,
        after: Option<(&str, Option<&str>)>,
        max: usize,
    ) -> Result<(Vec<UploadMeta>, bool), StoreError> {
        let index = self.index();
        index.bucket(bucket)?;
        let all = index.uploads.values().map(|u| &u.meta);
        let mut found: Vec<_> =
            all.filter(|m| m.bucket == bucket && m.key.starts_with(prefix)).cloned().collect();
        found.sort_by(|a, b| (&a.key, a.initiated_ms, &a.id).cmp(&(&b.key, b.initiated_ms, &b.id)));
        if let Some((key, id)) = after {
            let marker = id.and_then(|id| found.iter().position(|m| m.key == key && m.id == id));
            let start = marker.map_or_else(|| found.partition_point(|m| m.key.as_str() <= key), |at| at + 1);
            found.drain(..start);
        }
        let more = found.len() > max;
        found.truncate(max);
        Ok((found, more))
    }

    /// Makes the listed parts the object. The upload stays open if that is refused.
    pub(crate) fn complete(
        &self,
        (bucket, key, id): (&str, &str, &str),
        list: &[Completed],
        condition: &Condition,
    ) -> Result<(Arc<StoredObject>, bool), StoreError> {
        let _lock = self.lock_key(bucket, key);
        let min = self.min_part_size;
        let content = self.with_upload(bucket, key, id, |upload| assemble(upload, list, min))??;
        let stored = self.commit(bucket, key, content, condition)?;
        let upload = self.end_upload(id)?;
        let used: Vec<_> = list.iter().map(|c| c.number).collect();
        for (number, (_, file)) in upload.into_iter().flat_map(|u| u.parts) {
            if !used.contains(&number) {
                file.keep(false);
            }
        }
        Ok(stored)
    }

    /// Gives up an upload and its parts.
    pub(crate) fn abort(&self, bucket: &str, key: &str, id: &str) -> Result<(), StoreError> {
        let _lock = self.lock_key(bucket, key);
        self.check_upload(bucket, key, id)?;
        let upload = self.end_upload(id)?;
        upload.iter().flat_map(|u| u.parts.values()).for_each(|(_, file)| file.keep(false));
        Ok(())
    }

    fn end_upload(&self, id: &str) -> Result<Option<Upload>, StoreError> {
        let dir = self.disk.upload(Some(id));
        // First, so that a crash in between leaves no upload that names removed files.
        disk::remove(&dir.join("upload.json"))?;
        fs::remove_dir_all(&dir).map_err(|e| StoreError::io(&dir, e))?;
        Ok(self.index().uploads.remove(id))
    }
}

/// Whether the upload's object was stored before a crash kept the upload from being removed.
fn is_completed(index: &Index, upload: &UploadMeta) -> bool {
    let object = index.buckets.get(&upload.bucket).and_then(|b| b.objects.get(&upload.key));
    object.is_some_and(|o| o.meta.upload_id.as_ref() == Some(&upload.id))
}

fn assemble(upload: &Upload, list: &[Completed], min: u64) -> Result<NewContent, StoreError> {
    let mut files = Vec::new();
    let mut md5 = Md5::new();
    if let Some(pair) = list.windows(2).find(|pair| pair[1].number <= pair[0].number) {
        return Err(StoreError::InvalidPartOrder(pair[1].number));
    }
    for (at, wanted) in list.iter().enumerate() {
        let invalid = || StoreError::InvalidPart(wanted.number);
        let (part, file) = upload.parts.get(&wanted.number).ok_or_else(invalid)?;
        let other_sum = wanted.sha256.is_some() && wanted.sha256 != part.sums.sha256;
        if part.etag != wanted.etag || other_sum {
            return Err(invalid());
        }
        if at + 1 < list.len() && part.size < min {
            return Err(StoreError::EntityTooSmall(wanted.number));
        }
        md5.update(&unhex(&part.etag).unwrap_or_default());
        files.push((file.clone(), part.size));
    }
    if files.is_empty() {
        return Err(StoreError::InvalidPart(0));
    }
    let etag = format!("{}-{}", hex(&md5.finalize()), list.len());
    let headers = upload.meta.headers.clone();
    Ok(NewContent { etag, files, headers, sums: Sums::default(), upload_id: Some(upload.meta.id.clone()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &std::path::Path) -> Store {
        Store::open(dir, false, 5).unwrap()
    }

    fn upload(store: &Store, parts: &[(u32, &[u8])]) -> (String, Vec<Completed>) {
        let id = store.create_upload("bucket", "k", Headers::default()).unwrap();
        let list = parts.iter().map(|(number, data)| {
            let received = Received::of(&store.disk, data);
            let etag = received.etag();
            store.put_part("bucket", "k", &id, *number, received).unwrap();
            Completed { number: *number, etag, sha256: None }
        });
        let list = list.collect();
        (id, list)
    }

    fn complete(store: &Store, id: &str, list: &[Completed]) -> Result<Vec<u8>, StoreError> {
        let (object, _) = store.complete(("bucket", "k", id), list, &Condition::None)?;
        Ok(object.files.iter().flat_map(|f| fs::read(f.path()).unwrap()).collect())
    }

    #[test]
    fn parts_join_in_order_of_their_numbers_with_gaps() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        store.create_bucket("bucket").unwrap();
        let (id, mut list) = upload(&store, &[(7, b"end"), (2, b"start"), (3, b"unused")]);
        list.sort_by_key(|c| c.number);
        list.remove(1);
        assert_eq!(complete(&store, &id, &list).unwrap(), b"startend");
        // The unused part is gone, and so is the upload.
        assert_eq!(fs::read_dir(dir.path().join("data")).unwrap().count(), 2);
        assert!(matches!(complete(&store, &id, &list), Err(StoreError::NoSuchUpload(_))));
        assert!(matches!(store.abort("bucket", "k", &id), Err(StoreError::NoSuchUpload(_))));
        assert!(store.get("bucket", "k").unwrap().meta.etag.ends_with("-2"));
    }

    #[test]
    fn wrong_lists_are_refused_and_leave_the_upload_open() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        store.create_bucket("bucket").unwrap();
        let (id, list) = upload(&store, &[(1, b"12345"), (2, b"67890"), (3, b"x"), (4, b"y")]);
        let reversed: Vec<_> = list.iter().rev().cloned().collect();
        assert!(matches!(complete(&store, &id, &reversed), Err(StoreError::InvalidPartOrder(3))));
        assert!(matches!(complete(&store, &id, &list), Err(StoreError::EntityTooSmall(3))));
        let mut wrong = list[..2].to_vec();
        wrong[1].etag = list[0].etag.clone();
        assert!(matches!(complete(&store, &id, &wrong), Err(StoreError::InvalidPart(2))));
        assert!(matches!(complete(&store, &id, &[]), Err(StoreError::InvalidPart(0))));
        let (parts, more) = store.parts(("bucket", "k", &id), 1, 2).unwrap();
        assert_eq!((parts.iter().map(|p| p.number).collect::<Vec<_>>(), more), (vec![2, 3], true));
        assert_eq!(complete(&store, &id, &list[..3]).unwrap(), b"1234567890x");
    }

    #[test]
    fn uploads_and_parts_survive_a_restart_and_completed_ones_do_not_return() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        store.create_bucket("bucket").unwrap();
        let (id, list) = upload(&store, &[(1, b"12345"), (2, b"67890")]);
        drop(store);
        let store = open(dir.path());
        let (open_uploads, _) = store.uploads("bucket", "", None, 10).unwrap();
        assert_eq!(open_uploads.iter().map(|u| &u.id).collect::<Vec<_>>(), [&id]);
        // As after a crash between storing the object and removing the upload.
        let dir_of_upload = dir.path().join("uploads").join(&id);
        let saved = fs::read(dir_of_upload.join("upload.json")).unwrap();
        assert_eq!(complete(&store, &id, &list).unwrap(), b"1234567890");
        drop(store);
        fs::create_dir(&dir_of_upload).unwrap();
        fs::write(dir_of_upload.join("upload.json"), saved).unwrap();
        let store = open(dir.path());
        assert!(store.uploads("bucket", "", None, 10).unwrap().0.is_empty());
        assert_eq!(store.get("bucket", "k").unwrap().meta.size, 10);
    }

    #[test]
    fn upload_listings_page_through_all() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        store.create_bucket("bucket").unwrap();
        let ids: Vec<_> = ["a", "b", "b", "c"]
            .map(|k| store.create_upload("bucket", k, Headers::default()).unwrap())
            .into();
        let mut seen: Vec<UploadMeta> = Vec::new();
        loop {
            let last = seen.last().cloned();
            let after = last.as_ref().map(|u| (u.key.as_str(), Some(u.id.as_str())));
            let (page, more) = store.uploads("bucket", "", after, 1).unwrap();
            seen.extend(page);
            if !more {
                break;
            }
        }
        let mut found: Vec<_> = seen.into_iter().map(|u| u.id).collect();
        let mut ids = ids;
        found.sort();
        ids.sort();
        assert_eq!(found, ids);
        assert_eq!(store.uploads("bucket", "b", Some(("b", None)), 9).unwrap().0.len(), 0);
    }
}
