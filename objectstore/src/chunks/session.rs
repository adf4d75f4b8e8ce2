//! A writer's session: it protects what the writer relies on, and hands the work over to one writer at a time.
//!
//! 1. The session is written **before** the first question whether a chunk is there. Collection deletes only candidates
//!    older than every open session, so a chunk that was found stays.
//! 2. Tombstones are listed after that: a chunk that is a candidate already is sent again.
//! 3. A checkpoint writes the new pieces of the index first, then the session that names them.
//! 4. A session is taken over by a higher generation with a conditional write; the older writer meets
//!    [`SessionError::Superseded`] at its next checkpoint and stops.

use std::path::Path;
use std::sync::Arc;

use berth_core::ids::{NodeName, Sha256Sum, Uid};
use berth_core::units::{Bytes as Size, Generation, Timestamp};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::caibx::{ITEM, decode_item, encode_item};
use super::index_file::{IndexFile, IndexFileError, entries};
use super::store::ChunkStore;
use super::tombstones::Tombstones;
use super::upload::{Checkpoint, ChunkUploader, UploadError};
use crate::layout::LayoutError;
use crate::{Body, ETag, ObjectStore, PutCondition, StoreError, small};

/// Items in a piece of an unfinished index: at most 88 KiB are written again with every checkpoint.
const SEGMENT: u64 = 2048;
/// An item in a piece: as in the index, then the stored size.
const ENTRY: usize = ITEM + 4;
/// The version of the format of sessions that is written, and the newest that is read.
const FORMAT: u32 = 1;
/// How often a session that changes under our hands is tried.
const TRIES: usize = 4;

/// Why a session cannot begin or go on.
#[derive(Debug, Error)]
pub enum SessionError {
    /// A later writer has the work. Stop, and touch nothing.
    #[error("session {uid} of generation {ours} was taken over by generation {found} on node `{node}`")]
    Superseded {
        /// The session.
        uid: Uid,
        /// Our generation.
        ours: Generation,
        /// The other one's.
        found: Generation,
        /// Where it runs.
        node: NodeName,
    },
    /// The session was ended by someone else: the work was given up.
    #[error("session {uid} is gone")]
    Gone {
        /// The session.
        uid: Uid,
    },
    /// Others keep changing the session.
    #[error("session {uid} keeps changing")]
    Contended {
        /// The session.
        uid: Uid,
    },
    /// A newer version has written it.
    #[error("{key} was written by a newer version of Berth: upgrade this one")]
    Newer {
        /// The object.
        key: String,
    },
    /// A piece of its index is not readable: start over.
    #[error("{key} of the session is damaged")]
    Corrupt {
        /// The object.
        key: String,
    },
    /// The uid cannot be a part of a key.
    #[error("the session has no valid uid")]
    Uid(#[from] LayoutError),
    /// The store.
    #[error("failed to keep session {uid}")]
    Store {
        /// The session.
        uid: Uid,
        /// What the store said.
        source: StoreError,
    },
    /// The local index.
    #[error("failed to read or write the local index of the session")]
    Index(#[from] IndexFileError),
    /// The upload.
    #[error("failed to go on with the upload of the session")]
    Upload(#[from] UploadError),
    /// The worker is gone: the runtime is shutting down, or it panicked.
    #[error("the session's worker is gone")]
    Worker(#[source] tokio::task::JoinError),
}

impl SessionError {
    /// True if the same may succeed later without anyone doing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store { source, .. } => source.is_transient(),
            Self::Upload(source) => source.is_transient(),
            Self::Contended { .. } => true,
            _ => false,
        }
    }
}

/// Who begins a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Writer {
    /// The transfer or import.
    pub uid: Uid,
    /// How often it was placed.
    pub generation: Generation,
    /// Where it runs.
    pub node: NodeName,
    /// When it began, for people; nothing is decided by it.
    pub started: Timestamp,
}

/// What every version of a session's object holds.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct FormatVersion {
    format_version: u32,
}

/// What a session's object holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SessionRecord {
    /// 1.
    pub format_version: u32,
    /// The transfer or import.
    pub uid: Uid,
    /// The writer's generation.
    pub generation: Generation,
    /// Where it runs.
    pub node: NodeName,
    /// When it began.
    pub started: Timestamp,
    /// How far it is.
    pub checkpoint: Option<Saved>,
}

