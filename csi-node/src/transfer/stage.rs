//! Staging: the source's bytes come into the reservation, and a tool turns them into a raw image where no reader of ours
//! reads them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_core::ids::Digest;
use berth_core::stages::{Shape, Stage};
use berth_core::units::Bytes;
use berth_device::qemu::{ConvertLimits, Part, convert_to_raw};
use berth_image::{ImageFormat, Probe, ProbeError, Reader, open, probe_file, probe_file_as};

use super::content::Content;
use super::direct::{Readable, SourceSum};
use super::error::TransferError;
use super::fetch::{Fetched, Origin, fetch, remove_if_there};
use super::job::{Reporter, Snapshot, TransferJob};
use super::journal::{Journal, Phase};
use super::probe::checked;

/// What brings a source here.
pub(crate) struct Staging<'a> {
    /// What is to be done.
    pub job: &'a TransferJob,
    /// Where the source comes from.
    pub origin: &'a Origin,
    /// How far it is.
    pub journal: &'a Journal,
    /// Whom to tell.
    pub reporter: &'a Arc<dyn Reporter>,
    /// The chunk size of the image store that it goes into; `None` if it goes into none.
    pub chunk_size: Option<Bytes>,
}

/// An image that is on this node, to be read.
pub(crate) struct Prepared {
    /// The sum of the source's bytes.
    pub source_digest: Digest,
    /// What is known of it.
    pub shape: Shape,
    /// The file that holds the image.
    pub path: PathBuf,
}

impl Prepared {
    /// Opens the image.
    pub async fn open(
        self,
        journal: &Journal,
        format: Option<ImageFormat>,
    ) -> Result<Readable, TransferError> {
        // The converted image is raw, whatever its bytes look like.
        let format = if self.shape.converted { Some(ImageFormat::Raw) } else { format };
        let owned = self.path.clone();
        let probe = journal.work(move || probe_given(&owned, format));
        let content = Content::File { reader: open(&self.path, &probe.await??).await?, path: self.path };
        let (identity, sum) = (self.source_digest.to_string(), SourceSum::Known(self.source_digest));
        let (source_digest, shape) = (self.source_digest, self.shape);
        let phase = if shape.converted {
            Phase::Converted { source_digest, shape }
        } else {
            Phase::Fetched { source_digest, shape }
        };
        Ok(Readable { content, identity, shape, sum, phase })
    }
}

