//! Staged images: fetched chunk by chunk, each verified, with a checkpoint every 32 MiB.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use berth_api::StagedImage;
use berth_core::ids::{Digest, ObjectName, Uid};
use berth_core::reason::Reason;
use berth_core::retry::{Retry, after};
use berth_core::units::Bytes;
use berth_objectstore::ObjectStore;
use berth_objectstore::chunks::publish::PublishError;
use berth_objectstore::chunks::read::{ImageReader, ReadError, WriteAt};
use berth_record::{ChangeError, ImageState, tables};
use kube::ResourceExt as _;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use thiserror::Error;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::lazy;
use super::pools::OpenPool;
use super::space;
use super::stores::{self, AccessError};
use crate::area::AreaError;
use crate::node::{Node, now};
use crate::sabotage;
use crate::telemetry::chain;
use crate::transfer::error::store_reason;

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
    /// The image takes more than was promised for.
    #[error("image {digest} takes {found}, the promise is of {promised}")]
    Data {
        /// Which.
        digest: Digest,
        /// What is not zeros in it.
        found: Bytes,
        /// What was promised.
        promised: Bytes,
    },
    /// Nothing is promised to it any more.
    #[error("no promise to StagedImage {0} is obeyed")]
    Unpromised(Uid),
    /// The record.
    #[error("the record refuses")]
    Record(#[from] ChangeError),
    /// The area.
    #[error("the pool's area fails")]
    Area(#[from] AreaError),
    /// The server of its image store.
    #[error("image {digest} is not served: {said}")]
    Served {
        /// Which.
        digest: Digest,
        /// What is wrong, by the server's own words if it has any.
        reason: Reason,
        /// In words.
        said: String,
    },
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
            Self::Served { reason, .. } => *reason,
            Self::Area(error @ (AreaError::Template(_) | AreaError::Stopped { .. } | AreaError::Nbd(_))) => {
                error.reason()
            }
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
            Self::Read(_) | Self::Size { .. } | Self::Data { .. } | Self::Digest(_) => {
                Reason::VerificationFailed
            }
            _ => Reason::Retrying,
        }
    }
}

/// Fills until the image is complete; a failure is told and tried again, after longer and longer pauses. When it
/// returns, no thread of it is at work any more.
pub async fn fill(node: Arc<Node>, pool: Arc<OpenPool>, uid: Uid, cancel: CancellationToken) {
    let mut failures = 0;
    loop {
        let workers = TaskTracker::new();
        let attempt = attempt(&node, &pool, &uid, &workers);
        let error = match until_idle(&cancel, &workers, attempt).await {
            None | Some(Ok(()) | Err(FillError::Gone(_))) => return,
            Some(Err(error)) => error,
        };
        failures += 1;
        tracing::warn!(image = %uid, error = chain(&error), failures, "image not staged");
        let told = told(&node, &pool, &uid, &error).await;
        node.news.edit_fill(&uid, |news| news.error = Some(told));
        node.wake.notify_one();
        let Retry::After(millis) = after(failures, u32::MAX) else { return };
        if cancel.run_until_cancelled(tokio::time::sleep(Duration::from_millis(millis))).await.is_none() {
            return;
        }
    }
}

/// The reason of a failure, and what is said of it; a promise of space that did not hold is said to be that.
async fn told(node: &Arc<Node>, pool: &Arc<OpenPool>, uid: &Uid, error: &FillError) -> (Reason, String) {
    let digest = find(node, uid).and_then(|image| image.spec.digest.parse().ok());
    if let Some(digest) = digest.filter(|_| space::is_out_of_space(error))
        && let Ok(promised) = promised(pool, uid)
        && let Some(defect) = space::defect(node, pool, uid, promised, pool.area.image(&digest)).await
    {
        return (Reason::SpacePromiseBroken, format!("{defect}: {}", chain(error)));
    }
    (error.reason(), chain(error))
}

/// Carries out `work` until it is cancelled, then waits for the threads it has left behind: they end within a write.
async fn until_idle<T>(
    cancel: &CancellationToken,
    workers: &TaskTracker,
    work: impl Future<Output = T>,
) -> Option<T> {
    let outcome = cancel.run_until_cancelled(work).await;
    workers.close();
    workers.wait().await;
    outcome
}

/// The file of an image while it is written: takes no more than was promised, and counts as a worker until the last
/// writer has let go of it.
struct Target {
    file: Arc<File>,
    left: AtomicU64,
    _worker: TaskTrackerToken,
}

