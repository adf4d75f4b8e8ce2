//! Files whose space and durability are certain: sparse, preallocated, shared by reflink, renamed durably.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use berth_core::units::Bytes;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use thiserror::Error;

use crate::sys;

/// Why a file operation failed.
#[derive(Debug, Error)]
pub enum FileError {
    /// The file system cannot share blocks between these two files.
    #[error("file system of {target} cannot share blocks with {source_file}")]
    ReflinkUnsupported {
        /// The file whose blocks were to be shared.
        source_file: PathBuf,
        /// The file to be made.
        target: PathBuf,
    },
    /// The file system cannot reserve or release space inside a file.
    #[error("file system of {path} cannot {action}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What was asked of it.
        action: &'static str,
    },
    /// There is not as much space as the file needs.
    #[error("no space to {action} {path} ({bytes})")]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// What was asked of it.
        action: &'static str,
        /// How much was asked for.
        bytes: Bytes,
    },
    /// A size that no file can have.
    #[error("{bytes} is larger than {path} can be")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The size.
        bytes: Bytes,
    },
    /// Anything else that the system reported.
    #[error("failed to {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn failed(action: &'static str, path: &Path, source: impl Into<io::Error>) -> FileError {
    FileError::Io { action, path: path.to_owned(), source: source.into() }
}

fn create_new(path: &Path) -> Result<File, FileError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| failed("create", path, source))
}

/// Makes `target`, a new file that shares every block of `source` until either is written.
/// Nothing is left behind when it fails. Not durable until [`sync_file_and_parent`].
pub fn reflink(source: &Path, target: &Path) -> Result<File, FileError> {
    let from = File::open(source).map_err(|error| failed("open", source, error))?;
    let to = create_new(target)?;
    match sys::clone_file(&to, &from) {
        Ok(()) => Ok(to),
        Err(errno) => {
            let _ = fs::remove_file(target);
            Err(match errno {
                Errno::EOPNOTSUPP | Errno::EXDEV | Errno::EINVAL | Errno::ENOTTY => {
                    FileError::ReflinkUnsupported {
                        source_file: source.to_owned(),
                        target: target.to_owned(),
                    }
                }
                other => failed("share blocks with", target, other),
            })
        }
    }
}

/// Makes a new file of `size` bytes that takes no space and reads as zeros.
pub fn create_sparse(path: &Path, size: Bytes) -> Result<File, FileError> {
    let file = create_new(path)?;
    file.set_len(size.0).map_err(|source| {
        let _ = fs::remove_file(path);
        failed("size", path, source)
    })?;
    Ok(file)
}

/// Gives the file of this descriptor space for its first `size` bytes, and at least that length: writes there cannot
/// run out of space afterwards. `path` is for messages.
pub fn preallocate(file: &File, path: &Path, size: Bytes) -> Result<(), FileError> {
    allocate(file, path, FallocateFlags::empty(), Bytes::ZERO, size, "preallocate")
}

/// Gives back the space of `length` bytes at `offset`, which then read as zeros; the file keeps its length.
pub fn punch_hole(file: &File, path: &Path, offset: Bytes, length: Bytes) -> Result<(), FileError> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    allocate(file, path, flags, offset, length, "punch a hole into")
}

fn allocate(
    file: &File,
    path: &Path,
    flags: FallocateFlags,
    offset: Bytes,
    length: Bytes,
    action: &'static str,
) -> Result<(), FileError> {
    let too_large = |bytes| FileError::TooLarge { path: path.to_owned(), bytes };
    let start = i64::try_from(offset.0).map_err(|_| too_large(offset))?;
    let count = i64::try_from(length.0).map_err(|_| too_large(length))?;
    loop {
        return match fallocate(file, flags, start, count) {
            Ok(()) => Ok(()),
            Err(Errno::EINTR) => continue,
            Err(Errno::EOPNOTSUPP) => Err(FileError::Unsupported { path: path.to_owned(), action }),
            Err(Errno::ENOSPC | Errno::EDQUOT) => {
                Err(FileError::NoSpace { path: path.to_owned(), action, bytes: length })
            }
            Err(Errno::EFBIG) => Err(too_large(length)),
            Err(other) => Err(failed(action, path, other)),
        };
    }
}

