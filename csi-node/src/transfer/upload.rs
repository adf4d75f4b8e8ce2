//! The upload: an image's extents become chunks in the store, holes unread, with a checkpoint every 32 MiB of data.
//!
//! Holes cost no checkpoints: an image of 1 TiB without data writes one.

use std::path::Path;

use berth_core::ids::Digest;
use berth_core::stages::{Shape, Stage};
use berth_core::units::Bytes;
use berth_objectstore::ObjectStore;
use berth_objectstore::chunks::session::Session;
use berth_objectstore::chunks::upload::{ChunkUploader, FinishedIndex};
use futures::StreamExt as _;
use serde_json::{Value, json};

use super::content::Piece;
use super::direct::{Counting, Readable, SavedSum, SourceSum};
use super::error::TransferError;
use super::job::{Reporter, Snapshot};
use super::journal::{Journal, Mark};

/// How much data is pushed between two checkpoints: what a kill may cost.
pub const WINDOW: Bytes = Bytes::mib(32);
/// In a checkpoint: what it is of.
const IDENTITY: &str = "sourceDigest";
/// In a checkpoint: the sum of the source's bytes that were read before it.
const SUM: &str = "sum";

/// Uploads `image` into the store of `session`, going on from the session's checkpoint if it is of the same source. Tells
/// the sum of the source too, where it is known or was counted.
pub(crate) async fn upload<S: ObjectStore>(
    session: &mut Session<S>,
    image: Readable,
    index: &Path,
    journal: &Journal,
    reporter: &dyn Reporter,
) -> Result<(FinishedIndex, Option<Digest>), TransferError> {
    let Readable { content, identity, shape, sum, .. } = image;
    let (mut uploader, mut counting) = begin(session, index, &identity, sum).await?;
    let mut saved = uploader.counters().bytes_data;
    tracing::info!(stage = "Upload", offset = uploader.offset(), "uploading");
    let mut pieces = content.pieces(Bytes(uploader.offset()), session.chunk_size());
    while let Some(piece) = pieces.next().await {
        match piece? {
            Piece::Zeros(len) => uploader.push_zero(len).await?,
            Piece::Data(data) => {
                counting.add(uploader.offset(), &data);
                uploader.push_data(data).await?;
            }
        }
        report(&uploader, &shape, reporter);
        if uploader.counters().bytes_data.saturating_sub(saved) >= WINDOW {
            saved = uploader.counters().bytes_data;
            if !crate::sabotage::active("no-checkpoint") {
                session.checkpoint(&mut uploader, state(&identity, &counting)).await?;
                journal.mark(Mark::Uploaded, Bytes(uploader.offset()));
                tracing::info!(stage = "Upload", offset = uploader.offset(), "checkpoint");
            }
        }
    }
    session.checkpoint(&mut uploader, state(&identity, &counting)).await?;
    journal.mark(Mark::Uploaded, Bytes(uploader.offset()));
    report(&uploader, &shape, reporter);
    Ok((uploader.finish().await?, counting.finish()?))
}

/// What a checkpoint is of, and the sum so far.
fn state(identity: &str, counting: &Counting) -> Value {
    match counting.saved() {
        Some(sum) => json!({ IDENTITY: identity, SUM: sum }),
        None => json!({ IDENTITY: identity }),
    }
}

/// The uploader at the session's checkpoint, or at the start if that is of another source, or of another node: its items
/// are not taken from the store, where others may write. What is there is found chunk by chunk, and not sent again.
async fn begin<S: ObjectStore>(
    session: &mut Session<S>,
    index: &Path,
    identity: &str,
    sum: SourceSum,
) -> Result<(ChunkUploader<S>, Counting), TransferError> {
    let saved = session.saved().map(|saved| saved.state.clone());
    let counted = saved.as_ref().filter(|state| state[IDENTITY] == identity).and_then(|state| {
        let saved: Option<SavedSum> = serde_json::from_value(state[SUM].clone()).ok();
        Counting::go_on(sum, saved.as_ref())
    });
    if saved.is_some() && counted.is_none() {
        session.start_over().await?;
    }
    let mut uploader = session.local_uploader(index).await?;
    // Where its index is lost, the uploader is at the start again.
    let mut counting = counted.filter(|_| uploader.offset() > 0).unwrap_or_else(|| Counting::new(sum));
    if !counting.reaches(uploader.offset()) {
        session.start_over().await?;
        (uploader, counting) = (session.local_uploader(index).await?, Counting::new(sum));
    }
    Ok((uploader, counting))
}

fn report<S: ObjectStore>(uploader: &ChunkUploader<S>, shape: &Shape, reporter: &dyn Reporter) {
    let counters = uploader.counters();
    let chunk_size = shape.chunk_size.unwrap_or_default();
    let reused = Bytes(counters.chunks_reused.saturating_mul(chunk_size.0));
    reporter.progress(
        shape,
        Snapshot {
            stage: Stage::Upload,
            done: Bytes(uploader.offset()),
            total: shape.virtual_size,
            skipped: counters.bytes_zero.saturating_add(reused),
            on_wire: counters.bytes_on_wire,
        },
    );
}
