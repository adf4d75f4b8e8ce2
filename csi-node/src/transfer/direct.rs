//! Images that are read where they lie: nothing of them is staged.

use std::sync::Arc;

use berth_core::ids::{Digest, Sha256Sum};
use berth_core::stages::Shape;
use berth_core::transfer::{Staging as Wish, choose};
use berth_core::units::Bytes;
use berth_image::{ExtentReader as _, ImageFormat, ImageReader, probe_at};
use berth_objectstore::checksum::SourceHash;
use berth_objectstore::chunks::remote::{RemoteConfig, RemoteImage};
use berth_objectstore::chunks::store::ChunkStore;
use berth_objectstore::s3::S3Store;
use berth_objectstore::source::RangedSource;
use serde::{Deserialize, Serialize};

use super::content::Content;
use super::error::TransferError;
use super::fetch::Origin;
use super::job::{Reporter, TransferJob};
use super::journal::{Journal, Phase};
use super::probe::open_and_probe;
use super::ranges::Ranges;
use super::stage::Staging;

/// The memory of an image store's reader.
const MEMORY: Bytes = Bytes::mib(128);
/// How long a read of an image store waits for it before the attempt fails, to be made again: see [`super::attempt`].
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// Where an image comes from, and which way.
#[derive(Clone)]
pub enum Source {
    /// It comes into the reservation first, or is a file on this node.
    Staged(Origin),
    /// It is read where it lies.
    Direct(Direct),
}

/// Where an image is read without being staged.
#[derive(Clone)]
#[allow(clippy::large_enum_variant)] // there is one for each transfer that runs
pub enum Direct {
    /// Behind an address that is read from the middle, in any format that a reader of ours reads.
    Ranged(RangedSource),
    /// In an image store.
    Stored {
        /// The store.
        chunks: ChunkStore<S3Store>,
        /// The image.
        digest: Digest,
    },
}

/// An image that is ready to be read.
pub(crate) struct Readable {
    /// Where it is read.
    pub content: Content,
    /// What it is of, to the byte: a checkpoint counts only for the same.
    pub identity: String,
    /// What is known of it.
    pub shape: Shape,
    /// The sum of its source.
    pub sum: SourceSum,
    /// What the journal says of it.
    pub phase: Phase,
}

/// The sum of a source's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SourceSum {
    /// This.
    Known(Digest),
    /// The content's: it is added up while that is read, and compared with what is expected, if anything is.
    Counted(Option<Sha256Sum>),
    /// It has none: the image is identified by its digest.
    None,
}

/// Adds up the sum of a source while it is read.
pub(crate) enum Counting {
    /// So far; and what it must be at the end.
    Open(Sum, Option<Sha256Sum>),
    /// There is nothing to add up.
    Closed(Option<Digest>),
}

/// The sum of the first bytes of a source.
#[derive(Clone, Default)]
pub(crate) struct Sum {
    hash: SourceHash,
    /// How many bytes it is of.
    len: u64,
}

/// A [`Sum`] as checkpoints keep it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedSum {
    hash: Vec<u8>,
    len: u64,
}

impl Counting {
    /// At the start of the source.
    pub fn new(sum: SourceSum) -> Self {
        match sum {
            SourceSum::Known(digest) => Self::Closed(Some(digest)),
            SourceSum::Counted(expected) => Self::Open(Sum::default(), expected),
            SourceSum::None => Self::Closed(None),
        }
    }

    /// Where it was; `None` if that is not known.
    pub fn go_on(sum: SourceSum, saved: Option<&SavedSum>) -> Option<Self> {
        match (sum, saved) {
            (SourceSum::Counted(expected), Some(saved)) => {
                let hash = SourceHash::from_state(&saved.hash).ok()?;
                let stale = crate::sabotage::active("stale-hash");
                let hash = if stale { SourceHash::new() } else { hash };
                Some(Self::Open(Sum { hash, len: saved.len }, expected))
            }
            (SourceSum::Counted(_), None) => None,
            (other, _) => Some(Self::new(other)),
        }
    }

