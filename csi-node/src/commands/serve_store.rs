//! `berth-node serve-store`: the server that [the keeper](crate::supervisor::keeper) starts for an image of an image store.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable as _};
use berth_core::ids::Digest;
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_device::nbd::NbdServer;
use berth_objectstore::chunks::remote::{
    Health, OpenRemoteError, RemoteConfig, RemoteError, RemoteImage, Sink,
};
use berth_objectstore::chunks::store::{ChunkStore, OpenError};
use berth_objectstore::layout::{LayoutError, StoreLayout};
use berth_objectstore::s3::{ConnectError, S3Store};
use clap::Args;
use futures::FutureExt as _;
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::socket;
use crate::store_server::template::{TemplateSink, hydrate};
use crate::store_server::{Limits, Served, serve};
use crate::supervisor::servers::StateError;
use crate::supervisor::stores::{StoreServerSpec, StoreStatus, order_in, say_status};
use crate::telemetry::chain;
use crate::transfer::error::store_reason;

/// How often it says how it is, if that has changed.
const LOOK: Duration = Duration::from_secs(1);
/// The least that fetched chunks, the index and answers take. Larger chunks take more.
const MEMORY: Bytes = Bytes::mib(128);
/// The kernel's connection, and handshakes of those who connect the device again.
const CONNECTIONS: usize = 4;

/// Flags of `berth-node serve-store`.
#[derive(Clone, Debug, Args)]
pub struct ServeStoreArgs {
    /// Its folder: what it serves lies there, and it says there how it is.
    #[arg(long)]
    pub folder: PathBuf,
}