impl Staging<'_> {
    /// Brings the image to where the upload can read it.
    pub async fn prepare(&self, phase: Phase) -> Result<Prepared, TransferError> {
        let (raw, path) = (self.job.raw_file(), self.origin.local_file(self.job));
        let known = match phase {
            Phase::Converted { source_digest, shape } if has_length(&raw, shape.virtual_size) => {
                return Ok(Prepared { source_digest, shape, path: raw });
            }
            Phase::Fetched { source_digest, shape }
            | Phase::Converting { source_digest, shape, .. }
            | Phase::Converted { source_digest, shape } => {
                let converted = match phase {
                    // A tool that was killed leaves it a little longer than the disk.
                    Phase::Converting { offset, .. } if length(&raw) >= Some(shape.virtual_size) => offset,
                    _ => Bytes::ZERO,
                };
                // The record can be older than a directory that was made anew.
                has_length(&path, shape.source_bytes).then_some((source_digest, shape, converted))
            }
            Phase::Begun
            | Phase::Reading { .. }
            | Phase::Beginning { .. }
            | Phase::Sending { .. }
            | Phase::Sent { .. }
            | Phase::Published { .. } => None,
            fetching @ Phase::Fetching { .. } => Some(self.fetched(fetching).await?),
        };
        let (source_digest, shape, converted) = match known {
            Some(known) => known,
            None => self.fetched(Phase::Begun).await?,
        };
        if !shape.converted {
            return Ok(Prepared { source_digest, shape, path });
        }
        self.convert(&path, source_digest, &shape, converted).await?;
        self.journal.save(Phase::Converted { source_digest, shape }).await?;
        Ok(Prepared { source_digest, shape, path: raw })
    }

    /// Fetches it; nothing of it is converted then.
    async fn fetched(&self, phase: Phase) -> Result<(Digest, Shape, Bytes), TransferError> {
        let path = self.origin.local_file(self.job);
        if self.origin.is_local() {
            self.shape(&path, Bytes::ZERO).await?; // What is refused is not read first.
        }
        let Fetched { sum, size } = fetch(self, phase).await?;
        if let Some(expected) = self.job.checksum
            && expected != sum
        {
            return Err(TransferError::Checksum { expected, found: sum });
        }
        let shape = self.shape(&path, size).await?;
        let source_digest = Digest(sum);
        self.forget_index().await?;
        self.journal.save(Phase::Fetched { source_digest, shape }).await?;
        tracing::info!(stage = "Fetch", bytes = size.0, digest = %sum, "fetched");
        Ok((source_digest, shape, Bytes::ZERO))
    }

    /// An index of what was fetched before is not one of this, whatever the bucket says of it.
    async fn forget_index(&self) -> Result<(), TransferError> {
        let index = self.job.index_file();
        let removed =
            self.journal.work(move || remove_if_there(&index).map_err(TransferError::file("remove", &index)));
        removed.await?
    }

    /// Probes the whole file, and compares what it asks for with limits and promise before a tool or a reader sees it.
    async fn shape(&self, path: &Path, size: Bytes) -> Result<Shape, TransferError> {
        let probe = self.probe_whole(path).await?;
        let probed = checked(&probe, size, &self.job.limits)?;
        let shape = Shape { in_place: self.origin.is_local(), ..probed.shape(self.chunk_size) };
        self.job.check_promise(shape.peak_bytes())?;
        Ok(shape)
    }

    async fn probe_whole(&self, path: &Path) -> Result<Probe, TransferError> {
        let (owned, format) = (path.to_owned(), self.job.format);
        Ok(self.journal.work(move || probe_given(&owned, format)).await??)
    }

    /// Converts the image from `offset` on, window by window; each is recorded when it is on the disk.
    async fn convert(
        &self,
        path: &Path,
        source_digest: Digest,
        shape: &Shape,
        mut offset: Bytes,
    ) -> Result<(), TransferError> {
        let probe = self.probe_whole(path).await?;
        let Reader::QemuImg { driver } = probe.reader else { return Ok(()) };
        let driver = driver.parse()?;
        let (raw, size) = (self.job.raw_file(), shape.virtual_size);
        if offset == Bytes::ZERO {
            // A tool of an earlier attempt may still be dying: it keeps its own file. Later it can only write the same again.
            remove_if_there(&raw).map_err(TransferError::file("remove", &raw))?;
        }
        let mut limits = ConvertLimits::new(size, format!("berth-import-{}", self.job.uid));
        limits.stall = self.job.limits.stall;
        self.tell_converted(shape, offset);
        tracing::info!(stage = "Convert", format = %probe.format, bytes = size.0, offset = offset.0, "converting");
        loop {
            let part = Part::at(offset, self.job.limits.conversion_window, size);
            let report = |percent: u8| {
                let within = part.len.unwrap_or(size.saturating_sub(offset)).percent(percent.into());
                self.tell_converted(shape, offset.saturating_add(within));
            };
            let done = convert_to_raw(path, driver, &raw, part, &limits, |now| report(now.percent)).await?;
            if !done.unconfined.is_empty() {
                tracing::warn!(missing = ?done.unconfined, "the conversion tool is less confined than intended");
            }
            let Some(len) = part.len else { return Ok(()) };
            offset = offset.saturating_add(len);
            self.journal.save(Phase::Converting { source_digest, shape: *shape, offset }).await?;
        }
    }

    fn tell_converted(&self, shape: &Shape, done: Bytes) {
        let (total, skipped, on_wire) = (shape.virtual_size, Bytes::ZERO, Bytes::ZERO);
        self.reporter.progress(shape, Snapshot { stage: Stage::Convert, done, total, skipped, on_wire });
    }
}

/// Probes a file, of this format if it is given.
fn probe_given(path: &Path, format: Option<ImageFormat>) -> Result<Probe, ProbeError> {
    format.map_or_else(|| probe_file(path), |format| probe_file_as(format, path))
}

fn has_length(path: &Path, len: Bytes) -> bool {
    length(path) == Some(len)
}

/// How long a file is, if it is there.
fn length(path: &Path) -> Option<Bytes> {
    path.metadata().ok().map(|file| Bytes(file.len()))
}
