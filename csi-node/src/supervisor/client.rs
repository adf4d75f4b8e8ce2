//! Asks the supervisor.
//!
//! A connection for each request: they are rare, and whether the supervisor is still the same is never asked. An answer
//! that does not come leaves open whether the request was carried out; each may be repeated.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_core::ids::Uid;
use berth_device::thin::{DeviceName, PoolMessage, SuspendError, Suspender};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::protocol::{
    Answer, Failure, FailureKind, Hello, MOST_LINE, OURS, Request, WITH_STORES, negotiate,
};
use super::servers::{ServeError, ServerLine, ServerSpec, Servers};
use super::stores::{HydrationOrder, StoreServerSpec};

/// How long it may take to say who it is.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take for anything: a wait for another suspension, one that is given up, and many attempts to resume.
const LIMIT: Duration = Duration::from_secs(400);

/// The supervisor at a socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// Nothing is asked yet.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The version that is spoken with it; an error if it does not answer.
    pub fn hello(&self) -> Result<u32, String> {
        Connection::open(&self.socket).map(|connection| connection.version)
    }

    fn ask(&self, request: &Request) -> Result<Answer, String> {
        let mut connection = Connection::open(&self.socket)?;
        connection.say(request)?;
        connection.hear(Instant::now() + LIMIT)
    }

    fn suspend(&self, request: &Request, device: &DeviceName) -> Result<(), SuspendError> {
        let unavailable = |why| SuspendError::Unavailable { socket: self.socket.clone(), why };
        match self.ask(request).map_err(unavailable)? {
            Answer::Done => Ok(()),
            Answer::Failed(failure) => Err(suspend_error(failure, device)),
            other => Err(unavailable(format!("it answers {other:?}"))),
        }
    }

    fn serve_answer(&self, request: &Request, id: &Uid, image: &Path) -> Result<Answer, ServeError> {
        match self.ask(request).map_err(|why| self.silent(why))? {
            Answer::Failed(failure) => Err(serve_error(failure, id, image)),
            answer => Ok(answer),
        }
    }

    /// Asks for what only a newer supervisor knows of.
    fn store_answer(&self, request: &Request, id: &Uid, image: &Path) -> Result<Answer, ServeError> {
        self.serves_stores()?;
        self.serve_answer(request, id, image)
    }

    fn silent(&self, why: String) -> ServeError {
        ServeError::Unavailable { socket: self.socket.clone(), why }
    }

    fn unexpected(&self, answer: &Answer) -> ServeError {
        self.silent(format!("it answers {answer:?}"))
    }
}

impl Suspender for Client {
    fn replace_table(&self, device: &DeviceName, table: &str) -> Result<(), SuspendError> {
        let request = Request::ReplaceTable { device: device.uuid(), table: table.to_owned() };
        self.suspend(&request, device)
    }

    fn message_while_frozen(&self, frozen: &DeviceName, message: PoolMessage) -> Result<(), SuspendError> {
        self.suspend(&Request::MessageWhileFrozen { frozen: frozen.uuid(), message }, frozen)
    }
}

impl Servers for Client {
    fn serve(&self, server: &ServerSpec) -> Result<PathBuf, ServeError> {
        let request = Request::Serve { server: server.clone() };
        match self.serve_answer(&request, &server.id, &server.image)? {
            Answer::Serving { socket } => Ok(socket),
            other => Err(self.unexpected(&other)),
        }
    }

    fn serve_store(&self, server: &StoreServerSpec) -> Result<PathBuf, ServeError> {
        let request = Request::ServeStore { server: server.clone() };
        match self.store_answer(&request, &server.id, Path::new(&server.digest.to_string()))? {
            Answer::Serving { socket } => Ok(socket),
            other => Err(self.unexpected(&other)),
        }
    }

