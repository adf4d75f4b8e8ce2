//! Commands in a guest.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::config::job_script;
use super::guest::{End, Guest};

/// How much of an output goes into a message. Unit: bytes.
const TAIL_BYTES: usize = 4096;

/// A command to be run in a guest.
#[derive(Debug)]
#[must_use = "it does nothing until it is run"]
pub struct GuestCommand {
    pub(super) host: String,
    /// Nothing while the host is off.
    pub(super) guest: Option<Arc<Guest>>,
    pub(super) words: Vec<OsString>,
    pub(super) env: Vec<(OsString, OsString)>,
    pub(super) folder: PathBuf,
    pub(super) input: Vec<u8>,
    pub(super) limit: Duration,
}

/// A command that ran to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit status; 128 + N when signal N ended it.
    pub status: i32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Its standard output as text, without the end of the last line.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }
}

/// Why a command did not do what it was to do.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It ended with another status than 0.
    #[error("`{command}` on host {host} ended with status {status}{said}")]
    Failed {
        /// The host.
        host: String,
        /// The command.
        command: String,
        /// Its exit status; 128 + N when signal N ended it.
        status: i32,
        /// The ends of its outputs, each under a line of its own.
        said: String,
    },
    /// It had not ended at its limit, and was killed unless the guest hangs.
    #[error("`{command}` on host {host} had not ended after {limit:?}{said}")]
    TimedOut {
        /// The host.
        host: String,
        /// The command.
        command: String,
        /// How long it was waited for.
        limit: Duration,
        /// The ends of its outputs.
        said: String,
    },
    /// The power of its host was cut before it ended.
    #[error("the power of host {host} was cut while `{command}` ran")]
    Cut {
        /// The host.
        host: String,
        /// The command.
        command: String,
    },
    /// Its host was shut down before it ended.
    #[error("host {host} was shut down while `{command}` ran")]
    ShutDown {
        /// The host.
        host: String,
        /// The command.
        command: String,
    },
    /// Its host's kernel ended before it did.
    #[error("host {host} died while `{command}` ran; end of its console:\n{console}")]
    Died {
        /// The host.
        host: String,
        /// The command.
        command: String,
        /// The end of the host's console.
        console: String,
    },
    /// Its host is not running.
    #[error("host {host} is off, so `{command}` cannot run")]
    Off {
        /// The host.
        host: String,
        /// The command.
        command: String,
    },
    /// It could not be given to the guest, or its output could not be read.
    #[error("failed to pass `{command}` to host {host}, or its output back")]
    Pass {
        /// The host.
        host: String,
        /// The command.
        command: String,
        /// What the system said.
        source: io::Error,
    },
}

impl GuestCommand {
    /// Sets a variable of its environment.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Its working folder, `/` otherwise.
    pub fn folder(mut self, folder: &Path) -> Self {
        folder.clone_into(&mut self.folder);
        self
    }

    /// Its standard input, empty otherwise.
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// How long [`GuestCommand::run`], [`GuestCommand::output`] and [`Running::wait`] wait for its end.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs it to its end, which must be with status 0.
    ///
    /// # Errors
    /// [`CommandError`].
    pub fn run(self) -> Result<Output, CommandError> {
        self.start()?.wait_success()
    }

    /// Runs it to its end, whatever its status.
    ///
    /// # Errors
    /// [`CommandError`], but not [`CommandError::Failed`].
    pub fn output(self) -> Result<Output, CommandError> {
        self.start()?.wait()
    }

    /// Starts it and returns at once.
    ///
    /// # Errors
    /// [`CommandError::Off`], [`CommandError::Pass`].
    pub fn start(self) -> Result<Running, CommandError> {
        let command = self.words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        let Self { host, guest, words, env, folder, input, limit } = self;
        let Some(guest) = guest.filter(|guest| guest.ended().is_none()) else {
            return Err(CommandError::Off { host, command });
        };
        match guest.run(&job_script(&folder, &env, &words), &input) {
            Ok(job) => Ok(Running { host, command, guest, job, limit }),
            Err(source) => Err(CommandError::Pass { host, command, source }),
        }
    }
}

/// A command that was started in a guest. Dropping it does not end the command; the end of its host does.
#[derive(Debug)]
pub struct Running {
    host: String,
    command: String,
    guest: Arc<Guest>,
    job: u64,
    limit: Duration,
}

impl Running {
    /// Waits for its end, whatever its status, as long as the command's limit; then kills it.
    ///
    /// # Errors
    /// [`CommandError`], but not [`CommandError::Failed`].
    pub fn wait(&self) -> Result<Output, CommandError> {
        let (host, command) = (self.host.clone(), self.command.clone());
        match self.guest.wait_job(self.job, self.limit) {
            Some(Ok(status)) => {
                Ok(Output { status, stdout: self.read("stdout")?, stderr: self.read("stderr")? })
            }
            Some(Err(End::Cut)) => Err(CommandError::Cut { host, command }),
            Some(Err(End::Off)) => Err(CommandError::ShutDown { host, command }),
            Some(Err(End::Died)) => Err(CommandError::Died { host, command, console: self.guest.console() }),
            None => {
                self.signal(Signal::SIGKILL)?;
                let said = said(&self.stdout()?, &self.stderr()?);
                Err(CommandError::TimedOut { host, command, limit: self.limit, said })
            }
        }
    }

    /// Like [`Running::wait`], and its status must be 0.
    ///
    /// # Errors
    /// [`CommandError`].
    pub fn wait_success(&self) -> Result<Output, CommandError> {
        let output = self.wait()?;
        if output.status == 0 {
            return Ok(output);
        }
        Err(CommandError::Failed {
            host: self.host.clone(),
            command: self.command.clone(),
            status: output.status,
            said: said(&output.stdout, &output.stderr),
        })
    }

    /// Whether it ends within `limit`, or has ended; whatever happened to its host is an end too.
    pub fn ends_within(&self, limit: Duration) -> bool {
        self.guest.wait_job(self.job, limit).is_some()
    }

    /// What it has written to its standard output up to now; also after its host has lost power.
    ///
    /// # Errors
    /// [`CommandError::Pass`].
    pub fn stdout(&self) -> Result<Vec<u8>, CommandError> {
        self.read("stdout")
    }

    /// What it has written to its standard error up to now.
    ///
    /// # Errors
    /// [`CommandError::Pass`].
    pub fn stderr(&self) -> Result<Vec<u8>, CommandError> {
        self.read("stderr")
    }

    /// Sends a signal to all its processes (its process group); nothing happens when it has ended.
    ///
    /// # Errors
    /// [`CommandError::Pass`].
    pub fn signal(&self, signal: Signal) -> Result<(), CommandError> {
        self.guest.signal(self.job, signal).map_err(|source| self.pass_error(source))
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, CommandError> {
        fs::read(self.guest.job_dir(self.job).join(name)).map_err(|source| self.pass_error(source))
    }

    fn pass_error(&self, source: io::Error) -> CommandError {
        CommandError::Pass { host: self.host.clone(), command: self.command.clone(), source }
    }
}

/// The ends of both outputs, for a message.
fn said(stdout: &[u8], stderr: &[u8]) -> String {
    let part = |name: &str, bytes: &[u8]| {
        let text =
            String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(TAIL_BYTES)..]).trim_end().to_owned();
        if text.is_empty() { text } else { format!("\n{name}:\n{text}") }
    };
    part("standard output", stdout) + &part("standard error", stderr)
}