impl WriteAt for Target {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let take = |left: u64| left.checked_sub(data.len() as u64);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).map_err(|left| {
            let what = format!("{} bytes, and {left} are left of what was promised", data.len());
            io::Error::new(io::ErrorKind::StorageFull, what)
        })?;
        self.file.write_at(offset, data)
    }
}

/// What an image takes when all of it is there: what is not zeros in its index. Refused if more than `promised`.
pub async fn check_data<S: ObjectStore>(
    reader: &ImageReader<S>,
    promised: Bytes,
) -> Result<Bytes, FillError> {
    let mut items = reader.items_at(0).await?;
    let mut found = Bytes::ZERO;
    while let Some(item) = items.next().await? {
        if !item.zero {
            found = found.saturating_add(item.len);
        }
    }
    if found > promised {
        return Err(FillError::Data { digest: reader.digest(), found, promised });
    }
    Ok(found)
}

/// What is promised to this image, by the record.
fn promised(pool: &OpenPool, uid: &Uid) -> Result<Bytes, FillError> {
    let (_, promises) = pool.promises().map_err(ChangeError::from)?;
    let promise = promises.get(uid).filter(|promise| promise.obeyed && !promise.released);
    promise.map(|promise| promise.data).ok_or_else(|| FillError::Unpromised(uid.clone()))
}

/// The object with this UID.
pub(super) fn find(node: &Node, uid: &Uid) -> Option<Arc<StagedImage>> {
    node.watches.images.find(|image| image.metadata.uid.as_deref() == Some(uid.as_str()))
}

pub(super) fn store_of(image: &StagedImage) -> ObjectName {
    ObjectName::new(image.spec.store.namespace.clone(), image.spec.store.name.clone())
}

async fn attempt(
    node: &Arc<Node>,
    pool: &Arc<OpenPool>,
    uid: &Uid,
    workers: &TaskTracker,
) -> Result<(), FillError> {
    let image = find(node, uid).ok_or_else(|| FillError::Gone(uid.clone()))?;
    let digest: Digest = image.spec.digest.parse().map_err(|_| FillError::Digest(image.name_any()))?;
    let size = Bytes::from_i64(image.spec.virtual_size);
    let promised = {
        let (pool, uid) = (Arc::clone(pool), uid.clone());
        workers.spawn_blocking(move || promised(&pool, &uid)).await??
    };
    let work = lazy::Work { node, pool, uid, digest, size, promised, workers };
    if work.show(&image).await? {
        node.news.edit_fill(uid, |news| (news.percent, news.done, news.error) = (100, size, None));
        return Ok(());
    }
    let chunks = stores::open(node, &store_of(&image)).await?;
    chunks.pin(uid, &digest).await.map_err(FillError::Pin)?;
    let reader = ImageReader::open(chunks, digest).await?;
    if reader.virtual_size() != size {
        return Err(FillError::Size { digest, found: reader.virtual_size(), expected: size });
    }
    restore(pool, uid, &reader, promised, workers, |done| tell(node, uid, done, size)).await?;
    node.news.edit_fill(uid, |news| (news.percent, news.done, news.error) = (100, size, None));
    Ok(())
}

/// Fetches what is not there yet of an image into a pool, verified, under a promise of so many bytes; `tell` is told how
/// far it is. All its threads are `workers`.
pub async fn restore<S: ObjectStore>(
    pool: &Arc<OpenPool>,
    uid: &Uid,
    reader: &ImageReader<S>,
    promised: Bytes,
    workers: &TaskTracker,
    tell: impl Fn(Bytes) + Send + Sync,
) -> Result<(), FillError> {
    let (digest, size) = (reader.digest(), reader.virtual_size());
    reader.verify_index().await?;
    let data = check_data(reader, promised).await?;
    let (file, offset) = {
        let (pool, uid) = (Arc::clone(pool), uid.clone());
        workers.spawn_blocking(move || begin(&pool, &uid, &digest, size, data)).await??
    };
    let Some(file) = file else { return Ok(()) };
    let file = Arc::new(file);
    let (checkpoints, due) = mpsc::channel::<u64>();
    let keeper = {
        let (pool, file) = (Arc::clone(pool), Arc::clone(&file));
        let uid = uid.clone();
        workers.spawn_blocking(move || keep_checkpoints(&pool, &uid, &digest, &file, &due))
    };
    let left = AtomicU64::new(promised.0);
    let target = Arc::new(Target { file: Arc::clone(&file), left, _worker: workers.token() });
    let mut last = offset.0;
    let restored = reader
        .restore(target, offset.0, |done| {
            if done.offset - last >= WINDOW {
                last = done.offset;
                let _ = checkpoints.send(done.offset); // a keeper that has failed says so when it is joined
            }
            tell(Bytes(done.offset));
        })
        .await;
    drop(checkpoints);
    keeper.await??;
    restored?;
    let (pool, holder) = (Arc::clone(pool), uid.clone());
    let complete = move || {
        pool.area.seal_image(&pool.record, &digest, file)?;
        Ok::<_, FillError>(pool.record.fill_complete(&digest, &holder)?)
    };
    workers.spawn_blocking(complete).await??;
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
    match entry.state {
        ImageState::Complete if pool.area.has_image(digest) => return Ok((None, size)),
        ImageState::Filling { offset } if offset > Bytes::ZERO => {
            if let Some(file) = pool.area.reopen_image(&pool.record, digest, size)? {
                return Ok((Some(file), offset));
            }
        }
        _ => {}
    }
    pool.record.begin_evict(digest)?;
    Ok((Some(pool.area.new_image(&pool.record, digest, size)?), Bytes::ZERO))
}