/// Why an image is not served.
#[derive(Debug, Error)]
pub enum ServeStoreError {
    /// Its folder.
    #[error("its folder cannot be used")]
    Folder(#[from] StateError),
    /// The client.
    #[error("no client for the image store")]
    Connect(#[from] ConnectError),
    /// The prefix.
    #[error("the image store has no possible prefix")]
    Prefix(#[from] LayoutError),
    /// The store.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The image.
    #[error(transparent)]
    Image(#[from] OpenRemoteError),
    /// The image is not as large as was promised for.
    #[error("image {digest} has {found}, the promise is for {expected}")]
    Size {
        /// Which.
        digest: Digest,
        /// What it has.
        found: Bytes,
        /// What was promised.
        expected: Bytes,
    },
    /// The image takes more than was promised for.
    #[error("image {digest} takes {found}, the promise is of {promised}")]
    Data {
        /// Which.
        digest: Digest,
        /// What is not zeros in it.
        found: Bytes,
        /// What was promised.
        promised: Bytes,
    },
    /// The socket.
    #[error("failed to listen on {}", path.display())]
    Listen {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl ServeStoreError {
    /// The machine-readable reason.
    fn reason(&self) -> Reason {
        match self {
            Self::Folder(_) | Self::Listen { .. } => Reason::PoolAreaFailed,
            Self::Connect(_) | Self::Prefix(_) => Reason::InvalidSpec,
            Self::Open(OpenError::Absent { .. }) => Reason::ImageStoreNotFound,
            Self::Open(OpenError::Store { source, .. }) => store_reason(source),
            Self::Open(_) => Reason::ImageStoreIncompatible,
            Self::Image(error) => open_reason(error),
            Self::Size { .. } | Self::Data { .. } => Reason::VerificationFailed,
        }
    }
}

fn open_reason(error: &OpenRemoteError) -> Reason {
    match error {
        OpenRemoteError::NotFound { .. }
        | OpenRemoteError::Index { .. }
        | OpenRemoteError::WrongIndex { .. }
        | OpenRemoteError::Read(RemoteError::IndexDamaged { .. }) => Reason::IndexDamaged,
        OpenRemoteError::Memory { .. } | OpenRemoteError::Items { .. } => Reason::ImageStoreIncompatible,
        OpenRemoteError::Read(_) => Reason::ObjectStoreUnavailable,
    }
}

/// Serves until `stop`. What goes wrong is left in its folder, too.
pub async fn run(args: &ServeStoreArgs, stop: &CancellationToken) -> Result<(), ServeStoreError> {
    let served = run_in(&args.folder, stop).await;
    if let Err(error) = &served {
        say(&args.folder, StoreStatus::failing(error.reason(), chain(error))).await;
    }
    served
}

async fn run_in(folder: &Path, stop: &CancellationToken) -> Result<(), ServeStoreError> {
    let spec = StoreServerSpec::of(folder)?;
    let sink = Arc::new(TemplateSink::default());
    let opening = open(folder, &spec, Arc::clone(&sink) as Arc<dyn Sink>);
    let opened = stop.run_until_cancelled(opening.boxed()).await;
    let Some(image) = opened.transpose()? else { return Ok(()) };
    let path = NbdServer::socket_in(folder);
    let listen = |source| ServeStoreError::Listen { path: path.clone(), source };
    let listener = socket::listen_alone(&path).map_err(listen)?;
    let limits = Limits { connections: CONNECTIONS, ..Limits::default() };
    tokio::join!(
        serve(listener, image.clone(), limits, Arc::new(Served::default()), stop.clone()).boxed(),
        hydrate(image.clone(), sink, folder.to_owned(), stop.clone()).boxed(),
        stop.run_until_cancelled(tell(folder, &image).boxed()),
    );
    Ok(())
}

/// As large as it should be, or not at all.
async fn open(
    folder: &Path,
    spec: &StoreServerSpec,
    sink: Arc<dyn Sink>,
) -> Result<RemoteImage<S3Store>, ServeStoreError> {
    let (store, layout) =
        (S3Store::connect(spec.access.config()).await?, StoreLayout::new(&spec.access.prefix)?);
    let defaults = RemoteConfig::default();
    let retry = ExponentialBuilder::new().with_max_delay(Duration::from_secs(5)).without_max_times();
    let retry = retry.with_total_delay(Some(defaults.patience));
    let opening = || async {
        let opened = ChunkStore::open(store.clone(), layout.clone()).await.map_err(ServeStoreError::from);
        if let Err(error) = &opened {
            say(folder, StoreStatus::failing(error.reason(), chain(error))).await;
        }
        opened
    };
    let away = |error: &ServeStoreError| matches!(error, ServeStoreError::Open(OpenError::Store { source, .. }) if source.is_transient());
    let chunks = opening.retry(retry).when(away).await?;
    let memory = MEMORY.max(Bytes(chunks.chunk_size().bytes() * 32));
    let image = RemoteImage::open(chunks, spec.digest, RemoteConfig { memory, sink: Some(sink), ..defaults });
    let image = image.await?;
    let (digest, found) = (spec.digest, image.virtual_size());
    if found != spec.size {
        return Err(ServeStoreError::Size { digest, found, expected: spec.size });
    }
    if image.data_size() > spec.data {
        return Err(ServeStoreError::Data { digest, found: image.data_size(), promised: spec.data });
    }
    Ok(image)
}

/// Says how it is, whenever that has changed.
async fn tell(folder: &Path, image: &RemoteImage<S3Store>) {
    let mut last = None;
    loop {
        let ordered = matches!(order_in(folder), Ok(Some(_)));
        let now = status(&image.health(), ordered, image);
        if last.as_ref() != Some(&now) {
            say(folder, now.clone()).await;
            last = Some(now);
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn status(health: &Health, ordered: bool, image: &RemoteImage<S3Store>) -> StoreStatus {
    let counted = image.counted();
    let trouble = trouble(health).map(|(reason, message)| (reason.as_str().to_owned(), message));
    StoreStatus {
        trouble,
        chunks_fetched: counted.chunks_fetched,
        bytes_fetched: counted.bytes_fetched,
        chunks_background: counted.chunks_background,
        ordered,
    }
}

/// What is wrong with an image, if anything is.
fn trouble(health: &Health) -> Option<(Reason, String)> {
    match health {
        Health::Ok => None,
        Health::Stalled { said, .. } => Some((Reason::ObjectStoreUnavailable, said.clone())),
        Health::Missing { chunk } => {
            Some((Reason::ChunkMissing, format!("chunk {chunk} is not in the image store")))
        }
        Health::Damaged { chunk } => Some((Reason::ChunkDamaged, format!("chunk {chunk} is damaged"))),
        Health::IndexDamaged => {
            Some((Reason::IndexDamaged, "a part of the index is gone or damaged".to_owned()))
        }
    }
}

/// That it cannot be said is told, and changes nothing else.
async fn say(folder: &Path, status: StoreStatus) {
    let folder = folder.to_owned();
    let said = tokio::task::spawn_blocking(move || say_status(&folder, &status)).await;
    if let Ok(Err(error)) = said {
        tracing::warn!(error = chain(&error), "how it is cannot be said");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::units::Timestamp;

    #[test]
    fn each_trouble_has_a_reason_of_its_own() {
        let chunk = || "c".to_owned();
        let all = [
            (Health::Ok, None),
            (Health::Stalled { since: Timestamp(0), said: "x".into() }, Some(Reason::ObjectStoreUnavailable)),
            (Health::Missing { chunk: chunk() }, Some(Reason::ChunkMissing)),
            (Health::Damaged { chunk: chunk() }, Some(Reason::ChunkDamaged)),
            (Health::IndexDamaged, Some(Reason::IndexDamaged)),
        ];
        for (health, reason) in all {
            assert_eq!(trouble(&health).map(|(reason, _)| reason), reason, "{health:?}");
        }
    }
}