/// A checkpoint as it lies in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Saved {
    /// How far the upload is.
    pub upload: Checkpoint,
    /// Whose pieces make up its index; of several that hold an item, the last one counts.
    pub index: Vec<Span>,
    /// What the caller wants back: version of the source, state of its hash.
    pub state: serde_json::Value,
}

/// Items of an index whose pieces one generation wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Span {
    /// The writer.
    pub generation: Generation,
    /// The first item; where a piece begins.
    pub from: u64,
    /// The item after the last.
    pub to: u64,
}

/// An open session.
pub struct Session<S> {
    chunks: ChunkStore<S>,
    key: String,
    record: SessionRecord,
    etag: Option<ETag>,
    tombstones: Arc<Tombstones>,
}

impl<S: ObjectStore> Session<S> {
    /// Begins, or takes over what an earlier generation, or the same one before a crash, has left.
    pub async fn begin(chunks: ChunkStore<S>, writer: Writer) -> Result<Self, SessionError> {
        Self::open(chunks, writer, true).await
    }

    /// Goes on with a session that this writer has begun before.
    ///
    /// # Errors
    /// [`SessionError::Gone`] if it is not there any more: the work was given up.
    pub async fn resume(chunks: ChunkStore<S>, writer: Writer) -> Result<Self, SessionError> {
        Self::open(chunks, writer, false).await
    }

    async fn open(chunks: ChunkStore<S>, writer: Writer, may_begin: bool) -> Result<Self, SessionError> {
        let key = chunks.layout().session(&writer.uid)?;
        let record = SessionRecord {
            format_version: FORMAT,
            uid: writer.uid,
            generation: writer.generation,
            node: writer.node,
            started: writer.started,
            checkpoint: None,
        };
        let mut session = Self { chunks, key, record, etag: None, tombstones: Arc::default() };
        for _ in 0..TRIES {
            if let Some(found) = session.read().await? {
                session.refuse_later(&found)?;
                session.record.checkpoint = found.checkpoint;
            } else if !may_begin {
                return Err(SessionError::Gone { uid: session.record.uid });
            }
            if session.try_write().await? {
                let listed =
                    Tombstones::list(&session.chunks).await.map_err(|source| session.failed(source))?;
                session.tombstones = Arc::new(listed);
                return Ok(session);
            }
        }
        Err(SessionError::Contended { uid: session.record.uid })
    }

    /// What was saved last, by us or by who was before us.
    pub fn saved(&self) -> Option<&Saved> {
        self.record.checkpoint.as_ref()
    }

    /// The size of the chunks of its image store.
    pub fn chunk_size(&self) -> Size {
        self.chunks.chunk_size().size()
    }

    /// The candidates for removal when the session began.
    pub fn tombstones(&self) -> Arc<Tombstones> {
        Arc::clone(&self.tombstones)
    }

    /// The uploader, at the last checkpoint if there is one: from the index at `path`, or, where that is missing or
    /// another one, from the pieces in the store.
    ///
    /// # Errors
    /// [`SessionError::Corrupt`] if the pieces are not whole: call [`Session::start_over`] and this again.
    pub async fn uploader(&self, path: &Path) -> Result<ChunkUploader<S>, SessionError> {
        let Some(saved) = &self.record.checkpoint else {
            return Ok(ChunkUploader::new(self.chunks.clone(), self.tombstones(), path)?);
        };
        let resume = || ChunkUploader::resume(self.chunks.clone(), self.tombstones(), path, &saved.upload);
        match resume() {
            Err(UploadError::Index(IndexFileError::Lost { .. })) => {
                self.restore_index(path, saved).await?;
                Ok(resume()?)
            }
            other => Ok(other?),
        }
    }

    /// The uploader at the last checkpoint, from the index at `path` alone: whoever can write to the store has no say in
    /// what the image is. That is why a run of zeros that only the checkpoint tells of does not count. Starts over if that
    /// index does not reach the checkpoint, which is another node's then.
    pub async fn local_uploader(&mut self, path: &Path) -> Result<ChunkUploader<S>, SessionError> {
        if let Some(saved) = &self.record.checkpoint {
            let vouched = saved.upload.at_its_last_item();
            match ChunkUploader::resume(self.chunks.clone(), self.tombstones(), path, &vouched) {
                Err(UploadError::Index(IndexFileError::Lost { .. })) => self.start_over().await?,
                other => return Ok(other?),
            }
        }
        Ok(ChunkUploader::new(self.chunks.clone(), self.tombstones(), path)?)
    }

