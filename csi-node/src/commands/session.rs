//! Who carries out what a command asks for: the agent, if its socket answers; else this process, which opens the node's pools
//! itself under the node's lock, and leaves everything as it is when it ends.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_core::ids::NodeName;
use thiserror::Error;

use super::asking::Carrier;
use crate::agent::asked;
use crate::agent::pools::{PoolError, Pools};
use crate::args::NodeArgs;
use crate::node_lock::{LockError, NodeLock};
use crate::operation::{Answer, Operation, Refusal, carry_out, lines};
use crate::supervisor::DataPlane;
use crate::supervisor::keeper::Watch;
use crate::telemetry::chain;
use crate::values;

/// How long a command waits for another one to end, or for a starting agent to listen.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it looks meanwhile.
const PAUSE: Duration = Duration::from_millis(100);

/// Why nobody carries out what is asked.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The agent's socket is there, and cannot be used.
    #[error("failed to ask the agent at {path}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The agent has ended, or turned this client away.
    #[error(
        "the agent at {path} has ended the conversation; what was asked may have been done, and may be repeated"
    )]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// The agent's answer is none, as from another version.
    #[error("the agent at {path} answers something else")]
    Answer {
        /// The socket.
        path: PathBuf,
        /// Why it cannot be read.
        source: serde_json::Error,
    },
    /// Another process has the pools open.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The pools of this node are not known.
    #[error(transparent)]
    Pools(#[from] PoolError),
    /// The host has no name that a node can have.
    #[error("this host has no name that a node can have (`{found}`): give --node-name")]
    NoName {
        /// What it is called.
        found: String,
    },
}

impl SessionError {
    /// The refusal that it is for the user, if it is one.
    ///
    /// # Errors
    /// Itself, if it is a failure of another kind.
    pub fn refused(self) -> Result<Refusal, Self> {
        match self {
            Self::Lock(error) => Ok(error.into()),
            Self::Pools(error) => Ok(Refusal { reason: error.reason(), message: chain(&error) }),
            other => Err(other),
        }
    }
}

/// An agent that is asked, or the node's own pools.
pub enum Session {
    /// The agent.
    Agent(Conversation),
    /// This process, under the lock.
    Own {
        /// The pools.
        pools: Pools,
        /// Held until the command ends.
        lock: NodeLock,
    },
}

impl Session {
    /// Asks for the agent; without one, opens the pools. `who` is what others are told while the lock is held.
    ///
    /// # Errors
    /// [`SessionError::Lock`] if another process keeps the pools and does not answer.
    pub fn open(node: &NodeArgs, who: &str) -> Result<Self, SessionError> {
        let state_dir = &node.directories.state_dir;
        let until = Instant::now() + PATIENCE;
        let lock = loop {
            if let Some(agent) = Conversation::begin(&asked::socket(state_dir))? {
                return Ok(Self::Agent(agent));
            }
            match NodeLock::take(state_dir, who) {
                Ok(lock) => break lock,
                Err(LockError::Held { .. }) if Instant::now() < until => std::thread::sleep(PAUSE),
                Err(error) => return Err(error.into()),
            }
        };
        let name = node.node_name.clone().map_or_else(host_name, Ok)?;
        let data_plane = DataPlane::choose(node.supervisor_socket.as_deref(), state_dir, Watch::WhenAsked);
        let pools = Pools::new(name, node.directories.mount_root.clone(), state_dir);
        let pools = pools.with_data_plane(data_plane);
        pools.reopen_known()?;
        Ok(Self::Own { pools, lock })
    }
}

impl Carrier for Session {
    fn ask(&mut self, operation: &Operation) -> Result<Answer, SessionError> {
        match self {
            Self::Agent(agent) => agent.ask(operation),
            Self::Own { pools, .. } => Ok(carry_out(pools, operation).into()),
        }
    }
}

/// An open connection to an agent.
pub struct Conversation {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Conversation {
    /// Connects; `None` if no process listens.
    ///
    /// # Errors
    /// [`SessionError::Socket`] if one may listen and cannot be asked.
    pub fn begin(socket: &Path) -> Result<Option<Self>, SessionError> {
        let none = [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused];
        match UnixStream::connect(socket) {
            Ok(stream) => Ok(Some(Self { path: socket.to_owned(), stream: BufReader::new(stream) })),
            Err(error) if none.contains(&error.kind()) => Ok(None),
            Err(source) => Err(SessionError::Socket { path: socket.to_owned(), source }),
        }
    }
}

impl Carrier for Conversation {
    fn ask(&mut self, operation: &Operation) -> Result<Answer, SessionError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                SessionError::Closed { path: self.path.clone() }
            }
            _ => SessionError::Socket { path: self.path.clone(), source },
        };
        let mut line = serde_json::to_vec(operation)
            .map_err(|source| SessionError::Answer { path: self.path.clone(), source })?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(failed)?;
        line.clear();
        (&mut self.stream).take(lines::LONGEST_ANSWER).read_until(b'\n', &mut line).map_err(failed)?;
        if line.last() != Some(&b'\n') {
            return Err(SessionError::Closed { path: self.path.clone() });
        }
        serde_json::from_slice(&line)
            .map_err(|source| SessionError::Answer { path: self.path.clone(), source })
    }
}

/// The host's name in lower case, as kubelet names its node.
fn host_name() -> Result<NodeName, SessionError> {
    let found = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let found = found.trim().to_lowercase();
    values::node_name(&found).map_err(|_| SessionError::NoName { found })
}
