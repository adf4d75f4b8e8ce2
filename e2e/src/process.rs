//! Child processes that cannot outlive their test.
//!
//! **Guarantees**
//! * A child runs in a process group of its own and is killed by the kernel when the process that started it ends in
//!   any way, SIGKILL included. `setpriv` arms that signal and then becomes the program, so [`Process::pid`] is the
//!   program's own.
//! * Children are started by one thread that lives as long as this process: the kernel ties the death signal to the
//!   *thread* that forked, and a test thread may end while its child is still wanted.
//! * Signals go only to a child that has not been reaped, so never to a stranger with a reused number.
//!
//! What the child itself starts is covered by [`Process::stop`] and by dropping the handle (the whole group is
//! killed), not by the death signal.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{LazyLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::wait::{self, Look, WaitError};

/// How much of the end of a log goes into an error message. Unit: bytes.
const TAIL_BYTES: u64 = 4096;

/// A program to be started, with its arguments, environment and log file.
#[derive(Debug, Clone)]
pub struct Program {
    name: String,
    path: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    log: PathBuf,
}

/// Why a program could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The log file could not be opened.
    #[error("failed to open log {path}")]
    Log {
        /// The log file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The program could not be executed: `setpriv` (util-linux) is missing.
    #[error("failed to start {name} through setpriv")]
    Start {
        /// The program.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a program is not ready.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    /// It ended before it was ready.
    #[error("{name} ended ({status}) before it was ready; end of its log:\n{log_tail}")]
    Ended {
        /// The program.
        name: String,
        /// How it ended.
        status: String,
        /// The end of its log.
        log_tail: String,
    },
    /// It runs and was not ready in time.
    #[error("{name} was not ready within {limit:?}, last seen: {last}; end of its log:\n{log_tail}")]
    TimedOut {
        /// The program.
        name: String,
        /// How long it was waited for.
        limit: Duration,
        /// What the last probe saw.
        last: String,
        /// The end of its log.
        log_tail: String,
    },
}

impl ReadyError {
    /// Whether the program's log says that its port was taken by somebody else: then another port helps.
    pub fn is_port_race(&self) -> bool {
        let (Self::Ended { log_tail, .. } | Self::TimedOut { log_tail, .. }) = self;
        log_tail.contains("already in use")
    }
}

impl Program {
    /// The program at `path`, called `name` in messages, writing its output to the end of `log`.
    pub fn new(name: &str, path: &Path, log: &Path) -> Self {
        Self {
            name: name.to_owned(),
            path: path.to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            log: log.to_owned(),
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets one variable of the environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// The same program, started by another one whose last arguments are it and its own.
    #[must_use]
    pub fn through<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, starter: &Path, args: I) -> Self {
        let before = args.into_iter().map(|arg| arg.as_ref().to_owned());
        let path = std::mem::replace(&mut self.path, starter.to_owned());
        self.args = before.chain([path.into_os_string()]).chain(self.args).collect();
        self
    }

    /// What it is called in messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Where its output goes.
    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// It and its arguments.
    pub(crate) fn words(&self) -> impl Iterator<Item = &OsStr> {
        [self.path.as_os_str()].into_iter().chain(self.args.iter().map(OsString::as_os_str))
    }

    /// The variables of its environment that are set for it.
    pub(crate) fn variables(&self) -> &[(OsString, OsString)] {
        &self.env
    }

    /// Starts it.
    ///
    /// # Errors
    /// [`SpawnError`]. A program that does not exist shows as a process that ends with status 127.
    pub fn spawn(&self) -> Result<Process, SpawnError> {
        let log = self.open_log()?;
        let output = log.try_clone().map_err(|source| SpawnError::Log { path: self.log.clone(), source })?;
        self.spawn_with(Stdio::null(), output.into(), log.into())
    }

    /// Starts it with pipes to its standard input and from its standard output; only its standard error goes to the
    /// log. The second pipe ends when the program and everything it started has ended.
    ///
    /// # Errors
    /// Like [`Program::spawn`].
    pub fn spawn_piped(&self) -> Result<(Process, ChildStdin, ChildStdout), SpawnError> {
        let log = self.open_log()?;
        let mut process = self.spawn_with(Stdio::piped(), Stdio::piped(), log.into())?;
        let input = process.child.stdin.take().expect("it was started with a pipe");
        let output = process.child.stdout.take().expect("it was started with a pipe");
        Ok((process, input, output))
    }

    fn open_log(&self) -> Result<File, SpawnError> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log);
        log.map_err(|source| SpawnError::Log { path: self.log.clone(), source })
    }

    fn spawn_with(&self, input: Stdio, output: Stdio, errors: Stdio) -> Result<Process, SpawnError> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(&self.path).args(&self.args);
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.stdin(input).stdout(output).stderr(errors).process_group(0);
        let child = fork(command).map_err(|source| SpawnError::Start { name: self.name.clone(), source })?;
        Ok(Process { name: self.name.clone(), child, log: self.log.clone() })
    }
}

