//! What a call may fail with, and the only mapping to gRPC codes. Each code is chosen by what the caller does with it:
//!
//! | code | external-provisioner | kubelet |
//! |---|---|---|
//! | `ABORTED` | not final: calls again with the same arguments, keeps the node | calls again |
//! | `RESOURCE_EXHAUSTED` | final: gives the claim back to the scheduler, which may choose another node | calls again |
//! | `OUT_OF_RANGE`, `INVALID_ARGUMENT`, `NOT_FOUND`, `PERMISSION_DENIED`, `ALREADY_EXISTS` | final: an event on the claim, calls again later | an event on the pod, calls again later |
//! | `FAILED_PRECONDITION` | deleting: calls again later | calls again later |
//! | `UNAVAILABLE`, `INTERNAL` | not final: calls again, keeps the node | calls again |

use std::time::Duration;

use berth_core::ids::{ObjectName, PoolName};
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_device::filesystem::{FilesystemError, Signature};
use berth_device::mounts::MountError;
use berth_device::partition::PartitionError;
use berth_record::{ChangeError, ReadError};
use thiserror::Error;
use tonic::{Code, Status};

use crate::agent::observe::ObserveError;
use crate::agent::pools::PoolError;
use crate::agent::volumes::VolumeError;
use crate::area::AreaError;
use crate::telemetry::chain;

