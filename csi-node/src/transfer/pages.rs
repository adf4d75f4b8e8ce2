//! Pages of large files: they count against the control group of whoever read or wrote them.

use std::fs::File;
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// A file whose pages are let go of now and then while something else reads it.
pub(crate) struct Pages(Option<File>);

impl Pages {
    /// Of the file at `path`. Where it cannot be opened, nothing is let go of.
    pub(crate) fn of(path: &Path) -> Self {
        Self(File::open(path).ok())
    }

    /// Lets go of all that are clean.
    pub(crate) fn release(&self) {
        if let Some(file) = &self.0 {
            release(file);
        }
    }
}

/// Lets go of a file's clean pages. Only advice; where the kernel does not take it, nothing is lost.
pub(crate) fn release(file: &File) {
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}
