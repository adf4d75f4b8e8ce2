//! What the kernel shows of NBD devices.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use berth_core::units::Bytes;
use nix::errno::Errno;
use thiserror::Error;

use super::netlink::{Nbd, NetlinkError};
use super::slots::Slot;

/// Why the devices could not be looked at.
#[derive(Debug, Error)]
pub enum SysfsError {
    /// The kernel did not tell their status.
    #[error("failed to ask for the status of NBD devices")]
    Netlink(#[from] NetlinkError),
    /// What it shows could not be read.
    #[error("failed to read {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What it shows is not understood.
    #[error("{path} holds no number: `{text}`", path = path.display())]
    NotANumber {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
}

/// Looks at every NBD device.
pub fn observe(nbd: &mut Nbd) -> Result<Vec<Slot>, SysfsError> {
    let status = match nbd.status() {
        // It makes room for the answer by an estimate that may be too low for many devices.
        Err(error) if error.errno() == Some(Errno::EMSGSIZE) => status_one_by_one(nbd)?,
        status => status?,
    };
    status.into_iter().map(|(index, in_use)| slot(index, in_use)).collect()
}

/// Looks at one; `None` if there is none of that number.
pub(super) fn observe_one(nbd: &mut Nbd, index: u32) -> Result<Option<Slot>, SysfsError> {
    let status = nbd.status_of(Some(index))?;
    status
        .into_iter()
        .find(|(found, _)| *found == index)
        .map(|(index, in_use)| slot(index, in_use))
        .transpose()
}

/// The folder of a device.
pub(super) fn folder(index: u32) -> PathBuf {
    PathBuf::from(format!("/sys/block/nbd{index}"))
}

/// The names in a folder; none if it is not there.
pub(super) fn names(folder: &Path) -> Result<Vec<String>, SysfsError> {
    let read = |source| SysfsError::Read { path: folder.to_owned(), source };
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(read)?,
    };
    entries
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()).map_err(read))
        .collect()
}

/// The text of a file without its line's end; `None` if it is not there, or goes while it is read.
pub(super) fn text(path: &Path) -> Result<Option<String>, SysfsError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(None),
        Err(source) => Err(SysfsError::Read { path: path.to_owned(), source }),
    }
}

fn status_one_by_one(nbd: &mut Nbd) -> Result<Vec<(u32, bool)>, SysfsError> {
    let names = names(Path::new("/sys/block"))?;
    let mut indexes: Vec<u32> =
        names.iter().filter_map(|name| name.strip_prefix("nbd")?.parse().ok()).collect();
    indexes.sort_unstable();
    let mut all = Vec::new();
    for index in indexes {
        all.extend(nbd.status_of(Some(index))?);
    }
    Ok(all)
}

fn slot(index: u32, in_use: bool) -> Result<Slot, SysfsError> {
    let folder = folder(index);
    let sectors: u64 = number(&folder.join("size"))?.unwrap_or(0);
    Ok(Slot {
        index,
        in_use,
        pid: number(&folder.join("pid"))?,
        backend: text(&folder.join("backend"))?,
        size: Bytes(sectors.saturating_mul(512)),
        holders: names(&folder.join("holders"))?.len(),
    })
}

fn number<T: FromStr>(path: &Path) -> Result<Option<T>, SysfsError> {
    let Some(text) = text(path)? else { return Ok(None) };
    match text.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(SysfsError::NotANumber { path: path.to_owned(), text }),
    }
}
