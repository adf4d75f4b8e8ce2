//! Request bodies that count and can be cut; response bodies that count, and can be cut, stalled or corrupted.

use std::fmt;
use std::future::Future as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Sleep;

use super::{BoxError, Conn, CutOff};

/// Most bytes of an unread request body that are read before an early answer.
const DRAIN_LIMIT: u64 = 64 << 20;
/// Time for what was already handed over to leave the process before a connection is cut.
const FLUSH_TIME: Duration = Duration::from_millis(30);

/// A request body that counts what arrives and fails after a given number of bytes.
///
/// Clones share one body, so that the rest can be read after its consumer has gone.
#[derive(Clone)]
pub(crate) struct ReceivedBody {
    inner: Arc<Mutex<Incoming>>,
    received: Arc<AtomicU64>,
    /// `u64::MAX` stands for no limit.
    limit: Arc<AtomicU64>,
    conn: Arc<Conn>,
}

impl ReceivedBody {
    pub(crate) fn new(inner: Incoming, conn: Arc<Conn>) -> Self {
        Self {
            inner: Arc::new(Mutex::new(inner)),
            received: Arc::default(),
            limit: Arc::new(AtomicU64::new(u64::MAX)),
            conn,
        }
    }

    /// Bytes received so far.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Acquire)
    }

    /// Resets the connection once `bytes` have arrived.
    pub(crate) fn reset_after(&self, bytes: u64) {
        self.limit.store(bytes, Ordering::Release);
    }

    fn check(&self) -> Result<(), BoxError> {
        if self.received() >= self.limit.load(Ordering::Acquire) {
            self.conn.reset();
            return Err(CutOff.into());
        }
        Ok(())
    }
}

impl Body for ReceivedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Err(error) = self.check() {
            return Poll::Ready(Some(Err(error)));
        }
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let frame = ready!(Pin::new(&mut *inner).poll_frame(cx));
        drop(inner);
        if let Some(Ok(frame)) = &frame {
            let len = frame.data_ref().map_or(0, Bytes::len) as u64;
            self.received.fetch_add(len, Ordering::AcqRel);
            if let Err(error) = self.check() {
                return Poll::Ready(Some(Err(error)));
            }
        }
        Poll::Ready(frame.map(|f| f.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).size_hint()
    }
}

/// Reads what is left of `body`, up to a limit: a client that is still sending would otherwise get a reset instead of
/// the answer. Returns false if the body did not end.
pub(crate) async fn drain(mut body: ReceivedBody) -> bool {
    let start = body.received();
    while body.received() - start < DRAIN_LIMIT {
        match std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            Some(Ok(_)) => {}
            Some(Err(_)) => return false,
            None => return true,
        }
    }
    false
}

/// How a cut response ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CutKind {
    /// With an RST.
    Reset,
    /// With an orderly close before the announced length.
    Truncate,
    /// Not at all: the connection stays open and silent.
    Stall,
}

/// Where and how a response ends early.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    /// Body bytes that are still sent.
    pub(crate) after: u64,
    /// What comes instead of the rest.
    pub(crate) kind: CutKind,
}

/// How a response body ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct End {
    /// Bytes handed to the connection.
    pub(crate) sent: u64,
    /// Whether that was all of it.
    pub(crate) complete: bool,
}

/// A response body that reports its end, and can be cut short or have one byte changed.
pub(crate) struct SentBody {
    inner: s3s::Body,
    sent: u64,
    cut: Option<Cut>,
    cutting: Option<Pin<Box<Sleep>>>,
    corrupt_at: Option<u64>,
    on_end: Option<Box<dyn FnOnce(End) + Send>>,
    conn: Arc<Conn>,
}

impl fmt::Debug for SentBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SentBody").field("sent", &self.sent).field("cut", &self.cut).finish_non_exhaustive()
    }
}

impl SentBody {
    /// Wraps `inner`; `on_end` is called once, before the last byte is handed over or when the body is dropped.
    pub(crate) fn new(inner: s3s::Body, conn: Arc<Conn>, on_end: impl FnOnce(End) + Send + 'static) -> Self {
        let on_end: Box<dyn FnOnce(End) + Send> = Box::new(on_end);
        Self { inner, sent: 0, cut: None, cutting: None, corrupt_at: None, on_end: Some(on_end), conn }
    }

    /// Ends the body early.
    pub(crate) fn cut(mut self, cut: Option<Cut>) -> Self {
        self.cut = cut;
        self
    }

    /// Flips all bits of the byte at `offset`, if it is reached.
    pub(crate) fn corrupt(mut self, offset: Option<u64>) -> Self {
        self.corrupt_at = offset;
        self
    }

    /// Reports the end now: the answer has no body to poll.
    pub(crate) fn end(&mut self, complete: bool) {
        if let Some(on_end) = self.on_end.take() {
            on_end(End { sent: self.sent, complete });
        }
    }

    fn finish_cut(
        &mut self,
        kind: CutKind,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let sleep = self.cutting.get_or_insert_with(|| Box::pin(tokio::time::sleep(FLUSH_TIME)));
        ready!(sleep.as_mut().poll(cx));
        match kind {
            CutKind::Stall => return Poll::Pending,
            CutKind::Reset => self.conn.reset(),
            CutKind::Truncate => {}
        }
        self.end(false);
        Poll::Ready(Some(Err(CutOff.into())))
    }

    fn shape(&mut self, mut data: Bytes) -> Bytes {
        if let Some(cut) = self.cut {
            data.truncate(usize::try_from(cut.after - self.sent).unwrap_or(usize::MAX));
        }
        let hit = self.corrupt_at.and_then(|at| usize::try_from(at.checked_sub(self.sent)?).ok());
        if let Some(at) = hit.filter(|at| *at < data.len()) {
            let mut changed = data.to_vec();
            changed[at] = !changed[at];
            data = changed.into();
        }
        self.sent += data.len() as u64;
        data
    }
}

impl Body for SentBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(cut) = self.cut.filter(|cut| self.sent >= cut.after) {
            return self.finish_cut(cut.kind, cx);
        }
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        match frame {
            Some(Ok(frame)) => {
                let data = self.shape(frame.into_data().unwrap_or_default());
                let ended = self.inner.is_end_stream() || self.inner.size_hint().exact() == Some(0);
                if ended && self.cut.is_none() {
                    self.end(true);
                }
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Some(Err(error)) => {
                self.end(false);
                Poll::Ready(Some(Err(error)))
            }
            None => {
                self.end(true);
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.cut.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for SentBody {
    fn drop(&mut self) {
        self.end(false);
    }
}
