//! The object into its file, by ranges of one version, with a checkpoint every 16 MiB.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use berth_core::ids::Sha256Sum;
use berth_core::units::Bytes;
use berth_objectstore::checksum::SourceHash;
use berth_objectstore::source::RangedSource;
use berth_record::{FileEntry, FileFetch, tables};
use futures::StreamExt as _;

use super::error::FileError;
use super::{FileWork, HasRecord, local};

/// How much comes between two checkpoints. With what is in flight, a kill costs less than 32 MiB.
const WINDOW: u64 = 16 << 20;
/// How much one request asks for: between two, the store says whether the object is still the same.
const SPAN: Bytes = Bytes::mib(256);
/// How much is written at once.
const PIECE: usize = 4 << 20;

/// How far it is.
struct At {
    size: Bytes,
    /// With which it can be gone on with later; only if a part of the object can be read.
    version: Option<String>,
    offset: Bytes,
}

/// Fetches the object, going on from where the record says it is. Returns when all of it is on stable storage and recorded.
///
/// # Errors
/// [`FileError::TooLarge`] before anything is written, if it does not fit.
pub async fn fetch<R: HasRecord>(work: &FileWork<R>, mut source: RangedSource) -> Result<(), FileError> {
    let found = Arc::clone(&work.record);
    let uid = work.uid.clone();
    let entry = tokio::task::spawn_blocking(move || found.record().file(&uid)).await??;
    let entry = entry.ok_or_else(|| FileError::NoFile(work.uid.to_string()))?;
    if entry.fetch == FileFetch::Complete {
        return Ok(());
    }
    let mut at = begin(work, &entry, &mut source).await?;
    let (dir, name, offset) = (work.dir.clone(), entry.name.clone(), at.offset);
    let file = tokio::task::spawn_blocking(move || local::open_at(&dir, &name, offset)).await??;
    let file = Arc::new(file);
    while at.offset < at.size {
        let before = at.offset;
        let end = if at.version.is_some() { at.size.min(before.saturating_add(SPAN)) } else { at.size };
        receive(work, &entry.name, &source, &file, &mut at, end).await?;
        if at.offset == before {
            return Err(FileError::Short { found: before, expected: at.size });
        }
    }
    finish(work, &entry.name, file).await
}

/// Opens the object. Bytes of an earlier attempt count only if it still has the version that they are of.
async fn begin<R: HasRecord>(
    work: &FileWork<R>,
    entry: &FileEntry,
    source: &mut RangedSource,
) -> Result<At, FileError> {
    let there = work.dir.join(&entry.name).metadata().map_or(0, |file| file.len());
    if let FileFetch::Fetching { version, size, offset } = &entry.fetch
        && there >= offset.0
    {
        work.stoppable(source.open(0, Some(version))).await??;
        tracing::info!(reservation = %work.uid, offset = offset.0, "fetching goes on");
        return Ok(At { size: *size, version: Some(version.clone()), offset: *offset });
    }
    let info = work.stoppable(source.open(0, None)).await??;
    let size = info.size.ok_or(FileError::NoSize)?;
    let (record, uid) = (Arc::clone(&work.record), work.uid.clone());
    let (dir, name) = (work.dir.clone(), entry.name.clone());
    let looked = tokio::task::spawn_blocking(move || -> Result<_, FileError> {
        let staging = record.record().record().get(tables::STAGING, &uid)?;
        Ok((local::room(&dir, &name)?, staging.map(|staging| staging.bytes).unwrap_or_default()))
    });
    let (room, promised) = looked.await??;
    // Where the directory is one of the pool's own file system, the promise is all that bounds it.
    let room = room.min(promised);
    if size > room {
        return Err(FileError::TooLarge { found: size, room, promised });
    }
    Ok(At { size, version: info.version.filter(|_| info.accepts_ranges), offset: Bytes::ZERO })
}

