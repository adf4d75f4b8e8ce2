//! One run of a guest, from power on to its end: the process, and the serial line that it is told things over.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::process::{Process, Program, SpawnError};

/// How long a killed guest may take to be gone. Unit: seconds.
const END_LIMIT: Duration = Duration::from_secs(20);

/// How a guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Its power was cut by us.
    Cut,
    /// It was asked to power off.
    Off,
    /// By itself: a panic, or somebody killed it.
    Died,
}

/// What has been heard from the guest.
#[derive(Debug, Default)]
struct Heard {
    release: Option<String>,
    finished: HashMap<u64, i32>,
    /// How it is about to end, once we have asked for it.
    expected: Option<End>,
    ended: Option<End>,
}

/// What the thread that listens to the guest shares with everybody who waits.
#[derive(Debug, Default)]
struct Ear {
    heard: Mutex<Heard>,
    changed: Condvar,
}

/// A guest that was started.
#[derive(Debug)]
pub struct Guest {
    dir: PathBuf,
    process: Mutex<Process>,
    line: Mutex<ChildStdin>,
    ear: Arc<Ear>,
    next_job: AtomicU64,
    /// The locks of its disks, given back once it is gone.
    locks: Mutex<Vec<File>>,
}

impl Guest {
    /// Starts `program`, which is to have the serial line as its standard input and output; `dir` is the folder that
    /// the guest sees as `/run/berth/host`.
    pub fn start(program: &Program, dir: &Path, locks: Vec<File>) -> Result<Self, SpawnError> {
        let (process, line, output) = program.spawn_piped()?;
        let ear = Arc::new(Ear::default());
        let listener = Arc::clone(&ear);
        thread::spawn(move || listener.listen(output));
        Ok(Self {
            dir: dir.to_owned(),
            process: Mutex::new(process),
            line: Mutex::new(line),
            ear,
            next_job: AtomicU64::new(1),
            locks: Mutex::new(locks),
        })
    }

    /// Waits until it takes orders; returns the release of its kernel.
    pub fn wait_ready(&self, limit: Duration) -> Option<String> {
        self.ear.wait(limit, |heard| heard.release.clone().map(Some).or(heard.ended.map(|_| None))).flatten()
    }

    /// Has it run the script, with the given standard input; returns the number of the job.
    pub fn run(&self, script: &[u8], input: &[u8]) -> std::io::Result<u64> {
        let job = self.next_job.fetch_add(1, Ordering::Relaxed);
        let dir = self.job_dir(job);
        fs::create_dir_all(&dir)?;
        for (name, content) in [("command", script), ("stdin", input), ("stdout", b""), ("stderr", b"")] {
            fs::write(dir.join(name), content)?;
        }
        self.tell(&format!("run {job}\n"))?;
        Ok(job)
    }

    /// Sends a signal to all processes of a job; nothing happens when it has ended.
    pub fn signal(&self, job: u64, signal: Signal) -> std::io::Result<()> {
        let name = signal.as_str();
        self.tell(&format!("signal {job} {}\n", name.strip_prefix("SIG").unwrap_or(name)))
    }

    /// Waits until the job or the guest has ended, for `limit` at most.
    pub fn wait_job(&self, job: u64, limit: Duration) -> Option<Result<i32, End>> {
        self.ear
            .wait(limit, |heard| heard.finished.get(&job).map(|status| Ok(*status)).or(heard.ended.map(Err)))
    }

    /// Where a job's standard output and error are, also after the end of the guest.
    pub fn job_dir(&self, job: u64) -> PathBuf {
        self.dir.join("jobs").join(job.to_string())
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<End> {
        self.ear.heard().ended
    }

    /// Asks it to write everything to its disks and power off, and waits for that; then cuts.
    pub fn power_off(&self, limit: Duration) -> End {
        self.ear.expect(End::Off);
        // A guest that is gone already cannot be told.
        self.tell("off\n").ok();
        let ended = self.ear.wait(limit, |heard| heard.ended);
        self.finish();
        ended.unwrap_or(End::Cut)
    }

    /// Cuts its power; when this returns, none of its processes is left.
    pub fn cut(&self) {
        self.ear.expect(End::Cut);
        self.finish();
    }

    /// Stops or continues its processor: what its disks and network have been told already may still happen.
    pub fn set_hung(&self, hung: bool) -> bool {
        let holder = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        // unshare, its shell (the first process of the namespace), the kernel.
        let kernel = holder.is_running().then(|| child_of(holder.pid()).and_then(child_of)).flatten();
        let signal = if hung { Signal::SIGSTOP } else { Signal::SIGCONT };
        kernel.is_some_and(|pid| kill(Pid::from_raw(pid.cast_signed()), signal).is_ok())
    }

    /// The end of its console.
    pub fn console(&self) -> String {
        self.process.lock().unwrap_or_else(PoisonError::into_inner).log_tail()
    }

    fn tell(&self, order: &str) -> std::io::Result<()> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.write_all(order.as_bytes())?;
        line.flush()
    }

    /// Kills whatever is left of it and waits until it is gone.
    fn finish(&self) {
        // Whoever cannot be waited for is gone already.
        self.process.lock().unwrap_or_else(PoisonError::into_inner).kill9().ok();
        // Its output ends when the last process that could write to it has gone.
        self.ear.wait(END_LIMIT, |heard| heard.ended);
        self.locks.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.cut();
    }
}

impl Ear {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expect(&self, end: End) {
        self.heard().expected.get_or_insert(end);
    }

    /// Reads what the guest says until it is gone.
    fn listen(&self, output: ChildStdout) {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            self.take(&String::from_utf8_lossy(&line));
        }
        let mut heard = self.heard();
        heard.ended = Some(heard.expected.unwrap_or(End::Died));
        drop(heard);
        self.changed.notify_all();
    }

    fn take(&self, line: &str) {
        let mut heard = self.heard();
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["berth", "ready", release] => heard.release = Some(release.to_owned()),
            ["berth", "done", job, status] => {
                if let (Ok(job), Ok(status)) = (job.parse(), status.parse()) {
                    heard.finished.insert(job, status);
                }
            }
            _ => {}
        }
        drop(heard);
        self.changed.notify_all();
    }

    /// Waits until `look` finds something, for `limit` at most.
    fn wait<T>(&self, limit: Duration, look: impl Fn(&Heard) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + limit;
        let mut heard = self.heard();
        loop {
            if let Some(found) = look(&heard) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            heard = self.changed.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The first child of a process.
fn child_of(parent: u32) -> Option<u32> {
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // The parent is the second field behind the name, which is in parentheses.
        let found: u32 = stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()?;
        (found == parent).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_says_is_taken_line_by_line_and_noise_is_not() {
        let ear = Ear::default();
        for line in ["Core dump limits :", "berth ready 6.1.176", "berth done 3 137", "berth done x 1", ""] {
            ear.take(line);
        }
        let heard = ear.heard();
        assert_eq!(heard.release.as_deref(), Some("6.1.176"));
        assert_eq!(heard.finished, HashMap::from([(3, 137)]));
        assert_eq!(heard.ended, None);
    }

    #[test]
    fn the_first_reason_of_an_end_counts_and_waiting_is_limited() {
        let ear = Ear::default();
        assert_eq!(ear.wait(Duration::from_millis(20), |heard| heard.ended), None);
        ear.expect(End::Off);
        ear.expect(End::Cut);
        assert_eq!(ear.heard().expected, Some(End::Off));
    }
}
