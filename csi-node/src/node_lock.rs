//! One process at a time has the pools of a node open: the agent for its life, or one command.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use berth_core::reason::Reason;
use berth_device::files::open_private;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use thiserror::Error;

use crate::operation::Refusal;
use crate::telemetry::chain;

/// Why the pools of this node may not be opened.
#[derive(Debug, Error)]
pub enum LockError {
    /// Another process has them open.
    #[error("the pools of this node are held by {holder}, which has locked {path}")]
    Held {
        /// Who, as it has written into the lock.
        holder: String,
        /// The lock.
        path: PathBuf,
    },
    /// The lock itself.
    #[error("failed to lock {path}")]
    Io {
        /// The lock.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl From<LockError> for Refusal {
    fn from(error: LockError) -> Self {
        let reason = match &error {
            LockError::Held { .. } => Reason::InUse,
            LockError::Io { .. } => Reason::PreflightFailed,
        };
        Self { reason, message: chain(&error) }
    }
}

/// Held while this process has the pools open. The kernel gives it back when the process ends, however it does.
#[derive(Debug)]
pub struct NodeLock(#[expect(dead_code, reason = "it is held, not read")] Flock<File>);

impl NodeLock {
    /// Takes `node.lock` in a node's directory, which is made if need be. `who` is what others are told.
    ///
    /// # Errors
    /// [`LockError::Held`] at once while another process has it.
    pub fn take(state_dir: &Path, who: &str) -> Result<Self, LockError> {
        let path = state_dir.join("node.lock");
        let failed = |source| LockError::Io { path: path.clone(), source };
        std::fs::create_dir_all(state_dir).map_err(failed)?;
        let file = open_private(&path).map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                sign(&mut lock, who).map_err(failed)?;
                Ok(Self(lock))
            }
            Err((file, Errno::EWOULDBLOCK)) => Err(LockError::Held { holder: holder(file), path }),
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }
}

fn sign(file: &mut File, who: &str) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "process {} ({who})", std::process::id())
}

fn holder(file: File) -> String {
    let mut text = String::new();
    let read = file.take(256).read_to_string(&mut text);
    match (read, text.trim()) {
        (Ok(_), told) if !told.is_empty() => told.to_owned(),
        _ => "another process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_is_told_who_holds_it_until_it_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("new");
        let held = NodeLock::take(&state, "berth-node agent").unwrap();
        let refusal = Refusal::from(NodeLock::take(&state, "berth-node pool list").unwrap_err());
        assert_eq!(refusal.reason, Reason::InUse);
        let holder = format!("process {} (berth-node agent)", std::process::id());
        assert!(refusal.message.contains(&holder), "{refusal}");
        drop(held);
        NodeLock::take(&state, "x").unwrap();
        let text = std::fs::read_to_string(state.join("node.lock")).unwrap();
        assert_eq!(text, format!("process {} (x)\n", std::process::id()));
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let error = NodeLock::take(&dir.path().join("file/state"), "x").unwrap_err();
        assert!(matches!(&error, LockError::Io { path, .. } if path.ends_with("node.lock")), "{error}");
    }
}
