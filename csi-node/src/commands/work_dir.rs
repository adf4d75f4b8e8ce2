//! The directory of a command's work, which a later one goes on in, and the bar that shows how far it is.

use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_core::ids::{NodeName, Uid};
use berth_core::stages::{Shape, Stage};
use berth_core::units::{Bytes, Generation};
use berth_record::{CreateError, NodeRecord, OpenError};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::sys::statvfs::statvfs;
use thiserror::Error;

use crate::args::Output;
use crate::transfer::{Journal, Observer, Reporter, Snapshot, TransferError};

/// The record's name in its directory.
const RECORD: &str = "record.redb";

/// Why there is no place to work in.
#[derive(Debug, Error)]
pub enum WorkDirError {
    /// A file or directory.
    #[error("failed to {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is too small.
    #[error("{} has {available} available, and up to {needed} are needed", path.display())]
    Space {
        /// The directory.
        path: PathBuf,
        /// What it has.
        available: Bytes,
        /// What is needed.
        needed: Bytes,
    },
    /// The record cannot be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The record cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl WorkDirError {
    /// What the system said of a path.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }
}

/// A directory with the record of one piece of work.
pub struct WorkDir {
    /// Where it is.
    pub path: PathBuf,
    /// True if it was made for this work, and goes with it.
    own: bool,
    uid: Uid,
    record: Arc<NodeRecord>,
}

impl WorkDir {
    /// Opens the directory of the work `uid`: the given one, or one of its own among the system's temporary ones.
    pub fn open(given: Option<&Path>, uid: &Uid, node: &NodeName) -> Result<Self, WorkDirError> {
        let path = given.map_or_else(|| std::env::temp_dir().join(format!("berth-{uid}")), Path::to_owned);
        std::fs::create_dir_all(&path).map_err(WorkDirError::io("make", &path))?;
        let file = path.join(RECORD);
        let record = match NodeRecord::open(&file, node) {
            Err(OpenError::NotFound { .. }) => NodeRecord::create(&file, node)?,
            opened => opened?,
        };
        Ok(Self { path, own: given.is_none(), uid: uid.clone(), record: Arc::new(record) })
    }

    /// How far the work is.
    pub fn journal(&self) -> Journal {
        Journal::new(Arc::clone(&self.record), self.uid.clone(), Generation::FIRST)
    }

    /// Refuses work that needs more than there is.
    pub fn check_space(&self, needed: Bytes) -> Result<(), WorkDirError> {
        let found = statvfs(&self.path)
            .map_err(|errno| WorkDirError::io("look at the space of", &self.path)(errno.into()))?;
        let available = Bytes(found.blocks_available().saturating_mul(found.fragment_size()));
        if needed > available {
            return Err(WorkDirError::Space { path: self.path.clone(), available, needed });
        }
        Ok(())
    }

    /// Removes the record, and the directory if it is ours.
    pub fn remove(self) -> Result<(), WorkDirError> {
        let Self { path, own, record, .. } = self;
        drop(record);
        let file = path.join(RECORD);
        std::fs::remove_file(&file).map_err(WorkDirError::io("remove", &file))?;
        if own {
            std::fs::remove_dir(&path).map_err(WorkDirError::io("remove", &path))?;
        }
        Ok(())
    }
}

/// The progress bar, where a person looks.
pub struct Bar(ProgressBar);

impl Bar {
    /// One that is shown if text is printed, to a terminal.
    pub fn new(output: Output) -> Self {
        let shown = io::stderr().is_terminal() && output == Output::Text;
        let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(100), target);
        if let Ok(style) = ProgressStyle::with_template("{msg:<8} {wide_bar} {pos:>3} %  {elapsed_precise}") {
            bar.set_style(style);
        }
        Self(bar)
    }

    /// Takes it off the screen.
    pub fn clear(&self) {
        self.0.finish_and_clear();
    }
}

impl Reporter for Bar {
    fn progress(&self, shape: &Shape, now: Snapshot) {
        let percent = u64::from(shape.percent(now.stage, now.done, now.total));
        self.0.set_position(percent.max(self.0.position()));
        if now.stage >= Stage::Upload || now.done == Bytes::ZERO {
            self.0.set_message(now.stage.as_str());
        }
    }
}

impl Observer for Bar {
    fn attempt(&self, _: u32) {}

    fn retrying(&self, error: &TransferError, pause: Duration) {
        self.0.println(format!("{}; tried again in {} s", error.chain(), pause.as_secs()));
    }
}
