//! The object store behind the S3 protocol: an index in memory, rebuilt from the files of [`disk`] at every start.
//!
//! Every change of a key happens under that key's lock, so that conditions and their effect are one step. Methods block;
//! the protocol side calls them on threads that may.

mod disk;
mod list;
mod objects;
mod receive;
mod uploads;

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fs;
use std::hash::{Hash as _, Hasher as _};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

pub(crate) use self::disk::DataFile;
use self::disk::Disk;
pub(crate) use self::list::{After, ListQuery, Listed};
pub(crate) use self::objects::Condition;
pub(crate) use self::receive::{Claims, Received};
pub(crate) use self::uploads::{Completed, PartMeta, UploadMeta};

/// Locks that all keys share.
const KEY_LOCKS: usize = 64;

/// Why the store refused or failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("bucket {0} does not exist")]
    NoSuchBucket(String),
    #[error("bucket {0} exists already")]
    BucketExists(String),
    #[error("object {0} does not exist")]
    NoSuchKey(String),
    #[error("multipart upload {0} does not exist")]
    NoSuchUpload(String),
    #[error("object {0} does not meet the condition")]
    PreconditionFailed(String),
    #[error("part {0} was not uploaded or has another ETag or checksum")]
    InvalidPart(u32),
    #[error("part {0} is not above the one before it")]
    InvalidPartOrder(u32),
    #[error("part {0} is smaller than a part that is not the last may be")]
    EntityTooSmall(u32),
    #[error("file {path} failed")]
    Io { path: PathBuf, source: io::Error },
    #[error("file {path} is damaged")]
    Damaged { path: PathBuf, source: serde_json::Error },
}

impl StoreError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }
}

/// Headers that come back as they were given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Headers {
    pub(crate) content_type: Option<String>,
    pub(crate) content_encoding: Option<String>,
    pub(crate) content_disposition: Option<String>,
    pub(crate) content_language: Option<String>,
    pub(crate) cache_control: Option<String>,
    /// `x-amz-meta-*` without that prefix.
    pub(crate) metadata: BTreeMap<String, String>,
}

/// Checksums in base64, those that the client asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Sums {
    pub(crate) crc32: Option<String>,
    pub(crate) crc32c: Option<String>,
    pub(crate) crc64nvme: Option<String>,
    pub(crate) sha1: Option<String>,
    pub(crate) sha256: Option<String>,
}

/// A data file's share of an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Segment {
    /// Name in `data/`.
    pub(crate) file: String,
    /// Bytes.
    pub(crate) len: u64,
}

/// An object, as its JSON file holds it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ObjectMeta {
    pub(crate) key: String,
    /// Without quotes.
    pub(crate) etag: String,
    /// Bytes.
    pub(crate) size: u64,
    /// Time of this content, milliseconds since 1970.
    pub(crate) modified_ms: u64,
    /// Since when the key exists without a gap, milliseconds since 1970.
    pub(crate) created_ms: u64,
    pub(crate) segments: Vec<Segment>,
    pub(crate) headers: Headers,
    pub(crate) sums: Sums,
    /// The multipart upload that it came from.
    pub(crate) upload_id: Option<String>,
}

/// An object with the files that hold it.
#[derive(Debug)]
pub(crate) struct StoredObject {
    pub(crate) meta: ObjectMeta,
    pub(crate) files: Vec<Arc<DataFile>>,
}

#[derive(Debug)]
struct Bucket {
    created_ms: u64,
    objects: BTreeMap<String, Arc<StoredObject>>,
    /// The last deletions, oldest first, for stale listings.
    deleted: VecDeque<(u64, Listed)>,
}

#[derive(Debug, Default)]
struct Index {
    buckets: BTreeMap<String, Bucket>,
    uploads: BTreeMap<String, uploads::Upload>,
}

impl Index {
    fn bucket(&self, name: &str) -> Result<&Bucket, StoreError> {
        self.buckets.get(name).ok_or_else(|| StoreError::NoSuchBucket(name.to_owned()))
    }

    fn bucket_mut(&mut self, name: &str) -> Result<&mut Bucket, StoreError> {
        self.buckets.get_mut(name).ok_or_else(|| StoreError::NoSuchBucket(name.to_owned()))
    }
}

/// The object store.
#[derive(Debug)]
pub(crate) struct Store {
    disk: Disk,
    index: Mutex<Index>,
    key_locks: [Mutex<()>; KEY_LOCKS],
    min_part_size: u64,
}

impl Store {
    /// Opens the store in `dir` and removes what no object and no upload names.
    pub(crate) fn open(dir: &Path, fsync: bool, min_part_size: u64) -> Result<Self, StoreError> {
        let disk = Disk::open(dir, fsync)?;
        let mut index = Index::default();
        for (name, path) in disk::list(&disk.buckets())? {
            index.buckets.insert(name, Self::load_bucket(&disk, &path)?);
        }
        Self::load_uploads(&disk, &mut index)?;
        disk.sweep(&Self::named_files(&index))?;
        let key_locks = std::array::from_fn(|_| Mutex::new(()));
        Ok(Self { disk, index: Mutex::new(index), key_locks, min_part_size })
    }

    fn load_bucket(disk: &Disk, path: &Path) -> Result<Bucket, StoreError> {
        let created = fs::metadata(path).and_then(|m| m.created().or_else(|_| m.modified()));
        let created = created.map_err(|e| StoreError::io(path, e))?;
        let since = created.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let mut objects = BTreeMap::new();
        for (_, file) in disk::list(path)? {
            let meta: ObjectMeta = disk::read_json(&file)?;
            let files = meta.segments.iter().map(|s| Arc::new(disk.existing(&s.file))).collect();
            objects.insert(meta.key.clone(), Arc::new(StoredObject { meta, files }));
        }
        let created_ms = u64::try_from(since.as_millis()).unwrap_or(0);
        Ok(Bucket { created_ms, objects, deleted: VecDeque::new() })
    }

    fn named_files(index: &Index) -> HashSet<String> {
        let objects = index.buckets.values().flat_map(|b| b.objects.values());
        let of_objects = objects.flat_map(|o| o.meta.segments.iter().map(|s| s.file.clone()));
        let of_parts = index.uploads.values().flat_map(uploads::Upload::file_names);
        of_objects.chain(of_parts).collect()
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_key(&self, bucket: &str, key: &str) -> MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        (bucket, key).hash(&mut hasher);
        let slot = usize::try_from(hasher.finish() % KEY_LOCKS as u64).expect("below 64");
        self.key_locks[slot].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates an empty bucket.
    pub(crate) fn create_bucket(&self, name: &str) -> Result<(), StoreError> {
        let mut index = self.index();
        if index.buckets.contains_key(name) {
            return Err(StoreError::BucketExists(name.to_owned()));
        }
        let path = self.disk.bucket(name);
        fs::create_dir(&path).map_err(|e| StoreError::io(&path, e))?;
        index.buckets.insert(name.to_owned(), Self::load_bucket(&self.disk, &path)?);
        Ok(())
    }

    /// Fails unless the bucket exists.
    pub(crate) fn check_bucket(&self, name: &str) -> Result<(), StoreError> {
        self.index().bucket(name).map(|_| ())
    }

    /// Names and creation times (milliseconds since 1970) of all buckets, by name.
    pub(crate) fn buckets(&self) -> Vec<(String, u64)> {
        self.index().buckets.iter().map(|(name, b)| (name.clone(), b.created_ms)).collect()
    }
}
