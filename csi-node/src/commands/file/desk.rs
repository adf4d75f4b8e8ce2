//! The directory of one piece of work: how far it is, and what has arrived.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_core::ids::{NodeName, PoolName, Uid};
use berth_core::units::{Bytes, Generation};
use berth_record::{FileContent, FileEntry, FileFetch, OpenError, PoolIdentity, PoolRecord, StagingEntry};
use tokio_util::sync::CancellationToken;

use super::error::FileCommandError;
use super::name_of;
use crate::files::{self, FileWork, Progress};

/// The record's name in its directory.
const RECORD: &str = "record.redb";

/// A directory with a record of its own, in which the file is the only entry.
pub struct Desk {
    /// The directory.
    dir: PathBuf,
    /// Where the file lies: in it, or, if it is sent, where it was.
    place: PathBuf,
    /// Its name there.
    name: String,
    uid: Uid,
    record: Arc<PoolRecord>,
}

impl Desk {
    /// For an object that is to become `file`, beside it: then both are in one file system. What lies there of another object
    /// is removed.
    pub fn for_fetch(file: &Path, of: &[&str]) -> Result<Self, FileCommandError> {
        let (parent, name) = parts(file)?;
        let (dir, uid) = (parent.join(format!(".{name}.berth")), Uid(format!("fetch-{}", name_of(of))));
        let opened = match Self::open(&dir, &dir, &name, uid.clone(), FileContent::Unchanged) {
            Err(FileCommandError::Open(OpenError::WrongOwner { .. })) => None,
            opened => Some(opened?),
        };
        if let Some(desk) = opened.filter(|desk| !desk.is_taken().unwrap_or(false)) {
            return Ok(desk);
        }
        fs::remove_dir_all(&dir).map_err(FileCommandError::io("remove", &dir))?;
        Self::open(&dir, &dir, &name, uid, FileContent::Unchanged)
    }

    /// For a file that is to become an object.
    pub fn for_send(file: &Path, dir: Option<&Path>, to: &[&str]) -> Result<Self, FileCommandError> {
        let file = file.canonicalize().map_err(FileCommandError::io("find", file))?;
        let (place, name) = parts(&file)?;
        let path = file.to_string_lossy();
        let uid = Uid(format!("send-{}", name_of(&[&[&*path], to].concat())));
        let dir = dir.map_or_else(|| std::env::temp_dir().join(format!("berth-{uid}")), Path::to_owned);
        Self::open(&dir, &place, &name, uid, FileContent::OnlyCopy)
    }

    fn open(
        dir: &Path,
        place: &Path,
        name: &str,
        uid: Uid,
        content: FileContent,
    ) -> Result<Self, FileCommandError> {
        fs::create_dir_all(dir).map_err(FileCommandError::io("make", dir))?;
        let identity = PoolIdentity {
            pool_uid: uid.clone(),
            pool_name: PoolName::from("command"),
            node: NodeName::from("command"),
            pool_id: uid.to_string(),
            area: None,
            made_of: None,
        };
        let path = dir.join(RECORD);
        let record = match PoolRecord::open(&path, Some(&identity.owner())) {
            Err(OpenError::NotFound { .. }) => PoolRecord::create(&path, identity)?,
            opened => opened?,
        };
        let generation = Generation::FIRST;
        let fetched = content == FileContent::Unchanged;
        let wanted = FileEntry {
            generation,
            name: name.to_owned(),
            made: true,
            fetch: if fetched { FileFetch::Waiting } else { FileFetch::Complete },
            content,
            target: None,
            published: std::collections::BTreeMap::new(),
            sent: None,
        };
        let bytes = if fetched { files::room(place, name)? } else { length(&place.join(name))? };
        record.begin_file(&uid, &StagingEntry { generation, dir: place.to_owned(), bytes }, &wanted)?;
        Ok(Self {
            dir: dir.to_owned(),
            place: place.to_owned(),
            name: name.to_owned(),
            uid,
            record: Arc::new(record),
        })
    }

    /// The file.
    pub fn file(&self) -> PathBuf {
        self.place.join(&self.name)
    }

    /// The work to be done.
    pub fn work(&self, progress: Progress, cancel: &CancellationToken) -> FileWork<PoolRecord> {
        FileWork {
            uid: self.uid.clone(),
            generation: Generation::FIRST,
            dir: self.place.clone(),
            record: Arc::clone(&self.record),
            progress,
            cancel: cancel.clone(),
        }
    }

    /// True if all of it had arrived and was put in its place: the next command asks for it anew.
    fn is_taken(&self) -> Result<bool, FileCommandError> {
        let complete = self.record.file(&self.uid)?.is_some_and(|entry| entry.fetch == FileFetch::Complete);
        Ok(complete && !self.file().exists())
    }

    /// Removes the directory, after the work is done. A file that has arrived must have been taken out of it.
    pub fn remove(self) -> Result<(), FileCommandError> {
        let Self { dir, record, .. } = self;
        drop(record);
        let path = dir.join(RECORD);
        fs::remove_file(&path).map_err(FileCommandError::io("remove", &path))?;
        match fs::remove_dir(&dir) {
            // One that was given may hold something else.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            removed => removed.map_err(FileCommandError::io("remove", &dir)),
        }
    }

    /// Removes it too if there is nothing that another start could go on with.
    pub fn remove_unless_begun(self) -> Result<(), FileCommandError> {
        let entry = self.record.file(&self.uid)?;
        let begun = entry.is_some_and(|entry| match (&entry.fetch, &entry.content) {
            (_, FileContent::Sending(sending)) => !sending.upload.is_empty(),
            (FileFetch::Waiting, _) | (_, FileContent::OnlyCopy) => false,
            _ => true,
        });
        if begun {
            return Ok(());
        }
        if self.place == self.dir {
            let file = self.file();
            match fs::remove_file(&file) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(FileCommandError::io("remove", &file))?,
            }
        }
        self.remove()
    }
}

fn length(file: &Path) -> Result<Bytes, FileCommandError> {
    let metadata = fs::metadata(file).map_err(FileCommandError::io("look at", file))?;
    Ok(Bytes(metadata.len()))
}

/// The directory of a file, which must be there, and its name in it.
fn parts(file: &Path) -> Result<(PathBuf, String), FileCommandError> {
    let none = || FileCommandError::NoName { path: file.to_owned() };
    let name = file.file_name().and_then(|name| name.to_str()).ok_or_else(none)?;
    let parent =
        file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let parent = parent.canonicalize().map_err(FileCommandError::io("find", parent))?;
    Ok((parent, name.to_owned()))
}