/// Why a call did not do what it was asked.
#[derive(Debug, Error)]
pub enum RpcError {
    /// A field is missing or has a value that cannot be used.
    #[error("{field}: {problem}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// No such volume here.
    #[error("there is no volume {0} on this node")]
    NoVolume(String),
    /// No such reservation in the pod's namespace.
    #[error("there is no StagingReservation {0}; a pod sees those of its own namespace only")]
    NoReservation(ObjectName),
    /// A pod cannot see the file of this reservation here, or not so.
    #[error("StagingReservation {reservation} cannot be used by this pod: {why}")]
    NotForPod {
        /// The reservation.
        reservation: ObjectName,
        /// Why, and what to do.
        why: String,
    },
    /// It was here, and what it held is gone.
    #[error("VolumeLost: the file of volume {volume} is gone from pool {pool}")]
    Lost {
        /// The volume.
        volume: String,
        /// Where it lay.
        pool: PoolName,
    },
    /// It may lie in a pool that is not open, so nothing is known of it.
    #[error("pool {pool}, which may hold volume {volume}, is not open on this node: {why}")]
    NotOpen {
        /// The volume.
        volume: String,
        /// The pool.
        pool: PoolName,
        /// Why not.
        why: String,
    },
    /// The list of pools.
    #[error("the pools of this node are not known")]
    Pools(#[from] PoolError),
    /// Nothing is there.
    #[error("nothing of volume {volume} is at {path}")]
    NoPath {
        /// The volume.
        volume: String,
        /// The path.
        path: String,
    },
    /// The same name was asked for with other arguments.
    #[error("{volume} exists with another {what}")]
    Different {
        /// What was asked for.
        volume: String,
        /// In what it differs.
        what: &'static str,
    },
    /// Another call for the same volume runs.
    #[error("{method} for {key} has been running for {age:?}")]
    Busy {
        /// The volume.
        key: String,
        /// What runs.
        method: &'static str,
        /// For how long.
        age: Duration,
    },
    /// It is under way.
    #[error("{what} waits: {why}")]
    Waiting {
        /// What.
        what: String,
        /// For what.
        why: String,
    },
    /// No size meets both bounds.
    #[error("{needed} are needed, more than the limit of {limit}")]
    Size {
        /// What is needed.
        needed: Bytes,
        /// What is allowed.
        limit: Bytes,
    },
    /// The claim is to be placed elsewhere.
    #[error("this node is not among those asked for")]
    OtherNode,
    /// The operator has refused.
    #[error("{reason}: {message}")]
    Refused {
        /// Why.
        reason: Reason,
        /// For people.
        message: String,
    },
    /// It is in use.
    #[error("volume {0} is in use")]
    InUse(String),
    /// It is for one workload only, and published for one.
    #[error("volume {volume} is for one workload at a time, and is published at {path}")]
    Elsewhere {
        /// The volume.
        volume: String,
        /// Where.
        path: String,
    },
    /// It has not been staged, or what was staged is gone.
    #[error("volume {volume} is not staged at {path}")]
    NotStaged {
        /// The volume.
        volume: String,
        /// Where.
        path: String,
    },
    /// The file system of an imported image is not to be mounted on the host.
    #[error(
        "HostMountNotAllowed: volume {0} starts from a template; its StorageClass lacks `hostMount: \"true\"`"
    )]
    HostMount(String),
    /// What the volume holds cannot be mounted.
    #[error("volume {volume} holds {found:?}, which is not mounted: {advice}")]
    NotMountable {
        /// The volume.
        volume: String,
        /// What it holds.
        found: Option<Signature>,
        /// What to do.
        advice: &'static str,
    },
    /// The API server.
    #[error("failed to {action} reservation {name}")]
    Api {
        /// What was tried.
        action: &'static str,
        /// On what.
        name: ObjectName,
        /// Its answer.
        source: Box<kube::Error>,
    },
    /// The API has not been seen yet.
    #[error("this node has not seen the API server since it started")]
    NotSynced,
    /// A record.
    #[error("the record of pool {pool} cannot be read")]
    Record {
        /// The pool.
        pool: PoolName,
        /// Why.
        source: ReadError,
    },
    /// A record.
    #[error("the record refuses")]
    Change(#[from] ChangeError),
    /// The node's state.
    #[error("this node's state cannot be read")]
    Observe(#[from] ObserveError),
    /// A mount.
    #[error("a mount failed")]
    Mount(#[from] MountError),
    /// A volume or its record.
    #[error("failed to make a volume larger")]
    Volume(#[from] VolumeError),
    /// The area that holds the volume.
    #[error("the pool's area fails")]
    Area(#[from] AreaError),
    /// A partition.
    #[error("the partition cannot be used")]
    Partition(#[from] PartitionError),
    /// A file system.
    #[error("a file system failed")]
    Filesystem(#[from] FilesystemError),
    /// A path.
    #[error("failed to {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file operation of the pool.
    #[error("a file operation failed")]
    File(#[from] berth_device::files::FileError),
    /// The worker is gone.
    #[error("the worker of the call is gone")]
    Worker(#[from] tokio::task::JoinError),
}

impl RpcError {
    /// A field with a value that cannot be used.
    pub fn invalid(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid { field, problem: problem.into() }
    }

    /// True if nothing is wrong: the answer is only not there yet.
    pub fn is_wait(&self) -> bool {
        matches!(self, Self::Waiting { .. } | Self::Busy { .. } | Self::NotSynced)
    }

    fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } | Self::HostMount(_) => Code::InvalidArgument,
            Self::NoVolume(_) | Self::NoReservation(_) | Self::NoPath { .. } | Self::Lost { .. } => {
                Code::NotFound
            }
            Self::Different { .. } | Self::Mount(MountError::Occupied { .. }) => Code::AlreadyExists,
            Self::Busy { .. } | Self::Waiting { .. } => Code::Aborted,
            Self::Size { .. } => Code::OutOfRange,
            Self::OtherNode => Code::ResourceExhausted,
            Self::Refused { reason, .. } => refused(*reason),
            Self::InUse(_)
            | Self::Elsewhere { .. }
            | Self::NotStaged { .. }
            | Self::NotForPod { .. }
            | Self::NotMountable { .. }
            | Self::Partition(_)
            | Self::Filesystem(FilesystemError::NotBlank { .. })
            | Self::Change(ChangeError::State { .. }) => Code::FailedPrecondition,
            Self::Api { .. } | Self::NotSynced | Self::NotOpen { .. } => Code::Unavailable,
            Self::Record { .. }
            | Self::Pools(_)
            | Self::Change(_)
            | Self::Observe(_)
            | Self::Mount(_)
            | Self::Area(_)
            | Self::Volume(_)
            | Self::Filesystem(_)
            | Self::Io { .. }
            | Self::File(_)
            | Self::Worker(_) => Code::Internal,
        }
    }
}

/// Space is a matter of this node, so the scheduler is asked again; anything else would be refused everywhere.
fn refused(reason: Reason) -> Code {
    match reason {
        Reason::TemplateNotFound => Code::NotFound,
        Reason::NamespaceNotAllowed => Code::PermissionDenied,
        Reason::InvalidSpec => Code::InvalidArgument,
        _ => Code::ResourceExhausted,
    }
}

impl From<&RpcError> for Status {
    fn from(error: &RpcError) -> Self {
        Self::new(error.code(), chain(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_what_the_sidecars_act_on() {
        let refused = |reason| RpcError::Refused { reason, message: "m".to_owned() };
        let busy = RpcError::Busy { key: "v".into(), method: "NodeStageVolume", age: Duration::from_secs(3) };
        for (error, code) in [
            (refused(Reason::CapacityRefused), Code::ResourceExhausted),
            (refused(Reason::LargerThanPool), Code::ResourceExhausted),
            (refused(Reason::TemplateNotFound), Code::NotFound),
            (refused(Reason::NamespaceNotAllowed), Code::PermissionDenied),
            (busy, Code::Aborted),
            (RpcError::InUse("v".into()), Code::FailedPrecondition),
            (RpcError::Elsewhere { volume: "v".into(), path: "/p".into() }, Code::FailedPrecondition),
            (RpcError::OtherNode, Code::ResourceExhausted),
            (RpcError::Size { needed: Bytes(2), limit: Bytes(1) }, Code::OutOfRange),
        ] {
            assert_eq!(Status::from(&error).code(), code, "{error}");
        }
        let status =
            Status::from(&RpcError::Busy { key: "v".into(), method: "X", age: Duration::from_secs(3) });
        assert!(
            status.message().contains('X') && status.message().contains("3s") && status.details().is_empty()
        );
    }
}
