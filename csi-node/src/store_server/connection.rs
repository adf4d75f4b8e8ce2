//! One client of a store server.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use berth_core::units::Bytes as Size;
use berth_objectstore::ObjectStore;
use berth_objectstore::chunks::remote::{RemoteError, RemoteImage};
use bytes::{Buf as _, BytesMut};
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufWriter};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::protocol::answer::{self, MOST_EXTENTS, Part};
use super::protocol::negotiation::{Negotiation, Step, greeting};
use super::protocol::request::{Command, REQUEST, Request, decode};
use super::protocol::{Agreed, Broken, Errno, ExportInfo};
use super::{Limits, Served, count};

/// What is read of a connection at a time.
const READ: usize = 4096;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Why a connection ended otherwise than by the client's wish.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// What the client says is not the protocol.
    #[error("the client does not speak NBD as it should")]
    Protocol(#[from] Broken),
    /// It broke off.
    #[error("the connection was lost")]
    Lost(#[from] io::Error),
    /// It did not finish the negotiation.
    #[error("the client had not finished the negotiation after {} s", .0.as_secs_f32())]
    Negotiation(Duration),
    /// It does not receive what it asked for.
    #[error("the client had not received an answer after {} s", .0.as_secs_f32())]
    Sending(Duration),
}

/// A client's connection, before it is run.
pub(super) struct Connection<S> {
    pub(super) image: RemoteImage<S>,
    pub(super) export: Arc<ExportInfo>,
    pub(super) limits: Limits,
    pub(super) served: Arc<Served>,
    pub(super) stop: CancellationToken,
}

/// What the requests of a connection share.
struct Desk<S> {
    connection: Connection<S>,
    agreed: Agreed,
    writer: Mutex<BufWriter<OwnedWriteHalf>>,
}

/// The bytes that a client sends.
struct Incoming {
    reader: OwnedReadHalf,
    buffer: BytesMut,
    /// How much of what comes next belongs to a write that was refused.
    refused: Size,
}

impl Incoming {
    /// Reads until there are `len` bytes; false if the client ended before. Can be given up and called again.
    async fn fill(&mut self, len: usize) -> io::Result<bool> {
        while self.buffer.len() < len {
            self.buffer.reserve(READ.max(len - self.buffer.len()));
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Drops what is still to be dropped. Can be given up and called again.
    async fn drop_refused(&mut self) -> io::Result<()> {
        loop {
            let here = self.refused.0.min(self.buffer.len() as u64);
            self.buffer.advance(usize::try_from(here).unwrap_or(usize::MAX));
            self.refused = self.refused.saturating_sub(Size(here));
            if self.refused == Size::ZERO {
                return Ok(());
            }
            if !self.fill(1).await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl<S: ObjectStore> Connection<S> {
    /// Serves the client until it ends, does something wrong, or the server ends.
    pub(super) async fn run(self, stream: UnixStream) {
        let served = Arc::clone(&self.served);
        served.open.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = self.serve(stream).await {
            count(&served.broken);
            tracing::info!(%error, "a client's connection is closed");
        }
        served.open.fetch_sub(1, Ordering::Relaxed);
    }

    async fn serve(self, stream: UnixStream) -> Result<(), ConnectionError> {
        let (reader, mut writer) = stream.into_split();
        let mut incoming = Incoming { reader, buffer: BytesMut::with_capacity(READ), refused: Size::ZERO };
        let limit = self.limits.negotiation;
        let negotiated = tokio::select! {
            biased;
            () = self.stop.cancelled() => return Ok(()),
            negotiated = timeout(limit, negotiate(&self.export, &mut incoming, &mut writer)) => negotiated,
        };
        let Some(agreed) = negotiated.map_err(|_| ConnectionError::Negotiation(limit))?? else {
            return Ok(());
        };
        let writer = Mutex::new(BufWriter::new(writer));
        Arc::new(Desk { connection: self, agreed, writer }).requests(incoming).await
    }
}

/// Negotiates; nothing if the client ended.
async fn negotiate(
    export: &ExportInfo,
    incoming: &mut Incoming,
    writer: &mut OwnedWriteHalf,
) -> Result<Option<Agreed>, ConnectionError> {
    writer.write_all(&greeting()).await?;
    let mut negotiation = Negotiation::new(export);
    loop {
        match negotiation.advance(&incoming.buffer)? {
            Step::Need(len) => {
                if !incoming.fill(len).await? {
                    return Ok(None);
                }
            }
            Step::Answer { used, send } => {
                incoming.buffer.advance(used);
                writer.write_all(&send).await?;
            }
            Step::Begin { used, send, agreed } => {
                incoming.buffer.advance(used);
                writer.write_all(&send).await?;
                return Ok(Some(agreed));
            }
            Step::End { send } => {
                // It may not wait for the answer.
                let _ = writer.write_all(&send).await;
                return Ok(None);
            }
        }
    }
}

impl<S: ObjectStore> Desk<S> {
    /// Reads requests and answers each in a task of its own.
    async fn requests(self: Arc<Self>, mut incoming: Incoming) -> Result<(), ConnectionError> {
        let turns = Arc::new(Semaphore::new(self.connection.limits.requests));
        let mut tasks = JoinSet::new();
        loop {
            let next = async {
                let turn = Arc::clone(&turns).acquire_owned().await.ok();
                Ok::<_, ConnectionError>((self.next(&mut incoming).await?, turn))
            };
            let (request, turn) = tokio::select! {
                biased;
                () = self.connection.stop.cancelled() => break,
                Some(answered) = tasks.join_next() => {
                    match answered {
                        Ok(answered) => answered?,
                        Err(error) => return Err(io::Error::other(error).into()),
                    }
                    continue;
                }
                next = next => match next? {
                    (Some(request), turn) => (request, turn),
                    (None, _) => break,
                },
            };
            let desk = Arc::clone(&self);
            tasks.spawn(async move {
                let answered = desk.answer(request).await;
                drop(turn);
                answered
            });
        }
        while let Some(answered) = tasks.join_next().await {
            answered.unwrap_or_else(|error| Err(io::Error::other(error).into()))?;
        }
        Ok(())
    }

    /// The next request; nothing if the client ends. Can be given up and called again.
    async fn next(&self, incoming: &mut Incoming) -> Result<Option<Request>, ConnectionError> {
        incoming.drop_refused().await?;
        if !incoming.fill(REQUEST).await? {
            let cut = !incoming.buffer.is_empty();
            return if cut { Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()) } else { Ok(None) };
        }
        let mut head = [0; REQUEST];
        head.copy_from_slice(&incoming.buffer[..REQUEST]);
        let request = decode(&head, &self.connection.export, self.agreed)?;
        incoming.buffer.advance(REQUEST);
        count(&self.connection.served.requests);
        if let Command::Refused { follows, .. } = request.command {
            incoming.refused = follows;
        }
        Ok((request.command != Command::Disconnect).then_some(request))
    }

    async fn answer(&self, request: Request) -> Result<(), ConnectionError> {
        let cookie = request.cookie;
        match request.command {
            Command::Read { offset, len, whole } => match self.connection.image.read(offset, len).await {
                Ok(mut reading) => {
                    let pieces = std::mem::take(&mut reading.pieces);
                    // The rest of `reading` is the memory, which counts until all is sent.
                    self.send(answer::data(cookie, offset, pieces, whole, self.agreed)).await
                }
                Err(error) => self.fail(cookie, &error).await,
            },
            Command::Status { offset, len, one } => {
                let most = if one { 1 } else { MOST_EXTENTS };
                match self.connection.image.extents(offset, len, most).await {
                    Ok(extents) => self.send(answer::status(cookie, &extents)).await,
                    Err(error) => self.fail(cookie, &error).await,
                }
            }
            Command::Flush => self.send(answer::simple(cookie, None)).await,
            Command::Refused { errno, chunked, .. } => {
                count(&self.connection.served.refused);
                self.send(if chunked {
                    answer::failure(cookie, errno, self.agreed)
                } else {
                    answer::simple(cookie, Some(errno))
                })
                .await
            }
            Command::Disconnect => Ok(()),
        }
    }

    /// A server that ends leaves the request to the next one.
    async fn fail(&self, cookie: u64, error: &RemoteError) -> Result<(), ConnectionError> {
        if matches!(error, RemoteError::Stopped { .. }) {
            return Err(io::Error::from(io::ErrorKind::ConnectionAborted).into());
        }
        count(&self.connection.served.failed);
        tracing::info!(%error, "a read fails");
        self.send(answer::failure(cookie, Errno::Io, self.agreed)).await
    }

    async fn send(&self, parts: Vec<Part>) -> Result<(), ConnectionError> {
        let limit = self.connection.limits.sending;
        let mut writer = self.writer.lock().await;
        let sending = async {
            for part in parts {
                match part {
                    Part::Bytes(bytes) => writer.write_all(&bytes).await?,
                    Part::Zeros(len) => {
                        let mut left = len.0;
                        while left > 0 {
                            let now = left.min(ZEROS.len() as u64);
                            writer.write_all(&ZEROS[..usize::try_from(now).unwrap_or(ZEROS.len())]).await?;
                            left -= now;
                        }
                    }
                }
            }
            writer.flush().await
        };
        timeout(limit, sending)
            .await
            .map_err(|_| ConnectionError::Sending(limit))?
            .map_err(ConnectionError::Lost)
    }
}
