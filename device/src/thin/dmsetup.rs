//! `dmsetup`, one function for each command, and devices told by their dm UUID.
//!
//! Never with udev: its cookies live in the IPC namespace of whoever makes them, so a container waits for ever for a
//! udev outside. `dmsetup` makes the nodes itself.

use std::ffi::OsStr;
use std::time::Duration;

use berth_core::reason::Reason;
use thiserror::Error;

use super::names::{DeviceName, UUID_PREFIX};
use super::table::{DeviceNumber, ParseError, number};
use crate::program::{self, RunError};

/// For every program that talks to device mapper.
pub(crate) const ENVIRONMENT: &[(&str, &str)] =
    &[("DM_DISABLE_UDEV", "1"), ("LVM_SUPPRESS_FD_WARNINGS", "1")];
/// For commands that only exchange a few bytes with the kernel.
const LIMIT: Duration = Duration::from_secs(30);
/// How long a device may take to let its last writes through before its suspension is given up.
const SUSPEND_LIMIT: Duration = Duration::from_secs(20);
/// 300 bytes for each of 50,000 devices.
const MOST_OUTPUT: usize = 16 << 20;

/// Why device mapper did not do something.
#[derive(Debug, Error)]
pub enum DmError {
    /// `dmsetup` failed.
    #[error("failed to {action} {device}")]
    Run {
        /// What was tried.
        action: &'static str,
        /// The device.
        device: String,
        /// Why.
        source: RunError,
    },
    /// `dmsetup` said something that is not understood.
    #[error("failed to understand what device mapper says of {device}")]
    Answer {
        /// The device.
        device: String,
        /// What it was.
        source: ParseError,
    },
    /// **A device of ours is left suspended: everything that uses it waits.** Trying again is all that helps.
    #[error("{device} is still suspended after {attempts} attempts to resume it")]
    StillSuspended {
        /// The device.
        device: String,
        /// How many.
        attempts: u32,
        /// Why the last one failed.
        source: Box<DmError>,
    },
}

impl DmError {
    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::StillSuspended { .. } => Reason::DeviceSuspended,
            Self::Run { .. } | Self::Answer { .. } => Reason::PoolAreaFailed,
        }
    }

    /// True if the kernel gave this reason, in the words of `strerror`.
    pub(super) fn says(&self, reason: &str) -> bool {
        matches!(self, Self::Run { source: RunError::Failed { output, .. }, .. } if output.contains(reason))
    }

    fn is_gone(&self) -> bool {
        self.says("Device does not exist") || self.says("No such device or address")
    }
}

/// How a device is suspended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quiesce {
    /// A file system on it is frozen and all writes reach it: what is below is what a reader would see.
    Freeze,
    /// All that is under way reaches it, and what comes later waits: for changes of table only.
    ///
    /// Not `--noflush`: when such a suspension is given up, what the target had handed back and waits for its other half
    /// ends as an I/O error (tried on Linux 6.1: a read of a clone whose origin was silent).
    Hold,
}

/// What device mapper knows of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Its dm UUID.
    pub uuid: String,
    /// True if everything that uses it waits.
    pub suspended: bool,
    /// How many have it open.
    pub open_count: u32,
    /// Its number.
    pub number: DeviceNumber,
    /// True if it has a table in use.
    pub live: bool,
    /// True if it refuses writes.
    pub read_only: bool,
}

impl DeviceInfo {
    /// What it is for; `None` for a kind that this program does not know.
    pub fn device(&self) -> Option<DeviceName> {
        DeviceName::from_uuid(&self.uuid)
    }
}

/// Every device of ours.
pub fn list_ours() -> Result<Vec<DeviceInfo>, DmError> {
    let text = run("list", "devices", &[&INFO[..], &["-S", "uuid=~^BERTH-"]].concat())?;
    let lines = text.lines().filter(|line| line.contains('|'));
    let all: Result<Vec<_>, _> = lines.map(|line| understood("devices", parse_info(line))).collect();
    Ok(all?.into_iter().filter(|info| info.uuid.starts_with(UUID_PREFIX)).collect())
}

/// Every device of ours that is suspended, kernel pools first: what lies on them goes on only after them.
pub fn all_suspended_of_ours() -> Result<Vec<DeviceInfo>, DmError> {
    let mut suspended: Vec<_> = list_ours()?.into_iter().filter(|info| info.suspended).collect();
    suspended.sort_by_key(|info| !matches!(info.device(), Some(DeviceName::KernelPool { .. })));
    Ok(suspended)
}

/// Resumes a device of ours that [`all_suspended_of_ours`] found. A table that was loaded for it is used from now on.
pub fn resume(info: &DeviceInfo) -> Result<(), DmError> {
    resume_uuid(&info.uuid)
}

const INFO: [&str; 7] = [
    "info",
    "-c",
    "--noheadings",
    "--separator",
    "|",
    "-o",
    "name,uuid,suspended,open,major,minor,tables_loaded,readonly",
];

pub(super) fn info(uuid: &str) -> Result<Option<DeviceInfo>, DmError> {
    match run("examine", uuid, &[&INFO[..], &["-u", uuid]].concat()) {
        Ok(line) => understood(uuid, parse_info(&line)).map(Some),
        Err(error) if error.is_gone() => Ok(None),
        Err(error) => Err(error),
    }
}

fn parse_info(line: &str) -> Result<DeviceInfo, ParseError> {
    let parse = || {
        let fields: Vec<_> = line.trim().split('|').collect();
        let [name, uuid, suspended, open, major, minor, tables, access] = fields[..] else { return None };
        Some(DeviceInfo {
            name: name.to_owned(),
            uuid: uuid.to_owned(),
            suspended: one_of(suspended, "Suspended", &["Active"])?,
            open_count: number(open)?,
            number: DeviceNumber { major: number(major)?, minor: number(minor)? },
            live: matches!(tables, "Live" | "Both"),
            read_only: one_of(access, "Read-only", &["Writeable"])?,
        })
    };
    parse().ok_or_else(|| ParseError { what: "line of device information", line: line.to_owned() })
}

