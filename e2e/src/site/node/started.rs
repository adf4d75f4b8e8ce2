//! Programs that were started on a node, of either kind.

use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::kernel::Running;
use crate::process::{self, Process, ReadyError};

/// How long a killed program of a guest may take to be gone on a busy machine.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// A program that was started on a node. Dropping it kills it, with what it has started.
pub enum Started {
    /// As a process of this machine.
    Process(Process),
    /// In a guest.
    Job(Job),
}

/// A program that was started in a guest.
pub struct Job {
    pub(super) name: String,
    pub(super) log: PathBuf,
    pub(super) running: Running,
}

impl Started {
    /// Whether it runs. What happened to a guest has happened to its programs.
    pub fn is_running(&self) -> bool {
        match self {
            Self::Process(process) => process.is_running(),
            Self::Job(job) => job.ended().is_none(),
        }
    }

    /// Its process id on this machine; programs of a guest have none.
    pub fn pid(&self) -> Option<u32> {
        match self {
            Self::Process(process) => Some(process.pid()),
            Self::Job(_) => None,
        }
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        match self {
            Self::Process(process) => process.log_tail(),
            Self::Job(job) => process::log_tail(&job.log),
        }
    }

    /// Waits until `probe` says that it answers, for `limit` at most.
    ///
    /// # Errors
    /// [`ReadyError`], at once when it ends, always with the end of its log.
    pub async fn wait_ready<F, Fut>(&self, limit: Duration, probe: F) -> Result<(), ReadyError>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<(), String>>,
    {
        match self {
            Self::Process(process) => process.wait_ready(limit, probe).await,
            Self::Job(job) => process::wait_ready(&job.name, &job.log, limit, || job.ended(), probe).await,
        }
    }

    /// Asks it to end (SIGTERM), waits for `grace` at most, then kills it.
    pub fn stop(mut self, grace: Duration) {
        match &mut self {
            // A process that cannot be waited for is gone already.
            Self::Process(process) => drop(process.stop(grace)),
            Self::Job(job) => {
                job.running.signal(Signal::SIGTERM).ok();
                job.running.ends_within(grace);
            }
        }
    }
}

impl Job {
    /// How it ended, if it has.
    fn ended(&self) -> Option<String> {
        self.running.ends_within(Duration::ZERO).then(|| match self.running.wait() {
            Ok(output) => format!("exit status {}", output.status),
            Err(error) => error.to_string(),
        })
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // A guest that is off has none to be told.
        if self.running.signal(Signal::SIGKILL).is_ok() {
            self.running.ends_within(KILL_LIMIT);
        }
    }
}
