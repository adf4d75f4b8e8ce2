//! The supervisor as a process of its own: what a killed plugin, a killed server and a killed supervisor leave behind.
//!
//! What needs device mapper or kernel NBD says so and passes where there is none; what needs a disk of 1 GiB that may be
//! wiped takes the one named in `BERTH_TEST_DISK`, or the first one of a user-mode Linux.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

mod keeper;
mod plugin;
mod protocol;
mod suspensions;
mod templates;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use berth_core::ids::Uid;
use berth_node::supervisor::client::Client;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long anything may take that takes a moment on an idle machine.
const SOON: Duration = Duration::from_secs(30);

/// `dmsetup`, counted on to kill the process named in a file, once, as soon as it has suspended something.
const SCRIPT: &str = r#"#!/bin/sh
"$REAL" "$@"
status=$?
case "$1" in
suspend)
  echo "$*" >>"$DIR/suspensions"
  if [ -e "$DIR/victim" ]; then
    victim=$(cat "$DIR/victim")
    rm "$DIR/victim"
    [ "$victim" != parent ] || victim=$PPID
    kill -"$(cat "$DIR/signal" 2>/dev/null || echo 9)" "$victim"
    : >"$DIR/killed"
    sleep "$(cat "$DIR/pause" 2>/dev/null || echo 0)"
  fi ;;
esac
exit "$status"
"#;

/// A folder for one test at a time.
struct Stage {
    dir: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Stage {
    fn new() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        Self { dir: tempfile::tempdir().unwrap(), _alone: alone }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("run/supervisor.sock")
    }

    fn client(&self) -> Client {
        Client::new(&self.socket())
    }

    /// Where programs are looked for, the script before all others.
    fn search(&self) -> String {
        let bin = self.path("bin");
        if !bin.exists() {
            fs::create_dir(&bin).unwrap();
            let real = berth_device::find_program("dmsetup").unwrap_or_else(|| "/bin/false".into());
            let script = SCRIPT.replace("$REAL", real.to_str().unwrap());
            let path = bin.join("dmsetup");
            fs::write(&path, script.replace("$DIR", self.dir.path().to_str().unwrap())).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        format!("{}:/usr/sbin:/sbin:/usr/bin:/bin", bin.display())
    }

    /// Who dies with the next suspension: a process, or whoever suspends.
    fn next_suspension_kills(&self, victim: Option<u32>) {
        let victim = victim.map_or_else(|| "parent".to_owned(), |process| process.to_string());
        fs::write(self.path("victim"), victim).unwrap();
    }

    fn was_killed(&self) -> bool {
        fs::remove_file(self.path("killed")).is_ok()
    }

    /// Starts a supervisor; it may not answer yet.
    fn start_supervisor(&self) -> Process {
        let mut program = Command::new(env!("CARGO_BIN_EXE_berth-node"));
        program.arg("supervise").arg("--socket").arg(self.socket()).arg("--run-dir").arg(self.path("run"));
        program.env("PATH", self.search()).env("RUST_LOG", "info").env("RUST_BACKTRACE", "0");
        Process(program.spawn().unwrap())
    }

    /// Starts a supervisor that answers.
    fn supervisor(&self) -> Process {
        let started = self.start_supervisor();
        self.await_supervisor();
        started
    }

    fn await_supervisor(&self) {
        wait_until("the supervisor answers", SOON, || self.client().hello().is_ok());
    }
}

/// A process that does not outlive the test.
struct Process(Child);

impl Process {
    fn id(&self) -> u32 {
        self.0.id()
    }

    /// Kills it, as nobody can be kept from.
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// Asks it to end, and waits until it has.
    fn end(mut self) {
        signal(self.id(), Signal::SIGTERM);
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn signal(process: u32, which: Signal) {
    kill(Pid::from_raw(i32::try_from(process).unwrap()), which).unwrap();
}

fn wait_until(what: &str, limit: Duration, mut test: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !test() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a program of the test's own and fails with what it printed.
fn run(program: &str, arguments: &[&str]) -> String {
    let path = berth_device::find_program(program).unwrap_or_else(|| panic!("{program} is not installed"));
    let output = Command::new(path).args(arguments).env("DM_DISABLE_UDEV", "1").output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// The processes of `qemu-nbd` that live.
fn nbd_servers() -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
        if stat.contains("(qemu-nbd)") && !matches!(state, Some('Z' | 'X') | None) {
            found.push(process);
        }
    }
    found
}

fn uid(n: u32) -> Uid {
    Uid::from(format!("{n:08x}-1111-4222-8333-444455556666"))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
