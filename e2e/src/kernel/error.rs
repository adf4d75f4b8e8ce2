//! Why a guest or its network does not work.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::process::SpawnError;

/// Why a host did not start.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Something of this machine is missing, as [`super::KernelHost::obstacle`] says.
    #[error("no user-mode Linux on this machine: {0}")]
    Obstacle(String),
    /// A path that cannot be given to the guest's kernel: it is relative, or has a space or a comma.
    #[error("{path} cannot be used by a guest: it must be absolute, without spaces and commas")]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// More disks than the kernel takes.
    #[error("host {host} has {count} disks, more than 8")]
    Disks {
        /// The host.
        host: String,
        /// How many it was given.
        count: usize,
    },
    /// A file or folder of the host could not be read or written.
    #[error("failed to prepare {path} of host {host}")]
    Prepare {
        /// The host.
        host: String,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A disk belongs to a host that runs.
    #[error("disk {path} of host {host} is in use by another one")]
    DiskInUse {
        /// The host.
        host: String,
        /// The disk's file.
        path: PathBuf,
    },
    /// The host runs already.
    #[error("host {host} runs already")]
    Running {
        /// The host.
        host: String,
    },
    /// Its process could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// Its link to the network could not be made.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// It ended before it was ready.
    #[error("host {host} ended before it was ready; end of its console:\n{console}")]
    Ended {
        /// The host.
        host: String,
        /// The end of its console.
        console: String,
    },
    /// It was not ready in time.
    #[error("host {host} was not ready within {limit:?}; end of its console:\n{console}")]
    TimedOut {
        /// The host.
        host: String,
        /// How long it was waited for.
        limit: Duration,
        /// The end of its console.
        console: String,
    },
}

/// Why the network of guests does not work.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No network namespace: not root, or a kernel without them.
    #[error("failed to make a network namespace")]
    Namespace(#[source] io::Error),
    /// The namespace could not be entered.
    #[error("failed to enter the network namespace")]
    Enter(#[source] io::Error),
    /// `ip` (iproute2) could not be run.
    #[error("failed to run ip {arguments}")]
    Run {
        /// What it was asked.
        arguments: String,
        /// What the system said.
        source: io::Error,
    },
    /// `ip` refused.
    #[error("ip {arguments}: {message}")]
    Refused {
        /// What it was asked.
        arguments: String,
        /// What it said.
        message: String,
    },
    /// All addresses are given away.
    #[error("no address is left in the network")]
    Full,
    /// Nothing could listen for connections to be passed on.
    #[error("failed to listen on {address}")]
    Listen {
        /// Where.
        address: String,
        /// What the system said.
        source: io::Error,
    },
}
