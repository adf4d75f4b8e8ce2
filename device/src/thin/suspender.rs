//! Everything for which a device of ours has to be suspended, behind one trait, so that another process can do it.
//!
//! Nothing else in this crate suspends. [`InProcess`] does it here; a process that is killed in between then leaves a
//! device suspended, which [`resume_left_behind`] finds. Whoever suspends checks for itself that the device is ours,
//! that the change is one of those known here, and that external origins answer: a suspension would wait for them.

use std::ffi::OsStr;
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use berth_core::reason::Reason;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::claim::Claim;
use super::dmsetup::{self, DeviceInfo, DmError, Quiesce, understood};
use super::kernel_pool::node_of;
use super::names::DeviceName;
use super::status::PoolStatus;
use super::suspension::{Loaded, Suspended, replace_table};
use super::table::{DeviceNumber, ThinId, ThinTable};
use super::table_change::TableChange;
use crate::program;

/// How long an external origin may take to answer before it counts as silent.
const ORIGIN_LIMIT: Duration = Duration::from_secs(5);
/// How long a suspension waits for others in the same kernel pool.
const CLAIM_LIMIT: Duration = Duration::from_secs(60);

/// Whoever suspends devices of ours.
///
/// Each function suspends at most one device and returns when it works again, whatever happened, unless the error is
/// [`SuspendError::StillSuspended`]. Each is bounded in time and may be repeated.
pub trait Suspender: fmt::Debug + Send + Sync {
    /// Makes a device use another table: the same device, as large or larger; or a clone of which everything is local use its
    /// destination alone, read-only from then on.
    fn replace_table(&self, device: &DeviceName, table: &str) -> Result<(), SuspendError>;

    /// Sends a message to a kernel pool while a thin device of it is frozen: a file system on it is consistent, and all
    /// that was written is there.
    fn message_while_frozen(&self, frozen: &DeviceName, message: PoolMessage) -> Result<(), SuspendError>;
}

/// What a kernel pool is told while a device of it is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum PoolMessage {
    /// Make the thin device `id` a snapshot of `of`, which is the one that is frozen.
    CreateSnap {
        /// The number of the new one.
        id: ThinId,
        /// The number of the frozen one.
        of: ThinId,
        /// The transaction that the kernel pool was at when this was decided. At another one, whoever decided it is gone, and
        /// its successor has gone on.
        transaction: u64,
    },
}

impl fmt::Display for PoolMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::CreateSnap { id, of, .. } = self;
        write!(f, "create_snap {id} {of}")
    }
}

/// Why something was not done that needs a suspended device.
#[derive(Debug, Error)]
pub enum SuspendError {
    /// Device mapper refused.
    #[error("failed to use device mapper")]
    Dm(#[from] DmError),
    /// There is a thin device of that number already.
    #[error("there is a thin device of this number already")]
    IdTaken,
    /// There is no thin device of that number.
    #[error("there is no thin device of this number")]
    NoSuchId,
    /// An external origin does not answer. Nothing was suspended.
    #[error("the external origin {origin} does not answer: {why}", origin = origin.display())]
    OriginSilent {
        /// The origin.
        origin: PathBuf,
        /// What came of reading it.
        why: String,
    },
    /// It is not a change that is made. Nothing was suspended.
    #[error("nothing is done to {device}: {why}")]
    Refused {
        /// The device.
        device: String,
        /// What is wrong.
        why: String,
    },
    /// Something else in the same kernel pool takes too long. Nothing was suspended.
    #[error("another suspension in the kernel pool of {device} takes too long")]
    Busy {
        /// The device.
        device: String,
    },
    /// **A device is left suspended: everything that uses it waits.** It goes on being resumed.
    #[error("a device is still suspended: {0}")]
    StillSuspended(String),
    /// The process that suspends does not answer. What it was asked for it may have done.
    #[error("the supervisor at {socket} does not answer: {why}", socket = socket.display())]
    Unavailable {
        /// Its socket.
        socket: PathBuf,
        /// What came of asking.
        why: String,
    },
    /// The process that suspends says that it failed.
    #[error("the supervisor failed: {0}")]
    Elsewhere(String),
}

impl SuspendError {
    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Unavailable { .. } => Reason::SupervisorUnavailable,
            Self::OriginSilent { .. } => Reason::OriginSilent,
            error if error.left_suspended() => Reason::DeviceSuspended,
            Self::Busy { .. } => Reason::InUse,
            _ => Reason::PoolAreaFailed,
        }
    }

    /// True if a device is left suspended.
    pub fn left_suspended(&self) -> bool {
        matches!(self, Self::StillSuspended(_) | Self::Dm(DmError::StillSuspended { .. }))
    }
}

/// Suspends in this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct InProcess;

impl Suspender for InProcess {
    fn replace_table(&self, device: &DeviceName, table: &str) -> Result<(), SuspendError> {
        let _claim = claim(device)?;
        let info = working(device)?;
        let old = dmsetup::table(&info.uuid)?;
        let change = TableChange::check(device, &old, table).map_err(|why| refused(device, why))?;
        if change == TableChange::None {
            return Ok(());
        }
        change.require_local(&info.uuid)?.map_or(Ok(()), |why| Err(refused(device, &why)))?;
        change.origins(&info)?.into_iter().try_for_each(require_answer)?;
        let (old, new) = (change.old(), change.new_table());
        let old = Loaded { line: &old, read_only: info.read_only };
        let new = Loaded { line: &new, read_only: info.read_only || change.makes_read_only() };
        timed("replace the table of", device, || Ok(replace_table(&info.uuid, old, new)?))
    }

