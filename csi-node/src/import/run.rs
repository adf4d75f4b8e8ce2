//! One attempt of an import, from wherever the journal says it is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_core::ids::{Digest, Sha256Sum};
use berth_core::stages::{Shape, Stage};
use berth_core::units::{Bytes, Generation};
use berth_device::qemu::{ConvertLimits, convert_to_raw};
use berth_image::{ImageFormat, Probe, Reader, open, probe_file, probe_file_as};
use berth_objectstore::ObjectStore;
use berth_objectstore::chunks::publish::{Expected, PublishError};
use berth_objectstore::chunks::session::{Session, SessionError, Writer};
use berth_objectstore::chunks::store::ChunkStore;
use berth_objectstore::chunks::upload::FinishedIndex;
use berth_objectstore::chunks::verify::{VerifyError, verify};

use super::error::ImportError;
use super::fetch::{Fetched, Origin, fetch, remove_if_there};
use super::job::{Durable, ImportJob, Reporter, Snapshot};
use super::journal::{Journal, Phase, now};
use super::name;
use super::probe::checked;
use super::upload::{Readable, upload};

/// Everything that one attempt works with.
pub struct Attempt<'a, S> {
    /// What is to be done.
    pub job: &'a ImportJob,
    /// Where the source comes from.
    pub origin: &'a Origin,
    /// Where the image goes.
    pub chunks: &'a ChunkStore<S>,
    /// How far it is.
    pub journal: &'a Journal,
    /// Whom to tell.
    pub reporter: &'a Arc<dyn Reporter>,
}

