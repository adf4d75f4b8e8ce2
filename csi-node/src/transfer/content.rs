//! An image as pieces in ascending order, wherever it is: a file on this node, an object that is read by range, an image of
//! an image store. Reading goes on while what came before is compressed and sent; at most [`AHEAD`] pieces wait, or are
//! on their way.

use std::future::Future;
use std::path::PathBuf;

use berth_core::units::Bytes;
use berth_image::{AnyReader, Extent, ExtentKind, ExtentReader, ImageReader};
use berth_objectstore::chunks::remote::{Piece as StoredPiece, RemoteImage};
use berth_objectstore::s3::S3Store;
use berth_objectstore::source::RangedSource;
use bytes::{Bytes as Buffer, BytesMut};
use futures::stream::{BoxStream, StreamExt as _, TryStreamExt as _, try_unfold, unfold};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::error::TransferError;
use super::pages::Pages;
use super::ranges::Ranges;

/// How many pieces are read ahead.
const AHEAD: usize = 8;
/// How much of a file is read before its pages are let go of.
const PAGES: Bytes = Bytes::mib(32);
/// The longest hole that is looked for in one go, so that progress is said and stopping is possible in between.
const LONGEST_HOLE: Bytes = Bytes::gib(4);
/// How much one request to a source asks for: between two, the source says whether it is still the same.
const SPAN: Bytes = Bytes::mib(256);

/// A part of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// So many zeros, known without looking.
    Zeros(Bytes),
    /// Bytes, which may still be zeros.
    Data(Buffer),
}

/// An image from somewhere on, without gaps. An error ends it.
pub(crate) type Pieces = BoxStream<'static, Result<Piece, TransferError>>;

/// Where an image is read.
#[allow(clippy::large_enum_variant)] // there is one for each transfer that runs
pub(crate) enum Content {
    /// In a file on this node.
    File {
        /// Its reader.
        reader: AnyReader,
        /// The file, whose pages are let go of.
        path: PathBuf,
    },
    /// A raw image behind an address, opened, whose bytes are the disk's.
    Ranged {
        /// The source.
        source: RangedSource,
        /// Its size: a multiple of 512.
        size: Bytes,
    },
    /// Behind an address, in a format that a reader reads by ranges.
    Image(ImageReader<Ranges>),
    /// In an image store.
    Stored(RemoteImage<S3Store>),
}

impl Content {
    /// The size of the disk.
    pub fn virtual_size(&self) -> Bytes {
        match self {
            Self::File { reader, .. } => reader.virtual_size(),
            Self::Ranged { size, .. } => *size,
            Self::Image(reader) => reader.virtual_size(),
            Self::Stored(image) => image.virtual_size(),
        }
    }

    /// The image from `from` on, a multiple of `unit`. Zeros come in whole units and data in single ones, but for the last
    /// piece, which is what is left.
    pub fn pieces(self, from: Bytes, unit: Bytes) -> Pieces {
        match self {
            Self::File { reader, path } => ahead(of_reader(reader, Some(Pages::of(&path)), from, unit)),
            Self::Image(reader) => ahead(of_reader(reader, None, from, unit)),
            Self::Ranged { source, size } => ahead(of_range(source, from..size, unit)),
            Self::Stored(image) => of_store(image, from, unit),
        }
    }
}

/// Reads ahead of whoever takes the pieces.
fn ahead(mut pieces: Pieces) -> Pieces {
    let (sender, receiver) = mpsc::channel(AHEAD);
    let task = tokio::spawn(async move {
        while let Some(piece) = pieces.next().await {
            if sender.send(piece).await.is_err() {
                break;
            }
        }
    });
    let state = (receiver, AbortOnDropHandle::new(task));
    unfold(state, |mut state| async move { state.0.recv().await.map(|piece| (piece, state)) }).boxed()
}

