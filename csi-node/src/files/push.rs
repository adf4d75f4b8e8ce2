//! A file that a pod has changed to its object store: in parts, with a checkpoint after each, verified when all are there.

use std::fs::File;
use std::sync::Arc;

use berth_core::ids::{Digest, Sha256Sum};
use berth_core::reason::ReasonClass;
use berth_core::units::Bytes;
use berth_objectstore::checksum::SourceHash;
use berth_objectstore::s3::{MAX_PARTS, Part, S3Store, Stored};
use berth_objectstore::{Body, ETag, ObjectStore as _, PutCondition, StoreError};
use berth_record::{FileContent, FileEntry, Sending, SentFile, SentPart, tables};
use bytes::Bytes as Buffer;
use futures::StreamExt as _;

use super::error::FileError;
use super::local::{self, Opened, Stamp};
use super::{FileWork, HasRecord, boot};
use crate::node::now;
use crate::telemetry::chain;
use crate::transfer::store_reason;

/// The least size of a part, and of a file that is sent in parts. Files of more than 156 GiB have larger parts, so that
/// there are not too many.
const PART: Bytes = Bytes::mib(16);

/// One attempt.
struct Push<'a, R> {
    work: &'a FileWork<R>,
    store: &'a S3Store,
    key: &'a str,
    name: String,
    file: Arc<File>,
    stamp: Stamp,
}

/// Sends the file, going on from where the record says it is. Returns when the object is verified and recorded as what the
/// file is. Stopped anywhere and called again, it does not send what the store has.
pub async fn push<R: HasRecord>(
    work: &FileWork<R>,
    store: &S3Store,
    key: &str,
) -> Result<SentFile, FileError> {
    let entry = look(work).await?;
    if let (false, Some(sent)) = (entry.is_only_copy(), &entry.sent) {
        return Ok(sent.clone());
    }
    let (dir, name) = (work.dir.clone(), entry.name.clone());
    let opened = tokio::task::spawn_blocking(move || local::open(&dir, &name)).await??;
    let Opened { file, stamp } = opened;
    let push = Push { work, store, key, name: entry.name.clone(), file: Arc::new(file), stamp };
    push.check_length().await?;
    push.claim(&entry).await?;
    (work.progress)(Bytes::ZERO, stamp.size);
    let sent = if stamp.size <= PART { push.whole(&entry).await? } else { push.parts(&entry).await? };
    push.check_unchanged().await?;
    let (record, uid, told) = (Arc::clone(&work.record), work.uid.clone(), sent.clone());
    tokio::task::spawn_blocking(move || record.record().file_sent(&uid, boot(), &told, now())).await??;
    Ok(sent)
}

async fn look<R: HasRecord>(work: &FileWork<R>) -> Result<FileEntry, FileError> {
    let (record, uid) = (Arc::clone(&work.record), work.uid.clone());
    let entry = tokio::task::spawn_blocking(move || record.record().file(&uid)).await??;
    entry.ok_or_else(|| FileError::NoFile(work.uid.to_string()))
}

/// The size of the parts of a file.
fn part_size(size: Bytes) -> Bytes {
    Bytes(size.0.div_ceil(MAX_PARTS)).round_up(Bytes::mib(1)).max(PART)
}