type Order = (Command, mpsc::Sender<io::Result<Child>>);

/// Starts `command` on the thread that lives as long as this process.
fn fork(command: Command) -> io::Result<Child> {
    static STARTER: LazyLock<mpsc::Sender<Order>> = LazyLock::new(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, reply) in inbox {
                // A caller that no longer listens gets its child killed, not leaked.
                if let Err(mpsc::SendError(Ok(mut child))) = reply.send(command.spawn()) {
                    child.kill().and_then(|()| child.wait()).ok();
                }
            }
        });
        orders
    });
    let (reply, answer) = mpsc::channel();
    STARTER.send((command, reply)).map_err(io::Error::other)?;
    answer.recv().map_err(io::Error::other)?
}

/// A running child process; dropping the handle kills its whole group.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// The program's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Whether it still runs. Does not reap it.
    pub fn is_running(&self) -> bool {
        self.ended().is_none()
    }

    /// The last 4 KiB of its output, in whole lines.
    pub fn log_tail(&self) -> String {
        log_tail(&self.log)
    }

    /// Waits until `probe` says that the program answers, for `limit` at most.
    ///
    /// # Errors
    /// [`ReadyError`], at once when the program ends, always with the end of its log.
    pub async fn wait_ready<F, Fut>(&self, limit: Duration, probe: F) -> Result<(), ReadyError>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<(), String>>,
    {
        wait_ready(&self.name, &self.log, limit, || self.ended(), probe).await
    }

    /// Asks it to end (SIGTERM), waits for `grace` at most, then kills what is left of its group.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn stop(&mut self, grace: Duration) -> io::Result<ExitStatus> {
        self.signal(Signal::SIGTERM);
        let deadline = Instant::now() + grace;
        while self.is_running() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        self.kill9()
    }

    /// Kills its whole group at once (SIGKILL) and reaps it.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill9(&mut self) -> io::Result<ExitStatus> {
        self.signal(Signal::SIGKILL);
        self.child.wait()
    }

    /// Sends `signal` to its group, unless it has been reaped already.
    pub fn signal(&mut self, signal: Signal) {
        // An ended child that is not reaped still holds its number, and its group may have members left.
        let reaped = !self.is_running() && self.peek().is_err();
        if !reaped {
            killpg(self.group(), signal).ok();
        }
    }

    fn group(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// How it ended, if it has; leaves it to be reaped.
    fn ended(&self) -> Option<String> {
        match self.peek() {
            Ok(WaitStatus::StillAlive) => None,
            Ok(WaitStatus::Exited(_, code)) => Some(format!("exit status {code}")),
            Ok(WaitStatus::Signaled(_, signal, _)) => Some(format!("killed by {signal}")),
            Ok(other) => Some(format!("{other:?}")),
            Err(errno) => Some(format!("already reaped: {errno}")),
        }
    }

    fn peek(&self) -> Result<WaitStatus, Errno> {
        waitid(Id::Pid(self.group()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill9().ok();
    }
}

/// Waits until `probe` says that a program answers, for `limit` at most, or until `ended` says how it has ended.
pub(crate) async fn wait_ready<F, Fut>(
    name: &str,
    log: &Path,
    limit: Duration,
    ended: impl Fn() -> Option<String>,
    mut probe: F,
) -> Result<(), ReadyError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<(), String>>,
{
    let waited = wait::until(name, limit, || {
        let ended = ended();
        let probing = probe();
        async move {
            match ended {
                Some(status) => Look::Failed(status),
                None => probing.await.map_or_else(Look::NotYet, Look::Done),
            }
        }
    })
    .await;
    let (name, log_tail) = (name.to_owned(), log_tail(log));
    waited.map_err(|error| match error {
        WaitError::Failed { source: status, .. } => ReadyError::Ended { name, status, log_tail },
        WaitError::TimedOut { limit, last, .. } => ReadyError::TimedOut { name, limit, last, log_tail },
    })
}

/// The last 4 KiB of a log, in whole lines.
pub(crate) fn log_tail(log: &Path) -> String {
    tail(log).unwrap_or_else(|error| format!("(log {} not readable: {error})", log.display()))
}

/// The last [`TAIL_BYTES`] of a file, without the first, cut line.
fn tail(path: &Path) -> io::Result<String> {
    let length = fs::metadata(path)?.len();
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let whole = if length > TAIL_BYTES { text.split_once('\n').map_or("", |(_, rest)| rest) } else { &text };
    Ok(whole.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(dir: &Path, script: &str) -> Process {
        Program::new("sh", Path::new("sh"), &dir.join("log")).args(["-c", script]).spawn().unwrap()
    }

    fn alive(pid: u32) -> bool {
        // A zombie that init has not collected yet counts as dead.
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    }

    fn gone_soon(pid: u32) -> bool {
        let deadline = Instant::now() + Duration::from_secs(10);
        while alive(pid) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        !alive(pid)
    }

    #[tokio::test]
    async fn a_program_that_ends_early_is_told_with_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let process = shell(dir.path(), "echo listen: address already in use; exit 3");
        let never = || std::future::ready(Err("no answer".to_owned()));
        let error = process.wait_ready(Duration::from_secs(20), never).await.unwrap_err();
        assert!(error.is_port_race(), "{error}");
        assert!(error.to_string().contains("exit status 3"), "{error}");
    }

    #[test]
    fn a_program_that_ignores_sigterm_is_killed_after_the_grace() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = shell(dir.path(), "trap '' TERM; echo up; while :; do sleep 0.05; done");
        while !process.log_tail().contains("up") {
            thread::sleep(Duration::from_millis(10));
        }
        let started = Instant::now();
        let status = process.stop(Duration::from_millis(300)).unwrap();
        assert!(started.elapsed() >= Duration::from_millis(300) && !status.success());
        assert!(!process.is_running());
    }

    #[test]
    fn dropping_the_handle_takes_the_grandchildren_along() {
        let dir = tempfile::tempdir().unwrap();
        let process = shell(dir.path(), "sleep 60 & echo $!; wait");
        let deadline = Instant::now() + Duration::from_secs(10);
        let grandchild: u32 = loop {
            if let Ok(pid) = process.log_tail().parse() {
                break pid;
            }
            assert!(Instant::now() < deadline, "the shell printed nothing");
            thread::sleep(Duration::from_millis(10));
        };
        assert!(alive(grandchild));
        drop(process);
        assert!(gone_soon(grandchild));
    }

    #[test]
    fn a_child_survives_the_thread_that_asked_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let process = thread::spawn(move || shell(&path, "exec sleep 60")).join().unwrap();
        thread::sleep(Duration::from_millis(200));
        assert!(process.is_running());
        // What the kernel will do at our own death is armed, or a crash of the tests would leak servers.
        let comm = fs::read_to_string(format!("/proc/{}/comm", process.pid())).unwrap();
        assert_eq!(comm.trim(), "sleep", "setpriv has become the program");
    }
}