impl<S: ObjectStore> Attempt<'_, S> {
    /// Goes on until the image is durable and nothing but the image is left.
    pub async fn run(&self) -> Result<Durable, ImportError> {
        let phase = self.journal.load().await?;
        if let Phase::Published { durable } = phase {
            end_session(self.chunks, self.job).await?;
            return self.finish(durable).await;
        }
        self.refuse_taken().await?;
        // Before the first byte, so that an attempt that is behind touches nothing.
        let mut session = self.session(&phase).await?;
        let (source_digest, shape, path) = self.prepare(phase).await?;
        if crate::sabotage::active("ready-before-verified") {
            return Ok(self.pretended(source_digest, &shape));
        }
        let finished = self.upload(&mut session, source_digest, shape, &path).await?;
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
    async fn refuse_taken(&self) -> Result<(), ImportError> {
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
    async fn session(&self, phase: &Phase) -> Result<Session<S>, ImportError> {
        let (chunks, writer) = (self.chunks.clone(), writer(self.job));
        Ok(match phase {
            Phase::Begun => Session::begin(chunks, writer).await?,
            _ => Session::resume(chunks, writer).await?,
        })
    }

    /// Brings the image to where the upload can read it.
    async fn prepare(&self, phase: Phase) -> Result<(Digest, Shape, PathBuf), ImportError> {
        let (raw, path) = (self.job.raw_file(), self.origin.local_file(self.job));
        let was_converted = matches!(phase, Phase::Converted { .. });
        let known = match phase {
            Phase::Fetched { source_digest, shape } | Phase::Converted { source_digest, shape } => {
                if was_converted && has_length(&raw, shape.virtual_size) {
                    return Ok((source_digest, shape, raw));
                }
                // The record can be older than a directory that was made anew.
                has_length(&path, shape.source_bytes).then_some((source_digest, shape))
            }
            Phase::Begun | Phase::Published { .. } => None,
            fetching @ Phase::Fetching { .. } => Some(self.fetched(fetching).await?),
        };
        let (source_digest, shape) = match known {
            Some(known) => known,
            None => self.fetched(Phase::Begun).await?,
        };
        if !shape.converted {
            return Ok((source_digest, shape, path));
        }
        self.convert(&path, &shape).await?;
        self.journal.save(Phase::Converted { source_digest, shape }).await?;
        Ok((source_digest, shape, raw))
    }

    async fn fetched(&self, phase: Phase) -> Result<(Digest, Shape), ImportError> {
        let path = self.origin.local_file(self.job);
        if self.origin.is_local() {
            self.shape(&path, Bytes::ZERO).await?; // What is refused is not read first.
        }
        let Fetched { sum, size } = fetch(self, phase).await?;
        if let Some(expected) = self.job.checksum
            && expected != sum
        {
            return Err(ImportError::Checksum { expected, found: sum });
        }
        let shape = self.shape(&path, size).await?;
        let source_digest = Digest(sum);
        self.forget_index().await?;
        self.journal.save(Phase::Fetched { source_digest, shape }).await?;
        tracing::info!(stage = "Fetch", bytes = size.0, digest = %sum, "fetched");
        Ok((source_digest, shape))
    }

    /// An index of what was fetched before is not one of this, whatever the bucket says of it.
    async fn forget_index(&self) -> Result<(), ImportError> {
        let index = self.job.index_file();
        let removed =
            self.journal.work(move || remove_if_there(&index).map_err(ImportError::file("remove", &index)));
        removed.await?
    }

    /// Probes the whole file, and compares what it asks for with limits and promise before a tool or a reader sees it.
    async fn shape(&self, path: &Path, size: Bytes) -> Result<Shape, ImportError> {
        let probe = self.probe_whole(path).await?;
        let probed = checked(&probe, size, &self.job.limits)?;
        let chunk_size = self.chunks.chunk_size().size();
        let shape = Shape { in_place: self.origin.is_local(), ..probed.shape(chunk_size) };
        self.job.check_promise(shape.peak_bytes())?;
        Ok(shape)
    }

    async fn probe_whole(&self, path: &Path) -> Result<Probe, ImportError> {
        let owned = path.to_owned();
        Ok(self.journal.work(move || probe_file(&owned)).await??)
    }

    async fn convert(&self, path: &Path, shape: &Shape) -> Result<(), ImportError> {
        let probe = self.probe_whole(path).await?;
        let Reader::QemuImg { driver } = probe.reader else { return Ok(()) };
        let driver = driver.parse()?;
        let raw = self.job.raw_file();
        // A tool of an earlier attempt may still be dying: it keeps its own file.
        remove_if_there(&raw).map_err(ImportError::file("remove", &raw))?;
        let mut limits = ConvertLimits::new(shape.virtual_size, format!("berth-import-{}", self.job.uid));
        limits.stall = self.job.limits.stall;
        let (reporter, shape) = (Arc::clone(self.reporter), *shape);
        let report = move |percent: u8| {
            let total = shape.virtual_size;
            let done = total.percent(u64::from(percent));
            let (skipped, on_wire) = (Bytes::ZERO, Bytes::ZERO);
            reporter.progress(&shape, Snapshot { stage: Stage::Convert, done, total, skipped, on_wire });
        };
        report(0);
        tracing::info!(stage = "Convert", format = %probe.format, bytes = shape.virtual_size.0, "converting");
        let converted = convert_to_raw(path, driver, &raw, &limits, |now| report(now.percent)).await?;
        if !converted.unconfined.is_empty() {
            tracing::warn!(missing = ?converted.unconfined, "the conversion tool is less confined than intended");
        }
        Ok(())
    }

    async fn upload(
        &self,
        session: &mut Session<S>,
        source: Digest,
        shape: Shape,
        path: &Path,
    ) -> Result<FinishedIndex, ImportError> {
        let (owned, converted) = (path.to_owned(), shape.converted);
        // The converted image is raw, whatever its bytes look like.
        let probe = self.journal.work(move || {
            if converted { probe_file_as(ImageFormat::Raw, &owned) } else { probe_file(&owned) }
        });
        let reader = open(path, &probe.await??).await?;
        let image = Readable { path, reader, source_digest: source.to_string(), shape };
        upload(session, image, &self.job.index_file(), self.journal, self.reporter.as_ref()).await
    }

    /// Verifies the chunks in the store. What is wrong with them is sent again by the next attempt.
    async fn verify(
        &self,
        session: &mut Session<S>,
        finished: &FinishedIndex,
        shape: &Shape,
    ) -> Result<(), ImportError> {
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
    ) -> Result<(), ImportError> {
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

    async fn finish(&self, durable: Durable) -> Result<Durable, ImportError> {
        if !crate::sabotage::active("keep-files") {
            remove_files(self.job, self.journal).await?;
        }
        Ok(durable)
    }

    /// For a sabotage only: success that nothing stands behind.
    fn pretended(&self, source_digest: Digest, shape: &Shape) -> Durable {
        Durable {
            digest: Digest(Sha256Sum::of(self.job.uid.as_str().as_bytes())),
            source_digest,
            stored_bytes: shape.source_bytes,
            virtual_size: shape.virtual_size,
            real_size: shape.virtual_size,
            chunks: 1,
        }
    }
}

/// The generation that others are told.
fn generation(job: &ImportJob) -> Generation {
    if crate::sabotage::active("no-generation-check") { Generation(u64::MAX) } else { job.generation }
}

fn writer(job: &ImportJob) -> Writer {
    Writer { uid: job.uid.clone(), generation: generation(job), node: job.node.clone(), started: now() }
}

fn has_length(path: &Path, len: Bytes) -> bool {
    path.metadata().is_ok_and(|file| file.len() == len.0)
}

/// Ends the session of an import, if there is one and nobody later has it.
pub(crate) async fn end_session<S: ObjectStore>(
    chunks: &ChunkStore<S>,
    job: &ImportJob,
) -> Result<(), ImportError> {
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
pub(crate) async fn remove_files(job: &ImportJob, journal: &Journal) -> Result<(), ImportError> {
    let files = job.files();
    let removed = journal.work(move || {
        files.iter().try_for_each(|path| remove_if_there(path).map_err(ImportError::file("remove", path)))
    });
    removed.await?
}
