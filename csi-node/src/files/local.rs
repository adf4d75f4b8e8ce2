//! The file itself. Blocks.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use berth_core::ids::Sha256Sum;
use berth_core::units::Bytes;
use nix::libc::{O_NOFOLLOW, O_NONBLOCK};

use super::error::FileError;

/// A file of a directory that pods may have written in, open for reading.
pub struct Opened {
    pub file: File,
    pub stamp: Stamp,
}

/// By what it is seen that a file has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub size: Bytes,
    /// When it was last changed, in nanoseconds since 1970.
    pub modified: i64,
}

/// Opens a regular file for reading. A link, a pipe or a device in its place is none.
pub fn open(dir: &Path, name: &str) -> Result<Opened, FileError> {
    let missing = || FileError::Missing { name: name.to_owned() };
    let mut options = OpenOptions::new();
    let file = match options.read(true).custom_flags(O_NOFOLLOW | O_NONBLOCK).open(dir.join(name)) {
        Err(error) if matches!(error.raw_os_error(), Some(nix::libc::ELOOP | nix::libc::ENXIO)) => {
            return Err(missing());
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
        opened => opened.map_err(FileError::io("open", name))?,
    };
    let metadata = file.metadata().map_err(FileError::io("examine", name))?;
    if !metadata.is_file() {
        return Err(missing());
    }
    let modified = metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec());
    Ok(Opened { file, stamp: Stamp { size: Bytes(metadata.len()), modified } })
}

/// The bytes from `offset` on, `length` of them, and their sum.
pub fn read(
    file: &File,
    name: &str,
    offset: Bytes,
    length: Bytes,
) -> Result<(Vec<u8>, Sha256Sum), FileError> {
    let mut bytes = vec![0; usize::try_from(length.0).unwrap_or(usize::MAX)];
    match file.read_exact_at(&mut bytes, offset.0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(FileError::Changing { name: name.to_owned() });
        }
        read => read.map_err(FileError::io("read", name))?,
    }
    crate::transfer::release(file);
    let sum = Sha256Sum::of(&bytes);
    Ok((bytes, sum))
}

/// Opens the file for writing, cut to what is known to be good in it.
pub fn open_at(dir: &Path, name: &str, offset: Bytes) -> Result<File, FileError> {
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(false).mode(0o644).custom_flags(O_NOFOLLOW);
    let file = options.open(dir.join(name)).map_err(FileError::io("open", name))?;
    file.set_len(offset.0).map_err(FileError::io("cut", name))?;
    Ok(file)
}

/// How many bytes the directory has room for, what lies in the file counted in.
pub fn room(dir: &Path, name: &str) -> Result<Bytes, FileError> {
    let failed = |errno: nix::errno::Errno| FileError::io("measure the space of", name)(errno.into());
    let found = nix::sys::statvfs::statvfs(dir).map_err(failed)?;
    let free = Bytes(found.blocks_available().saturating_mul(found.fragment_size()));
    let there =
        dir.join(name).metadata().map_or(Bytes::ZERO, |file| Bytes(file.blocks().saturating_mul(512)));
    Ok(free.saturating_add(there))
}
