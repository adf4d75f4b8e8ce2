//! One listener, one task per connection, and a connection that can be reset instead of closed.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use super::{BoxError, SentBody};

/// What a request may do to the connection it came on.
#[derive(Debug, Default)]
pub(crate) struct Conn {
    reset: AtomicBool,
}

impl Conn {
    /// Makes the end of this connection an RST instead of a FIN. The caller must also make the request fail.
    pub(crate) fn reset(&self) {
        self.reset.store(true, Ordering::Release);
    }

    /// Whether a request has asked for that.
    pub(crate) fn is_reset(&self) -> bool {
        self.reset.load(Ordering::Acquire)
    }
}

/// Answers requests.
pub(crate) trait Handler: Send + Sync + 'static {
    /// Answers one request; an error closes the connection without an answer.
    fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        conn: Arc<Conn>,
    ) -> impl Future<Output = Result<Response<SentBody>, BoxError>> + Send;
}

/// A running server. Dropping it closes the listener and every connection.
#[derive(Debug)]
pub(crate) struct Server {
    addr: SocketAddr,
    task: JoinHandle<()>,
}

impl Server {
    /// Listens on `addr` and answers with `handler`.
    pub(crate) async fn start<H: Handler>(addr: SocketAddr, handler: Arc<H>) -> io::Result<Self> {
        let listener = TcpListener::bind(addr).await?;
        let addr = listener.local_addr()?;
        Ok(Self { addr, task: tokio::spawn(accept(listener, handler)) })
    }

    /// The address in use, with the port that the system chose for port 0.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept<H: Handler>(listener: TcpListener, handler: Arc<H>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(connections.spawn(serve(stream, handler.clone()))),
                // Out of file descriptors: the connections that hold them end sooner or later.
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve<H: Handler>(stream: TcpStream, handler: Arc<H>) {
    let conn = Arc::new(Conn::default());
    // A delayed small answer would look like a slow server; failing to set it changes nothing else.
    let _ = stream.set_nodelay(true);
    let io = ConnIo { inner: TokioIo::new(stream), conn: conn.clone() };
    let service = service_fn(move |request| handler.clone().handle(request, conn.clone()));
    // Errors are the client going away or a fault that was asked for; both are in the request log.
    if let Err(error) = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await {
        tracing::debug!(%error, "connection ended");
    }
}

/// The stream, closed by RST if its [`Conn`] says so.
struct ConnIo {
    inner: TokioIo<TcpStream>,
    conn: Arc<Conn>,
}

impl ConnIo {
    fn check(&self) -> io::Result<()> {
        if self.conn.is_reset() { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }
}

impl Drop for ConnIo {
    fn drop(&mut self) {
        if self.conn.is_reset() {
            // Without it the close would be an orderly one: a weaker fault, not a wrong one.
            let _ = self.inner.inner().set_zero_linger();
        }
    }
}

impl Read for ConnIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl Write for ConnIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }
}
