//! The supervisor's process: first it resumes what was left suspended, then it takes over servers, then it answers.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_device::files::open_private;
use berth_device::thin::{DeviceName, InProcess, SuspendError, Suspender};
use serde::Serialize;
use thiserror::Error;
use tokio::io::{AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::keeper::{Keeper, Watch};
use super::protocol::{Answer, Failure, FailureKind, Hello, MOST_LINE, OURS, Request, negotiate};
use super::servers::{Servers, StateError};
use crate::area;
use crate::socket::{is_trusted, listen_alone, read_line};

/// How many connections are served at once; more wait.
const MOST_CONNECTIONS: usize = 64;
/// How long a peer may take to say who it is, and to read an answer.
const PEER_LIMIT: Duration = Duration::from_secs(10);
/// How long a connection may be idle between two requests.
const IDLE_LIMIT: Duration = Duration::from_secs(600);
/// How often something that takes long is told.
const STILL: Duration = Duration::from_secs(5);
/// How long requests that are under way may take to end when the process is told to.
const DRAIN: Duration = Duration::from_secs(60);
/// How often is looked for devices that are left suspended: a suspension may take effect after the end of the process that
/// asked for it.
const LOOK: Duration = Duration::from_secs(2);

/// Why there is no supervisor.
#[derive(Debug, Error)]
pub enum SuperviseError {
    /// Another one runs.
    #[error("another supervisor runs with {}", path.display())]
    Locked {
        /// What it has locked.
        path: PathBuf,
    },
    /// Its folder or its socket cannot be made.
    #[error("failed to make {}", path.display())]
    Make {
        /// The folder, file or socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What is to be served is not known.
    #[error("failed to take over the servers")]
    Servers(#[from] StateError),
}

/// Runs until `stop`. Servers outlive it, and devices are left as they are, none suspended.
pub async fn serve(socket: &Path, folder: &Path, stop: CancellationToken) -> Result<(), SuperviseError> {
    // Before the first look: what a living one has suspended this moment is not to be resumed.
    let _alone = lock(folder)?;
    blocking(area::resume_suspended).await;
    let keeper = Keeper::new(&folder.join("servers"), Watch::Always);
    let started = keeper.clone();
    blocking(move || started.start()).await.unwrap_or(Ok(()))?;
    let made = |source| SuperviseError::Make { path: socket.to_owned(), source };
    let listener = listen_alone(socket).map_err(made)?;
    tracing::info!(socket = %socket.display(), "supervisor listening");
    let desk = Desk { keeper, work: TaskTracker::new(), stop: stop.clone() };
    tokio::select! {
        () = accept(listener, desk.clone()) => {}
        () = look_for_suspended() => {}
        () = stop.cancelled() => {}
    }
    // A suspension that is under way is not cut off.
    desk.work.close();
    if tokio::time::timeout(DRAIN, desk.work.wait()).await.is_err() {
        tracing::error!("a request is cut off; the next start resumes what it may leave suspended");
    }
    Ok(())
}

/// What every connection has.
#[derive(Clone)]
struct Desk {
    keeper: Keeper,
    /// Requests that are carried out at this moment.
    work: TaskTracker,
    stop: CancellationToken,
}

fn lock(folder: &Path) -> Result<File, SuperviseError> {
    let path = folder.join("lock");
    let made = |source| SuperviseError::Make { path: path.clone(), source };
    fs::create_dir_all(folder).map_err(made)?;
    let file = open_private(&path).map_err(made)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(SuperviseError::Locked { path }),
        Err(fs::TryLockError::Error(error)) => Err(made(error)),
    }
}

async fn look_for_suspended() {
    loop {
        tokio::time::sleep(LOOK).await;
        blocking(area::resume_suspended).await;
    }
}

async fn accept(listener: UnixListener, desk: Desk) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) if is_trusted(&stream) => {
                let desk = desk.clone();
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, &desk).await {
                        tracing::warn!(%error, "a connection ends");
                    }
                    drop(place);
                });
            }
            Ok(_) => tracing::warn!("refused a connection of another user"),
            Err(error) => {
                tracing::warn!(%error, "failed to accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Hello, then requests in turn, until the peer goes or says what nobody understands the end of.
async fn converse(stream: UnixStream, desk: &Desk) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    let Some(line) = within(PEER_LIMIT, read_line(&mut read, MOST_LINE)).await? else { return Ok(()) };
    let theirs: Hello = serde_json::from_str(&line)?;
    say(&mut write, &OURS).await?;
    if let Err(error) = negotiate(OURS, theirs) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, error));
    }
    while let Some(line) = within(IDLE_LIMIT, read_line(&mut read, MOST_LINE)).await? {
        let answer = match serde_json::from_str::<Request>(&line) {
            Ok(_) if desk.stop.is_cancelled() => return Ok(()),
            Ok(request) => carry_out_slowly(request, desk).await,
            Err(error) => refused(format!("the request is not understood: {error}")),
        };
        say(&mut write, &answer).await?;
    }
    Ok(())
}

