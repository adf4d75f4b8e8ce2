//! The store server: a chunked image of an image store as a block device, over NBD on a Unix socket.
//!
//! [`protocol`] reads and writes the protocol, [`connection`] is one client, and
//! [`RemoteImage`](berth_objectstore::chunks::remote::RemoteImage) is what they read. The export is read-only, and every
//! connection sees the same, so the kernel may use several. Whatever one client does ends its own connection at most:
//! connections, their requests, the time of a handshake and of sending are bounded.
//!
//! A server that ends answers nothing with an error: it closes its connections, and the kernel's requests wait for the
//! next server.

pub mod connection;
pub mod protocol;
pub mod template;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use berth_objectstore::ObjectStore;
use berth_objectstore::chunks::remote::RemoteImage;
use serde::Serialize;
use tokio::net::UnixListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::connection::Connection;
use self::protocol::ExportInfo;
use crate::socket::is_trusted;

/// How long requests may go on when the server ends.
const GRACE: Duration = Duration::from_secs(2);
/// How long it waits when the system lets it accept nobody.
const PAUSE: Duration = Duration::from_millis(100);

/// What one server does at once, and how long clients may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once; more are closed.
    pub connections: usize,
    /// Requests of a connection at once; more are read later.
    pub requests: usize,
    /// How long a client may negotiate.
    pub negotiation: Duration,
    /// How long a client may take to receive one answer.
    pub sending: Duration,
}

impl Default for Limits {
    /// 16 connections of 64 requests; 10 s and 60 s.
    fn default() -> Self {
        let (negotiation, sending) = (Duration::from_secs(10), Duration::from_secs(60));
        Self { connections: 16, requests: 64, negotiation, sending }
    }
}

/// What a server has counted.
#[derive(Debug, Default)]
pub struct Served {
    open: AtomicU64,
    connections: AtomicU64,
    requests: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
    broken: AtomicU64,
}

/// Totals of a server since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServedTotals {
    /// Connections now.
    pub open: u64,
    /// Connections that were accepted.
    pub connections: u64,
    /// Requests that were read.
    pub requests: u64,
    /// Requests that were refused: writes, and what makes no sense.
    pub refused: u64,
    /// Requests that were answered with an input/output error.
    pub failed: u64,
    /// Connections that ended because of what the client did or did not.
    pub broken: u64,
}

impl Served {
    /// The totals now.
    pub fn totals(&self) -> ServedTotals {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ServedTotals {
            open: of(&self.open),
            connections: of(&self.connections),
            requests: of(&self.requests),
            refused: of(&self.refused),
            failed: of(&self.failed),
            broken: of(&self.broken),
        }
    }
}

/// Adds one.
fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Serves the image to whoever connects and is root or this user, until `stop`.
pub async fn serve<S: ObjectStore>(
    listener: UnixListener,
    image: RemoteImage<S>,
    limits: Limits,
    served: Arc<Served>,
    stop: CancellationToken,
) {
    let export = Arc::new(export(&image));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "nobody can be accepted");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if !is_trusted(&stream) || connections.len() >= limits.connections {
            tracing::warn!(open = connections.len(), "a client is turned away");
            continue;
        }
        count(&served.connections);
        let connection = Connection {
            image: image.clone(),
            export: Arc::clone(&export),
            limits,
            served: Arc::clone(&served),
            stop: stop.clone(),
        };
        connections.spawn(connection.run(stream));
    }
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(GRACE, all).await.is_err() {
        tracing::warn!("requests that wait are left to the next server");
    }
}

/// What clients are told of the image.
fn export<S: ObjectStore>(image: &RemoteImage<S>) -> ExportInfo {
    ExportInfo {
        name: image.digest().to_string(),
        description: "an image of an image store, read-only".to_owned(),
        size: image.virtual_size(),
        preferred: image.chunk_size().min(image.longest_read()),
        longest: image.longest_read(),
    }
}