fn one_of(word: &str, yes: &str, no: &[&str]) -> Option<bool> {
    if word == yes { Some(true) } else { no.contains(&word).then_some(false) }
}

/// Makes a device with this table, or none: what is left of a failed attempt is removed.
pub(super) fn create(device: &DeviceName, table: &str, read_only: bool) -> Result<(), DmError> {
    let (name, uuid) = (device.name(), device.uuid());
    let access: &[&str] = if read_only { &["--readonly"] } else { &[] };
    let made = run("create", &name, &[&["create", &name, "-u", &uuid, "--table", table], access].concat());
    if made.is_err()
        && let Ok(Some(info)) = info(&uuid)
        && !info.live
    {
        remove(device)?;
    }
    made.map(drop)
}

/// Removes a device of ours; one that is not there is no error. Waits a few seconds for those who look at it in passing.
///
/// By its name, because the node stays behind otherwise (libdevmapper 1.02.185); the UUID is compared just before.
pub(super) fn remove(device: &DeviceName) -> Result<(), DmError> {
    let Some(info) = info(&device.uuid())? else { return Ok(()) };
    match run("remove", &info.name, &["remove", "--retry", &info.name]) {
        Err(error) if error.is_gone() => Ok(()),
        done => done.map(drop),
    }
}

/// The table in use, empty if there is none.
pub(super) fn table(uuid: &str) -> Result<String, DmError> {
    run("read the table of", uuid, &["table", "-u", uuid])
}

/// The present state, as far as it is known without writing anything.
pub(super) fn status(uuid: &str) -> Result<String, DmError> {
    run("read the status of", uuid, &["status", "--noflush", "-u", uuid])
}

/// The same after all that the device has to record is on its disk.
pub(super) fn committed_status(uuid: &str) -> Result<String, DmError> {
    run("read the status of", uuid, &["status", "-u", uuid])
}

/// Name and table of every thin device, ours or not.
pub(super) fn thin_tables() -> Result<Vec<(String, String)>, DmError> {
    let text = run("list", "thin devices", &["table", "--target", "thin"])?;
    let split = |line: &str| line.split_once(": ").map(|(name, table)| (name.to_owned(), table.to_owned()));
    Ok(text.lines().filter_map(split).collect())
}

pub(super) fn message(uuid: &str, text: &str) -> Result<(), DmError> {
    run("send a message to", uuid, &["message", "-u", uuid, "0", text]).map(drop)
}

/// Gives the device a table that it uses after it was suspended and resumed.
pub(super) fn load(uuid: &str, table: &str, read_only: bool) -> Result<(), DmError> {
    let access: &[&str] = if read_only { &["--readonly"] } else { &[] };
    run("load a table for", uuid, &[&["load", "-u", uuid, "--table", table], access].concat()).map(drop)
}

/// Forgets a table that was loaded and is not used yet.
pub(super) fn clear(uuid: &str) -> Result<(), DmError> {
    run("clear the new table of", uuid, &["clear", "-u", uuid]).map(drop)
}

pub(super) fn suspend(uuid: &str, how: Quiesce) -> Result<(), DmError> {
    let options: &[&str] = match how {
        Quiesce::Freeze => &[],
        Quiesce::Hold => &["--nolockfs"],
    };
    let arguments = [&["suspend"], options, &["-u", uuid]].concat();
    run_for("suspend", uuid, &arguments, SUSPEND_LIMIT).map(drop)
}

pub(super) fn resume_uuid(uuid: &str) -> Result<(), DmError> {
    run("resume", uuid, &["resume", "-u", uuid]).map(drop)
}

/// The targets that the kernel has loaded.
pub(super) fn targets() -> Result<Vec<String>, DmError> {
    let text = run("list", "targets", &["targets"])?;
    Ok(text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
}

fn run(action: &'static str, device: &str, arguments: &[&str]) -> Result<String, DmError> {
    run_for(action, device, arguments, LIMIT)
}

fn run_for(
    action: &'static str,
    device: &str,
    arguments: &[&str],
    limit: Duration,
) -> Result<String, DmError> {
    let arguments: Vec<_> = arguments.iter().map(OsStr::new).collect();
    program::run_whole("dmsetup", &arguments, ENVIRONMENT, MOST_OUTPUT, limit)
        .map_err(|source| DmError::Run { action, device: device.to_owned(), source })
}

pub(super) fn understood<T>(device: &str, parsed: Result<T, ParseError>) -> Result<T, DmError> {
    parsed.map_err(|source| DmError::Answer { device: device.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_information_are_understood() {
        let info = parse_info("ro|BERTH-ro|Active|0|254|3|Live|Read-only").unwrap();
        assert_eq!((info.name.as_str(), info.uuid.as_str(), info.open_count), ("ro", "BERTH-ro", 0));
        assert!(info.live && info.read_only && !info.suspended);
        assert_eq!(info.number, DeviceNumber { major: 254, minor: 3 });
        let bare = parse_info("nt|BERTH-nt|Suspended|2|254|1|None|Writeable ").unwrap();
        assert!(bare.suspended && !bare.live && !bare.read_only && bare.device().is_none());
        for bad in ["", "No devices found", "a|b|Active|0|254|3|Live", "a|b|Maybe|0|254|3|Live|Writeable"] {
            assert!(parse_info(bad).is_err(), "{bad}");
        }
    }
}
