//! The end of an upload: its parts are listed, made an object, and the object compared with what was sent.

use berth_core::ids::{Digest, Sha256Sum};
use berth_core::stages::{Shape, Stage};
use berth_core::units::Bytes;
use berth_objectstore::checksum::SourceHash;
use berth_objectstore::s3::{Part, Stored};
use berth_objectstore::{Body, ObjectStore as _, PutCondition, StoreError};
use bytes::Bytes as Buffer;
use futures::StreamExt as _;

use super::super::error::TransferError;
use super::super::job::SentObject;
use super::super::journal::Phase;
use super::ObjectAttempt;
use super::sending::SentPart;

impl ObjectAttempt<'_> {
    /// A small object, in one request.
    pub(super) async fn put_whole(
        &self,
        bytes: Buffer,
        virtual_size: Bytes,
        source_digest: Option<Digest>,
    ) -> Result<SentObject, TransferError> {
        let (store, key) = (&self.target.store, &self.target.key);
        let part = SentPart {
            number: 1,
            size: Bytes(bytes.len() as u64),
            etag: String::new(),
            sha256: Digest(Sha256Sum::of(&bytes)),
        };
        self.claim_holds().await?;
        store.put(key, Body::Bytes(bytes), PutCondition::Always, Some(part.sha256.0)).await?;
        let stored = store.stored(key).await?;
        let vouched = stored.has_sum(part.sha256.0);
        self.compare(&stored, vouched, &[part]).await?;
        Ok(told(stored, virtual_size, source_digest))
    }

    /// Makes the object of its parts. Of an upload that is `gone` it may have become one before.
    pub(super) async fn complete(
        &self,
        ready: &Phase,
        upload: &str,
        mut parts: Vec<SentPart>,
        gone: bool,
        shape: &Shape,
        source_digest: Option<Digest>,
    ) -> Result<SentObject, TransferError> {
        let (store, key) = (&self.target.store, &self.target.key);
        parts.sort_by_key(|part| part.number);
        let made: Vec<Part> = parts.iter().map(SentPart::part).collect();
        let gone = gone || self.make(ready, upload, &parts, made.clone(), shape).await?;
        let stored = match store.stored(key).await {
            Err(error @ StoreError::NotFound { .. }) if gone => {
                self.or_anew(ready, Err(error.into())).await?
            }
            stored => stored?,
        };
        let vouched = stored.is_made_of(&made);
        if let Err(error) = self.compare(&stored, vouched, &parts).await {
            if matches!(error, TransferError::Object { .. }) {
                self.journal.save(ready.clone()).await?;
            }
            return Err(error);
        }
        Ok(told(stored, shape.virtual_size, source_digest))
    }

    /// Lists the parts, and asks for the object of them; true if the upload is gone.
    async fn make(
        &self,
        ready: &Phase,
        upload: &str,
        parts: &[SentPart],
        made: Vec<Part>,
        shape: &Shape,
    ) -> Result<bool, TransferError> {
        self.say(shape, Stage::Verify, Bytes::ZERO, Bytes(1));
        tracing::info!(stage = "Verify", parts = parts.len(), "verifying");
        self.check_listed(ready, upload, parts).await?;
        tracing::info!(stage = "Publish", parts = parts.len(), "publishing");
        self.say(shape, Stage::Publish, Bytes::ZERO, Bytes(1));
        self.claim_holds().await?;
        let request = {
            let (store, key) = (self.target.store.clone(), self.target.key.clone());
            let upload = upload.to_owned();
            async move { store.complete_upload(&key, &upload, &made).await }
        };
        match self.journal.to_the_end(request).await? {
            Err(StoreError::NotFound { .. }) => Ok(true),
            completed => self.or_anew(ready, completed.map_err(TransferError::from)).await.map(|()| false),
        }
    }

    /// Refuses to make an object of an upload that lacks a part, or has another one. A store that does not list parts is
    /// believed; the object is compared afterwards all the same.
    async fn check_listed(
        &self,
        ready: &Phase,
        upload: &str,
        parts: &[SentPart],
    ) -> Result<(), TransferError> {
        let key = &self.target.key;
        let listed = match self.target.store.list_parts(key, upload).await {
            // Completed before, perhaps.
            Err(StoreError::NotFound { .. } | StoreError::Unsupported { .. }) => return Ok(()),
            listed => listed?,
        };
        let is_there = |part: &&SentPart| {
            listed.iter().any(|found| {
                found.number == part.number as usize && found.size == part.size && found.etag.0 == part.etag
            })
        };
        match parts.iter().find(|part| !is_there(part)) {
            None => Ok(()),
            Some(part) => {
                self.journal.save(ready.clone()).await?;
                self.target.store.abort_upload(key, upload).await?;
                Err(self.differs(format!("part {} of its upload is not as it was sent", part.number)))
            }
        }
    }

    /// The object must have the size and the bytes of its parts: the store vouches for them, or they are read back.
    async fn compare(&self, stored: &Stored, vouched: bool, parts: &[SentPart]) -> Result<(), TransferError> {
        let size: Bytes = parts.iter().map(|part| part.size).sum();
        if stored.size != size {
            return Err(self.differs(format!("it has {}, not {size}", stored.size)));
        }
        if vouched {
            return Ok(());
        }
        tracing::info!(
            stage = "Publish",
            bytes = size.0,
            "the store does not vouch for the object: it is read back"
        );
        let object = self.target.store.get(&self.target.key, None, stored.etag.as_ref()).await?;
        let mut body = object.body;
        let mut held = Buffer::new();
        for part in parts {
            let (mut left, mut hash) = (part.size.0, SourceHash::new());
            while left > 0 {
                if held.is_empty() {
                    let short = || self.differs(format!("it ends within part {}", part.number));
                    held = body.next().await.ok_or_else(short)??;
                }
                let len = usize::try_from(left).unwrap_or(usize::MAX).min(held.len());
                hash.update(&held.split_to(len));
                left -= len as u64;
            }
            if hash.finish() != part.sha256.0 {
                return Err(self.differs(format!("its bytes are not those of part {}", part.number)));
            }
        }
        Ok(())
    }

    /// What a store refuses for good, it refuses because of what it has of this upload: the next attempt begins anew.
    pub(super) async fn or_anew<T>(
        &self,
        ready: &Phase,
        outcome: Result<T, TransferError>,
    ) -> Result<T, TransferError> {
        use StoreError::{InvalidRequest, NotFound};
        if matches!(outcome, Err(TransferError::Store(NotFound { .. } | InvalidRequest { .. }))) {
            self.journal.save(ready.clone()).await?;
        }
        outcome
    }

    async fn claim_holds(&self) -> Result<(), TransferError> {
        if self.claim.holds().await { Ok(()) } else { Err(TransferError::NotOurs) }
    }

    fn differs(&self, problem: String) -> TransferError {
        let place = format!("s3://{}/{}", self.target.store.bucket(), self.target.key);
        TransferError::Object { place, problem }
    }
}

fn told(stored: Stored, virtual_size: Bytes, source_digest: Option<Digest>) -> SentObject {
    SentObject {
        size: stored.size,
        virtual_size,
        source_digest,
        etag: stored.etag.map(|etag| etag.0),
        version: stored.version,
    }
}
