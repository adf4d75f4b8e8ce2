//! Child processes: found, bounded in time or in their group, and their last words kept.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use thiserror::Error;

/// How many bytes of a program's last output are kept for messages.
pub(crate) const TAIL_BYTES: usize = 4096;

/// Why a program did not do what it was run for.
#[derive(Debug, Error)]
pub enum RunError {
    /// It is not installed.
    #[error("program {program} is not installed")]
    NotInstalled {
        /// Its name.
        program: String,
    },
    /// The kernel did not start it.
    #[error("failed to start {program}")]
    Start {
        /// Its name.
        program: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It ran longer than it may and was killed.
    #[error("{program} was killed after {} s: {output}", limit.as_secs())]
    TimedOut {
        /// Its name.
        program: String,
        /// The limit.
        limit: Duration,
        /// The end of what it printed.
        output: String,
    },
    /// It printed more than it is expected to, so its answer was not used.
    #[error("{program} printed more than {most} bytes")]
    TooMuch {
        /// Its name.
        program: String,
        /// How many bytes it may print.
        most: usize,
    },
    /// It ended with an error.
    #[error("{program} failed ({status}): {output}")]
    Failed {
        /// Its name.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it printed.
        output: String,
    },
}

/// Where `program` is installed: in `PATH`, or where system programs lie.
pub fn find_program(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|dir| dir.join(program)).find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    file.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Runs `program` to its end and gives back what it printed to standard output (its last [`TAIL_BYTES`] bytes).
/// Killed when it runs longer than `limit`. It gets an empty environment and no input.
pub(crate) fn run<I, A>(program: &str, args: I, limit: Duration) -> Result<String, RunError>
where
    I: IntoIterator<Item = A>,
    A: AsRef<OsStr>,
{
    let mut child = Running::start(program, args, &[])?;
    let out = child.stdout().map(|pipe| std::thread::spawn(move || tail(pipe)));
    child.end(Instant::now() + limit, limit)?;
    let bytes = out.and_then(|thread| thread.join().ok()).unwrap_or_default();
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// As [`run`], with `env` besides; gives back all of the output, or fails if that is more than `most` bytes.
pub(crate) fn run_whole(
    program: &str,
    args: &[&OsStr],
    env: &[(&str, &str)],
    most: usize,
    limit: Duration,
) -> Result<String, RunError> {
    let mut child = Running::start(program, args, env)?;
    let out = child.stdout().map(|pipe| std::thread::spawn(move || whole(pipe, most)));
    child.end(Instant::now() + limit, limit)?;
    let bytes = out.and_then(|thread| thread.join().ok()).unwrap_or_default();
    if bytes.len() > most {
        return Err(RunError::TooMuch { program: program.to_owned(), most });
    }
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// As [`run`], with `env` besides; gives each line of the output to `each` as it comes, and holds few of them at once.
pub(crate) fn run_lines(
    program: &str,
    args: &[&OsStr],
    env: &[(&str, &str)],
    limit: Duration,
    mut each: impl FnMut(&str),
) -> Result<(), RunError> {
    let deadline = Instant::now() + limit;
    let mut child = Running::start(program, args, env)?;
    if let Some(pipe) = child.stdout() {
        let (give, take) = std::sync::mpsc::sync_channel(LINES_AHEAD);
        std::thread::spawn(move || {
            let mut reader = BufReader::new(pipe).split(b'\n');
            while let Some(Ok(line)) = reader.next() {
                if give.send(line).is_err() {
                    break;
                }
            }
        });
        while let Ok(line) = take.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            each(&String::from_utf8_lossy(&line));
        }
    }
    child.end(deadline, limit)
}

/// How many lines of output wait for their reader.
const LINES_AHEAD: usize = 256;
/// How long a killed child has to be gone; one that the kernel holds on to is left to it then.
const KILL_WAIT: Duration = Duration::from_secs(2);

/// A child that was started.
struct Running {
    name: String,
    child: Child,
    stderr: Option<std::thread::JoinHandle<Vec<u8>>>,
}

impl Running {
    fn start<I, A>(program: &str, args: I, env: &[(&str, &str)]) -> Result<Self, RunError>
    where
        I: IntoIterator<Item = A>,
        A: AsRef<OsStr>,
    {
        let name = || program.to_owned();
        let path = find_program(program).ok_or_else(|| RunError::NotInstalled { program: name() })?;
        let mut child = Command::new(path)
            .args(args)
            .env_clear()
            .env("LC_ALL", "C")
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| RunError::Start { program: name(), source })?;
        let stderr = child.stderr.take().map(|pipe| std::thread::spawn(move || tail(pipe)));
        Ok(Self { name: name(), child, stderr })
    }

    fn stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Waits for its end, and kills it at `deadline`. A killed child that does not end within [`KILL_WAIT`], because the
    /// kernel waits for a device on its behalf, is left behind, and reaped whenever it ends.
    fn end(mut self, deadline: Instant, limit: Duration) -> Result<(), RunError> {
        let start_error = |source| RunError::Start { program: self.name.clone(), source };
        let mut status = wait_until(&mut self.child, deadline).map_err(start_error)?;
        let killed = status.is_none();
        if killed {
            self.child.kill().map_err(start_error)?;
            status = wait_until(&mut self.child, Instant::now() + KILL_WAIT).map_err(start_error)?;
        }
        let Some(status) = status else {
            let output = "it is still waiting in the kernel".to_owned();
            std::thread::spawn(move || self.child.wait());
            return Err(RunError::TimedOut { program: self.name, limit, output });
        };
        let bytes = self.stderr.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        let output = String::from_utf8_lossy(&bytes).trim().to_owned();
        match status.success() {
            _ if killed => Err(RunError::TimedOut { program: self.name, limit, output }),
            true => Ok(()),
            false => Err(RunError::Failed { program: self.name, status, output }),
        }
    }
}

/// A child that works until it is stopped, in a process group of its own. Dropping it leaves it working.
#[derive(Debug)]
pub(crate) struct Service {
    name: String,
    child: Child,
    words: Arc<Mutex<Vec<u8>>>,
}

impl Service {
    /// Starts it after `prepare` has completed its command. It gets an empty environment, no input, and its output to
    /// standard error is kept as its last words.
    pub(crate) fn start(program: &str, prepare: impl FnOnce(&mut Command)) -> Result<Self, RunError> {
        let name = program.to_owned();
        let Some(path) = find_program(program) else { return Err(RunError::NotInstalled { program: name }) };
        let mut command = Command::new(path);
        command.env_clear().env("LC_ALL", "C").current_dir("/").process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        prepare(&mut command);
        let spawned = command.spawn();
        let mut child = spawned.map_err(|source| RunError::Start { program: name.clone(), source })?;
        let words = Arc::new(Mutex::new(Vec::new()));
        if let Some(mut pipe) = child.stderr.take() {
            let words = Arc::clone(&words);
            std::thread::spawn(move || {
                let mut buffer = [0; 1024];
                while let Ok(n @ 1..) = pipe.read(&mut buffer) {
                    keep_tail(&mut words.lock().unwrap_or_else(PoisonError::into_inner), &buffer[..n]);
                }
            });
        }
        Ok(Self { name, child, words })
    }

