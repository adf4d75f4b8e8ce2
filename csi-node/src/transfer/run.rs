//! One attempt of an import, from wherever the journal says it is.

use std::sync::Arc;

use berth_core::ids::{Digest, Sha256Sum};
use berth_core::stages::{Shape, Stage};
use berth_core::units::{Bytes, Generation};
use berth_objectstore::ObjectStore;
use berth_objectstore::chunks::publish::{Expected, PublishError};
use berth_objectstore::chunks::session::{Session, SessionError, Writer};
use berth_objectstore::chunks::store::ChunkStore;
use berth_objectstore::chunks::upload::FinishedIndex;
use berth_objectstore::chunks::verify::{VerifyError, verify};

use super::direct::{self, Source};
use super::error::TransferError;
use super::fetch::remove_if_there;
use super::job::{Durable, Reporter, Snapshot, TransferJob};
use super::journal::{Journal, Phase, now};
use super::name;
use super::upload::upload;

/// Everything that one attempt works with.
pub struct Attempt<'a, S> {
    /// What is to be done.
    pub job: &'a TransferJob,
    /// Where the source comes from.
    pub source: &'a Source,
    /// Where the image goes.
    pub chunks: &'a ChunkStore<S>,
    /// How far it is.
    pub journal: &'a Journal,
    /// Whom to tell.
    pub reporter: &'a Arc<dyn Reporter>,
}