    /// What a checkpoint keeps of it.
    pub fn saved(&self) -> Option<SavedSum> {
        match self {
            Self::Open(sum, _) => Some(SavedSum { hash: sum.hash.state(), len: sum.len }),
            Self::Closed(_) => None,
        }
    }

    /// True if it covers all bytes before `at`: those that come again from there on are passed over.
    pub fn reaches(&self, at: u64) -> bool {
        match self {
            Self::Open(sum, _) => at <= sum.len,
            Self::Closed(_) => true,
        }
    }

    /// Takes note of what the source holds at `at`: at the end of what is covered, or before it.
    pub fn add(&mut self, at: u64, bytes: &[u8]) {
        if let Self::Open(sum, _) = self {
            let known = usize::try_from(sum.len.saturating_sub(at)).unwrap_or(usize::MAX).min(bytes.len());
            sum.hash.update(&bytes[known..]);
            sum.len = sum.len.max(at.saturating_add(bytes.len() as u64));
        }
    }

    /// The sum.
    pub fn finish(self) -> Result<Option<Digest>, TransferError> {
        match self {
            Self::Closed(known) => Ok(known),
            Self::Open(sum, expected) => {
                let found = sum.hash.finish();
                match expected {
                    Some(expected) if expected != found => Err(TransferError::Checksum { expected, found }),
                    _ => Ok(Some(Digest(found))),
                }
            }
        }
    }
}

/// Brings the image to where it can be read, going on from `phase`; into an image store with chunks of this size, or none.
pub(crate) async fn ready(
    job: &TransferJob,
    source: &Source,
    journal: &Journal,
    reporter: &Arc<dyn Reporter>,
    chunk_size: Option<Bytes>,
    phase: Phase,
) -> Result<Readable, TransferError> {
    match source {
        Source::Staged(origin) => {
            let staging = Staging { job, origin, journal, reporter, chunk_size };
            staging.prepare(phase).await?.open(journal, job.format).await
        }
        Source::Direct(source) => open(job, source, journal, chunk_size, &phase).await,
    }
}

/// What was read of an image before.
struct Before<'a> {
    shape: Shape,
    version: &'a str,
    by_ranges: bool,
}

/// Opens an image that is read where it lies. What was read of it before counts only if it is still the same.
async fn open(
    job: &TransferJob,
    source: &Direct,
    journal: &Journal,
    chunk_size: Option<Bytes>,
    phase: &Phase,
) -> Result<Readable, TransferError> {
    let before = match phase {
        Phase::Reading { shape, version, by_ranges } => {
            Some(Before { shape: *shape, version, by_ranges: *by_ranges })
        }
        _ => None,
    };
    let readable = match source {
        Direct::Ranged(source) => ranged(job, source.clone(), chunk_size, before.as_ref()).await?,
        Direct::Stored { chunks, digest } => stored(job, chunks, *digest, chunk_size).await?,
    };
    job.check_promise(readable.shape.peak_bytes())?;
    match before {
        Some(Before { version, .. }) if version == readable.identity => {}
        Some(_) => return Err(TransferError::Changed),
        None => journal.save(readable.phase.clone()).await?,
    }
    Ok(readable)
}

/// Lets go of the source, as far as it is held on to.
pub(crate) async fn let_go(job: &TransferJob, source: &Source) -> Result<(), TransferError> {
    match source {
        Source::Direct(Direct::Stored { chunks, .. }) => unpin(job, chunks).await,
        Source::Staged(_) | Source::Direct(Direct::Ranged(_)) => Ok(()),
    }
}

/// Tells an image store that this transfer reads nothing of it any more.
pub async fn unpin(job: &TransferJob, chunks: &ChunkStore<S3Store>) -> Result<(), TransferError> {
    Ok(chunks.unpin(&job.uid).await?)
}

