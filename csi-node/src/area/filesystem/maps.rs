//! What a volume's file has itself, and where two files have the same blocks.
//!
//! A file cannot be kept as it is: one that is written while it is read is told as it is at one moment or another. A snapshot
//! is never written. Files are told apart by where their blocks lie, which holds as long as the older one keeps its own: so
//! that one must be no volume that somebody writes to.

use std::fs::File;
use std::path::{Path, PathBuf};

use berth_core::extents::{Composer, Extent, Held, compare};
use berth_core::units::Bytes;
use berth_device::file_map::FileRuns;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::super::Reading;
use super::super::error::{AreaError, io_error};
use super::Filesystem;

/// What a file shares with what it was made from counts as its own.
pub(super) fn map(path: &Path, size: Bytes) -> Result<Reading<'static>, AreaError> {
    let (file, path) = (opened(path)?, path.to_owned());
    Ok(Box::new(move |each| {
        let mut composer = Composer::map(size, std::iter::empty(), each);
        each_part(&file, &path, |part| Ok(composer.part(part, Held::Own)?))?;
        composer.finish();
        Ok(())
    }))
}

/// What the second one has that the first one has not.
pub(super) fn delta(old: (PathBuf, Bytes), new: (PathBuf, Bytes)) -> Result<Reading<'static>, AreaError> {
    let (before, now) = (opened(&old.0)?, opened(&new.0)?);
    Ok(Box::new(move |each| {
        let mut composer = Composer::comparison(new.1, old.1, std::iter::empty(), each);
        let runs = |file, path: &Path| FileRuns::of(file, path).map(|run| run.map_err(AreaError::from));
        compare(runs(before, &old.0), runs(now, &new.0), |part, held| Ok(composer.part(part, held)?))?;
        composer.finish();
        Ok(())
    }))
}

/// The file, with what was written to its devices.
fn opened(path: &Path) -> Result<File, AreaError> {
    Filesystem::settle(path)?;
    File::open(path).map_err(io_error("open", path))
}

/// The parts of a file that are no holes.
fn each_part(
    file: &File,
    path: &Path,
    mut each: impl FnMut(Extent) -> Result<(), AreaError>,
) -> Result<(), AreaError> {
    let mut at = 0;
    let seek = |at: i64, whence| match lseek(file, at, whence) {
        Err(Errno::ENXIO) => Ok(None), // behind the last data
        sought => sought.map(Some).map_err(|errno| io_error("map", path)(errno.into())),
    };
    while let Some(start) = seek(at, Whence::SeekData)? {
        let end = seek(start, Whence::SeekHole)?.unwrap_or(start);
        if end <= start {
            return Ok(()); // it has become shorter
        }
        let bytes = |offset: i64| Bytes(offset.unsigned_abs());
        each(Extent { offset: bytes(start), length: bytes(end).saturating_sub(bytes(start)) })?;
        at = end;
    }
    Ok(())
}