/// The bytes that a file really takes, shared blocks included.
pub fn allocated_bytes(path: &Path) -> Result<Bytes, FileError> {
    let metadata = fs::metadata(path).map_err(|source| failed("examine", path, source))?;
    Ok(Bytes(metadata.blocks().saturating_mul(512)))
}

/// Opens a file that nobody but its owner may open, making it if need be: one that is locked, so that others cannot keep it
/// locked.
pub fn open_private(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    Ok(file)
}

/// Makes a file's content and its name durable.
pub fn sync_file_and_parent(file: &File, path: &Path) -> Result<(), FileError> {
    file.sync_all().map_err(|source| failed("write out", path, source))?;
    sync_parent(path)
}

/// Makes the names in the directory of `path` durable.
pub fn sync_parent(path: &Path) -> Result<(), FileError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let dir = File::open(parent).map_err(|source| failed("open", parent, source))?;
    dir.sync_all().map_err(|source| failed("write out", parent, source))
}

/// Gives a file another name in the same file system, replacing what had it. When this returns, content and name
/// are durable; after a crash there is either the old file or the new one.
pub fn rename_durably(from: &Path, to: &Path) -> Result<(), FileError> {
    let file = File::open(from).map_err(|source| failed("open", from, source))?;
    file.sync_all().map_err(|source| failed("write out", from, source))?;
    fs::rename(from, to).map_err(|source| failed("rename", from, source))?;
    sync_parent(to)
}

/// Writes a small file as a whole: after a crash it has the old content or the new one.
pub fn write_durably(path: &Path, content: &[u8]) -> Result<(), FileError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = path.with_file_name(name);
    remove_if_there(&partial)?;
    let mut file = create_new(&partial)?;
    io::Write::write_all(&mut file, content).map_err(|source| failed("write", &partial, source))?;
    rename_durably(&partial, path)
}

/// Deletes a file; one that is not there is deleted already.
pub fn remove_if_there(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(failed("delete", path, source)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn sparse_files_take_no_space_and_preallocated_ones_all_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = create_sparse(&path, Bytes::mib(8)).unwrap();
        assert_eq!(allocated_bytes(&path).unwrap(), Bytes::ZERO);
        preallocate(&file, &path, Bytes::mib(8)).unwrap();
        assert!(allocated_bytes(&path).unwrap() >= Bytes::mib(8));
        file.write_all_at(&[7; 4096], 1 << 20).unwrap();
        punch_hole(&file, &path, Bytes::mib(1), Bytes::mib(2)).unwrap();
        assert!(allocated_bytes(&path).unwrap() <= Bytes::mib(6).saturating_add(Bytes::kib(64)));
        let mut byte = [1];
        file.read_exact_at(&mut byte, 1 << 20).unwrap();
        assert_eq!((byte[0], file.metadata().unwrap().len()), (0, 8 << 20));
    }

    #[test]
    fn a_file_is_never_replaced_by_accident() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        create_sparse(&path, Bytes::mib(1)).unwrap();
        assert!(matches!(create_sparse(&path, Bytes::mib(2)), Err(FileError::Io { action: "create", .. })));
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
    }

    #[test]
    fn durable_writes_replace_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("claim.json");
        fs::write(dir.path().join("claim.json.partial"), b"left by a crash").unwrap();
        write_durably(&path, b"one").unwrap();
        write_durably(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_size_that_no_file_can_have_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = create_sparse(&path, Bytes::ZERO).unwrap();
        assert!(matches!(preallocate(&file, &path, Bytes(u64::MAX)), Err(FileError::TooLarge { .. })));
    }
}