    /// Its process, and that of its group.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, with its last words, if it has.
    pub(crate) fn ended(&mut self) -> Result<Option<RunError>, RunError> {
        let status = self.child.try_wait().map_err(|source| self.error(source))?;
        Ok(status.map(|status| RunError::Failed {
            program: self.name.clone(),
            status,
            output: self.last_words(),
        }))
    }

    /// The end of what it printed to standard error.
    pub(crate) fn last_words(&self) -> String {
        let words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&words).trim().to_owned()
    }

    /// Asks its group to end, kills what has not ended after `grace`, and waits for its end.
    pub(crate) fn stop(mut self, grace: Duration) -> Result<(), RunError> {
        for (signal, wait) in [(Signal::SIGTERM, grace), (Signal::SIGKILL, KILL_WAIT)] {
            // Until it was waited for, its number is nobody else's.
            if let Ok(group) = i32::try_from(self.child.id()) {
                let _ = killpg(Pid::from_raw(group), signal); // what has ended is what was wanted
            }
            if wait_until(&mut self.child, Instant::now() + wait)
                .map_err(|source| self.error(source))?
                .is_some()
            {
                return Ok(());
            }
        }
        let output = "it is still waiting in the kernel".to_owned();
        let error = RunError::TimedOut { program: self.name, limit: grace, output };
        std::thread::spawn(move || self.child.wait());
        Err(error)
    }

    fn error(&self, source: std::io::Error) -> RunError {
        RunError::Start { program: self.name.clone(), source }
    }
}

