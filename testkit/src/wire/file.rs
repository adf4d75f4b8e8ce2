//! Files, or ranges of several files in a row, as a body stream of bounded memory.

use std::any::Any;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use s3s::stream::{ByteStream, DynByteStream, RemainingLength};

/// Bytes per read.
const READ_SIZE: u64 = 256 << 10;

/// A range of one file.
pub(crate) struct Piece {
    pub(crate) path: PathBuf,
    pub(crate) range: Range<u64>,
    /// What keeps the file from being removed while it is read.
    pub(crate) keep: Option<Arc<dyn Any + Send + Sync>>,
}

struct State {
    pieces: VecDeque<Piece>,
    open: Option<Arc<File>>,
    bytes_per_second: Option<u64>,
}

/// Ranges of files, one after the other, as a body that knows how much is left of it.
pub(crate) struct FileBody {
    inner: Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send + Sync>>,
    left: u64,
}

impl FileBody {
    /// Reads `pieces` in order, at most `bytes_per_second`. A file that ends before its range is an error.
    pub(crate) fn new(pieces: impl IntoIterator<Item = Piece>, bytes_per_second: Option<u64>) -> Self {
        let pieces: VecDeque<_> = pieces.into_iter().filter(|p| !p.range.is_empty()).collect();
        let left = pieces.iter().map(|p| p.range.end - p.range.start).sum();
        let state = State { pieces, open: None, bytes_per_second };
        Self { inner: Box::pin(futures::stream::try_unfold(state, next)), left }
    }

    /// As a body of s3s.
    pub(crate) fn into_body(self) -> s3s::Body {
        s3s::Body::from(Box::pin(self) as DynByteStream)
    }
}

impl Stream for FileBody {
    type Item = Result<Bytes, s3s::StdError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = ready!(self.inner.as_mut().poll_next(cx));
        if let Some(Ok(data)) = &item {
            self.left -= data.len() as u64;
        }
        Poll::Ready(item.map(|i| i.map_err(Into::into)))
    }
}

impl ByteStream for FileBody {
    fn remaining_length(&self) -> RemainingLength {
        RemainingLength::new_exact(usize::try_from(self.left).unwrap_or(usize::MAX))
    }
}

async fn next(mut state: State) -> io::Result<Option<(Bytes, State)>> {
    let Some(piece) = state.pieces.front_mut() else { return Ok(None) };
    let mut want = (piece.range.end - piece.range.start).min(READ_SIZE);
    if let Some(rate) = state.bytes_per_second.map(|r| r.max(1)) {
        // A tenth of a second's worth at a time, in whole nanoseconds.
        want = want.min((rate / 10).max(1));
        tokio::time::sleep(Duration::from_nanos(want.saturating_mul(1_000_000_000) / rate)).await;
    }
    let offset = piece.range.start;
    let (path, open) = (piece.path.clone(), state.open.take());
    let (file, data) = tokio::task::spawn_blocking(move || read(open, path, offset, want))
        .await
        .map_err(io::Error::other)??;
    piece.range.start += want;
    if piece.range.is_empty() {
        drop(state.pieces.pop_front().and_then(|done| done.keep));
    } else {
        state.open = Some(file);
    }
    Ok(Some((data, state)))
}

fn read(open: Option<Arc<File>>, path: PathBuf, offset: u64, len: u64) -> io::Result<(Arc<File>, Bytes)> {
    let file = match open {
        Some(file) => file,
        None => Arc::new(File::open(path)?),
    };
    let mut data = vec![0; usize::try_from(len).expect("at most READ_SIZE")];
    file.read_exact_at(&mut data, offset)?;
    Ok((file, data.into()))
}