    /// Sees to it that the session is still there, and still ours. To be done before anything is published, and again
    /// afterwards: whoever gives work up ends its session first.
    pub async fn confirm(&mut self) -> Result<(), SessionError> {
        self.still_ours().await
    }

    /// Forgets the checkpoint. What is in the store is found again chunk by chunk.
    pub async fn start_over(&mut self) -> Result<(), SessionError> {
        self.record.checkpoint = None;
        self.write().await
    }

    /// Saves a checkpoint of `uploader`, with what the caller needs to go on.
    pub async fn checkpoint(
        &mut self,
        uploader: &mut ChunkUploader<S>,
        state: serde_json::Value,
    ) -> Result<(), SessionError> {
        let upload = uploader.flush().await?;
        let (mut index, saved) = match self.record.checkpoint.take() {
            Some(saved) => (saved.index, saved.upload.items),
            None => (Vec::new(), 0),
        };
        let from = saved / SEGMENT * SEGMENT;
        self.save_pieces(uploader.index_path(), from, upload.items).await?;
        match index.last_mut() {
            Some(span) if span.generation == self.record.generation => span.to = upload.items,
            _ => index.push(Span { generation: self.record.generation, from, to: upload.items }),
        }
        self.record.checkpoint = Some(Saved { upload, index, state });
        self.write().await
    }

    /// Ends the session: nothing of it stays in the store.
    pub async fn end(mut self) -> Result<(), SessionError> {
        match self.read().await? {
            None => return Ok(()),
            Some(found) => self.refuse_later(&found)?,
        }
        let prefix = self.chunks.layout().segments(&self.record.uid)?;
        loop {
            let page = self.chunks.store().list(&prefix, None).await.map_err(|source| self.failed(source))?;
            for object in &page.objects {
                self.chunks.store().delete(&object.key).await.map_err(|source| self.failed(source))?;
            }
            if !page.more || page.objects.is_empty() {
                break;
            }
        }
        self.chunks.store().delete(&self.key).await.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: StoreError) -> SessionError {
        SessionError::Store { uid: self.record.uid.clone(), source }
    }

    /// Reads the session as it is in the store, and remembers its version.
    async fn read(&mut self) -> Result<Option<SessionRecord>, SessionError> {
        match small(self.chunks.store(), &self.key).await {
            Ok((bytes, etag)) => {
                self.etag = etag;
                let version = serde_json::from_slice::<FormatVersion>(&bytes);
                if version.is_ok_and(|found| found.format_version > FORMAT) {
                    return Err(SessionError::Newer { key: self.key.clone() });
                }
                match serde_json::from_slice(&bytes) {
                    Ok(found) => Ok(Some(found)),
                    // As if it were not there: what it told of is sent again, where the store lacks it.
                    Err(error) => {
                        tracing::warn!(key = self.key, %error, "a damaged session is begun anew");
                        Ok(None)
                    }
                }
            }
            Err(StoreError::NotFound { .. }) => {
                self.etag = None;
                Ok(None)
            }
            Err(source) => Err(self.failed(source)),
        }
    }

    fn refuse_later(&self, found: &SessionRecord) -> Result<(), SessionError> {
        if found.generation > self.record.generation {
            return Err(SessionError::Superseded {
                uid: self.record.uid.clone(),
                ours: self.record.generation,
                found: found.generation,
                node: found.node.clone(),
            });
        }
        Ok(())
    }

    /// Writes our record over the version that was read or written last; false if it is another one by now.
    async fn try_write(&mut self) -> Result<bool, SessionError> {
        let text =
            serde_json::to_vec(&self.record).map_err(|_| SessionError::Corrupt { key: self.key.clone() })?;
        let sum = Sha256Sum::of(&text);
        let condition = match (&self.etag, self.chunks.capabilities().conditional_writes) {
            (_, false) => PutCondition::Always,
            (None, true) => PutCondition::IfAbsent,
            (Some(etag), true) => PutCondition::IfMatch(etag.clone()),
        };
        let unconditional = condition == PutCondition::Always;
        match self.chunks.store().put(&self.key, Body::Bytes(text.into()), condition, Some(sum)).await {
            Ok(Some(etag)) if !unconditional => self.etag = Some(etag),
            Ok(_) => {
                // Without conditions, or without a version to go on with: see who was last.
                let found = self.read().await?;
                return Ok(found.as_ref() == Some(&self.record));
            }
            // An attempt whose answer was lost has also changed the object: then it is ours.
            Err(StoreError::PreconditionFailed { .. }) => {
                let found = self.read().await?;
                return Ok(found.as_ref() == Some(&self.record));
            }
            Err(StoreError::NotFound { .. }) => return Ok(false),
            Err(source) => return Err(self.failed(source)),
        }
        Ok(true)
    }