/// What a reader reads; `pages` are those of its file, if it is one.
fn of_reader<R: ExtentReader + 'static>(reader: R, pages: Option<Pages>, from: Bytes, unit: Bytes) -> Pieces {
    let start = (Walk::new(reader, unit), pages, from, from);
    try_unfold(start, |(mut walk, pages, at, released)| async move {
        let Some(next) = walk.next(at).await? else { return Ok(None) };
        let piece = match next {
            Next::Zeros(len) => Piece::Zeros(len),
            Next::Data(len) => {
                let mut data = BytesMut::zeroed(memory(len));
                walk.extents.read_at(at, &mut data).await?;
                Piece::Data(data.freeze())
            }
        };
        let at = at.saturating_add(next.len());
        let due = at.saturating_sub(released) >= PAGES;
        if let Some(pages) = pages.as_ref().filter(|_| due) {
            pages.release();
        }
        Ok(Some((piece, (walk, pages, at, if due { at } else { released }))))
    })
    .boxed()
}

fn of_range(source: RangedSource, range: std::ops::Range<Bytes>, unit: Bytes) -> Pieces {
    let end = range.end;
    let spans = try_unfold(range.start, move |at| {
        let source = source.clone();
        async move {
            if at >= end {
                return Ok(None);
            }
            let until = end.min(at.saturating_add(SPAN));
            let stream = source.read(at.0..until.0).await?;
            Ok::<_, TransferError>(Some((stream.map_err(TransferError::from), until)))
        }
    });
    let state = (spans.try_flatten().boxed(), BytesMut::new());
    try_unfold(state, move |(mut stream, mut held)| async move {
        while held.len() < memory(unit) {
            match stream.try_next().await? {
                Some(more) => held.extend_from_slice(&more),
                None => break,
            }
        }
        let piece = held.split_to(held.len().min(memory(unit))).freeze();
        Ok((!piece.is_empty()).then_some((Piece::Data(piece), (stream, held))))
    })
    .boxed()
}

fn of_store(image: RemoteImage<S3Store>, from: Bytes, unit: Bytes) -> Pieces {
    let start = (Walk::new(Stored(image.clone()), unit), from);
    let wanted = try_unfold(start, |(mut walk, at)| async move {
        let next = walk.next(at).await?;
        Ok::<_, TransferError>(next.map(|next| ((at, next), (walk, at.saturating_add(next.len())))))
    });
    let read = move |(at, next)| {
        let image = image.clone();
        async move {
            match next {
                Next::Zeros(len) => Ok(Piece::Zeros(len)),
                Next::Data(len) => read_stored(&image, at, len).await,
            }
        }
    };
    wanted.map_ok(read).try_buffered(AHEAD).boxed()
}

async fn read_stored(image: &RemoteImage<S3Store>, at: Bytes, len: Bytes) -> Result<Piece, TransferError> {
    let reading = image.read(at.0, len).await?;
    if let [StoredPiece::Data(whole)] = &reading.pieces[..] {
        return Ok(Piece::Data(whole.clone()));
    }
    let mut data = BytesMut::with_capacity(memory(len));
    for piece in &reading.pieces {
        match piece {
            StoredPiece::Data(bytes) => data.extend_from_slice(bytes),
            StoredPiece::Zero(zeros) => data.resize(data.len() + memory(*zeros), 0),
        }
    }
    Ok(Piece::Data(data.freeze()))
}

/// The length of a piece, which is small.
fn memory(len: Bytes) -> usize {
    usize::try_from(len.0).expect("a piece is at most 4 MiB")
}

/// What comes next in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Zeros: whole units, or all that is left.
    Zeros(Bytes),
    /// One unit, or what is left.
    Data(Bytes),
}

impl Next {
    fn len(self) -> Bytes {
        match self {
            Self::Zeros(len) | Self::Data(len) => len,
        }
    }
}

/// Says what an image holds.
trait Extents: Send {
    fn size(&self) -> Bytes;
    /// The extent that begins at `from`, or `None` at the end.
    fn extent(&mut self, from: Bytes) -> impl Future<Output = Result<Option<Extent>, TransferError>> + Send;
}

impl<R: ExtentReader> Extents for R {
    fn size(&self) -> Bytes {
        self.virtual_size()
    }

    async fn extent(&mut self, from: Bytes) -> Result<Option<Extent>, TransferError> {
        Ok(self.next_extent(from).await?)
    }
}

/// An image of an image store.
struct Stored(RemoteImage<S3Store>);

impl Extents for Stored {
    fn size(&self) -> Bytes {
        self.0.virtual_size()
    }

