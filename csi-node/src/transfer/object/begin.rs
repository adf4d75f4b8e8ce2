//! The upload that an attempt goes on with: the recorded one, one of another node, or a new one.

use berth_image::Output;
use berth_objectstore::StoreError;

use super::super::direct::{Readable, SourceSum};
use super::super::error::TransferError;
use super::super::journal::Phase;
use super::assemble::Assembler;
use super::sending::Sending;
use super::{ObjectAttempt, ObjectTarget};

impl ObjectAttempt<'_> {
    /// The upload of the same image that this node has recorded, or another one has told of; else a new one.
    pub(super) async fn begin(
        &self,
        ready: &Phase,
        image: &Readable,
        output: Output,
        before: Option<Sending>,
    ) -> Result<(Sending, Assembler), TransferError> {
        let identity = format!("{} as {:?}", image.identity, output.format);
        if let Some(sending) = before {
            if let Some(assembler) = assembler_at(&sending, &identity, output, image.sum) {
                return Ok((sending, assembler));
            }
            self.target.store.abort_upload(&self.target.key, &sending.upload).await?;
        } else if let Some(told) = self.resume.and_then(Sending::parse)
            && let Some(assembler) = assembler_at(&told, &identity, output, image.sum)
            && let Some(sending) = self.adopted(told, &assembler).await?
        {
            self.record(ready, &sending).await?;
            return Ok((sending, assembler));
        }
        let upload = self.new_upload(ready).await?;
        let sending = Sending::new(upload, identity);
        self.record(ready, &sending).await?;
        Ok((sending, Assembler::new(output, image.sum)?))
    }

    /// What another node has sent, if the store tells of all of it; given up there if not.
    async fn adopted(&self, told: Sending, assembler: &Assembler) -> Result<Option<Sending>, TransferError> {
        let (store, key, upload) = (&self.target.store, &self.target.key, told.upload.clone());
        let listed = match store.list_parts(key, &upload).await {
            Err(StoreError::NotFound { .. } | StoreError::Unsupported { .. }) => return Ok(None),
            listed => listed?,
        };
        let adopted = told.with_parts(listed, assembler.first_part(), assembler.parts_done());
        if adopted.is_none() {
            store.abort_upload(key, &upload).await?;
        }
        Ok(adopted)
    }

    /// Begins an upload. One whose answer is lost, on the way or with this process, is found by having no part and not having
    /// been there before.
    async fn new_upload(&self, ready: &Phase) -> Result<String, TransferError> {
        let Some(known) = uploads(self.target).await? else {
            return Ok(self.target.store.begin_upload(&self.target.key).await?);
        };
        let beginning = Phase::Beginning { ready: Box::new(ready.clone()), known: known.clone() };
        self.journal.save(beginning).await?;
        let (store, key) = (self.target.store.clone(), self.target.key.clone());
        let upload = self.journal.to_the_end(async move { store.begin_upload(&key).await }).await??;
        give_up_unknown(self.target, &known, Some(&upload)).await?;
        Ok(upload)
    }
}

/// The uploads to a key; `None` if the store does not list them.
async fn uploads(target: &ObjectTarget) -> Result<Option<Vec<String>>, TransferError> {
    match target.store.list_uploads(&target.key).await {
        Err(
            StoreError::Unsupported { .. } | StoreError::InvalidRequest { .. } | StoreError::NotFound { .. },
        ) => Ok(None),
        listed => Ok(Some(listed?)),
    }
}

/// Gives up the uploads to the key that are not known, not `ours`, and have no part: ours, whose answer was lost.
pub(super) async fn give_up_unknown(
    target: &ObjectTarget,
    known: &[String],
    ours: Option<&str>,
) -> Result<(), TransferError> {
    let found = uploads(target).await?.unwrap_or_default();
    for upload in found.iter().filter(|upload| !known.contains(*upload) && ours != Some(upload.as_str())) {
        let parts = match target.store.list_parts(&target.key, upload).await {
            Err(StoreError::NotFound { .. }) => continue,
            listed => listed?,
        };
        if parts.is_empty() {
            target.store.abort_upload(&target.key, upload).await?;
        }
    }
    Ok(())
}

/// Where an upload goes on, if it is of this image in this format.
fn assembler_at(sending: &Sending, identity: &str, output: Output, sum: SourceSum) -> Option<Assembler> {
    if sending.identity != identity {
        return None;
    }
    match sending.moment() {
        None if sending.is_begun() => None,
        None => Assembler::new(output, sum).ok(),
        Some(moment) => Assembler::resume(&moment, sum).ok().filter(|assembler| assembler.is_of(&output)),
    }
}
