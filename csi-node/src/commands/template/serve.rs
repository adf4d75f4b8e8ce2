//! `berth-node template serve`: an image of an image store as a block device over NBD.

use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable as _};
use berth_core::ids::{Digest, ObjectName};
use berth_core::units::Bytes;
use berth_objectstore::chunks::publish::PublishError;
use berth_objectstore::chunks::remote::{Counted, Health, OpenRemoteError, RemoteConfig, RemoteImage};
use berth_objectstore::chunks::store::{ChunkStore, OpenError};
use berth_objectstore::layout::{LayoutError, StoreLayout};
use berth_objectstore::s3::S3Store;
use clap::Args;
use serde::Serialize;
use thiserror::Error;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::import::object_name;
use crate::args::Output;
use crate::commands::object_store::{StoreArgs, StoreArgsError};
use crate::socket;
use crate::store_server::{Limits, Served, ServedTotals, serve};
use crate::values;

/// How often the state is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Flags of `berth-node template serve`.
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// The image: `sha256:…`, or the template's `NAMESPACE/NAME`.
    #[arg(value_parser = image)]
    pub image: ServedImage,
    /// Where.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Where in the bucket the image store lies.
    #[arg(long, env = "BERTH_STORE_PREFIX", default_value = "")]
    pub prefix: String,
    /// The socket to listen on, for this user and root only. A socket that an earlier process left is replaced.
    #[arg(long, value_parser = values::absolute)]
    pub socket: PathBuf,
    /// What fetched chunks, the index and answers may take: at least 64Mi, and 32 chunks.
    #[arg(long, value_name = "SIZE", value_parser = values::size, default_value = "256Mi")]
    pub memory: Bytes,
    /// How many seconds a read waits for a store that is away, before it fails.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub patience: u64,
    /// How many connections there may be at once.
    #[arg(long, value_name = "COUNT", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub connections: u64,
    /// How many seconds lie between two lines about what was done, if anything was. A change of state is told at once.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub status_interval: u64,
    /// How lines are printed.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// Which image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServedImage {
    /// By its identity.
    Digest(Digest),
    /// By the name that it was published under.
    Name(ObjectName),
}

fn image(text: &str) -> Result<ServedImage, String> {
    if text.starts_with("sha256:") {
        return text
            .parse()
            .map(ServedImage::Digest)
            .map_err(|_| "sha256: and 64 hexadecimal digits".to_owned());
    }
    object_name(text).map(ServedImage::Name)
}