/// Syncs the file, then records the offset, for the newest offset that is due. Gives memory back to the system.
fn keep_checkpoints(
    pool: &OpenPool,
    uid: &Uid,
    digest: &Digest,
    file: &File,
    due: &mpsc::Receiver<u64>,
) -> Result<(), FillError> {
    while let Ok(first) = due.recv() {
        let offset = due.try_iter().last().unwrap_or(first);
        file.sync_data().map_err(|source| FillError::Io {
            action: "write out",
            path: pool.area.image(digest),
            source,
        })?;
        // Advice only: where it is not taken, the kernel keeps the pages until it needs them.
        let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        pool.record.fill_progress(digest, uid, Bytes(offset))?;
    }
    Ok(())
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

/// Removes an image's bytes if they are this one's, then its pin, which is there before anything is recorded. A pin that
/// cannot be removed stays in the store and protects chunks that nothing needs: it is logged, and does not keep the promise.
pub async fn remove(
    node: &Arc<Node>,
    pool: &Arc<OpenPool>,
    uid: &Uid,
    digest: Digest,
) -> Result<(), FillError> {
    let (pool, holder) = (Arc::clone(pool), uid.clone());
    tokio::task::spawn_blocking(move || {
        let _turn = pool.turn();
        let held = pool.record.record().get(tables::IMAGES, &digest).map_err(ChangeError::from)?;
        if held.is_none_or(|held| held.holder != holder) {
            return Ok(()); // never begun, or taken over by the next image of this content
        }
        pool.area.require_unused(&pool.record, &digest)?;
        pool.record.begin_evict(&digest)?;
        if !sabotage::active(sabotage::RELEASE_WITHOUT_DELETE) {
            pool.area.remove_image(&pool.record, &digest)?;
        }
        Ok::<_, FillError>(pool.record.forget_image(&digest)?)
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[tokio::test]
    async fn a_cancelled_fill_has_ended_when_its_last_thread_has() {
        let (cancel, workers, ended) = (CancellationToken::new(), TaskTracker::new(), Arc::default());
        let (told, tracker): (Arc<AtomicBool>, _) = (Arc::clone(&ended), workers.clone());
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let work = async move {
            let thread = tracker.spawn_blocking(move || {
                begun.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(200));
                told.store(true, Ordering::SeqCst);
            });
            thread.await.unwrap();
        };
        let stop = cancel.clone();
        tokio::spawn(async move {
            has_begun.await.unwrap();
            stop.cancel();
        });
        assert_eq!(until_idle(&cancel, &workers, work).await, None, "it was cancelled");
        assert!(ended.load(Ordering::SeqCst), "and its thread is not at work any more");
    }

    #[tokio::test]
    async fn an_image_takes_no_more_than_was_promised_and_is_written_to_until_the_last_has_let_go() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let workers = TaskTracker::new();
        let (left, worker) = (AtomicU64::new(8), workers.token());
        let target = Arc::new(Target { file: Arc::clone(&file), left, _worker: worker });
        target.write_at(100, b"12345").unwrap();
        let refused = target.write_at(0, b"6789").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::StorageFull);
        assert!(refused.to_string().starts_with("4 bytes, and 3 are left"), "{refused}");
        target.write_at(105, b"678").unwrap();
        assert_eq!(file.metadata().unwrap().len(), 108);
        let writer = Arc::clone(&target);
        drop(target);
        workers.close();
        assert!(!workers.is_empty());
        drop(writer);
        assert!(workers.is_empty());
    }
}
