//! The upload: an image's extents become chunks in the store, holes unread, with a checkpoint every 32 MiB of data.
//!
//! Holes cost no checkpoints: an image of 1 TiB without data writes one.

use std::path::Path;

use berth_core::stages::{Shape, Stage};
use berth_core::units::Bytes;
use berth_image::{AnyReader, Extent, ExtentKind, ExtentReader, ReadError};
use berth_objectstore::ObjectStore;
use berth_objectstore::chunks::session::Session;
use berth_objectstore::chunks::upload::{ChunkUploader, FinishedIndex};
use bytes::BytesMut;
use serde_json::json;

use super::error::ImportError;
use super::job::{Reporter, Snapshot};
use super::journal::{Journal, Mark};
use super::pages::Pages;

/// How much data is pushed between two checkpoints: what a kill may cost.
pub const WINDOW: Bytes = Bytes::mib(32);
/// The longest hole that is looked for in one go, so that progress is said and stopping is possible in between.
const LONGEST_HOLE: Bytes = Bytes::gib(4);

/// An image that is ready to be read.
pub(crate) struct Readable<'a> {
    /// Its file, whose pages are let go of.
    pub path: &'a Path,
    /// Its reader.
    pub reader: AnyReader,
    /// The sum of the source that it was made of.
    pub source_digest: String,
    /// What is known of it.
    pub shape: Shape,
}

/// Uploads `image` into the store of `session`, going on from the session's checkpoint if it is of the same source.
pub(crate) async fn upload<S: ObjectStore>(
    session: &mut Session<S>,
    image: Readable<'_>,
    index: &Path,
    journal: &Journal,
    reporter: &dyn Reporter,
) -> Result<FinishedIndex, ImportError> {
    let state = json!({ "sourceDigest": image.source_digest });
    let mut uploader = begin(session, index, &state).await?;
    let Readable { path, reader, shape, .. } = image;
    let pages = Pages::of(path);
    let mut walk = Walk::new(reader, shape.chunk_size);
    let mut saved = uploader.counters().bytes_data;
    tracing::info!(stage = "Upload", offset = uploader.offset(), "uploading");
    while uploader.offset() < walk.size().0 {
        match walk.next(Bytes(uploader.offset())).await? {
            Step::Zeros(len) => uploader.push_zero(len).await?,
            Step::Data(data) => uploader.push_data(data.freeze()).await?,
        }
        report(&uploader, &shape, reporter);
        if uploader.counters().bytes_data.saturating_sub(saved) >= WINDOW {
            saved = uploader.counters().bytes_data;
            pages.release();
            if !crate::sabotage::active("no-checkpoint") {
                session.checkpoint(&mut uploader, state.clone()).await?;
                journal.mark(Mark::Uploaded, Bytes(uploader.offset()));
                tracing::info!(stage = "Upload", offset = uploader.offset(), "checkpoint");
            }
        }
    }
    session.checkpoint(&mut uploader, state).await?;
    journal.mark(Mark::Uploaded, Bytes(uploader.offset()));
    pages.release();
    report(&uploader, &shape, reporter);
    Ok(uploader.finish().await?)
}

/// The uploader at the session's checkpoint, or at the start if that is of another source, or of another node: its items
/// are not taken from the store, where others may write. What is there is found chunk by chunk, and not sent again.
async fn begin<S: ObjectStore>(
    session: &mut Session<S>,
    index: &Path,
    state: &serde_json::Value,
) -> Result<ChunkUploader<S>, ImportError> {
    if session.saved().is_some_and(|saved| saved.state != *state) {
        session.start_over().await?;
    }
    Ok(session.local_uploader(index).await?)
}

/// What comes next in an image.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Zeros: whole chunks, or all that is left.
    Zeros(Bytes),
    /// One chunk, or what is left.
    Data(BytesMut),
}

/// Goes through an image chunk by chunk.
struct Walk<R> {
    reader: R,
    chunk: Bytes,
    /// Up to here there is data, or less than a chunk of zeros: no need to ask.
    data_until: Bytes,
}

impl<R: ExtentReader> Walk<R> {
    fn new(reader: R, chunk: Bytes) -> Self {
        Self { reader, chunk, data_until: Bytes::ZERO }
    }

    fn size(&self) -> Bytes {
        self.reader.virtual_size()
    }

