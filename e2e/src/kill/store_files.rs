//! What really lies in the object store: read from the files of the test server, not asked of anybody.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

/// The heads of a `.caibx` before its items, in bytes: `CaFormatIndex`, then that of the table.
const ITEMS_AT: usize = 48 + 16;
/// An item: where its chunk ends, then the chunk's id.
const ITEM: usize = 8 + 32;

/// Why the files cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// One cannot be read or written.
    #[error("failed to read or write {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is not what the server writes.
    #[error("{path} is not the description of an object")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

#[derive(Debug, Deserialize)]
struct Meta {
    key: String,
    size: u64,
    segments: Vec<Segment>,
}

#[derive(Debug, Deserialize)]
struct Segment {
    file: String,
}

/// An object.
#[derive(Debug, Clone)]
pub struct Object {
    /// Its bytes.
    pub size: u64,
    /// The file that holds them.
    pub file: PathBuf,
}

/// The objects of one image store, by key without the store's prefix.
#[derive(Debug, Default)]
pub struct StoreFiles {
    objects: BTreeMap<String, Object>,
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> FilesError {
    let path = path.to_owned();
    move |source| FilesError::File { path, source }
}

impl StoreFiles {
    /// Reads what `data`, the folder of a test server, holds below `prefix` of `bucket`.
    ///
    /// # Errors
    /// [`FilesError`]. An object that is replaced or deleted meanwhile is no error.
    pub fn read(data: &Path, bucket: &str, prefix: &str) -> Result<Self, FilesError> {
        let dir = data.join("objects").join(bucket);
        let mut objects = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(failed(&dir))? {
            let path = entry.map_err(failed(&dir))?.path();
            let text = match fs::read(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(FilesError::File { path, source }),
            };
            let meta: Meta =
                serde_json::from_slice(&text).map_err(|source| FilesError::Damaged { path, source })?;
            let Some(key) = meta.key.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('/')) else {
                continue;
            };
            let file = meta.segments.first().map(|one| data.join("data").join(&one.file)).unwrap_or_default();
            objects.insert(key.to_owned(), Object { size: meta.size, file });
        }
        Ok(Self { objects })
    }

    /// The keys below `folder`.
    pub fn keys<'a>(&'a self, folder: &'a str) -> impl Iterator<Item = &'a str> {
        self.objects.keys().map(String::as_str).filter(move |key| key.starts_with(folder))
    }

    /// The keys below `folder` that nothing takes away any more. What a probe of the store leaves behind that is killed is taken away by
    /// another one an hour later.
    pub fn left_in<'a>(&'a self, folder: &'a str) -> impl Iterator<Item = &'a str> {
        self.keys(folder).filter(|key| !key.starts_with("sessions/probe-"))
    }

    /// The ids of the chunks that the index of `digest` names.
    ///
    /// # Errors
    /// In words: the index is not there, or not one of this digest.
    pub fn chunks_of(&self, digest: &str) -> Result<BTreeSet<String>, String> {
        let hash = digest.strip_prefix("sha256:").unwrap_or(digest);
        let key = format!("images/{hash}.caibx");
        let object = self.objects.get(&key).ok_or_else(|| format!("{key} is not in the store"))?;
        let bytes = fs::read(&object.file).map_err(|error| format!("{key} cannot be read: {error}"))?;
        if hex(&Sha256::digest(&bytes)) != hash {
            return Err(format!("{key} has another content than its name says"));
        }
        let items = bytes.get(ITEMS_AT..bytes.len().saturating_sub(ITEM)).unwrap_or_default();
        Ok(items.chunks_exact(ITEM).map(|item| hex(&item[8..])).collect())
    }

    /// What a ready image lacks: its index, its manifest, chunks.
    pub fn lacks(&self, digest: &str, namespace: &str, name: &str) -> Vec<String> {
        let mut lacking = Vec::new();
        let manifest = format!("manifests/{namespace}/{name}.json");
        if !self.objects.contains_key(&manifest) {
            lacking.push(manifest);
        }
        match self.chunks_of(digest) {
            Ok(ids) => {
                lacking
                    .extend(ids.iter().map(|id| chunk_key(id)).filter(|key| !self.objects.contains_key(key)));
            }
            Err(why) => lacking.push(why),
        }
        lacking
    }

    /// Bytes of the chunks that none of the indexes in the store names.
    ///
    /// # Errors
    /// In words: an index cannot be read.
    pub fn unreferenced(&self) -> Result<u64, String> {
        let mut named = BTreeSet::new();
        for key in self.keys("images/") {
            let hash = key.trim_start_matches("images/").trim_end_matches(".caibx");
            named.extend(self.chunks_of(hash)?.into_iter().map(|id| chunk_key(&id)));
        }
        let chunks = self.objects.iter().filter(|(key, _)| key.starts_with("chunks/"));
        Ok(chunks.filter(|(key, _)| !named.contains(*key)).map(|(_, object)| object.size).sum())
    }

    /// Lays the index of `digest` and the chunks out as a folder that casync reads; returns the index's path there.
    ///
    /// # Errors
    /// [`FilesError`].
    pub fn lay_out(&self, digest: &str, dir: &Path) -> Result<PathBuf, FilesError> {
        let hash = digest.strip_prefix("sha256:").unwrap_or(digest);
        for (key, object) in self.objects.iter().filter(|(key, _)| key.starts_with("chunks/")) {
            let path = dir.join(key);
            let parent = path.parent().unwrap_or(dir);
            fs::create_dir_all(parent).map_err(failed(parent))?;
            fs::hard_link(&object.file, &path).map_err(failed(&path))?;
        }
        let index = dir.join("image.caibx");
        if let Some(object) = self.objects.get(&format!("images/{hash}.caibx")) {
            fs::hard_link(&object.file, &index).map_err(failed(&index))?;
        }
        Ok(index)
    }
}

fn chunk_key(id: &str) -> String {
    format!("chunks/{}/{id}.cacnk", &id[..4])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