impl<S: ObjectStore> Attempt<'_, S> {
    /// Goes on until the image is durable and nothing but the image is left.
    pub async fn run(&self) -> Result<Durable, TransferError> {
        let phase = self.journal.load().await?;
        if let Phase::Published { durable } = phase {
            end_session(self.chunks, self.job).await?;
            return self.finish(durable).await;
        }
        self.refuse_taken().await?;
        // Before the first byte, so that an attempt that is behind touches nothing.
        let mut session = self.session(&phase).await?;
        let chunk_size = Some(self.chunks.chunk_size().size());
        let Self { job, source, journal, reporter, .. } = *self;
        let image = direct::ready(job, source, journal, reporter, chunk_size, phase).await?;
        let shape = image.shape;
        if crate::sabotage::active("ready-before-verified") {
            return Ok(self.pretended(&shape));
        }
        let (index, reporter) = (self.job.index_file(), self.reporter.as_ref());
        let (finished, source_digest) = upload(&mut session, image, &index, self.journal, reporter).await?;
        self.verify(&mut session, &finished, &shape).await?;
        let durable = Durable {
            digest: finished.digest,
            source_digest,
            stored_bytes: finished.tally.stored_bytes,
            virtual_size: finished.virtual_size,
            real_size: finished.tally.real_bytes,
            chunks: finished.tally.chunks,
        };
        self.publish(&mut session, &finished, &durable, &shape).await?;
        self.journal.save(Phase::Published { durable: durable.clone() }).await?;
        if !crate::sabotage::active("keep-session") {
            session.end().await?;
        }
        self.finish(durable).await
    }

    /// Refuses a name that someone else has, or that a later generation has given. A manifest of our own tells nothing:
    /// whoever can write to the bucket can write one, so only what this node has verified itself counts. Where it was
    /// right, its chunks are found in the store and not sent again.
    async fn refuse_taken(&self) -> Result<(), TransferError> {
        let Some((found, _)) = self.chunks.manifest(&self.job.name).await? else { return Ok(()) };
        if found.owner != self.job.uid {
            let (name, expected) = (self.job.name.clone(), self.job.uid.clone());
            return Err(PublishError::Conflict { name, found: found.owner, expected }.into());
        }
        let ours = generation(self.job);
        if found.generation > ours {
            let (name, found) = (self.job.name.clone(), found.generation);
            return Err(PublishError::Superseded { name, found, ours }.into());
        }
        Ok(())
    }

    /// The session. One that this generation has worked in must still be there: without it the import was given up, and
    /// beginning again would bring its name back.
    async fn session(&self, phase: &Phase) -> Result<Session<S>, TransferError> {
        let (chunks, writer) = (self.chunks.clone(), writer(self.job));
        Ok(match phase {
            Phase::Begun => Session::begin(chunks, writer).await?,
            _ => Session::resume(chunks, writer).await?,
        })
    }

    /// Verifies the chunks in the store. What is wrong with them is sent again by the next attempt.
    async fn verify(
        &self,
        session: &mut Session<S>,
        finished: &FinishedIndex,
        shape: &Shape,
    ) -> Result<(), TransferError> {
        let total = Bytes(finished.tally.chunks);
        self.say(shape, Stage::Verify, Bytes::ZERO, total);
        tracing::info!(stage = "Verify", chunks = finished.tally.chunks, "verifying");
        if !crate::sabotage::active("skip-verify")
            && let Err(error) =
                verify(self.chunks, finished, |done| self.say(shape, Stage::Verify, Bytes(done), total)).await
        {
            if let VerifyError::Damaged { id } = &error {
                // Otherwise it would be found there, and not be sent.
                self.chunks.store().delete(&self.chunks.layout().chunk(id)).await?;
            }
            if matches!(
                error,
                VerifyError::Missing { .. } | VerifyError::Size { .. } | VerifyError::Damaged { .. }
            ) {
                session.start_over().await?;
            }
            return Err(error.into());
        }
        // That took its time: whoever took over meanwhile is not to be disturbed.
        Ok(session.confirm().await?)
    }

    /// Gives the image its name, and takes that back if the import was given up meanwhile: whoever did may have looked
    /// for the name before it was there.
    async fn publish(
        &self,
        session: &mut Session<S>,
        finished: &FinishedIndex,
        durable: &Durable,
        shape: &Shape,
    ) -> Result<(), TransferError> {
        let steps = Bytes(2);
        self.say(shape, Stage::Publish, Bytes::ZERO, steps);
        tracing::info!(stage = "Publish", digest = %durable.digest, "publishing");
        self.chunks.put_index(finished).await?;
        self.say(shape, Stage::Publish, Bytes(1), steps);
        let mut manifest = name::manifest(durable, finished.chunk_size, &self.job.uid, now());
        manifest.generation = generation(self.job);
        manifest.data_bytes = finished.tally.data_bytes;
        self.chunks.publish(&self.job.name, &manifest, &Expected::Absent).await?;
        let confirmed = session.confirm().await;
        if matches!(confirmed, Err(SessionError::Gone { .. })) {
            self.chunks.forget(&self.job.name, &self.job.uid).await?;
        }
        Ok(confirmed?)
    }

    fn say(&self, shape: &Shape, stage: Stage, done: Bytes, total: Bytes) {
        let (skipped, on_wire) = (Bytes::ZERO, Bytes::ZERO);
        self.reporter.progress(shape, Snapshot { stage, done, total, skipped, on_wire });
    }

    async fn finish(&self, durable: Durable) -> Result<Durable, TransferError> {
        direct::let_go(self.job, self.source).await?;
        if !crate::sabotage::active("keep-files") {
            remove_files(self.job, self.journal).await?;
        }
        Ok(durable)
    }

    /// For a sabotage only: success that nothing stands behind.
    fn pretended(&self, shape: &Shape) -> Durable {
        Durable {
            digest: Digest(Sha256Sum::of(self.job.uid.as_str().as_bytes())),
            source_digest: None,
            stored_bytes: shape.source_bytes,
            virtual_size: shape.virtual_size,
            real_size: shape.virtual_size,
            chunks: 1,
        }
    }
}

/// The generation that others are told.
fn generation(job: &TransferJob) -> Generation {
    if crate::sabotage::active("no-generation-check") { Generation(u64::MAX) } else { job.generation }
}

fn writer(job: &TransferJob) -> Writer {
    Writer { uid: job.uid.clone(), generation: generation(job), node: job.node.clone(), started: now() }
}

/// Ends the session of an import, if there is one and nobody later has it.
pub(crate) async fn end_session<S: ObjectStore>(
    chunks: &ChunkStore<S>,
    job: &TransferJob,
) -> Result<(), TransferError> {
    if crate::sabotage::active("keep-session") {
        return Ok(());
    }
    match Session::begin(chunks.clone(), writer(job)).await {
        Ok(session) => Ok(session.end().await?),
        Err(SessionError::Superseded { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Removes the files of an import from its reservation. What is not there is no error.
pub(crate) async fn remove_files(job: &TransferJob, journal: &Journal) -> Result<(), TransferError> {
    let files = job.files();
    let removed = journal.work(move || {
        files.iter().try_for_each(|path| remove_if_there(path).map_err(TransferError::file("remove", path)))
    });
    removed.await?
}