/// Carries it out to its end, also when the peer goes meanwhile, and tells every few seconds that it is still at it.
async fn carry_out_slowly(request: Request, desk: &Desk) -> Answer {
    let started = Instant::now();
    let (keeper, asked) = (desk.keeper.clone(), format!("{request:?}"));
    let mut work = desk.work.spawn_blocking(move || carry_out(request, &keeper));
    loop {
        match tokio::time::timeout(STILL, &mut work).await {
            Ok(Ok(answer)) => {
                let millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
                if let Answer::Failed(failure) = &answer {
                    tracing::warn!(asked, ?failure, millis, "failed");
                } else {
                    tracing::debug!(asked, millis, "done");
                }
                return answer;
            }
            Ok(Err(error)) => {
                tracing::error!(asked, %error, "a request ended in a defect");
                return Answer::Failed(Failure { kind: FailureKind::Failed, message: error.to_string() });
            }
            Err(_) => tracing::warn!(asked, seconds = started.elapsed().as_secs(), "still at it"),
        }
    }
}

/// Blocks, for a few minutes at most.
fn carry_out(request: Request, keeper: &Keeper) -> Answer {
    match request {
        Request::ReplaceTable { device, table } => {
            suspend(&device, |device| InProcess.replace_table(device, &table))
        }
        Request::MessageWhileFrozen { frozen, message } => {
            suspend(&frozen, |frozen| InProcess.message_while_frozen(frozen, message))
        }
        Request::Serve { server } => match keeper.serve(&server) {
            Ok(socket) => Answer::Serving { socket },
            Err(error) => Answer::Failed(error.into()),
        },
        Request::ServeStore { server } => match keeper.serve_store(&server) {
            Ok(socket) => Answer::Serving { socket },
            Err(error) => Answer::Failed(error.into()),
        },
        Request::Order { id, order } => match keeper.order(&id, order.as_ref()) {
            Ok(()) => Answer::Done,
            Err(error) => Answer::Failed(error.into()),
        },
        Request::Stop { id } => match keeper.stop(&id) {
            Ok(()) => Answer::Done,
            Err(error) => Answer::Failed(error.into()),
        },
        Request::List {} => match keeper.list() {
            Ok(lines) => Answer::Servers(lines),
            Err(error) => Answer::Failed(error.into()),
        },
    }
}

fn suspend(uuid: &str, work: impl FnOnce(&DeviceName) -> Result<(), SuspendError>) -> Answer {
    let Some(device) = DeviceName::from_uuid(uuid) else {
        return refused(format!("`{uuid}` is not the dm UUID of a device of Berth that is known here"));
    };
    match work(&device) {
        Ok(()) => Answer::Done,
        Err(error) => Answer::Failed(error.into()),
    }
}

fn refused(message: String) -> Answer {
    Answer::Failed(Failure { kind: FailureKind::Refused, message })
}

async fn say(stream: &mut (impl AsyncWrite + Unpin), what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    within(PEER_LIMIT, stream.write_all(&line)).await
}

async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(limit, work).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// `None` if it ended in a defect, which is told.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.inspect_err(|error| tracing::error!(%error, "ended in a defect")).ok()
}