/// `None` if it has not ended by then.
fn wait_until(child: &mut Child, deadline: Instant) -> std::io::Result<Option<ExitStatus>> {
    let mut pause = Duration::from_millis(1); // most are done within a few milliseconds
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

/// All that comes, but at most one byte more than `most`.
fn whole(mut pipe: impl Read, most: usize) -> Vec<u8> {
    let mut kept = Vec::new();
    let limit = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
    // An error ends it as the end does: the exit status tells the rest.
    let _ = pipe.by_ref().take(limit).read_to_end(&mut kept);
    let _ = std::io::copy(&mut pipe, &mut std::io::sink());
    kept
}

fn tail(mut pipe: impl Read) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(n @ 1..) = pipe.read(&mut buffer) {
        keep_tail(&mut kept, &buffer[..n]);
    }
    kept
}

/// Appends to `kept` and drops from its front what exceeds [`TAIL_BYTES`].
pub(crate) fn keep_tail(kept: &mut Vec<u8>, more: &[u8]) {
    kept.extend_from_slice(more);
    if kept.len() > TAIL_BYTES {
        kept.drain(..kept.len() - TAIL_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_comes_back_and_failures_carry_the_last_words() {
        assert_eq!(run("sh", ["-c", "echo out; echo err >&2"], Duration::from_secs(10)).unwrap(), "out");
        let error = run("sh", ["-c", "echo broken >&2; exit 3"], Duration::from_secs(10)).unwrap_err();
        assert!(error.to_string().contains("broken"), "{error}");
        assert!(matches!(
            run("no-such-program", [""; 0], Duration::ZERO),
            Err(RunError::NotInstalled { .. })
        ));
    }

    #[test]
    fn a_program_that_hangs_is_killed() {
        let started = Instant::now();
        let error = run("sleep", ["60"], Duration::from_millis(100)).unwrap_err();
        assert!(matches!(error, RunError::TimedOut { .. }), "{error}");
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn whole_output_is_bounded_and_lines_come_one_by_one() {
        let script = [OsStr::new("-c"), OsStr::new("echo one; echo $TWO")];
        let limit = Duration::from_secs(10);
        let env = [("TWO", "2")];
        assert_eq!(run_whole("sh", &script, &env, 6, limit).unwrap(), "one\n2");
        let error = run_whole("sh", &script, &env, 5, limit).unwrap_err();
        assert!(matches!(error, RunError::TooMuch { most: 5, .. }), "{error}");
        let mut lines = Vec::new();
        run_lines("sh", &script, &env, limit, |line| lines.push(line.to_owned())).unwrap();
        assert_eq!(lines, ["one", "2"]);
        let hangs = [OsStr::new("-c"), OsStr::new("echo one; exec sleep 60")];
        let started = Instant::now();
        let error = run_lines("sh", &hangs, &env, Duration::from_millis(200), |_| {}).unwrap_err();
        assert!(matches!(error, RunError::TimedOut { .. }), "{error}");
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_service_is_stopped_with_all_its_group() {
        let start = |script: &str| {
            let prepare = |command: &mut Command| {
                command.args(["-c", script]);
            };
            Service::start("sh", prepare).unwrap()
        };
        let mut ends = start("echo why >&2; exit 4");
        let deadline = Instant::now() + Duration::from_secs(10);
        let error = loop {
            if let Some(error) = ends.ended().unwrap() {
                break error;
            }
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(10));
        };
        assert!(error.to_string().contains('4'), "{error}");

        // Neither the shell nor its child ends when asked to.
        let mut stubborn = start("trap '' TERM; sleep 60 & echo $! >&2; wait; wait; sleep 60");
        let child = loop {
            let words = stubborn.last_words();
            if !words.is_empty() {
                break words;
            }
            assert!(Instant::now() < deadline && stubborn.ended().unwrap().is_none());
            std::thread::sleep(Duration::from_millis(10));
        };
        let started = Instant::now();
        stubborn.stop(Duration::from_millis(200)).unwrap();
        assert!(started.elapsed() < Duration::from_secs(10));
        let gone = || match std::fs::read_to_string(format!("/proc/{child}/stat")) {
            Ok(stat) => stat.contains(") Z "),
            Err(_) => true,
        };
        while !gone() {
            assert!(Instant::now() < deadline + Duration::from_secs(10), "its child {child} goes on");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn only_the_tail_is_kept() {
        let mut kept = Vec::new();
        keep_tail(&mut kept, &[b'a'; TAIL_BYTES]);
        keep_tail(&mut kept, b"end");
        assert_eq!(kept.len(), TAIL_BYTES);
        assert!(kept.ends_with(b"aend"));
    }
}
