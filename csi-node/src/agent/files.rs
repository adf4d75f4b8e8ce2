//! Files for pods as Kubernetes asks for them: the reservation's object into its directory, and what a pod wrote back to an
//! object store.

use std::sync::Arc;
use std::time::Duration;

use berth_api::StagingReservation;
use berth_api::fields::{Addressing as ApiAddressing, S3Target};
use berth_api::parse::{InvalidField, file_name};
use berth_core::ids::Uid;
use berth_core::reason::{Reason, ReasonClass};
use berth_core::retry::{Failures, Fault, Next};
use berth_core::units::{Bytes, Generation};
use berth_objectstore::s3::{Addressing, S3Config, S3Store};
use berth_record::{
    ChangeError, FileContent, FileEntry, FileFetch, FileTarget, PoolRecord, ReadError, StagingEntry,
};
use kube::ResourceExt as _;
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use super::news::FileNews;
use super::pools::OpenPool;
use super::transfers::WorkError;
use super::{sources, stores};
use crate::area::{AreaError, BoundedDir};
use crate::credentials::{CredentialSource as _, SecretCredentials};
use crate::files::{self, FileError, FileWork, HasRecord, boot};
use crate::node::Node;
use crate::sabotage;
use crate::telemetry::chain;

/// For how long an object store that sends nothing counts as slow.
const STALL: Duration = Duration::from_secs(60);
/// How long giving an upload up may keep the removal of its file waiting.
const GIVE_UP: Duration = Duration::from_secs(10);

/// How long a sending rests that the record does not allow now.
const NOT_NOW: Duration = Duration::from_secs(5);

impl HasRecord for OpenPool {
    fn record(&self) -> &PoolRecord {
        &self.record
    }
}

