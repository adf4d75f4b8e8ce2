//! What is said on the supervisor's socket: lines of JSON. First each side's [`Hello`], the client's before the
//! supervisor's, then one [`Answer`] for each [`Request`], in turn.
//!
//! The two are upgraded at different times, the supervisor rarely: it understands the version before its own too.

use std::path::PathBuf;

use berth_core::ids::Uid;
use berth_device::thin::{DmError, PoolMessage, SuspendError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::servers::{ServeError, ServerLine, ServerSpec};
use super::stores::{HydrationOrder, StoreServerSpec};
use crate::telemetry::chain;

/// What this program speaks. 2: servers of image stores.
pub const OURS: Hello = Hello { protocol: 2, oldest: 1 };
/// The first version in which there are servers of image stores.
pub const WITH_STORES: u32 = 2;
/// The longest line. The list of servers is the longest answer: 300 bytes for each of a few hundred at most.
pub const MOST_LINE: usize = 256 << 10;

/// Which versions one side speaks. What else a newer one may say in it is passed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The newest.
    pub protocol: u32,
    /// The oldest; all between are spoken too.
    pub oldest: u32,
}

/// Two programs that have no version in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "versions {} to {} of the protocol are spoken here, {} to {} there: upgrade the older of the two",
    ours.oldest, ours.protocol, theirs.oldest, theirs.protocol
)]
pub struct Incompatible {
    /// What we speak.
    pub ours: Hello,
    /// What the other speaks.
    pub theirs: Hello,
}

/// The newest version that both speak: the same on both sides.
pub fn negotiate(ours: Hello, theirs: Hello) -> Result<u32, Incompatible> {
    let newest = ours.protocol.min(theirs.protocol);
    let oldest = ours.oldest.max(theirs.oldest);
    if newest < oldest { Err(Incompatible { ours, theirs }) } else { Ok(newest) }
}

/// What the supervisor is asked for. Each may be repeated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Request {
    /// Replace the table of a device of ours.
    ReplaceTable {
        /// Its dm UUID.
        device: String,
        /// The new table.
        table: String,
    },
    /// Send a message to a kernel pool of ours while a thin device of it is frozen.
    MessageWhileFrozen {
        /// The dm UUID of the thin device, which names its kernel pool too.
        frozen: String,
        /// The message.
        message: PoolMessage,
    },
    /// Serve an image from now on, until told to stop.
    Serve {
        /// What.
        server: ServerSpec,
    },
    /// Serve an image of an image store from now on, until told to stop. Since version 2.
    ServeStore {
        /// What.
        server: StoreServerSpec,
    },
    /// Have a server of an image store make a template local, or leave that. Since version 2.
    Order {
        /// Whose server it is.
        id: Uid,
        /// What it is to do.
        order: Option<HydrationOrder>,
    },
    /// Serve it no longer.
    Stop {
        /// Whose server it is.
        id: Uid,
    },
    /// What is served.
    List {},
}

/// What comes of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    /// It is done.
    Done,
    /// A server that answers.
    Serving {
        /// Where.
        socket: PathBuf,
    },
    /// What is served.
    Servers(Vec<ServerLine>),
    /// It is not done.
    Failed(Failure),
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// What a program makes of it.
    pub kind: FailureKind,
    /// For people.
    pub message: String,
}

/// Kinds of failures. What a newer supervisor may add is [`FailureKind::Failed`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FailureKind {
    /// There is a thin device of that number already.
    IdTaken,
    /// There is no thin device of that number.
    NoSuchId,
    /// An external origin does not answer.
    OriginSilent(PathBuf),
    /// It is nothing that is done: a foreign device, an unknown request, a table or message that is not one of ours.
    Refused,
    /// Something else takes too long.
    Busy,
    /// A device is left suspended.
    StillSuspended,
    /// The image cannot be served.
    CannotServe,
    /// A device still reads from the server.
    InUse,
    /// It was tried and failed.
    #[serde(other)]
    Failed,
}

