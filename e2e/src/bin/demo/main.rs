//! The quickstart, for real, on this machine: a control plane, an S3 server and Berth; a Debian disk image imported
//! into the bucket; a volume made of it and mounted; then everything taken away again, and counted.
//!
//! `DEMO_IMAGE` (a path or an http address) takes the place of the Debian image, `DEMO_PARTITION` names the partition
//! of it that is mounted, `DEMO_KEEP=1` leaves everything running until Ctrl-C.

mod debian;
mod screen;
mod tour;

use std::cell::Cell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use berth_e2e::leaks::{self, Snapshot};
use berth_e2e::site::Site;
use tokio::signal::unix::{SignalKind, signal};

use crate::screen::Screen;

/// The most that the demonstration occupies on the disk at once. Unit: bytes.
const NEEDED_BYTES: u64 = 8 << 30;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    if let Some(reason) = Site::obstacle() {
        bail!("this machine cannot run a node: {reason}");
    }
    let started = Instant::now();
    let kept = kept_folder()?;
    let dir = kept.join("demo");
    fs::create_dir_all(&dir).with_context(|| format!("failed to make {}", dir.display()))?;
    let dir = fs::canonicalize(&dir)?;
    let lock = File::create(kept.join("demo.lock"))?;
    ensure!(lock.try_lock().is_ok(), "another demonstration runs in {}", dir.display());
    clean(&dir).context("failed to take away what a killed demonstration left")?;
    check_space(&dir)?;
    let look = || Snapshot::of_machine(&dir).outside_temporary();
    let before = look();
    let screen = Screen::new();
    let runtime = tokio::runtime::Runtime::new()?;
    let (images, keeping) = (kept.join("images"), Cell::new(false));
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = tour::run(&screen, &dir, &images, &keeping) => outcome,
            name = stop_signal(&keeping) => Err(anyhow::anyhow!("stopped by {name}")),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    if outcome.is_err() {
        screen.line(&format!("logs stay in {}", dir.join("site/logs").display()));
    } else {
        clean(&dir)?;
    }
    let left = before.settle(Duration::from_secs(10), look);
    for thing in &left {
        screen.line(&format!("left behind: {thing}"));
    }
    outcome?;
    ensure!(left.is_empty(), "{} things are there that were not there before", left.len());
    screen
        .line("Nothing is left: no process, no mount, no loop or device-mapper device, no network namespace");
    screen.line(&format!("more than before. All in {:.0} s.", started.elapsed().as_secs_f32()));
    Ok(())
}

/// Where things are kept between two runs: `${XDG_CACHE_HOME:-$HOME/.cache}/berth`.
fn kept_folder() -> anyhow::Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    Ok(base.context("neither XDG_CACHE_HOME nor HOME is set")?.join("berth"))
}

/// Takes away what lies in the folder, and the loop devices of a run that was killed.
fn clean(dir: &Path) -> anyhow::Result<()> {
    let attached = leaks::detach_loops_below(dir);
    ensure!(attached.is_empty(), "still attached: {attached:?}");
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.with_context(|| format!("failed to remove {}", path.display()))?;
    }
    Ok(())
}

fn check_space(dir: &Path) -> anyhow::Result<()> {
    let free = nix::sys::statvfs::statvfs(dir).context("failed to ask for free space")?;
    let free = free.blocks_available().saturating_mul(free.fragment_size());
    let gib = |bytes: u64| bytes >> 30;
    ensure!(
        free >= NEEDED_BYTES,
        "{} has {} GiB free; {} are needed",
        dir.display(),
        gib(free),
        gib(NEEDED_BYTES)
    );
    Ok(())
}

/// Returns at the first signal that is not the one that ends a tour which only waits.
async fn stop_signal(keeping: &Cell<bool>) -> &'static str {
    let wait = async |kind| match signal(kind) {
        Ok(mut signal) => drop(signal.recv().await),
        Err(_) => std::future::pending().await,
    };
    loop {
        let name = tokio::select! {
            () = wait(SignalKind::interrupt()) => "Ctrl-C",
            () = wait(SignalKind::terminate()) => "SIGTERM",
        };
        if !keeping.replace(false) {
            return name;
        }
    }
}
