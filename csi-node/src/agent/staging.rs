//! Staged images: fetched chunk by chunk, each verified, with a checkpoint every 32 MiB.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use berth_api::StagedImage;
use berth_core::ids::{Digest, ObjectName, Uid};
use berth_core::reason::Reason;
use berth_core::retry::{Retry, after};
use berth_core::units::Bytes;
use berth_device::files::{self, FileError};
use berth_objectstore::chunks::publish::PublishError;
use berth_objectstore::chunks::read::{ImageReader, ReadError};
use berth_record::{ChangeError, ImageState};
use kube::ResourceExt as _;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use super::pools::OpenPool;
use super::stores::{self, AccessError};
use crate::import::error::store_reason;
use crate::node::{Node, now};
use crate::sabotage;
use crate::telemetry::chain;

/// A checkpoint is due after this many bytes.
const WINDOW: u64 = 32 << 20;

/// Why an image is not staged.
#[derive(Debug, Error)]
pub enum FillError {
    /// The object is gone.
    #[error("there is no StagedImage {0}")]
    Gone(Uid),
    /// Its digest.
    #[error("StagedImage {0} names no digest")]
    Digest(String),
    /// Its image store.
    #[error("the image store cannot be used")]
    Access(#[from] AccessError),
    /// The pin.
    #[error("the image cannot be pinned in its store")]
    Pin(#[source] PublishError),
    /// The image.
    #[error("the image cannot be read")]
    Read(#[from] ReadError),
    /// The image is not as large as was promised for.
    #[error("image {digest} has {found}, the promise is for {expected}")]
    Size {
        /// Which.
        digest: Digest,
        /// What it has.
        found: Bytes,
        /// What was promised.
        expected: Bytes,
    },
    /// The record.
    #[error("the record refuses")]
    Record(#[from] ChangeError),
    /// A file.
    #[error("a file operation failed")]
    File(#[from] FileError),
    /// A file.
    #[error("failed to {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The worker is gone.
    #[error("the worker is gone")]
    Worker(#[from] tokio::task::JoinError),
}

impl FillError {
    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Access(error) => error.reason(),
            Self::Pin(PublishError::Store(source)) | Self::Read(ReadError::Store { source, .. }) => {
                store_reason(source)
            }
            Self::Read(error) if error.is_transient() => Reason::ObjectStoreUnavailable,
            Self::Read(ReadError::Target { source, .. }) | Self::Io { source, .. }
                if source.kind() == io::ErrorKind::StorageFull =>
            {
                Reason::PromiseBroken
            }
            Self::Read(ReadError::Target { .. }) => Reason::Retrying,
            Self::Read(_) | Self::Size { .. } | Self::Digest(_) => Reason::VerificationFailed,
            _ => Reason::Retrying,
        }
    }
}

/// Fills until the image is complete; a failure is told and tried again, after longer and longer pauses.
pub async fn fill(node: Arc<Node>, pool: Arc<OpenPool>, uid: Uid, cancel: CancellationToken) {
    let mut failures = 0;
    loop {
        let attempt = cancel.run_until_cancelled(attempt(&node, &pool, &uid));
        let error = match attempt.await {
            None | Some(Ok(()) | Err(FillError::Gone(_))) => return,
            Some(Err(error)) => error,
        };
        failures += 1;
        tracing::warn!(image = %uid, error = chain(&error), failures, "image not staged");
        node.news.edit_fill(&uid, |news| news.error = Some((error.reason(), chain(&error))));
        node.wake.notify_one();
        let Retry::After(millis) = after(failures, u32::MAX) else { return };
        if cancel.run_until_cancelled(tokio::time::sleep(Duration::from_millis(millis))).await.is_none() {
            return;
        }
    }
}

/// The object with this UID.
fn find(node: &Node, uid: &Uid) -> Option<Arc<StagedImage>> {
    node.watches.images.find(|image| image.metadata.uid.as_deref() == Some(uid.as_str()))
}

fn store_of(image: &StagedImage) -> ObjectName {
    ObjectName::new(image.spec.store.namespace.clone(), image.spec.store.name.clone())
}

async fn attempt(node: &Arc<Node>, pool: &Arc<OpenPool>, uid: &Uid) -> Result<(), FillError> {
    let image = find(node, uid).ok_or_else(|| FillError::Gone(uid.clone()))?;
    let digest: Digest = image.spec.digest.parse().map_err(|_| FillError::Digest(image.name_any()))?;
    let (size, data) = (Bytes::from_i64(image.spec.virtual_size), Bytes::from_i64(image.spec.data_bytes));
    let chunks = stores::open(node, &store_of(&image)).await?;
    chunks.pin(uid, &digest).await.map_err(FillError::Pin)?;
    let reader = ImageReader::open(chunks, digest).await?;
    if reader.virtual_size() != size {
        return Err(FillError::Size { digest, found: reader.virtual_size(), expected: size });
    }
    reader.verify_index().await?;
    let (file, offset) = {
        let (pool, uid) = (Arc::clone(pool), uid.clone());
        tokio::task::spawn_blocking(move || begin(&pool, &uid, &digest, size, data)).await??
    };
    let Some(file) = file else { return Ok(()) };
    let file = Arc::new(file);
    let (checkpoints, due) = mpsc::channel::<u64>();
    let keeper = {
        let (pool, file) = (Arc::clone(pool), Arc::clone(&file));
        tokio::task::spawn_blocking(move || keep_checkpoints(&pool, &digest, &file, &due))
    };
    let mut last = offset.0;
    let restored = reader
        .restore(Arc::clone(&file), offset.0, |done| {
            if done.offset - last >= WINDOW {
                last = done.offset;
                drop(checkpoints.send(done.offset)); // a keeper that has failed says so when it is joined
            }
            tell(node, uid, Bytes(done.offset), size);
        })
        .await;
    drop(checkpoints);
    keeper.await??;
    restored?;
    let pool = Arc::clone(pool);
    tokio::task::spawn_blocking(move || complete(&pool, &digest, &file)).await??;
    node.news.edit_fill(uid, |news| (news.percent, news.done, news.error) = (100, size, None));
    tracing::info!(image = %digest, bytes = size.0, "image staged");
    Ok(())
}

/// Records the intent, and opens the file where it is to go on; no file if the image is complete.
fn begin(
    pool: &OpenPool,
    uid: &Uid,
    digest: &Digest,
    size: Bytes,
    data: Bytes,
) -> Result<(Option<File>, Bytes), FillError> {
    let entry = pool.record.begin_fill(digest, uid, size, data, now())?;
    let path = pool.image_file(digest);
    let failed = |action| {
        let path = path.clone();
        move |source| FillError::Io { action, path, source }
    };
    let exists = path.exists();
    match entry.state {
        ImageState::Complete if exists => return Ok((None, size)),
        ImageState::Filling { offset } if exists && offset > Bytes::ZERO => {
            let file = OpenOptions::new().read(true).write(true).open(&path).map_err(failed("open"))?;
            if file.metadata().map_err(failed("examine"))?.len() == size.0 {
                return Ok((Some(file), offset));
            }
        }
        _ => {}
    }
    pool.record.begin_evict(digest)?;
    files::remove_if_there(&path)?;
    Ok((Some(files::create_sparse(&path, size)?), Bytes::ZERO))
}

/// Syncs the file, then records the offset, for the newest offset that is due. Gives memory back to the system.
fn keep_checkpoints(
    pool: &OpenPool,
    digest: &Digest,
    file: &File,
    due: &mpsc::Receiver<u64>,
) -> Result<(), FillError> {
    while let Ok(first) = due.recv() {
        let offset = due.try_iter().last().unwrap_or(first);
        file.sync_data().map_err(|source| FillError::Io {
            action: "write out",
            path: pool.image_file(digest),
            source,
        })?;
        // Advice only: where it is not taken, the kernel keeps the pages until it needs them.
        drop(posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED));
        pool.record.fill_progress(digest, Bytes(offset))?;
    }
    Ok(())
}

fn complete(pool: &OpenPool, digest: &Digest, file: &File) -> Result<(), FillError> {
    let path = pool.image_file(digest);
    files::sync_file_and_parent(file, &path)?;
    drop(posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED));
    let read_only = std::os::unix::fs::PermissionsExt::from_mode(0o400);
    fs::set_permissions(&path, read_only).map_err(|source| FillError::Io {
        action: "protect",
        path,
        source,
    })?;
    Ok(pool.record.fill_complete(digest)?)
}

/// Tells how far it is, once per percent.
fn tell(node: &Node, uid: &Uid, done: Bytes, size: Bytes) {
    let percent = u128::from(done.0) * 100 / u128::from(size.0.max(1));
    let percent = u8::try_from(percent.min(99)).unwrap_or(99);
    let mut news = false;
    node.news.edit_fill(uid, |fill| {
        news = percent > fill.percent || fill.error.is_some();
        if news {
            (fill.percent, fill.done, fill.error) = (percent.max(fill.percent), done, None);
        }
    });
    if news {
        node.wake.notify_one();
    }
}

/// Removes an image's bytes, then its pin. A pin that cannot be removed stays in the store and protects chunks that
/// nothing needs: it is logged, and does not keep the promise.
pub async fn remove(
    node: &Arc<Node>,
    pool: &Arc<OpenPool>,
    uid: &Uid,
    digest: Digest,
) -> Result<(), FillError> {
    let area = Arc::clone(pool);
    tokio::task::spawn_blocking(move || {
        area.record.begin_evict(&digest)?;
        let path = area.image_file(&digest);
        if !sabotage::active(sabotage::RELEASE_WITHOUT_DELETE) {
            files::remove_if_there(&path)?;
            files::sync_parent(&path)?;
        }
        Ok::<_, FillError>(area.record.forget_image(&digest)?)
    })
    .await??;
    if let Some(image) = find(node, uid) {
        let unpin = async {
            let chunks = stores::open(node, &store_of(&image)).await?;
            chunks.unpin(uid).await.map_err(FillError::Pin)
        };
        if let Err(error) = unpin.await {
            tracing::warn!(image = %digest, pin = %uid, error = chain(&error), "pin stays in the image store");
        }
    }
    Ok(())
}
