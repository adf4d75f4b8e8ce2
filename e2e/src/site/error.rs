//! Why a site does not work.

use std::io;
use std::path::PathBuf;

use super::programs::ProgramsError;
use super::servers::ServerError;
use crate::cluster::{ApplyError, ClusterError, IdentityError};
use crate::kernel::{BootError, CommandError, NetworkError};
use crate::process::{ReadyError, SpawnError};
use crate::wait::WaitError;

/// Why a site, or a part of it, does not work.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// A folder could not be made.
    #[error("failed to make folder {path}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// One of our programs was not built.
    #[error(transparent)]
    Programs(#[from] ProgramsError),
    /// The control plane.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The object store or the file server.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// A kubeconfig.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A manifest was refused.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// A namespace did not come about.
    #[error(transparent)]
    Namespace(#[from] WaitError<kube::Error>),
    /// A Node object could not be labelled.
    #[error("failed to label node {node}")]
    Node {
        /// The node.
        node: String,
        /// What the API server said.
        source: kube::Error,
    },
    /// The machine has no free port.
    #[error("failed to find a free port")]
    Port(#[source] io::Error),
    /// A process could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// A process did not get ready; the message holds the end of its log.
    #[error(transparent)]
    Ready(#[from] ReadyError),
    /// A network for nodes with kernels of their own could not be made.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A node with a kernel of its own did not boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A command on a node with a kernel of its own.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A command on a node.
    #[error("`{command}` on node {node} failed: {said}")]
    Run {
        /// The node.
        node: String,
        /// The command.
        command: String,
        /// What was said.
        said: String,
    },
    /// A node that is a part of this machine has no power of its own that could be cut.
    #[error("node {node} has no power of its own")]
    NoPower {
        /// The node.
        node: String,
    },
    /// An address of this site's servers is none that it could have.
    #[error("no port in the address {address}")]
    Address {
        /// The address.
        address: String,
    },
}