async fn ranged(
    job: &TransferJob,
    mut source: RangedSource,
    chunk_size: Option<Bytes>,
    before: Option<&Before<'_>>,
) -> Result<Readable, TransferError> {
    let (shape, identity, by_ranges) = if let Some(Before { shape, version, by_ranges }) = before {
        source.open(0, Some(version)).await?;
        (*shape, (*version).to_owned(), *by_ranges)
    } else {
        let (probed, info) = open_and_probe(&mut source, &job.limits, job.format).await?;
        // The plan was made of another look at the source.
        choose(Wish::Never, probed.found(job.checksum.is_some())).map_err(TransferError::NotDirect)?;
        let shape = Shape { in_place: true, ..probed.shape(chunk_size) };
        (shape, info.version.unwrap_or_default(), probed.format != ImageFormat::Raw)
    };
    if by_ranges {
        return image(job, source, shape, identity).await;
    }
    let content = Content::Ranged { source, size: shape.source_bytes };
    let phase = Phase::Reading { shape, version: identity.clone(), by_ranges };
    Ok(Readable { content, identity, shape, sum: SourceSum::Counted(job.checksum), phase })
}

/// Opens an image in a format that is read by ranges. Not all of its bytes are read: what stands for them is the version that
/// every request names.
async fn image(
    job: &TransferJob,
    source: RangedSource,
    shape: Shape,
    identity: String,
) -> Result<Readable, TransferError> {
    let ranges = Ranges::new(source, shape.source_bytes, job.name.to_string());
    let probe = probe_at(&ranges, job.format).await?;
    let reader = ImageReader::open(ranges, &probe).await?;
    let (found, limit) = (reader.virtual_size(), job.limits.virtual_size);
    if found > limit {
        return Err(TransferError::VirtualSize { found, limit });
    }
    let shape = Shape { virtual_size: found, ..shape };
    let phase = Phase::Reading { shape, version: identity.clone(), by_ranges: true };
    Ok(Readable { content: Content::Image(reader), identity, shape, sum: SourceSum::None, phase })
}

async fn stored(
    job: &TransferJob,
    chunks: &ChunkStore<S3Store>,
    digest: Digest,
    chunk_size: Option<Bytes>,
) -> Result<Readable, TransferError> {
    // Before the first look, so that nothing of it is collected meanwhile.
    chunks.pin(&job.uid, &digest).await?;
    let config = RemoteConfig { memory: MEMORY, patience: PATIENCE, ..RemoteConfig::default() };
    let image = RemoteImage::open(chunks.clone(), digest, config).await?;
    let (virtual_size, limit) = (image.virtual_size(), job.limits.virtual_size);
    if virtual_size > limit {
        return Err(TransferError::VirtualSize { found: virtual_size, limit });
    }
    let source_bytes = image.data_size();
    let shape = Shape { source_bytes, virtual_size, converted: false, in_place: true, chunk_size };
    let identity = digest.to_string();
    let phase = Phase::Reading { shape, version: identity.clone(), by_ranges: false };
    Ok(Readable { content: Content::Stored(image), identity, shape, sum: SourceSum::None, phase })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_again_counts_once() {
        let bytes: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let sum = SourceSum::Counted(Some(Sha256Sum::of(&bytes)));
        let mut counting = Counting::new(sum);
        counting.add(0, &bytes[..700]);
        let saved = counting.saved().expect("it is open");
        // An upload may go on before the end of what was added up: zeros that its index does not tell of are read again.
        for from in [700, 600, 1, 0] {
            let mut counting = Counting::go_on(sum, Some(&saved)).expect("it is known");
            assert!(counting.reaches(from as u64));
            for at in (from..1000).step_by(150) {
                counting.add(at as u64, &bytes[at..(at + 150).min(1000)]);
            }
            assert_eq!(
                counting.finish().expect("the same bytes"),
                Some(Digest(Sha256Sum::of(&bytes))),
                "{from}"
            );
        }
        assert!(!Counting::go_on(sum, Some(&saved)).expect("it is known").reaches(701));
        assert!(Counting::go_on(sum, None).is_none(), "what came before is lost");
    }
}