impl From<SuspendError> for Failure {
    fn from(error: SuspendError) -> Self {
        let kind = match &error {
            SuspendError::IdTaken => FailureKind::IdTaken,
            SuspendError::NoSuchId => FailureKind::NoSuchId,
            SuspendError::OriginSilent { origin, .. } => FailureKind::OriginSilent(origin.clone()),
            SuspendError::Refused { .. } => FailureKind::Refused,
            SuspendError::Busy { .. } => FailureKind::Busy,
            SuspendError::StillSuspended(_) | SuspendError::Dm(DmError::StillSuspended { .. }) => {
                FailureKind::StillSuspended
            }
            SuspendError::Dm(_) | SuspendError::Unavailable { .. } | SuspendError::Elsewhere(_) => {
                FailureKind::Failed
            }
        };
        let message = match error {
            SuspendError::OriginSilent { why, .. } | SuspendError::Refused { why, .. } => why,
            error => chain(&error),
        };
        Self { kind, message }
    }
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        let kind = match &error {
            ServeError::InUse { .. } => FailureKind::InUse,
            ServeError::Refused { .. } => FailureKind::Refused,
            ServeError::Cannot { .. } => FailureKind::CannotServe,
            ServeError::State { .. }
            | ServeError::Unavailable { .. }
            | ServeError::TooOld { .. }
            | ServeError::Elsewhere { .. } => FailureKind::Failed,
        };
        let message = match error {
            ServeError::Refused { why, .. } | ServeError::Cannot { why, .. } => why,
            ServeError::InUse { users, .. } => users,
            error => chain(&error),
        };
        Self { kind, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(protocol: u32, oldest: u32) -> Hello {
        Hello { protocol, oldest }
    }

    #[test]
    fn the_newest_common_version_is_spoken() {
        let cases = [
            ((1, 1), (1, 1), Some(1)),
            ((2, 1), (1, 1), Some(1)),
            ((3, 2), (2, 1), Some(2)),
            ((3, 2), (4, 3), Some(3)),
            ((3, 2), (1, 1), None),
            ((5, 4), (3, 2), None),
            ((2, 2), (1, 2), None), // whoever says so speaks nothing
        ];
        for ((a, b), (c, d), wanted) in cases {
            let (one, other) = (hello(a, b), hello(c, d));
            assert_eq!(negotiate(one, other).ok(), wanted, "{one:?} {other:?}");
            assert_eq!(negotiate(other, one).ok(), wanted, "the same on both sides");
        }
        let error = negotiate(hello(3, 2), hello(1, 1)).unwrap_err();
        assert!(error.to_string().contains("2 to 3") && error.to_string().contains("1 to 1"), "{error}");
        assert_eq!(negotiate(OURS, OURS), Ok(OURS.protocol));
    }

    #[test]
    fn a_hello_may_say_more_and_a_request_may_not() {
        let newer = r#"{"protocol":7,"oldest":6,"feature":["x"]}"#;
        assert_eq!(serde_json::from_str::<Hello>(newer).unwrap(), hello(7, 6));
        for bad in [
            r#"{"do":"list","more":1}"#,
            r#"{"do":"replaceTable","device":"BERTH-x"}"#,
            r#"{"do":"shell","command":"x"}"#,
            r#"{"do":"messageWhileFrozen","frozen":"BERTH-x","message":"delete 1"}"#,
            r#"{"do":"serve","server":{"id":"u","image":"/i","format":"nbd","size":512}}"#,
        ] {
            assert!(serde_json::from_str::<Request>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_said_reads_back() {
        let server = ServerSpec {
            id: Uid::from("0f3c9a1e-5b7d-4c2a-9e10-00a1b2c3d4e5"),
            image: "/srv/image.qcow2".into(),
            format: super::super::servers::DiskFormat::Qcow2,
            size: berth_core::units::Bytes::gib(1),
        };
        let requests = [
            Request::ReplaceTable { device: "BERTH-x".into(), table: "0 1 error".into() },
            Request::Serve { server: server.clone() },
            Request::Stop { id: server.id.clone() },
            Request::Order { id: server.id, order: None },
            Request::List {},
        ];
        for request in requests {
            let text = serde_json::to_string(&request).unwrap();
            assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request, "{text}");
        }
        for kind in [FailureKind::OriginSilent("/dev/nbd0".into()), FailureKind::IdTaken, FailureKind::Failed]
        {
            let answer = Answer::Failed(Failure { kind, message: "m".into() });
            let text = serde_json::to_string(&answer).unwrap();
            assert_eq!(serde_json::from_str::<Answer>(&text).unwrap(), answer, "{text}");
        }
        let newer = r#"{"failed":{"kind":"outOfCoffee","message":"m"}}"#;
        let wanted = Answer::Failed(Failure { kind: FailureKind::Failed, message: "m".into() });
        assert_eq!(serde_json::from_str::<Answer>(newer).unwrap(), wanted);
    }
}
