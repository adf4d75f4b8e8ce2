//! One object of an image, in the format of other tools: written in one pass, straight into the parts of an upload.
//!
//! **Memory**: three parts (16 MiB each for objects of up to 156 GiB), [`AT_ONCE`] blocks of 2 MiB that are compressed, and
//! those that are read ahead.

mod assemble;
mod begin;
mod finish;
mod sending;

use std::collections::VecDeque;
use std::sync::Arc;

use berth_core::ids::{Digest, Sha256Sum, Uid};
use berth_core::stages::{Shape, Stage};
use berth_core::units::Bytes;
use berth_image::{BLOCK, Output, OutputFormat};
use berth_objectstore::StoreError;
use berth_objectstore::s3::S3Store;
use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use self::assemble::{Assembled, Assembler, Moment, encoded};
pub use self::sending::{Sending, SentPart};
use super::direct::{self, Readable, Source};
use super::error::TransferError;
use super::job::{Reporter, SentObject, Snapshot, TransferJob};
use super::journal::{Journal, Mark, Phase};
use super::run::remove_files;

/// How many blocks are compressed at the same time, and how many more wait to be.
const AT_ONCE: usize = 8;
/// How many parts are on their way to the store: what a kill costs.
const IN_FLIGHT: usize = 2;

/// The object that an image becomes.
#[derive(Clone)]
pub struct ObjectTarget {
    /// Its store.
    pub store: S3Store,
    /// Its key. What is there is replaced.
    pub key: String,
    /// Its format.
    pub format: OutputFormat,
}

impl ObjectTarget {
    /// What is written for `work`, which gives formats that want an id one that is always the same.
    fn output(&self, work: &Uid, virtual_size: Bytes) -> Output {
        let mut id = [0; 16];
        id.copy_from_slice(&Sha256Sum::of(work.as_str().as_bytes()).0[..16]);
        Output { format: self.format, virtual_size, level: None, id }
    }
}

/// Says whether the work is still its own to do, asked before something that cannot be taken back.
pub trait Claim: Send + Sync {
    /// True if it is.
    fn holds(&self) -> futures::future::BoxFuture<'_, bool>;
}

/// Everything that one attempt works with.
pub struct ObjectAttempt<'a> {
    /// What is to be done.
    pub job: &'a TransferJob,
    /// Where the image comes from.
    pub source: &'a Source,
    /// What it becomes.
    pub target: &'a ObjectTarget,
    /// How far it is.
    pub journal: &'a Journal,
    /// Whom to tell.
    pub reporter: &'a Arc<dyn Reporter>,
    /// What an attempt on another node has told of its upload.
    pub resume: Option<&'a str>,
    /// Whether it is still to be done here.
    pub claim: &'a dyn Claim,
}

/// A part on its way, and what is known once it has landed.
type Flight = AbortOnDropHandle<Result<(SentPart, Option<Moment>), TransferError>>;

/// Tries once to make the object, from wherever the journal says it is.
///
/// # Errors
/// As [`super::attempt`].
pub async fn send(
    attempt: &ObjectAttempt<'_>,
    cancel: &CancellationToken,
) -> Result<SentObject, TransferError> {
    let outcome = cancel.run_until_cancelled(attempt.run()).await;
    attempt.journal.idle().await;
    outcome.unwrap_or(Err(TransferError::Cancelled))
}

/// Takes back what a failed or abandoned transfer has left: its upload, its files, its place in the record. The object, if
/// it has become one, stays.
pub async fn abandon_object(
    job: &TransferJob,
    target: &ObjectTarget,
    journal: &Journal,
    resume: Option<&str>,
) -> Result<(), TransferError> {
    let ours = match journal.load().await? {
        Phase::Sending { sending, .. } => Some(sending.upload),
        Phase::Beginning { known, .. } => {
            begin::give_up_unknown(target, &known, None).await?;
            None
        }
        _ => None,
    };
    let others = resume.and_then(Sending::parse).map(|sending| sending.upload);
    for upload in ours.into_iter().chain(others) {
        if crate::sabotage::active("keep-upload") {
            continue;
        }
        target.store.abort_upload(&target.key, &upload).await?;
    }
    journal.forget().await?;
    remove_files(job, journal).await
}