    /// Writes our record, unless a later writer has the session or it is gone.
    async fn write(&mut self) -> Result<(), SessionError> {
        for _ in 0..TRIES {
            if !self.chunks.capabilities().conditional_writes {
                self.still_ours().await?;
            }
            if self.try_write().await? {
                return Ok(());
            }
            self.still_ours().await?;
        }
        Err(SessionError::Contended { uid: self.record.uid.clone() })
    }

    async fn still_ours(&mut self) -> Result<(), SessionError> {
        match self.read().await? {
            Some(found) => self.refuse_later(&found),
            None => Err(SessionError::Gone { uid: self.record.uid.clone() }),
        }
    }

    /// Writes the pieces of the index that hold items `from..to`.
    async fn save_pieces(&self, path: &Path, from: u64, to: u64) -> Result<(), SessionError> {
        let mut first = from;
        while first < to {
            let last = to.min(first + SEGMENT);
            let path = path.to_owned();
            let piece = tokio::task::spawn_blocking(move || encode_piece(&path, first, last))
                .await
                .map_err(SessionError::Worker)??;
            let key = self.chunks.layout().segment(&self.record.uid, self.record.generation, first)?;
            let sum = Sha256Sum::of(&piece);
            self.chunks
                .store()
                .put(&key, Body::Bytes(piece), PutCondition::Always, Some(sum))
                .await
                .map_err(|source| self.failed(source))?;
            first = last;
        }
        Ok(())
    }

    /// Makes the local index again from the pieces in the store.
    async fn restore_index(&self, path: &Path, saved: &Saved) -> Result<(), SessionError> {
        let mut file = IndexFile::create(path, self.chunks.chunk_size())?;
        while file.items() < saved.upload.items {
            let first = file.items();
            let span = saved.index.iter().rev().find(|span| span.from <= first && first < span.to);
            let span = span.ok_or_else(|| SessionError::Corrupt { key: self.key.clone() })?;
            let key = self.chunks.layout().segment(&self.record.uid, span.generation, first)?;
            let corrupt = || SessionError::Corrupt { key: key.clone() };
            let (piece, _) = match small(self.chunks.store(), &key).await {
                Err(StoreError::NotFound { .. }) => return Err(corrupt()),
                other => other.map_err(|source| self.failed(source))?,
            };
            let last = saved.upload.items.min(first + SEGMENT);
            append_piece(&mut file, &piece, last - first).ok_or_else(corrupt)??;
        }
        file.sync().await?;
        Ok(())
    }
}

/// Items `first..last` of the local index as a piece. Blocking.
fn encode_piece(path: &Path, first: u64, last: u64) -> Result<Bytes, IndexFileError> {
    let mut piece = BytesMut::new();
    for entry in entries(path, first, last)? {
        let entry = entry?;
        piece.put_slice(&encode_item(entry.end, &entry.id));
        piece.put_u32_le(entry.stored);
    }
    Ok(piece.freeze())
}

/// Adds the first `count` items of a piece; nothing if it has fewer, or they do not follow.
fn append_piece(file: &mut IndexFile, piece: &[u8], count: u64) -> Option<Result<(), IndexFileError>> {
    let count = usize::try_from(count).ok()?;
    let bytes = piece.get(..count * ENTRY)?;
    for entry in bytes.chunks_exact(ENTRY) {
        let (item, mut stored) = entry.split_at(ITEM);
        let (end, id) = decode_item(item.try_into().ok()?);
        let len = end.checked_sub(file.end()).filter(|len| *len > 0)?;
        if let Err(error) = file.append(len, &id, stored.get_u32_le()) {
            return Some(Err(error));
        }
    }
    Some(Ok(()))
}
