//! The fetch: the source's bytes into the reservation, hashed on the way, with a checkpoint every 16 MiB.
//!
//! A source that names no version, or cannot be read from the middle, begins anew after every interruption.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use berth_core::ids::Sha256Sum;
use berth_core::stages::{Shape, Stage};
use berth_core::units::Bytes;
use berth_objectstore::checksum::SourceHash;
use berth_objectstore::source::{RangedSource, SourceStream};
use bytes::Bytes as Buffer;
use futures::StreamExt as _;
use tokio::sync::mpsc;

use super::error::TransferError;
use super::job::{Reporter, Snapshot, TransferJob};
use super::journal::{Journal, Mark, Phase};
use super::pages::release;
use super::probe::open_and_probe;
use super::stage::Staging;

/// How much comes between two checkpoints. With what is in flight, a kill costs less than 32 MiB.
const WINDOW: Bytes = Bytes::mib(16);
/// How much one request asks for: between two, the source says whether it is still the same.
const SPAN: Bytes = Bytes::mib(256);
/// How many pieces of the stream may wait for the disk.
const QUEUE: usize = 16;
/// How much of a local file is hashed at once.
const PIECE: usize = 1 << 20;

/// Where a source is that becomes a file on this node, or is one.
#[derive(Clone)]
#[allow(clippy::large_enum_variant)] // there is one for each import that runs
pub enum Origin {
    /// Behind an address.
    Remote(RangedSource),
    /// On this node; read where it lies.
    Local(PathBuf),
}

impl Origin {
    /// True if it is read where it lies.
    pub fn is_local(&self) -> bool {
        matches!(self, Self::Local(_))
    }

    /// The file that is read once the source is here.
    pub fn local_file(&self, job: &TransferJob) -> PathBuf {
        match self {
            Self::Remote(_) => job.source_file(),
            Self::Local(path) => path.clone(),
        }
    }
}

/// A source that is on this node, whole.
pub(crate) struct Fetched {
    /// The sum of its bytes.
    pub sum: Sha256Sum,
    /// How many they are.
    pub size: Bytes,
}

/// A source on its way.
#[derive(Clone)]
struct Progress {
    shape: Shape,
    /// With which it can be gone on with later; only if it can be read from the middle.
    version: Option<String>,
    offset: Bytes,
    hash: SourceHash,
}

/// Brings the source here, going on from where the journal says it is.
pub(crate) async fn fetch(staging: &Staging<'_>, phase: Phase) -> Result<Fetched, TransferError> {
    let source = match staging.origin {
        Origin::Remote(source) => source.clone(),
        Origin::Local(path) => {
            let path = path.clone();
            let fetched = staging.journal.work(move || hash_file(&path)).await??;
            check_limit(staging.job, fetched.size)?;
            return Ok(fetched);
        }
    };
    let (source, mut progress) = begin(staging, source, phase).await?;
    let size = progress.shape.source_bytes;
    if size == Bytes::ZERO {
        progress = receive(staging, futures::stream::empty().boxed(), progress).await?;
    }
    while progress.offset < size {
        let before = progress.offset;
        let end = match progress.version {
            Some(_) => size.min(before.saturating_add(SPAN)),
            None => size,
        };
        let stream = source.read(before.0..end.0).await?;
        progress = receive(staging, stream, progress).await?;
        if progress.offset == before {
            return Err(TransferError::Short { found: before, expected: size });
        }
    }
    Ok(Fetched { sum: progress.hash.finish(), size: progress.offset })
}

/// Opens the source. Bytes of an earlier attempt count only if the source still has the version that they are of.
async fn begin(
    staging: &Staging<'_>,
    mut source: RangedSource,
    phase: Phase,
) -> Result<(RangedSource, Progress), TransferError> {
    let path = staging.job.source_file();
    if let Phase::Fetching { shape, version, offset, hash } = phase
        && let Ok(mut hash) = SourceHash::from_state(&hash)
        && path.metadata().is_ok_and(|file| file.len() >= offset.0)
    {
        let info = source.open(0, Some(&version)).await?;
        if info.accepts_ranges && info.size == Some(shape.source_bytes) {
            tracing::info!(stage = "Fetch", offset = offset.0, "resuming");
            if crate::sabotage::active("stale-hash") {
                hash = SourceHash::new();
            }
            return Ok((source, Progress { shape, version: Some(version), offset, hash }));
        }
    }
    // The plan was made of another look at the source: it may be another one by now.
    let (probed, info) = open_and_probe(&mut source, &staging.job.limits, staging.job.format).await?;
    let shape = probed.shape(staging.chunk_size);
    staging.job.check_promise(shape.peak_bytes())?;
    let version = info.version.filter(|_| info.accepts_ranges);
    Ok((source, Progress { shape, version, offset: Bytes::ZERO, hash: SourceHash::new() }))
}