/// Why an image is not served.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The prefix.
    #[error("--prefix")]
    Prefix(#[from] LayoutError),
    /// The client.
    #[error(transparent)]
    Connect(#[from] StoreArgsError),
    /// The store.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The name cannot be looked up.
    #[error("failed to find template {name}")]
    Name {
        /// Which.
        name: ObjectName,
        /// Why.
        source: PublishError,
    },
    /// There is no such name.
    #[error("there is no template {name} in the image store")]
    NoSuchName {
        /// Which.
        name: ObjectName,
    },
    /// The image.
    #[error(transparent)]
    Image(#[from] OpenRemoteError),
    /// The socket.
    #[error("failed to listen on {}", path.display())]
    Listen {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line cannot be printed.
    #[error("failed to print what is served")]
    Print(#[source] io::Error),
}

/// A line of output.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "camelCase", rename_all_fields = "camelCase")]
enum Line<'a> {
    Listening { socket: &'a Path, export: Digest, virtual_size: Bytes, data_size: Bytes, longest_read: Bytes },
    Status(Status),
    Ended(Status),
}

/// What was done, and how the image is.
#[derive(Clone, PartialEq, Eq, Serialize)]
struct Status {
    health: Health,
    #[serde(flatten)]
    image: Counted,
    clients: ServedTotals,
}

/// Serves until `cancel` is cancelled.
pub async fn run(args: &ServeArgs, cancel: &CancellationToken) -> Result<(), ServeError> {
    let image = tokio::select! {
        biased;
        () = cancel.cancelled() => return Ok(()),
        image = open(args) => image?,
    };
    let listen = |source| ServeError::Listen { path: args.socket.clone(), source };
    let listener = socket::listen_alone(&args.socket).map_err(listen)?;
    let ours = identity(&args.socket);
    print(
        args.output,
        &Line::Listening {
            socket: &args.socket,
            export: image.digest(),
            virtual_size: image.virtual_size(),
            data_size: image.data_size(),
            longest_read: image.longest_read(),
        },
    )?;
    let served = Arc::new(Served::default());
    let connections = usize::try_from(args.connections).unwrap_or(usize::MAX);
    let limits = Limits { connections, ..Limits::default() };
    let serving = serve(listener, image.clone(), limits, Arc::clone(&served), cancel.clone());
    let status = || Status { health: image.health(), image: image.counted(), clients: served.totals() };
    let told = tokio::select! {
        () = serving => Ok(()),
        told = tell(args, status) => told,
    };
    // The next server may listen there already.
    if ours.is_some() && identity(&args.socket) == ours {
        std::fs::remove_file(&args.socket).map_err(listen)?;
    }
    told?;
    print(args.output, &Line::Ended(status()))
}

/// Which file lies there, if any does.
fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

async fn open(args: &ServeArgs) -> Result<RemoteImage<S3Store>, ServeError> {
    let (store, layout) = (args.store.connect().await?, StoreLayout::new(&args.prefix)?);
    let patience = Duration::from_secs(args.patience);
    // As reads do: whoever starts again after a failure need not know that the store is away.
    let retry = ExponentialBuilder::new().with_max_delay(Duration::from_secs(5)).without_max_times();
    let retry = retry.with_total_delay(Some(patience));
    let opening = || async { ChunkStore::open(store.clone(), layout.clone()).await };
    let away = |error: &OpenError| matches!(error, OpenError::Store { source, .. } if source.is_transient());
    let chunks = opening.retry(retry).when(away).await?;
    let digest = match &args.image {
        ServedImage::Digest(digest) => *digest,
        ServedImage::Name(name) => {
            let finding = || async { chunks.manifest(name).await };
            let found = finding.retry(retry).when(PublishError::is_transient).await;
            let found = found.map_err(|source| ServeError::Name { name: name.clone(), source })?;
            found.ok_or_else(|| ServeError::NoSuchName { name: name.clone() })?.0.digest
        }
    };
    let defaults = RemoteConfig::default();
    // An answer that stands still leaves time for another attempt.
    let attempt = defaults.attempt.min(patience / 3);
    let config = RemoteConfig { memory: args.memory, patience, attempt, ..defaults };
    Ok(RemoteImage::open(chunks, digest, config).await?)
}

/// Prints a line when the state changes, and now and then when something was done.
async fn tell(args: &ServeArgs, status: impl Fn() -> Status) -> Result<(), ServeError> {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut last, mut since) = (status(), 0);
    loop {
        ticks.tick().await;
        since += LOOK.as_secs();
        let now = status();
        let due = now != last && since >= args.status_interval;
        if due || std::mem::discriminant(&now.health) != std::mem::discriminant(&last.health) {
            print(args.output, &Line::Status(now.clone()))?;
            (last, since) = (now, 0);
        }
    }
}

fn print(output: Output, line: &Line<'_>) -> Result<(), ServeError> {
    let mut out = io::stdout().lock();
    let printed = match output {
        Output::Json => {
            serde_json::to_string(line).map_err(io::Error::from).and_then(|text| writeln!(out, "{text}"))
        }
        Output::Text => writeln!(out, "{}", text(line)),
    };
    printed.and_then(|()| out.flush()).map_err(ServeError::Print)
}

fn text(line: &Line<'_>) -> String {
    match line {
        Line::Listening { socket, export, virtual_size, data_size, .. } => {
            format!("{export}, {virtual_size} with {data_size} of data, is served at {}", socket.display())
        }
        Line::Status(status) => said(status),
        Line::Ended(status) => format!("ended; {}", said(status)),
    }
}

fn said(status: &Status) -> String {
    let state = match &status.health {
        Health::Ok => "all is well".to_owned(),
        Health::Stalled { said, .. } => format!("the store is away: {said}"),
        Health::Damaged { chunk } => format!("chunk {chunk} is damaged"),
        Health::Missing { chunk } => format!("chunk {chunk} is missing"),
        Health::IndexDamaged => "the index is damaged".to_owned(),
    };
    let (image, clients) = (&status.image, &status.clients);
    format!(
        "{state}; {} connections, {} requests, {} of them failed; {} read, {} in {} chunks fetched",
        clients.open,
        clients.requests,
        clients.failed,
        Bytes(image.bytes_read),
        Bytes(image.bytes_fetched),
        image.chunks_fetched
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_named_by_digest_or_by_name() {
        let digest = format!("sha256:{}", "0".repeat(64));
        assert_eq!(image(&digest), Ok(ServedImage::Digest(digest.parse().unwrap())));
        assert_eq!(image("a/b"), Ok(ServedImage::Name(ObjectName::new("a", "b"))));
        for wrong in ["sha256:0", "a", "", "a/b/c"] {
            assert!(image(wrong).is_err(), "{wrong}");
        }
    }
}