    async fn next(&mut self, at: Bytes) -> Result<Step, ReadError> {
        let len = self.size().saturating_sub(at).min(self.chunk);
        if at.saturating_add(len) > self.data_until {
            let zeros = self.zeros(at).await?;
            if zeros > Bytes::ZERO {
                return Ok(Step::Zeros(zeros));
            }
        }
        let mut data = BytesMut::zeroed(usize::try_from(len.0).expect("a chunk is at most 4 MiB"));
        self.reader.read_at(at, &mut data).await?;
        Ok(Step::Data(data))
    }

    /// How many bytes of zeros begin at `at`: whole chunks, or all that is left of the image. A hole may come in several
    /// extents; one that is shorter than a chunk is read with its neighbours.
    async fn zeros(&mut self, at: Bytes) -> Result<Bytes, ReadError> {
        let mut end = at;
        while end < self.size()
            && let Some(Extent { kind, offset, len }) = self.reader.next_extent(end).await?
        {
            let extent_end = offset.saturating_add(len);
            if kind == ExtentKind::Data {
                self.data_until = extent_end;
                break;
            }
            end = extent_end;
            if end.saturating_sub(at) >= LONGEST_HOLE {
                break;
            }
        }
        let run = end.saturating_sub(at);
        if end >= self.size() {
            return Ok(run);
        }
        Ok(Bytes(run.0 / self.chunk.0 * self.chunk.0))
    }
}

fn report<S: ObjectStore>(uploader: &ChunkUploader<S>, shape: &Shape, reporter: &dyn Reporter) {
    let counters = uploader.counters();
    let reused = Bytes(counters.chunks_reused.saturating_mul(shape.chunk_size.0));
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

#[cfg(test)]
mod tests {
    use super::*;

    /// An image given by its extents: true is data, whose bytes are 7.
    struct Drawn(Vec<(u64, bool)>, u32);

    impl Drawn {
        fn at(&self, at: u64) -> Option<(u64, bool)> {
            let mut end = 0;
            self.0.iter().find_map(|(len, data)| {
                end += len;
                (at < end).then_some((end, *data))
            })
        }
    }

    impl ExtentReader for Drawn {
        fn virtual_size(&self) -> Bytes {
            Bytes(self.0.iter().map(|(len, _)| len).sum())
        }

        async fn next_extent(&mut self, from: Bytes) -> Result<Option<Extent>, ReadError> {
            self.1 += 1;
            Ok(self.at(from.0).map(|(end, data)| Extent {
                offset: from,
                len: Bytes(end - from.0),
                kind: if data { ExtentKind::Data } else { ExtentKind::Zero },
            }))
        }

        async fn read_at(&mut self, offset: Bytes, buf: &mut [u8]) -> Result<(), ReadError> {
            for (at, byte) in (offset.0..).zip(buf) {
                *byte = if self.at(at).unwrap().1 { 7 } else { 0 };
            }
            Ok(())
        }
    }

    async fn steps(extents: &[(u64, bool)]) -> (Vec<(u64, bool)>, u32) {
        let mut walk = Walk::new(Drawn(extents.to_vec(), 0), Bytes(100));
        let (mut at, mut steps) = (0, Vec::new());
        while at < walk.size().0 {
            let step = match walk.next(Bytes(at)).await.unwrap() {
                Step::Zeros(len) => (len.0, false),
                Step::Data(data) => {
                    let mut expected = vec![0; data.len()];
                    walk.reader.read_at(Bytes(at), &mut expected).await.unwrap();
                    assert_eq!(data, expected);
                    (data.len() as u64, true)
                }
            };
            at += step.0;
            steps.push(step);
        }
        (steps, walk.reader.1)
    }

    #[tokio::test]
    async fn holes_are_not_read_and_pieces_of_them_are() {
        let (found, _) =
            steps(&[(250, true), (30, false), (20, false), (500, false), (60, true), (40, false)]).await;
        assert_eq!(found, [(100, true), (100, true), (100, true), (500, false), (100, true)]);
        let (found, _) = steps(&[(130, false), (20, true), (70, false)]).await;
        assert_eq!(found, [(100, false), (100, true), (20, false)]);
        assert_eq!(steps(&[(1000, false)]).await, (vec![(1000, false)], 1));
    }

    #[tokio::test]
    async fn a_long_extent_is_asked_for_once() {
        let (found, asked) = steps(&[(100_000, true)]).await;
        assert_eq!((found.len(), asked), (1000, 1));
    }
}