    fn order(&self, id: &Uid, order: Option<&HydrationOrder>) -> Result<(), ServeError> {
        let request = Request::Order { id: id.clone(), order: order.cloned() };
        match self.store_answer(&request, id, Path::new(""))? {
            Answer::Done => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    fn serves_stores(&self) -> Result<(), ServeError> {
        match self.hello().map_err(|why| self.silent(why))? {
            WITH_STORES.. => Ok(()),
            _ => Err(ServeError::TooOld { socket: self.socket.clone() }),
        }
    }

    fn stop(&self, id: &Uid) -> Result<(), ServeError> {
        match self.serve_answer(&Request::Stop { id: id.clone() }, id, Path::new(""))? {
            Answer::Done => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    fn list(&self) -> Result<Vec<ServerLine>, ServeError> {
        match self.serve_answer(&Request::List {}, &Uid::from("of all"), Path::new(""))? {
            Answer::Servers(lines) => Ok(lines),
            other => Err(self.unexpected(&other)),
        }
    }
}

fn suspend_error(Failure { kind, message }: Failure, device: &DeviceName) -> SuspendError {
    match kind {
        FailureKind::IdTaken => SuspendError::IdTaken,
        FailureKind::NoSuchId => SuspendError::NoSuchId,
        FailureKind::OriginSilent(origin) => SuspendError::OriginSilent { origin, why: message },
        FailureKind::Refused => SuspendError::Refused { device: device.to_string(), why: message },
        FailureKind::Busy => SuspendError::Busy { device: device.to_string() },
        FailureKind::StillSuspended => SuspendError::StillSuspended(message),
        FailureKind::CannotServe | FailureKind::InUse | FailureKind::Failed => {
            SuspendError::Elsewhere(message)
        }
    }
}

fn serve_error(Failure { kind, message: why }: Failure, id: &Uid, image: &Path) -> ServeError {
    let id = id.clone();
    match kind {
        FailureKind::Refused => ServeError::Refused { id, why },
        FailureKind::CannotServe => ServeError::Cannot { id, image: image.to_owned(), why },
        FailureKind::InUse => ServeError::InUse { id, users: why },
        FailureKind::IdTaken
        | FailureKind::NoSuchId
        | FailureKind::OriginSilent(_)
        | FailureKind::Busy
        | FailureKind::StillSuspended
        | FailureKind::Failed => ServeError::Elsewhere { id, why },
    }
}

/// A connection on which both have said who they are.
struct Connection {
    stream: BufReader<UnixStream>,
    version: u32,
}

impl Connection {
    fn open(socket: &Path) -> Result<Self, String> {
        let stream = UnixStream::connect(socket).map_err(|error| error.to_string())?;
        stream.set_write_timeout(Some(HELLO_LIMIT)).map_err(|error| error.to_string())?;
        let mut connection = Self { stream: BufReader::new(stream), version: 0 };
        connection.say(&OURS)?;
        let theirs: Hello = connection.hear(Instant::now() + HELLO_LIMIT)?;
        connection.version = negotiate(OURS, theirs).map_err(|error| error.to_string())?;
        Ok(connection)
    }

    fn say(&mut self, what: &impl Serialize) -> Result<(), String> {
        let mut line = serde_json::to_vec(what).map_err(|error| error.to_string())?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(|error| format!("failed to write: {error}"))
    }

    fn hear<T: DeserializeOwned>(&mut self, deadline: Instant) -> Result<T, String> {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.get_ref().set_read_timeout(Some(left)).map_err(|error| error.to_string())?;
        let mut line = Vec::new();
        let most = u64::try_from(MOST_LINE).unwrap_or(u64::MAX);
        match (&mut self.stream).take(most).read_until(b'\n', &mut line) {
            Ok(_) if line.ends_with(b"\n") => {}
            Ok(_) => return Err("it ended the connection without an answer".to_owned()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(format!("no answer for {} s", left.as_secs()));
            }
            Err(error) => return Err(format!("failed to read: {error}")),
        }
        serde_json::from_slice(&line).map_err(|error| format!("its answer is not understood: {error}"))
    }
}