/// Writes what comes up to `end`. When it breaks off, what came before is kept.
async fn receive<R: HasRecord>(
    work: &FileWork<R>,
    name: &str,
    source: &RangedSource,
    file: &Arc<File>,
    at: &mut At,
    end: Bytes,
) -> Result<(), FileError> {
    let mut stream = work.stoppable(source.read(at.offset.0..end.0)).await??;
    let mut piece = Vec::with_capacity(PIECE);
    let mut synced = at.offset;
    loop {
        let next = work.stoppable(stream.next()).await;
        let ended = !matches!(&next, Ok(Some(Ok(_))));
        if let Ok(Some(Ok(bytes))) = &next {
            piece.extend_from_slice(bytes);
        }
        if !piece.is_empty() && (ended || piece.len() >= PIECE) {
            let (bytes, offset, to) = (std::mem::take(&mut piece), at.offset, Arc::clone(file));
            let length = Bytes(bytes.len() as u64);
            let written = tokio::task::spawn_blocking(move || to.write_all_at(&bytes, offset.0)).await?;
            written.map_err(FileError::io("write", name))?;
            at.offset = at.offset.saturating_add(length);
            (work.progress)(at.offset, at.size);
        }
        if at.offset.saturating_sub(synced).0 >= WINDOW || (ended && at.offset > synced) {
            checkpoint(work, name, file, at).await?;
            synced = at.offset;
        }
        match next? {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error.into()),
            None => return Ok(()),
        }
    }
}

async fn checkpoint<R: HasRecord>(
    work: &FileWork<R>,
    name: &str,
    file: &Arc<File>,
    at: &At,
) -> Result<(), FileError> {
    let Some(version) = at.version.clone() else { return Ok(()) };
    let fetch = FileFetch::Fetching { version, size: at.size, offset: at.offset };
    let (work, file, name) = (work.clone(), Arc::clone(file), name.to_owned());
    let recorded = tokio::task::spawn_blocking(move || -> Result<(), FileError> {
        file.sync_data().map_err(FileError::io("sync", &name))?;
        crate::transfer::release(&file);
        Ok(work.record.record().file_fetched(&work.uid, work.generation, fetch)?)
    });
    recorded.await?
}

async fn finish<R: HasRecord>(work: &FileWork<R>, name: &str, file: Arc<File>) -> Result<(), FileError> {
    let (work, name) = (work.clone(), name.to_owned());
    let recorded = tokio::task::spawn_blocking(move || -> Result<(), FileError> {
        file.sync_all().map_err(FileError::io("sync", &name))?;
        let dir = File::open(&work.dir).and_then(|dir| dir.sync_all());
        dir.map_err(FileError::io("sync the directory of", &name))?;
        Ok(work.record.record().file_fetched(&work.uid, work.generation, FileFetch::Complete)?)
    });
    recorded.await?
}

/// The size and the sum of the file, read from where it lies. Blocks.
///
/// # Errors
/// [`FileError::Cancelled`], or if it cannot be read.
pub fn sum<R: HasRecord>(work: &FileWork<R>) -> Result<(Bytes, Sha256Sum), FileError> {
    let entry = work.record.record().file(&work.uid)?;
    let name = entry.ok_or_else(|| FileError::NoFile(work.uid.to_string()))?.name;
    let local::Opened { file, stamp } = local::open(&work.dir, &name)?;
    let (mut hash, mut at, mut piece) = (SourceHash::new(), Bytes::ZERO, vec![0; PIECE]);
    while at < stamp.size {
        if work.cancel.is_cancelled() {
            return Err(FileError::Cancelled);
        }
        let count = file.read_at(&mut piece, at.0).map_err(FileError::io("read", &name))?;
        if count == 0 {
            return Err(FileError::Changing { name });
        }
        hash.update(&piece[..count]);
        at = at.saturating_add(Bytes(count as u64)).min(stamp.size);
        (work.progress)(at, stamp.size);
    }
    Ok((stamp.size, hash.finish()))
}
