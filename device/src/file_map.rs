//! Where the blocks of a file lie, as a stream.
//!
//! Source: `Documentation/filesystems/fiemap.rst` of the kernel. Files that share blocks have them at the same place.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};

use berth_core::extents::{Extent, Run};
use berth_core::units::Bytes;
use nix::errno::Errno;

use crate::files::FileError;
use crate::sys::{self, FiemapExtent};

/// `FIEMAP_EXTENT_LAST`.
const LAST: u32 = 0x1;
/// `FIEMAP_EXTENT_UNKNOWN`, `_DELALLOC`, `_ENCODED`, `_DATA_ENCRYPTED`, `_NOT_ALIGNED`, `_DATA_INLINE` and `_DATA_TAIL`: the
/// place is not there, or is not these bytes' alone.
const NO_PLACE: u32 = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400;
/// `FIEMAP_EXTENT_UNWRITTEN`: space without content, which reads as zeros.
const UNWRITTEN: u32 = 0x800;

/// The parts of a file that have content, ascending and disjoint. A few of them are held at a time.
#[derive(Debug)]
pub struct FileRuns {
    file: File,
    path: PathBuf,
    next: u64,
    read: VecDeque<FiemapExtent>,
    ended: bool,
}

impl FileRuns {
    /// Of an open file. `path` is for messages.
    pub fn of(file: File, path: &Path) -> Self {
        Self { file, path: path.to_owned(), next: 0, read: VecDeque::new(), ended: false }
    }

    fn read_more(&mut self) -> Result<(), FileError> {
        let path = || self.path.clone();
        let found = sys::file_extents(&self.file, self.next).map_err(|errno| match errno {
            Errno::EOPNOTSUPP | Errno::ENOTTY => FileError::Unsupported { path: path(), action: "map" },
            other => FileError::Io { action: "map", path: path(), source: other.into() },
        })?;
        match found.last() {
            Some(last) => {
                self.next = last.logical.saturating_add(last.length);
                self.ended = last.flags & LAST != 0;
            }
            None => self.ended = true,
        }
        self.read.extend(found);
        Ok(())
    }
}

impl Iterator for FileRuns {
    type Item = Result<Run, FileError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            while let Some(found) = self.read.pop_front() {
                if found.flags & UNWRITTEN == 0 && found.length > 0 {
                    let extent = Extent { offset: Bytes(found.logical), length: Bytes(found.length) };
                    let place = (found.flags & NO_PLACE == 0).then_some(Bytes(found.physical));
                    return Some(Ok(Run { extent, place }));
                }
            }
            if self.ended {
                return None;
            }
            if let Err(error) = self.read_more() {
                self.ended = true;
                return Some(Err(error));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::files;

    const BLOCK: u64 = 64 << 10;

    #[test]
    fn content_is_told_and_holes_and_space_alone_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = files::create_sparse(&path, Bytes::mib(64)).unwrap();
        // More than are asked for at once.
        let wanted: Vec<_> = (0..200).map(|n| n * 4 * BLOCK).collect();
        for at in &wanted {
            file.write_all_at(&[7; 4096], *at).unwrap();
        }
        files::preallocate(&file, &path, Bytes(4096)).unwrap();
        let runs: Result<Vec<Run>, FileError> = FileRuns::of(file, &path).collect();
        let runs = match runs {
            Err(FileError::Unsupported { .. }) => {
                return println!("SKIPPED content_is_told…: this file system has no maps of files");
            }
            runs => runs.unwrap(),
        };
        let starts: Vec<_> = runs.iter().map(|run| run.extent.offset.0).collect();
        assert_eq!(starts, wanted);
        assert!(runs.iter().all(|run| run.place.is_some() && run.extent.length < Bytes(BLOCK)), "{runs:?}");
    }
}