    async fn extent(&mut self, from: Bytes) -> Result<Option<Extent>, TransferError> {
        let left = self.size().saturating_sub(from);
        let found = self.0.extents(from.0, left, 1).await?;
        Ok(found.first().map(|found| {
            let kind = if found.zero { ExtentKind::Zero } else { ExtentKind::Data };
            Extent { offset: from, len: found.len, kind }
        }))
    }
}

/// Goes through an image unit by unit.
struct Walk<E> {
    extents: E,
    unit: Bytes,
    /// Up to here there is data, or less than a unit of zeros: no need to ask.
    data_until: Bytes,
}

impl<E: Extents> Walk<E> {
    fn new(extents: E, unit: Bytes) -> Self {
        Self { extents, unit, data_until: Bytes::ZERO }
    }

    async fn next(&mut self, at: Bytes) -> Result<Option<Next>, TransferError> {
        let len = self.extents.size().saturating_sub(at).min(self.unit);
        if len == Bytes::ZERO {
            return Ok(None);
        }
        if at.saturating_add(len) > self.data_until {
            let zeros = self.zeros(at).await?;
            if zeros > Bytes::ZERO {
                return Ok(Some(Next::Zeros(zeros)));
            }
        }
        Ok(Some(Next::Data(len)))
    }

    /// How many bytes of zeros begin at `at`: whole units, or all that is left of the image. A hole may come in several
    /// extents; one that is shorter than a unit is read with its neighbours.
    async fn zeros(&mut self, at: Bytes) -> Result<Bytes, TransferError> {
        let mut end = at;
        while end < self.extents.size()
            && let Some(Extent { kind, offset, len }) = self.extents.extent(end).await?
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
        if end >= self.extents.size() {
            return Ok(run);
        }
        Ok(Bytes(run.0 / self.unit.0 * self.unit.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image given by its extents (true is data), and how often it was asked.
    struct Drawn(Vec<(u64, bool)>, u32);

    impl Extents for Drawn {
        fn size(&self) -> Bytes {
            Bytes(self.0.iter().map(|(len, _)| len).sum())
        }

        async fn extent(&mut self, from: Bytes) -> Result<Option<Extent>, TransferError> {
            self.1 += 1;
            let mut end = 0;
            Ok(self.0.iter().find_map(|(len, data)| {
                end += len;
                let kind = if *data { ExtentKind::Data } else { ExtentKind::Zero };
                (from.0 < end).then(|| Extent { offset: from, len: Bytes(end - from.0), kind })
            }))
        }
    }

    async fn steps(extents: &[(u64, bool)]) -> (Vec<(u64, bool)>, u32) {
        let mut walk = Walk::new(Drawn(extents.to_vec(), 0), Bytes(100));
        let (mut at, mut steps) = (Bytes::ZERO, Vec::new());
        while let Some(next) = walk.next(at).await.unwrap() {
            at = at.saturating_add(next.len());
            steps.push((next.len().0, matches!(next, Next::Data(_))));
        }
        assert_eq!(at, walk.extents.size());
        (steps, walk.extents.1)
    }

    #[tokio::test]
    async fn holes_are_not_read_and_pieces_of_them_are() {
        let (found, _) =
            steps(&[(250, true), (30, false), (20, false), (500, false), (60, true), (40, false)]).await;
        assert_eq!(found, [(100, true), (100, true), (100, true), (500, false), (100, true)]);
        let (found, _) = steps(&[(130, false), (20, true), (70, false)]).await;
        assert_eq!(found, [(100, false), (100, true), (20, false)]);
        assert_eq!(steps(&[(1000, false)]).await, (vec![(1000, false)], 1));
        assert_eq!(steps(&[]).await, (vec![], 0));
    }

    #[tokio::test]
    async fn a_long_extent_is_asked_for_once() {
        let (found, asked) = steps(&[(100_000, true)]).await;
        assert_eq!((found.len(), asked), (1000, 1));
    }

    #[tokio::test]
    async fn an_error_ends_what_is_read_ahead_and_comes_after_what_was_read() {
        let pieces = [Ok(Piece::Zeros(Bytes(1))), Err(TransferError::NoSize)];
        let mut read = ahead(futures::stream::iter(pieces).boxed());
        assert_eq!(read.next().await.unwrap().unwrap(), Piece::Zeros(Bytes(1)));
        assert!(matches!(read.next().await, Some(Err(TransferError::NoSize))));
        assert!(read.next().await.is_none());
    }
}
