//! Why a call of the Container Storage Interface did not succeed.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tonic::Code;

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CsiError {
    /// The plugin refused it.
    #[error("{call} of {subject} was refused: {code:?}: {message}")]
    Refused {
        /// The call.
        call: &'static str,
        /// The volume, by name or handle.
        subject: String,
        /// The code.
        code: Code,
        /// What the plugin says.
        message: String,
    },
    /// It was still undecided at the limit.
    #[error("{call} of {subject} was undecided for {limit:?}, last: {code:?}: {message}")]
    Undecided {
        /// The call.
        call: &'static str,
        /// The volume, by name or handle.
        subject: String,
        /// How long it was repeated.
        limit: Duration,
        /// The last code.
        code: Code,
        /// What the plugin said last.
        message: String,
    },
    /// The answer lacks something that every answer has.
    #[error("{call} of {subject} was answered without {missing}")]
    Answer {
        /// The call.
        call: &'static str,
        /// The volume, by name or handle.
        subject: String,
        /// What is missing.
        missing: &'static str,
    },
    /// A directory that kubelet would make could not be made or removed.
    #[error("failed to prepare {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl CsiError {
    /// The plugin's code, if it answered.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { code, .. } | Self::Undecided { code, .. } => Some(*code),
            Self::Answer { .. } | Self::Directory { .. } => None,
        }
    }
}
