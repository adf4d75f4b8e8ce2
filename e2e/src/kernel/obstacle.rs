//! Whether this machine can run a guest.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use crate::process::Program;

/// Where Debian's package user-mode-linux has the guest's kernel modules, by release.
pub const MODULE_ROOT: &str = "/usr/lib/uml/modules";

/// Where a guest's memory lies: a file that is never on a disk.
pub const MEMORY: &str = "/dev/shm";

/// Commands that the guest needs, with their Debian packages.
const COMMANDS: [(&str, &str); 8] = [
    ("linux.uml", "user-mode-linux"),
    ("modprobe", "kmod"),
    ("perl", "perl-base"),
    ("ip", "iproute2"),
    ("unshare", "util-linux"),
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("mountpoint", "util-linux"),
];

/// The last thing that the kernel says of what a container may forbid; without that it ends.
const LAST_CHECK: &str = "Checking PROT_EXEC mmap in /dev/shm...OK";

/// How long the kernel may take for its checks.
const TRIAL_LIMIT: Duration = Duration::from_secs(20);

/// Why no guest can run here; looked up once.
pub fn obstacle() -> Option<String> {
    static FOUND: LazyLock<Option<String>> = LazyLock::new(look);
    FOUND.clone()
}

/// The kernel.
pub fn kernel() -> Option<PathBuf> {
    found("linux.uml")
}

fn look() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("a guest needs root: namespaces, and the machine's files as its own".to_owned());
    }
    let missing: Vec<&str> =
        COMMANDS.iter().filter(|(name, _)| found(name).is_none()).map(|(_, package)| *package).collect();
    if !missing.is_empty() || !Path::new(MODULE_ROOT).is_dir() {
        let packages = if missing.is_empty() { "user-mode-linux".to_owned() } else { missing.join(" ") };
        return Some(format!("no user-mode Linux: missing packages {packages} (make setup)"));
    }
    try_ptrace().err()
}

/// Starts the kernel until it has found that it may trace processes, as containers often forbid.
fn try_ptrace() -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
    let kernel = kernel().ok_or("linux.uml is not on PATH")?;
    let words = [format!("uml_dir={}/", folder.path().display()), "umid=trial".into(), "mem=32M".into()];
    let program = Program::new("linux.uml", &kernel, &folder.path().join("log")).args(words);
    let process = program.env("TMPDIR", MEMORY).spawn();
    let process = process.map_err(|error| format!("linux.uml does not start: {error}"))?;
    let deadline = Instant::now() + TRIAL_LIMIT;
    loop {
        let (running, said) = (process.is_running(), process.log_tail());
        if said.contains(LAST_CHECK) {
            return Ok(());
        }
        if !running || Instant::now() >= deadline {
            let last = said.lines().last().unwrap_or("it says nothing");
            return Err(format!("user-mode Linux does not run here: {last}"));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn found(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.find_map(|folder| Some(folder.join(name)).filter(|path| path.is_file()))
}