/// Writes and hashes a stream on a thread of its own while it arrives; returns when all of it is synced.
async fn receive(
    staging: &Staging<'_>,
    mut stream: SourceStream,
    progress: Progress,
) -> Result<Progress, TransferError> {
    let (sender, receiver) = mpsc::channel::<Buffer>(QUEUE);
    let (path, journal, begun) = (staging.job.source_file(), staging.journal.clone(), progress.clone());
    let writer = staging.journal.work(move || write(&path, &journal, begun, receiver));
    let mut offset = progress.offset;
    let mut failed = None;
    while let Some(piece) = stream.next().await {
        let checked = piece.map_err(TransferError::from).and_then(|piece| {
            offset = offset.saturating_add(Bytes(piece.len() as u64));
            check_limit(staging.job, offset)?;
            staging.job.check_promise(offset)?;
            Ok(piece)
        });
        match checked {
            Ok(piece) => {
                if sender.send(piece).await.is_err() {
                    break; // The writer is gone; its own error says why.
                }
                report(staging, &progress.shape, offset);
            }
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    drop(sender);
    let written = writer.await??;
    failed.map_or(Ok(written), Err)
}

fn check_limit(job: &TransferJob, size: Bytes) -> Result<(), TransferError> {
    if size > job.limits.bytes {
        return Err(TransferError::SourceSize { found: size, limit: job.limits.bytes });
    }
    Ok(())
}

fn report(staging: &Staging<'_>, shape: &Shape, done: Bytes) {
    let total = shape.source_bytes;
    let reporter: &dyn Reporter = staging.reporter.as_ref();
    reporter
        .progress(shape, Snapshot { stage: Stage::Fetch, done, total, skipped: Bytes::ZERO, on_wire: done });
}

/// Blocking: writes what comes, syncs it every [`WINDOW`] and when no more comes, whatever the reason, and records that.
fn write(
    path: &Path,
    journal: &Journal,
    mut progress: Progress,
    mut receiver: mpsc::Receiver<Buffer>,
) -> Result<Progress, TransferError> {
    let mut file = open_at(path, progress.offset)?;
    let mut synced = progress.offset;
    loop {
        let piece = receiver.blocking_recv();
        if let Some(piece) = &piece {
            file.write_all(piece).map_err(TransferError::file("write", path))?;
            progress.hash.update(piece);
            progress.offset = progress.offset.saturating_add(Bytes(piece.len() as u64));
        }
        if piece.is_none() || progress.offset.saturating_sub(synced) >= WINDOW {
            file.sync_data().map_err(TransferError::file("sync", path))?;
            release(&file);
            synced = progress.offset;
            checkpoint(journal, &progress)?;
        }
        if piece.is_none() {
            return Ok(progress);
        }
    }
}

fn checkpoint(journal: &Journal, progress: &Progress) -> Result<(), TransferError> {
    let Some(version) = &progress.version else { return Ok(()) };
    let (shape, offset) = (progress.shape, progress.offset);
    journal.save_now(&Phase::Fetching {
        shape,
        version: version.clone(),
        offset,
        hash: progress.hash.state(),
    })?;
    journal.mark(Mark::Fetched, offset);
    tracing::info!(stage = "Fetch", offset = offset.0, "checkpoint");
    Ok(())
}

/// The file, cut to what is known to be good in it; a new one where that is nothing.
fn open_at(path: &Path, offset: Bytes) -> Result<File, TransferError> {
    if offset == Bytes::ZERO {
        remove_if_there(path).map_err(TransferError::file("remove", path))?;
    }
    let options = OpenOptions::new().write(true).create(offset == Bytes::ZERO).truncate(false).open(path);
    let mut file = options.map_err(TransferError::file("open", path))?;
    file.set_len(offset.0)
        .and_then(|()| file.seek(SeekFrom::Start(offset.0)))
        .map_err(TransferError::file("cut", path))?;
    Ok(file)
}

/// Removes a file. That there is none is no error.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Blocking: the sum of a file's bytes.
fn hash_file(path: &Path) -> Result<Fetched, TransferError> {
    let mut file = File::open(path).map_err(TransferError::file("open", path))?;
    let mut hash = SourceHash::new();
    let mut buffer = vec![0; PIECE];
    let (mut size, mut released) = (0, 0);
    loop {
        let read = file.read(&mut buffer).map_err(TransferError::file("read", path))?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        size += read as u64;
        if size - released >= WINDOW.0 {
            release(&file);
            released = size;
        }
    }
    release(&file);
    Ok(Fetched { sum: hash.finish(), size: Bytes(size) })
}