impl<R: HasRecord> Push<'_, R> {
    /// A file with holes may be longer than its directory: reading it would take for ever.
    async fn check_length(&self) -> Result<(), FileError> {
        let (record, uid) = (Arc::clone(&self.work.record), self.work.uid.clone());
        let staging =
            tokio::task::spawn_blocking(move || record.record().record().get(tables::STAGING, &uid))
                .await??;
        let promised = staging.map(|staging| staging.bytes).unwrap_or_default();
        let found = self.stamp.size;
        if found > promised {
            return Err(FileError::TooLong { name: self.name.clone(), found, promised });
        }
        Ok(())
    }

    async fn check_unchanged(&self) -> Result<(), FileError> {
        let (dir, name) = (self.work.dir.clone(), self.name.clone());
        let now = tokio::task::spawn_blocking(move || local::open(&dir, &name)).await??.stamp;
        let same = now == self.stamp;
        same.then_some(()).ok_or_else(|| FileError::Changing { name: self.name.clone() })
    }

    async fn read(&self, offset: Bytes, length: Bytes) -> Result<(Buffer, Sha256Sum), FileError> {
        let (file, name) = (Arc::clone(&self.file), self.name.clone());
        let read = tokio::task::spawn_blocking(move || local::read(&file, &name, offset, length));
        let (bytes, sum) = read.await??;
        Ok((bytes.into(), sum))
    }

    async fn record(&self, sending: Option<Sending>) -> Result<(), FileError> {
        let (record, uid) = (Arc::clone(&self.work.record), self.work.uid.clone());
        Ok(tokio::task::spawn_blocking(move || record.record().file_sending(&uid, boot(), sending)).await??)
    }

    /// Records that it is being sent, before anything is: from now on no pod may write to it until it is.
    async fn claim(&self, entry: &FileEntry) -> Result<(), FileError> {
        if entry.content != FileContent::OnlyCopy {
            return Ok(());
        }
        let claim = Sending {
            upload: String::new(),
            size: self.stamp.size,
            modified: self.stamp.modified,
            part: part_size(self.stamp.size),
            parts: Vec::new(),
            hash: Vec::new(),
        };
        self.record(Some(claim)).await?;
        self.check_unchanged().await
    }

    /// A small file, in one request.
    async fn whole(&self, entry: &FileEntry) -> Result<SentFile, FileError> {
        self.give_up(entry).await?;
        let (bytes, sum) = self.read(Bytes::ZERO, self.stamp.size).await?;
        let put = self.store.put(self.key, Body::Bytes(bytes), PutCondition::Always, Some(sum));
        self.work.stoppable(put).await??;
        let stored = self.work.stoppable(self.store.stored(self.key)).await??;
        self.verify(&stored, stored.has_sum(sum), sum).await?;
        Ok(self.told(stored, sum))
    }

    /// Parts that an earlier attempt has sent count only if they are of the same file.
    async fn begin(&self, entry: &FileEntry) -> Result<Sending, FileError> {
        if let FileContent::Sending(sending) = &entry.content
            && self.is_of(sending)
        {
            tracing::info!(reservation = %self.work.uid, parts = sending.parts.len(), "sending goes on");
            return Ok(sending.clone());
        }
        self.give_up(entry).await?;
        let sending = Sending {
            upload: self.work.stoppable(self.store.begin_upload(self.key)).await??,
            size: self.stamp.size,
            modified: self.stamp.modified,
            part: part_size(self.stamp.size),
            parts: Vec::new(),
            hash: SourceHash::new().state(),
        };
        self.record(Some(sending.clone())).await?;
        Ok(sending)
    }

    fn is_of(&self, sending: &Sending) -> bool {
        !sending.upload.is_empty()
            && (sending.size, sending.modified) == (self.stamp.size, self.stamp.modified)
            && SourceHash::from_state(&sending.hash).is_ok()
    }

    /// Gives up an upload that cannot be gone on with, if there is one. It is forgotten once the store has, or will not.
    async fn give_up(&self, entry: &FileEntry) -> Result<(), FileError> {
        if let FileContent::Sending(sending) = &entry.content
            && !sending.upload.is_empty()
        {
            match self.work.stoppable(self.store.abort_upload(self.key, &sending.upload)).await? {
                Err(error) if store_reason(&error).class() == ReasonClass::Terminal => {
                    let (reservation, error) = (&self.work.uid, chain(&error));
                    tracing::warn!(%reservation, upload = sending.upload, error, "its parts stay in the store");
                }
                aborted => aborted?,
            }
            self.record(None).await?;
        }
        Ok(())
    }

    async fn parts(&self, entry: &FileEntry) -> Result<SentFile, FileError> {
        let mut sending = self.begin(entry).await?;
        // Looked at in `begin`; one that is none begins anew there.
        let mut hash = SourceHash::from_state(&sending.hash).unwrap_or_default();
        let mut at = Bytes(sending.part.0.saturating_mul(sending.parts.len() as u64)).min(sending.size);
        while at < sending.size {
            let length = sending.part.min(sending.size.saturating_sub(at));
            let (bytes, sum) = self.read(at, length).await?;
            hash.update(&bytes);
            let number = sending.parts.len() + 1;
            let put = self.store.put_part(self.key, &sending.upload, number, bytes, sum);
            let sent = self.work.stoppable(put).await?;
            let part = self.or_anew(&sending, sent).await?;
            sending.parts.push(SentPart { etag: part.etag.0, sha256: Digest(sum) });
            sending.hash = hash.state();
            self.record(Some(sending.clone())).await?;
            at = at.saturating_add(length);
            (self.work.progress)(at, sending.size);
        }
        self.complete(&sending, hash.finish()).await
    }

    async fn complete(&self, sending: &Sending, sum: Sha256Sum) -> Result<SentFile, FileError> {
        let part = |part: &SentPart| Part { etag: ETag(part.etag.clone()), sha256: part.sha256.0 };
        let parts: Vec<Part> = sending.parts.iter().map(part).collect();
        let complete = self.store.complete_upload(self.key, &sending.upload, &parts);
        let completed = self.work.stoppable(complete).await?;
        // An upload that is gone may have been completed by an attempt that never heard of it: the object tells.
        let gone = match completed {
            Ok(()) => false,
            Err(StoreError::NotFound { .. }) => true,
            Err(error) => return self.or_anew(sending, Err(error)).await,
        };
        let stored = match self.work.stoppable(self.store.stored(self.key)).await? {
            Err(StoreError::NotFound { place }) if gone => {
                return self.or_anew(sending, Err(StoreError::NotFound { place })).await;
            }
            stored => stored?,
        };
        let verified = self.verify(&stored, stored.is_made_of(&parts) || stored.has_sum(sum), sum).await;
        if matches!(verified, Err(FileError::Verify { .. })) {
            self.record(None).await?;
        }
        verified?;
        Ok(self.told(stored, sum))
    }

    /// What a store refuses for good, it refuses because of what it has of this upload: the next attempt begins anew. Until
    /// that has given it up, it stays recorded, with no parts and no hash that it could be gone on with.
    async fn or_anew<T>(&self, of: &Sending, outcome: Result<T, StoreError>) -> Result<T, FileError> {
        if matches!(outcome, Err(StoreError::NotFound { .. } | StoreError::InvalidRequest { .. })) {
            self.record(Some(Sending { parts: Vec::new(), hash: Vec::new(), ..of.clone() })).await?;
        }
        Ok(outcome?)
    }

    /// The object must have the size and the bytes of the file: the store vouches for them, or they are read back.
    async fn verify(&self, stored: &Stored, vouched: bool, sum: Sha256Sum) -> Result<(), FileError> {
        let place = || format!("s3://{}/{}", self.store.bucket(), self.key);
        if stored.size != self.stamp.size {
            let problem = format!("it has {}, not {}", stored.size, self.stamp.size);
            return Err(FileError::Verify { place: place(), problem });
        }
        if vouched {
            return Ok(());
        }
        let get = self.store.get(self.key, None, stored.etag.as_ref());
        let mut object = self.work.stoppable(get).await??;
        let mut hash = SourceHash::new();
        while let Some(piece) = self.work.stoppable(object.body.next()).await? {
            hash.update(&piece?);
        }
        let found = hash.finish();
        if found != sum {
            let problem = format!("its bytes have sha256:{found}, not sha256:{sum}");
            return Err(FileError::Verify { place: place(), problem });
        }
        Ok(())
    }

    fn told(&self, stored: Stored, sum: Sha256Sum) -> SentFile {
        SentFile {
            etag: stored.etag.map(|etag| etag.0),
            version: stored.version,
            sha256: Digest(sum),
            size: self.stamp.size,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_file_has_too_many_parts_and_a_kill_costs_a_window() {
        assert_eq!(part_size(Bytes::gib(100)), PART);
        let huge = Bytes::gib(4 << 10);
        assert!(huge.0.div_ceil(part_size(huge).0) <= MAX_PARTS);
        assert_eq!(part_size(huge).0 % (1 << 20), 0);
    }
}
