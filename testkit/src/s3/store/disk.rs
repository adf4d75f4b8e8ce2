//! Files of the object store: data files, and JSON files that name them.
//!
//! ```text
//! data/<id>                              bytes of an object or part, written once
//! objects/<bucket>/<sha256(key)>.json    an object: its key, metadata and data files in order
//! uploads/<upload id>/upload.json        an open multipart upload
//! uploads/<upload id>/<number>.json      one part of it
//! tmp/<id>                               a JSON file that is being written
//! ```
//!
//! Guarantees: an object changes by the rename of its JSON file, after its data is synced. Whatever is not named by a JSON
//! file is removed at the next start. Directories are not synced: this survives the end of the process, not of the
//! machine.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::StoreError;
use crate::wire::hex;

/// A data file. It is removed with its last reference unless it is kept.
#[derive(Debug)]
pub(crate) struct DataFile {
    path: PathBuf,
    kept: AtomicBool,
}

impl DataFile {
    /// A file that some JSON file names.
    fn existing(path: PathBuf) -> Self {
        Self { path, kept: AtomicBool::new(true) }
    }

    /// The file's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The name that JSON files use.
    pub(crate) fn name(&self) -> String {
        self.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// Sets whether the file outlives its last reference.
    pub(crate) fn keep(&self, kept: bool) {
        self.kept.store(kept, Ordering::Release);
    }
}

impl Drop for DataFile {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::Acquire) {
            // What stays is removed at the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Paths, and the two ways to write.
#[derive(Debug)]
pub(crate) struct Disk {
    dir: PathBuf,
    fsync: bool,
}

impl Disk {
    /// Uses `dir`, which is created if needed. Half-written JSON files of an earlier run are removed.
    pub(crate) fn open(dir: &Path, fsync: bool) -> Result<Self, StoreError> {
        let tmp = dir.join("tmp");
        if tmp.exists() {
            fs::remove_dir_all(&tmp).map_err(|e| StoreError::io(&tmp, e))?;
        }
        for sub in ["data", "objects", "uploads", "tmp"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).map_err(|e| StoreError::io(&path, e))?;
        }
        Ok(Self { dir: dir.to_owned(), fsync })
    }

    /// The directory of a bucket's objects.
    pub(crate) fn bucket(&self, bucket: &str) -> PathBuf {
        self.dir.join("objects").join(bucket)
    }

    /// The JSON file of an object.
    pub(crate) fn object(&self, bucket: &str, key: &str) -> PathBuf {
        let hash = hex(&Sha256::digest(key.as_bytes()));
        self.bucket(bucket).join(format!("{hash}.json"))
    }

    /// The directory of an upload, or of all uploads.
    pub(crate) fn upload(&self, id: Option<&str>) -> PathBuf {
        let uploads = self.dir.join("uploads");
        id.map_or(uploads.clone(), |id| uploads.join(id))
    }

    /// The directory of all buckets.
    pub(crate) fn buckets(&self) -> PathBuf {
        self.dir.join("objects")
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// A data file that a JSON file names.
    pub(crate) fn existing(&self, name: &str) -> DataFile {
        DataFile::existing(self.data().join(name))
    }

    /// A new, empty data file, removed again unless kept.
    pub(crate) fn create(&self) -> Result<(DataFile, File), StoreError> {
        let path = self.data().join(uuid::Uuid::new_v4().simple().to_string());
        let file = File::create_new(&path).map_err(|e| StoreError::io(&path, e))?;
        Ok((DataFile { path, kept: AtomicBool::new(false) }, file))
    }

    /// A second name for the bytes of `file`.
    pub(crate) fn link(&self, file: &DataFile) -> Result<DataFile, StoreError> {
        let path = self.data().join(uuid::Uuid::new_v4().simple().to_string());
        fs::hard_link(file.path(), &path).map_err(|e| StoreError::io(&path, e))?;
        Ok(DataFile { path, kept: AtomicBool::new(false) })
    }

    /// Waits until the bytes of `file` are on disk.
    pub(crate) fn sync(&self, file: &File, path: &Path) -> Result<(), StoreError> {
        if self.fsync { file.sync_data().map_err(|e| StoreError::io(path, e)) } else { Ok(()) }
    }

    /// Replaces the JSON file at `path`.
    pub(crate) fn write_json<T: Serialize>(&self, path: &Path, value: &T) -> Result<(), StoreError> {
        let temp = self.dir.join("tmp").join(uuid::Uuid::new_v4().simple().to_string());
        let text = serde_json::to_vec(value).expect("the store's types have string keys only");
        let mut file = File::create_new(&temp).map_err(|e| StoreError::io(&temp, e))?;
        file.write_all(&text).map_err(|e| StoreError::io(&temp, e))?;
        self.sync(&file, &temp)?;
        fs::rename(&temp, path).map_err(|e| StoreError::io(path, e))
    }

    /// Removes data files that `named` does not contain.
    pub(crate) fn sweep(&self, named: &std::collections::HashSet<String>) -> Result<(), StoreError> {
        for (name, path) in list(&self.data())? {
            if !named.contains(&name) {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

/// Reads a JSON file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, StoreError> {
    let text = fs::read(path).map_err(|e| StoreError::io(path, e))?;
    serde_json::from_slice(&text).map_err(|source| StoreError::Damaged { path: path.to_owned(), source })
}

/// Names and paths in a directory.
pub(crate) fn list(dir: &Path) -> Result<Vec<(String, PathBuf)>, StoreError> {
    fs::read_dir(dir)
        .and_then(|entries| {
            entries.map(|e| e.map(|e| (e.file_name().to_string_lossy().into_owned(), e.path()))).collect()
        })
        .map_err(|e| StoreError::io(dir, e))
}

/// Removes a file that may be gone already.
pub(crate) fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::io(path, error)),
        _ => Ok(()),
    }
}