    fn message_while_frozen(&self, frozen: &DeviceName, message: PoolMessage) -> Result<(), SuspendError> {
        let DeviceName::Thin { pool, class, .. } = frozen else {
            return Err(refused(frozen, "it is not a thin device"));
        };
        let _claim = claim(frozen)?;
        let info = working(frozen)?;
        let pool = working(&DeviceName::KernelPool { pool: pool.clone(), class: *class })?;
        let table: ThinTable = understood(&info.uuid, dmsetup::table(&info.uuid)?.parse())?;
        let PoolMessage::CreateSnap { of, transaction, .. } = message;
        if table.pool != pool.number || table.id != of {
            return Err(refused(frozen, "it is another device than the one that the message is about"));
        }
        table.origin.into_iter().try_for_each(require_answer)?;
        match understood(&pool.uuid, dmsetup::status(&pool.uuid)?.parse())? {
            PoolStatus::Working(now) if now.transaction_id == transaction => {}
            _ => return Err(refused(frozen, "its kernel pool is at another transaction by now")),
        }
        timed("snapshot", frozen, || {
            let suspended = Suspended::new(&info.uuid, Quiesce::Freeze)?;
            let sent = dmsetup::message(&pool.uuid, &message.to_string());
            suspended.resume()?;
            sent.map_err(|error| match error {
                error if error.says("File exists") => SuspendError::IdTaken,
                error if error.says("No data available") => SuspendError::NoSuchId,
                error => error.into(),
            })
        })
    }
}

/// A device that was found suspended.
#[derive(Debug)]
pub struct LeftBehind {
    /// As it was found.
    pub device: DeviceInfo,
    /// What came of resuming it.
    pub resumed: Result<(), DmError>,
}

/// Resumes every device of ours that is suspended and that nobody in this process has suspended: whatever uses one waits.
/// What was found, with what came of it.
///
/// Only for the one process that suspends: what another has suspended this very moment looks the same.
pub fn resume_left_behind() -> Result<Vec<LeftBehind>, DmError> {
    let mut found = Vec::new();
    for info in dmsetup::all_suspended_of_ours()? {
        let Some(_claim) = Claim::take_now(&info.uuid) else { continue };
        // It may have been suspended by somebody here who was done just now.
        if dmsetup::info(&info.uuid)?.is_some_and(|now| now.suspended) {
            let resumed = dmsetup::resume(&info);
            found.push(LeftBehind { device: info, resumed });
        }
    }
    Ok(found)
}

fn claim(device: &DeviceName) -> Result<Claim, SuspendError> {
    let busy = || SuspendError::Busy { device: device.to_string() };
    Claim::take(device, CLAIM_LIMIT).ok_or_else(busy)
}

/// The device of this name, if it is there and works.
fn working(device: &DeviceName) -> Result<DeviceInfo, SuspendError> {
    match dmsetup::info(&device.uuid())? {
        Some(info) if info.live => Ok(info),
        _ => Err(refused(device, "it is not active")),
    }
}

fn refused(device: &DeviceName, why: &str) -> SuspendError {
    SuspendError::Refused { device: device.to_string(), why: why.to_owned() }
}

fn timed(
    what: &'static str,
    device: &DeviceName,
    work: impl FnOnce() -> Result<(), SuspendError>,
) -> Result<(), SuspendError> {
    tracing::debug!(%device, what, "suspends");
    let started = Instant::now();
    let done = work();
    let millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    tracing::info!(%device, what, millis, ok = done.is_ok(), "was suspended");
    done
}

/// Refuses an external origin that does not answer: a suspension would wait for it.
///
/// Reads one block past memory. A child does it, because a read of a device that is silent cannot be given up.
fn require_answer(origin: DeviceNumber) -> Result<(), SuspendError> {
    let silent =
        |origin, error: &dyn std::error::Error| SuspendError::OriginSilent { origin, why: error.to_string() };
    let origin =
        node_of(origin).map_err(|error| silent(PathBuf::from(format!("/sys/dev/block/{origin}")), &error))?;
    let input = format!("if={}", origin.display());
    let words = [&input, "of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=none"];
    let read = program::run("dd", words.map(OsStr::new), ORIGIN_LIMIT);
    read.map(drop).map_err(|error| silent(origin, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_messages_are_read() {
        let message: PoolMessage =
            serde_json::from_str(r#"{"createSnap":{"id":2,"of":1,"transaction":3}}"#).unwrap();
        assert_eq!(message.to_string(), "create_snap 2 1");
        let bad = [
            r#"{"createSnap":{"id":2,"of":"1\ndelete 1","transaction":3}}"#,
            r#"{"createSnap":{"id":16777216,"of":1,"transaction":3}}"#,
            r#"{"createSnap":{"id":2,"transaction":3}}"#,
            r#"{"createSnap":{"id":2,"of":1}}"#,
            r#"{"createSnap":{"id":2,"of":1,"transaction":3,"also":3}}"#,
            r#"{"delete":{"id":2}}"#,
            r#""create_snap 2 1""#,
        ];
        for text in bad {
            assert!(serde_json::from_str::<PoolMessage>(text).is_err(), "{text}");
        }
    }
}