impl ObjectAttempt<'_> {
    async fn run(&self) -> Result<SentObject, TransferError> {
        let (ready, before) = match self.journal.load().await? {
            Phase::Sent { object } => return self.finish(object).await,
            Phase::Sending { ready, sending } => (*ready, Some(sending)),
            Phase::Beginning { ready, known } => {
                begin::give_up_unknown(self.target, &known, None).await?;
                (*ready, None)
            }
            other => (other, None),
        };
        let image = direct::ready(self.job, self.source, self.journal, self.reporter, None, ready).await?;
        let ready = image.phase.clone();
        if crate::sabotage::active("ready-before-verified") {
            return Ok(pretended(image.content.virtual_size()));
        }
        let virtual_size = image.content.virtual_size();
        let output = self.target.output(&self.job.uid, virtual_size);
        let object = if output.plan()?.whole {
            self.whole(output, image).await?
        } else {
            let (sending, assembler) = self.begin(&ready, &image, output, before).await?;
            self.parts(&ready, image, sending, assembler).await?
        };
        self.journal.save(Phase::Sent { object: object.clone() }).await?;
        self.finish(object).await
    }

    async fn finish(&self, object: SentObject) -> Result<SentObject, TransferError> {
        direct::let_go(self.job, self.source).await?;
        remove_files(self.job, self.journal).await?;
        Ok(object)
    }

    /// A small object, in one request.
    async fn whole(&self, output: Output, image: Readable) -> Result<SentObject, TransferError> {
        let shape = image.shape;
        let mut assembler = Assembler::new(output, image.sum)?;
        let pieces = image.content.pieces(Bytes::ZERO, BLOCK);
        let mut blocks = encoded(pieces, assembler.encoder(), Bytes::ZERO);
        while let Some(block) = blocks.next().await {
            (assembler, _) = assembler.add(block?).await?;
        }
        let (parts, source_digest) = assembler.finish().await?;
        let bytes: Vec<u8> = parts.into_iter().flat_map(|part| part.bytes).collect();
        self.say(&shape, Stage::Publish, Bytes::ZERO, Bytes(1));
        self.put_whole(bytes.into(), output.virtual_size, source_digest).await
    }

    /// Sends the parts that are not there yet, and makes the object of all.
    async fn parts(
        &self,
        ready: &Phase,
        image: Readable,
        mut sending: Sending,
        mut assembler: Assembler,
    ) -> Result<SentObject, TransferError> {
        let (shape, from) = (image.shape, assembler.position());
        tracing::info!(stage = "Upload", offset = from.0, parts = sending.parts.len(), "sending");
        let mut blocks = encoded(image.content.pieces(from, BLOCK), assembler.encoder(), from);
        let mut flights: VecDeque<Flight> = VecDeque::new();
        while let Some(block) = blocks.next().await {
            let written;
            (assembler, written) = assembler.add(block?).await?;
            for part in written {
                while flights.len() >= IN_FLIGHT {
                    self.land(ready, &mut sending, &mut flights).await?;
                }
                flights.push_back(self.launch(&sending, part));
            }
            self.report(&shape, assembler.position(), &sending);
        }
        while !flights.is_empty() {
            self.land(ready, &mut sending, &mut flights).await?;
        }
        let (rest, source_digest) = assembler.finish().await?;
        let (mut last, mut gone) = (Vec::new(), false);
        for part in rest {
            let (number, bytes) = (part.number, part.bytes.clone());
            match self.launch(&sending, part).await? {
                // Completed by an attempt that never heard of it, perhaps: the object tells.
                Err(TransferError::Store(StoreError::NotFound { .. })) => {
                    gone = true;
                    let (size, sha256) = (Bytes(bytes.len() as u64), Digest(Sha256Sum::of(&bytes)));
                    last.push(SentPart { number, size, etag: String::new(), sha256 });
                }
                landed => last.push(landed?.0),
            }
        }
        let parts = sending.parts.iter().cloned().chain(last).collect();
        self.complete(ready, &sending.upload, parts, gone, &shape, source_digest).await
    }

    /// Begins to send a part.
    fn launch(&self, sending: &Sending, part: Assembled) -> Flight {
        let (store, key, upload) =
            (self.target.store.clone(), self.target.key.clone(), sending.upload.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            let Assembled { number, bytes, resume } = part;
            let (size, hashed) = (Bytes(bytes.len() as u64), bytes.clone());
            let sum = tokio::task::spawn_blocking(move || Sha256Sum::of(&hashed)).await?;
            let sent = store.put_part(&key, &upload, number as usize, bytes, sum).await?;
            Ok((SentPart { number, size, etag: sent.etag.0, sha256: Digest(sum) }, resume))
        }))
    }

    /// Waits for the oldest part that is on its way, and records it.
    async fn land(
        &self,
        ready: &Phase,
        sending: &mut Sending,
        flights: &mut VecDeque<Flight>,
    ) -> Result<(), TransferError> {
        let Some(flight) = flights.pop_front() else { return Ok(()) };
        let (part, moment) = self.or_anew(ready, flight.await?).await?;
        if let Some(moment) = moment {
            sending.landed(part, &moment);
            self.record(ready, sending).await?;
            tracing::info!(stage = "Upload", parts = sending.parts.len(), "checkpoint");
            self.journal.mark(Mark::Uploaded, Bytes(sending.parts.len() as u64));
        }
        Ok(())
    }

    async fn record(&self, ready: &Phase, sending: &Sending) -> Result<(), TransferError> {
        if crate::sabotage::active("no-checkpoint") {
            return Ok(());
        }
        let (ready, copy) = (Box::new(ready.clone()), sending.clone());
        self.journal.save(Phase::Sending { ready, sending: copy }).await?;
        self.reporter.resume(sending.told());
        Ok(())
    }

    fn report(&self, shape: &Shape, done: Bytes, sending: &Sending) {
        let on_wire = sending.parts.iter().map(|part| part.size).sum();
        let (stage, total, skipped) = (Stage::Upload, shape.virtual_size, Bytes::ZERO);
        self.reporter.progress(shape, Snapshot { stage, done, total, skipped, on_wire });
    }

    fn say(&self, shape: &Shape, stage: Stage, done: Bytes, total: Bytes) {
        let (skipped, on_wire) = (Bytes::ZERO, Bytes::ZERO);
        self.reporter.progress(shape, Snapshot { stage, done, total, skipped, on_wire });
    }
}

/// For a sabotage only: success that nothing stands behind.
fn pretended(virtual_size: Bytes) -> SentObject {
    SentObject { size: virtual_size, virtual_size, source_digest: None, etag: None, version: None }
}
