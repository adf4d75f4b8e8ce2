//! Short-lived child processes: found, bounded in time, and their last words kept.

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

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
    let name = || program.to_owned();
    let path = find_program(program).ok_or_else(|| RunError::NotInstalled { program: name() })?;
    let mut child = Command::new(path)
        .args(args)
        .env_clear()
        .env("LC_ALL", "C")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| RunError::Start { program: name(), source })?;
    let out = child.stdout.take().map(|pipe| std::thread::spawn(move || tail(pipe)));
    let err = child.stderr.take().map(|pipe| std::thread::spawn(move || tail(pipe)));
    let status =
        wait_until(&mut child, limit).map_err(|source| RunError::Start { program: name(), source })?;
    let text = |reader: Option<std::thread::JoinHandle<Vec<u8>>>| {
        let bytes = reader.and_then(|thread| thread.join().ok()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    };
    let (out, err) = (text(out), text(err));
    match status {
        None => Err(RunError::TimedOut { program: name(), limit, output: err }),
        Some(status) if !status.success() => Err(RunError::Failed { program: name(), status, output: err }),
        Some(_) => Ok(out),
    }
}

/// `None` if it had to be killed.
fn wait_until(child: &mut Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
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
    fn only_the_tail_is_kept() {
        let mut kept = Vec::new();
        keep_tail(&mut kept, &[b'a'; TAIL_BYTES]);
        keep_tail(&mut kept, b"end");
        assert_eq!(kept.len(), TAIL_BYTES);
        assert!(kept.ends_with(b"aend"));
    }
}