/// Why a file was not begun, fetched, sent or removed.
#[derive(Debug, Error)]
pub enum FilesError {
    /// The reservation is gone, or is for no file.
    #[error("reservation {0} is not there, or is for no file")]
    Gone(Uid),
    /// A field of it.
    #[error("the file is not possible")]
    Field(#[from] InvalidField),
    /// The object store cannot be asked.
    #[error("the object store cannot be asked")]
    Open(#[from] WorkError),
    /// The file itself.
    #[error("the file failed")]
    File(#[from] FileError),
    /// The area.
    #[error("the pool's area fails")]
    Area(#[from] AreaError),
    /// Its directory was there and is gone: a blank one would pass for it.
    #[error("the directory of file {0} is gone, and is not made again")]
    Lost(Uid),
    /// The record cannot be read.
    #[error("the record cannot be read")]
    Read(#[from] ReadError),
    /// The record refuses.
    #[error("the record refuses")]
    Record(#[from] ChangeError),
    /// A worker is gone.
    #[error("a worker is gone")]
    Worker(#[from] tokio::task::JoinError),
}

impl FilesError {
    fn reason(&self) -> Reason {
        match self {
            Self::Field(_) => Reason::InvalidSpec,
            Self::Open(error) => error.reason(),
            Self::File(error) => error.reason(),
            Self::Lost(_) => Reason::FileLost,
            Self::Gone(_) | Self::Area(_) | Self::Read(_) | Self::Record(_) | Self::Worker(_) => {
                Reason::Retrying
            }
        }
    }
}

/// The reservation with this UID.
fn find(node: &Node, uid: &Uid) -> Result<Arc<StagingReservation>, FilesError> {
    let found = node.watches.assigned.find(|object| object.metadata.uid.as_deref() == Some(uid.as_str()));
    found.filter(|found| found.spec.file.is_some()).ok_or_else(|| FilesError::Gone(uid.clone()))
}

/// Makes the directory of a file, and records what it is for: before it is made, and all that is needed to send it back.
pub async fn begin(
    node: &Node,
    pool: Arc<OpenPool>,
    uid: &Uid,
    generation: Generation,
    bytes: Bytes,
) -> Result<(), FilesError> {
    let object = find(node, uid)?;
    let file = object.spec.file.as_ref().ok_or_else(|| FilesError::Gone(uid.clone()))?;
    let namespace = object.namespace().unwrap_or_default();
    let entry = FileEntry {
        generation,
        name: file_name(file)?.to_owned(),
        made: false,
        fetch: if file.source.is_some() { FileFetch::Waiting } else { FileFetch::Complete },
        content: FileContent::Unchanged,
        target: file.result.as_ref().map(|result| target(namespace, result)),
        published: std::collections::BTreeMap::new(),
        sent: None,
    };
    let uid = uid.clone();
    tokio::task::spawn_blocking(move || {
        let _turn = pool.turn();
        make_directory(&pool, &uid, bytes, &entry)
    })
    .await?
}

/// Makes the directory of a file that is recorded first; one that was there before is shown, and never made again.
pub fn make_directory(
    pool: &OpenPool,
    uid: &Uid,
    bytes: Bytes,
    wanted: &FileEntry,
) -> Result<(), FilesError> {
    let dir = std::path::Path::new("staging").join(uid.as_str());
    let staging = StagingEntry { generation: wanted.generation, dir, bytes };
    let entry = pool.record.begin_file(uid, &staging, wanted)?;
    if directory(pool, uid, &entry)? == FileDir::Lost {
        return Err(FilesError::Lost(uid.clone()));
    }
    pool.area.make_bounded_dir(&pool.record, uid, bytes)?;
    Ok(pool.record.file_made(uid)?)
}

/// What there is of the directory of a file that is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileDir {
    /// It is being made, or made visible.
    Hidden,
    /// It is there.
    Shown,
    /// It was there, and is gone.
    Lost,
}

/// By the record and the disk.
pub fn directory(pool: &OpenPool, uid: &Uid, entry: &FileEntry) -> Result<FileDir, AreaError> {
    Ok(match pool.area.bounded_dir(&pool.record, uid)? {
        _ if !entry.made => FileDir::Hidden,
        BoundedDir::Shown => FileDir::Shown,
        BoundedDir::Hidden => FileDir::Hidden,
        BoundedDir::Gone => FileDir::Lost,
    })
}

fn target(namespace: String, asked: &S3Target) -> FileTarget {
    FileTarget {
        namespace,
        secret: asked.secret_ref.as_ref().map(|secret| secret.name.clone()),
        endpoint: asked.endpoint.clone(),
        region: stores::region(asked.region.as_ref()),
        bucket: asked.bucket.clone(),
        key: asked.key.clone(),
        virtual_host: asked.addressing == Some(ApiAddressing::VirtualHost),
        ca_bundle: asked.ca_bundle.clone(),
    }
}

fn work(
    node: &Arc<Node>,
    pool: &Arc<OpenPool>,
    uid: &Uid,
    generation: Generation,
    cancel: CancellationToken,
) -> FileWork<OpenPool> {
    let (here, of) = (Arc::clone(node), uid.clone());
    FileWork {
        uid: uid.clone(),
        generation,
        dir: pool.area.work_dir(uid),
        record: Arc::clone(pool),
        progress: Arc::new(move |done, total| {
            here.news.edit_file(&of, |news| news.progress = Some((done, total)));
        }),
        cancel,
    }
}

/// Fetches the object of a reservation, until all of it is there or it cannot be. An object store that is away is waited
/// for, however long.
pub async fn fetch(
    node: Arc<Node>,
    pool: Arc<OpenPool>,
    uid: Uid,
    generation: Generation,
    cancel: CancellationToken,
) {
    let work = work(&node, &pool, &uid, generation, cancel.clone());
    let mut failures = Failures::default();
    loop {
        let Some(outcome) = cancel.run_until_cancelled(source(&node, &uid)).await else { return };
        let fetched = match outcome {
            Ok(source) => files::fetch(&work, source).await.map_err(FilesError::from),
            Err(error) => Err(error),
        };
        let error = match fetched {
            Ok(()) => {
                node.news.edit_file(&uid, |news| *news = FileNews::default());
                return node.wake.notify_one();
            }
            Err(FilesError::File(FileError::Cancelled) | FilesError::Gone(_)) => return,
            Err(error) => error,
        };
        let ends = error.reason().class() == ReasonClass::Terminal;
        if !again(&node, &uid, &error, ends, &mut failures, &cancel).await {
            return;
        }
    }
}

async fn source(node: &Node, uid: &Uid) -> Result<berth_objectstore::source::RangedSource, FilesError> {
    let object = find(node, uid)?;
    let namespace = object.namespace().unwrap_or_default();
    let source = object.spec.file.as_ref().and_then(|file| file.source.as_ref());
    let source = source.ok_or_else(|| FilesError::Gone(uid.clone()))?;
    Ok(sources::open_object(node, &namespace, source, STALL).await?)
}

/// Sends a file that a pod has changed to its object store, until it is there: nothing ends that but its being stopped.
pub async fn push(
    node: Arc<Node>,
    pool: Arc<OpenPool>,
    uid: Uid,
    generation: Generation,
    cancel: CancellationToken,
) {
    let work = work(&node, &pool, &uid, generation, cancel.clone());
    let mut failures = Failures::default();
    loop {
        let Some(outcome) = cancel.run_until_cancelled(store(&node, &pool, &uid)).await else { return };
        let sent = match outcome {
            Ok((store, target)) => files::push(&work, &store, &target.key).await.map_err(FilesError::from),
            Err(error) => Err(error),
        };
        match sent {
            Ok(sent) => {
                tracing::info!(reservation = %uid, size = sent.size.0, digest = %sent.sha256, "file is durable");
                node.news.edit_file(&uid, |news| *news = FileNews::default());
                return node.wake.notify_one();
            }
            Err(FilesError::File(FileError::Cancelled) | FilesError::Gone(_)) => return,
            Err(FilesError::File(FileError::Change(ChangeError::State { state, .. }))) => {
                tracing::info!(reservation = %uid, state, "file is not sent now");
                cancel.run_until_cancelled(tokio::time::sleep(NOT_NOW)).await;
                return; // it is planned again when it may be sent
            }
            Err(error) => {
                if !again(&node, &uid, &error, false, &mut failures, &cancel).await {
                    return;
                }
            }
        }
    }
}

/// The store that a file goes to, by its record alone: its reservation may be gone.
async fn store(node: &Node, pool: &Arc<OpenPool>, uid: &Uid) -> Result<(S3Store, FileTarget), FilesError> {
    let (pool, of) = (Arc::clone(pool), uid.clone());
    let entry = tokio::task::spawn_blocking(move || pool.record.file(&of)).await??;
    let target = entry.and_then(|entry| entry.target).ok_or_else(|| FilesError::Gone(uid.clone()))?;
    let addresses = sources::address_policy(&node.config.allow_source_cidrs).map_err(WorkError::from)?;
    sources::refuse_endpoint(&target.endpoint, &addresses).await?;
    let credentials = SecretCredentials::new(node.client.clone());
    let credentials = credentials.get(&target.namespace, target.secret.as_deref()).await;
    let config = S3Config {
        endpoint: Some(target.endpoint.clone()),
        region: target.region.clone(),
        bucket: target.bucket.clone(),
        addressing: if target.virtual_host { Addressing::VirtualHost } else { Addressing::Path },
        credentials: credentials.map_err(WorkError::from)?,
        ca_bundle: target.ca_bundle.clone().map(String::into_bytes),
    };
    Ok((S3Store::connect(config).await.map_err(WorkError::from)?, target))
}

/// Tells of a failure, and makes the pause before the next attempt. False if there is to be none.
async fn again(
    node: &Node,
    uid: &Uid,
    error: &FilesError,
    ends: bool,
    failures: &mut Failures,
    cancel: &CancellationToken,
) -> bool {
    let reason = error.reason();
    tracing::warn!(reservation = %uid, %reason, error = chain(error), ends, "work on a file failed");
    node.news.edit_file(uid, |news| news.error = Some((reason, chain(error), !ends)));
    node.wake.notify_one();
    // Whatever fails is waited for as a store that is away is: without end.
    let Next::Again(millis) = failures.note(Fault::StoreAway, false, 0) else { return false };
    !ends && cancel.run_until_cancelled(tokio::time::sleep(Duration::from_millis(millis))).await.is_some()
}

/// Removes a file that no pod sees, with its directory; an only copy with consent alone, which gives up its upload too.
pub async fn remove(node: &Node, pool: Arc<OpenPool>, uid: &Uid, only_copy: bool) -> Result<(), FilesError> {
    let (here, of) = (Arc::clone(&pool), uid.clone());
    let begun = tokio::task::spawn_blocking(move || here.record.begin_remove_file(&of, boot(), only_copy));
    if let Some(FileEntry { content: FileContent::Sending(sending), .. }) = begun.await??
        && !sending.upload.is_empty()
    {
        let give_up = async {
            let (store, target) = store(node, &pool, uid).await?;
            Ok::<_, FilesError>(
                store.abort_upload(&target.key, &sending.upload).await.map_err(FileError::from)?,
            )
        };
        match tokio::time::timeout(GIVE_UP, give_up).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(reservation = %uid, error = chain(&error), "parts of its upload stay in the store");
            }
            Err(_) => {
                tracing::warn!(reservation = %uid, "parts of its upload stay in the store, which is silent");
            }
        }
    }
    let uid = uid.clone();
    let removed = tokio::task::spawn_blocking(move || -> Result<(), FilesError> {
        let _turn = pool.turn();
        if !sabotage::active(sabotage::RELEASE_WITHOUT_DELETE) {
            pool.area.remove_work_dir(&pool.record, &uid)?;
        }
        pool.record.forget_staging(&uid)?;
        Ok(())
    });
    removed.await?
}
